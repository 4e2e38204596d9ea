// SPDX-License-Identifier: Apache-2.0
//
// The compression barrier (2502.15955): whoever keeps L tokens, or anything of that size, of a sequence of N cannot
// answer for all of them, whatever its policy. Keys here look alike, nothing tells which of them will be wanted, and at
// the end a query wants one of the early ones. Whoever keeps everything finds each of them, however few tokens it
// reads.
#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <string>
#include <vector>

#include "engine/named_cache.hpp"
#include "support/random_trace.hpp"

namespace kvsparse_test {
namespace {

constexpr std::size_t tokens = 320, prompt = 16, budget = 64, dim = 32;
constexpr float sharpness = 12.0F;  // the key that is asked for has a logit of 68, others 12 or less, give or take

struct Stream {
  std::vector<float> k, v, q;  // [tokens, dim]

  explicit Stream(std::uint64_t seed) {
    TestRng rng(seed);
    for (std::vector<float>* rows : {&k, &v, &q}) {
      for (std::size_t i = 0; i < tokens * dim; ++i) rows->push_back(static_cast<float>(rng.gaussian()));
    }
    for (std::size_t t = 0; t < tokens; ++t) {  // keys of one length, values too
      for (std::vector<float>* rows : {&k, &v}) {
        float* row = rows->data() + t * dim;
        float square = 0.0F;
        for (std::size_t i = 0; i < dim; ++i) square += row[i] * row[i];
        for (std::size_t i = 0; i < dim; ++i) row[i] *= std::sqrt(static_cast<float>(dim) / square);
      }
    }
  }
  /// Asks for the key of a position.
  std::vector<float> query_for(std::size_t position) const {
    std::vector<float> query(row(k, position).begin(), row(k, position).end());
    for (float& element : query) element *= sharpness;
    return query;
  }
  static std::span<const float> row(const std::vector<float>& rows, std::size_t t) {
    return std::span<const float>(rows).subspan(t * dim, dim);
  }
};

kvsparse::AnyCache cache_of(const std::string& policy) {
  kvsparse::CacheConfig config;
  config.head_dim = dim;
  config.page_size = 4;
  config.budget_tokens = config.read_budget_tokens = budget;
  config.max_tokens = tokens;
  std::vector<kvsparse::OptionSetting> settings;
  if (policy == "r_kv") settings.push_back({"period", "16"});  // by default more than the budget
  return kvsparse_tools::named_cache(policy, kvsparse::ScalarType::f32, config, settings);
}

/// The positions behind the prompt and before the middle whose value comes back when their key is asked for at the end.
std::set<std::size_t> found_by(const std::string& policy, const Stream& stream) {
  kvsparse::AnyCache cache = cache_of(policy);
  std::vector<float> out(dim);
  for (std::size_t t = 0; t < tokens; ++t) {
    const auto k = Stream::row(stream.k, t);
    const auto v = Stream::row(stream.v, t);
    EXPECT_TRUE((t < prompt ? cache.append_prompt(k, v) : cache.append(k, v)).ok());
    EXPECT_TRUE(cache.attend(Stream::row(stream.q, t), out).ok());
  }
  std::set<std::size_t> found;
  for (std::size_t planted = prompt; planted < tokens / 2; ++planted) {
    kvsparse::AnyCache asked = cache;
    EXPECT_TRUE(asked.attend(stream.query_for(planted), out).ok());
    double distance = 0.0;
    for (std::size_t i = 0; i < dim; ++i) {
      distance += std::pow(static_cast<double>(out[i]) - static_cast<double>(stream.v[planted * dim + i]), 2);
    }
    if (std::sqrt(distance) < 0.25 * std::sqrt(static_cast<double>(dim))) found.insert(planted);
  }
  return found;
}

constexpr std::size_t askable = tokens / 2 - prompt;

TEST(CompressionBarrier, EveryPolicyOfBoundedMemoryLosesSomePosition) {
  std::vector<std::string> evictors;
  for (const std::string& name : kvsparse::policy_names()) {
    if (kvsparse::policy_facts(name).evicts) evictors.push_back(name);
  }
  EXPECT_GT(evictors.size(), 12U);
  for (const std::string& policy : evictors) {
    for (const std::uint64_t seed : {1U, 2U}) {
      EXPECT_LE(found_by(policy, Stream(seed)).size(), budget) << policy;
    }
  }
}

TEST(CompressionBarrier, WhoKeepsEverythingFindsEveryPosition) {
  for (const std::string policy : {"dense", "quest", "certified", "oracle"}) {
    for (const std::uint64_t seed : {1U, 2U}) {
      EXPECT_EQ(found_by(policy, Stream(seed)).size(), askable) << policy;
    }
  }
}

/// Tokens read by the queries that find a position, on average over all positions.
double mean_tokens_read(const std::string& policy, const Stream& stream) {
  kvsparse::AnyCache cache = cache_of(policy);
  for (std::size_t t = 0; t < tokens; ++t) {
    EXPECT_TRUE(cache.append(Stream::row(stream.k, t), Stream::row(stream.v, t)).ok());
  }
  std::size_t read = 0;
  for (std::size_t planted = prompt; planted < tokens / 2; ++planted) {
    std::vector<float> out(dim);
    EXPECT_TRUE(cache.attend(stream.query_for(planted), out).ok());
    read += cache.stats().last_read_tokens;
  }
  return static_cast<double>(read) / askable;
}

// The barrier is one of memory, not of reading: Quest reads a fifth of the tokens, and a proof takes two fifths.
TEST(CompressionBarrier, FindsThemReadingFewTokens) {
  for (const std::uint64_t seed : {1U, 2U, 3U}) {
    EXPECT_EQ(mean_tokens_read("quest", Stream(seed)), tokens / 5.0);
    EXPECT_NEAR(mean_tokens_read("certified", Stream(seed)), tokens * 0.4, tokens * 0.05);
  }
}

}  // namespace
}  // namespace kvsparse_test
