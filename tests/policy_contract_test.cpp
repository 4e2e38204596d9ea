// SPDX-License-Identifier: Apache-2.0
//
// What the container promises the author of a policy: which verb comes when, with which view, and whose state is whose.
// The policies here are small cousins of those that later issues bring.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "kvsparse/cache/attend.hpp"
#include "kvsparse/policy/compose.hpp"
#include "kvsparse/policy/quest.hpp"
#include "kvsparse/policy/streaming_llm.hpp"
#include "support/rows.hpp"

namespace kvsparse_test {
namespace {

using namespace kvsparse;

template <class Cache>
std::vector<std::size_t> resident(const Cache& cache, std::size_t kv_head) {
  std::vector<std::size_t> result;
  for (const Position position : cache.resident_positions(kv_head)) {
    result.push_back(static_cast<std::size_t>(position.value));
  }
  return result;
}

// ------------------------------------------------------------------------------------------------------- layer scope

/// TOVA: all heads of the layer give up the token that the newest query looked at least, on average over the heads.
struct MiniTova {
  static constexpr std::string_view name = "mini_tova";
  static constexpr PolicyScope scope = PolicyScope::layer;
  static constexpr EvidenceKind evidence = EvidenceKind::page_mass;
  struct PageState {
    float mass = 0.0F;
  };
  struct LayerState {
    int steps = 0;
  };
  std::vector<int>* steps_at_eviction = nullptr;
  void observe(HeadView<MiniTova> head, const Evidence& step) const {
    for (const PageIndex page : head.pages()) head.state(page).mass = step.group_mass(page);
  }
  void on_step_end(LayerView<MiniTova> layer) const { ++layer.layer_state().steps; }
  PageIndex victim(LayerView<MiniTova> layer) const {
    steps_at_eviction->push_back(layer.layer_state().steps);
    return layer.head(0).lowest_evictable([&](PageIndex page) {
      float mass = 0.0F;
      for (std::size_t h = 0; h < layer.heads(); ++h) mass += layer.head(h).state(page).mass;
      return mass;
    });
  }
};

TEST(LayerScope, AllHeadsGiveUpTheTokenThatTheLayerNamed) {
  const CacheConfig config{.query_heads = 6, .kv_heads = 3, .head_dim = 16, .page_size = 1, .budget_tokens = 9};
  const Rows rows(70, config, 1);
  std::vector<int> steps;
  PagedKvCache<MiniTova> cache(config, MiniTova{&steps});
  std::vector<std::size_t> expected;
  std::vector<double> mass;
  std::vector<float> out(96);
  for (std::size_t t = 0; t < 70; ++t) {
    if (expected.size() == 9) {
      expected.erase(expected.begin() + (std::min_element(mass.begin(), mass.end()) - mass.begin()));
    }
    expected.push_back(t);
    ASSERT_TRUE(cache.append(rows.token_k(t), rows.token_v(t)).ok());
    for (std::size_t h = 0; h < 3; ++h) ASSERT_EQ(resident(cache, h), expected) << "token " << t << ", head " << h;
    ASSERT_TRUE(attend(cache, rows.token_q(t), out).ok());
    mass.assign(expected.size(), 0.0);
    for (std::size_t head = 0; head < 6; ++head) {
      const auto weights = rows.exact(t, head, expected).weights;
      for (std::size_t i = 0; i < mass.size(); ++i) mass[i] += weights[i];
    }
  }
  ASSERT_EQ(steps.size(), 61U);
  for (std::size_t i = 0; i < steps.size(); ++i) EXPECT_EQ(steps[i], static_cast<int>(i) + 9);
}

TEST(LayerScope, ComposesWithASelector) {
  const CacheConfig config{
      .query_heads = 4, .kv_heads = 2, .head_dim = 16, .page_size = 2, .budget_tokens = 12, .read_budget_tokens = 12};
  const Rows rows(60, config, 2);
  std::vector<int> steps, composed_steps;
  PagedKvCache<MiniTova> alone(config, MiniTova{&steps});
  Compose<MiniTova, Quest> policy;
  policy.evict.steps_at_eviction = &composed_steps;
  PagedKvCache<Compose<MiniTova, Quest>> composed(config, policy);
  std::vector<float> a(64), b(64);
  for (std::size_t t = 0; t < 60; ++t) {
    ASSERT_TRUE(alone.append(rows.token_k(t), rows.token_v(t)).ok());
    ASSERT_TRUE(composed.append(rows.token_k(t), rows.token_v(t)).ok());
    ASSERT_TRUE(attend(alone, rows.token_q(t), a).ok());
    ASSERT_TRUE(attend(composed, rows.token_q(t), b).ok());
    ASSERT_EQ(a, b);
    ASSERT_EQ(resident(alone, 1), resident(composed, 1));
  }
  EXPECT_EQ(steps, composed_steps);
}

TEST(LayerScope, ClearForgetsTheLayersState) {
  const CacheConfig config{.query_heads = 1, .kv_heads = 1, .head_dim = 8, .page_size = 1, .budget_tokens = 3};
  const Rows rows(4, config, 3);
  std::vector<int> steps;
  PagedKvCache<MiniTova> cache(config, MiniTova{&steps});
  std::vector<float> out(8);
  for (int round = 0; round < 2; ++round) {
    for (std::size_t t = 0; t < 4; ++t) {
      ASSERT_TRUE(cache.append(rows.token_k(t), rows.token_v(t)).ok());
      ASSERT_TRUE(attend(cache, rows.token_q(t), out).ok());
    }
    cache.clear();
  }
  EXPECT_EQ(steps, (std::vector<int>{3, 3}));
}

// -------------------------------------------------------------------------------------------------------------- trim

/// A lagged evictor: every `period` steps, and at the prompt's end, it goes down to the budget less the slack.
struct MiniLagged {
  static constexpr std::string_view name = "mini_lagged";
  static constexpr std::size_t period = 6;
  static constexpr std::size_t slack_tokens = 8;
  std::vector<std::int64_t>* trims = nullptr;  // where the sequence stood
  std::vector<std::int64_t>* asked = nullptr;
  bool names_nonsense = false;
  void trim(HeadView<MiniLagged> head, PageList& pages) const {
    trims->push_back(head.end().value);
    const std::size_t target = head.page_budget() - slack_tokens / head.page_size();
    std::size_t excess = head.size() > target ? head.size() - target : 0;
    for (const PageIndex page : head.evictable_pages()) {
      if (excess-- == 0) break;
      pages.add(page);
    }
    if (names_nonsense) {
      for (const PageIndex page : head.pages()) {
        if (!head.is_evictable(page)) pages.add(page);
      }
    }
  }
  PageIndex victim(HeadView<MiniLagged> head) const {
    asked->push_back(head.end().value);
    return head.lowest_evictable([&](PageIndex page) { return head.first_position(page); });
  }
};

TEST(Trim, ComesAtThePromptsEndAndEveryPeriodAndTheBudgetHoldsBetween) {
  const CacheConfig config{.query_heads = 1, .kv_heads = 1, .head_dim = 8, .page_size = 2, .budget_tokens = 20};
  const Rows rows(80, config, 4);
  std::vector<std::int64_t> trims, victims;
  PagedKvCache<MiniLagged> cache(config, MiniLagged{&trims, &victims});
  for (std::size_t t = 0; t < 19; ++t) ASSERT_TRUE(cache.append_prompt(rows.token_k(t), rows.token_v(t)).ok());
  EXPECT_EQ(cache.resident_tokens(0), 19U);
  cache.end_prompt();
  EXPECT_EQ(trims, std::vector<std::int64_t>{19});
  EXPECT_LE(cache.resident_tokens(0), 12U);
  cache.end_prompt();
  EXPECT_EQ(trims.size(), 1U) << "the prompt ends once";
  std::vector<std::int64_t> expected = {19};
  for (std::size_t t = 19; t < 80; ++t) {
    const std::size_t decoded = t - 19;
    if (decoded > 0 && decoded % 6 == 0) expected.push_back(static_cast<std::int64_t>(t));
    ASSERT_TRUE(cache.append(rows.token_k(t), rows.token_v(t)).ok());
    ASSERT_LE(cache.resident_tokens(0), 20U);
    ASSERT_EQ(trims, expected);
  }
  EXPECT_TRUE(victims.empty()) << "6 steps fit into a slack of 8";
}

TEST(Trim, WithoutAPromptThereIsNoTrimAtItsEnd) {
  const CacheConfig config{.query_heads = 1, .kv_heads = 1, .head_dim = 8, .page_size = 2, .budget_tokens = 20};
  const Rows rows(8, config, 5);
  std::vector<std::int64_t> trims, victims;
  PagedKvCache<MiniLagged> cache(config, MiniLagged{&trims, &victims});
  for (std::size_t t = 0; t < 8; ++t) ASSERT_TRUE(cache.append(rows.token_k(t), rows.token_v(t)).ok());
  EXPECT_EQ(trims, std::vector<std::int64_t>{6});
}

TEST(Trim, PinnedAndOpenPagesArePassedOver) {
  const CacheConfig config{.query_heads = 2, .kv_heads = 2, .head_dim = 8, .page_size = 2, .budget_tokens = 20};
  const Rows rows(40, config, 6);
  std::vector<std::int64_t> trims, victims;
  PagedKvCache<MiniLagged> cache(config, MiniLagged{&trims, &victims, true});
  for (std::size_t t = 0; t < 40; ++t) {
    ASSERT_TRUE(cache.append(rows.token_k(t), rows.token_v(t)).ok());
    for (std::size_t h = 0; h < 2; ++h) ASSERT_EQ(resident(cache, h).back(), t);
  }
}

// ------------------------------------------------------------------------------------------------------ query window

struct MiniWindow {
  static constexpr std::string_view name = "mini_window";
  static constexpr std::size_t query_window = 3;
  std::vector<std::vector<float>>* in_select = nullptr;  // first element of each remembered query, newest first
  std::vector<std::vector<float>>* in_victim = nullptr;
  static std::vector<float> remembered(const HeadPages& head) {
    std::vector<float> result;
    for (std::size_t age = 0; age < head.recent_query_count(); ++age) {
      const QueryGroup queries = head.recent_queries(age);
      for (std::size_t q = 0; q < queries.size; ++q) result.push_back(queries[q][0]);
    }
    return result;
  }
  void select(HeadView<MiniWindow> head, QueryGroup, Selection& selection) const {
    if (head.kv_head() == 1) in_select->push_back(remembered(head));
    selection.add_all();
  }
  PageIndex victim(HeadView<MiniWindow> head) const {
    if (head.kv_head() == 1) in_victim->push_back(remembered(head));
    return head.lowest_evictable([&](PageIndex page) { return head.first_position(page); });
  }
};

TEST(QueryWindow, HoldsTheQueriesBeforeTheRunningOne) {
  const CacheConfig config{
      .query_heads = 4, .kv_heads = 2, .head_dim = 5, .page_size = 2, .budget_tokens = 8, .read_budget_tokens = 2};
  Rows rows(20, config, 7);
  for (std::size_t t = 0; t < 20; ++t) {
    for (std::size_t head = 0; head < 4; ++head) rows.q[(t * 4 + head) * 5] = static_cast<float>(10 * t + head);
  }
  std::vector<std::vector<float>> in_select, in_victim;
  PagedKvCache<MiniWindow> cache(config, MiniWindow{&in_select, &in_victim});
  std::vector<float> out(20);
  // The group of kv head 1 is query heads 2 and 3.
  const auto newest = [](std::size_t queries_so_far) {
    std::vector<float> expected;
    for (std::size_t age = 0; age < std::min<std::size_t>(3, queries_so_far); ++age) {
      const float base = 10.0F * static_cast<float>(queries_so_far - 1 - age);
      expected.push_back(base + 2.0F);
      expected.push_back(base + 3.0F);
    }
    return expected;
  };
  for (std::size_t t = 0; t < 20; ++t) {
    const std::size_t victims = in_victim.size();
    ASSERT_TRUE(cache.append(rows.token_k(t), rows.token_v(t)).ok());
    if (in_victim.size() > victims) {
      EXPECT_EQ(in_victim.back(), newest(t)) << "victim at token " << t;
    }
    const std::size_t selects = in_select.size();
    ASSERT_TRUE(attend(cache, rows.token_q(t), out).ok());
    if (in_select.size() > selects) {
      EXPECT_EQ(in_select.back(), newest(t)) << "select at token " << t;
    }
  }
  EXPECT_EQ(in_victim.size(), 6U);
  EXPECT_EQ(in_select.size(), 18U);
  cache.clear();
  in_select.clear();
  for (std::size_t t = 0; t < 3; ++t) {
    ASSERT_TRUE(cache.append(rows.token_k(t), rows.token_v(t)).ok());
    ASSERT_TRUE(attend(cache, rows.token_q(t), out).ok());
  }
  EXPECT_EQ(in_select.front(), newest(2)) << "clear forgets the window";
}

// ------------------------------------------------------------------------------------------------------ order of verbs

/// Writes down every verb, and checks each view against what is known at that moment.
struct Diary {
  static constexpr std::string_view name = "diary";
  static constexpr EvidenceKind evidence = EvidenceKind::page_mass;
  struct PageState {
    int appends = 0;
    std::int64_t opened_at = -1;
  };
  struct HeadState {
    int pages_opened = 0;
  };
  std::vector<std::string>* lines = nullptr;

