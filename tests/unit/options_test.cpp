// SPDX-License-Identifier: Apache-2.0
#include "kvsparse/policy/options.hpp"

#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

#include "kvsparse/policy/compose.hpp"
#include "kvsparse/policy/dense.hpp"
#include "kvsparse/policy/h2o.hpp"
#include "kvsparse/policy/kindred.hpp"
#include "kvsparse/policy/quest.hpp"
#include "kvsparse/policy/raas.hpp"
#include "kvsparse/policy/random.hpp"
#include "kvsparse/policy/streaming_llm.hpp"

namespace kvsparse {
namespace {

using Keys = std::vector<std::string>;

template <class Policy>
std::string refusal(Policy policy, const std::string& key, const std::string& value) {
  try {
    static_cast<void>(set_option(policy, {key, value}));
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "not refused";
}

TEST(Options, EveryPolicyListsItsKeys) {
  EXPECT_EQ(option_keys<Dense>(), Keys{});
  EXPECT_EQ(option_keys<StreamingLlm>(), (Keys{"sinks", "pin_prompt", "in_cache_positions"}));
  EXPECT_EQ(option_keys<H2o>(), Keys{"pin_prompt"});
  EXPECT_EQ(option_keys<Quest>(), (Keys{"pool", "over"}));
  EXPECT_EQ(option_keys<Raas>(), (Keys{"used", "alpha", "r", "evidence", "pin_prompt", "preset"}));
  EXPECT_EQ(option_keys<Kindred>(), (Keys{"alpha", "window", "patience", "caution", "pin_prompt"}));
  EXPECT_EQ(option_keys<Random>(), (Keys{"seed", "pin_prompt"}));
  EXPECT_EQ((option_keys<Compose<Raas, Quest>>()),
            (Keys{"used", "alpha", "r", "evidence", "pin_prompt", "pool", "over", "preset"}));
}

TEST(Options, DefaultsAreThoseOfTheDefinitions) {
  EXPECT_EQ(StreamingLlm{}.options.sinks, 4U);
  EXPECT_FALSE(StreamingLlm{}.options.pin_prompt);
  EXPECT_FALSE(H2o{}.options.pin_prompt);
  EXPECT_TRUE(Random{}.options.pin_prompt);
  const Raas raas;
  EXPECT_TRUE(raas.options.pin_prompt);
  EXPECT_EQ(raas.options.alpha, 0.01);
  EXPECT_EQ(raas.options.r, 0.5);
  EXPECT_EQ(raas.options.used, Raas::Used::alpha);
  EXPECT_EQ(raas.options.evidence, Raas::Evidenced::exact_mass);
  const Kindred kindred;
  EXPECT_TRUE(kindred.options.pin_prompt);
  EXPECT_EQ(kindred.options.alpha, 0.01);
  EXPECT_EQ(kindred.options.window, 24U);
  EXPECT_EQ(kindred.options.patience, 16.0);
  EXPECT_EQ(kindred.options.caution, 0.5);
}

TEST(Options, NumbersTruthValuesAndNamesAreParsed) {
  Raas raas;
  EXPECT_TRUE(set_option(raas, {"alpha", "0.25"}));
  EXPECT_EQ(raas.options.alpha, 0.25);
  EXPECT_TRUE(set_option(raas, {"alpha", "1e-4"}));
  EXPECT_EQ(raas.options.alpha, 1e-4);
  EXPECT_TRUE(set_option(raas, {"used", "rank"}));
  EXPECT_EQ(raas.options.used, Raas::Used::rank);
  EXPECT_TRUE(set_option(raas, {"evidence", "quest_bound"}));
  EXPECT_EQ(raas.options.evidence, Raas::Evidenced::quest_bound);
  for (const char* no : {"false", "0", "off", "no"}) {
    raas.options.pin_prompt = true;
    EXPECT_TRUE(set_option(raas, {"pin_prompt", no}));
    EXPECT_FALSE(raas.options.pin_prompt) << no;
  }
  for (const char* yes : {"true", "1", "on", "yes"}) {
    raas.options.pin_prompt = false;
    EXPECT_TRUE(set_option(raas, {"pin_prompt", yes}));
    EXPECT_TRUE(raas.options.pin_prompt) << yes;
  }
  Random random;
  EXPECT_TRUE(set_option(random, {"seed", "18446744073709551615"}));
  EXPECT_EQ(random.options.seed, ~std::uint64_t{0});
}

TEST(Options, AnUnknownKeyIsReportedNotThrown) {
  Raas raas;
  EXPECT_FALSE(set_option(raas, {"sinks", "4"}));
  Dense dense;
  EXPECT_FALSE(set_option(dense, {"alpha", "4"}));
  EXPECT_FALSE(set_option(dense, {"preset", "paper_v1"}));
}

TEST(Options, ABadValueIsRefusedWithTheKeyTheValueAndWhatItTakes) {
  EXPECT_EQ(refusal(Raas{}, "alpha", "small"), "alpha = small is not a number");
  EXPECT_EQ(refusal(Raas{}, "alpha", "0.1x"), "alpha = 0.1x is not a number");
  EXPECT_EQ(refusal(Raas{}, "alpha", ""), "alpha =  is not a number");
  EXPECT_EQ(refusal(Raas{}, "used", "best"), "used = best is not one of alpha|rank");
  EXPECT_EQ(refusal(Raas{}, "used", ""), "used =  is not one of alpha|rank");
  EXPECT_EQ(refusal(Raas{}, "evidence", "quest"), "evidence = quest is not one of exact_mass|quest_bound");
  EXPECT_EQ(refusal(Raas{}, "pin_prompt", "maybe"), "pin_prompt = maybe is not true or false");
  EXPECT_EQ(refusal(StreamingLlm{}, "sinks", "-1"), "sinks = -1 is not a whole number >= 0");
  EXPECT_EQ(refusal(StreamingLlm{}, "sinks", "4.5"), "sinks = 4.5 is not a whole number >= 0");
  EXPECT_EQ(refusal(Raas{}, "preset", "paper_v3"), "preset = paper_v3: policy raas has paper_v1|paper_v2");
}

TEST(Options, PresetsRestoreThePapers) {
  Raas raas;
  raas.options.r = 0.9;
  EXPECT_TRUE(set_option(raas, {"preset", "paper_v1"}));
  EXPECT_EQ(raas.options.evidence, Raas::Evidenced::quest_bound);
  EXPECT_EQ(raas.options.used, Raas::Used::alpha);
  EXPECT_EQ(raas.options.alpha, 1e-4);
  EXPECT_EQ(raas.options.r, 0.5);
  EXPECT_TRUE(set_option(raas, {"preset", "paper_v2"}));
  EXPECT_EQ(raas.options.evidence, Raas::Evidenced::quest_bound);
  EXPECT_EQ(raas.options.used, Raas::Used::rank);
  EXPECT_EQ(raas.options.r, 0.5);
  Compose<Raas, Quest> both;
  EXPECT_TRUE(set_option(both, {"preset", "paper_v2"}));
  EXPECT_EQ(both.evict.options.used, Raas::Used::rank);
}

TEST(Options, ACompositionReachesBothItsParts) {
  Compose<StreamingLlm, Quest> both;
  EXPECT_TRUE(set_option(both, {"sinks", "9"}));
  EXPECT_TRUE(set_option(both, {"pool", "query_head"}));
  EXPECT_EQ(both.evict.options.sinks, 9U);
  EXPECT_EQ(both.select_part.options.pool, Quest::Pool::query_head);
  EXPECT_EQ((Compose<StreamingLlm, Quest>::name), "streaming_llm+quest");
}

TEST(Options, ValuesOutOfRangeHaveASentence) {
  Raas raas;
  EXPECT_EQ(traits::options_problem(raas), "");
  raas.options.alpha = 1.5;
  EXPECT_EQ(traits::options_problem(raas), "alpha = 1.500000 is not in [0, 1]");
  raas.options.alpha = 0.5;
  raas.options.r = -0.5;
  EXPECT_EQ(traits::options_problem(raas), "r = -0.500000 is not in [0, 1]");
  EXPECT_EQ(traits::options_problem(Dense{}), "");
  const auto problem = [](const char* key, const char* value) {
    Kindred kindred;
    EXPECT_TRUE(set_option(kindred, {key, value}));
    return traits::options_problem(kindred);
  };
  EXPECT_EQ(traits::options_problem(Kindred{}), "");
  EXPECT_EQ(problem("alpha", "-1"), "alpha = -1.000000 is not in [0, 1]");
  EXPECT_EQ(problem("patience", "0.5"), "patience = 0.500000 is not in [1, 1e6]");
  EXPECT_EQ(problem("patience", "1e7"), "patience = 10000000.000000 is not in [1, 1e6]");
  EXPECT_EQ(problem("caution", "-0.5"), "caution = -0.500000 is not in [0, 1e6]");
  EXPECT_EQ(problem("patience", "1") + problem("caution", "0") + problem("alpha", "0") + problem("window", "0"), "");
  Kindred unknown;
  unknown.options.patience = std::numeric_limits<double>::quiet_NaN();
  EXPECT_NE(traits::options_problem(unknown), "");
}

}  // namespace
}  // namespace kvsparse
