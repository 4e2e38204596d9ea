// SPDX-License-Identifier: Apache-2.0
//
// Every policy in every storage type goes on from a snapshot as if nothing had happened: outputs, evictions, what was
// read, statistics, to the bit, for hundreds of tokens.
#include <gtest/gtest.h>

#include <cstddef>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "support/padding.hpp"
#include "support/rows.hpp"
#include "support/test_cache.hpp"

namespace kvsparse_test {
namespace {

constexpr std::size_t tokens = 340;
constexpr std::size_t prompt = 22;

kvsparse::CacheConfig config_for(std::string_view policy) {
  kvsparse::CacheConfig config;
  config.query_heads = 4;
  config.kv_heads = 2;
  config.head_dim = 12;
  config.page_size = 4;
  config.budget_tokens = 48;
  config.read_budget_tokens = 16;
  config.max_tokens = tokens;
  config.layer = policy.size();  // any but 0
  return config;
}

std::string saved(const TestCache& cache) {
  std::ostringstream out;
  cache.save(out);
  return out.str();
}

/// All that can be seen of a cache.
void expect_the_same(const TestCache& a, const TestCache& b) {
  const kvsparse::CacheStats x = a.stats(), y = b.stats();
  EXPECT_EQ(a.length(), b.length());
  EXPECT_EQ(x.resident_tokens, y.resident_tokens);
  EXPECT_EQ(x.peak_resident_tokens, y.peak_resident_tokens);
  EXPECT_EQ(x.resident_bytes, y.resident_bytes);
  EXPECT_EQ(x.peak_resident_bytes, y.peak_resident_bytes);
  EXPECT_EQ(x.evicted_tokens, y.evicted_tokens);
  EXPECT_EQ(x.last_read_tokens, y.last_read_tokens);
  EXPECT_EQ(x.last_skipped_tokens, y.last_skipped_tokens);
  if (x.used_page_share == x.used_page_share || y.used_page_share == y.used_page_share) {
    EXPECT_EQ(x.used_page_share, y.used_page_share);
  }
  for (std::size_t h = 0; h < 2; ++h) EXPECT_EQ(a.resident(h), b.resident(h));
}

/// Appends and attends a token; returns its outputs and log-sum-exps.
std::vector<float> step(TestCache& cache, const Rows& rows, std::size_t t) {
  std::vector<float> out(4 * 12), lse(4);
  const auto k = rows.token_k(t), v = rows.token_v(t);
  EXPECT_TRUE((t < prompt ? cache.append_prompt(k, v) : cache.append(k, v)).ok());
  EXPECT_TRUE(cache.attend(rows.token_q(t), out, lse).ok());
  out.insert(out.end(), lse.begin(), lse.end());
  return out;
}

void expect_to_go_on(const std::string& policy, kvsparse::ScalarType scalar, std::size_t at) {
  const kvsparse::CacheConfig config = config_for(policy);
  const Rows rows(tokens, config, 1);
  TestCache cache(policy, scalar, config);
  TestCache loaded(policy, scalar, config);
  const Rows others(60, config, 2);
  for (std::size_t t = 0; t < at; ++t) step(cache, rows, t);
  for (std::size_t t = 0; t < 60; ++t) step(loaded, others, t);  // whatever it held is gone
  std::istringstream in(saved(cache));
  loaded.load(in);
  EXPECT_TRUE(saved(loaded) == saved(cache));
  expect_the_same(loaded, cache);
  for (std::size_t t = at; t < tokens; ++t) {
    ASSERT_EQ(step(loaded, rows, t), step(cache, rows, t)) << "token " << t;
    for (std::size_t h = 0; h < 2; ++h) ASSERT_EQ(loaded.read(h), cache.read(h)) << "token " << t;
  }
  expect_the_same(loaded, cache);
  EXPECT_TRUE(!padding_is_cleared || saved(loaded) == saved(cache));  // the policy's state too
}

TEST(SnapshotOfEveryPolicy, DecodeGoesOnToTheBit) {
  TestRng rng(7);
  for (const std::string& policy : policy_names()) {
    for (const kvsparse::ScalarType scalar : all_scalar_types) {
      // In the prompt, at its end, at a page's boundary, before and after evictions; anywhere.
      std::vector<std::size_t> points{9, 60 + static_cast<std::size_t>(rng.below(200))};
      if (scalar == kvsparse::ScalarType::f32) points.insert(points.end(), {0, prompt, 48, 49, 100});
      for (const std::size_t at : points) {
        SCOPED_TRACE(policy + " in " + std::string(name_of(scalar)) + " at token " + std::to_string(at));
        expect_to_go_on(policy, scalar, at);
        if (testing::Test::HasFailure()) return;
      }
    }
  }
}

}  // namespace
}  // namespace kvsparse_test