  void write(const HeadPages& head, const std::string& line) const {
    if (head.kv_head() == 1) lines->push_back(line);
  }
  void on_page_open(HeadView<Diary> head, PageIndex page) const {
    EXPECT_EQ(head.state(page).appends, 0) << "state starts anew";
    EXPECT_EQ(head.state(page).opened_at, -1);
    EXPECT_EQ(head.tokens(page), 0U);
    EXPECT_TRUE(head.is_open(page));
    head.state(page).opened_at = head.first_position(page).value;
    ++head.head_state().pages_opened;
    write(head, "open " + std::to_string(head.first_position(page).value));
  }
  void on_append(HeadView<Diary> head, PageIndex page, Slot slot) const {
    EXPECT_EQ(page, head.open_page());
    EXPECT_EQ(head.tokens(page), slot.value + 1);
    EXPECT_EQ(head.state(page).appends, static_cast<int>(slot.value));
    ++head.state(page).appends;
    std::vector<float> key(head.head_dim());
    head.load_key(page, slot, key);
    write(head, "append " + std::to_string(static_cast<int>(key[0])));
  }
  void on_page_full(HeadView<Diary> head, PageIndex page) const {
    EXPECT_EQ(head.tokens(page), head.page_size());
    write(head, "full " + std::to_string(head.first_position(page).value));
  }
  void on_prompt_end(HeadView<Diary> head) const { write(head, "prompt end " + std::to_string(head.end().value)); }
  void on_clear(HeadView<Diary> head) const {
    EXPECT_EQ(head.size(), 0U);
    write(head, "clear");
  }
  void observe(HeadView<Diary> head, const Evidence& step) const {
    EXPECT_TRUE(head.has_open_page());
    EXPECT_EQ(head.end(), step.position() + 1);
    write(head, "observe " + std::to_string(step.position().value));
  }
  PageIndex victim(HeadView<Diary> head) const {
    EXPECT_FALSE(head.has_open_page()) << "no page is open while a victim is looked for";
    EXPECT_EQ(head.size(), head.page_budget());
    for (const PageIndex page : head.pages()) {
      EXPECT_EQ(head.state(page).opened_at, head.first_position(page).value) << "state follows its page";
      EXPECT_EQ(head.state(page).appends, 2);
    }
    write(head, "victim, evictions " + std::to_string(head.evictions()));
    return PageIndex{1};
  }
  void on_evict(HeadView<Diary> head, PageIndex page) const {
    std::vector<float> key(head.head_dim()), value(head.head_dim());
    head.load_key(page, Slot{1}, key);
    head.load_value(page, Slot{1}, value);
    write(head, "evict " + std::to_string(static_cast<int>(key[0])) + ' ' + std::to_string(static_cast<int>(value[0])));
  }
};

TEST(Verbs, ComeInTheOrderOfTheContract) {
  const CacheConfig config{.query_heads = 4, .kv_heads = 2, .head_dim = 3, .page_size = 2, .budget_tokens = 6};
  Rows rows(9, config, 8);
  for (std::size_t t = 0; t < 9; ++t) {
    for (std::size_t h = 0; h < 2; ++h) {
      rows.k[(t * 2 + h) * 3] = static_cast<float>(t);
      rows.v[(t * 2 + h) * 3] = static_cast<float>(100 + t);
    }
  }
  std::vector<std::string> lines;
  PagedKvCache<Diary, Half> cache(config, Diary{&lines});
  std::vector<float> out(12);
  for (std::size_t t = 0; t < 3; ++t) ASSERT_TRUE(cache.append_prompt(rows.token_k(t), rows.token_v(t)).ok());
  ASSERT_TRUE(attend(cache, rows.token_q(2), out).ok());
  for (std::size_t t = 3; t < 9; ++t) ASSERT_TRUE(cache.append(rows.token_k(t), rows.token_v(t)).ok());
  ASSERT_TRUE(attend(cache, rows.token_q(8), out).ok());
  cache.clear();
  ASSERT_TRUE(cache.append(rows.token_k(0), rows.token_v(0)).ok());
  const std::vector<std::string> expected = {"open 0",      "append 0",     "append 1",
                                             "full 0",      "open 2",       "append 2",
                                             "observe 2",   "prompt end 3", "append 3",
                                             "full 2",      "open 4",       "append 4",
                                             "append 5",    "full 4",       "victim, evictions 0",
                                             "evict 3 103", "open 6",       "append 6",
                                             "append 7",    "full 6",       "victim, evictions 1",
                                             "evict 5 105", "open 8",       "append 8",
                                             "observe 8",   "clear",        "open 0",
                                             "append 0"};
  EXPECT_EQ(lines, expected);
}

/// A selector with state of its own beside the evictor's, to be composed.
struct CountingSelect {
  static constexpr std::string_view name = "counting_select";
  struct PageState {
    std::int64_t opened_at = -1;
  };
  struct HeadState {
    int selects = 0;
  };
  int* count = nullptr;
  void on_page_open(HeadView<CountingSelect> head, PageIndex page) const {
    head.state(page).opened_at = head.first_position(page).value;
  }
  void select(HeadView<CountingSelect> head, QueryGroup, Selection& selection) const {
    for (const PageIndex page : head.pages()) {
      EXPECT_EQ(head.state(page).opened_at, head.first_position(page).value) << "the parts' states are apart";
    }
    if (head.kv_head() == 1) *count = ++head.head_state().selects;
    selection.add(head.open_page());
  }
};

TEST(Verbs, ReachBothPartsOfACompositionWithTheirOwnState) {
  const CacheConfig config{
      .query_heads = 2, .kv_heads = 2, .head_dim = 3, .page_size = 2, .budget_tokens = 6, .read_budget_tokens = 2};
  const Rows rows(12, config, 9);
  std::vector<std::string> lines, alone_lines;
  int selects = 0;
  Compose<Diary, CountingSelect> policy;
  policy.evict.lines = &lines;
  policy.select_part.count = &selects;
  PagedKvCache<Compose<Diary, CountingSelect>> cache(config, policy);
  PagedKvCache<Diary> alone(config, Diary{&alone_lines});
  std::vector<float> out(6);
  for (std::size_t t = 0; t < 12; ++t) {
    ASSERT_TRUE(cache.append(rows.token_k(t), rows.token_v(t)).ok());
    ASSERT_TRUE(alone.append(rows.token_k(t), rows.token_v(t)).ok());
    ASSERT_TRUE(attend(cache, rows.token_q(t), out).ok());
    ASSERT_TRUE(attend(alone, rows.token_q(t), out).ok());
  }
  EXPECT_EQ(lines, alone_lines);
  EXPECT_EQ(selects, 10) << "while no more than the read budget is resident, select is not asked";
}

// ------------------------------------------------------------------------------------------------------- page
// summaries

struct MeanReader {
  static constexpr std::string_view name = "mean_reader";
  static constexpr PageSummary page_summary = PageSummary::mean;
  std::vector<float>* means = nullptr;
  void select(HeadView<MeanReader> head, QueryGroup, Selection& selection) const {
    std::vector<float> mean(head.head_dim());
    means->clear();
    for (const PageIndex page : head.pages()) {
      head.load_mean_key(page, mean);
      means->insert(means->end(), mean.begin(), mean.end());
    }
    selection.add_all();
  }
};

TEST(Summaries, AViewGivesMeanKeysAlsoOfAPartialPage) {
  const CacheConfig config{
      .query_heads = 1, .kv_heads = 1, .head_dim = 5, .page_size = 3, .read_budget_tokens = 3, .max_tokens = 8};
  const Rows rows(8, config, 10);
  std::vector<float> means, out(5);
  PagedKvCache<MeanReader> cache(config, MeanReader{&means});
  for (std::size_t t = 0; t < 8; ++t) ASSERT_TRUE(cache.append(rows.token_k(t), rows.token_v(t)).ok());
  ASSERT_TRUE(attend(cache, rows.token_q(7), out).ok());
  ASSERT_EQ(means.size(), 15U);
  for (std::size_t page = 0; page < 3; ++page) {
    const std::size_t tokens = page == 2 ? 2 : 3;
    for (std::size_t i = 0; i < 5; ++i) {
      double sum = 0.0;
      for (std::size_t t = page * 3; t < page * 3 + tokens; ++t) sum += static_cast<double>(rows.key(t, 0)[i]);
      EXPECT_NEAR(static_cast<double>(means[page * 5 + i]), sum / static_cast<double>(tokens), 1e-6);
    }
  }
}

struct BoundsReader {
  static constexpr std::string_view name = "bounds_reader";
  static constexpr PageSummary page_summary = PageSummary::min_max;
  std::vector<float>* lowest = nullptr;
  std::vector<float>* bounds = nullptr;
  PageIndex victim(HeadView<BoundsReader>) const { return PageIndex{0}; }
  void select(HeadView<BoundsReader> head, QueryGroup queries, Selection& selection) const {
    std::vector<float> highest(head.head_dim());
    lowest->resize(head.head_dim());
    head.load_bounds(PageIndex{0}, *lowest, highest);
    bounds->resize(head.size() * queries.size);
    head.upper_bounds(queries, *bounds);
    selection.add_all();
  }
};

TEST(Summaries, OfAReusedPageKnowNothingOfItsFormerKeys) {
  const CacheConfig config{
      .query_heads = 2, .kv_heads = 1, .head_dim = 5, .page_size = 2, .budget_tokens = 4, .read_budget_tokens = 2};
  Rows rows(6, config, 11);
  for (std::size_t i = 0; i < 2 * 5; ++i) rows.k[i] = 1000.0F;  // the first page, long gone
  std::vector<float> lowest, bounds, out(10);
  PagedKvCache<BoundsReader> cache(config, BoundsReader{&lowest, &bounds});
  for (std::size_t t = 0; t < 6; ++t) ASSERT_TRUE(cache.append(rows.token_k(t), rows.token_v(t)).ok());
  ASSERT_TRUE(attend(cache, rows.token_q(5), out).ok());
  for (std::size_t i = 0; i < 5; ++i) EXPECT_EQ(lowest[i], std::min(rows.key(2, 0)[i], rows.key(3, 0)[i]));
  ASSERT_EQ(bounds.size(), 4U);
  for (std::size_t page = 0; page < 2; ++page) {
    for (std::size_t q = 0; q < 2; ++q) {
      double expected = 0.0;
      for (std::size_t i = 0; i < 5; ++i) {
        const auto a = static_cast<double>(rows.query(5, q)[i] * rows.key(2 + 2 * page, 0)[i]);
        const auto b = static_cast<double>(rows.query(5, q)[i] * rows.key(3 + 2 * page, 0)[i]);
        expected += std::max(a, b);
      }
      EXPECT_NEAR(static_cast<double>(bounds[page * 2 + q]), expected, 1e-5);
    }
  }
}

struct BoundsEvictor {
  static constexpr std::string_view name = "bounds_evictor";
  static constexpr PageSummary page_summary = PageSummary::min_max;
  PageIndex victim(HeadView<BoundsEvictor>) const { return PageIndex{0}; }
};

TEST(Composition, OfPartsThatNeedDifferentSummariesIsRefused) {
  Compose<BoundsEvictor, MeanReader> policy;
  const CacheConfig config{
      .query_heads = 1, .kv_heads = 1, .head_dim = 8, .page_size = 2, .budget_tokens = 8, .read_budget_tokens = 4};
  try {
    const PagedKvCache<Compose<BoundsEvictor, MeanReader>> cache(config, policy);
    FAIL() << "not refused";
  } catch (const ConfigError& error) {
    EXPECT_STREQ(error.what(), "policy bounds_evictor+mean_reader: its two parts need different page summaries");
  }
}

}  // namespace

// --- found by review ---

struct PromptCounter {
  static constexpr std::string_view name = "prompt_counter";
  static constexpr kvsparse::EvidenceKind evidence = kvsparse::EvidenceKind::page_mass;
  struct HeadState {
    kvsparse::PagesUsed prompt_queries;  // used: of the prompt; judged: all
  };
  void observe(kvsparse::HeadView<PromptCounter> head, const kvsparse::Evidence& step) const {
    head.head_state().prompt_queries.used += step.is_prompt() ? 1U : 0U;
    ++head.head_state().prompt_queries.judged;
  }
  kvsparse::PagesUsed pages_used(kvsparse::HeadView<PromptCounter> head) const {
    return head.head_state().prompt_queries;
  }
};

TEST(PolicyContract, APromptQueryAfterEndPromptIsStillOfThePrompt) {
  kvsparse::PagedKvCache<PromptCounter> cache({.head_dim = 1, .page_size = 4, .max_tokens = 8});
  const std::vector<float> row(1, 1.0F);
  std::vector<float> out(1);
  ASSERT_TRUE(cache.append_prompt(std::span<const float>(row), std::span<const float>(row)).ok());
  cache.end_prompt();
  ASSERT_TRUE(kvsparse::attend(cache, std::span<const float>(row), std::span<float>(out)).ok());
  EXPECT_EQ(cache.stats().used_page_share, 1.0) << "one query, of the prompt";
  ASSERT_TRUE(cache.append(std::span<const float>(row), std::span<const float>(row)).ok());
  ASSERT_TRUE(kvsparse::attend(cache, std::span<const float>(row), std::span<float>(out)).ok());
  EXPECT_EQ(cache.stats().used_page_share, 0.5) << "the second is a decode step";
}

struct TrimEverything {
  static constexpr std::string_view name = "trim_everything";
  kvsparse::PageIndex victim(kvsparse::HeadView<TrimEverything>) const { return {}; }
  void trim(kvsparse::HeadView<TrimEverything> head, kvsparse::PageList& pages) const {
    for (const kvsparse::PageIndex page : head.pages()) pages.add(page);
  }
};

TEST(PolicyContract, AFullNewestPageOutlivesTheTrimAtPromptEnd) {
  kvsparse::PagedKvCache<TrimEverything> cache({.head_dim = 1, .page_size = 4, .budget_tokens = 16});
  const std::vector<float> rows(8, 1.0F);
  ASSERT_TRUE(cache.append_prompt(std::span<const float>(rows), std::span<const float>(rows)).ok());
  cache.end_prompt();
  const std::vector<kvsparse::Position> resident = cache.resident_positions(0);
  ASSERT_EQ(resident.size(), 4U);
  EXPECT_EQ(resident.front(), kvsparse::Position{4});
}

/// A range of a view that is gone when the loop begins.
struct GivesUpTheNewest {
  static constexpr std::string_view name = "gives_up_the_newest";
  static constexpr PolicyScope scope = PolicyScope::layer;
  PageIndex victim(LayerView<GivesUpTheNewest> layer) const {
    PageIndex newest{};
    for (const PageIndex page : layer.head(0).evictable_pages()) newest = page;
    return newest;
  }
};

TEST(PolicyContract, ARangeOfPagesOutlivesItsView) {
  CacheConfig config{.query_heads = 2, .kv_heads = 2, .head_dim = 4, .page_size = 1, .budget_tokens = 4};
  PagedKvCache<GivesUpTheNewest> cache(config);
  const std::vector<float> row(8, 1.0F);
  for (int token = 0; token < 10; ++token) ASSERT_TRUE(cache.append(row, row).ok());
  for (const std::size_t head : {0U, 1U}) EXPECT_EQ(resident(cache, head), (std::vector<std::size_t>{0, 1, 2, 9}));
}

struct EveryOtherToken {
  static constexpr std::string_view name = "every_other_token";
  static constexpr kvsparse::PolicyGranularity granularity = kvsparse::PolicyGranularity::token;
  static constexpr bool select_always = true;
  void select(kvsparse::HeadView<EveryOtherToken> head, kvsparse::QueryGroup, kvsparse::Selection& selection) const {
    for (const kvsparse::PageIndex page : head.pages()) {
      const std::span<std::uint64_t> mask = selection.token_mask(page);
      std::fill(mask.begin(), mask.end(), 0x5555555555555555U);
      selection.add({page, mask, 0.0F, 0.0F, 0});
    }
  }
};

TEST(PolicyContract, BitsOfATokenMaskBehindThePagesTokensAreNoTokens) {
  for (const std::size_t page_size : {4U, 64U, 70U, 128U}) {
    kvsparse::PagedKvCache<EveryOtherToken> cache(
        {.head_dim = 1, .page_size = page_size, .read_budget_tokens = page_size, .max_tokens = 200});
    const std::vector<float> rows(150, 1.0F);
    std::vector<float> out(1);
    ASSERT_TRUE(cache.append_prompt(std::span<const float>(rows), std::span<const float>(rows)).ok());
    ASSERT_TRUE(kvsparse::attend(cache, std::span<const float>(rows).first(1), std::span<float>(out)).ok());
    EXPECT_EQ(cache.stats().last_read_tokens, 75U) << "page size " << page_size;
    EXPECT_EQ(cache.stats().last_skipped_tokens, 75U) << "page size " << page_size;
    EXPECT_EQ(cache.read_positions(0).size(), 75U) << "page size " << page_size;
  }
}

}  // namespace kvsparse_test
