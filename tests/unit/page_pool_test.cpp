// SPDX-License-Identifier: Apache-2.0
#include "kvsparse/memory/page_pool.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <set>
#include <vector>

namespace kvsparse {
namespace {

constexpr Geometry geometry{2, 1, 5, 3};

TEST(PagePool, HandsOutEveryPageOnceFromTheLowest) {
  PagePool<float> pool(geometry, 4);
  EXPECT_EQ(pool.page_count(), 4U);
  std::set<std::uint32_t> seen;
  for (std::uint32_t page = 0; page < 4; ++page) {
    const PageId id = pool.acquire();
    EXPECT_EQ(id.value, page);
    seen.insert(id.value);
  }
  EXPECT_EQ(seen.size(), 4U);
  EXPECT_EQ(pool.free_pages(), 0U);
}

TEST(PagePool, ReusesThePageGivenBackLast) {
  PagePool<float> pool(geometry, 4);
  const PageId first = pool.acquire();
  const PageId second = pool.acquire();
  pool.release(first);
  pool.release(second);
  EXPECT_EQ(pool.acquire(), second);
  EXPECT_EQ(pool.acquire(), first);
  EXPECT_EQ(pool.acquire().value, 2U);
}

TEST(PagePool, ClearTakesEveryPageBack) {
  PagePool<float> pool(geometry, 3);
  for (int i = 0; i < 3; ++i) static_cast<void>(pool.acquire());
  pool.clear();
  EXPECT_EQ(pool.free_pages(), 3U);
  EXPECT_EQ(pool.acquire().value, 0U);
}

TEST(PagePool, RowsOfAllPagesAndSlotsAreDisjointAndAlignedLikeTheView) {
  PagePool<Half> pool(geometry, 3);
  const PagedKv<Half, Half> view = pool.view();
  EXPECT_EQ(view.head_dim, 5U);
  std::set<const Half*> rows;
  for (std::uint32_t page = 0; page < 3; ++page) {
    for (std::uint32_t slot = 0; slot < 3; ++slot) {
      const Half* key = pool.key_row(PageId{page}, Slot{slot});
      const Half* value = pool.value_row(PageId{page}, Slot{slot});
      rows.insert(key);
      rows.insert(value);
      EXPECT_EQ(key, view.keys + page * view.key_page_stride + slot * view.key_row_stride);
      EXPECT_EQ(value, view.values + page * view.value_page_stride + slot * view.value_row_stride);
    }
  }
  EXPECT_EQ(rows.size(), 18U);
  const Half* previous = nullptr;
  for (const Half* row : rows) {
    if (previous != nullptr) {
      EXPECT_GE(row - previous, 8);
    }
    previous = row;
  }
}

TEST(PagePool, CopiesHaveTheSamePagesAndGoTheirOwnWay) {
  PagePool<float> pool(geometry, 3);
  const PageId page = pool.acquire();
  *pool.key_row(page, Slot{1}) = 4.0F;
  PagePool<float> copy(pool);
  EXPECT_EQ(*copy.key_row(page, Slot{1}), 4.0F);
  *copy.key_row(page, Slot{1}) = 5.0F;
  EXPECT_EQ(*pool.key_row(page, Slot{1}), 4.0F);
  EXPECT_EQ(copy.acquire(), pool.acquire());
  PagePool<float> assigned(geometry, 1);
  assigned = copy;
  EXPECT_EQ(assigned.page_count(), 3U);
  EXPECT_EQ(assigned.free_pages(), 1U);
  EXPECT_EQ(*assigned.key_row(page, Slot{1}), 5.0F);
  const PagePool<float> moved(std::move(assigned));
  EXPECT_EQ(*moved.key_row(page, Slot{1}), 5.0F);
}

TEST(AlignedArray, IsAlignedToCacheLinesAndLargeOnesToHugePages) {
  const AlignedArray<float> small(3);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(small.data()) % 64, 0U);
  const AlignedArray<float> large((std::size_t{2} << 20) / sizeof(float));
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(large.data()) % (std::size_t{2} << 20), 0U);
  const AlignedArray<float> empty(0);
  EXPECT_EQ(empty.data(), nullptr);
}

template <class Scalar>
void store_and_load(std::size_t head_dim) {
  std::vector<float> row(head_dim);
  for (std::size_t i = 0; i < head_dim; ++i) row[i] = 0.1F * static_cast<float>(i) - 1.0F;
  const std::size_t stride = round_up(head_dim, row_padding);
  std::vector<Scalar> stored(stride + 1, static_cast<Scalar>(77.0F));
  store_row(row.data(), head_dim, stored.data());
  for (std::size_t i = 0; i < stride; ++i) {
    const Scalar expected = i < head_dim ? static_cast<Scalar>(row[i]) : static_cast<Scalar>(0.0F);
    EXPECT_EQ(static_cast<float>(stored[i]), static_cast<float>(expected)) << "element " << i << " of " << head_dim;
  }
  EXPECT_EQ(static_cast<float>(stored[stride]), 77.0F) << "written beyond the row of " << head_dim;

  // A row that is stored as Scalar already is taken as it is.
  std::vector<Scalar> again(stride, static_cast<Scalar>(77.0F));
  store_row(stored.data(), head_dim, again.data());
  std::vector<float> loaded(head_dim);
  load_row(again.data(), std::span<float>(loaded));
  for (std::size_t i = 0; i < head_dim; ++i) EXPECT_EQ(loaded[i], static_cast<float>(stored[i]));
  for (std::size_t i = head_dim; i < stride; ++i) EXPECT_EQ(static_cast<float>(again[i]), 0.0F);
}

TEST(Rows, AreRoundedOnStoreAndPaddedWithZeros) {
  for (const std::size_t head_dim : {1U, 5U, 7U, 8U, 9U, 15U, 16U, 17U, 40U, 130U}) {
    store_and_load<float>(head_dim);
    store_and_load<Half>(head_dim);
    store_and_load<Bfloat16>(head_dim);
  }
}

}  // namespace
}  // namespace kvsparse
