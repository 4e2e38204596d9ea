// SPDX-License-Identifier: Apache-2.0
//
// The decisions without the storage: LayerPages, told the page masses that a cache's kernel finds, holds what the cache
// holds.
#include "kvsparse/cache/layer_pages.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "kvsparse/kvsparse.hpp"
#include "support/random_trace.hpp"

namespace kvsparse_test {
namespace {

using namespace kvsparse;

/// An engine's block allocator: no memory behind the ids, the lowest free one first.
struct Blocks {
  explicit Blocks(std::size_t count) : taken(count) {}
  PageId acquire() {
    std::uint32_t page = 0;
    while (taken.at(page)) ++page;
    taken[page] = true;
    return {page};
  }
  void release(PageId page) {
    EXPECT_TRUE(taken.at(page.value));
    taken[page.value] = false;
  }
  std::size_t in_use() const { return static_cast<std::size_t>(std::count(taken.begin(), taken.end(), true)); }
  std::vector<bool> taken;
};

/// The share of the softmax that each read page has, in double, from the formula.
std::vector<float> masses_of(const std::vector<std::vector<float>>& keys, std::span<const PageRead> reads,
                             const PageTable& table, const QueryGroup& queries, std::size_t kv_head,
                             std::vector<float>& log_sum_exp) {
  std::vector<float> masses(reads.size() * queries.size);
  for (std::size_t q = 0; q < queries.size; ++q) {
    std::vector<double> weights(reads.size());
    double sum = 0.0;
    for (std::size_t r = 0; r < reads.size(); ++r) {
      for (std::uint32_t slot = 0; slot < reads[r].tokens; ++slot) {
        const Position position = table[reads[r].index].first_position + slot;
        const float* key = keys[static_cast<std::size_t>(position.value)].data() + kv_head * queries.head_dim;
        double logit = 0.0;
        for (std::size_t i = 0; i < queries.head_dim; ++i) {
          logit += static_cast<double>(queries[q][i]) * static_cast<double>(key[i]);
        }
        weights[r] += std::exp(logit * static_cast<double>(queries.scale));
      }
      sum += weights[r];
    }
    for (std::size_t r = 0; r < reads.size(); ++r) masses[r * queries.size + q] = static_cast<float>(weights[r] / sum);
    log_sum_exp[q] = static_cast<float>(std::log(sum));
  }
  return masses;
}

template <class Policy>
void expect_the_same_pages() {
  SCOPED_TRACE(Policy::name);
  CacheConfig config;
  config.query_heads = 6;
  config.kv_heads = 2;
  config.head_dim = 8;
  config.page_size = 4;
  config.budget_tokens = 32;
  config.max_tokens = 200;
  PagedKvCache<Policy> cache(config);
  LayerPages<Policy> brain(config);
  Blocks blocks(200);
  TestRng rng(7);
  std::vector<std::vector<float>> keys;
  std::vector<float> v(16), q(48), out(48), lse(3);
  const auto fill = [&](std::vector<float>& row) {
    for (float& x : row) x = static_cast<float>(rng.gaussian());
  };
  for (std::size_t t = 0; t < 200; ++t) {
    keys.emplace_back(16);
    fill(keys.back());
    fill(v);
    fill(q);
    if (t < 10) {
      ASSERT_TRUE(cache.append_prompt(keys.back(), v).ok());
      ASSERT_TRUE(brain.append_prompt(1, blocks).ok());
    } else {
      ASSERT_TRUE(cache.append(keys.back(), v).ok());
      ASSERT_TRUE(brain.append(blocks).ok());
    }
    ASSERT_TRUE(attend(cache, q, out).ok());
    std::size_t held = 0;
    for (std::size_t h = 0; h < 2; ++h) {
      const QueryGroup group{q.data() + h * 24, 3, 8, 8, brain.softmax_scale()};
      brain.begin_query(h, brain.next_position());
      const auto reads = brain.select(h, group);
      const std::vector<float> masses = masses_of(keys, reads, brain.table(h), group, h, lse);
      brain.record_masses(h, 0, masses, lse);
      brain.observe(h, group);
      ASSERT_EQ(brain.resident_positions(h), cache.resident_positions(h)) << "after token " << t;
      ASSERT_EQ(brain.read_positions(h), cache.read_positions(h));
      held += brain.table(h).size();
    }
    brain.end_step();
    EXPECT_EQ(blocks.in_use(), held) << "the owner lends exactly what the tables name";
  }
  EXPECT_EQ(brain.stats(1).evicted_tokens, cache.stats().evicted_tokens);
}

TEST(LayerPages, WithPageMassesAloneAPolicyHoldsWhatItHoldsInACache) {
  expect_the_same_pages<Dense>();
  expect_the_same_pages<StreamingLlm>();
  expect_the_same_pages<H2o>();
  expect_the_same_pages<Raas>();
  expect_the_same_pages<Random>();
}

TEST(LayerPages, RefusesWhatACacheRefuses) {
  CacheConfig config;
  config.head_dim = 8;
  config.page_size = 4;
  config.max_tokens = 2;
  LayerPages<Dense> brain(config);
  Blocks blocks(1);
  ASSERT_TRUE(brain.append_prompt(1, blocks).ok());
  EXPECT_EQ(brain.append_prompt(2, blocks).code(), Status::Code::max_tokens_reached);
  for (const std::size_t tokens : {~std::size_t{0}, ~std::size_t{0} - 1}) {  // with those that came a sum would wrap
    EXPECT_EQ(brain.check_prompt(tokens).code(), Status::Code::max_tokens_reached);
    EXPECT_EQ(brain.check_append(tokens).code(), Status::Code::max_tokens_reached);
    EXPECT_GT(brain.pages_to_open(tokens), std::size_t{1} << 16);
  }
  ASSERT_TRUE(brain.append(blocks).ok());
  EXPECT_EQ(brain.append_prompt(1, blocks).code(), Status::Code::prompt_ended);
  EXPECT_EQ(brain.append(blocks).code(), Status::Code::max_tokens_reached);
  EXPECT_EQ(brain.next_position(), Position{2});
}

}  // namespace
}  // namespace kvsparse_test
