// SPDX-License-Identifier: Apache-2.0
//
// Very long decoding through one small head under a budget, for every policy, at positions around 0, 2^32 and 2^53:
// memory stays as it is, answers stay exact, and what a policy counts along is what its evidence sums to.
//
//   KVSPARSE_SOAK_TOKENS=50000000 soak_test     so many tokens for each policy instead of 60,000
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "common/allocation_counter.hpp"
#include "engine/named_cache.hpp"
#include "kvsparse/attention/exact.hpp"
#include "kvsparse/interop/snapshot.hpp"
#include "support/policy_kinds.hpp"
#include "support/random_trace.hpp"
#include "support/test_settings.hpp"

namespace kvsparse_test {
namespace {

using namespace kvsparse;
using kvsparse_tools::named_cache;

constexpr std::size_t head_dim = 4, page_size = 4, prompt_tokens = 6;

CacheConfig config_of() {
  CacheConfig config;
  config.head_dim = head_dim;
  config.page_size = page_size;
  config.budget_tokens = 8 * page_size;
  config.read_budget_tokens = 4 * page_size;
  config.max_tokens = 16 * page_size;
  return config;
}

/// The rows of any position, without remembering one: two stocks of coprime lengths.
class EndlessRows {
 public:
  EndlessRows() {
    TestRng rng(1);
    for (float& x : kv_) x = static_cast<float>(rng.gaussian());
    for (float& x : q_) x = static_cast<float>(1.5 * rng.gaussian());
  }
  static constexpr std::int64_t period = 1021;  // of keys and values
  std::span<const float> k(std::int64_t position) const { return row(kv_, period, position); }
  std::span<const float> v(std::int64_t position) const { return row(kv_, period, position + 7); }
  std::span<const float> q(std::int64_t position) const { return row(q_, 1019, position); }

 private:
  static std::span<const float> row(const std::vector<float>& rows, std::int64_t count, std::int64_t position) {
    return std::span<const float>(rows).subspan(static_cast<std::size_t>(position % count) * head_dim, head_dim);
  }
  std::vector<float> kv_ = std::vector<float>(period * head_dim), q_ = std::vector<float>(1019 * head_dim);
};
const EndlessRows rows;

/// A page's share of the softmax, and its first position, in the order of the table.
struct PageOfStep {
  std::int64_t first;
  double mass;
};

/// A policy's state, summed up again from exact evidence in double precision.
class Recomputed {
 public:
  virtual ~Recomputed() = default;
  /// The query at `position` found these masses; is_decode: not one of the prompt.
  virtual void observe(std::int64_t position, bool is_decode, const std::vector<PageOfStep>& pages) = 0;
  /// What the cache has of each page.
  virtual void expect(const detail::HeadImage& head) const = 0;
  /// The page at `from` stands at `to` now.
  virtual void move(std::int64_t from, std::int64_t to) = 0;
};
template <class State>
const State& state_in(const detail::StatesImage& states, std::size_t index) {
  return *reinterpret_cast<const State*>(states.at(index).data());
}
std::int64_t first_position(const detail::HeadImage& head, std::uint32_t page) {
  return (*head.table)[{page}].first_position.value;
}

/// Keeps something for each resident page, by its first position.
template <class OfPage>
class PageByPage : public Recomputed {
 public:
  void move(std::int64_t from, std::int64_t to) final {
    auto node = of_page.extract(from);
    node.key() = to;
    of_page.insert(std::move(node));
  }

