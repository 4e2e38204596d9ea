// SPDX-License-Identifier: Apache-2.0
//
// All layers of a sequence: they cannot drift apart, and each behaves as a cache of its own would.
#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <string>
#include <vector>

#include "kvsparse/cache/layer_schedule.hpp"
#include "kvsparse/cache/sequence_cache.hpp"
#include "kvsparse/kvsparse.hpp"
#include "support/rows.hpp"

namespace kvsparse_test {
namespace {

using namespace kvsparse;
using Code = Status::Code;

CacheConfig small_config() {
  CacheConfig config;
  config.query_heads = 4;
  config.kv_heads = 2;
  config.head_dim = 6;
  config.page_size = 4;
  config.budget_tokens = 16;
  config.max_tokens = 60;
  return config;
}

/// Three layers of different budgets.
std::vector<CacheConfig> three_layers() {
  std::vector<CacheConfig> layers(3, small_config());
  for (std::size_t l = 0; l < 3; ++l) {
    layers[l].layer = l;
    layers[l].budget_tokens = 12 + 8 * l;
  }
  return layers;
}

/// The tokens and queries of one layer.
Rows rows_of(std::size_t layer, std::size_t tokens = 60) { return Rows(tokens, small_config(), 10 + layer); }

TokenRows<const float> chunk(const std::vector<float>& rows, std::size_t first, std::size_t tokens) {
  return TokenRows<const float>(rows.data() + first * 12, tokens, 2, 6);
}

template <class Refusing>
std::string refusal(Refusing&& refusing) {
  try {
    refusing();
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "not refused";
}

// --- the sequence ---

TEST(SequenceCache, EachLayerIsWhatACacheOfItsOwnWouldBe) {
  using Cache = PagedKvCache<Random>;  // which draws by layer
  const std::vector<CacheConfig> configs = three_layers();
  SequenceCache<Cache> sequence(configs, Random{});
  std::vector<Cache> alone;
  for (const CacheConfig& config : configs) alone.emplace_back(config);

  std::vector<float> out(24), expected(24), lse(4), expected_lse(4);
  for (std::size_t t = 0; t < 60; ++t) {
    for (std::size_t l = 0; l < 3; ++l) {
      const Rows rows = rows_of(l);
      EXPECT_EQ(sequence.turn(), l);
      EXPECT_EQ(sequence.next_position(), (Position{static_cast<std::int64_t>(t)}));
      if (t < 7) {
        ASSERT_TRUE(sequence.append_prompt(l, rows.token_k(t), rows.token_v(t)).ok());
        ASSERT_TRUE(alone[l].append_prompt(rows.token_k(t), rows.token_v(t)).ok());
      } else {
        ASSERT_TRUE(sequence.append(l, rows.token_k(t), rows.token_v(t)).ok());
        ASSERT_TRUE(alone[l].append(rows.token_k(t), rows.token_v(t)).ok());
      }
      ASSERT_TRUE(sequence.attend(l, rows.token_q(t), std::span<float>(out), std::span<float>(lse)).ok());
      ASSERT_TRUE(attend(alone[l], rows.token_q(t), expected, expected_lse).ok());
      ASSERT_EQ(out, expected);
      ASSERT_EQ(lse, expected_lse);
      ASSERT_EQ(sequence.layer(l).resident_positions(1), alone[l].resident_positions(1));
    }
  }
  CacheStats sum;
  for (const Cache& cache : alone) {
    sum.resident_bytes += cache.stats().resident_bytes;
    sum.evicted_tokens += cache.stats().evicted_tokens;
    sum.last_read_tokens += cache.stats().last_read_tokens;
  }
  const CacheStats stats = sequence.stats();
  EXPECT_EQ(stats.tokens, 60U);
  EXPECT_EQ(stats.resident_tokens, 28U);
  EXPECT_EQ(stats.resident_bytes, sum.resident_bytes);
  EXPECT_EQ(stats.evicted_tokens, sum.evicted_tokens);
  EXPECT_EQ(stats.last_read_tokens, sum.last_read_tokens);
  EXPECT_TRUE(std::isnan(stats.used_page_share));
}

TEST(SequenceCache, LayersCannotDriftApart) {
  SequenceCache<PagedKvCache<Raas>> sequence(three_layers(), Raas{});
  const Rows rows = rows_of(0);
  const auto k = rows.token_k(0), v = rows.token_v(0), q = rows.token_q(0);
  std::vector<float> out(24);
  const auto expect = [&](const Status& status, Code code, const std::string& sentence) {
    EXPECT_EQ(status.code(), code);
    EXPECT_EQ(status.message(), sentence);
  };
  const std::string turn_of_1 =
      " came where it is the turn of layer 1; each step goes through all layers once, lowest first";
  EXPECT_EQ(sequence.append(1, k, v).code(), Code::layer_out_of_turn);  // layer 0 skipped
  ASSERT_TRUE(sequence.append(0, k, v).ok());
  expect(sequence.append(0, k, v), Code::layer_out_of_turn, "layer 0" + turn_of_1);
  expect(sequence.append(2, k, v), Code::layer_out_of_turn, "layer 2" + turn_of_1);
  expect(sequence.append(3, k, v), Code::layer_out_of_turn, "layer 3" + turn_of_1);
  expect(sequence.attend(1, q, std::span<float>(out)), Code::layer_out_of_turn, "layer 1" + turn_of_1);
  EXPECT_TRUE(sequence.attend(0, q, std::span<float>(out)).ok());
  EXPECT_EQ(sequence.end_prompt().code(), Code::layer_out_of_turn);
  EXPECT_EQ(sequence.next_position(), Position{0});
  EXPECT_EQ(sequence.layer(0).next_position(), Position{1});
  EXPECT_EQ(sequence.layer(1).next_position(), Position{0});

  ASSERT_TRUE(sequence.append(1, k, v).ok());
  ASSERT_TRUE(sequence.append(2, k, v).ok());
  EXPECT_EQ(sequence.next_position(), Position{1});
  EXPECT_TRUE(sequence.attend(2, q, std::span<float>(out)).ok());
  EXPECT_EQ(sequence.attend(3, q, std::span<float>(out)).code(), Code::layer_out_of_turn);

  // Behind the sequence's back.
  ASSERT_TRUE(sequence.layer(0).append(k, v).ok());
  expect(sequence.append(0, k, v), Code::layer_drifted, "a layer has 2 tokens; the sequence has 1");

  sequence.clear();
  EXPECT_EQ(sequence.next_position(), Position{0});
  EXPECT_TRUE(sequence.append(0, k, v).ok());
}

TEST(SequenceCache, ALayerThatRefusesKeepsItsTurn) {
  SequenceCache<PagedKvCache<Raas>> sequence(three_layers(), Raas{});
  const Rows rows = rows_of(0);
  ASSERT_TRUE(sequence.append(0, rows.token_k(0), rows.token_v(0)).ok());
  EXPECT_EQ(sequence.append(1, rows.token_k(0).first(3), rows.token_v(0)).code(), Code::wrong_size);
  EXPECT_EQ(sequence.turn(), 1U);
  EXPECT_TRUE(sequence.append(1, rows.token_k(0), rows.token_v(0)).ok());
}

TEST(SequenceCache, EveryLayerGetsTheSameChunkOfThePrompt) {
  SequenceCache<PagedKvCache<Raas>> sequence(three_layers(), Raas{});
  const Rows rows = rows_of(0);
  ASSERT_TRUE(sequence.append_prompt(0, chunk(rows.k, 0, 5), chunk(rows.v, 0, 5)).ok());
  Status status = sequence.append_prompt(1, chunk(rows.k, 0, 4), chunk(rows.v, 0, 4));
  EXPECT_EQ(status.code(), Code::wrong_tokens);
  EXPECT_EQ(status.message(), "a row view has 4 tokens; 5 were expected");
  EXPECT_EQ(sequence.append_prompt(1, std::span(rows.k).first(12 * 6), std::span(rows.v).first(12 * 6)).code(),
            Code::wrong_tokens);
  status = sequence.append(1, rows.token_k(0), rows.token_v(0));
  EXPECT_EQ(status.message(), "layer 1 got a decode token in a step that brings 5 prompt tokens to every layer");
  ASSERT_TRUE(sequence.append_prompt(1, std::span(rows.k).first(12 * 5), std::span(rows.v).first(12 * 5)).ok());
  ASSERT_TRUE(sequence.append_prompt(2, chunk(rows.k, 0, 5), chunk(rows.v, 0, 5)).ok());
  EXPECT_EQ(sequence.next_position(), Position{5});

  ASSERT_TRUE(sequence.append(0, rows.token_k(5), rows.token_v(5)).ok());
  EXPECT_EQ(sequence.append_prompt(1, chunk(rows.k, 5, 1), chunk(rows.v, 5, 1)).code(), Code::prompt_ended);
  EXPECT_TRUE(sequence.layer(1).in_prompt());
}

TEST(SequenceCache, AStepThatALayerCannotTakeIsNoStep) {
  SequenceCache<PagedKvCache<Raas>> sequence(three_layers(), Raas{});
  const Rows rows = rows_of(0);
  // 13 prompt tokens pin 4 pages: too many for layer 0, whose budget is 3.
  EXPECT_EQ(sequence.append_prompt(0, chunk(rows.k, 0, 13), chunk(rows.v, 0, 13)).code(), Code::prompt_exceeds_budget);
  EXPECT_EQ(sequence.turn(), 0U);
  EXPECT_TRUE(sequence.end_prompt().ok());
  EXPECT_FALSE(sequence.layer(2).in_prompt());
}

TEST(SequenceCache, RefusesLayersThatAreNone) {
  using Cache = PagedKvCache<Raas>;
  EXPECT_EQ(refusal([] { SequenceCache<Cache>(std::vector<Cache>{}); }),
            "a sequence has 0 layers; it must have at least 1");
  const Rows rows = rows_of(0);
  std::vector<Cache> layers(2, Cache(small_config()));
  ASSERT_TRUE(layers[1].append(rows.token_k(0), rows.token_v(0)).ok());
  EXPECT_EQ(refusal([&] { SequenceCache<Cache>{layers}; }), "one layer has 0 tokens and another 1");
}

TEST(SequenceCache, TakesTheBytesOfItsLayers) {
  using Cache = PagedKvCache<Raas, Half>;
  std::size_t bytes = 0;
  for (const CacheConfig& config : three_layers()) bytes += sizeof(Cache) + Cache::bytes_required(config);
  EXPECT_EQ((SequenceCache<Cache>::bytes_required(three_layers(), Raas{})), bytes);
}

// --- schedules ---

TEST(LayerSchedule, TheFirstLayersStayDense) {
  LayerChoice layer;
  layer.policy = "raas";
  layer.options = {{"alpha", "0.1"}};
  layer.config = small_config();
  LayerSchedule schedule = uniform_schedule(4, layer);
  keep_first_layers_dense(schedule, 2);
  const std::vector<std::size_t> budgets{24, 8};
  set_budgets(std::span(schedule).subspan(2), budgets);
  for (std::size_t l = 0; l < 4; ++l) {
    EXPECT_EQ(schedule[l].config.layer, l);
    EXPECT_EQ(schedule[l].policy, l < 2 ? "dense" : "raas");
    EXPECT_EQ(schedule[l].options.size(), l < 2 ? 0U : 1U);
  }
  EXPECT_EQ(schedule[2].config.budget_tokens, 24U);
  EXPECT_EQ(schedule[3].config.budget_tokens, 8U);
  keep_first_layers_dense(schedule, 9);
  EXPECT_EQ(schedule[3].policy, "dense");
  EXPECT_EQ(refusal([&] { set_budgets(schedule, budgets); }), "2 budgets came for 4 layers");
}

TEST(LayerSchedule, APyramidSpendsTheWholeBudgetInWholePages) {
  for (const std::size_t layers : {1U, 2U, 3U, 28U, 32U, 61U}) {
    for (const std::size_t page_size : {1U, 4U, 16U}) {
      for (const double beta : {1.0, 2.0, 20.0}) {
        for (const std::size_t window : {0U, 32U}) {
          const std::size_t window_pages = std::max<std::size_t>(1, (window + page_size - 1) / page_size);
          for (const std::size_t extra : {0U, 1U, 7U, 100U, 1000U}) {
            const std::size_t pages = layers * window_pages + extra;
            const std::vector<std::size_t> budgets =
                pyramid_budgets(layers, pages * page_size + page_size - 1, page_size, {beta, window});
            ASSERT_EQ(budgets.size(), layers);
            std::size_t sum = 0;
            // The paper's line, from the formula: 2A - A/beta at the bottom, A/beta at the top.
            const double average = static_cast<double>(extra) / static_cast<double>(layers);
            for (std::size_t l = 0; l < layers; ++l) {
              sum += budgets[l];
              const double top = average / beta;
              const double share =
                  layers == 1 ? average
                              : 2 * average - top -
                                    static_cast<double>(l) * (2 * average - 2 * top) / static_cast<double>(layers - 1);
              const double got = static_cast<double>(budgets[l] / page_size - window_pages);
              EXPECT_EQ(budgets[l] % page_size, 0U);
              EXPECT_LT(std::abs(got - share), 1.0) << "layer " << l << " of " << layers;
              EXPECT_LE(budgets[l], budgets[l == 0 ? 0 : l - 1]);
            }
            EXPECT_EQ(sum, pages * page_size);
          }
        }
      }
    }
  }
}

TEST(LayerSchedule, UniformBudgetsDifferByAPageAtMost) {
  EXPECT_EQ(uniform_budgets(4, 64, 4), (std::vector<std::size_t>{16, 16, 16, 16}));
  EXPECT_EQ(uniform_budgets(3, 32, 4), (std::vector<std::size_t>{12, 12, 8}));
}

TEST(LayerSchedule, RefusesABudgetThatDoesNotReach) {
  EXPECT_EQ(refusal([] { return pyramid_budgets(4, 63, 16); }),
            "total_tokens = 63 is less than 1 pages of 16 tokens for each of 4 layers");
  EXPECT_EQ(refusal([] {
              return pyramid_budgets(4, 127, 16, {20.0, 17});
            }),
            "total_tokens = 127 is less than 2 pages of 16 tokens for each of 4 layers");
  EXPECT_NE(refusal([] { return pyramid_budgets(4, 1000, 16, {0.5, 0}); }).find("is less than 1"), std::string::npos);
  EXPECT_NE(refusal([] { return pyramid_budgets(0, 1000, 16); }).find("0 layers"), std::string::npos);
}

}  // namespace
}  // namespace kvsparse_test
