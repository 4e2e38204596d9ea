// SPDX-License-Identifier: Apache-2.0
//
// Executors do what their concept says, and attend() gives the same bits on all of them: however many threads there
// are, in whatever order they work, whether they share heads or only the layer. This program is also run under
// ThreadSanitizer.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kvsparse/interop/eigen_executor.hpp"
#include "kvsparse/interop/openmp_executor.hpp"
#include "kvsparse/interop/thread_team.hpp"
#include "kvsparse/kvsparse.hpp"
#include "support/rows.hpp"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
// LLVM's OpenMP runtime has memory of its threads until the process ends.
extern "C" const char* __lsan_default_suppressions() { return "leak:libomp"; }
#endif
#endif

namespace kvsparse_test {
namespace {

using namespace kvsparse;

/// An executor with a name. `threads` is the concurrency that it claims.
struct Named {
  std::string name;
  std::size_t threads;
  std::function<void(std::size_t, RangeBody)> run;
  void operator()(std::size_t count, RangeBody body) const { run(count, body); }
  std::size_t concurrency() const { return threads; }
};

/// The calling thread, in an order that `arrange` makes of 0, 1, ..., claiming so many threads.
Named in_order(const std::string& name, std::size_t claimed, std::function<void(std::vector<std::size_t>&)> arrange) {
  return {name + " claiming " + std::to_string(claimed), claimed, [=](std::size_t count, RangeBody body) {
            std::vector<std::size_t> order = first_positions(count);
            arrange(order);
            for (const std::size_t i : order) body(i);
          }};
}

/// One std::thread for each index.
void thread_for_each(std::size_t count, RangeBody body) {
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < count; ++i) threads.emplace_back([=] { body(i); });
  for (std::thread& thread : threads) thread.join();
}

template <class E, class... Keep>
Named holding(const std::string& name, std::shared_ptr<E> executor, Keep... keep) {
  return {name, executor->concurrency(), [=](std::size_t count, RangeBody body) {
            ((void)keep, ...);
            (*executor)(count, body);
          }};
}

#if defined(__SANITIZE_THREAD__)
#define KVSPARSE_TEST_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define KVSPARSE_TEST_TSAN 1
#endif
#endif
#if defined(KVSPARSE_TEST_TSAN)
constexpr bool only_real_threads = true;  // ThreadSanitizer is slow, and has nothing to see on one thread
#else
constexpr bool only_real_threads = false;
#endif

const std::vector<Named>& executors() {
  static const std::vector<Named> all = [] {
    std::vector<Named> list;
    for (const std::size_t claimed : {0U, 1U, 3U, 64U}) {
      if (only_real_threads) break;
      list.push_back(in_order("ascending", claimed, [](auto&) {}));
      list.push_back(in_order("reversed", claimed, [](auto& order) { std::reverse(order.begin(), order.end()); }));
      list.push_back(in_order("shuffled", claimed, [](auto& order) {
        TestRng rng(order.size());
        for (std::size_t i = order.size(); i > 1; --i) {
          std::swap(order[i - 1], order[static_cast<std::size_t>(rng.below(static_cast<int>(i)))]);
        }
      }));
    }
    list.push_back({"a thread for each index", 0, thread_for_each});
    for (const std::size_t threads : {1U, 2U, 3U, 8U}) {
      list.push_back(holding("team of " + std::to_string(threads), std::make_shared<ThreadTeam>(threads)));
    }
    list.push_back(
        holding("team of 3 that sleeps at once", std::make_shared<ThreadTeam>(3, std::chrono::nanoseconds(0))));
    for (const int threads : {1, 3}) {
      auto pool = std::make_shared<Eigen::ThreadPool>(threads);
      list.push_back(
          holding("Eigen's pool of " + std::to_string(threads), std::make_shared<EigenExecutor>(*pool), pool));
    }
#if defined(_OPENMP)
    for (const std::size_t threads : {1U, 2U, 5U}) {
      list.push_back(holding("OpenMP with " + std::to_string(threads), std::make_shared<OpenMpExecutor>(threads)));
    }
#endif
    return list;
  }();
  return all;
}

// ---------------------------------------------------------------------------------------------------------- executors

TEST(Executors, CallTheBodyOnceForEachIndexAndSeeWhatItWrote) {
  for (const Named& executor : executors()) {
    SCOPED_TRACE(executor.name);
    for (const std::size_t count : {0U, 1U, 2U, 3U, 7U, 64U, 200U}) {
      std::vector<std::size_t> seen(count, 0);  // plain: the executor orders these accesses
      std::size_t given = 1;
      const auto body = [&](std::size_t i) noexcept { seen[i] += given + i; };
      executor(count, body);
      ++given;
      executor(count, body);
      for (std::size_t i = 0; i < count; ++i) ASSERT_EQ(seen[i], 3 + 2 * i);
    }
  }
}

TEST(Executors, AReferenceRunsWhatItRefersTo) {
  std::vector<std::size_t> order;
  auto backwards = [&](std::size_t count, RangeBody body) {
    for (std::size_t i = count; i-- > 0;) body(i);
  };
  const auto body = [&](std::size_t i) noexcept { order.push_back(i); };
  const ExecutorRef ref(backwards);
  const ExecutorRef copy = ref;
  copy(3, body);
  EXPECT_EQ(order, (std::vector<std::size_t>{2, 1, 0}));
  EXPECT_EQ(copy.concurrency(), 0U) << "unknown";
  SerialExecutor serial;
  ThreadTeam team(3);
  EXPECT_EQ(ExecutorRef(serial).concurrency(), 1U);
  EXPECT_EQ(ExecutorRef(team).concurrency(), 3U);
}

TEST(Executors, AreWhatTheConceptAsksFor) {
  const auto may_throw = [](std::size_t) {};
  const auto nothrow = [](std::size_t) noexcept {};
  static_assert(!std::is_constructible_v<RangeBody, decltype(may_throw)&>, "a body must not throw");
  static_assert(std::is_constructible_v<RangeBody, decltype(nothrow)&>);
  static_assert(Executor<SerialExecutor> && Executor<ExecutorRef> && Executor<ThreadTeam> && Executor<Named>);
  static_assert(Executor<EigenExecutor> && Executor<const EigenExecutor&> && !Executor<int>);
  static_assert(is_nothrow_executor<SerialExecutor> && is_nothrow_executor<ThreadTeam&>);
  static_assert(!is_nothrow_executor<Named> && !is_nothrow_executor<ExecutorRef>);
  using Cache = PagedKvCache<Dense>;
  using In = HeadRows<const float>;
  using Out = HeadRows<float>;
  using Lse = std::span<float>;
  static_assert(noexcept(attend(std::declval<Cache&>(), In{}, Out{}, Lse{})));
  static_assert(noexcept(attend(std::declval<Cache&>(), In{}, Out{}, Lse{}, std::declval<ThreadTeam&>())));
  static_assert(!noexcept(attend(std::declval<Cache&>(), In{}, Out{}, Lse{}, std::declval<Named&>())));
}

/// Waits until `arrived` bodies are here at the same time; false when they are not for ten seconds.
bool meets(std::atomic<std::size_t>& here, std::size_t arrived) {
  ++here;
  const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  while (here < arrived) {
    if (std::chrono::steady_clock::now() > give_up) return false;
    std::this_thread::yield();
  }
  return true;
}

TEST(Executors, AsManyBodiesRunAtTheSameTimeAsTheySay) {
  for (const Named& executor : executors()) {
    if (executor.name.find("claiming") != std::string::npos || executor.threads == 0) continue;
    SCOPED_TRACE(executor.name);
    std::atomic<std::size_t> here{0};
    std::atomic<std::size_t> met{0};
    const auto body = [&](std::size_t) noexcept { met += meets(here, executor.threads) ? 1 : 0; };
    executor(executor.threads, body);
    EXPECT_EQ(met, executor.threads);
  }
}

// --------------------------------------------------------------------------------------------------------- ThreadTeam

TEST(ThreadTeams, SurviveManyShortRuns) {
  for (const std::size_t threads : {1U, 2U, 3U, 8U}) {
    for (const auto spin : {std::chrono::nanoseconds(0), std::chrono::nanoseconds(std::chrono::microseconds(20))}) {
      ThreadTeam team(threads, spin);
      EXPECT_EQ(team.concurrency(), threads);
      const std::size_t runs = spin.count() == 0 ? 300 : 3000;
      std::size_t expected = 0;
      std::atomic<std::size_t> sum{0};
      std::vector<std::size_t> each(5, 0);
      for (std::size_t run = 0; run < runs; ++run) {
        const std::size_t count = run % 6;
        const auto body = [&, run](std::size_t i) noexcept {
          sum += run + i;
          each[i] += run;
        };
        team(count, body);
        for (std::size_t i = 0; i < count; ++i) expected += run + i;
        ASSERT_EQ(sum, expected) << "a run returned early, or did an index twice";
      }
      for (std::size_t i = 0; i < 5; ++i) {
        std::size_t of_index = 0;
        for (std::size_t run = 0; run < runs; ++run) of_index += run % 6 > i ? run : 0;
        ASSERT_EQ(each[i], of_index);
      }
    }
  }
}

TEST(ThreadTeams, ARunWithinARunIsDoneByItsCaller) {
  ThreadTeam team(3);
  std::vector<std::size_t> sums(4, 0);
  std::vector<int> others(4, 0);
  const auto outer = [&](std::size_t i) noexcept {
    const std::thread::id self = std::this_thread::get_id();
    const auto inner = [&](std::size_t j) noexcept {
      sums[i] += j;
      others[i] += std::this_thread::get_id() == self ? 0 : 1;
    };
    team(10, inner);
  };
  for (int repeat = 0; repeat < 20; ++repeat) team(4, outer);
  EXPECT_EQ(sums, std::vector<std::size_t>(4, 20 * 45));
  EXPECT_EQ(others, std::vector<int>(4, 0));
}

TEST(ThreadTeams, MayBeCalledFromSeveralThreads) {
  ThreadTeam team(2);
  std::vector<std::size_t> sums(3, 0);
  const auto caller = [&](std::size_t who) noexcept {
    for (int run = 0; run < 300; ++run) {
      std::atomic<std::size_t> sum{0};
      const auto body = [&](std::size_t i) noexcept { sum += i; };
      team(5, body);
      sums[who] += sum;
    }
  };
  thread_for_each(3, caller);
  EXPECT_EQ(sums, std::vector<std::size_t>(3, 3000));
}

TEST(ThreadTeams, EndWhetherTheirThreadsSpinSleepOrHaveJustWorked) {
  std::atomic<int> calls{0};
  const auto body = [&](std::size_t) noexcept { ++calls; };
  for (int i = 0; i < 30; ++i) {
    { const ThreadTeam never_used(3); }
    {
      ThreadTeam just_used(3);
      just_used(3, body);
    }
    {
      ThreadTeam asleep(2, std::chrono::nanoseconds(0));
      asleep(2, body);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  EXPECT_EQ(calls, 30 * 5);
}

TEST(EigenPools, ARunOnAThreadOfThePoolDoesNotWaitForThePool) {
  Eigen::ThreadPool pool(1);
  EigenExecutor executor(pool);
  std::atomic<int> calls{0};
  Eigen::Notification done;
  pool.Schedule([&] {
    const auto body = [&](std::size_t) noexcept { ++calls; };
    executor(4, body);
    done.Notify();
  });
  done.Wait();
  EXPECT_EQ(calls, 4);
}

// --------------------------------------------------------------------------------------- the same bits on all of them

void mix(std::uint64_t& hash, float value) { hash = (hash ^ std::bit_cast<std::uint32_t>(value)) * 0x100000001b3U; }

/// Uses everything that a query can be steered by, and feeds all it is shown back into the next output: a difference in
/// any bit of the evidence changes what residual() adds. Even pages are selected, then odd ones in two further rounds,
/// some with weights, some with every third token masked. Evicts the oldest page of all heads.
struct Everything {
  static constexpr std::string_view name = "everything";
  static constexpr PolicyScope scope = PolicyScope::layer;
  static constexpr PolicyGranularity granularity = PolicyGranularity::token;
  static constexpr bool select_always = true;
  static constexpr EvidenceKind evidence =
      EvidenceKind::page_mass | EvidenceKind::largest_token_mass | EvidenceKind::token_weights;
  struct HeadState {
    std::uint64_t seen = 0xcbf29ce484222325U;
  };
  struct LayerState {
    std::uint64_t seen = 0xcbf29ce484222325U;
  };
  std::int64_t rotated = 0;  // by how much pages 6 and 7 rotate the query back

  void select(HeadView<Everything> head, QueryGroup, Selection& selection) const { add(head, selection, 0); }
  void select_more(HeadView<Everything> head, QueryGroup, std::span<const SoftmaxState> states,
                   Selection& selection) const {
    std::uint64_t& seen = head.head_state().seen;
    for (const SoftmaxState& state : states) {
      mix(seen, state.log_sum_exp());
      mix(seen, state.accumulator[0]);
    }
    if (head.size() < 2 || !selection.contains(PageIndex{1})) {
      add(head, selection, 1);
    } else {
      add(head, selection, 3);
    }
  }
  void residual(HeadView<Everything> head, QueryGroup queries, std::span<SoftmaxState> states) const {
    float value[64];
    std::fill_n(value, queries.head_dim, 0.5F);
    const float logit = static_cast<float>(head.head_state().seen >> 40) * 0x1p-24F;
    for (SoftmaxState& state : states) merge(state, SoftmaxState{value, logit, 1.0F}, queries.head_dim);
  }
  void observe(HeadView<Everything> head, const Evidence& step) const {
    std::uint64_t& seen = head.head_state().seen;
    for (std::size_t q = 0; q < step.group(); ++q) {
      mix(seen, step.log_sum_exp(q));
      for (const PageIndex page : head.pages()) {
        if (!step.visited(page, q)) continue;
        mix(seen, step.mass(page, q));
        mix(seen, step.largest_token_mass(page, q));
        for (const float weight : step.token_weights(page, q).first(head.tokens(page))) mix(seen, weight);
      }
    }
  }
  PageIndex victim(LayerView<Everything> layer) const {
    return layer.head(0).lowest_evictable([&](PageIndex page) { return layer.head(0).first_position(page); });
  }
  void on_step_end(LayerView<Everything> layer) const {
    std::uint64_t& seen = layer.layer_state().seen;
    for (std::size_t h = 0; h < layer.heads(); ++h) seen = seen * 31 + layer.head(h).head_state().seen;
    for (std::size_t h = 0; h < layer.heads(); ++h) layer.head(h).head_state().seen ^= seen;
  }

 private:
  void add(HeadView<Everything> head, Selection& selection, std::uint32_t first) const {
    for (const PageIndex page : head.pages()) {
      if (page.value % 4 != first && page.value % 4 != (first == 0 ? 2 : first)) continue;
      SelectedPage selected{page, {}, 0.0F, 0.0F, page.value / 2 == 3 ? rotated : 0};
      if (page.value % 5 == 0) selected.log_weight = 0.25F;
      if (page.value % 7 == 0) {
        const auto mask = selection.token_mask(page);
        for (std::uint32_t slot = 0; slot < head.tokens(page); ++slot) {
          if (slot % 3 != 1) mask[slot / 64] |= std::uint64_t{1} << (slot % 64);
        }
        selected.tokens = mask;
      }
      selection.add(selected);
    }
  }
};

/// Each query head reads every page but those of a remainder of its own.
struct EachItsOwn {
  static constexpr std::string_view name = "each_its_own";
  static constexpr SelectionScope selection = SelectionScope::query_head;
  static constexpr EvidenceKind evidence = EvidenceKind::page_mass;
  struct HeadState {
    std::uint64_t seen = 0xcbf29ce484222325U;
  };
  void select(HeadView<EachItsOwn> head, QueryGroup queries, Selection& reads) const {
    const auto own =
        static_cast<std::uint32_t>(std::bit_cast<std::uint32_t>(queries[0][0]) + head.head_state().seen) % 5;
    for (const PageIndex page : head.pages()) {
      if (page.value % 5 != own) reads.add(page);
    }
  }
  void observe(HeadView<EachItsOwn> head, const Evidence& step) const {
    for (const PageIndex page : head.pages()) {
      if (step.visited(page)) mix(head.head_state().seen, step.group_mass(page));
    }
  }
};

/// All that a decode leaves behind.
struct Trail {
  std::vector<float> numbers;  // outputs and log-sum-exps
  std::vector<Position> positions;
  std::size_t read_tokens = 0;

  void add_state_of(const auto& cache) {
    for (std::size_t h = 0; h < cache.geometry().kv_heads; ++h) {
      for (const Position position : cache.resident_positions(h)) positions.push_back(position);
      for (const Position position : cache.read_positions(h)) positions.push_back(position);
    }
    read_tokens += cache.stats().last_read_tokens;
  }
  friend bool operator==(const Trail& a, const Trail& b) {
    return a.numbers.size() == b.numbers.size() &&
           std::memcmp(a.numbers.data(), b.numbers.data(), a.numbers.size() * sizeof(float)) == 0 &&
           a.positions == b.positions && a.read_tokens == b.read_tokens;
  }
};

/// A prompt of three tokens that is attended to, then a decode whose last `attended` steps are: by the overloads that
/// take an executor, or by those that do not.
template <class Policy, class Scalar>
class Decode {
 public:
  Decode(const CacheConfig& config, const Policy& policy, std::size_t tokens)
      : rows_(tokens, config, tokens + config.head_dim), empty_(config, policy) {}

  template <class... E>
  Trail run(std::size_t attended, E&... executor) const {
    PagedKvCache<Policy, Scalar> cache = empty_;
    Trail trail;
    const std::size_t row = rows_.query_heads * rows_.head_dim;
    std::vector<float> out(prompt * row, 7.0F), lse(rows_.query_heads, 7.0F);
    const auto chunk = [&](const std::vector<float>& data, std::size_t heads) {
      return TokenRows<const float>(data.data(), prompt, heads, rows_.head_dim);
    };
    EXPECT_TRUE(cache.append_prompt(chunk(rows_.k, rows_.kv_heads), chunk(rows_.v, rows_.kv_heads)).ok());
    EXPECT_TRUE(attend_prompt(cache, chunk(rows_.q, rows_.query_heads),
                              TokenRows<float>(out.data(), prompt, rows_.query_heads, rows_.head_dim), executor...)
                    .ok());
    trail.numbers = out;
    out.resize(row);
    for (std::size_t t = prompt; t < rows_.tokens; ++t) {
      EXPECT_TRUE(cache.append(rows_.token_k(t), rows_.token_v(t)).ok());
      if (t + attended < rows_.tokens) continue;
      EXPECT_TRUE(attend(cache, rows_.token_q(t), std::span<float>(out), std::span<float>(lse), executor...).ok());
      trail.numbers.insert(trail.numbers.end(), out.begin(), out.end());
      trail.numbers.insert(trail.numbers.end(), lse.begin(), lse.end());
      trail.add_state_of(cache);
    }
    return trail;
  }

 private:
  static constexpr std::size_t prompt = 3;
  Rows rows_;
  PagedKvCache<Policy, Scalar> empty_;
};

struct Shape {
  std::size_t query_heads, kv_heads, head_dim, page_size, tokens;
};

/// `resident`: what an evicting policy may keep; `read`: what a selecting one may read.
template <class Policy, class Scalar>
void expect_the_same_bits(const Shape& shape, std::size_t resident, std::size_t read, const Policy& policy = {}) {
  CacheConfig config;
  config.query_heads = shape.query_heads;
  config.kv_heads = shape.kv_heads;
  config.head_dim = shape.head_dim;
  config.page_size = shape.page_size;
  config.budget_tokens = resident;
  config.read_budget_tokens = read;
  config.max_tokens = shape.tokens;
  if (shape.head_dim > 1) config.rope = {.theta = 10000.0, .rotary_dims = shape.head_dim - shape.head_dim % 2};
  const Decode<Policy, Scalar> decode(config, policy, shape.tokens);
  constexpr std::size_t attended = 5;  // of all the shapes below, one of them opens a page
  const Trail alone = decode.run(attended);
  ASSERT_TRUE(std::any_of(alone.numbers.begin(), alone.numbers.end(), [](float x) { return x != 0.0F; }));
  for (const Named& executor : executors()) {
    EXPECT_TRUE(decode.run(attended, executor) == alone)
        << Policy::name << " in " << scalar_name<Scalar> << ", " << shape.kv_heads << " kv heads of "
        << shape.query_heads / shape.kv_heads << ", page size " << shape.page_size << ": " << executor.name;
  }
}

// One head of three ranges and a bit; two heads; more heads than most teams have threads, pages that do not divide a
// range; single tokens as pages.
constexpr Shape shapes[] = {{4, 1, 24, 16, 3300}, {2, 2, 40, 7, 2102}, {15, 5, 8, 256, 2562}, {3, 1, 7, 1, 2100}};

TEST(SameBits, ForDenseInEveryStorageType) {
  for (const Shape& shape : shapes) {
    expect_the_same_bits<Dense, float>(shape, 0, 0);
    expect_the_same_bits<Dense, Half>(shape, 0, 0);
    expect_the_same_bits<Dense, Bfloat16>(shape, 0, 0);
    expect_the_same_bits<Dense, Int8>(shape, 0, 0);
  }
}

TEST(SameBits, ForShortHeads) {
  expect_the_same_bits<Dense, float>({1, 1, 1, 16, 18}, 0, 0);
  expect_the_same_bits<Raas, Half>({8, 4, 64, 4, 102}, 32, 0);
  expect_the_same_bits<Quest, Half>({8, 4, 64, 4, 102}, 0, 32);
}

TEST(SameBits, ForEvictors) {
  for (const Shape& shape : {shapes[0], shapes[2]}) {
    expect_the_same_bits<Raas, float>(shape, 2304, 0);
    expect_the_same_bits<H2o, Half>(shape, 2304, 0);
    expect_the_same_bits<Random, Bfloat16>(shape, 2304, 0);
  }
}

TEST(SameBits, ForSelectors) {
  Quest each;
  each.options.pool = Quest::Pool::query_head;
  for (const Shape& shape : {shapes[0], shapes[1]}) {
    expect_the_same_bits<Quest, float>(shape, 0, 1500);
    expect_the_same_bits<Quest, Half>(shape, 0, 1500, each);
    expect_the_same_bits<Compose<Raas, Quest>, Half>(shape, 2000, 1500);
  }
  expect_the_same_bits<Oracle, float>({2, 1, 8, 4, 1602}, 0, 1200);
}

TEST(SameBits, ForPoliciesThatSteerEverything) {
  for (const Shape& shape : shapes) {
    // Page size 1 has 2100 pages of one token each; the others read several ranges in the first selection.
    const std::size_t resident = shape.tokens - shape.page_size;
    expect_the_same_bits<Everything, float>(shape, resident, shape.page_size);
    expect_the_same_bits<Everything, float>(shape, resident, shape.page_size, Everything{11});
  }
  expect_the_same_bits<EachItsOwn, float>(shapes[1], 0, 7);
  expect_the_same_bits<EachItsOwn, float>({12, 4, 8, 16, 2002}, 0, 16);
}

// ------------------------------------------------------------------------------------------------ ranges and the truth

/// Reads all and keeps each page's mass for the first query head of the group.
struct Masses {
  static constexpr std::string_view name = "masses";
  static constexpr EvidenceKind evidence = EvidenceKind::page_mass;
  std::vector<double>* mass = nullptr;
  void observe(HeadView<Masses> head, const Evidence& step) const {
    if (head.kv_head() != 0) return;
    mass->clear();
    for (const PageIndex page : head.pages()) mass->push_back(static_cast<double>(step.mass(page, 0)));
  }
};

TEST(Ranges, OfALongHeadAddUpToTheExactAttention) {
  ThreadTeam team(3);
  for (const std::size_t page_size : {1U, 16U, 200U}) {
    // One range exactly, a token beyond it, two, and three and a bit.
    for (const std::size_t tokens : {1024U, 1025U, 2048U, 3300U}) {
      SCOPED_TRACE(std::to_string(tokens) + " tokens in pages of " + std::to_string(page_size));
      const CacheConfig config{
          .query_heads = 6, .kv_heads = 2, .head_dim = 24, .page_size = page_size, .max_tokens = tokens};
      const Rows rows(tokens, config, tokens);
      std::vector<double> mass;
      PagedKvCache<Masses> cache(config, Masses{&mass});
      for (std::size_t t = 0; t < tokens; ++t) ASSERT_TRUE(cache.append(rows.token_k(t), rows.token_v(t)).ok());
      std::vector<float> out(6 * 24), lse(6);
      ASSERT_TRUE(attend(cache, rows.token_q(tokens - 1), out, lse, team).ok());
      for (std::size_t head = 0; head < 6; ++head) {
        const ExactAttention exact = rows.exact(tokens - 1, head, first_positions(tokens));
        for (std::size_t i = 0; i < 24; ++i) {
          ASSERT_NEAR(static_cast<double>(out[head * 24 + i]), exact.out[i], 1e-5) << head;
        }
        ASSERT_NEAR(static_cast<double>(lse[head]), exact.log_sum_exp, 1e-5);
        if (head > 0) continue;
        for (std::size_t page = 0; page < mass.size(); ++page) {
          double expected = 0.0;
          for (std::size_t t = page * page_size; t < std::min(tokens, (page + 1) * page_size); ++t) {
            expected += exact.weights[t];
          }
          ASSERT_NEAR(mass[page], expected, 1e-5 * expected + 1e-9) << "page " << page;
        }
      }
    }
  }
}

/// Masks a stretch of tokens that holds whole ranges: the first, the second, or all.
struct Masked {
  static constexpr std::string_view name = "masked";
  static constexpr PolicyGranularity granularity = PolicyGranularity::token;
  std::int64_t first = 0, last = 0;
  void select(HeadView<Masked> head, QueryGroup, Selection& selection) const {
    for (const PageIndex page : head.pages()) {
      const auto mask = selection.token_mask(page);
      for (std::uint32_t slot = 0; slot < head.tokens(page); ++slot) {
        const std::int64_t position = (head.first_position(page) + slot).value;
        if (position < first || position >= last) mask[slot / 64] |= std::uint64_t{1} << (slot % 64);
      }
      selection.add({page, mask, 0.0F, 0.0F, 0});
    }
  }
};

TEST(Ranges, ThatAreMaskedWholeCountForNothing) {
  constexpr std::size_t tokens = 2200;
  const CacheConfig config{
      .query_heads = 2, .kv_heads = 1, .head_dim = 8, .page_size = 16, .read_budget_tokens = 16, .max_tokens = tokens};
  const Rows rows(tokens, config, 1);
  ThreadTeam team(2);
  const std::pair<std::size_t, std::size_t> stretches[] = {{0, 1024}, {1024, 2048}, {0, 2100}, {0, tokens}};
  for (const auto& [first, last] : stretches) {
    PagedKvCache<Masked> cache(config, Masked{static_cast<std::int64_t>(first), static_cast<std::int64_t>(last)});
    for (std::size_t t = 0; t < tokens; ++t) ASSERT_TRUE(cache.append(rows.token_k(t), rows.token_v(t)).ok());
    std::vector<std::size_t> read;
    for (std::size_t t = 0; t < tokens; ++t) {
      if (t < first || t >= last) read.push_back(t);
    }
    std::vector<float> out(16, 7.0F), lse(2);
    ASSERT_TRUE(attend(cache, rows.token_q(tokens - 1), out, lse, team).ok());
    for (std::size_t head = 0; head < 2; ++head) {
      const ExactAttention exact = rows.exact(tokens - 1, head, read);
      for (std::size_t i = 0; i < 8; ++i) EXPECT_NEAR(static_cast<double>(out[head * 8 + i]), exact.out[i], 1e-5);
      if (read.empty()) {
        EXPECT_EQ(lse[head], -std::numeric_limits<float>::infinity());
      } else {
        EXPECT_NEAR(static_cast<double>(lse[head]), exact.log_sum_exp, 1e-5);
      }
    }
  }
}

/// The counts of the runs that one attend asks of an executor which claims `threads` threads.
template <class Policy>
std::vector<std::size_t> runs_of(std::size_t kv_heads, std::size_t tokens, std::size_t threads,
                                 const Policy& policy = {}) {
  const CacheConfig config{.query_heads = 2 * kv_heads,
                           .kv_heads = kv_heads,
                           .head_dim = 8,
                           .page_size = 16,
                           .budget_tokens = tokens,
                           .read_budget_tokens = 16,
                           .max_tokens = tokens};
  const Rows rows(tokens, config, 1);
  PagedKvCache<Policy> cache(config, policy);
  for (std::size_t t = 0; t < tokens; ++t) EXPECT_TRUE(cache.append(rows.token_k(t), rows.token_v(t)).ok());
  std::vector<std::size_t> counts;
  const Named recording{"recording", threads, [&](std::size_t count, RangeBody body) {
                          counts.push_back(count);
                          SerialExecutor{}(count, body);
                        }};
  std::vector<float> out(config.query_heads * 8);
  EXPECT_TRUE(attend(cache, rows.token_q(tokens - 1), std::span<float>(out), {}, recording).ok());
  return counts;
}

TEST(Ranges, AreSharedOnlyWhereHeadsAreTooFew) {
  using Counts = std::vector<std::size_t>;
  EXPECT_EQ(runs_of<Dense>(1, 2500, 2), (Counts{1, 3, 1})) << "one head of three ranges";
  EXPECT_EQ(runs_of<Dense>(1, 2500, 0), (Counts{1, 3, 1})) << "nobody knows how many threads";
  EXPECT_EQ(runs_of<Dense>(1, 2500, 1), (Counts{1}));
  EXPECT_EQ(runs_of<Dense>(8, 2500, 2), (Counts{8}));
  EXPECT_EQ(runs_of<Dense>(8, 2500, 3), (Counts{8})) << "nine turns for eight heads";
  EXPECT_EQ(runs_of<Dense>(8, 2500, 5), (Counts{8, 24, 8}));
  EXPECT_EQ(runs_of<Dense>(8, 2500, 16), (Counts{8, 24, 8}));
  EXPECT_EQ(runs_of<Dense>(1, 1024, 2), (Counts{1})) << "a short head is one range";
  EXPECT_EQ(runs_of<Quest>(1, 2500, 2), (Counts{1, 1})) << "a short selection of a long head";
  EXPECT_EQ(runs_of<Everything>(1, 2500, 2, Everything{11}), (Counts{1, 1})) << "a page rotates the query back";
  EXPECT_EQ(runs_of<Oracle>(1, 2500, 2), (Counts{1, 1})) << "each query head reads its own pages";
}

// ----------------------------------------------------------------------------------------------- executors that throw

TEST(ThrowingExecutors, LeaveACacheThatAttendsAsBefore) {
  const CacheConfig config{.query_heads = 4, .kv_heads = 2, .head_dim = 8, .page_size = 16, .max_tokens = 2500};
  const Rows rows(2500, config, 1);
  PagedKvCache<Dense> cache(config);
  for (std::size_t t = 0; t < 2500; ++t) ASSERT_TRUE(cache.append(rows.token_k(t), rows.token_v(t)).ok());
  std::vector<float> expected(32), out(32);
  ASSERT_TRUE(attend(cache, rows.token_q(2499), expected).ok());
  for (const std::size_t threads : {0U, 2U}) {
    for (std::size_t bodies = 0; bodies < 9; ++bodies) {
      std::size_t left = bodies;
      const Named throwing{"throwing", threads, [&](std::size_t count, RangeBody body) {
                             for (std::size_t i = 0; i < count; ++i) {
                               if (left-- == 0) throw std::runtime_error("no more threads");
                               body(i);
                             }
                           }};
      if (bodies < (threads == 0 ? 10U : 2U)) {
        EXPECT_THROW((void)attend(cache, rows.token_q(2499), std::span<float>(out), {}, throwing), std::runtime_error);
      }
      out.assign(32, 7.0F);
      ASSERT_TRUE(attend(cache, rows.token_q(2499), out).ok());
      EXPECT_EQ(out, expected);
      EXPECT_EQ(cache.next_position(), (Position{2500}));
    }
  }
}

TEST(Refusals, DoNotReachTheExecutor) {
  const CacheConfig config{.query_heads = 2, .kv_heads = 2, .head_dim = 8, .page_size = 4, .max_tokens = 10};
  PagedKvCache<Dense> cache(config);
  const Named never{"never", 2, [](std::size_t, RangeBody) { FAIL() << "called"; }};
  std::vector<float> q(16), out(16), lse(2);
  EXPECT_EQ(attend(cache, q, out, lse, never).code(), Status::Code::nothing_to_attend);
  ASSERT_TRUE(cache.append(q, q).ok());
  EXPECT_EQ(attend(cache, std::span<const float>(q).first(8), out, lse, never).code(), Status::Code::wrong_size);
  EXPECT_EQ(attend(cache, q, out, std::span<float>(lse).first(1), never).code(), Status::Code::wrong_size);
  EXPECT_EQ(
      attend_prompt(cache, TokenRows<const float>(q.data(), 2, 2, 8), TokenRows<float>(out.data(), 2, 2, 8), never)
          .code(),
      Status::Code::nothing_to_attend);
}

}  // namespace
}  // namespace kvsparse_test
