// SPDX-License-Identifier: Apache-2.0
//
// Heads of a layer that share their budget: the layer's total stays whatever each head holds, no head goes below its
// floor, and what holds of a page budget for each head holds here too. The policy is the worst one for the container:
// it takes every page from the first head that may give one. AdaKv's decisions are compared in zoo_test.cpp.
#include <gtest/gtest.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <vector>

#include "kvsparse/cache/attend.hpp"
#include "kvsparse/interop/page_steering.hpp"
#include "kvsparse/interop/snapshot.hpp"
#include "kvsparse/policy/ada_kv.hpp"
#include "support/refusal.hpp"
#include "support/rows.hpp"

namespace kvsparse_test {
namespace {

using namespace kvsparse;

constexpr std::size_t kv_heads = 3, page_size = 2, budget_pages = 8;

template <int floor_percent, bool pins = false>
struct FirstHeadGives {
  static constexpr std::string_view name = "first_head_gives";
  static constexpr PolicyScope scope = PolicyScope::shared_budget;
  static constexpr double budget_floor = floor_percent / 100.0;
  static constexpr bool pin_prompt = pins;
  HeadPage victim(LayerView<FirstHeadGives> layer) const {
    for (std::size_t h = 0; h < layer.heads(); ++h) {
      const HeadView<FirstHeadGives> head = layer.head(h);
      if (layer.may_give(head)) return {h, *head.evictable_pages().begin()};
    }
    return {};
  }
};

CacheConfig config_of(std::size_t heads = kv_heads) {
  return {.query_heads = 2 * heads,
          .kv_heads = heads,
          .head_dim = 8,
          .page_size = page_size,
          .budget_tokens = budget_pages * page_size};
}

template <class Cache>
void append(Cache& cache, const Rows& rows, std::size_t tokens, bool prompt = false) {
  for (std::size_t i = 0; i < tokens; ++i) {
    const auto t = static_cast<std::size_t>(cache.next_position().value);
    const Status status =
        prompt ? cache.append_prompt(rows.token_k(t), rows.token_v(t)) : cache.append(rows.token_k(t), rows.token_v(t));
    ASSERT_TRUE(status.ok()) << status.message();
  }
}
template <class Cache>
std::vector<std::size_t> pages_of(const Cache& cache) {
  std::vector<std::size_t> pages;
  for (std::size_t h = 0; h < cache.geometry().kv_heads; ++h) pages.push_back(cache.table(h).size());
  return pages;
}
using Sizes = std::vector<std::size_t>;

TEST(SharedBudget, GoesToTheHeadsThatGiveNothingDownToTheFloorOfTheOthers) {
  const Rows rows(100, config_of(), 1);
  PagedKvCache<FirstHeadGives<25>> quarter(config_of());
  PagedKvCache<FirstHeadGives<0>> none(config_of());
  PagedKvCache<FirstHeadGives<100>> all(config_of());
  append(quarter, rows, budget_pages * page_size);
  EXPECT_EQ(pages_of(quarter), (Sizes{8, 8, 8}));
  append(quarter, rows, 1);  // three pages open, three go
  EXPECT_EQ(pages_of(quarter), (Sizes{6, 9, 9}));
  append(quarter, rows, 7);  // the first head is at its floor: it gives what it opens
  EXPECT_EQ(pages_of(quarter), (Sizes{2, 10, 12}));
  append(quarter, rows, 76);
  EXPECT_EQ(pages_of(quarter), (Sizes{2, 2, 20}));
  append(none, rows, 100);
  EXPECT_EQ(pages_of(none), (Sizes{1, 1, 22}));
  append(all, rows, 100);
  EXPECT_EQ(pages_of(all), (Sizes{8, 8, 8}));
  EXPECT_EQ(none.stats().resident_tokens, budget_pages * page_size);
  EXPECT_EQ(none.stats().peak_resident_tokens, budget_pages * page_size);
  EXPECT_EQ(none.stats().evicted_tokens, kv_heads * (100 - budget_pages * page_size));
}

TEST(SharedBudget, KeepsEveryPinOfEveryHead) {
  const Rows rows(100, config_of(), 2);
  PagedKvCache<FirstHeadGives<0, true>> cache(config_of());
  append(cache, rows, 5 * page_size - 1, true);
  append(cache, rows, 80);
  EXPECT_EQ(pages_of(cache), (Sizes{6, 6, 12}));  // five pinned, one open
  for (std::size_t h = 0; h < kv_heads; ++h) {
    for (std::uint32_t page = 0; page < 5; ++page) EXPECT_TRUE(cache.table(h)[{page}].pinned);
  }
  PagedKvCache<FirstHeadGives<0, true>> full(config_of());
  const Status status = full.append_prompt(rows.token_k(0), rows.token_v(0));
  ASSERT_TRUE(status.ok());
  append(full, rows, 7 * page_size - 1, true);
  EXPECT_EQ(full.append_prompt(rows.token_k(0), rows.token_v(0)).code(), Status::Code::prompt_exceeds_budget);
}

TEST(SharedBudget, GrowsWithAPromptAndTakesPinsBackFromEveryHead) {
  const Rows rows(140, config_of(), 3);
  CacheConfig config = config_of();
  config.prompt_overflow = PromptOverflow::grow;
  config.max_prompt_tokens = 12 * page_size;
  PagedKvCache<FirstHeadGives<0, true>> grown(config);
  append(grown, rows, 12 * page_size, true);
  append(grown, rows, 100);
  EXPECT_EQ(pages_of(grown), (Sizes{13, 13, 13}));  // all but the open one are pinned
  EXPECT_EQ(grown.page_budget(), 13U);

  config.prompt_overflow = PromptOverflow::unpin_middle;
  PagedKvCache<FirstHeadGives<0, true>> unpinned(config);
  append(unpinned, rows, 12 * page_size, true);
  append(unpinned, rows, 100);
  std::size_t held = 0;
  for (std::size_t h = 0; h < kv_heads; ++h) {
    held += unpinned.table(h).size();
    EXPECT_LT(unpinned.table(h).pinned_pages(), budget_pages);
    EXPECT_TRUE(unpinned.table(h)[{0}].pinned);
  }
  EXPECT_EQ(held, kv_heads * budget_pages);
}

TEST(SharedBudget, GivesUpWhatTheWindowHasLeftFirst) {
  const Rows rows(100, config_of(), 4);
  CacheConfig config = config_of();
  config.logits.window = 5 * page_size;
  PagedKvCache<FirstHeadGives<0>> cache(config);
  append(cache, rows, 80);
  // Nothing is left of the window before; what is over lies in the heads alike.
  EXPECT_EQ(pages_of(cache), (Sizes{8, 8, 8}));
  for (std::size_t h = 0; h < kv_heads; ++h) EXPECT_EQ(cache.table(h)[{0}].first_position, Position{80 - 8 * 2});
}

/// Drafts that are accepted leave what appends would have left.
TEST(SharedBudget, OfAcceptedDraftsIsThatOfAppends) {
  const Rows rows(200, config_of(), 5);
  CacheConfig config = config_of();
  config.max_speculative = 11;
  PagedKvCache<FirstHeadGives<25>> drafting(config), appending(config);
  std::size_t accepted = 0;
  while (drafting.next_position() < Position{150}) {
    const auto t = static_cast<std::size_t>(drafting.next_position().value);
    const std::size_t drafts = 1 + t % 11;
    const TokenRows<const float> k(rows.token_k(t).data(), drafts, kv_heads, 8),
        v(rows.token_v(t).data(), drafts, kv_heads, 8);
    ASSERT_TRUE(drafting.append_draft(k, v).ok());
    const std::size_t kept = drafts - t % 3 % drafts;
    ASSERT_TRUE(drafting.truncate(Position{0} + (t + kept)).ok());
    append(appending, rows, kept);
    accepted += kept;
    for (std::size_t h = 0; h < kv_heads; ++h) {
      ASSERT_EQ(drafting.resident_positions(h), appending.resident_positions(h)) << "after " << t + kept;
    }
  }
  EXPECT_GE(accepted, 150U);
}

TEST(SharedBudget, ForksAndSnapshotsGoOnAlike) {
  const Rows rows(200, config_of(), 6);
  AdaKv policy;
  policy.options.window = 4;
  PagedKvCache<AdaKv> cache(config_of(), policy);
  std::vector<float> out(2 * kv_heads * 8), of_other(out.size());
  const auto step = [&](PagedKvCache<AdaKv>& of, std::vector<float>& answer) {
    append(of, rows, 1);
    ASSERT_TRUE(attend(of, rows.token_q(static_cast<std::size_t>(of.next_position().value - 1)), answer).ok());
  };
  for (int t = 0; t < 70; ++t) step(cache, out);
  EXPECT_NE(pages_of(cache), (Sizes{8, 8, 8}));
  std::stringstream stream;
  save(cache, stream);
  PagedKvCache<AdaKv> loaded(config_of(), policy);
  load(loaded, stream);
  EXPECT_EQ(pages_of(loaded), pages_of(cache));
  EXPECT_EQ(loaded.stats().resident_tokens, cache.stats().resident_tokens);
  for (int t = 0; t < 70; ++t) {
    step(cache, out);
    step(loaded, of_other);
    ASSERT_EQ(out, of_other);
    ASSERT_EQ(pages_of(cache), pages_of(loaded));
  }
}

std::string refusal_of(auto&& load_snapshot) {
  try {
    load_snapshot();
  } catch (const SnapshotError& error) {
    return error.what();
  }
  return "not refused";
}

/// The second head's page at position 0 is back, as if it had never gone.
template <class Cache>
std::string refusal_with_a_page_too_many(Cache& cache, Cache& other) {
  const detail::LayerImage image = detail::ImageAccess::of(cache);
  PageTable& table = *image.heads[1].table;
  std::vector<ResidentPage> pages;
  for (std::uint32_t i = 0; i < table.size(); ++i) pages.push_back(table[{i}]);
  table.clear();
  table.push_back({Position{0}, pages[0].page, page_size, false});
  for (const ResidentPage& page : pages) table.push_back(page);
  --*image.heads[1].evictions;
  std::stringstream stream;
  save(cache, stream);
  table.clear();
  for (const ResidentPage& page : pages) table.push_back(page);
  return refusal_of([&] { load(other, stream); });
}

TEST(SharedBudget, OfASnapshotIsChecked) {
  const Rows rows(100, config_of(), 7);
  PagedKvCache<FirstHeadGives<0>> saved(config_of());
  append(saved, rows, 90);
  std::stringstream stream;
  save(saved, stream);
  PagedKvCache<FirstHeadGives<50>> with_floor(config_of());  // of the same name and options
  EXPECT_EQ(refusal_of([&] { load(with_floor, stream); }),
            "1 resident pages of a head are less than the 4 that it is left with");

  PagedKvCache<FirstHeadGives<25>> quarter(config_of()), other(config_of());
  append(quarter, rows, 90);
  EXPECT_EQ(refusal_with_a_page_too_many(quarter, other),
            "25 resident pages exceed the budget of 24 that the heads share");
}

/// What a snapshot only claims takes no memory: a small file with true checksums may come from anybody.
TEST(SharedBudget, OfASnapshotIsCheckedBeforeItsPagesHaveRoom) {
  PagedKvCache<FirstHeadGives<25>> cache(config_of());
  const detail::LayerImage image = detail::ImageAccess::of(cache);
  for (const std::uint64_t claimed : {std::uint64_t{21}, std::uint64_t{1} << 32, std::uint64_t{1} << 59}) {
    std::stringstream stream;
    detail::SnapshotWriter out(stream);
    detail::write_header(out, image.facts);
    constexpr int zeros = 4 + 5;  // prompt, peaks, evictions of shared pages; the first head's evictions and counters
    out.put(std::uint64_t{8 + 1 + 8 * zeros + 8});
    out.put(static_cast<std::int64_t>(claimed * page_size));
    out.put(std::uint8_t{1});
    for (int i = 0; i < zeros; ++i) out.put(std::uint64_t{0});
    out.put(claimed);
    out.put_checksum();
    EXPECT_EQ(refusal_of([&] { load(cache, stream); }),
              std::to_string(claimed) + " resident pages of a head are more than the 20 that the others can leave it");
  }
}

TEST(SharedBudget, AnImpossibleFloorIsRefused) {
  EXPECT_EQ(refusal([] { PagedKvCache<FirstHeadGives<120>> cache(config_of()); }),
            "policy first_head_gives: budget_floor = 1.200000 is not in [0, 1]");
}

TEST(SharedBudget, TakesNoMorePagesThanThePoolWasAskedFor) {
  const Rows rows(300, config_of(), 8);
  PagePool<float> pool(config_of().geometry(), PageSummary::none, kv_heads * budget_pages + 6);
  PagedKvCache<FirstHeadGives<0>> cache(config_of(), pool);
  std::vector<PagedKvCache<FirstHeadGives<0>>> forks;
  std::size_t refused = 0;
  for (std::size_t t = 0; t < 300; ++t) {
    if (t % 40 == 39) forks.push_back(cache.fork());
    if (t % 40 == 20) forks.clear();
    const PoolDemand demand = cache.pool_demand(1);
    const std::size_t before = pool.free_pages();
    const Status status = cache.append(rows.token_k(0), rows.token_v(0));
    ASSERT_EQ(status.ok(), demand.pages <= demand.free_pages);
    ASSERT_GE(pool.free_pages() + (status.ok() ? demand.pages : 0), before);
    if (status.ok()) continue;
    ++refused;
    forks.clear();
  }
  EXPECT_GT(refused, 0U);
}

/// Hands out ids and counts.
struct Blocks {
  PageId acquire() {
    if (free.empty()) free.push_back({total++});
    const PageId page = free.back();
    free.pop_back();
    return page;
  }
  void release(PageId page) { free.push_back(page); }
  std::uint32_t total = 0;
  std::vector<PageId> free;
};

TEST(SharedBudget, SteersAnEnginesPages) {
  Blocks blocks;
  {
    PageSteering<FirstHeadGives<0>, Blocks> steering(config_of(), blocks);
    for (std::size_t t = 0; t < 100; ++t) {
      const std::size_t held = blocks.total - blocks.free.size();
      const std::size_t wanted = steering.pages_wanted(1);
      ASSERT_TRUE(steering.append([](std::size_t, PageId, Slot) {}).ok());
      ASSERT_EQ(blocks.total - blocks.free.size(), held + wanted);
    }
    EXPECT_EQ(blocks.total, kv_heads * budget_pages);
    EXPECT_EQ(steering.stats(1).resident_tokens, budget_pages * page_size);
    EXPECT_EQ(steering.table(2).size(), 22U);
  }
  EXPECT_EQ(blocks.free.size(), blocks.total);
}

/// A head whose queries look everywhere, and two whose queries look at one token each.
TEST(SharedBudget, AdaKvGivesMoreToAHeadThatLooksEverywhere) {
  const CacheConfig config = config_of();
  AdaKv policy;
  policy.options.window = 4;
  PagedKvCache<AdaKv> cache(config, policy);
  std::vector<float> k(kv_heads * 8), v(kv_heads * 8), q(2 * kv_heads * 8), out(q.size());
  for (std::size_t t = 0; t < 120; ++t) {
    std::fill(k.begin(), k.end(), 0.0F);
    std::fill(q.begin(), q.end(), 0.0F);
    for (std::size_t h : {0U, 2U}) k[h * 8] = t == 3 ? 8.0F : 0.0F;
    for (std::size_t h : {0U, 2U}) q[2 * h * 8] = q[(2 * h + 1) * 8] = 8.0F;
    ASSERT_TRUE(cache.append(std::span<const float>(k), v).ok());
    ASSERT_TRUE(attend(cache, std::span<const float>(q), out).ok());
  }
  // One page holds the token that is looked at; two held the newest four tokens when the last one opened.
  EXPECT_EQ(pages_of(cache), (Sizes{4, 16, 4}));
  for (const std::size_t h : {0U, 2U}) EXPECT_EQ(cache.table(h)[{0}].first_position, Position{2});
}

}  // namespace
}  // namespace kvsparse_test