 protected:
  void forget_all_but(const std::vector<PageOfStep>& pages) {
    std::erase_if(of_page, [&](const auto& known) {
      return std::none_of(pages.begin(), pages.end(),
                          [&](const PageOfStep& page) { return page.first == known.first; });
    });
  }
  std::map<std::int64_t, OfPage> of_page;
};

class RecomputedH2o final : public PageByPage<double> {
  void observe(std::int64_t, bool, const std::vector<PageOfStep>& pages) override {
    forget_all_but(pages);
    for (const PageOfStep& page : pages) of_page[page.first] += page.mass;
  }
  void expect(const detail::HeadImage& head) const override {
    for (std::uint32_t i = 0; i < head.table->size(); ++i) {
      const double sum = of_page.at(first_position(head, i));
      ASSERT_NEAR(state_in<H2o::PageState>(head.page_states, i).accumulated_mass, sum, 1e-5 * (1 + sum));
    }
  }
};

struct StampedPage {
  std::int64_t earliest, latest;  // stamps: they differ while a mass was so close to alpha that it may count either way
  double mass;
};
class RecomputedRaas final : public PageByPage<StampedPage> {
  void observe(std::int64_t position, bool is_decode, const std::vector<PageOfStep>& pages) override {
    forget_all_but(pages);
    const double alpha = Raas{}.options.alpha;
    for (const PageOfStep& page : pages) {
      StampedPage& known = of_page.try_emplace(page.first, StampedPage{page.first, page.first, 0}).first->second;
      known.mass = page.mass;
      if (!is_decode) continue;
      const bool pinned = page.first < static_cast<std::int64_t>(prompt_tokens);
      const bool open = page.first == pages.back().first;
      if (open || (!pinned && page.mass > alpha - 1e-6)) known.latest = position;
      if (open || (!pinned && page.mass > alpha + 1e-6)) known.earliest = position;
    }
  }
  void expect(const detail::HeadImage& head) const override {
    for (std::uint32_t i = 0; i < head.table->size(); ++i) {
      const StampedPage& page = of_page.at(first_position(head, i));
      const auto& state = state_in<Raas::PageState>(head.page_states, i);
      ASSERT_NEAR(static_cast<double>(state.last_mass), page.mass, 1e-5);
      ASSERT_GE(state.stamp.value, page.earliest);
      ASSERT_LE(state.stamp.value, page.latest);
    }
  }
};

std::unique_ptr<Recomputed> recomputed_state(std::string_view policy) {
  if (policy == "h2o") return std::make_unique<RecomputedH2o>();
  if (policy == "raas") return std::make_unique<RecomputedRaas>();
  return nullptr;
}

class Soak {
 public:
  explicit Soak(std::string_view policy)
      : policy_(policy),
        facts_(policy_facts(policy)),
        cache_(named_cache(policy, ScalarType::f32, config_of(), short_periods(facts_.option_keys, 5))),
        image_(detail::ImageAccess::of(cache_)),
        recomputed_(recomputed_state(policy)) {}

  const PolicyFacts& facts() const { return facts_; }
  std::int64_t length() const { return cache_.next_position().value; }

  void feed_prompt() {
    for (std::size_t t = 0; t < prompt_tokens; ++t) {
      ASSERT_TRUE(cache_.append_prompt(rows.k(length()), rows.v(length())).ok());
      ask();
    }
  }
  void step() {
    if (!facts_.evicts && static_cast<std::size_t>(length()) == config_of().max_tokens) {
      cache_.clear();
      if (recomputed_ != nullptr) recomputed_ = recomputed_state(policy_);
      feed_prompt();
    }
    if (!cache_.append(rows.k(length()), rows.v(length())).ok()) ++refused_;
    ask();
  }

