// SPDX-License-Identifier: Apache-2.0
//
// The policies that are chosen by type alone, under what is not their papers' affair: rejected drafts, forks, and rows
// that hold no numbers.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "kvsparse/interop/snapshot.hpp"
#include "kvsparse/policy/ada_kv.hpp"
#include "kvsparse/policy/certified.hpp"
#include "kvsparse/policy/clustered.hpp"
#include "kvsparse/policy/half_space.hpp"
#include "kvsparse/policy/hash_attention.hpp"
#include "kvsparse/policy/hierarchical_top_k.hpp"
#include "kvsparse/policy/key_diff.hpp"
#include "kvsparse/policy/key_norm.hpp"
#include "kvsparse/policy/lazy_eviction.hpp"
#include "kvsparse/policy/lrfu.hpp"
#include "kvsparse/policy/r_kv.hpp"
#include "kvsparse/policy/snap_kv.hpp"
#include "kvsparse/policy/streaming_sketch.hpp"
#include "kvsparse/policy/tova.hpp"
#include "kvsparse/policy/value_aware.hpp"
#include "support/padding.hpp"
#include "support/rejected_drafts.hpp"

namespace kvsparse_test {
namespace {

using namespace drafts;

/// Calls visit(policy) for each, with windows and periods that the small budgets of these tests hold.
template <class Visit>
void for_zoo(Visit&& visit) {
  visit(KeyNorm{});
  visit(ValueAware{});
  visit(KeyDiff{});
  visit(Lrfu{});
  visit(Tova{});
  AdaKv ada;
  ada.options.window = 4;
  visit(ada);
  ada.options.safeguard = 0.0;
  visit(ada);
  LazyEviction lazy;
  lazy.options.window = 4;
  visit(lazy);
  SnapKv snap;
  snap.options.window = 3;
  snap.options.period = 5;
  visit(snap);
  RKv r_kv;
  r_kv.options.window = 3;
  r_kv.options.period = 5;
  visit(r_kv);
  visit(HashAttention{});
  visit(HierarchicalTopK{});
  visit(HalfSpace{});
  visit(Certified{});
  Clustered clustered;
  clustered.options.window = 4;
  visit(clustered);
  visit(BasicStreamingSketch<8, head_dim>{});
}

TEST(ZooVerbs, RejectedDraftsLeaveNoTrace) {
  for_zoo([](const auto& policy) {
    for (const std::size_t page_size : {1U, 3U, 8U}) {
      expect_no_trace<std::remove_cvref_t<decltype(policy)>, float>(page_size, 5, policy);
    }
  });
}

TEST(ZooVerbs, AForkDecodesAsACopyDoes) {
  for_zoo([](const auto& policy) {
    using Cache = PagedKvCache<std::remove_cvref_t<decltype(policy)>>;
    SCOPED_TRACE(Cache::policy_type::name);
    Cache cache(config_of(4), policy);
    PagePool<float> pool(config_of(4).geometry(), traits::page_summary(policy), 1000);
    Cache forked(config_of(4), pool, policy);
    std::vector<Cache> forks, copies;
    for (std::uint64_t t = 0; t < 120; ++t) {
      ASSERT_EQ(step(cache, Chunk(t, 1)), step(forked, Chunk(t, 1)));
      if (t % 25 != 17) continue;
      forks.push_back(forked.fork());
      copies.push_back(cache);
    }
    for (std::uint64_t t = 0; t < 60; ++t) {
      for (std::size_t i = 0; i < forks.size(); ++i) {
        ASSERT_EQ(step(forks[i], Chunk(1000 * i + t, 1)), step(copies[i], Chunk(1000 * i + t, 1))) << "fork " << i;
      }
    }
  });
}

/// A snapshot of it would tell.
TEST(ZooVerbs, AClearedCacheKnowsNothingOfWhatItHeld) {
  for_zoo([](const auto& policy) {
    using Cache = PagedKvCache<std::remove_cvref_t<decltype(policy)>>;
    SCOPED_TRACE(Cache::policy_type::name);
    Cache cleared(config_of(4), policy);
    for (std::uint64_t t = 0; t < 40; ++t) step(cleared, Chunk(t, 1));
    cleared.clear();
    const Cache unused(config_of(4), policy);
    std::ostringstream of_cleared, of_unused;
    save(cleared, of_cleared);
    save(unused, of_unused);
    EXPECT_EQ(of_cleared.str().size(), of_unused.str().size());
    EXPECT_TRUE(!padding_is_cleared || of_cleared.str() == of_unused.str());
  });
}

TEST(ZooVerbs, HierarchicalTopKRemembersNothingAndCanGoBackAnywhere) {
  PagedKvCache<HierarchicalTopK> cache(config_of(4));
  for (std::uint64_t t = 0; t < 40; ++t) step(cache, Chunk(t, 1));
  EXPECT_EQ(cache.oldest_reachable(), 0U);
  ASSERT_TRUE(cache.truncate(Position{17}).ok());
  PagedKvCache<HierarchicalTopK> other(config_of(4));
  for (std::uint64_t t = 0; t < 17; ++t) step(other, Chunk(t, 1));
  for (std::uint64_t t = 100; t < 130; ++t) ASSERT_EQ(step(cache, Chunk(t, 1)), step(other, Chunk(t, 1)));
}

/// Rows of numbers, and of what is none: some wholly, some in one element.
Chunk with_rows_that_are_no_numbers(std::uint64_t seed, std::size_t tokens) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  constexpr float specials[] = {std::numeric_limits<float>::quiet_NaN(), infinity, -infinity, 3e38F, 1e-40F, 0.0F};
  Chunk chunk(seed, tokens);
  TestRng rng(seed + 17);
  for (std::vector<float>* rows : {&chunk.k, &chunk.v, &chunk.q}) {
    const std::size_t row = rows == &chunk.q ? query_heads * head_dim : kv_heads * head_dim;
    for (std::size_t begin = 0; begin < rows->size(); begin += row) {
      if (rng.below(3) == 0)
        (*rows)[begin + static_cast<std::size_t>(rng.below(static_cast<int>(row)))] = specials[rng.below(6)];
      if (rng.below(8) != 0) continue;
      const float special = specials[rng.below(6)];
      for (std::size_t i = 0; i < row; ++i) (*rows)[begin + i] = special;
    }
  }
  return chunk;
}

/// Whatever a policy makes of such rows, the container's word holds: the budget, the pins, the newest token.
template <class Policy>
void expect_order_without_numbers(const Policy& policy, std::size_t page_size, std::uint64_t seed) {
  SCOPED_TRACE(std::string(Policy::name) + ", pages of " + std::to_string(page_size));
  const CacheConfig config = config_of(page_size);
  PagedKvCache<Policy> cache(config, policy);
  const std::size_t prompt = page_size + 2;
  for (std::size_t t = 0; t < 30 * page_size + 40; ++t) {
    const Chunk token = with_rows_that_are_no_numbers(seed * 1000 + t, 1);
    const Status status =
        t < prompt ? cache.append_prompt(token.keys(1), token.values(1)) : cache.append(token.keys(1), token.values(1));
    ASSERT_TRUE(status.ok()) << status.message();
    std::vector<float> out(query_heads * head_dim);
    ASSERT_TRUE(attend(cache, std::span<const float>(token.q), out).ok());
    const std::size_t most = Evictor<Policy> ? config.budget_tokens : config.max_tokens;
    std::size_t held_by_all = 0;
    for (std::size_t h = 0; h < kv_heads; ++h) {
      const std::vector<Position> held = cache.resident_positions(h), read = cache.read_positions(h);
      held_by_all += held.size();
      ASSERT_LE(held.size(), SharedBudgetEvictor<Policy> ? kv_heads * most : most);
      ASSERT_EQ(held.back(), Position{static_cast<std::int64_t>(t)});
      ASSERT_TRUE(std::includes(held.begin(), held.end(), read.begin(), read.end()));
      ASSERT_FALSE(read.empty());
      const std::size_t pinned = traits::pin_prompt(policy) ? std::min(prompt, t + 1) : 0;
      for (std::size_t i = 0; i < pinned; ++i) ASSERT_EQ(held[i], Position{static_cast<std::int64_t>(i)});
    }
    ASSERT_LE(held_by_all, kv_heads * most);
  }
}

TEST(ZooVerbs, RowsThatHoldNoNumbersBreakNothing) {
  for_zoo([](auto policy) {
    for (const std::size_t page_size : {1U, 3U, 8U}) {
      for (std::uint64_t seed = 0; seed < 3; ++seed) expect_order_without_numbers(policy, page_size, seed);
      if constexpr (requires { policy.options.pin_prompt; }) {
        auto other = policy;
        other.options.pin_prompt = !other.options.pin_prompt;
        expect_order_without_numbers(other, page_size, 9);
      }
    }
  });
}

TEST(ZooVerbs, LearnedHyperplanesOfAnotherSizeAreRefused) {
  using Learned = BasicHashAttention<LearnedHyperplanes>;
  Learned policy;
  const auto refusal = [&] {
    try {
      PagedKvCache<Learned> cache(config_of(4), policy);
    } catch (const ConfigError& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_EQ(refusal(), "policy hash_attention: its 0 weights are not 32 rows of head_dim = 8");
  const std::vector<float> weights(32 * head_dim, 0.5F);
  policy.options.weights = weights;
  EXPECT_EQ(refusal(), "");
  policy.options.weights = std::span(weights).first(31 * head_dim);
  EXPECT_NE(refusal(), "");
}

}  // namespace
}  // namespace kvsparse_test
