// SPDX-License-Identifier: Apache-2.0
//
// Drafts that were rejected leave no trace: a cache that had k of them and went back to j is the cache that only ever
// had those j, now and for hundreds of tokens to come.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "kvsparse/kvsparse.hpp"
#include "random_trace.hpp"

namespace kvsparse_test::drafts {

using namespace kvsparse;

inline constexpr std::size_t kv_heads = 2, query_heads = 4, head_dim = 8, most_drafts = 7;

inline CacheConfig config_of(std::size_t page_size, std::size_t max_speculative = most_drafts) {
  CacheConfig config;
  config.query_heads = query_heads;
  config.kv_heads = kv_heads;
  config.head_dim = head_dim;
  config.page_size = page_size;
  config.budget_tokens = 6 * page_size + (page_size < 4 ? 8 : 0);
  config.read_budget_tokens = 3 * page_size;
  config.max_tokens = 600;
  config.max_speculative = max_speculative;
  return config;
}

inline std::vector<float> gaussians(TestRng& rng, std::size_t count) {
  std::vector<float> row(count);
  for (float& x : row) x = static_cast<float>(rng.gaussian());
  return row;
}

/// Keys, values and queries of a chunk.
struct Chunk {
  Chunk(std::uint64_t seed, std::size_t tokens) : count(tokens) {
    TestRng rng(seed);
    k = gaussians(rng, tokens * kv_heads * head_dim);
    v = gaussians(rng, tokens * kv_heads * head_dim);
    q = gaussians(rng, tokens * query_heads * head_dim);
  }
  TokenRows<const float> keys(std::size_t tokens) const { return {k.data(), tokens, kv_heads, head_dim}; }
  TokenRows<const float> values(std::size_t tokens) const { return {v.data(), tokens, kv_heads, head_dim}; }
  TokenRows<const float> queries(std::size_t tokens) const { return {q.data(), tokens, query_heads, head_dim}; }
  std::size_t count;
  std::vector<float> k, v, q;
};

template <class Cache>
std::vector<float> draft(Cache& cache, const Chunk& chunk, std::size_t tokens, std::size_t attended) {
  EXPECT_TRUE(cache.append_draft(chunk.keys(tokens), chunk.values(tokens)).ok());
  std::vector<float> out(attended * query_heads * head_dim);
  if (attended == tokens) {
    EXPECT_TRUE(
        attend_prompt(cache, chunk.queries(tokens), TokenRows<float>(out.data(), tokens, query_heads, head_dim)).ok());
  }
  return out;
}

template <class Cache>
std::vector<float> step(Cache& cache, const Chunk& chunk) {
  EXPECT_TRUE(cache
                  .append(std::span<const float>(chunk.k).first(kv_heads * head_dim),
                          std::span<const float>(chunk.v).first(kv_heads * head_dim))
                  .ok());
  std::vector<float> out(query_heads * head_dim), lse(query_heads);
  EXPECT_TRUE(attend(cache, std::span<const float>(chunk.q).first(query_heads * head_dim), out, lse).ok());
  out.insert(out.end(), lse.begin(), lse.end());
  return out;
}

/// Everything later steps depend on: tables, rows, policy state, counters, as a snapshot holds them; but for the peaks,
/// which say what memory really held, drafts included.
template <class Cache>
std::string state_of(const Cache& cache) {
  std::string text;
  for (std::size_t h = 0; h < kv_heads; ++h) {
    for (const Position position : cache.resident_positions(h)) text += std::to_string(position.value) + " ";
    for (const Position position : cache.read_positions(h)) text += std::to_string(position.value) + ",";
  }
  const CacheStats stats = cache.stats();
  text += std::to_string(stats.tokens) + "/" + std::to_string(stats.evicted_tokens) + "/" +
          std::to_string(stats.last_read_tokens) + "/" + std::to_string(stats.last_skipped_tokens) + "/" +
          std::to_string(stats.used_page_share);
  return text;
}

template <class Policy, class Scalar>
void expect_no_trace(std::size_t page_size, std::uint64_t seed, const Policy& policy = {}) {
  SCOPED_TRACE(std::string(Policy::name) + ", page size " + std::to_string(page_size) + ", seed " +
               std::to_string(seed));
  using Cache = PagedKvCache<Policy, Scalar>;
  Cache x(config_of(page_size), policy), y(config_of(page_size), policy);
  TestRng rng(seed * 7919 + page_size);
  const auto prompt = static_cast<std::size_t>(rng.below(static_cast<int>(2 * page_size)) + 1);
  const Chunk first(seed, prompt);
  for (Cache* cache : {&x, &y}) {
    std::vector<float> out(prompt * query_heads * head_dim);
    ASSERT_TRUE(cache->append_prompt(first.keys(prompt), first.values(prompt)).ok());
    ASSERT_TRUE(
        attend_prompt(*cache, first.queries(prompt), TokenRows<float>(out.data(), prompt, query_heads, head_dim)).ok());
  }
  std::size_t rejected = 0;
  for (int round = 0; round < 60; ++round) {
    const auto drafts = static_cast<std::size_t>(1 + rng.below(most_drafts));
    const auto kept = static_cast<std::size_t>(rng.below(static_cast<int>(drafts) + 1));
    const Chunk chunk(rng.next(), drafts);
    const Position before = x.next_position();
    if (rng.below(4) == 0 && kept > 0) {  // one by one, each attended before the next comes
      for (std::size_t t = 0; t < drafts; ++t) {
        const std::size_t row = t * kv_heads * head_dim;
        const auto one = [&](Cache& cache) {
          std::vector<float> out(query_heads * head_dim);
          EXPECT_TRUE(cache
                          .append_draft(TokenRows<const float>(chunk.k.data() + row, 1, kv_heads, head_dim),
                                        TokenRows<const float>(chunk.v.data() + row, 1, kv_heads, head_dim))
                          .ok());
          EXPECT_TRUE(
              attend(cache, std::span(chunk.q).subspan(t * query_heads * head_dim, query_heads * head_dim), out).ok());
          return out;
        };
        const std::vector<float> of_x = one(x);
        if (t >= kept) continue;
        ASSERT_EQ(of_x, one(y));
      }
    } else {
      const std::size_t attended = rng.below(6) == 0 ? 0 : drafts;
      const std::vector<float> of_x = draft(x, chunk, drafts, attended);
      if (kept > 0) {
        const std::vector<float> of_y = draft(y, chunk, kept, attended == 0 ? 0 : kept);
        ASSERT_TRUE(std::equal(of_y.begin(), of_y.end(), of_x.begin())) << "round " << round;
      }
    }
    rejected += drafts - kept;
    EXPECT_EQ(x.drafts(), drafts);
    ASSERT_TRUE(x.truncate(before + kept).ok());
    ASSERT_TRUE(y.truncate(before + kept).ok());
    ASSERT_EQ(x.drafts(), 0U);
    ASSERT_EQ(state_of(x), state_of(y)) << "round " << round;
    std::size_t held = 0;
    for (std::size_t h = 0; Evictor<Policy> && h < kv_heads; ++h) {
      held += x.resident_tokens(h);
      const std::size_t most = x.page_budget() * page_size;
      ASSERT_LE(x.resident_tokens(h), SharedBudgetEvictor<Policy> ? kv_heads * most : most);
    }
    ASSERT_LE(held, kv_heads * x.page_budget() * page_size);
    for (int t = rng.below(4); t > 0; --t) {
      const Chunk token(rng.next(), 1);
      ASSERT_EQ(step(x, token), step(y, token)) << "round " << round;
      ASSERT_EQ(state_of(x), state_of(y)) << "round " << round;
    }
  }
  EXPECT_GT(rejected, 0U);
  for (int t = 0; t < 150; ++t) {
    const Chunk token(rng.next(), 1);
    ASSERT_EQ(step(x, token), step(y, token)) << "token " << t << " after the last draft";
    ASSERT_EQ(state_of(x), state_of(y));
  }
}

template <class Policy>
void expect_no_trace_in_any_shape(const Policy& policy = {}) {
  for (const std::size_t page_size : {1U, 3U, 8U}) {
    for (std::uint64_t seed = 0; seed < 2; ++seed) expect_no_trace<Policy, float>(page_size, seed, policy);
    expect_no_trace<Policy, Half>(page_size, 9, policy);
  }
}

}  // namespace kvsparse_test::drafts
