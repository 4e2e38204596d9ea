// SPDX-License-Identifier: Apache-2.0
//
// Memory is allocated at construction, as much as bytes_required said, and never again.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common/allocation_counter.hpp"
#include "engine/named_cache.hpp"
#include "kvsparse/interop/eigen_executor.hpp"
#include "kvsparse/interop/page_lists.hpp"
#include "kvsparse/interop/thread_team.hpp"
#include "support/policy_kinds.hpp"
#include "support/random_trace.hpp"

namespace kvsparse_test {
namespace {

using namespace kvsparse;

std::size_t live_bytes() { return kvsparse_tools::allocations_of_this_thread().live_bytes; }

struct Counters {
  std::size_t allocated = kvsparse_tools::allocations_of_this_thread().allocations;
  std::size_t freed = kvsparse_tools::allocations_of_this_thread().deallocations;
  friend bool operator==(const Counters&, const Counters&) = default;
};

CacheConfig config_of(std::size_t page_size, std::size_t group) {
  CacheConfig config;
  config.kv_heads = 2;
  config.query_heads = 2 * group;
  config.head_dim = 20;
  config.page_size = page_size;
  config.budget_tokens = 6 * page_size;
  config.read_budget_tokens = 3 * page_size;
  config.max_tokens = 20 * page_size;
  return config;
}

/// Calls visit(make) for every policy of the name table, compositions included, in every storage type, under options
/// that change what it asks of the cache; make(config) is such a cache.
template <class Visit>
void for_every_cache(Visit&& visit) {
  using Settings = std::vector<OptionSetting>;
  for (const std::string& policy : policy_names()) {
    const std::vector<std::string> keys = policy_facts(policy).option_keys;
    std::vector<Settings> variants{short_periods(keys, 2)};  // a page size may be 1, and the budget is of 6 pages
    const Settings options{{"evidence", "quest_bound"}, {"pool", "query_head"}, {"over", "prompt"}, {"used", "rank"}};
    for (const OptionSetting& option : options) {
      if (std::find(keys.begin(), keys.end(), option.key) != keys.end()) {
        variants.push_back(variants[0]);
        variants.back().push_back(option);
      }
    }
    for (const std::string_view scalar : scalar_type_names) {
      for (const Settings& settings : variants) {
        SCOPED_TRACE(policy + " in " + std::string(scalar) +
                     (settings.empty() ? "" : " with " + settings.back().key + " = " + settings.back().value));
        visit(
            [&](const CacheConfig& config) {
              return kvsparse_tools::named_cache(policy, scalar_type(scalar), config, settings);
            },
            [&](const CacheConfig& config) {
              return kvsparse_tools::named_cache_bytes(policy, scalar_type(scalar), config, settings);
            });
      }
    }
  }
}

template <class Make>
void expect_a_decode_without_allocations(std::size_t page_size, std::size_t group, Make&& make) {
  const CacheConfig config = config_of(page_size, group);
  AnyCache cache = make(config);
  TestRng rng(page_size);
  const std::size_t prompt = 2 * page_size + 1;
  const std::size_t kv = 2 * 20;
  std::vector<float> k(prompt * kv), v(prompt * kv), q(prompt * group * kv), out(q.size()), lse(2 * group);
  for (std::vector<float>* rows : {&k, &v, &q}) {
    for (float& element : *rows) element = static_cast<float>(rng.gaussian());
  }
  const TokenRows<const float> prompt_q(q.data(), prompt, 2 * group, 20);
  const TokenRows<float> prompt_out(out.data(), prompt, 2 * group, 20);
  const Counters before;
  bool ok = true;
  for (int round = 0; round < 2; ++round) {
    ok = ok && cache.append_prompt(k, v).ok();
    ok = ok && cache.attend_prompt(prompt_q, prompt_out).ok();
    cache.end_prompt();
    for (std::size_t t = prompt; t < config.max_tokens; ++t) {
      const std::size_t row = t % prompt;
      ok =
          ok && cache.append(std::span<const float>(k).subspan(row * kv, kv), std::span<const float>(v).first(kv)).ok();
      const auto token_q = std::span<const float>(q).subspan(row * group * kv, group * kv);
      ok = ok && cache.attend(token_q, std::span<float>(out).first(group * kv), lse).ok();
      ok = ok && cache.stats().tokens == t + 1;
    }
    // Refusals cost nothing either: the sentence is made when somebody asks for it.
    ok = ok && !cache.append(std::span<const float>(k).first(1), std::span<const float>(v).first(1)).ok();
    cache.clear();
  }
  const Counters after;
  EXPECT_TRUE(ok);
  EXPECT_TRUE(after == before) << after.allocated - before.allocated << " allocations";
}

TEST(Allocations, ThereAreNoneInADecodeStepOfAnyPolicyInAnyStorageType) {
  for_every_cache([](auto&& make, auto&&) {
    expect_a_decode_without_allocations(1, 1, make);
    expect_a_decode_without_allocations(7, 3, make);
    expect_a_decode_without_allocations(16, 4, make);
  });
}

template <class Policy, class Scalar>
void expect_page_lists_without_allocations() {
  SCOPED_TRACE(Policy::name);
  const CacheConfig config = config_of(7, 3);
  PagedKvCache<Policy, Scalar> cache(config);
  TestRng rng(1);
  std::vector<float> k(40), q(120), out(120);
  std::vector<std::int32_t> indptr(9), indices(8 * config.max_tokens), last_page_len(8);
  CsrPageLists lists(indptr, indices, last_page_len);
  const Counters before;
  bool ok = true;
  for (std::size_t t = 0; t < config.max_tokens; ++t) {
    for (std::vector<float>* rows : {&k, &q}) {
      for (float& element : *rows) element = static_cast<float>(rng.gaussian());
    }
    ok = ok && cache.append(k, k).ok() && attend(cache, std::span<const float>(q), std::span<float>(out)).ok();
    lists.clear();
    ok = ok && list_resident(cache, lists).ok() && lists.rows() == 2;
    static_cast<void>(list_read(cache, lists));  // refused or not
  }
  const Counters after;
  EXPECT_TRUE(ok);
  EXPECT_TRUE(after == before) << after.allocated - before.allocated << " allocations";
}

TEST(Allocations, ThereAreNoneInPageLists) {
  expect_page_lists_without_allocations<Dense, float>();
  expect_page_lists_without_allocations<H2o, Half>();
  expect_page_lists_without_allocations<Quest, Bfloat16>();
  expect_page_lists_without_allocations<Compose<Raas, Quest>, Int8>();
}

template <class Policy, class Scalar>
void expect_the_bytes_that_were_announced(const CacheConfig& config, const Policy& policy) {
  const std::size_t announced = PagedKvCache<Policy, Scalar>::bytes_required(config, policy);
  const std::size_t before = live_bytes();
  {
    const PagedKvCache<Policy, Scalar> cache(config, policy);
    EXPECT_EQ(live_bytes() - before, announced) << "page size " << config.page_size << ", head_dim " << config.head_dim;
  }
  EXPECT_EQ(live_bytes(), before) << "not everything was given back";
}

template <class Make, class Bytes>
void expect_the_bytes_that_were_announced_by_name(const CacheConfig& config, Make&& make, Bytes&& bytes) {
  SCOPED_TRACE("page size " + std::to_string(config.page_size) + ", head_dim " + std::to_string(config.head_dim));
  const std::size_t announced = bytes(config);
  const std::size_t before = live_bytes();
  {
    const AnyCache cache = make(config);
    EXPECT_EQ(live_bytes() - before, announced);
    EXPECT_EQ(cache.bytes_allocated() + cache.object_bytes(), announced);
  }
  EXPECT_EQ(live_bytes(), before) << "not everything was given back";
}

TEST(Allocations, ConstructionTakesExactlyTheBytesRequired) {
  for_every_cache([](auto&& make, auto&& bytes) {
    for (const std::size_t page_size : {1U, 7U, 16U, 64U}) {
      CacheConfig config = config_of(page_size, 3);
      expect_the_bytes_that_were_announced_by_name(config, make, bytes);
      config.head_dim = 128;
      config.prompt_overflow = PromptOverflow::grow;
      config.max_prompt_tokens = 11 * page_size;
      expect_the_bytes_that_were_announced_by_name(config, make, bytes);
    }
  });
}

TEST(Allocations, ValuesOfAnotherWidthAndALatentTakeWhatWasAnnouncedAndNothingLater) {
  for (const bool values_in_keys : {false, true}) {
    CacheConfig config = config_of(7, 3);
    config.head_dim = 48;
    config.value_dim = 20;
    config.values_in_keys = values_in_keys;
    expect_the_bytes_that_were_announced<Dense, Int8>(config, {});
    expect_the_bytes_that_were_announced<Raas, Half>(config, {});
    const std::vector<float> k(2 * 48), v(values_in_keys ? 0 : 2 * 20), q(6 * 48);
    std::vector<float> out(6 * 20);
    PagedKvCache<Raas, Half> cache(config);
    const Counters before;
    bool ok = true;
    for (int t = 0; t < 100; ++t) ok = ok && cache.append(k, v).ok() && attend(cache, q, out).ok();
    const Counters after;
    EXPECT_TRUE(ok);
    EXPECT_TRUE(after == before);
    std::swap(config.head_dim, config.value_dim);
    if (!values_in_keys) expect_the_bytes_that_were_announced<Raas, Half>(config, {});
  }
}

/// What the optional parts of the contract cost is announced as well.
struct Everything {
  static constexpr std::string_view name = "everything";
  static constexpr PolicyGranularity granularity = PolicyGranularity::token;
  static constexpr EvidenceKind evidence =
      EvidenceKind::page_mass | EvidenceKind::largest_token_mass | EvidenceKind::token_weights;
  static constexpr PageSummary page_summary = PageSummary::mean;
  static constexpr std::size_t query_window = 3;
  static constexpr std::size_t period = 4;
  static constexpr std::size_t slack_tokens = 4;
  struct PageState {
    double numbers[3];
  };
  struct HeadState {
    double numbers[5];
  };
  struct LayerState {
    double numbers[7];
  };
  void observe(HeadView<Everything>, const Evidence&) const {}
  void select(HeadView<Everything>, QueryGroup, Selection& selection) const { selection.add_all(); }
  void trim(HeadView<Everything> head, PageList& pages) const {
    for (const PageIndex page : head.evictable_pages()) pages.add(page);
  }
  PageIndex victim(HeadView<Everything> head) const {
    return head.lowest_evictable([&](PageIndex page) { return head.first_position(page); });
  }
};

TEST(Allocations, APolicyThatAsksForEverythingGetsItAtConstruction) {
  for (const std::size_t page_size : {1U, 7U, 16U, 130U}) {
    expect_the_bytes_that_were_announced<Everything, float>(config_of(page_size, 3), {});
    expect_the_bytes_that_were_announced<Everything, Half>(config_of(page_size, 3), {});
    const auto make = [](const CacheConfig& config) {
      return AnyCache::of<Everything, float>(ScalarType::f32, config);
    };
    expect_a_decode_without_allocations(page_size, 3, make);
    const auto bytes = [](const CacheConfig& config) {
      return *AnyCache::bytes_required<kvsparse::PolicyList<Everything>, float>(Everything::name, ScalarType::f32,
                                                                                config);
    };
    expect_the_bytes_that_were_announced_by_name(config_of(page_size, 3), make, bytes);
  }
}

/// Long heads, few of them: their ranges are read by different threads and have states of their own.
CacheConfig long_heads() {
  CacheConfig config;
  config.kv_heads = 1;
  config.query_heads = 3;
  config.head_dim = 20;
  config.page_size = 16;
  config.budget_tokens = 2500;
  config.read_budget_tokens = 1500;
  config.max_tokens = 2500;
  return config;
}

TEST(Allocations, TheStatesOfRangesAreAnnounced) {
  for (const std::size_t page_size : {1U, 16U, 200U}) {
    CacheConfig config = long_heads();
    config.page_size = page_size;
    for (const std::size_t tokens : {1024U, 1025U, 2048U, 2500U}) {
      config.budget_tokens = config.max_tokens = tokens;
      expect_the_bytes_that_were_announced<Dense, float>(config, {});
      expect_the_bytes_that_were_announced<Compose<Raas, Quest>, Half>(config, {});
    }
  }
}

/// Runs on an executor and counts what its bodies allocate, on whatever thread.
template <class E>
struct Watched {
  E& executor;
  std::atomic<std::size_t>& allocations;
  std::size_t concurrency() const { return executor.concurrency(); }
  void operator()(std::size_t count, RangeBody body) const noexcept {
    const auto watched = [&](std::size_t i) noexcept {
      const Counters before;
      body(i);
      const Counters after;
      allocations += after.allocated - before.allocated;
    };
    executor(count, watched);
  }
};

template <class Policy>
void expect_no_allocations_on(auto& executor) {
  SCOPED_TRACE(Policy::name);
  const CacheConfig config = long_heads();
  PagedKvCache<Policy, Half> cache(config);
  AnyCache any = AnyCache::of<Policy, Half>(ScalarType::f16, config);
  TestRng rng(1);
  std::vector<float> k(20), q(60), out(60), lse(3);
  std::atomic<std::size_t> in_bodies{0};
  const Watched<std::remove_reference_t<decltype(executor)>> watched{executor, in_bodies};
  const auto idle = [](std::size_t) noexcept {};
  executor(2, idle);  // whatever a pool allocates for its first run
  const Counters before;
  bool ok = true;
  for (std::size_t t = 0; t < 2400; ++t) {
    for (std::vector<float>* rows : {&k, &q}) {
      for (float& element : *rows) element = static_cast<float>(rng.gaussian());
    }
    ok = ok && cache.append(k, k).ok() && any.append(k, k).ok();
    if (t % 300 != 7) continue;
    ok = ok && attend(cache, q, out, lse, watched).ok() && any.attend(q, out, lse, watched).ok();
  }
  const Counters after;
  EXPECT_TRUE(ok);
  EXPECT_TRUE(after == before) << after.allocated - before.allocated << " allocations";
  EXPECT_EQ(in_bodies, 0U);
}

TEST(Allocations, ThereAreNoneOnSeveralThreads) {
  ThreadTeam team(3);
  Eigen::ThreadPool pool(2);
  EigenExecutor eigen(pool);
  const auto with = [](auto& executor) {
    expect_no_allocations_on<Dense>(executor);
    expect_no_allocations_on<Raas>(executor);
    expect_no_allocations_on<Compose<Raas, Quest>>(executor);
    expect_no_allocations_on<Everything>(executor);
  };
  with(team);
  with(eigen);
}

TEST(Allocations, ACopyCostsWhatTheOriginalCost) {
  using Cache = PagedKvCache<Compose<Raas, Quest>, Half>;
  const CacheConfig config = config_of(7, 3);
  const Cache cache(config);
  const std::size_t before = live_bytes();
  const Cache copy(cache);
  EXPECT_EQ(live_bytes() - before, Cache::bytes_required(config));
}

TEST(Allocations, OverAPoolACacheAndAForkTakeTheirTablesAndNothingLater) {
  using Policy = Compose<Raas, Quest>;
  using Cache = PagedKvCache<Policy, Half>;
  const CacheConfig config = config_of(7, 3);
  const std::size_t empty = live_bytes();
  {
    const PagePool<Half> pool(config.geometry(), PageSummary::min_max, 40);
    EXPECT_EQ(live_bytes() - empty, PagePool<Half>::bytes_required(config.geometry(), PageSummary::min_max, 40));
    const std::size_t before = live_bytes();
    Cache parent(config, pool);
    EXPECT_EQ(live_bytes() - before, Cache::bytes_required_beside_pool(config));
    const std::vector<float> row(2 * 20), q(6 * 20);
    std::vector<float> out(6 * 20);
    for (int t = 0; t < 10; ++t) ASSERT_TRUE(parent.append(row, row).ok());
    const std::size_t forked = live_bytes();
    Cache child = parent.fork();
    EXPECT_EQ(live_bytes() - forked, Cache::bytes_required_beside_pool(config));
    const Counters counters;
    bool ok = true;
    for (int t = 0; t < 100; ++t) {  // the first token copies the open pages, later ones evict shared pages
      for (Cache* cache : {&child, &parent}) {
        ok = ok && cache->can_append(9) && cache->append(row, row).ok() && attend(*cache, q, out).ok();
      }
    }
    for (int t = 0; t < 60; ++t) ok = ok && child.append(row, row).ok();
    child.clear();
    const Counters after;
    EXPECT_TRUE(ok);
    EXPECT_TRUE(after == counters);
  }
  EXPECT_EQ(live_bytes(), empty);
}

template <class Policy>
void expect_drafts_without_allocations() {
  SCOPED_TRACE(Policy::name);
  using Cache = PagedKvCache<Policy, Half>;
  CacheConfig config = config_of(7, 3);
  config.max_speculative = 9;
  expect_the_bytes_that_were_announced<Policy, Half>(config, {});
  Cache cache(config);
  TestRng rng(1);
  std::vector<float> k(5 * 2 * 20), q(5 * 6 * 20), out(q.size());
  for (std::vector<float>* rows : {&k, &q}) {
    for (float& element : *rows) element = static_cast<float>(rng.gaussian());
  }
  const TokenRows<const float> rows(k.data(), 5, 2, 20);
  const Counters before;
  bool ok = true;
  for (std::size_t round = 0; round < 40; ++round) {
    const Position position = cache.next_position();
    ok = ok && cache.append_draft(rows, rows).ok();
    ok = ok && attend_prompt(cache, TokenRows<const float>(q.data(), 5, 6, 20), {out.data(), 5, 6, 20}).ok();
    ok = ok && !cache.append_draft(rows, rows).ok();
    ok = ok && cache.truncate(position + round % 4).ok();
    if (round % 3 == 0) ok = ok && cache.append(rows.token(0), rows.token(1)).ok();
  }
  const Counters after;
  EXPECT_TRUE(ok);
  EXPECT_TRUE(after == before) << after.allocated - before.allocated << " allocations";
}

TEST(Allocations, DraftsAndTheirEndTakeNoneEither) {
  expect_drafts_without_allocations<Dense>();
  expect_drafts_without_allocations<Raas>();
  expect_drafts_without_allocations<Compose<H2o, Oracle>>();
  expect_drafts_without_allocations<Everything>();
}

TEST(Allocations, ARefusedConfigurationLeavesNothingBehind) {
  using Cache = PagedKvCache<Raas>;
  CacheConfig config = config_of(7, 3);
  config.budget_tokens = 1;
  const std::size_t before = live_bytes();
  EXPECT_THROW(const Cache cache(config), ConfigError);
  EXPECT_THROW(static_cast<void>(Cache::bytes_required(config)), ConfigError);
  EXPECT_EQ(live_bytes(), before);
}

}  // namespace
}  // namespace kvsparse_test