  /// The same cache after a long time in which all tokens between its pinned pages and the others came and went. Goes
  /// through a snapshot, which must find it legal.
  void go_on_at(std::int64_t position) {
    constexpr std::int64_t whole = EndlessRows::period * static_cast<std::int64_t>(page_size);
    const std::int64_t shift = (position - length()) / whole * whole;
    const detail::HeadImage& head = image_.heads[0];
    std::vector<ResidentPage> pages;
    for (std::uint32_t i = 0; i < head.table->size(); ++i) pages.push_back((*head.table)[{i}]);
    head.table->clear();
    for (auto page = pages.rbegin(); page != pages.rend(); ++page) {
      const std::int64_t first = page->first_position.value;
      if (!page->pinned) page->first_position.value += shift;
      if (!page->pinned && recomputed_ != nullptr) recomputed_->move(first, first + shift);
    }
    for (const ResidentPage& page : pages) head.table->push_back(page);
    image_.next->value += shift;
    *head.evictions += static_cast<std::uint64_t>(shift) / page_size;
    *head.counters[0] += static_cast<std::size_t>(shift);
    AnyCache other = named_cache(policy_, ScalarType::f32, config_of(), short_periods(facts_.option_keys, 5));
    load_into(other);
    cache_ = std::move(other);
    image_ = detail::ImageAccess::of(cache_);
  }

  void expect_everything() {
    ASSERT_EQ(refused_, 0U);
    const detail::HeadImage& head = image_.heads[0];
    std::size_t tokens = 0;
    std::size_t pinned = 0;
    std::int64_t before = -1;
    for (std::uint32_t i = 0; i < head.table->size(); ++i) {
      const ResidentPage& page = (*head.table)[{i}];
      ASSERT_GT(page.first_position.value, before);
      ASSERT_EQ(page.tokens, std::min<std::int64_t>(page_size, length() - page.first_position.value));
      before = page.first_position.value;
      tokens += page.tokens;
      pinned += page.pinned ? 1 : 0;
    }
    ASSERT_EQ(head.table->resident_tokens(), tokens);
    ASSERT_EQ(head.table->pinned_pages(), pinned);
    ASSERT_EQ(before / static_cast<std::int64_t>(page_size), (length() - 1) / static_cast<std::int64_t>(page_size));
    if (facts_.evicts) {
      ASSERT_LE(tokens, config_of().budget_tokens);
    }
    const CacheStats stats = cache_.stats();
    ASSERT_EQ(stats.evicted_tokens, static_cast<std::size_t>(length()) - tokens);
    ASSERT_EQ(stats.resident_tokens, tokens);
    expect_the_exact_answer();
    if (recomputed_ != nullptr) recomputed_->expect(head);
  }
  /// One that was stopped and loaded decides and answers as the one that ran on.
  void expect_a_restart_to_go_on_alike() {
    AnyCache other = named_cache(policy_, ScalarType::f32, config_of(), short_periods(facts_.option_keys, 5));
    load_into(other);
    std::vector<float> out(head_dim), of_other(head_dim);
    for (int t = 0; t < 100 && (facts_.evicts || static_cast<std::size_t>(length()) < config_of().max_tokens); ++t) {
      const std::int64_t position = length();
      ASSERT_TRUE(other.append(rows.k(position), rows.v(position)).ok());
      ASSERT_TRUE(other.attend(rows.q(position), of_other).ok());
      step();
      ASSERT_EQ(std::memcmp(out_, of_other.data(), sizeof out_), 0);
      ASSERT_EQ(cache_.resident_positions(0), other.resident_positions(0));
    }
  }

