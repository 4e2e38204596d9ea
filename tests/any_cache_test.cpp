// SPDX-License-Identifier: Apache-2.0
//
// AnyCache::of: a policy that is not in the name table behaves like one that is, and one that is like itself by name.
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kvsparse/cache/any_cache.hpp"
#include "support/refusal.hpp"
#include "support/rows.hpp"
#include "support/test_cache.hpp"

namespace kvsparse_test {
namespace {

using kvsparse::AnyCache;
using kvsparse::CacheConfig;
using kvsparse::ConfigError;
using kvsparse::PagedKvCache;
using kvsparse::ScalarType;

/// No policy of the library: gives up the page that the latest query cared for least, or the newest.
struct LowestMass {
  static constexpr std::string_view name = "lowest_mass";
  static constexpr kvsparse::EvidenceKind evidence = kvsparse::EvidenceKind::page_mass;
  struct Options {
    bool newest = false;
    void visit(auto&& field) { field("newest", newest); }
  } options;
  struct PageState {
    float mass = 0;
  };

  void observe(kvsparse::HeadView<LowestMass> head, const kvsparse::Evidence& step) const {
    for (const kvsparse::PageIndex page : head.pages()) {
      if (step.visited(page)) head.state(page).mass = step.group_mass(page);
    }
  }
  kvsparse::PageIndex victim(kvsparse::HeadView<LowestMass> head) const {
    return head.lowest_evictable(
        [&](kvsparse::PageIndex page) { return options.newest ? -1.0F : head.state(page).mass; });
  }
};

/// Gives up the page at a place of its list that no option names.
struct PageAtPlace {
  static constexpr std::string_view name = "page_at_place";
  std::uint32_t place = 0;
  kvsparse::PageIndex victim(kvsparse::HeadView<PageAtPlace>) const { return {place}; }
};

CacheConfig small_config() {
  CacheConfig config;
  config.query_heads = 4;
  config.kv_heads = 2;
  config.head_dim = 12;
  config.page_size = 4;
  config.budget_tokens = 24;
  config.max_tokens = 100;
  return config;
}

/// All outputs of 100 tokens, the first 7 of them a prompt.
template <class Cache>
std::vector<float> run(Cache& cache, const Rows& rows) {
  std::vector<float> out(48), outputs;
  for (std::size_t t = 0; t < 100; ++t) {
    const auto k = rows.token_k(t), v = rows.token_v(t);
    EXPECT_TRUE((t < 7 ? cache.append_prompt(k, v) : cache.append(k, v)).ok());
    if constexpr (requires { cache.attend(rows.token_q(t), out); }) {
      EXPECT_TRUE(cache.attend(rows.token_q(t), out).ok());
    } else {
      EXPECT_TRUE(kvsparse::attend(cache, rows.token_q(t), out).ok());
    }
    outputs.insert(outputs.end(), out.begin(), out.end());
  }
  return outputs;
}

TEST(AnyCacheOf, HoldsAPolicyThatIsNotInTheNameTable) {
  const CacheConfig config = small_config();
  const Rows rows(100, config, 1);
  AnyCache any = AnyCache::of<LowestMass>(ScalarType::f16, config);
  PagedKvCache<LowestMass, kvsparse::Half> cache(config);
  EXPECT_EQ(any.policy_name(), "lowest_mass");
  EXPECT_EQ(run(any, rows), run(cache, rows));
  EXPECT_EQ(any.resident_positions(1), cache.resident_positions(1));
  EXPECT_EQ(any.stats().peak_resident_tokens, 24U);
  EXPECT_TRUE(kvsparse::policy_facts<LowestMass>().evicts);
  EXPECT_EQ(kvsparse::policy_facts<LowestMass>().option_keys, std::vector<std::string>{"newest"});

  const std::vector<kvsparse::OptionSetting> settings{{"newest", "true"}};
  AnyCache other = AnyCache::of<LowestMass, float>(ScalarType::f32, config, settings);
  AnyCache copy = other;
  EXPECT_EQ(run(copy, rows), run(other, rows));
  EXPECT_NE(copy.resident_positions(1), any.resident_positions(1));
}

TEST(AnyCacheOf, TakesAPolicyThatSettingsDoNotDescribe) {
  const CacheConfig config = small_config();
  const Rows rows(100, config, 6);
  for (const std::uint32_t place : {0U, 1U, 3U}) {
    AnyCache any = AnyCache::of<PageAtPlace, float>(PageAtPlace{place}, ScalarType::f32, config);
    PagedKvCache<PageAtPlace, float> typed(config, PageAtPlace{place});
    EXPECT_EQ(run(any, rows), run(typed, rows));
    // The pages before that place never go.
    const std::vector<kvsparse::Position> resident = any.resident_positions(0);
    EXPECT_EQ(resident.size(), config.budget_tokens);
    for (std::uint32_t page = 0; page < place; ++page) EXPECT_EQ(resident[4 * page].value, 4 * page);
    EXPECT_EQ(resident[4 * place].value, 100 - 4 * static_cast<std::int64_t>(6 - place));
  }
}

TEST(AnyCacheOf, IsThePolicyByNameForOneOfTheTable) {
  const CacheConfig config = small_config();
  const Rows rows(100, config, 2);
  const std::vector<kvsparse::OptionSetting> settings{{"alpha", "0.2"}, {"preset", "paper_v1"}};
  AnyCache any = AnyCache::of<kvsparse::Raas, float>(ScalarType::f32, config, settings);
  TestCache named("raas", ScalarType::f32, config, settings);
  EXPECT_EQ(run(any, rows), run(named, rows));
}

TEST(AnyCacheOf, RefusesInTheSentencesOfTheNameTable) {
  CacheConfig config = small_config();
  const auto both = [&](const std::vector<kvsparse::OptionSetting>& settings) {
    const std::string named = refusal([&] { const TestCache cache("raas", ScalarType::f32, config, settings); });
    EXPECT_NE(named, "not refused");
    EXPECT_EQ(refusal([&] { AnyCache::of<kvsparse::Raas, float>(ScalarType::f32, config, settings); }), named);
  };
  both({{"sinks", "2"}});
  both({{"alpha", "2"}});
  both({{"alpha", "x"}});
  both({{"preset", "paper_v3"}});
  EXPECT_EQ(refusal([&] { AnyCache::of<LowestMass, float>(ScalarType::bf16, config); }),
            "policy lowest_mass is not compiled for storage type bf16");
  EXPECT_EQ(
      refusal([&] {
        AnyCache::of<LowestMass, float>(ScalarType::f32, config, std::vector<kvsparse::OptionSetting>{{"x", "1"}});
      }),
      "policy lowest_mass has no option x; it has newest");
  config.budget_tokens = 3;
  both({});
}

TEST(AnyCacheOf, TellsTheBytesThatConstructionAllocated) {
  const CacheConfig config = small_config();
  LowestMass policy;
  policy.options.newest = true;
  EXPECT_EQ((AnyCache::of<LowestMass, kvsparse::Bfloat16>(ScalarType::bf16, config).bytes_allocated()),
            (PagedKvCache<LowestMass, kvsparse::Bfloat16>::bytes_required(config, policy)));
  const std::vector<kvsparse::OptionSetting> bound{{"evidence", "quest_bound"}};  // needs page summaries too
  EXPECT_GT((AnyCache::of<kvsparse::Raas, float>(ScalarType::f32, config, bound).bytes_allocated()),
            (AnyCache::of<kvsparse::Raas, float>(ScalarType::f32, config).bytes_allocated()));
}

TEST(AnyCacheOf, TakesLogitOptionsAsThePolicysOwnCacheDoes) {
  CacheConfig config = small_config();
  config.logits = {.soft_cap = 2.0F, .window = 30, .alibi_slopes = {.1F, .2F, .3F, .4F}, .sink_logits = {0, 1, 2, 3}};
  const Rows rows(100, config, 4);
  AnyCache any = AnyCache::of<LowestMass, float>(ScalarType::f32, config);
  PagedKvCache<LowestMass> own(config);
  const std::vector<float> out = run(any, rows);
  EXPECT_EQ(out, run(own, rows));
  AnyCache plain = AnyCache::of<LowestMass, float>(ScalarType::f32, small_config());
  EXPECT_NE(out, run(plain, rows));
}

}  // namespace
}  // namespace kvsparse_test
