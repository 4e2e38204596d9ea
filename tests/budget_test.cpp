// SPDX-License-Identifier: Apache-2.0
//
// The container's word: what it holds never exceeds the budget, what it refuses changes nothing, and clear, copy and
// move give a cache that behaves as one would expect.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "kvsparse/cache/attend.hpp"
#include "kvsparse/policy/compose.hpp"
#include "kvsparse/policy/name_table.hpp"
#include "kvsparse/policy/quest.hpp"
#include "kvsparse/policy/raas.hpp"
#include "support/rows.hpp"
#include "support/test_cache.hpp"

namespace kvsparse_test {
namespace {

using kvsparse::CacheConfig;
using kvsparse::CacheStats;
using kvsparse::ConfigError;
using kvsparse::HeadRows;
using kvsparse::PromptOverflow;
using kvsparse::ScalarType;
using kvsparse::Status;
using kvsparse::TokenRows;
using Code = kvsparse::Status::Code;

std::string title_of(std::string name) {
  for (char& c : name) c = c == '+' ? '_' : c;
  return name;
}

std::vector<std::string> evictors() {
  std::vector<std::string> result;
  for (const std::string& name : policy_names()) {
    if (policy_evicts(name)) result.push_back(name);
  }
  return result;
}

bool has_prefix(const std::string& text, const std::string& prefix) { return text.rfind(prefix, 0) == 0; }

CacheConfig config_of(std::size_t page_size, std::size_t pages) {
  CacheConfig config;
  config.query_heads = 4;
  config.kv_heads = 2;
  config.head_dim = 12;
  config.page_size = page_size;
  config.budget_tokens = page_size * pages;
  config.read_budget_tokens = page_size * std::max<std::size_t>(1, pages / 2);
  config.max_tokens = 1000;
  return config;
}

/// Feeds tokens of `rows` to a cache, one at a time, each followed by its query.
class Feeder {
 public:
  Feeder(TestCache& cache, const Rows& rows) : cache_(cache), rows_(rows) {}

  Status append(bool prompt) {
    const std::size_t t = cache_.length();
    return prompt ? cache_.append_prompt(rows_.token_k(t), rows_.token_v(t))
                  : cache_.append(rows_.token_k(t), rows_.token_v(t));
  }
  /// The outputs of the newest token's query.
  std::vector<float> attend() {
    std::vector<float> out(rows_.query_heads * rows_.head_dim);
    EXPECT_TRUE(cache_.attend(rows_.token_q(cache_.length() - 1), out).ok());
    return out;
  }
  Status append_prompt(std::size_t tokens) {
    const std::size_t first = cache_.length();
    const std::size_t row = rows_.kv_heads * rows_.head_dim;
    return cache_.append_prompt(std::span<const float>(rows_.k).subspan(first * row, tokens * row),
                                std::span<const float>(rows_.v).subspan(first * row, tokens * row));
  }
  /// All outputs of the tokens up to `end`, the first `prompt` of them as a prompt.
  std::vector<float> run(std::size_t end, std::size_t prompt = 0) {
    std::vector<float> outputs;
    while (cache_.length() < end) {
      EXPECT_TRUE(append(cache_.length() < prompt).ok());
      const std::vector<float> out = attend();
      outputs.insert(outputs.end(), out.begin(), out.end());
    }
    return outputs;
  }

