// SPDX-License-Identifier: Apache-2.0
//
// The oracle's own test: cases small enough to be worked out by hand. Everything else is tested against the oracle, so
// this file is where the definitions of the policies meet paper and pencil.
#include "support/naive_replay.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "support/random_trace.hpp"

namespace kvsparse_test {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

// One head of dimension 1 whose query is always 1 and whose key is log(w): each token's softmax weight is w over the
// sum of the w that are read. The value is the position.
NaiveTrace weighted_trace(const std::vector<double>& w, int prompt_tokens) {
  NaiveTrace trace;
  trace.tokens = static_cast<int>(w.size());
  trace.query_heads = trace.kv_heads = trace.head_dim = 1;
  trace.prompt_tokens = prompt_tokens;
  for (std::size_t t = 0; t < w.size(); ++t) {
    trace.q.push_back(1);
    trace.k.push_back(static_cast<float>(std::log(w[t])));
    trace.v.push_back(static_cast<float>(t));
  }
  return trace;
}

NaiveSettings settings_of(const std::string& policy, int page_size, int budget) {
  NaiveSettings settings;
  settings.policy = policy;
  settings.page_size = page_size;
  settings.budget = budget;
  return settings;
}

std::vector<int> victims(const NaiveResult& result, std::size_t head = 0) {
  std::vector<int> list;
  for (const NaiveStep& step : result.steps) list.push_back(step.victims[head]);
  return list;
}

std::vector<int> positions(const std::vector<char>& mask) {
  std::vector<int> list;
  for (std::size_t i = 0; i < mask.size(); ++i) {
    if (mask[i]) list.push_back(static_cast<int>(i));
  }
  return list;
}

using Ints = std::vector<int>;

TEST(NaiveReplay, DenseReadsEverything) {
  const NaiveResult result = naive_replay(weighted_trace({1, 3, 4}, 1), settings_of("dense", 2, 0));
  const NaiveStep& last = result.steps[2];
  EXPECT_EQ(positions(last.resident[0]), (Ints{0, 1, 2}));
  EXPECT_EQ(positions(last.read[0]), (Ints{0, 1, 2}));
  EXPECT_NEAR(last.out[0], 3.0 / 8 + 2 * 4.0 / 8, 1e-7);
  EXPECT_NEAR(last.lse[0], std::log(8.0), 1e-7);
  EXPECT_EQ(last.out, last.dense_out);
  EXPECT_NEAR(result.mean_share, 1, 1e-12);
  EXPECT_EQ(result.max_error, 0);
  EXPECT_EQ(result.peak_tokens, 3);
  EXPECT_EQ(result.evicted_tokens, 0);
}

TEST(NaiveReplay, StreamingLlmKeepsSinksAndTheLatest) {
  NaiveSettings settings = settings_of("streaming_llm", 1, 3);
  settings.sinks = 1;
  const NaiveResult result = naive_replay(weighted_trace({1, 1, 1, 1, 1, 1}, 2), settings);
  EXPECT_EQ(victims(result), (Ints{-1, -1, -1, 1, 2, 3}));
  EXPECT_EQ(positions(result.steps[5].resident[0]), (Ints{0, 4, 5}));
  EXPECT_NEAR(result.steps[5].out[0], 3, 1e-12);
  EXPECT_NEAR(result.steps[5].dense_mass_read[0], 0.5, 1e-12);
  // Decode steps 2..5 read 3 of 3, 3 of 4, 3 of 5, 3 of 6.
  EXPECT_NEAR(result.mean_share, (1 + 0.75 + 0.6 + 0.5) / 4, 1e-12);
  // Their outputs against dense: 1|1, (0+2+3)/3|1.5, (0+3+4)/3|2, (0+4+5)/3|2.5.
  EXPECT_NEAR(result.mean_error, (0 + 1.0 / 9 + 1.0 / 6 + 0.2) / 4, 1e-12);
  EXPECT_NEAR(result.max_error, 0.2, 1e-12);
  EXPECT_EQ(result.peak_tokens, 3);
  EXPECT_EQ(result.evicted_tokens, 3);
}

TEST(NaiveReplay, SinksRoundUpToPages) {
  // Page 3, four sinks: pages 0 and 1 are pinned, P = 3, so the only other page goes each time.
  const NaiveTrace trace = weighted_trace(std::vector<double>(14, 1.0), 0);
  const NaiveResult result = naive_replay(trace, settings_of("streaming_llm", 3, 11));
  EXPECT_EQ(victims(result), (Ints{-1, -1, -1, -1, -1, -1, -1, -1, -1, 6, -1, -1, 9, -1}));
  EXPECT_EQ(positions(result.steps[13].resident[0]), (Ints{0, 1, 2, 3, 4, 5, 12, 13}));
  EXPECT_EQ(result.peak_tokens, 9);
  EXPECT_EQ(result.evicted_tokens, 6);
  EXPECT_THROW(naive_replay(trace, settings_of("streaming_llm", 3, 8)), std::invalid_argument);
}

TEST(NaiveReplay, H2oProtectsTheNewestAndAccumulatesFromTheOpening) {
  // P = 4 protects max(1, 2) - 1 = 1 full page. After t = 3 the accumulated masses are
  //   0: 1 + 1/4 + 1/5 + 1/6   1: 3/4 + 3/5 + 1/2   2: 1/5 + 1/6   3: 1/6
  // so 3 is lowest but protected, and 2 goes.
  const NaiveResult result = naive_replay(weighted_trace({1, 3, 1, 1, 8}, 3), settings_of("h2o", 1, 4));
  EXPECT_EQ(victims(result), (Ints{-1, -1, -1, -1, 2}));
  EXPECT_LT(result.steps[4].decision_margin, infinity);
  // P = 3 protects max(1, 1) - 1 = 0 pages: the page filled last is an ordinary page, and 2 goes at once.
  EXPECT_EQ(victims(naive_replay(weighted_trace({1, 3, 1, 1}, 0), settings_of("h2o", 1, 3))), (Ints{-1, -1, -1, 2}));
}

TEST(NaiveReplay, H2oEvictsDuringThePromptUnlessPinned) {
  const NaiveTrace trace = weighted_trace({1, 1, 1, 1, 1, 1, 1}, 4);
  // P = 2 protects none: the page filled last has had one query, the other more.
  EXPECT_EQ(victims(naive_replay(trace, settings_of("h2o", 1, 2))), (Ints{-1, -1, 1, 2, 3, 4, 5}));
  NaiveSettings pinned = settings_of("h2o", 1, 6);
  pinned.pin_prompt = true;
  // Two unpinned pages: P' = 2 protects none. P itself would have protected two.
  EXPECT_EQ(victims(naive_replay(trace, pinned)), (Ints{-1, -1, -1, -1, -1, -1, 5}));
  pinned.budget = 4;
  EXPECT_THROW(naive_replay(trace, pinned), std::invalid_argument);
}

TEST(NaiveReplay, RaasGoesByStampThenByLastMass) {
  NaiveSettings settings = settings_of("raas", 1, 3);
  settings.alpha = 0.3;
  // t = 2: page 1 has 2/4 > alpha: stamp 2, as the open page 2, whose mass 1/4 is lower: out at t = 3.
  // t = 3: page 1 has 2/7 < alpha and keeps stamp 2; page 3 has stamp 3. So 1 goes at t = 4.
  const NaiveResult result = naive_replay(weighted_trace({1, 2, 1, 4, 1}, 1), settings);
  EXPECT_EQ(victims(result), (Ints{-1, -1, -1, 2, 1}));
  EXPECT_EQ(positions(result.steps[4].resident[0]), (Ints{0, 3, 4}));
  EXPECT_NEAR(result.steps[3].decision_margin, (0.3 - 2.0 / 7) / 0.3 / (1 + std::log(4.0)), 1e-6);
}

TEST(NaiveReplay, RaasComparesHeadsOfTheGroupOneByOne) {
  // Two query heads, page 1, prompt 1, alpha 0.5. At t = 3 head 0 puts 0.6 on page 1 and 0.1 on page 2, head 1 puts
  // 0.3 on page 1 and 0.4 on page 2: only page 1 is used, though both sums exceed alpha.
  NaiveTrace trace;
  trace.tokens = 5;
  trace.query_heads = 2;
  trace.kv_heads = 1;
  trace.head_dim = 2;
  trace.prompt_tokens = 1;
  const double root = std::sqrt(2.0);
  const std::vector<std::vector<double>> weights = {{1.5, 1.5}, {6, 3}, {1, 4}, {1.5, 1.5}, {1, 1}};
  for (const auto& w : weights) {
    for (const double x : {root, 0.0, 0.0, root}) trace.q.push_back(static_cast<float>(x));
    for (const double x : w) trace.k.push_back(static_cast<float>(std::log(x)));
    for (int i = 0; i < 2; ++i) trace.v.push_back(1);
  }
  NaiveSettings settings = settings_of("raas", 1, 4);
  settings.alpha = 0.5;
  EXPECT_EQ(victims(naive_replay(trace, settings)), (Ints{-1, -1, -1, -1, 2}));
  // alpha = 0.35: page 2 is used as well; all stamps tie, and of the sums 0.9, 0.5, 0.3 the open page's is lowest.
  settings.alpha = 0.35;
  EXPECT_EQ(victims(naive_replay(trace, settings)), (Ints{-1, -1, -1, -1, 3}));
  // alpha = 0.75: nobody is ever used, so the older stamp goes before the lighter page.
  settings.alpha = 0.75;
  EXPECT_EQ(victims(naive_replay(trace, settings)), (Ints{-1, -1, -1, -1, 1}));
}

TEST(NaiveReplay, RaasPinsEveryPageThatHoldsAPromptToken) {
  // Prompt of 4 at page 3: pages 0 and 1; the lone other page goes whenever a new one opens.
  const NaiveTrace trace = weighted_trace(std::vector<double>(14, 1.0), 4);
  const NaiveResult result = naive_replay(trace, settings_of("raas", 3, 9));
  EXPECT_EQ(result.steps[9].victims[0], 6);
  EXPECT_EQ(result.steps[12].victims[0], 9);
  EXPECT_EQ(result.evicted_tokens, 6);
  EXPECT_THROW(naive_replay(trace, settings_of("raas", 3, 8)), std::invalid_argument);
  NaiveSettings free = settings_of("raas", 3, 8);
  free.pin_prompt = false;
  EXPECT_NO_THROW(naive_replay(trace, free));
}

TEST(NaiveReplay, RaasStampsOnlyAfterDecodeSteps) {
  // Unpinned prompt of 3, P = 3. Prompt queries do not stamp, so page 0 goes at t = 3 although it is by far the
  // heaviest; stamping at t = 2 would have made the light page 1 or 2 the victim.
  NaiveSettings settings = settings_of("raas", 1, 3);
  settings.pin_prompt = false;
  EXPECT_EQ(victims(naive_replay(weighted_trace({8, 1, 1, 1}, 3), settings)), (Ints{-1, -1, -1, 0}));
  // With the third token decoded, all three have stamp 2, and of the equal masses of 1 and 2 the older goes.
  EXPECT_EQ(victims(naive_replay(weighted_trace({8, 1, 1, 1}, 2), settings)), (Ints{-1, -1, -1, 1}));
}

TEST(NaiveReplay, RankStampsTheFirstHalfAndTiesGoByPosition) {
  NaiveSettings settings = settings_of("raas", 1, 4);
  settings.rank = true;
  // All masses equal. t = 1: n = 1: page 0. t = 2: n = 2: page 0. t = 3: n = 3, ceil(1.5) = 2: pages 0 and 1.
  // So 2 alone has an old stamp.
  const NaiveResult result = naive_replay(weighted_trace({1, 1, 1, 1, 1}, 0), settings);
  EXPECT_EQ(victims(result), (Ints{-1, -1, -1, -1, 2}));
  for (const NaiveStep& step : result.steps) EXPECT_EQ(step.decision_margin, infinity);
  // Unequal: page 2 is the heaviest, then 0.
  EXPECT_EQ(victims(naive_replay(weighted_trace({2, 1, 4, 1, 1}, 0), settings)), (Ints{-1, -1, -1, -1, 1}));
}

// Page 3, one head of dimension 2, query (1, 1). Page 0 looks good by its bound (20) but has no such key; page 1 really
// has keys of dot 14; the open page's keys are 0.
NaiveTrace loose_bound_trace(int tokens) {
  NaiveTrace trace;
  trace.tokens = tokens;
  trace.query_heads = trace.kv_heads = 1;
  trace.head_dim = 2;
  const std::vector<float> keys = {10, 0, 0, 10, 0, 0, 7, 7, 7, 7, 7, 7};
  for (std::size_t i = 0; i < 2 * static_cast<std::size_t>(tokens); ++i) {
    trace.q.push_back(1);
    trace.k.push_back(i < keys.size() ? keys[i] : 0);
    trace.v.push_back(static_cast<float>(i));
  }
  return trace;
}

TEST(NaiveReplay, QuestReadsTheOpenPageAndTheBestBounds) {
  const NaiveTrace trace = loose_bound_trace(10);
  const NaiveResult two = naive_replay(trace, settings_of("quest", 3, 6));
  EXPECT_EQ(positions(two.steps[5].read[0]), (Ints{0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(positions(two.steps[7].read[0]), (Ints{0, 1, 2, 6, 7}));
  EXPECT_EQ(positions(two.steps[7].resident[0]), (Ints{0, 1, 2, 3, 4, 5, 6, 7}));
  EXPECT_NEAR(two.steps[7].decision_margin, 6.0 / 20, 1e-12);
  EXPECT_EQ(two.peak_tokens, 10);
  const NaiveResult one = naive_replay(trace, settings_of("quest", 3, 5));
  EXPECT_EQ(positions(one.steps[7].read[0]), (Ints{6, 7}));
  EXPECT_THROW(naive_replay(trace, settings_of("quest", 3, 2)), std::invalid_argument);
}

TEST(NaiveReplay, QuestTakesTheMaximumOverTheGroup) {
  // Bounds of pages 0 and 1: (3, 2.5) for head 0, (0, 2) for head 1. The maximum prefers page 0, a sum would not.
  NaiveTrace trace;
  trace.tokens = 3;
  trace.query_heads = 2;
  trace.kv_heads = 1;
  trace.head_dim = 2;
  trace.k = {3, 0, 2.5F, 2, 0, 0};
  trace.v = trace.k;
  for (int t = 0; t < 3; ++t) trace.q.insert(trace.q.end(), {1, 0, 0, 1});
  EXPECT_EQ(positions(naive_replay(trace, settings_of("quest", 1, 2)).steps[2].read[0]), (Ints{0, 2}));
}

TEST(NaiveReplay, QuestBoundIsOtherEvidenceThanMass) {
  const NaiveTrace trace = loose_bound_trace(10);
  NaiveSettings settings = settings_of("raas", 3, 9);
  settings.alpha = 0.05;
  // Exact: page 0 has mass 0.04, page 1 has 0.96. By bounds: page 0 has exp(20/r2) against exp(14/r2), 0.986.
  EXPECT_EQ(victims(naive_replay(trace, settings))[9], 0);
  settings.quest_bound = true;
  EXPECT_EQ(victims(naive_replay(trace, settings))[9], 3);
  settings.rank = true;  // n = 2: the first one
  EXPECT_EQ(victims(naive_replay(trace, settings))[9], 3);
  settings.quest_bound = false;
  EXPECT_EQ(victims(naive_replay(trace, settings))[9], 0);
}

TEST(NaiveReplay, PagesNotReadKeepWhatTheyHad) {
  // Reading only the open page, every page keeps the stamp and the mass of its own time: first in, first out.
  const NaiveTrace trace = weighted_trace({1, 9, 9, 1, 1, 1}, 0);
  for (const bool rank : {false, true}) {
    for (const bool quest_bound : {false, true}) {
      NaiveSettings settings = settings_of("raas+quest", 1, 3);
      settings.read_budget = 1;
      settings.rank = rank;
      settings.quest_bound = quest_bound;
      const NaiveResult result = naive_replay(trace, settings);
      EXPECT_EQ(victims(result), (Ints{-1, -1, -1, 0, 1, 2}));
      EXPECT_EQ(positions(result.steps[5].read[0]), (Ints{5}));
      EXPECT_EQ(positions(result.steps[5].resident[0]), (Ints{3, 4, 5}));
    }
  }
  // Accumulated mass is 1 for each: exact ties.
  NaiveSettings settings = settings_of("h2o+quest", 1, 3);
  settings.read_budget = 1;
  EXPECT_EQ(victims(naive_replay(trace, settings)), (Ints{-1, -1, -1, 0, 1, 2}));
}

TEST(NaiveReplay, RandomAsksAmongTheFullUnpinnedPages) {
  const NaiveTrace trace = weighted_trace(std::vector<double>(7, 1.0), 1);
  NaiveSettings settings = settings_of("random", 1, 4);
  EXPECT_THROW(naive_replay(trace, settings), std::invalid_argument);
  std::vector<std::size_t> asked;
  settings.random_choice = [&](int, int evictions, std::size_t n) {
    asked.push_back(n);
    return evictions == 1 ? std::size_t{2} : std::size_t{0};
  };
  EXPECT_EQ(victims(naive_replay(trace, settings)), (Ints{-1, -1, -1, -1, 1, 4, 2}));
  EXPECT_EQ(asked, (std::vector<std::size_t>{3, 3, 3}));
}

TEST(NaiveReplay, RefusesWhatReplayRefuses) {
  NaiveTrace trace = weighted_trace({1, 1}, 1);
  EXPECT_THROW(naive_replay(trace, settings_of("snail", 1, 2)), std::invalid_argument);
  EXPECT_THROW(naive_replay(trace, settings_of("raas", 1, 0)), std::invalid_argument);
  EXPECT_THROW(naive_replay(trace, settings_of("raas+h2o", 1, 2)), std::invalid_argument);
  trace.prompt_tokens = 2;
  EXPECT_THROW(naive_replay(trace, settings_of("dense", 1, 2)), std::invalid_argument);
}

TEST(RandomTrace, IsTheSameEverywhere) {
  TestRng rng(42);
  EXPECT_EQ(rng.next(), 0xBDD732262FEB6E95ULL);  // splitmix64's published sequence
  EXPECT_EQ(rng.next(), 0x28EFE333B266F103ULL);
  const NaiveTrace a = gaussian_trace({20, 4, 2, 8, 3}, 7);
  const NaiveTrace b = gaussian_trace({20, 4, 2, 8, 3}, 7);
  EXPECT_EQ(a.q, b.q);
  EXPECT_NE(a.q, gaussian_trace({20, 4, 2, 8, 3}, 8).q);
}

TEST(RandomTrace, GaussiansHaveMeanZeroAndTheirScale) {
  const NaiveTrace trace = gaussian_trace({2000, 1, 1, 8, 0}, 1, 2);
  double sum = 0;
  double squares = 0;
  for (const float x : trace.q) {
    sum += static_cast<double>(x);
    squares += static_cast<double>(x) * static_cast<double>(x);
  }
  EXPECT_NEAR(sum / 16000, 0, 0.06);
  EXPECT_NEAR(squares / 16000, 4, 0.2);
}

TEST(RandomTrace, MilestonesSeparateThePolicies) {
  const NaiveTrace trace = milestone_trace({400, 4, 2, 40, 20}, 3);
  const double raas = naive_replay(trace, settings_of("raas", 4, 120)).mean_share;
  NaiveSettings pinned = settings_of("streaming_llm", 4, 120);
  pinned.pin_prompt = true;
  const double window = naive_replay(trace, pinned).mean_share;
  EXPECT_GT(raas, window + 0.05) << raas << " against " << window;
}

TEST(RandomTrace, TiesAreExact) {
  const TraceShape shape{60, 2, 1, 8, 3};
  TieOptions options;
  options.zero_keys = true;
  NaiveSettings rank = settings_of("raas", 3, 15);
  rank.rank = true;
  for (const NaiveStep& step : naive_replay(tie_trace(shape, 1, options), rank).steps) {
    EXPECT_EQ(step.decision_margin, infinity);
  }
  options = {};
  options.key_period = 3;  // every full page is the same page
  for (const NaiveStep& step : naive_replay(tie_trace(shape, 1, options), settings_of("quest", 3, 15)).steps) {
    EXPECT_EQ(step.decision_margin, infinity);
  }
  options.constant_queries = true;
  const NaiveResult result = naive_replay(tie_trace(shape, 1, options), settings_of("quest", 3, 9));
  EXPECT_EQ(positions(result.steps[20].read[0]), (Ints{0, 1, 2, 3, 4, 5, 18, 19, 20}));
}

TEST(RandomTrace, HugeNormsStayFinite) {
  for (const char* policy : {"dense", "h2o", "quest", "raas", "raas+quest"}) {
    NaiveSettings settings = settings_of(policy, 3, 30);
    settings.read_budget = 9;
    settings.quest_bound = true;
    const NaiveResult result = naive_replay(huge_norm_trace({80, 2, 1, 40, 5}, 2), settings);
    for (const NaiveStep& step : result.steps) {
      for (const double x : step.out) EXPECT_TRUE(std::isfinite(x));
      for (const double x : step.lse) EXPECT_TRUE(std::isfinite(x));
    }
    EXPECT_TRUE(std::isfinite(result.mean_error));
  }
}

}  // namespace
}  // namespace kvsparse_test
