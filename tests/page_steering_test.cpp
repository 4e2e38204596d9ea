// SPDX-License-Identifier: Apache-2.0
//
// A policy steers an engine that knows nothing of our storage: its own blocks, its own kernel, written here in double
// from the formula. What it holds, reads and computes is what PagedKvCache and attend() do.
#include "kvsparse/interop/page_steering.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "kvsparse/kvsparse.hpp"
#include "kvsparse/policy/options.hpp"
#include "kvsparse/policy/snap_kv.hpp"
#include "support/rows.hpp"

namespace kvsparse_test {
namespace {

using namespace kvsparse;
using Code = Status::Code;

/// The engine: a block allocator and rows of keys and values, [block, slot, head_dim].
struct Engine {
  Engine(std::size_t blocks, std::size_t page_tokens, std::size_t dim)
      : page_size(page_tokens), head_dim(dim), keys(blocks * page_tokens * dim), values(keys.size()) {
    for (std::size_t i = 0; i < blocks; ++i) free.push_back({static_cast<std::uint32_t>(i * 7 % blocks)});
  }
  PageId acquire() {
    if (free.empty()) throw std::runtime_error("no block is free");
    const PageId block = free.back();
    free.pop_back();
    taken.insert(block.value);
    return block;
  }
  void release(PageId block) {
    if (taken.erase(block.value) == 0) throw std::runtime_error("a block came back that was not taken");
    free.insert(free.begin(), block);
  }
  float* key(PageId block, Slot slot) { return keys.data() + (block.value * page_size + slot.value) * head_dim; }
  float* value(PageId block, Slot slot) { return values.data() + (block.value * page_size + slot.value) * head_dim; }

