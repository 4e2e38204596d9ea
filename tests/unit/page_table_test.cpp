// SPDX-License-Identifier: Apache-2.0
#include "kvsparse/memory/page_table.hpp"

#include <gtest/gtest.h>

#include <vector>

namespace kvsparse {
namespace {

PageTable table_of_five() {
  PageTable table(6);
  for (std::uint32_t page = 0; page < 5; ++page) {
    table.push_back({Position{page * 4}, PageId{10 + page}, page == 4 ? 1U : 4U, page < 2});
  }
  return table;
}

std::vector<std::uint32_t> ids(const PageTable& table) {
  std::vector<std::uint32_t> result;
  for (std::uint32_t page = 0; page < table.size(); ++page) result.push_back(table[PageIndex{page}].page.value);
  return result;
}

TEST(PageTable, CountsTokensAndPins) {
  PageTable table = table_of_five();
  EXPECT_EQ(table.size(), 5U);
  EXPECT_EQ(table.resident_tokens(), 17U);
  EXPECT_EQ(table.pinned_pages(), 2U);
  table.add_token();
  EXPECT_EQ(table.back().tokens, 2U);
  EXPECT_EQ(table.resident_tokens(), 18U);
}

TEST(PageTable, ErasingMovesTheLaterPagesUpAndKeepsTheCounts) {
  PageTable table = table_of_five();
  table.erase(PageIndex{2});
  EXPECT_EQ(ids(table), (std::vector<std::uint32_t>{10, 11, 13, 14}));
  EXPECT_EQ(table.resident_tokens(), 13U);
  EXPECT_EQ(table.pinned_pages(), 2U);
  table.erase(PageIndex{0});
  EXPECT_EQ(table.pinned_pages(), 1U);
  table.erase(PageIndex{2});
  EXPECT_EQ(ids(table), (std::vector<std::uint32_t>{11, 13}));
  EXPECT_EQ(table.resident_tokens(), 8U);
}

TEST(PageTable, UnpinsOnePage) {
  PageTable table = table_of_five();
  table.unpin(PageIndex{1});
  EXPECT_FALSE(table[PageIndex{1}].pinned);
  EXPECT_TRUE(table[PageIndex{0}].pinned);
  EXPECT_EQ(table.pinned_pages(), 1U);
}

TEST(PageTable, ClearForgetsEverythingButTheCapacity) {
  PageTable table = table_of_five();
  table.clear();
  EXPECT_EQ(table.size(), 0U);
  EXPECT_EQ(table.resident_tokens(), 0U);
  EXPECT_EQ(table.pinned_pages(), 0U);
  EXPECT_GE(table.capacity(), 6U);
}

TEST(PageTable, CopiesKeepTheCapacityToGrowInto) {
  const PageTable table = table_of_five();
  PageTable copy(table);
  EXPECT_GE(copy.capacity(), 6U);
  copy.push_back({Position{20}, PageId{15}, 0, false});
  EXPECT_EQ(table.size(), 5U);
  PageTable assigned(1);
  assigned = copy;
  EXPECT_EQ(ids(assigned), ids(copy));
  EXPECT_EQ(assigned.resident_tokens(), copy.resident_tokens());
  EXPECT_EQ(assigned.pinned_pages(), 2U);
}

}  // namespace
}  // namespace kvsparse
