// SPDX-License-Identifier: Apache-2.0
//
// HashAttention with learned hyperplanes that come from a safetensors file, one tensor a layer: what a query reads,
// decision for decision, against the definition.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "common/safetensors.hpp"
#include "kvsparse/kvsparse.hpp"
#include "kvsparse/policy/hash_attention.hpp"
#include "support/test_rng.hpp"

namespace kvsparse_test {
namespace {

using namespace kvsparse;
using Learned = BasicHashAttention<LearnedHyperplanes>;

constexpr std::size_t query_heads = 4, kv_heads = 2, head_dim = 16, page_size = 4;

std::vector<float> noise(TestRng& rng, std::size_t size) {
  std::vector<float> x(size);
  for (float& element : x) element = static_cast<float>(rng.gaussian());
  return x;
}

/// Written, and read again as an engine would.
std::vector<float> through_a_file(const std::vector<float>& weights) {
  const auto path = std::filesystem::temp_directory_path() / "kvsparse_learned_hash_test.safetensors";
  kvsparse_tools::write_safetensors(
      path,
      {{.name = "layers.3.hash", .dtype = "F32", .shape = {32, head_dim}, .bytes = std::as_bytes(std::span(weights))}});
  std::vector<float> read = kvsparse_tools::SafetensorsFile(path).read_floats("layers.3.hash");
  std::filesystem::remove(path);
  return read;
}

std::uint32_t signature(const std::vector<float>& weights, const float* row) {
  std::uint32_t bits = 0;
  for (std::size_t b = 0; b < 32; ++b) {
    double side = 0;
    for (std::size_t i = 0; i < head_dim; ++i) {
      side += static_cast<double>(weights[b * head_dim + i]) * static_cast<double>(row[i]);
    }
    bits |= std::uint32_t{side > 0} << b;
  }
  return bits;
}

/// The newest page, and of all other tokens the nearest by signature, the oldest of equals first.
std::vector<Position> nearest_tokens(const std::vector<float>& weights, const std::vector<std::vector<float>>& keys,
                                     const std::vector<float>& queries, std::size_t head, std::size_t read_tokens) {
  const std::size_t open = (keys.size() - 1) / page_size * page_size;
  std::vector<std::pair<int, std::size_t>> far;
  for (std::size_t t = 0; t < open; ++t) {
    int nearest = 32;
    for (std::size_t q = head * query_heads / kv_heads; q < (head + 1) * query_heads / kv_heads; ++q) {
      const std::uint32_t wanted = signature(weights, &queries[q * head_dim]);
      nearest = std::min(nearest, std::popcount(wanted ^ signature(weights, &keys[t][head * head_dim])));
    }
    far.emplace_back(nearest, t);
  }
  std::sort(far.begin(), far.end());
  far.resize(std::min(far.size(), read_tokens - (keys.size() - open)));
  std::vector<Position> read;
  for (const auto& [distance, t] : far) read.push_back({static_cast<std::int64_t>(t)});
  for (std::size_t t = open; t < keys.size(); ++t) read.push_back({static_cast<std::int64_t>(t)});
  std::sort(read.begin(), read.end());
  return read;
}

TEST(LearnedHash, ReadsTheTokensNearestUnderTheWeightsOfAFile) {
  TestRng rng(1);
  const std::vector<float> weights = noise(rng, 32 * head_dim);
  const std::vector<float> loaded = through_a_file(weights);
  ASSERT_EQ(loaded, weights);

  CacheConfig config;
  config.query_heads = query_heads;
  config.kv_heads = kv_heads;
  config.head_dim = head_dim;
  config.page_size = page_size;
  config.max_tokens = 120;
  config.budget_tokens = config.read_budget_tokens = 24;
  Learned policy;
  policy.options.weights = loaded;
  PagedKvCache<Learned, float> cache(config, policy);
  PagedKvCache<HashAttention, float> random(config);

  std::vector<std::vector<float>> keys;
  std::size_t unlike_random = 0;
  for (std::size_t t = 0; t < config.max_tokens; ++t) {
    keys.push_back(noise(rng, kv_heads * head_dim));
    const std::vector<float> v = noise(rng, kv_heads * head_dim);
    const std::vector<float> q = noise(rng, query_heads * head_dim);
    std::vector<float> out(query_heads * head_dim);
    ASSERT_TRUE(cache.append(keys.back(), v).ok());
    ASSERT_TRUE(attend(cache, q, out).ok());
    ASSERT_TRUE(random.append(keys.back(), v).ok());
    ASSERT_TRUE(attend(random, q, out).ok());
    for (std::size_t head = 0; head < kv_heads; ++head) {
      const std::vector<Position> read = cache.read_positions(head);
      EXPECT_EQ(read, nearest_tokens(weights, keys, q, head, config.read_budget_tokens)) << "token " << t;
      if (read != random.read_positions(head)) ++unlike_random;
    }
  }
  EXPECT_GT(unlike_random, config.max_tokens) << "the weights decide nothing";
}

}  // namespace
}  // namespace kvsparse_test
