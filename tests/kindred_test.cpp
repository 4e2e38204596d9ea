// SPDX-License-Identifier: Apache-2.0
//
// What Kindred promises beside its formula, which policy_oracle_test.cpp checks: a head that cannot tell milestones
// from other pages goes by the oldest stamp alone, and no values, however odd, bring it out of step.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "support/random_trace.hpp"
#include "support/test_cache.hpp"

namespace kvsparse_test {
namespace {

using kvsparse::CacheConfig;
using kvsparse::ScalarType;

/// resident[token][head], each a list of positions.
using Residency = std::vector<std::vector<std::vector<int>>>;

struct Memory {
  std::size_t page_size = 4;
  std::size_t budget = 40;
  ScalarType scalar = ScalarType::f32;
};

Residency residency(const NaiveTrace& trace, const std::string& policy, const Settings& settings,
                    const Memory& memory) {
  CacheConfig config;
  config.query_heads = static_cast<std::size_t>(trace.query_heads);
  config.kv_heads = static_cast<std::size_t>(trace.kv_heads);
  config.head_dim = static_cast<std::size_t>(trace.head_dim);
  config.page_size = memory.page_size;
  config.budget_tokens = memory.budget;
  TestCache cache(policy, memory.scalar, config, settings);
  const std::size_t kv = config.kv_heads * config.head_dim;
  const std::size_t q = config.query_heads * config.head_dim;
  std::vector<float> out(q);
  Residency result;
  for (std::size_t t = 0; t < static_cast<std::size_t>(trace.tokens); ++t) {
    const auto k = std::span<const float>(trace.k).subspan(t * kv, kv);
    const auto v = std::span<const float>(trace.v).subspan(t * kv, kv);
    const bool is_prompt = t < static_cast<std::size_t>(trace.prompt_tokens);
    EXPECT_TRUE((is_prompt ? cache.append_prompt(k, v) : cache.append(k, v)).ok());
    EXPECT_TRUE(cache.attend(std::span<const float>(trace.q).subspan(t * q, q), out).ok());
    result.emplace_back();
    for (std::size_t h = 0; h < config.kv_heads; ++h) {
      result.back().push_back(cache.resident(h));
      EXPECT_LE(result.back().back().size(), memory.budget);
    }
  }
  return result;
}

/// Milestones are used late from window 8 on; with patience 1 looks weigh nothing.
const Settings eager = {{"window", "8"}, {"caution", "0"}, {"patience", "64"}};
const Settings cautious = {{"window", "8"}, {"patience", "64"}};
const Settings blind = {{"window", "8"}, {"patience", "1"}};

/// One head. Each query finds its own token and, except at the last slot of a page, one older token: the page being
/// filled is used at every step, and no two pages share a stamp.
NaiveTrace trace_without_ties(int tokens, int page_size) {
  NaiveTrace trace;
  trace.tokens = trace.head_dim = tokens;
  trace.query_heads = trace.kv_heads = 1;
  trace.prompt_tokens = page_size;
  const auto at = [&](int t, int channel) {
    return random_trace::flat(1, tokens, t, 0) + static_cast<std::size_t>(channel);
  };
  trace.q.assign(at(tokens, 0), 0.0F);
  trace.k = trace.q;
  trace.v.assign(trace.q.size(), 1.0F);
  TestRng rng(5);
  for (int t = 0; t < tokens; ++t) {
    trace.k[at(t, t)] = 1;
    const float sharp = 12.0F * std::sqrt(static_cast<float>(tokens));
    trace.q[at(t, t)] = sharp;
    if (t % page_size != page_size - 1 && t > page_size) trace.q[at(t, std::max(0, t - 1 - rng.below(50)))] = sharp;
  }
  return trace;
}

TEST(KindredThatCannotTell, DecidesAsRaasWhereNoTwoPagesShareAStamp) {
  for (const int page_size : {2, 4, 8}) {
    SCOPED_TRACE("page size " + std::to_string(page_size));
    const NaiveTrace trace = trace_without_ties(240, page_size);
    const Memory memory{static_cast<std::size_t>(page_size), 48};
    const Residency kindred = residency(trace, "kindred", cautious, memory);
    EXPECT_EQ(kindred, residency(trace, "raas", {}, memory));
    // Uses did matter.
    EXPECT_NE(kindred, residency(trace, "raas", {{"alpha", "1"}}, memory));
  }
}

TEST(KindredThatCannotTell, GoesByStampsAloneWhenAllValuesAreAlikeOrZero) {
  for (const float value : {0.0F, 0.7F}) {
    for (const ScalarType scalar : all_scalar_types) {
      NaiveTrace trace = milestone_trace({300, 4, 2, 24, 9}, 3);
      std::fill(trace.v.begin(), trace.v.end(), value);
      const Memory memory{2, 40, scalar};
      EXPECT_EQ(residency(trace, "kindred", cautious, memory), residency(trace, "kindred", blind, memory));
    }
  }
}

TEST(KindredThatUsesNothing, IsFirstInFirstOutLikeRaas) {
  const NaiveTrace trace = milestone_trace({200, 4, 2, 24, 9}, 4);
  for (const std::size_t page_size : {1U, 3U, 7U}) {
    const Memory memory{page_size, 35};
    EXPECT_EQ(residency(trace, "kindred", {{"alpha", "1"}}, memory),
              residency(trace, "raas", {{"alpha", "1"}}, memory));
  }
}

TEST(KindredThatCanTell, DecidesOtherwiseThanByStampsAlone) {
  const NaiveTrace trace = look_alike_trace({300, 4, 2, 24, 9}, 3);
  EXPECT_NE(residency(trace, "kindred", cautious, {2, 40}), residency(trace, "kindred", blind, {2, 40}));
  EXPECT_NE(residency(trace, "kindred", eager, {2, 40}), residency(trace, "kindred", blind, {2, 40}));
}

/// Powers of two change no digit, so the looks stay what they were, however large or small the values.
TEST(KindredOfOddValues, DoesNotMindTheirScale) {
  for (const float scale : {0x1p-120F, 0x1p-60F, 0x1p100F, 0x1p118F}) {
    const NaiveTrace trace = look_alike_trace({300, 4, 2, 24, 9}, 6);
    NaiveTrace scaled = trace;
    for (float& x : scaled.v) x *= scale;
    for (const Settings& settings : {eager, cautious}) {
      EXPECT_EQ(residency(scaled, "kindred", settings, {2, 40}), residency(trace, "kindred", settings, {2, 40}))
          << scale;
    }
  }
}

TEST(KindredOfOddValues, TakesAPageThatIsNotFiniteForOneThatLooksLikeNothing) {
  for (const ScalarType scalar : all_scalar_types) {
    NaiveTrace zero = look_alike_trace({300, 4, 2, 24, 9}, 7);
    NaiveTrace infinite = zero;
    NaiveTrace unknown = zero;
    TestRng rng(1);
    for (std::size_t row = 0; row < zero.v.size(); row += 24) {
      if (rng.below(5) != 0) continue;
      for (std::size_t i = row; i < row + 24; ++i) zero.v[i] = 0;
      infinite.v[row + 3] = std::numeric_limits<float>::infinity();
      unknown.v[row + 5] = std::numeric_limits<float>::quiet_NaN();
    }
    const Residency expected = residency(zero, "kindred", eager, {1, 40, scalar});
    EXPECT_EQ(residency(infinite, "kindred", eager, {1, 40, scalar}), expected);
    EXPECT_EQ(residency(unknown, "kindred", eager, {1, 40, scalar}), expected);
  }
}

TEST(KindredOfOddValues, LooksAtTheFirst256Channels) {
  NaiveTrace trace = look_alike_trace({200, 1, 1, 300, 9}, 8);
  const Residency expected = residency(trace, "kindred", eager, {2, 40});
  EXPECT_NE(expected, residency(trace, "kindred", blind, {2, 40}));
  for (std::size_t i = 0; i < trace.v.size(); ++i) {
    if (i % 300 >= 256) trace.v[i] = 1000;
  }
  EXPECT_EQ(residency(trace, "kindred", eager, {2, 40}), expected);
}

}  // namespace
}  // namespace kvsparse_test