 private:
  TestCache& cache_;
  const Rows& rows_;
};

std::vector<int> range(int first, int last) {
  std::vector<int> result;
  for (int i = first; i < last; ++i) result.push_back(i);
  return result;
}

void expect_includes(const std::vector<int>& positions, const std::vector<int>& part) {
  EXPECT_TRUE(std::includes(positions.begin(), positions.end(), part.begin(), part.end()))
      << testing::PrintToString(positions) << " lacks some of " << testing::PrintToString(part);
}

// -------------------------------------------------------------------------------------------------------- the
// invariant

class Budget : public testing::TestWithParam<std::string> {};

TEST_P(Budget, HoldsAfterEveryCallAndIsUsedInFull) {
  const std::string policy = GetParam();
  for (const std::size_t page_size : {1U, 3U, 7U, 16U}) {
    for (const std::size_t pages : {6U, 9U}) {
      for (const char* pin : {"default", "true", "false"}) {
        for (const std::size_t prompt : {std::size_t{0}, 2 * page_size, 2 * page_size + 1, 4 * page_size}) {
          SCOPED_TRACE("page size " + std::to_string(page_size) + ", pages " + std::to_string(pages) + ", pin_prompt " +
                       pin + ", prompt " + std::to_string(prompt));
          CacheConfig config = config_of(page_size, pages);
          const std::size_t cap = config.budget_tokens;
          config.budget_tokens += page_size - 1;  // no whole page
          const std::size_t end = cap + 3 * page_size + 10;
          const Rows rows(end, config, page_size + prompt);
          Settings settings;
          if (std::string(pin) != "default") settings.push_back({"pin_prompt", pin});
          TestCache cache(policy, ScalarType::f32, config, settings);
          Feeder feeder(cache, rows);
          const bool pins = std::string(pin) == "true" ||
                            (std::string(pin) == "default" &&
                             (has_prefix(policy, "raas") || has_prefix(policy, "kindred") ||
                              has_prefix(policy, "random") || policy == "lazy_eviction" || policy == "lrfu"));
          const std::size_t lag =
              aims_below_budget(policy) ? config.geometry().pages_for(small_lag) * page_size : std::size_t{0};
          const std::size_t sinks = has_prefix(policy, "streaming_llm") ? (4 + page_size - 1) / page_size : 0;
          const bool shares = kvsparse::policy_facts(policy).shares_budget;
          const auto check = [&] {
            const CacheStats stats = cache.stats();
            ASSERT_EQ(stats.tokens, cache.length());
            std::vector<std::size_t> held;
            for (std::size_t h = 0; h < 2; ++h) {
              const std::vector<int> resident = cache.resident(h);
              held.push_back(resident.size());
              ASSERT_EQ(resident.back(), static_cast<int>(cache.length()) - 1) << "the newest token is resident";
              ASSERT_TRUE(std::is_sorted(resident.begin(), resident.end()));
              const std::size_t pinned = std::max(sinks * page_size, pins ? prompt : 0);
              expect_includes(resident, range(0, static_cast<int>(std::min(pinned, cache.length()))));
            }
            if (shares) held = {(held[0] + held[1] + 1) / 2};
            for (const std::size_t tokens : held) {
              ASSERT_LE(tokens, cap);
              ASSERT_GE(tokens + page_size + lag, std::min(cap, cache.length()) + 1) << "the budget is not used";
            }
            ASSERT_EQ(stats.resident_tokens, *std::max_element(held.begin(), held.end()));
            ASSERT_LE(stats.peak_resident_tokens, cap);
            ASSERT_LE(stats.resident_bytes, stats.peak_resident_bytes);
          };
          while (cache.length() < end) {
            ASSERT_TRUE(feeder.append(cache.length() < prompt).ok());
            check();
            if (HasFatalFailure() || HasNonfatalFailure()) return;
            static_cast<void>(feeder.attend());
          }
          const CacheStats stats = cache.stats();
          EXPECT_LE(stats.peak_resident_tokens, cap);
          EXPECT_GE(stats.peak_resident_tokens + lag, cap);
          EXPECT_EQ(stats.evicted_tokens, 2 * end - cache.resident(0).size() - cache.resident(1).size());
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Evictors, Budget, testing::ValuesIn(evictors()),
                         [](const auto& instance) { return title_of(instance.param); });

TEST(BudgetOfLongPrompts, EvictorsThatDoNotPinEvictInsideTheChunk) {
  for (const char* policy : {"h2o", "streaming_llm", "h2o+quest"}) {
    const CacheConfig config = config_of(4, 5);
    const Rows rows(60, config, 1);
    TestCache cache(policy, ScalarType::f32, config);
    Feeder feeder(cache, rows);
    ASSERT_TRUE(feeder.append_prompt(50).ok()) << policy;
    EXPECT_LE(cache.resident(0).size(), 20U);
    EXPECT_EQ(cache.resident(0).back(), 49);
    EXPECT_EQ(cache.stats().peak_resident_tokens, 20U);
  }
}

// ---------------------------------------------------------------------------------------------------- prompt overflow

TEST(PromptOverflows, ErrorRefusesTheChunkAndChangesNothing) {
  for (const char* policy : {"raas", "kindred", "random", "raas+quest"}) {
    SCOPED_TRACE(policy);
    const CacheConfig config = config_of(4, 5);
    const Rows rows(60, config, 2);
    TestCache cache(policy, ScalarType::f32, config);
    TestCache twin(policy, ScalarType::f32, config);
    Feeder feeder(cache, rows);
    Feeder twin_feeder(twin, rows);
    ASSERT_TRUE(feeder.append_prompt(6).ok());
    ASSERT_TRUE(twin_feeder.append_prompt(6).ok());
    const Status refused = feeder.append_prompt(11);
    EXPECT_EQ(refused.code(), Code::prompt_exceeds_budget);
    EXPECT_EQ(refused.message(),
              "the prompt would pin 5 pages, but the budget of 5 pages must leave one page for decoding; raise "
              "budget_tokens, unpin the prompt, or choose PromptOverflow::grow or unpin_middle");
    EXPECT_EQ(cache.length(), 6U);
    EXPECT_EQ(cache.resident(0), twin.resident(0));
    // Ten more fill the fourth page: as much as fits.
    ASSERT_TRUE(feeder.append_prompt(10).ok());
    ASSERT_TRUE(twin_feeder.append_prompt(10).ok());
    EXPECT_FALSE(feeder.append_prompt(1).ok());
    EXPECT_EQ(feeder.run(60), twin_feeder.run(60));
    expect_includes(cache.resident(1), range(0, 16));
  }
}

TEST(PromptOverflows, GrowTakesThePromptPlusRoomToDecode) {
  CacheConfig config = config_of(4, 5);
  config.prompt_overflow = PromptOverflow::grow;
  config.max_prompt_tokens = 40;
  config.min_decode_tokens = 7;  // two pages
  const Rows rows(150, config, 3);
  TestCache cache("raas", ScalarType::f32, config);
  Feeder feeder(cache, rows);
  ASSERT_TRUE(feeder.append_prompt(30).ok());
  ASSERT_TRUE(feeder.append_prompt(3).ok());
  const Status refused = feeder.append_prompt(8);
  EXPECT_EQ(refused.code(), Code::prompt_exceeds_budget) << "41 tokens are 11 pages; there is room for 10";
  EXPECT_EQ(refused.value(), 11U);
  EXPECT_EQ(cache.length(), 33U);
  while (cache.length() < 150) {
    ASSERT_TRUE(feeder.append(false).ok());
    static_cast<void>(feeder.attend());
    ASSERT_LE(cache.resident(0).size(), (9U + 2U) * 4U) << "prompt pages plus min_decode";
    expect_includes(cache.resident(0), range(0, 33));
  }
  EXPECT_EQ(cache.stats().peak_resident_tokens, (9U + 2U) * 4U);
}

TEST(PromptOverflows, GrowKeepsTheBudgetWhenThePromptFits) {
  CacheConfig config = config_of(4, 5);
  config.prompt_overflow = PromptOverflow::grow;
  config.max_prompt_tokens = 40;
  const Rows rows(150, config, 4);
  TestCache cache("raas", ScalarType::f32, config);
  Feeder feeder(cache, rows);
  for (int round = 0; round < 2; ++round) {
    ASSERT_TRUE(feeder.append_prompt(8).ok());
    static_cast<void>(feeder.run(100));
    EXPECT_EQ(cache.stats().peak_resident_tokens, 20U);
    // A long prompt's larger cap is gone with it.
    cache.clear();
    ASSERT_TRUE(feeder.append_prompt(40).ok());
    static_cast<void>(feeder.run(100));
    EXPECT_EQ(cache.stats().peak_resident_tokens, 44U);
    cache.clear();
  }
}

TEST(PromptOverflows, GrowDoesNotConcernAnEvictorThatDoesNotPin) {
  CacheConfig config = config_of(4, 5);
  config.prompt_overflow = PromptOverflow::grow;
  config.max_prompt_tokens = 40;
  const Rows rows(100, config, 5);
  TestCache cache("h2o", ScalarType::f32, config);
  Feeder feeder(cache, rows);
  ASSERT_TRUE(feeder.append_prompt(40).ok());
  static_cast<void>(feeder.run(100));
  EXPECT_EQ(cache.stats().peak_resident_tokens, 20U);
}

TEST(PromptOverflows, UnpinMiddleGivesUpThePromptFromTheMiddleOutwards) {
  CacheConfig config = config_of(2, 6);
  config.prompt_overflow = PromptOverflow::unpin_middle;
  config.min_decode_tokens = 4;  // two pages
  const Rows rows(60, config, 6);
  TestCache cache("streaming_llm", ScalarType::f32, config, {{"pin_prompt", "true"}, {"sinks", "0"}});
  Feeder feeder(cache, rows);
  ASSERT_TRUE(feeder.append_prompt(20).ok());
  EXPECT_EQ(cache.stats().peak_resident_tokens, 12U);
  EXPECT_EQ(cache.resident(0), (std::vector<int>{0, 1, 2, 3, 4, 5, 14, 15, 16, 17, 18, 19}));
  static_cast<void>(feeder.run(60));
  EXPECT_EQ(cache.resident(0), (std::vector<int>{0, 1, 2, 3, 16, 17, 18, 19, 56, 57, 58, 59}));
}

TEST(PromptOverflows, UnpinMiddleKeepsTheFirstPageToTheLastAndTheBudgetAlways) {
  for (const char* policy : {"raas", "kindred", "random", "raas+quest"}) {
    CacheConfig config = config_of(4, 2);
    config.read_budget_tokens = 4;
    config.prompt_overflow = PromptOverflow::unpin_middle;
    const Rows rows(60, config, 7);
    TestCache cache(policy, ScalarType::f32, config);
    Feeder feeder(cache, rows);
    while (cache.length() < 60) {
      ASSERT_TRUE(feeder.append(cache.length() < 30).ok());
      ASSERT_LE(cache.resident(0).size(), 8U);
      expect_includes(cache.resident(0), range(0, std::min(4, static_cast<int>(cache.length()))));
      static_cast<void>(feeder.attend());
    }
  }
}

TEST(PromptOverflows, UnpinMiddleLeavesSinksAlone) {
  CacheConfig config = config_of(2, 5);
  config.prompt_overflow = PromptOverflow::unpin_middle;
  config.min_decode_tokens = 6;
  const Rows rows(50, config, 8);
  TestCache cache("streaming_llm", ScalarType::f32, config, {{"pin_prompt", "true"}, {"sinks", "4"}});
  Feeder feeder(cache, rows);
  ASSERT_TRUE(feeder.append_prompt(30).ok());
  expect_includes(cache.resident(0), range(0, 4));
  static_cast<void>(feeder.run(50));
  EXPECT_EQ(cache.resident(0), (std::vector<int>{0, 1, 2, 3, 44, 45, 46, 47, 48, 49}));
}

// ------------------------------------------------------------------------------------------------------ configurations

std::string refusal(const std::string& policy, const CacheConfig& config, const Settings& settings = {}) {
  try {
    const TestCache cache(policy, ScalarType::f32, config, settings);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "not refused";
}

struct BadConfig {
  std::string policy;
  std::size_t CacheConfig::*member;
  std::size_t value;
  std::string sentence;
};

TEST(Configuration, EveryBadNumberIsRefusedWithTheValueAndTheLimit) {
  const BadConfig cases[] = {
      {"dense", &CacheConfig::head_dim, 0, "head_dim is 0; it must be at least 1"},
      {"dense", &CacheConfig::query_heads, 0, "query_heads is 0; it must be at least 1"},
      {"dense", &CacheConfig::kv_heads, 0, "kv_heads is 0; it must be at least 1"},
      {"dense", &CacheConfig::kv_heads, 3, "kv_heads = 3 does not divide query_heads = 4"},
      {"dense", &CacheConfig::kv_heads, 8, "kv_heads = 8 does not divide query_heads = 4"},
      {"dense", &CacheConfig::page_size, 0, "page_size = 0 is not in 1 .. 256"},
      {"dense", &CacheConfig::page_size, 257, "page_size = 257 is not in 1 .. 256"},
      {"dense", &CacheConfig::max_tokens, 0,
       "max_tokens is 0; policy dense keeps every token and needs to know how many to make room for"},
      {"quest", &CacheConfig::max_tokens, 0,
       "max_tokens is 0; policy quest keeps every token and needs to know how many to make room for"},
      {"dense", &CacheConfig::max_tokens, ~std::size_t{0}, "a configured size of 18446744073709551615 exceeds 2^40"},
      {"dense", &CacheConfig::max_tokens, std::size_t{1} << 36,
       "17179869184 pages for each of 2 kv heads exceed the limit of 2^31 - 1"},
      {"raas", &CacheConfig::budget_tokens, 0,
       "budget_tokens = 0 holds no page of 4 tokens; policy raas needs at least one page"},
      {"raas", &CacheConfig::budget_tokens, 3,
       "budget_tokens = 3 holds no page of 4 tokens; policy raas needs at least one page"},
      {"streaming_llm", &CacheConfig::budget_tokens, 7,
       "the budget of 1 pages is smaller than the 1 pages that policy streaming_llm pins plus 1 to decode in"},
      {"raas", &CacheConfig::min_decode_tokens, 24,
       "the budget of 5 pages is smaller than the 0 pages that policy raas pins plus 6 to decode in"},
      {"quest", &CacheConfig::read_budget_tokens, 3,
       "read_budget_tokens = 3 holds no page of 4 tokens; policy quest reads at least one page"},
      {"raas+quest", &CacheConfig::read_budget_tokens, 3,
       "read_budget_tokens = 3 holds no page of 4 tokens; policy raas+quest reads at least one page"},
  };
  for (const BadConfig& bad : cases) {
    CacheConfig config = config_of(4, 5);
    config.*bad.member = bad.value;
    EXPECT_EQ(refusal(bad.policy, config), bad.sentence);
  }
}

TEST(Configuration, PagesBeyondWhatCanBeCountedAreRefused) {
  CacheConfig config = config_of(1, 5);
  config.query_heads = config.kv_heads = std::size_t{1} << 20;
  for (const std::size_t pages : {std::size_t{1} << 11, std::size_t{1} << 24, std::size_t{1} << 40}) {
    config.budget_tokens = config.max_tokens = pages;
    for (const std::string policy : {"dense", "raas", "ada_kv", "quest"}) {
      EXPECT_EQ(refusal(policy, config),
                std::to_string(pages) + " pages for each of 1048576 kv heads exceed the limit of 2^31 - 1")
          << policy;
    }
  }
}

TEST(Configuration, GrowWithoutAPromptLimitIsRefused) {
  CacheConfig config = config_of(4, 5);
  config.prompt_overflow = PromptOverflow::grow;
  EXPECT_EQ(refusal("raas", config), "PromptOverflow::grow needs max_prompt_tokens; it is 0");
}

TEST(Configuration, ScalesMustBeFinite) {
  CacheConfig config = config_of(4, 5);
  config.softmax_scale = std::numeric_limits<float>::infinity();
  EXPECT_EQ(refusal("dense", config), "softmax_scale = inf must be finite");
}

TEST(Configuration, SinksThatFillTheBudgetAreRefused) {
  EXPECT_EQ(refusal("streaming_llm", config_of(4, 5), {{"sinks", "17"}}),
            "the budget of 5 pages is smaller than the 5 pages that policy streaming_llm pins plus 1 to decode in");
  EXPECT_EQ(refusal("streaming_llm", config_of(4, 5), {{"sinks", "16"}}), "not refused");
}

TEST(Configuration, OptionsOutOfRangeOrUnknownAreRefused) {
  EXPECT_EQ(refusal("raas", config_of(4, 5), {{"alpha", "2"}}), "policy raas: alpha = 2.000000 is not in [0, 1]");
  EXPECT_EQ(refusal("raas", config_of(4, 5), {{"sinks", "2"}}),
            "policy raas has no option sinks; it has used, alpha, r, evidence, pin_prompt, preset");
  EXPECT_EQ(refusal("dense", config_of(4, 5), {{"sinks", "2"}}), "policy dense has no option sinks; it has none");
}

TEST(Configuration, OptionsOfACompositionsPartsAreCheckedToo) {
  EXPECT_NE(refusal("raas+quest", config_of(4, 5), {{"alpha", "2"}}).find("alpha = 2.000000 is not in [0, 1]"),
            std::string::npos)
      << refusal("raas+quest", config_of(4, 5), {{"alpha", "2"}});
}

TEST(Configuration, AnUnknownPolicyIsRefusedWithTheKnownNames) {
  const std::string sentence = refusal("snail", config_of(4, 5));
  EXPECT_EQ(sentence.find("unknown policy snail; known are dense, streaming_llm, h2o, raas, kindred, tova"), 0U)
      << sentence;
  EXPECT_NE(sentence.find("raas+quest"), std::string::npos);
  EXPECT_THROW(static_cast<void>(scalar_type("f64")), ConfigError);
  EXPECT_EQ(scalar_type("bf16"), ScalarType::bf16);
}

TEST(Configuration, PresetsAreAppliedBeforeOtherSettingsWhateverTheOrder) {
  const CacheConfig config = config_of(4, 5);
  EXPECT_EQ(refusal("raas", config, {{"alpha", "0.5"}, {"preset", "paper_v1"}}), "not refused");
  const Rows rows(100, config, 9);
  TestCache before("raas", ScalarType::f32, config, {{"alpha", "0.5"}, {"preset", "paper_v1"}});
  TestCache after("raas", ScalarType::f32, config, {{"preset", "paper_v1"}, {"alpha", "0.5"}});
  TestCache plain("raas", ScalarType::f32, config, {{"preset", "paper_v1"}});
  const std::vector<float> expected = Feeder(after, rows).run(100);
  EXPECT_EQ(Feeder(before, rows).run(100), expected);
  EXPECT_NE(Feeder(plain, rows).run(100), expected);
}

// ------------------------------------------------------------------------------------------------------------ refusals

TEST(Refusals, OfWrongShapesChangeNothing) {
  for (const std::string& policy : policy_names()) {
    SCOPED_TRACE(policy);
    const CacheConfig config = config_of(4, 5);
    const Rows rows(60, config, 10);
    TestCache cache(policy, ScalarType::f16, config);
    TestCache twin(policy, ScalarType::f16, config);
    std::vector<float> wide(1000, 1.0F), out(48, -7.0F);
    const std::span<const float> in(wide);
    const std::span<float> to(out);
    EXPECT_EQ(cache.attend(in.first(48), to).code(), Code::nothing_to_attend);
    EXPECT_EQ(cache.attend(in.first(48), to).message(), "a query came for 1 tokens, but 0 are in the cache");
    const auto refuse_all = [&] {
      const HeadRows<const float> good(wide.data(), 2, 12);
      const HeadRows<float> good_out(out.data(), 4, 12);
      EXPECT_EQ(cache.append(in.first(23), in.first(24)).code(), Code::wrong_size);
      EXPECT_EQ(cache.append(in.first(24), in.first(25)).code(), Code::wrong_size);
      EXPECT_EQ(cache.append(HeadRows<const float>(wide.data(), 3, 12), good).code(), Code::wrong_heads);
      EXPECT_EQ(cache.append(good, HeadRows<const float>(wide.data(), 2, 11)).code(), Code::wrong_head_dim);
      EXPECT_EQ(cache.attend(in.first(47), to).code(), Code::wrong_size);
      EXPECT_EQ(cache.attend(in.first(48), to.first(47)).code(), Code::wrong_size);
      EXPECT_EQ(cache.attend(HeadRows<const float>(wide.data(), 2, 12), good_out).code(), Code::wrong_heads);
      EXPECT_EQ(cache.attend(HeadRows<const float>(wide.data(), 4, 12), HeadRows<float>(out.data(), 4, 13)).code(),
                Code::wrong_head_dim);
      EXPECT_EQ(cache.attend(in.first(48), to, std::span<float>(wide).first(3)).code(), Code::wrong_size);
    };
    const auto refuse_prompt = [&] {
      const TokenRows<const float> two(wide.data(), 2, 2, 12);
      EXPECT_EQ(cache.append_prompt(two, TokenRows<const float>(wide.data(), 3, 2, 12)).code(), Code::wrong_tokens);
      EXPECT_EQ(cache.append_prompt(TokenRows<const float>(wide.data(), 2, 1, 12), two).code(), Code::wrong_heads);
      EXPECT_EQ(cache.append_prompt(two, TokenRows<const float>(wide.data(), 2, 2, 13)).code(), Code::wrong_head_dim);
      EXPECT_EQ(cache.append_prompt(in.first(25), in.first(25)).code(), Code::wrong_size);
      EXPECT_EQ(cache.append_prompt(in.first(24), in.first(48)).code(), Code::wrong_size);
    };
    refuse_prompt();
    ASSERT_TRUE(Feeder(cache, rows).append_prompt(3).ok());
    ASSERT_TRUE(Feeder(twin, rows).append_prompt(3).ok());
    refuse_prompt();
    refuse_all();
    const auto prompt_rows = [&](std::size_t tokens) { return TokenRows<const float>(wide.data(), tokens, 4, 12); };
    std::vector<float> many(4 * 48);
    EXPECT_EQ(cache.attend_prompt(prompt_rows(4), TokenRows<float>(many.data(), 4, 4, 12)).code(),
              Code::nothing_to_attend);
    EXPECT_EQ(cache.attend_prompt(prompt_rows(3), TokenRows<float>(many.data(), 2, 4, 12)).code(), Code::wrong_tokens);
    EXPECT_EQ(cache.attend_prompt(prompt_rows(3), TokenRows<float>(many.data(), 3, 3, 12)).code(), Code::wrong_heads);
    EXPECT_EQ(cache.length(), 3U);
    const std::vector<float> expected = Feeder(twin, rows).run(40);
    std::vector<float> outputs;
    while (cache.length() < 40) {
      const std::vector<float> output = Feeder(cache, rows).run(cache.length() + 1);
      outputs.insert(outputs.end(), output.begin(), output.end());
      refuse_all();
    }
    EXPECT_EQ(outputs, expected);
    EXPECT_EQ(cache.resident(1), twin.resident(1));
    const Status late = Feeder(cache, rows).append_prompt(1);
    EXPECT_EQ(late.code(), Code::prompt_ended);
    EXPECT_EQ(late.message(), "the prompt ended at position 3; append_prompt came at 40");
  }
}

TEST(Refusals, OfTheTokenBeyondMaxTokensChangeNothing) {
  for (const std::string& policy : policy_names()) {
    if (policy_evicts(policy)) continue;
    SCOPED_TRACE(policy);
    CacheConfig config = config_of(4, 3);
    config.max_tokens = 22;
    const Rows rows(40, config, 11);
    TestCache cache(policy, ScalarType::f32, config);
    Feeder feeder(cache, rows);
    EXPECT_EQ(feeder.append_prompt(23).message(), "token 23 would exceed max_tokens = 22");
    EXPECT_EQ(cache.length(), 0U);
    ASSERT_TRUE(feeder.append_prompt(5).ok());
    EXPECT_FALSE(feeder.append_prompt(18).ok());
    static_cast<void>(feeder.run(22));
    const std::vector<float> before = feeder.attend();
    const Status refused = feeder.append(false);
    EXPECT_EQ(refused.code(), Code::max_tokens_reached);
    EXPECT_EQ(refused.message(), "token 23 would exceed max_tokens = 22");
    EXPECT_EQ(cache.length(), 22U);
    EXPECT_EQ(cache.resident(0), range(0, 22));
    EXPECT_EQ(feeder.attend(), before);
  }
}

TEST(Refusals, APromptRefusedByMaxTokensMayStillBeGivenInPart) {
  CacheConfig config = config_of(4, 3);
  config.max_tokens = 10;
  const Rows rows(20, config, 12);
  TestCache cache("dense", ScalarType::f32, config);
  Feeder feeder(cache, rows);
  EXPECT_FALSE(feeder.append_prompt(11).ok());
  EXPECT_TRUE(feeder.append_prompt(10).ok());
  // A refused append does not end the prompt.
  EXPECT_EQ(feeder.append(false).code(), Code::max_tokens_reached);
  EXPECT_EQ(feeder.append_prompt(1).code(), Code::max_tokens_reached);
}

// --------------------------------------------------------------------------------------------- clear, copy, move,
// stats

void expect_equal_stats(const CacheStats& a, const CacheStats& b) {
  EXPECT_EQ(a.tokens, b.tokens);
  EXPECT_EQ(a.resident_tokens, b.resident_tokens);
  EXPECT_EQ(a.peak_resident_tokens, b.peak_resident_tokens);
  EXPECT_EQ(a.resident_bytes, b.resident_bytes);
  EXPECT_EQ(a.peak_resident_bytes, b.peak_resident_bytes);
  EXPECT_EQ(a.evicted_tokens, b.evicted_tokens);
  EXPECT_EQ(a.last_read_tokens, b.last_read_tokens);
  EXPECT_EQ(a.last_skipped_tokens, b.last_skipped_tokens);
  EXPECT_TRUE(a.used_page_share == b.used_page_share ||
              (std::isnan(a.used_page_share) && std::isnan(b.used_page_share)));
}

class EveryPolicy : public testing::TestWithParam<std::string> {
 protected:
  const CacheConfig config = config_of(4, 6);
  const Rows rows{120, config, 13};
  const Rows other{120, config, 14};
};

INSTANTIATE_TEST_SUITE_P(Policies, EveryPolicy, testing::ValuesIn(policy_names()),
                         [](const auto& instance) { return title_of(instance.param); });

TEST_P(EveryPolicy, BehavesAfterClearLikeNew) {
  for (const ScalarType scalar : all_scalar_types) {
    TestCache used(GetParam(), scalar, config);
    static_cast<void>(Feeder(used, other).run(90, 11));
    used.clear();
    EXPECT_EQ(used.length(), 0U);
    EXPECT_TRUE(used.resident(0).empty());
    TestCache fresh(GetParam(), scalar, config);
    expect_equal_stats(used.stats(), fresh.stats());
    EXPECT_EQ(Feeder(used, rows).run(100, 7), Feeder(fresh, rows).run(100, 7));
    EXPECT_EQ(used.resident(0), fresh.resident(0));
    EXPECT_EQ(used.resident(1), fresh.resident(1));
    expect_equal_stats(used.stats(), fresh.stats());
  }
}

TEST_P(EveryPolicy, CopiesGoOnLikeTheOriginalAndIndependently) {
  TestCache original(GetParam(), ScalarType::f16, config);
  static_cast<void>(Feeder(original, rows).run(50, 7));
  TestCache reference(GetParam(), ScalarType::f16, config);
  static_cast<void>(Feeder(reference, rows).run(50, 7));
  TestCache copy(original);
  TestCache assigned(GetParam(), ScalarType::f16, config);
  assigned = original;
  expect_equal_stats(copy.stats(), original.stats());
  // The original goes another way; what the copies do must not notice, nor the other way round.
  TestCache strayed_reference(reference);
  const std::vector<float> strayed = Feeder(original, other).run(110);
  EXPECT_EQ(Feeder(strayed_reference, other).run(110), strayed);
  const std::vector<float> expected = Feeder(reference, rows).run(110);
  EXPECT_EQ(Feeder(copy, rows).run(110), expected);
  EXPECT_EQ(Feeder(assigned, rows).run(110), expected);
  EXPECT_EQ(copy.resident(1), reference.resident(1));
  EXPECT_EQ(assigned.resident(1), reference.resident(1));
  expect_equal_stats(copy.stats(), reference.stats());
}

TEST_P(EveryPolicy, MovedCachesGoOn) {
  TestCache reference(GetParam(), ScalarType::bf16, config);
  const std::vector<float> expected = Feeder(reference, rows).run(110, 7);
  TestCache first(GetParam(), ScalarType::bf16, config);
  std::vector<float> outputs = Feeder(first, rows).run(40, 7);
  TestCache second(std::move(first));
  const std::vector<float> middle = Feeder(second, rows).run(80);
  outputs.insert(outputs.end(), middle.begin(), middle.end());
  TestCache third(GetParam(), ScalarType::f32, config);
  third = std::move(second);
  const std::vector<float> rest = Feeder(third, rows).run(110);
  outputs.insert(outputs.end(), rest.begin(), rest.end());
  EXPECT_EQ(outputs, expected);
}

TEST(PagedKvCacheValues, CopyMoveAndAssignThemselves) {
  using Cache = kvsparse::PagedKvCache<kvsparse::Compose<kvsparse::Raas, kvsparse::Quest>, kvsparse::Half>;
  const CacheConfig config = config_of(4, 6);
  const Rows rows(100, config, 15);
  const auto run = [&](Cache& cache, std::size_t end) {
    std::vector<float> out(48), outputs;
    while (cache.next_position().value < static_cast<std::int64_t>(end)) {
      const auto t = static_cast<std::size_t>(cache.next_position().value);
      EXPECT_TRUE(cache.append(rows.token_k(t), rows.token_v(t)).ok());
      EXPECT_TRUE(kvsparse::attend(cache, rows.token_q(t), out).ok());
      outputs.insert(outputs.end(), out.begin(), out.end());
    }
    return outputs;
  };
  Cache original(config);
  run(original, 50);
  Cache copy(original);
  Cache assigned(config_of(4, 9));
  assigned = original;
  EXPECT_EQ(assigned.config().budget_tokens, config.budget_tokens);
  Cache moved(std::move(copy));
  Cache move_assigned(config);
  move_assigned = Cache(moved);
  const std::vector<float> expected = run(original, 100);
  EXPECT_EQ(run(assigned, 100), expected);
  EXPECT_EQ(run(moved, 100), expected);
  EXPECT_EQ(run(move_assigned, 100), expected);
}

TEST(Stats, CountWhatWasReadSkippedAndEvicted) {
  CacheConfig config = config_of(4, 6);
  config.read_budget_tokens = 8;
  const Rows rows(30, config, 16);
  TestCache cache("streaming_llm+quest", ScalarType::f32, config);
  static_cast<void>(Feeder(cache, rows).run(30));
  const CacheStats stats = cache.stats();
  EXPECT_EQ(stats.tokens, 30U);
  EXPECT_EQ(stats.resident_tokens, 22U);
  EXPECT_EQ(stats.peak_resident_tokens, 24U);
  EXPECT_EQ(stats.evicted_tokens, 16U);
  EXPECT_EQ(stats.last_read_tokens, 2U * (4U + 2U));
  EXPECT_EQ(stats.last_skipped_tokens, 2U * 16U);
  EXPECT_EQ(stats.resident_bytes, stats.peak_resident_bytes);
  EXPECT_TRUE(std::isnan(stats.used_page_share));
}

TEST(Stats, TellHowManyPagesRaasFindsUsed) {
  const CacheConfig config = config_of(4, 6);
  const Rows rows(100, config, 17);
  TestCache never("raas", ScalarType::f32, config, {{"alpha", "1"}});
  static_cast<void>(Feeder(never, rows).run(100));
  EXPECT_EQ(never.stats().used_page_share, 0.0);
  TestCache always("raas", ScalarType::f32, config, {{"alpha", "0"}});
  static_cast<void>(Feeder(always, rows).run(100));
  EXPECT_EQ(always.stats().used_page_share, 1.0);
}

}  // namespace
}  // namespace kvsparse_test
