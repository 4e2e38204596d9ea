// SPDX-License-Identifier: Apache-2.0
//
// All layers of a sequence: they cannot drift apart, and each behaves as a cache of its own would.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <string>
#include <vector>

#include "kvsparse/cache/any_cache.hpp"
#include "kvsparse/cache/layer_schedule.hpp"
#include "kvsparse/cache/sequence_cache.hpp"
#include "kvsparse/cache/sequence_table.hpp"
#include "kvsparse/kvsparse.hpp"
#include "support/refusal.hpp"
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
  EXPECT_EQ(status.message(),
            "layer 1 got tokens of another kind than the 5 of this step: prompt, drafts and decoded tokens do not mix");
  ASSERT_TRUE(sequence.append_prompt(1, std::span(rows.k).first(12 * 5), std::span(rows.v).first(12 * 5)).ok());
  ASSERT_TRUE(sequence.append_prompt(2, chunk(rows.k, 0, 5), chunk(rows.v, 0, 5)).ok());
  EXPECT_EQ(sequence.next_position(), Position{5});

  ASSERT_TRUE(sequence.append(0, rows.token_k(5), rows.token_v(5)).ok());
  EXPECT_EQ(sequence.append_prompt(1, chunk(rows.k, 5, 1), chunk(rows.v, 5, 1)).code(), Code::step_differs);
  EXPECT_TRUE(sequence.layer(1).in_prompt());
}

TEST(SequenceCache, EveryLayerGetsTheSameChunkOfDecodedTokens) {
  SequenceCache<PagedKvCache<Raas>> sequence(three_layers(), Raas{});
  const Rows rows = rows_of(0);
  ASSERT_TRUE(sequence.append(0, chunk(rows.k, 0, 3), chunk(rows.v, 0, 3)).ok());
  EXPECT_EQ(sequence.append(1, chunk(rows.k, 0, 2), chunk(rows.v, 0, 2)).message(),
            "a row view has 2 tokens; 3 were expected");
  EXPECT_EQ(sequence.append(1, rows.token_k(0), rows.token_v(0)).code(), Code::wrong_tokens);
  ASSERT_TRUE(sequence.append(1, chunk(rows.k, 0, 3), chunk(rows.v, 0, 3)).ok());
  ASSERT_TRUE(sequence.append(2, chunk(rows.k, 0, 3), chunk(rows.v, 0, 3)).ok());
  EXPECT_EQ(sequence.next_position(), Position{3});
}

TEST(SequenceCache, LayersMayDifferInTheirHeads) {
  std::vector<CacheConfig> configs = three_layers();
  configs[1].kv_heads = 1;
  configs[2].kv_heads = 4;
  SequenceCache<PagedKvCache<Dense>> sequence(configs, Dense{});
  const std::vector<float> rows(5 * 24, 0.25F);
  for (std::size_t l = 0; l < 3; ++l) {
    const auto flat = std::span(rows).first(5 * configs[l].kv_heads * 6);
    const Status status = sequence.append_prompt(l, flat, flat);
    ASSERT_TRUE(status.ok()) << status.message();
  }
  EXPECT_EQ(sequence.next_position(), Position{5});
}