  std::size_t page_size, head_dim;
  std::vector<float> keys, values;
  std::vector<PageId> free;
  std::set<std::uint32_t> taken;
};

/// One row of a CSR list under some query heads: outputs, log-sum-exp, and each page's share of each query head's
/// softmax, [pages, queries].
struct RowResult {
  std::vector<std::vector<double>> out;
  std::vector<float> log_sum_exp, page_mass;
};
RowResult run_row(Engine& engine, std::span<const std::int32_t> pages, std::size_t last_page_len,
                  const std::vector<std::span<const float>>& queries, double scale) {
  RowResult result;
  result.page_mass.resize(pages.size() * queries.size());
  for (std::size_t q = 0; q < queries.size(); ++q) {
    std::vector<double> page_sums(pages.size()), out(engine.head_dim);
    double sum = 0.0;
    for (std::size_t i = 0; i < pages.size(); ++i) {
      const PageId block{static_cast<std::uint32_t>(pages[i])};
      for (std::uint32_t slot = 0; slot < (i + 1 == pages.size() ? last_page_len : engine.page_size); ++slot) {
        double logit = 0.0;
        for (std::size_t d = 0; d < engine.head_dim; ++d) {
          logit += static_cast<double>(queries[q][d]) * static_cast<double>(engine.key(block, {slot})[d]);
        }
        const double weight = std::exp(logit * scale);
        page_sums[i] += weight;
        for (std::size_t d = 0; d < engine.head_dim; ++d) {
          out[d] += weight * static_cast<double>(engine.value(block, {slot})[d]);
        }
      }
      sum += page_sums[i];
    }
    for (double& x : out) x /= sum;
    result.out.push_back(out);
    result.log_sum_exp.push_back(static_cast<float>(std::log(sum)));
    for (std::size_t i = 0; i < pages.size(); ++i) {
      result.page_mass[i * queries.size() + q] = static_cast<float>(page_sums[i] / sum);
    }
  }
  return result;
}

/// How a policy that wants to looks at the engine's rows: `store` is the Engine.
Engine& engine_of(const void* store) { return *static_cast<Engine*>(const_cast<void*>(store)); }
void load_bounds(const void* store, PageId block, std::span<float> lowest, std::span<float> highest) {
  // The engine of this test never writes a key of zeros: such a slot is empty.
  bool first = true;
  for (std::uint32_t slot = 0; slot < engine_of(store).page_size; ++slot) {
    const float* key = engine_of(store).key(block, {slot});
    if (key[0] == 0.0F) continue;
    for (std::size_t i = 0; i < lowest.size(); ++i) {
      lowest[i] = first ? key[i] : std::min(lowest[i], key[i]);
      highest[i] = first ? key[i] : std::max(highest[i], key[i]);
    }
    first = false;
  }
}
RowAccess engine_rows() {
  RowAccess rows;
  rows.load_key = [](const void* store, PageId block, Slot slot, std::span<float> row) {
    std::copy_n(engine_of(store).key(block, slot), row.size(), row.begin());
  };
  rows.load_value = [](const void* store, PageId block, Slot slot, std::span<float> row) {
    std::copy_n(engine_of(store).value(block, slot), row.size(), row.begin());
  };
  rows.load_bounds = load_bounds;
  rows.upper_bounds = upper_bounds_from<load_bounds>;
  return rows;
}

CacheConfig config_of(std::size_t page_size) {
  CacheConfig config;
  config.query_heads = 6;
  config.kv_heads = 2;
  config.head_dim = 10;
  config.page_size = page_size;
  config.budget_tokens = 6 * page_size;
  config.read_budget_tokens = 3 * page_size;
  config.max_tokens = 30 * page_size;
  return config;
}

/// Steers the engine and compares, step by step. chunk: tokens of the prompt that come at once, without queries.
template <class Policy>
void expect_what_the_cache_does(std::size_t page_size, std::size_t chunk, const Policy& policy = {},
                                const RowAccess& access = {}) {
  SCOPED_TRACE(std::string(Policy::name) + ", pages of " + std::to_string(page_size));
  const CacheConfig config = config_of(page_size);
  const std::size_t tokens = 20 * page_size + 1;
  const Rows rows(tokens, config, 21 + page_size, 2.0);
  PagedKvCache<Policy> cache(config, policy);
  Engine engine(2 * 31, page_size, config.head_dim);
  PageSteering<Policy, Engine> steering(config, engine, policy, access, &engine);
  const auto store = [&](std::size_t t, std::size_t h, PageId block, Slot slot) {
    if (slot.value == 0) std::fill_n(engine.key(block, slot), page_size * config.head_dim, 0.0F);
    std::copy_n(rows.key(t, h).data(), config.head_dim, engine.key(block, slot));
    std::copy_n(rows.value(t, h).data(), config.head_dim, engine.value(block, slot));
  };
  std::vector<float> out(config.query_heads * config.head_dim), lse(config.query_heads);
  std::vector<std::int32_t> indptr(7), indices(1000), last_page_len(6);
  CsrPageLists lists(indptr, indices, last_page_len);

  for (std::size_t t = 0; t < tokens; ++t) {
    if (t == 0 && chunk > 0) {
      for (; t + 1 < chunk; ++t) ASSERT_TRUE(cache.append_prompt(rows.token_k(t), rows.token_v(t)).ok());
      ASSERT_TRUE(cache.append_prompt(rows.token_k(t), rows.token_v(t)).ok());
      ASSERT_TRUE(steering.append_prompt(chunk, store).ok());
    } else {
      ASSERT_TRUE(cache.append(rows.token_k(t), rows.token_v(t)).ok());
      ASSERT_TRUE(steering.append([&](std::size_t h, PageId block, Slot slot) { store(t, h, block, slot); }).ok());
    }
    ASSERT_TRUE(attend(cache, rows.token_q(t), out, lse).ok());

    const HeadRows<const float> q(rows.token_q(t).data(), config.query_heads, config.head_dim);
    lists.clear();
    ASSERT_TRUE(steering.select(q, lists).ok());
    const std::size_t queries = config.query_heads / lists.rows();
    std::vector<float> page_mass, log_sum_exp;
    for (std::size_t row = 0; row < lists.rows(); ++row) {
      std::vector<std::span<const float>> of_row;
      for (std::size_t i = 0; i < queries; ++i) of_row.push_back(rows.query(t, row * queries + i));
      const auto begin = static_cast<std::size_t>(lists.kv_indptr()[row]);
      const auto end = static_cast<std::size_t>(lists.kv_indptr()[row + 1]);
      const RowResult result = run_row(engine, lists.kv_indices().subspan(begin, end - begin),
                                       static_cast<std::size_t>(lists.last_page_len()[row]), of_row, rows.scale());
      page_mass.insert(page_mass.end(), result.page_mass.begin(), result.page_mass.end());
      log_sum_exp.insert(log_sum_exp.end(), result.log_sum_exp.begin(), result.log_sum_exp.end());
      for (std::size_t i = 0; i < queries; ++i) {
        for (std::size_t d = 0; d < config.head_dim; ++d) {
          ASSERT_NEAR(result.out[i][d], static_cast<double>(out[(row * queries + i) * config.head_dim + d]), 3e-5);
        }
      }
    }
    ASSERT_TRUE(steering.observe(q, page_mass, log_sum_exp).ok());

    std::size_t held = 0;
    for (std::size_t h = 0; h < config.kv_heads; ++h) {
      ASSERT_EQ(steering.resident_positions(h), cache.resident_positions(h)) << "after token " << t;
      ASSERT_EQ(steering.read_positions(h), cache.read_positions(h)) << "after token " << t;
      held += steering.table(h).size();
    }
    ASSERT_EQ(engine.taken.size(), held) << "the engine lends exactly the pages that are held";
  }
  const CacheStats mine = steering.stats(1), theirs = cache.stats();
  EXPECT_EQ(mine.evicted_tokens, theirs.evicted_tokens);
  EXPECT_EQ(mine.last_read_tokens, theirs.last_read_tokens);
  EXPECT_EQ(mine.last_skipped_tokens, theirs.last_skipped_tokens);
  EXPECT_TRUE(!Evictor<Policy> || mine.evicted_tokens > 0);
}

/// All heads give up the page with the least mass over all heads, at the end of each step.
struct LeastOfLayer {
  static constexpr std::string_view name = "least_of_layer";
  static constexpr PolicyScope scope = PolicyScope::layer;
  static constexpr EvidenceKind evidence = EvidenceKind::page_mass;
  struct PageState {
    float mass = 0.0F;
    float of_layer = 0.0F;
  };
  void observe(HeadView<LeastOfLayer> head, const Evidence& step) const {
    for (const PageIndex page : head.pages()) head.state(page).mass = step.group_mass(page);
  }
  void on_step_end(LayerView<LeastOfLayer> layer) const {
    for (const PageIndex page : layer.head(0).pages()) {
      float sum = 0.0F;
      for (std::size_t h = 0; h < layer.heads(); ++h) sum += layer.head(h).state(page).mass;
      layer.head(0).state(page).of_layer = sum;
    }
  }
  PageIndex victim(LayerView<LeastOfLayer> layer) const {
    const HeadView<LeastOfLayer> head = layer.head(0);
    return head.lowest_evictable([&](PageIndex page) { return head.state(page).of_layer; });
  }
};

template <class Policy>
Policy each_query_head_selects() {
  Policy policy;
  EXPECT_TRUE(set_option(policy, {"pool", "query_head"}));
  return policy;
}

TEST(PageSteering, AnEngineHoldsReadsAndComputesWhatTheCacheDoes) {
  for (const std::size_t page_size : {1U, 4U, 7U}) {
    expect_what_the_cache_does<Dense>(page_size, 0);
    expect_what_the_cache_does<StreamingLlm>(page_size, 3);
    expect_what_the_cache_does<H2o>(page_size, page_size + 1);
    expect_what_the_cache_does<Raas>(page_size, page_size + 1);
    expect_what_the_cache_does<Random>(page_size, 1);
    expect_what_the_cache_does<LeastOfLayer>(page_size, 2);
  }
}

TEST(PageSteering, APolicyLooksAtRowsThatTheEngineLends) {
  const RowAccess access = engine_rows();
  for (const std::size_t page_size : {1U, 4U, 7U}) {
    expect_what_the_cache_does<Quest>(page_size, page_size + 1, {}, access);
    expect_what_the_cache_does<Compose<Raas, Quest>>(page_size, page_size + 1, {}, access);
    expect_what_the_cache_does(page_size, 2, each_query_head_selects<Quest>(), access);
    expect_what_the_cache_does(page_size, 2, each_query_head_selects<Compose<Raas, Quest>>(), access);
    expect_what_the_cache_does<Kindred>(page_size, page_size + 1, {}, access);
  }
}

template <class Policy>
std::string refusal(const Policy& policy = {}, const RowAccess& access = {}) {
  Engine engine(1, 4, 10);
  try {
    const PageSteering<Policy, Engine> steering(config_of(4), engine, policy, access);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "";
}

struct WantsTokens : Dense {
  static constexpr std::string_view name = "wants_tokens";
  static constexpr EvidenceKind evidence = EvidenceKind::page_mass | EvidenceKind::token_weights;
  void observe(HeadView<WantsTokens>, const Evidence&) const {}
};
struct SelectsAgain {
  static constexpr std::string_view name = "selects_again";
  void select(HeadView<SelectsAgain>, QueryGroup, Selection&) const {}
  void select_more(HeadView<SelectsAgain>, QueryGroup, std::span<const SoftmaxState>, Selection&) const {}
};
struct WantsMeans {
  static constexpr std::string_view name = "wants_means";
  static constexpr PageSummary page_summary = PageSummary::mean;
};

TEST(PageSteering, APolicyThatNeedsWhatTheEngineDoesNotGiveIsRefusedByName) {
  EXPECT_NE(refusal<Quest>().find("policy quest"), std::string::npos);
  EXPECT_NE(refusal<Quest>().find("load_bounds"), std::string::npos);
  EXPECT_NE((refusal<Compose<Raas, Quest>>().find("load_bounds")), std::string::npos);
  EXPECT_NE(refusal<Kindred>().find("load_value"), std::string::npos);
  EXPECT_NE(refusal<Oracle>({}, engine_rows()).find("parts of pages"), std::string::npos);
  EXPECT_NE(refusal<WantsTokens>().find("page masses alone"), std::string::npos);
  EXPECT_NE(refusal<SelectsAgain>().find("selects again"), std::string::npos);
  EXPECT_NE(refusal<WantsMeans>().find("load_key_sum"), std::string::npos);
  EXPECT_EQ(refusal<Kindred>({}, engine_rows()), "");
  StreamingLlm in_cache;
  in_cache.options.in_cache_positions = true;
  EXPECT_NE(refusal(in_cache).find("counts positions in the cache"), std::string::npos);
  EXPECT_EQ(refusal<Raas>(), "");
}

TEST(PageSteering, EveryPageGoesBackToItsOwner) {
  const CacheConfig config = config_of(4);
  Engine engine(40, 4, config.head_dim);
  const auto nowhere = [](std::size_t, PageId, Slot) {};
  {
    PageSteering<H2o, Engine> steering(config, engine);
    for (int i = 0; i < 50; ++i) ASSERT_TRUE(steering.append(nowhere).ok());
    EXPECT_EQ(engine.taken.size(), 2 * 6U);
    PageSteering<H2o, Engine> moved = std::move(steering);
    EXPECT_EQ(engine.taken.size(), 2 * 6U);
    moved.clear();
    EXPECT_TRUE(engine.taken.empty());
    EXPECT_EQ(moved.next_position(), Position{0});
    ASSERT_TRUE(moved.append(nowhere).ok());
    PageSteering<H2o, Engine> other(config, engine);
    ASSERT_TRUE(other.append(nowhere).ok());
    EXPECT_EQ(engine.taken.size(), 4U);
    moved = std::move(other);
    EXPECT_EQ(engine.taken.size(), 2U);
  }
  EXPECT_TRUE(engine.taken.empty());
}

TEST(PageSteering, MassesThatDoNotFitTheListsAreRefused) {
  const CacheConfig config = config_of(4);
  Engine engine(40, 4, config.head_dim);
  PageSteering<Raas, Engine> steering(config, engine);
  const std::vector<float> q(60), masses(6), lse(6);
  const HeadRows<const float> rows(q.data(), 6, 10);
  std::vector<std::int32_t> indptr(7), indices(100), last_page_len(6);
  CsrPageLists lists(indptr, indices, last_page_len);
  EXPECT_EQ(steering.observe(rows, masses, lse).code(), Code::query_is_over);
  EXPECT_EQ(steering.select(rows, lists).code(), Code::nothing_to_attend);
  ASSERT_TRUE(steering.append([](std::size_t, PageId, Slot) {}).ok());
  EXPECT_EQ(steering.observe(rows, masses, lse).code(), Code::query_is_over) << "nothing is selected yet";
  ASSERT_TRUE(steering.select(rows, lists).ok());
  EXPECT_EQ(steering.observe(rows, std::span(masses).first(5), lse).code(), Code::wrong_size);
  EXPECT_EQ(steering.observe(rows, masses, std::span(lse).first(5)).code(), Code::wrong_size);
  EXPECT_EQ(steering.observe({q.data(), 5, 10}, masses, lse).code(), Code::wrong_heads);
  ASSERT_TRUE(steering.observe(rows, masses, lse).ok()) << "one page in each of two heads, three queries each";
  EXPECT_EQ(steering.observe(rows, masses, lse).code(), Code::query_is_over) << "a query is observed once";
  ASSERT_TRUE(steering.select(rows, lists).ok());
  ASSERT_TRUE(steering.append([](std::size_t, PageId, Slot) {}).ok());
  EXPECT_EQ(steering.observe(rows, masses, lse).code(), Code::query_is_over) << "a token came since";
}

TEST(PageSteering, WhatWasSelectedBeforePagesWentIsNotObserved) {
  const CacheConfig config = config_of(4);
  Engine engine(40, 4, config.head_dim);
  SnapKv votes;
  votes.options.window = 4;
  votes.options.period = 8;  // gives up pages at the end of the prompt
  PageSteering<SnapKv, Engine> steering(config, engine, votes, engine_rows(), &engine);
  const auto nowhere = [](auto...) {};
  const std::vector<float> q(60);
  const HeadRows<const float> rows(q.data(), 6, 10);
  std::vector<std::int32_t> indptr(7), indices(100), last_page_len(6);
  CsrPageLists lists(indptr, indices, last_page_len);
  ASSERT_TRUE(steering.append_prompt(23, nowhere).ok());
  for (int query = 0; query < 4; ++query) {
    lists.clear();
    ASSERT_TRUE(steering.select(rows, lists).ok());
    ASSERT_TRUE(steering.observe(rows, {}, {}).ok());
  }
  ASSERT_TRUE(steering.select(rows, lists).ok());
  const std::size_t held = engine.taken.size();
  steering.end_prompt();
  ASSERT_LT(engine.taken.size(), held);
  EXPECT_EQ(steering.observe(rows, {}, {}).code(), Code::query_is_over);

  ASSERT_TRUE(steering.select(rows, lists).ok());
  steering.clear();
  ASSERT_TRUE(steering.append_prompt(23, nowhere).ok());
  EXPECT_EQ(steering.observe(rows, {}, {}).code(), Code::query_is_over) << "of a sequence that is gone";
}

TEST(PageSteering, TheOwnerIsAskedForWhatWasAnnounced) {
  const CacheConfig config = config_of(4);
  Engine engine(100, 4, config.head_dim);
  PageSteering<Raas, Engine> steering(config, engine);
  const auto nowhere = [](auto...) {};
  EXPECT_EQ(steering.pages_wanted(9), 2 * 3U);
  ASSERT_TRUE(steering.append_prompt(9, nowhere).ok());
  for (int t = 0; t < 40; ++t) {
    const std::size_t before = engine.taken.size(), wanted = steering.pages_wanted(1);
    ASSERT_TRUE(steering.append(nowhere).ok());
    ASSERT_EQ(engine.taken.size() - before, wanted) << "token " << t;
  }
  auto& itself = steering;
  steering = std::move(itself);
  EXPECT_EQ(engine.taken.size(), 2 * 6U);
  EXPECT_EQ(steering.resident_tokens(0), 21U);
}

TEST(PageSteering, RefusesTheTokensThatACacheRefuses) {
  const CacheConfig config = config_of(4);
  Engine engine(200, 4, config.head_dim);
  PageSteering<Raas, Engine> raas(config, engine);
  std::size_t stored = 0;
  const auto count = [&](std::size_t, std::size_t, PageId, Slot) { ++stored; };
  EXPECT_EQ(raas.append_prompt(6 * 4, count).code(), Code::prompt_exceeds_budget);
  EXPECT_EQ(stored, 0U);
  EXPECT_TRUE(engine.taken.empty());
  ASSERT_TRUE(raas.append_prompt(5 * 4, count).ok());
  EXPECT_EQ(stored, 2 * 20U);
  raas.end_prompt();
  EXPECT_EQ(raas.append_prompt(1, count).code(), Code::prompt_ended);
}

TEST(PagesOfAllHeads, APageIsTakenOnceAndComesBackWhenTheLastHeadLetsGo) {
  const CacheConfig config = config_of(4);
  Engine engine(40, 4, config.head_dim);
  PagesOfAllHeads blocks(engine, config.kv_heads, 40);
  const std::vector<float> q(60);
  std::vector<std::int32_t> indptr(3), indices(100), last_page_len(2);
  CsrPageLists lists(indptr, indices, last_page_len);
  {
    PageSteering<StreamingLlm, PagesOfAllHeads<Engine>> steering(config, blocks);
    for (int i = 0; i < 61; ++i) {
      std::vector<std::uint32_t> written;
      ASSERT_TRUE(steering.append([&](std::size_t, PageId page, Slot) { written.push_back(page.value); }).ok());
      EXPECT_EQ(written[0], written[1]) << "one block holds both heads";
      EXPECT_EQ(engine.taken.size(), steering.table(0).size());
      lists.clear();
      ASSERT_TRUE(list_resident_shared(steering, lists).ok());
      EXPECT_EQ(lists.rows(), 1U);
    }
    EXPECT_EQ(engine.taken.size(), 6U);
  }
  EXPECT_TRUE(engine.taken.empty());
  {
    PageSteering<Random, PagesOfAllHeads<Engine>> steering(config, blocks);  // its heads differ
    for (int i = 0; i < 61; ++i) ASSERT_TRUE(steering.append([](std::size_t, PageId, Slot) {}).ok());
    std::set<std::uint32_t> held;
    for (std::size_t h = 0; h < 2; ++h) {
      for (std::uint32_t page = 0; page < 6; ++page) held.insert(steering.table(h)[{page}].page.value);
    }
    EXPECT_EQ(engine.taken, held);
    EXPECT_GT(held.size(), 6U);
    lists.clear();
    EXPECT_EQ(list_resident_shared(steering, lists).code(), Code::heads_differ);
    EXPECT_TRUE(list_resident(steering, lists).ok());
  }
  EXPECT_TRUE(engine.taken.empty());
}

}  // namespace
}  // namespace kvsparse_test
