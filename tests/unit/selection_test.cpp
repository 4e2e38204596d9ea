// SPDX-License-Identifier: Apache-2.0
#include "kvsparse/policy/selection.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "../support/random_trace.hpp"

namespace kvsparse {
namespace {

using Indices = std::vector<std::uint32_t>;

Indices selected(const Selection& selection) {
  Indices result;
  for (const SelectedPage& page : selection.pages()) result.push_back(page.page.value);
  return result;
}

TEST(Selection, AddingAPageTwiceHasNoEffect) {
  Selection selection(4, 16, false);
  selection.begin(4);
  selection.add(PageIndex{2});
  selection.add(SelectedPage{PageIndex{2}, {}, 1.0F, 1.0F, 5});
  EXPECT_EQ(selected(selection), (Indices{2}));
  EXPECT_EQ(selection.pages()[0].log_weight, 0.0F);
  EXPECT_TRUE(selection.contains(PageIndex{2}));
  EXPECT_FALSE(selection.contains(PageIndex{1}));
}

TEST(Selection, AddAllKeepsWhatIsThereAndAddsTheRest) {
  Selection selection(4, 16, false);
  selection.begin(3);
  EXPECT_EQ(selection.resident_pages(), 3U);
  selection.add(PageIndex{2});
  selection.add_all();
  EXPECT_EQ(selected(selection), (Indices{2, 0, 1}));
  selection.sort_by_position();
  EXPECT_EQ(selected(selection), (Indices{0, 1, 2}));
  selection.begin(2);
  EXPECT_TRUE(selection.pages().empty());
  EXPECT_FALSE(selection.contains(PageIndex{1}));
}

TEST(Selection, TheHighestScoresWinAndTiesGoToTheOldest) {
  std::vector<float> scores = {1, 5, 3, 5, 5, 0};
  for (std::size_t count = 0; count <= 7; ++count) {
    Selection selection(6, 16, false);
    selection.begin(6);
    selection.add_highest(scores, count);
    selection.sort_by_position();
    const Indices expected[] = {
        {}, {1}, {1, 3}, {1, 3, 4}, {1, 2, 3, 4}, {0, 1, 2, 3, 4}, {0, 1, 2, 3, 4, 5}, {0, 1, 2, 3, 4, 5}};
    EXPECT_EQ(selected(selection), expected[count]) << count;
  }
}

TEST(Selection, PagesAlreadySelectedDoNotCountAmongTheHighest) {
  std::vector<float> scores = {9, 1, 8, 7};
  Selection selection(4, 16, false);
  selection.begin(4);
  selection.add(PageIndex{0});
  selection.add_highest(scores, 2);
  selection.sort_by_position();
  EXPECT_EQ(selected(selection), (Indices{0, 2, 3}));
}

TEST(Selection, APageThatNobodyCanRankIsReadFirst) {
  std::vector<float> scores = {9, std::numeric_limits<float>::quiet_NaN(), 8, -std::numeric_limits<float>::infinity()};
  Selection selection(4, 16, false);
  selection.begin(4);
  selection.add_highest(scores, 1);
  EXPECT_EQ(selected(selection), (Indices{1}));
}

TEST(Selection, HighestAgreesWithSortingForRandomScoresWithTies) {
  kvsparse_test::TestRng rng(3);
  for (int round = 0; round < 200; ++round) {
    std::vector<float> scores(static_cast<std::size_t>(1 + rng.below(40)));
    for (float& score : scores) score = static_cast<float>(rng.below(6));
    const auto count = static_cast<std::size_t>(rng.below(static_cast<int>(scores.size()) + 1));
    Indices order(scores.size());
    for (std::uint32_t i = 0; i < order.size(); ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return scores[a] > scores[b]; });
    order.resize(count);
    std::sort(order.begin(), order.end());
    Selection selection(scores.size(), 16, false);
    selection.begin(scores.size());
    selection.add_highest(scores, count);
    selection.sort_by_position();
    EXPECT_EQ(selected(selection), order);
  }
}

TEST(Selection, TokenMasksOfPagesAreSeparateAndStartEmpty) {
  Selection selection(3, 130, true);
  selection.begin(3);
  const auto mask = selection.token_mask(PageIndex{1});
  ASSERT_EQ(mask.size(), 3U);
  for (const std::uint64_t word : mask) EXPECT_EQ(word, 0U);
  std::fill(mask.begin(), mask.end(), ~std::uint64_t{0});
  for (const std::uint32_t page : {0U, 2U}) {
    for (const std::uint64_t word : selection.token_mask(PageIndex{page})) EXPECT_EQ(word, 0U);
  }
  EXPECT_EQ(mask[2], ~std::uint64_t{0});
  EXPECT_EQ(selection.token_mask(PageIndex{1})[0], 0U);  // asking again starts anew
}

TEST(Selection, CopiesHaveRoomForAsManyPagesAndMasks) {
  const Selection original(5, 130, true);
  Selection copy(original);
  copy.begin(5);
  copy.add_all();
  EXPECT_EQ(copy.pages().size(), 5U);
  EXPECT_EQ(copy.token_mask(PageIndex{4}).size(), 3U);
}

TEST(PageList, CollectsAndClears) {
  PageList list(2);
  list.add(PageIndex{4});
  list.add(PageIndex{1});
  EXPECT_EQ(list.pages().size(), 2U);
  EXPECT_EQ(list.pages()[1], PageIndex{1});
  list.clear();
  EXPECT_TRUE(list.pages().empty());
}

TEST(PageList, GivesEachPageOnceNewestFirst) {
  PageList list(5);
  for (const std::uint32_t page : {2U, 7U, 2U, 0U, 7U}) list.add(PageIndex{page});
  Indices order;
  for (const PageIndex page : list.newest_first()) order.push_back(page.value);
  EXPECT_EQ(order, (Indices{7, 2, 0}));
}

}  // namespace
}  // namespace kvsparse