 private:
  void load_into(AnyCache& other) const {
    std::stringstream snapshot;
    save(cache_, snapshot);
    load(other, snapshot);
  }
  void ask() {
    const std::int64_t position = length() - 1;
    if (!cache_.attend(rows.q(position), std::span<float>(out_)).ok()) ++refused_;
    if (recomputed_ == nullptr) return;
    weigh_pages(position);
    recomputed_->observe(position, position >= static_cast<std::int64_t>(prompt_tokens), pages_);
  }
  void weigh_pages(std::int64_t position) {
    const PageTable& table = *image_.heads[0].table;
    pages_.clear();
    double sum = 0;
    for (std::uint32_t i = 0; i < table.size(); ++i) {
      const ResidentPage& page = table[{i}];
      double mass = 0;
      for (std::size_t slot = 0; slot < page.tokens; ++slot) {
        double dot = 0;
        const std::span<const float> k = rows.k(page.first_position.value + static_cast<std::int64_t>(slot));
        const std::span<const float> q = rows.q(position);
        for (std::size_t d = 0; d < head_dim; ++d) dot += static_cast<double>(q[d]) * static_cast<double>(k[d]);
        mass += std::exp(dot / std::sqrt(static_cast<double>(head_dim)));  // of small numbers: no maximum is needed
      }
      pages_.push_back({page.first_position.value, mass});
      sum += mass;
    }
    for (PageOfStep& page : pages_) page.mass /= sum;
  }
  void expect_the_exact_answer() const {
    if (answers_for_the_gone(policy_)) return;  // residual_test knows what they answer
    const std::vector<Position> read = cache_.read_positions(0);
    const auto key = [&](std::size_t i) { return rows.k(read[i].value); };
    const auto value = [&](std::size_t i) { return rows.v(read[i].value); };
    const ExactAttention exact = exact_attention(rows.q(length() - 1), read.size(), key, value, 0.5);
    for (std::size_t d = 0; d < head_dim; ++d) ASSERT_NEAR(static_cast<double>(out_[d]), exact.out[d], 1e-5);
  }

  std::string policy_;
  PolicyFacts facts_;
  AnyCache cache_;
  detail::LayerImage image_;  // of it
  std::unique_ptr<Recomputed> recomputed_;
  std::vector<PageOfStep> pages_;
  float out_[head_dim] = {};
  std::size_t refused_ = 0;
};

/// Bytes of this process that lie in memory; 0 where nobody tells, and under AddressSanitizer, which keeps what is
/// freed.
std::size_t resident_bytes() {
#if defined(__SANITIZE_ADDRESS__)
  return 0;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
  return 0;
#endif
#endif
  std::ifstream statm("/proc/self/statm");
  std::size_t pages = 0;
  std::size_t resident = 0;
  statm >> pages >> resident;
  return resident * 4096;
}

void decode_long(const std::string& policy, std::size_t tokens) {
  Soak soak(policy);
  soak.feed_prompt();
  const std::int64_t starts[] = {0, std::int64_t{1} << 32, std::int64_t{1} << 53};
  constexpr std::size_t checks = 10;
  const std::size_t between = std::max<std::size_t>(100, tokens / std::size(starts) / checks);
  std::size_t bytes_at_first = 0;
  std::size_t live_at_first = 0;
  for (const std::int64_t start : starts) {
    // Half of the tokens come before that position, half behind it.
    if (start != 0 && soak.facts().evicts) soak.go_on_at(start - static_cast<std::int64_t>(between * checks / 2));
    for (std::size_t check = 0; check < checks; ++check) {
      for (std::size_t i = 0; i < between; ++i) soak.step();
      ASSERT_NO_FATAL_FAILURE(soak.expect_everything()) << "at length " << soak.length();
      ASSERT_NO_FATAL_FAILURE(soak.expect_a_restart_to_go_on_alike()) << "at length " << soak.length();
      if (bytes_at_first == 0) {
        bytes_at_first = resident_bytes();
        live_at_first = kvsparse_tools::allocations_of_this_thread().live_bytes;
      }
      // What is kept for the pages that happen to be resident goes up and down.
      ASSERT_LE(kvsparse_tools::allocations_of_this_thread().live_bytes, live_at_first + 4096);
      ASSERT_LE(resident_bytes(), bytes_at_first + (std::size_t{1} << 20));
    }
    if (start != 0 && soak.facts().evicts) {
      ASSERT_GT(soak.length(), start);
    }
  }
}

TEST(Soak, LongDecodingStaysExactAndFlatAtAnyPosition) {
  const std::size_t tokens = test_setting("KVSPARSE_SOAK_TOKENS", 60'000);
  for (const std::string& policy : policy_names()) {
    SCOPED_TRACE(policy);
    decode_long(policy, tokens);
  }
  std::cout << tokens << " tokens for each of " << policy_names().size() << " policies\n";
}

}  // namespace
}  // namespace kvsparse_test
