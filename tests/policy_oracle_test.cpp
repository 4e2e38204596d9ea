// SPDX-License-Identifier: Apache-2.0
//
// Every policy against the independent oracle of support/naive_replay.hpp, decision for decision: which tokens are
// resident, which are read, what comes out. Where two masses or bounds are closer than floats can tell, the library may
// decide the other way; that head is then left out from there on, and each test asserts that this stays rare.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "support/naive_replay.hpp"
#include "support/random_trace.hpp"
#include "support/test_cache.hpp"

namespace kvsparse_test {
namespace {

using kvsparse::CacheConfig;
using kvsparse::ScalarType;

/// A policy with options, as the oracle and as the library understand them.
struct PolicyCase {
  std::string title;
  std::string policy;
  Settings settings;
  std::function<void(NaiveSettings&)> oracle_settings = [](NaiveSettings&) {};
  std::uint64_t seed = 0;  // of random
};

void PrintTo(const PolicyCase& policy, std::ostream* out) { *out << policy.title; }

/// The library's published sequence of random numbers: a recorded run must stay what it was.
std::function<std::size_t(int, int, std::size_t)> random_choice(std::uint64_t seed) {
  const auto mix = [](std::uint64_t x) { return TestRng(x).next(); };
  return [=](int head, int evictions, std::size_t candidates) {
    std::uint64_t hash = mix(seed);
    for (const int part : {0, head, evictions}) hash = mix(hash ^ static_cast<std::uint64_t>(part));
    return static_cast<std::size_t>(hash % candidates);
  };
}

std::vector<int> positions(const std::vector<char>& mask) {
  std::vector<int> result;
  for (std::size_t i = 0; i < mask.size(); ++i) {
    if (mask[i] != 0) result.push_back(static_cast<int>(i));
  }
  return result;
}

/// What was compared: pairs of a step and a head.
struct Tally {
  long compared = 0;
  long excused = 0;
  void expect_mostly_compared() const {
    EXPECT_GT(compared, 0);
    EXPECT_LE(excused, (compared + excused) / 20) << "near-ties hid too much";
  }
};

struct Replay {
  const NaiveTrace* trace;
  NaiveSettings settings;
  Settings cache_settings;
  ScalarType scalar = ScalarType::f32;
  double tolerance = 3e-5;
};

std::span<const float> token(const std::vector<float>& data, int tokens, int t) {
  const std::size_t row = data.size() / static_cast<std::size_t>(tokens);
  return std::span<const float>(data).subspan(static_cast<std::size_t>(t) * row, row);
}

CacheConfig config_of(const NaiveTrace& trace, const NaiveSettings& settings) {
  CacheConfig config;
  config.query_heads = static_cast<std::size_t>(trace.query_heads);
  config.kv_heads = static_cast<std::size_t>(trace.kv_heads);
  config.head_dim = static_cast<std::size_t>(trace.head_dim);
  config.page_size = static_cast<std::size_t>(settings.page_size);
  config.budget_tokens = static_cast<std::size_t>(settings.budget);
  config.read_budget_tokens = static_cast<std::size_t>(settings.read_budget.value_or(0));
  config.max_tokens = static_cast<std::size_t>(trace.tokens);
  return config;
}

/// Replays token by token and compares with the oracle.
void compare(const Replay& run, Tally& tally) {
  const NaiveTrace& trace = *run.trace;
  NaiveTrace stored = trace;
  if (run.scalar == ScalarType::f16) stored = store_as<kvsparse::Half>(trace);
  if (run.scalar == ScalarType::bf16) stored = store_as<kvsparse::Bfloat16>(trace);
  const NaiveResult expected = naive_replay(stored, run.settings);

  TestCache cache(run.settings.policy, run.scalar, config_of(trace, run.settings), run.cache_settings);
  const auto kv_heads = static_cast<std::size_t>(trace.kv_heads);
  const auto query_heads = static_cast<std::size_t>(trace.query_heads);
  const auto head_dim = static_cast<std::size_t>(trace.head_dim);
  std::vector<float> out(query_heads * head_dim);
  std::vector<float> lse(query_heads);
  std::vector<bool> was_near(kv_heads, false);
  std::vector<bool> excused(kv_heads, false);
  for (int t = 0; t < trace.tokens; ++t) {
    const auto k = token(trace.k, trace.tokens, t);
    const auto v = token(trace.v, trace.tokens, t);
    const kvsparse::Status appended = t < trace.prompt_tokens ? cache.append_prompt(k, v) : cache.append(k, v);
    ASSERT_TRUE(appended.ok()) << appended.message();
    const kvsparse::Status attended = cache.attend(token(trace.q, trace.tokens, t), out, lse);
    ASSERT_TRUE(attended.ok()) << attended.message();

    const NaiveStep& step = expected.steps[static_cast<std::size_t>(t)];
    for (std::size_t h = 0; h < kv_heads; ++h) {
      if (step.head_margin[h] < naive_near_tie) was_near[h] = true;
      const bool same = cache.resident(h) == positions(step.resident[h]) && cache.read(h) == positions(step.read[h]);
      if (!same && was_near[h]) excused[h] = true;
      if (excused[h]) {
        ++tally.excused;
        continue;
      }
      ASSERT_EQ(cache.resident(h), positions(step.resident[h])) << "resident at token " << t << ", kv head " << h;
      ASSERT_EQ(cache.read(h), positions(step.read[h])) << "read at token " << t << ", kv head " << h;
      ++tally.compared;
      const std::size_t group = query_heads / kv_heads;
      for (std::size_t q = h * group; q < (h + 1) * group; ++q) {
        ASSERT_NEAR(static_cast<double>(lse[q]), step.lse[q], run.tolerance * (1.0 + std::abs(step.lse[q])))
            << "token " << t << ", query head " << q;
        for (std::size_t i = q * head_dim; i < (q + 1) * head_dim; ++i) {
          ASSERT_NEAR(static_cast<double>(out[i]), step.out[i], run.tolerance) << "token " << t << ", output " << i;
        }
      }
    }
  }
}

std::vector<PolicyCase> policy_cases() {
  const auto pin = [](bool on) { return [=](NaiveSettings& s) { s.pin_prompt = on; }; };
  const auto quest_bound = [](NaiveSettings& s) { s.quest_bound = true; };
  return {
      {"Dense", "dense", {}},
      {"StreamingLlm", "streaming_llm", {}},
      {"StreamingLlmWithNineSinks", "streaming_llm", {{"sinks", "9"}}, [](NaiveSettings& s) { s.sinks = 9; }},
      {"StreamingLlmWithoutSinks", "streaming_llm", {{"sinks", "0"}}, [](NaiveSettings& s) { s.sinks = 0; }},
      {"StreamingLlmPinningThePrompt", "streaming_llm", {{"pin_prompt", "true"}}, pin(true)},
      {"H2o", "h2o", {}},
      {"H2oPinningThePrompt", "h2o", {{"pin_prompt", "true"}}, pin(true)},
      {"Quest", "quest", {}},
      {"Raas", "raas", {}},
      {"RaasWithoutPins", "raas", {{"pin_prompt", "false"}}, pin(false)},
      {"RaasAtAFifth", "raas", {{"alpha", "0.2"}}, [](NaiveSettings& s) { s.alpha = 0.2; }},
      {"RaasAtZero", "raas", {{"alpha", "0"}}, [](NaiveSettings& s) { s.alpha = 0.0; }},
      {"RaasByRank", "raas", {{"used", "rank"}}, [](NaiveSettings& s) { s.rank = true; }},
      {"RaasByRankOfAQuarter",
       "raas",
       {{"used", "rank"}, {"r", "0.25"}},
       [](NaiveSettings& s) {
         s.rank = true;
         s.r = 0.25;
       }},
      {"RaasByRankOfNone",
       "raas",
       {{"used", "rank"}, {"r", "0"}},
       [](NaiveSettings& s) {
         s.rank = true;
         s.r = 0.0;
       }},
      {"RaasByRankOfAllWithoutPins",
       "raas",
       {{"used", "rank"}, {"r", "1"}, {"pin_prompt", "false"}},
       [](NaiveSettings& s) {
         s.rank = true;
         s.r = 1.0;
         s.pin_prompt = false;
       }},
      {"RaasByBound", "raas", {{"evidence", "quest_bound"}}, quest_bound},
      {"RaasOfPaperV1",
       "raas",
       {{"preset", "paper_v1"}},
       [](NaiveSettings& s) {
         s.quest_bound = true;
         s.alpha = 1e-4;
       }},
      {"RaasOfPaperV2",
       "raas",
       {{"preset", "paper_v2"}},
       [](NaiveSettings& s) {
         s.quest_bound = true;
         s.rank = true;
       }},
      {"Kindred", "kindred", {}},
      {"KindredWithoutPins", "kindred", {{"pin_prompt", "false"}}, pin(false)},
      {"KindredOfYoungMilestones", "kindred", {{"window", "2"}}, [](NaiveSettings& s) { s.window = 2; }},
      {"KindredOfMuchPatienceAndNoCaution",
       "kindred",
       {{"window", "3"}, {"caution", "0"}, {"patience", "1000"}, {"alpha", "0.05"}, {"pin_prompt", "false"}},
       [](NaiveSettings& s) {
         s.window = 3;
         s.caution = 0;
         s.patience = 1000;
         s.alpha = 0.05;
         s.pin_prompt = false;
       }},
      {"Random", "random", {}},
      {"RandomOfSeedSevenWithoutPins", "random", {{"pin_prompt", "false"}, {"seed", "7"}}, pin(false), 7},
      {"RaasThenQuest", "raas+quest", {}},
      {"RaasOfPaperV2ThenQuest",
       "raas+quest",
       {{"preset", "paper_v2"}},
       [](NaiveSettings& s) {
         s.quest_bound = true;
         s.rank = true;
       }},
      {"RaasByRankThenQuest", "raas+quest", {{"used", "rank"}}, [](NaiveSettings& s) { s.rank = true; }},
      {"RaasByBoundThenQuest", "raas+quest", {{"evidence", "quest_bound"}}, quest_bound},
      {"KindredThenQuest", "kindred+quest", {{"window", "4"}}, [](NaiveSettings& s) { s.window = 4; }},
      {"H2oThenQuest", "h2o+quest", {}},
      {"H2oPinningThePromptThenQuest", "h2o+quest", {{"pin_prompt", "true"}}, pin(true)},
      {"StreamingLlmThenQuest", "streaming_llm+quest", {}},
      {"RandomThenQuest", "random+quest", {}},
  };
}

bool pins_prompt(const NaiveSettings& settings) {
  const std::string evictor = settings.policy.substr(0, settings.policy.find('+'));
  return settings.pin_prompt.value_or(evictor == "raas" || evictor == "kindred" || evictor == "random");
}

bool pins_prompt(const PolicyCase& policy) {
  NaiveSettings settings;
  settings.policy = policy.policy;
  policy.oracle_settings(settings);
  return pins_prompt(settings);
}

class PolicyOracle : public testing::TestWithParam<PolicyCase> {
 protected:
  /// The smallest budget in pages that the settings allow.
  static int pinned_pages(const NaiveTrace& trace, const NaiveSettings& settings) {
    const std::string evictor = settings.policy.substr(0, settings.policy.find('+'));
    const int prompt = pins_prompt(settings) ? naive::pages_for(trace.prompt_tokens, settings.page_size) : 0;
    const int sinks = evictor == "streaming_llm" ? naive::pages_for(settings.sinks, settings.page_size) : 0;
    return std::max(prompt, sinks);
  }
  /// Settings for a budget of `spare` pages beyond the pinned ones, reading `read` pages of them.
  Replay replay_of(const NaiveTrace& trace, int page_size, int spare, int read) const {
    Replay run{&trace, {}, GetParam().settings};
    run.settings.policy = GetParam().policy;
    run.settings.page_size = page_size;
    GetParam().oracle_settings(run.settings);
    run.settings.random_choice = random_choice(GetParam().seed);
    const int pages = pinned_pages(trace, run.settings) + spare;
    run.settings.budget = pages * page_size + page_size / 2;  // whole pages count, rounded down
    if (run.settings.policy.find("quest") != std::string::npos) {
      run.settings.read_budget = std::min(read, pages) * page_size;
    }
    return run;
  }
};

constexpr int page_sizes[] = {1, 3, 7, 16};

/// Enough tokens for some evictions at every page size, a prompt of some pages that does or does not fill the last.
TraceShape shape_of(int page_size, int round) {
  constexpr int groups[] = {1, 2, 4, 8};
  constexpr int head_dims[] = {8, 40, 64, 80, 128};
  const int group = groups[round % 4];
  TraceShape shape;
  shape.kv_heads = group == 8 ? 1 : 2;
  shape.query_heads = group * shape.kv_heads;
  shape.head_dim = head_dims[round % 5];
  shape.tokens = 32 + 7 * page_size + round % 3;
  const int prompts[] = {2 * page_size, page_size + 1, 0, 2 * page_size - 1};
  shape.prompt_tokens = prompts[(round / 2) % 4];
  return shape;
}

TEST_P(PolicyOracle, DecidesAsTheOracleOnRandomTraces) {
  Tally tally;
  int round = 0;
  for (const int page_size : page_sizes) {
    for (const int spare : {1, 3, 6}) {
      const NaiveTrace trace = gaussian_trace(shape_of(page_size, round), static_cast<std::uint64_t>(round), 2.0);
      SCOPED_TRACE("page size " + std::to_string(page_size) + ", spare pages " + std::to_string(spare));
      // Reading the open page alone, all accumulated masses (H2O) are 1 a query, and rounding alone orders them.
      const int least_read = GetParam().policy == "h2o+quest" ? 2 : 1;
      compare(replay_of(trace, page_size, spare, least_read + round % 4), tally);
      if (HasFatalFailure()) return;
      ++round;
    }
  }
  tally.expect_mostly_compared();
}

TEST_P(PolicyOracle, DecidesAsTheOracleOnMilestonesInEveryStorageType) {
  Tally tally;
  int round = 7;
  for (const int page_size : page_sizes) {
    for (const ScalarType scalar : scalar_types) {
      TraceShape shape = shape_of(page_size, round);
      shape.tokens += 20;
      const NaiveTrace trace = milestone_trace(shape, static_cast<std::uint64_t>(round));
      SCOPED_TRACE("page size " + std::to_string(page_size) + ", " + std::string(name_of(scalar)));
      Replay run = replay_of(trace, page_size, 4, 2 + round % 3);
      run.scalar = scalar;
      run.tolerance = 1e-4;
      compare(run, tally);
      if (HasFatalFailure()) return;
      ++round;
    }
  }
  tally.expect_mostly_compared();
}

TEST_P(PolicyOracle, BreaksExactTiesAsTheOracle) {
  Tally tally;
  int round = 3;
  for (const int page_size : page_sizes) {
    // Equal pages under equal queries: sums over different queries (H2O) are then the luck of rounding at pages of
    // several tokens, so there the same keys meet other queries.
    for (const bool constant_queries : {true, false}) {
      TraceShape shape = shape_of(page_size, round);
      shape.head_dim = std::min(shape.head_dim, 64);
      TieOptions options;
      options.key_period = 3 * page_size;
      options.constant_queries = constant_queries && GetParam().policy.find("h2o") == std::string::npos;
      const NaiveTrace trace = tie_trace(shape, static_cast<std::uint64_t>(round), options);
      SCOPED_TRACE("page size " + std::to_string(page_size) + (constant_queries ? ", constant queries" : ""));
      compare(replay_of(trace, page_size, 5, 3), tally);
      if (HasFatalFailure()) return;
      ++round;
    }
  }
  EXPECT_GT(tally.compared, 4 * tally.excused);
}

class UnpinnedPrompts : public PolicyOracle {};

TEST_P(UnpinnedPrompts, OverflowTheBudgetAndAreEvictedAsTheOracleSays) {
  Tally tally;
  int round = 1;
  for (const int page_size : page_sizes) {
    TraceShape shape = shape_of(page_size, round);
    shape.prompt_tokens = 6 * page_size + 2;
    const NaiveTrace trace = gaussian_trace(shape, static_cast<std::uint64_t>(round), 2.5);
    const Replay run = replay_of(trace, page_size, 4, 2);
    SCOPED_TRACE("page size " + std::to_string(page_size));
    compare(run, tally);
    if (HasFatalFailure()) return;
    ++round;
  }
  tally.expect_mostly_compared();
}

std::vector<PolicyCase> unpinned_cases() {
  std::vector<PolicyCase> cases;
  for (const PolicyCase& policy : policy_cases()) {
    if (!pins_prompt(policy)) cases.push_back(policy);
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(All, UnpinnedPrompts, testing::ValuesIn(unpinned_cases()),
                         [](const auto& instance) { return instance.param.title; });
INSTANTIATE_TEST_SUITE_P(All, PolicyOracle, testing::ValuesIn(policy_cases()),
                         [](const auto& instance) { return instance.param.title; });

TEST(PolicyOracleLongTraces, RaasFollowsTheOracleThroughManyEvictions) {
  Tally tally;
  const NaiveTrace trace = milestone_trace({500, 4, 2, 40, 20}, 11);
  for (const char* policy : {"raas", "h2o", "raas+quest"}) {
    Replay run{&trace, {}, {}};
    run.settings.policy = policy;
    run.settings.page_size = 4;
    run.settings.budget = 80;
    run.settings.read_budget = 40;
    run.tolerance = 1e-4;
    SCOPED_TRACE(policy);
    compare(run, tally);
    if (HasFatalFailure()) return;
  }
  tally.expect_mostly_compared();
}

TEST(PolicyOracleLongTraces, KindredFollowsTheOracleWhereMilestonesLookAlikeAndWhereTheyDoNot) {
  Tally tally;
  std::uint64_t seed = 20;
  for (const int page_size : {1, 2, 4, 7}) {
    for (const int head_dim : {24, 300}) {
      const TraceShape shape{400, 2, 1, head_dim, 20};
      for (const NaiveTrace& trace : {look_alike_trace(shape, seed), milestone_trace(shape, seed)}) {
        for (const ScalarType scalar : {ScalarType::f32, ScalarType::bf16}) {
          for (const char* caution : {"0", "0.5"}) {
            SCOPED_TRACE("page size " + std::to_string(page_size) + ", head_dim " + std::to_string(head_dim));
            Replay run{&trace, {}, {{"window", "12"}, {"caution", caution}}, scalar, 1e-4};
            run.settings.policy = "kindred";
            run.settings.page_size = page_size;
            run.settings.budget = 80;
            run.settings.window = 12;
            run.settings.caution = std::stod(caution);
            compare(run, tally);
            if (HasFatalFailure()) return;
          }
        }
      }
      ++seed;
    }
  }
  tally.expect_mostly_compared();
}

TEST(PolicyOracleLongTraces, LogitsInTheThousandsStayFiniteAndDecideAlike) {
  Tally tally;
  const NaiveTrace trace = huge_norm_trace({120, 4, 2, 40, 10}, 5);
  for (const char* policy : {"raas", "kindred", "h2o", "quest", "raas+quest", "streaming_llm"}) {
    Replay run{&trace, {}, {}};
    run.settings.policy = policy;
    run.settings.page_size = 3;
    run.settings.budget = 36;
    run.settings.read_budget = 18;
    run.tolerance = 0.05;  // a float logit of 5000 is known to 5e-4
    SCOPED_TRACE(policy);
    compare(run, tally);
    if (HasFatalFailure()) return;
  }
  EXPECT_GT(tally.compared, 4 * tally.excused);
}

/// Feeding a prompt in chunks, its queries through attend_prompt, must come to the same as token by token whenever no
/// page is evicted inside the prompt: to the bit in all that follows it, and up to the rounding of sums within it.
TEST(Prompts, InChunksThroughAttendPromptDecideAsTokenByToken) {
  for (const char* policy :
       {"raas", "kindred", "h2o", "h2o+quest", "raas+quest", "streaming_llm", "random", "quest", "dense"}) {
    SCOPED_TRACE(policy);
    const NaiveTrace trace = milestone_trace({120, 4, 2, 40, 23}, 4);
    NaiveSettings settings;
    settings.policy = policy;
    settings.page_size = 4;
    settings.budget = 40;
    settings.read_budget = 12;
    const CacheConfig config = config_of(trace, settings);
    TestCache whole(policy, ScalarType::f32, config);
    TestCache single(policy, ScalarType::f32, config);
    std::vector<float> chunk_out(23 * 4 * 40);
    std::vector<float> single_out(4 * 40);
    const auto rows = [&](const std::vector<float>& data, std::size_t heads, std::size_t first, std::size_t count) {
      return kvsparse::TokenRows<const float>(data.data() + first * heads * 40, count, heads, 40);
    };
    for (const auto& [first, count] : {std::pair<std::size_t, std::size_t>{0, 9}, {9, 1}, {10, 13}}) {
      ASSERT_TRUE(whole.append_prompt(rows(trace.k, 2, first, count), rows(trace.v, 2, first, count)).ok());
      const kvsparse::TokenRows<float> out(chunk_out.data() + first * 160, count, 4, 40);
      ASSERT_TRUE(whole.attend_prompt(rows(trace.q, 4, first, count), out).ok());
    }
    for (int t = 0; t < trace.tokens; ++t) {
      const auto k = token(trace.k, trace.tokens, t);
      const auto v = token(trace.v, trace.tokens, t);
      const auto q = token(trace.q, trace.tokens, t);
      if (t < 23) {
        ASSERT_TRUE(single.append_prompt(k, v).ok());
        ASSERT_TRUE(single.attend(q, single_out).ok());
        for (std::size_t i = 0; i < 160; ++i) {
          ASSERT_NEAR(single_out[i], chunk_out[static_cast<std::size_t>(t) * 160 + i], 1e-6F) << "prompt token " << t;
        }
        continue;
      }
      std::vector<float> whole_out(160);
      ASSERT_TRUE(single.append(k, v).ok());
      ASSERT_TRUE(single.attend(q, single_out).ok());
      ASSERT_TRUE(whole.append(k, v).ok());
      ASSERT_TRUE(whole.attend(q, whole_out).ok());
      ASSERT_EQ(single_out, whole_out) << "token " << t;
      for (std::size_t h = 0; h < 2; ++h) ASSERT_EQ(single.resident(h), whole.resident(h)) << "token " << t;
    }
  }
}

/// Quest's other pooling: each query head reads the pages of its own best bounds.
TEST(QuestByQueryHead, EveryQueryHeadReadsWhatQuestWouldReadForItAlone) {
  const int group = 3;
  const NaiveTrace trace = gaussian_trace({90, group, 1, 24, 10}, 6);
  NaiveSettings settings;
  settings.policy = "quest";
  settings.page_size = 4;
  settings.budget = 20;
  TestCache cache("quest", ScalarType::f32, config_of(trace, settings), {{"pool", "query_head"}});
  std::vector<NaiveResult> alone;
  for (int q = 0; q < group; ++q) {
    NaiveTrace one = trace;
    one.query_heads = 1;
    one.q.clear();
    for (int t = 0; t < trace.tokens; ++t) {
      const auto row = token(trace.q, trace.tokens, t).subspan(static_cast<std::size_t>(q) * 24, 24);
      one.q.insert(one.q.end(), row.begin(), row.end());
    }
    alone.push_back(naive_replay(one, settings));
  }
  std::vector<float> out(group * 24);
  std::vector<float> lse(group);
  for (int t = 0; t < trace.tokens; ++t) {
    ASSERT_TRUE(cache.append(token(trace.k, trace.tokens, t), token(trace.v, trace.tokens, t)).ok());
    ASSERT_TRUE(cache.attend(token(trace.q, trace.tokens, t), out, lse).ok());
    std::vector<char> read(static_cast<std::size_t>(trace.tokens), 0);
    for (std::size_t q = 0; q < group; ++q) {
      const NaiveStep& step = alone[q].steps[static_cast<std::size_t>(t)];
      for (std::size_t p = 0; p < read.size(); ++p) read[p] = static_cast<char>(read[p] | step.read[0][p]);
      ASSERT_NEAR(static_cast<double>(lse[q]), step.lse[0], 1e-5) << "token " << t;
      for (std::size_t i = 0; i < 24; ++i) {
        ASSERT_NEAR(static_cast<double>(out[q * 24 + i]), step.out[i], 3e-5) << "token " << t;
      }
    }
    ASSERT_EQ(cache.read(0), positions(read)) << "token " << t;
  }
}

/// The exact top-k selector: per query head the tokens of the largest logits, the oldest first among equals.
TEST(ExactTopK, ReadsTheTokensOfTheLargestLogits) {
  const NaiveTrace trace = gaussian_trace({80, 4, 2, 24, 9}, 8);
  NaiveSettings settings;
  settings.policy = "dense";
  settings.page_size = 4;
  settings.budget = 12;
  TestCache cache("oracle", ScalarType::f32, config_of(trace, settings));
  std::vector<float> out(4 * 24);
  std::vector<float> lse(4);
  for (int t = 0; t < trace.tokens; ++t) {
    ASSERT_TRUE(cache.append(token(trace.k, trace.tokens, t), token(trace.v, trace.tokens, t)).ok());
    ASSERT_TRUE(cache.attend(token(trace.q, trace.tokens, t), out, lse).ok());
    for (int h = 0; h < 2; ++h) {
      std::vector<char> read(static_cast<std::size_t>(trace.tokens), 0);
      for (int q = 2 * h; q < 2 * h + 2; ++q) {
        std::vector<int> all(static_cast<std::size_t>(t) + 1);
        std::iota(all.begin(), all.end(), 0);
        const auto weights = naive::attention(trace, trace.k, trace.v, t, h, q, all).weights;
        std::vector<int> best = all;
        std::stable_sort(best.begin(), best.end(), [&](int a, int b) {
          return weights[static_cast<std::size_t>(a)] > weights[static_cast<std::size_t>(b)];
        });
        // While no more than the budget's three pages are resident, all of them are read.
        if (t >= 12) best.resize(12);
        std::sort(best.begin(), best.end());
        for (const int position : best) read[static_cast<std::size_t>(position)] = 1;
        const auto exact = naive::attention(trace, trace.k, trace.v, t, h, q, best);
        ASSERT_NEAR(static_cast<double>(lse[static_cast<std::size_t>(q)]), exact.lse, 1e-5) << "token " << t;
        for (std::size_t i = 0; i < 24; ++i) {
          ASSERT_NEAR(static_cast<double>(out[static_cast<std::size_t>(q) * 24 + i]), exact.out[i], 3e-5);
        }
      }
      ASSERT_EQ(cache.read(static_cast<std::size_t>(h)), positions(read)) << "token " << t;
    }
  }
}

TEST(ExactTopK, TiesGoToTheOldestToken) {
  TieOptions options;
  options.zero_keys = true;
  const NaiveTrace trace = tie_trace({40, 1, 1, 8, 0}, 1, options);
  NaiveSettings settings;
  settings.page_size = 4;
  settings.budget = 8;
  TestCache cache("oracle", ScalarType::f32, config_of(trace, settings));
  std::vector<float> out(8);
  for (int t = 0; t < trace.tokens; ++t) {
    ASSERT_TRUE(cache.append(token(trace.k, trace.tokens, t), token(trace.v, trace.tokens, t)).ok());
    ASSERT_TRUE(cache.attend(token(trace.q, trace.tokens, t), out).ok());
  }
  EXPECT_EQ(cache.read(0), (std::vector<int>{0, 1, 2, 3, 4, 5, 6, 7}));
}

}  // namespace
}  // namespace kvsparse_test