TEST(SequenceCache, AdmissionIsWhatTheLayersThenTake) {
  std::vector<CacheConfig> configs = three_layers();
  configs[1].max_tokens = 20;
  PagePool<float> pool(configs[0].geometry(), PageSummary::none, 100);
  SequenceTable<PagedKvCache<Dense>> table;
  auto& sequence = table.add({4}, SequenceCache<PagedKvCache<Dense>>(configs, pool, Dense{}));
  const std::vector<SequenceId> batch{{4}};
  EXPECT_TRUE(sequence.can_append(20));
  EXPECT_TRUE(sequence.can_append_prompt(20));
  EXPECT_FALSE(sequence.can_append(21)) << "layer 1 has no room for it";
  EXPECT_FALSE(sequence.can_append_prompt(21));
  EXPECT_TRUE(table.can_append(batch, 20));
  EXPECT_FALSE(table.can_append(batch, 21));
  const Rows rows = rows_of(0);
  for (std::size_t l = 0; l < 3; ++l) ASSERT_TRUE(sequence.append(l, chunk(rows.k, 0, 20), chunk(rows.v, 0, 20)).ok());
  EXPECT_FALSE(sequence.can_append(1));
  EXPECT_FALSE(sequence.can_append_prompt(0)) << "the prompt has ended";
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

// --- drafts ---

std::vector<CacheConfig> drafting_layers() {
  std::vector<CacheConfig> layers = three_layers();
  for (CacheConfig& layer : layers) layer.max_speculative = 5;
  return layers;
}

TEST(SequenceCache, RejectedDraftsLeaveNoTraceInAnyLayer) {
  using Cache = PagedKvCache<Raas>;
  SequenceCache<Cache> drafting(drafting_layers(), Raas{}), plain(drafting_layers(), Raas{});
  TestRng rng(5);
  const auto step = [](SequenceCache<Cache>& sequence, std::size_t t) {
    std::vector<float> outputs, out(24);
    for (std::size_t l = 0; l < 3; ++l) {
      const Rows rows = rows_of(l);
      EXPECT_TRUE(sequence.append(l, rows.token_k(t), rows.token_v(t)).ok());
      EXPECT_TRUE(sequence.attend(l, rows.token_q(t), std::span<float>(out)).ok());
      outputs.insert(outputs.end(), out.begin(), out.end());
    }
    return outputs;
  };
  for (std::size_t t = 0; t < 50; ++t) {
    ASSERT_EQ(step(drafting, t), step(plain, t)) << "token " << t;
    const auto drafts = static_cast<std::size_t>(rng.below(6));
    if (drafts == 0) continue;
    // Some layers get drafts that nobody accepts; at times not even all layers, and the step is given up half way.
    const std::size_t layers = rng.below(3) == 0 ? 2 : 3;
    for (std::size_t l = 0; l < layers; ++l) {
      const Rows wrong = rows_of(l + 20);
      ASSERT_TRUE(drafting.append_draft(l, chunk(wrong.k, t, drafts), chunk(wrong.v, t, drafts)).ok());
    }
    if (layers == 2) {
      EXPECT_EQ(drafting.append(2, rows_of(2).token_k(t), rows_of(2).token_v(t)).code(), Code::step_differs);
    }
    ASSERT_TRUE(drafting.truncate({static_cast<std::int64_t>(t + 1)}).ok());
    EXPECT_EQ(drafting.turn(), 0U);
    EXPECT_EQ(drafting.next_position(), (Position{static_cast<std::int64_t>(t + 1)}));
    for (std::size_t l = 0; l < 3; ++l) {
      ASSERT_EQ(drafting.layer(l).resident_positions(0), plain.layer(l).resident_positions(0));
    }
  }
}

TEST(SequenceCache, ALengthThatOneLayerCannotReachIsReachedByNone) {
  using Cache = PagedKvCache<StreamingLlm>;  // remembers nothing, so that only evictions stand in the way
  SequenceCache<Cache> sequence(three_layers(), StreamingLlm{});
  const Rows rows = rows_of(0);
  for (std::size_t t = 0; t < 20; ++t) {
    for (std::size_t l = 0; l < 3; ++l) ASSERT_TRUE(sequence.append(l, rows.token_k(t), rows.token_v(t)).ok());
  }
  // Layer 0, of 12 tokens, last gave up a page to open that of position 16; the others never did.
  EXPECT_LT(sequence.layer(1).oldest_reachable(), 10U);
  EXPECT_EQ(sequence.oldest_reachable(), sequence.layer(0).oldest_reachable());
  const Status status = sequence.truncate({10});
  EXPECT_EQ(status.code(), Code::unreachable_length);
  EXPECT_EQ(status.value(), 10U);
  EXPECT_EQ(status.limit(), sequence.oldest_reachable());
  EXPECT_EQ(sequence.truncate({21}).code(), Code::unreachable_length);
  EXPECT_EQ(sequence.truncate({-1}).code(), Code::unreachable_length);
  for (std::size_t l = 0; l < 3; ++l) EXPECT_EQ(sequence.layer(l).next_position(), Position{20});
  EXPECT_TRUE(sequence.truncate({18}).ok());
  for (std::size_t l = 0; l < 3; ++l) EXPECT_EQ(sequence.layer(l).next_position(), Position{18});
}

// --- layers chosen by name ---

/// The few that these tests need; an engine compiles the whole name table once.
AnyCache choose(const LayerChoice& layer) {
  EXPECT_EQ(layer.keys, layer.values);
  if (layer.policy == "dense") return AnyCache::of<Dense, float>(layer.keys, layer.config, layer.options);
  if (layer.policy == "h2o") return AnyCache::of<H2o, float>(layer.keys, layer.config, layer.options);
  return AnyCache::of<Raas, float>(layer.keys, layer.config, layer.options);
}

TEST(AnySequence, EveryLayerHasItsOwnPolicyOptionsAndBudget) {
  LayerChoice layer;
  layer.policy = "raas";
  layer.options = {{"alpha", "0.05"}};
  layer.config = small_config();
  LayerSchedule schedule = uniform_schedule(4, layer);
  keep_first_layers_dense(schedule, 1);
  schedule[2].policy = "h2o";
  schedule[2].options = {{"pin_prompt", "true"}};
  set_budgets(std::span(schedule).subspan(1), pyramid_budgets(3, 84, 4, {3.0, 0}));
  SequenceCache<AnyCache> sequence(schedule, choose);

  Raas raas;
  raas.options.alpha = 0.05;
  H2o h2o;
  h2o.options.pin_prompt = true;
  PagedKvCache<Dense> layer_0(schedule[0].config);
  PagedKvCache<Raas> layer_1(schedule[1].config, raas);
  PagedKvCache<H2o> layer_2(schedule[2].config, h2o);
  PagedKvCache<Raas> layer_3(schedule[3].config, raas);
  std::vector<float> out(24), expected(24);
  for (std::size_t t = 0; t < 60; ++t) {
    const auto step = [&](std::size_t l, auto& alone) {
      const Rows rows = rows_of(l);
      const auto k = rows.token_k(t), v = rows.token_v(t);
      ASSERT_TRUE((t < 5 ? sequence.append_prompt(l, k, v) : sequence.append(l, k, v)).ok());
      ASSERT_TRUE((t < 5 ? alone.append_prompt(k, v) : alone.append(k, v)).ok());
      ASSERT_TRUE(sequence.attend(l, rows.token_q(t), std::span<float>(out)).ok());
      ASSERT_TRUE(attend(alone, rows.token_q(t), expected).ok());
      ASSERT_EQ(out, expected) << "layer " << l << ", token " << t;
    };
    step(0, layer_0);
    step(1, layer_1);
    step(2, layer_2);
    step(3, layer_3);
  }
  EXPECT_EQ(sequence.layer(0).stats().resident_tokens, 60U);
  EXPECT_GT(sequence.layer(1).stats().peak_resident_tokens, sequence.layer(2).stats().peak_resident_tokens);
  EXPECT_GT(sequence.layer(2).stats().peak_resident_tokens, sequence.layer(3).stats().peak_resident_tokens);
  // Layer 3 has room for its prompt and the open page alone, so its policy never had anything to judge.
  EXPECT_TRUE(std::isnan(layer_3.stats().used_page_share));
  EXPECT_EQ(sequence.stats().used_page_share, layer_1.stats().used_page_share);
}

TEST(AnySequence, KeysAndValuesHaveTypesOfTheirOwn) {
  LayerChoice layer;
  layer.policy = "raas";
  layer.config = small_config();
  layer.keys = ScalarType::f16;
  layer.values = ScalarType::int8;
  PagePool<Half, Int8> pool(layer.config.geometry(), PageSummary::none, 16);
  const auto make = [&](const LayerChoice& choice) {
    EXPECT_EQ(choice.values, ScalarType::int8);
    const std::vector<OptionSetting>& options = choice.options;
    if (choice.keys == ScalarType::f32) return AnyCache::of_pair<Raas, float, Int8>(choice.config, options);
    return AnyCache::of_pair<Raas, Half, Int8>(choice.config, pool, options);
  };
  LayerSchedule schedule = uniform_schedule(2, layer);
  schedule[1].keys = ScalarType::f32;
  SequenceCache<AnyCache> sequence(schedule, make);
  PagedKvCache<Raas, Half, Int8> layer_0(schedule[0].config);
  PagedKvCache<Raas, float, Int8> layer_1(schedule[1].config);
  const Rows rows = rows_of(0);
  std::vector<float> out(24), expected(24);
  for (std::size_t t = 0; t < 40; ++t) {
    const auto step = [&](std::size_t l, auto& alone) {
      ASSERT_TRUE(sequence.append(l, rows.token_k(t), rows.token_v(t)).ok());
      ASSERT_TRUE(alone.append(rows.token_k(t), rows.token_v(t)).ok());
      ASSERT_TRUE(sequence.attend(l, rows.token_q(t), std::span<float>(out)).ok());
      ASSERT_TRUE(attend(alone, rows.token_q(t), expected).ok());
      ASSERT_EQ(out, expected) << "layer " << l << ", token " << t;
    };
    step(0, layer_0);
    step(1, layer_1);
  }
  EXPECT_EQ(pool.page_count() - pool.free_pages(), 8U);
}

// --- many sequences ---

TEST(SequenceTable, ABatchInAnyOrderNeverMixesPolicyState) {
  LayerChoice layer;
  layer.config = small_config();
  layer.policy = "raas";
  const LayerSchedule all_raas = uniform_schedule(2, layer);
  LayerSchedule with_h2o = all_raas;
  with_h2o[1].policy = "h2o";
  const auto make = [&](std::uint64_t id) {
    return SequenceCache<AnyCache>(id % 2 == 0 ? all_raas : with_h2o, choose);
  };

  // Every sequence by itself: its outputs, token by token.
  constexpr std::size_t longest = 50;
  const auto rows_for = [](std::uint64_t id, std::size_t l) { return Rows(longest, small_config(), 100 * id + l); };
  const auto step = [&](SequenceCache<AnyCache>& sequence, std::uint64_t id, std::size_t t) {
    std::vector<float> outputs, out(24);
    for (std::size_t l = 0; l < 2; ++l) {
      const Rows rows = rows_for(id, l);
      EXPECT_TRUE(sequence.append(l, rows.token_k(t), rows.token_v(t)).ok());
      EXPECT_TRUE(sequence.attend(l, rows.token_q(t), std::span<float>(out)).ok());
      outputs.insert(outputs.end(), out.begin(), out.end());
    }
    return outputs;
  };
  constexpr std::uint64_t ids[] = {7, 2, 40, 3, 18, 5};
  std::vector<std::vector<std::vector<float>>> alone;
  for (const std::uint64_t id : ids) {
    SequenceCache<AnyCache> sequence = make(id);
    std::vector<std::vector<float>>& outputs = alone.emplace_back();
    for (std::size_t t = 0; t < longest; ++t) outputs.push_back(step(sequence, id, t));
  }

  // The same in batches that are shuffled, condensed and refilled at every step.
  SequenceTable<AnyCache> table;
  std::vector<std::size_t> done(std::size(ids));
  TestRng rng(3);
  while (*std::min_element(done.begin(), done.end()) < longest) {
    std::vector<std::size_t> batch;
    for (std::size_t i = 0; i < std::size(ids); ++i) {
      if (done[i] < longest && rng.below(3) > 0)
        batch.insert(batch.begin() + rng.below(static_cast<int>(batch.size()) + 1), i);
    }
    for (const std::size_t i : batch) {
      const SequenceId id{ids[i]};
      if (!table.contains(id)) table.add(id, make(ids[i]));
      EXPECT_EQ(table.at(id).next_position(), (Position{static_cast<std::int64_t>(done[i])}));
      ASSERT_EQ(step(table.at(id), ids[i], done[i]), alone[i][done[i]])
          << "sequence " << ids[i] << ", token " << done[i];
      ++done[i];
      EXPECT_EQ(done[i] == longest && table.remove(id), done[i] == longest);
    }
  }
  EXPECT_EQ(table.size(), 0U);
}

TEST(SequenceTable, KnowsItsSequencesById) {
  using Cache = PagedKvCache<Raas>;
  SequenceTable<Cache> table;
  SequenceCache<Cache>& first = table.add({9}, SequenceCache<Cache>(three_layers(), Raas{}));
  for (std::uint64_t id = 0; id < 8; ++id) table.add({id}, SequenceCache<Cache>(three_layers(), Raas{}));
  EXPECT_EQ(&table.at({9}), &first);
  EXPECT_EQ(table.find({10}), nullptr);
  EXPECT_TRUE(table.remove({4}));
  EXPECT_FALSE(table.remove({4}));
  EXPECT_EQ(table.ids(), (std::vector<SequenceId>{{0}, {1}, {2}, {3}, {5}, {6}, {7}, {9}}));
  EXPECT_EQ(refusal([&] { table.at({4}); }), "there is no sequence 4 among the 8");
  EXPECT_EQ(refusal([&] { table.add({9}, SequenceCache<Cache>(three_layers(), Raas{})); }),
            "sequence 9 is already there");
  table.clear();
  EXPECT_EQ(table.size(), 0U);
}

/// Whether a head of this layer must open a page without giving one up, written down once more.
std::size_t pages_wanted(const SequenceCache<PagedKvCache<Raas>>& sequence, const std::vector<CacheConfig>& configs) {
  const auto length = static_cast<std::size_t>(sequence.next_position().value);
  std::size_t pages = 0;
  for (const CacheConfig& config : configs) pages += length % 4 == 0 && length < config.budget_tokens ? 2 : 0;
  return pages;
}

TEST(SequenceTable, ABatchIsAdmittedWhenThePoolHasItsPages) {
  using Cache = PagedKvCache<Raas>;
  const std::vector<CacheConfig> configs = three_layers();
  PagePool<float> pool(configs[0].geometry(), PageSummary::none, 100);  // a full sequence holds 3 + 5 + 7 pages a head
  SequenceTable<Cache> table;
  TestRng rng(11);
  const Rows rows = rows_of(0);
  std::size_t admitted = 0, denied = 0;
  for (std::uint64_t next_id = 0, round = 0; round < 400; ++round) {
    if (table.size() < 6) table.add({next_id++}, SequenceCache<Cache>(configs, pool, Raas{}));
    std::vector<SequenceId> batch;
    std::size_t wanted = 0;
    for (const SequenceId id : table.ids()) {
      if (rng.below(4) == 0) continue;
      batch.push_back(id);
      wanted += pages_wanted(table.at(id), configs);
    }
    ASSERT_EQ(table.can_append(batch, 1), wanted <= pool.free_pages()) << "round " << round;
    if (wanted > pool.free_pages()) {
      ++denied;
      ASSERT_TRUE(table.remove(batch.front()));
      continue;
    }
    ++admitted;
    for (const SequenceId id : batch) {
      for (std::size_t l = 0; l < 3; ++l) ASSERT_TRUE(table.at(id).append(l, rows.token_k(0), rows.token_v(0)).ok());
    }
  }
  EXPECT_GT(admitted, 100U);
  EXPECT_GT(denied, 10U);
  const std::size_t held = pool.page_count() - pool.free_pages();
  std::size_t reclaimable = 0;
  for (const SequenceId id : table.ids()) reclaimable += table.at(id).bytes_reclaimable();
  EXPECT_EQ(reclaimable, held * pool.bytes_per_page());
  table.clear();
  EXPECT_EQ(pool.free_pages(), pool.page_count());
}

TEST(SequenceTable, AForkGoesOnByItself) {
  using Cache = PagedKvCache<Raas>;
  const std::vector<CacheConfig> configs = three_layers();
  PagePool<float> pool(configs[0].geometry(), PageSummary::none, 100);
  SequenceTable<Cache> table;
  table.add({1}, SequenceCache<Cache>(configs, pool, Raas{}));
  SequenceCache<Cache> alone(configs, Raas{});
  const auto step = [](SequenceCache<Cache>& sequence, std::size_t t, std::size_t seed) {
    const Rows rows = rows_of(seed);
    std::vector<float> outputs, out(24);
    for (std::size_t l = 0; l < 3; ++l) {
      EXPECT_TRUE((t < 6 ? sequence.append_prompt(l, rows.token_k(t), rows.token_v(t))
                         : sequence.append(l, rows.token_k(t), rows.token_v(t)))
                      .ok());
      EXPECT_TRUE(sequence.attend(l, rows.token_q(t), std::span<float>(out)).ok());
      outputs.insert(outputs.end(), out.begin(), out.end());
    }
    return outputs;
  };
  for (std::size_t t = 0; t < 10; ++t) {
    step(table.at({1}), t, 0);
    step(alone, t, 0);
  }
  const std::size_t before = pool.free_pages();
  table.fork({1}, {2});
  EXPECT_EQ(pool.free_pages(), before);  // no page is copied before somebody writes
  EXPECT_EQ(table.at({1}).bytes_reclaimable(), 0U);
  EXPECT_EQ(table.at({1}).stats().shared_bytes, 3 * 2 * 3 * pool.bytes_per_page());
  SequenceCache<Cache> other = alone;
  for (std::size_t t = 10; t < 50; ++t) {
    ASSERT_EQ(step(table.at({1}), t, 0), step(alone, t, 0));
    ASSERT_EQ(step(table.at({2}), t, 4), step(other, t, 4));
  }
  EXPECT_EQ(refusal([&] { table.fork({1}, {2}); }), "sequence 2 is already there");
  EXPECT_EQ(refusal([&] { table.fork({7}, {3}); }), "there is no sequence 7 among the 2");
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
