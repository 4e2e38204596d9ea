// SPDX-License-Identifier: Apache-2.0
#include "kvsparse/memory/page_pool.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "support/refusal.hpp"

namespace kvsparse {
namespace {

constexpr Geometry geometry{2, 1, 5, 3};

TEST(PageLedger, HandsOutEveryPageOnceFromTheLowest) {
  PageLedger ledger(4);
  EXPECT_EQ(ledger.page_count(), 4U);
  for (std::uint32_t page = 0; page < 4; ++page) {
    EXPECT_EQ(ledger.references(PageId{page}), 0U);
    EXPECT_EQ(ledger.acquire(), PageId{page});
    EXPECT_EQ(ledger.references(PageId{page}), 1U);
  }
  EXPECT_EQ(ledger.free_pages(), 0U);
}

TEST(PageLedger, HeadsThatTakeTurnsGetPagesInOnePieceEach) {
  PageLedger ledger(12, 3);
  const auto expect_turns = [&](std::uint32_t turns) {
    for (std::uint32_t turn = 0; turn < turns; ++turn) {
      for (std::uint32_t head = 0; head < 3; ++head) EXPECT_EQ(ledger.acquire().value, head * 4 + turn);
    }
  };
  expect_turns(3);
  for (const std::uint32_t page : {4U, 0U, 8U}) ledger.release(PageId{page});
  EXPECT_EQ(ledger.acquire().value, 8U);
  for (const std::uint32_t page : {1U, 8U, 2U, 9U, 10U, 5U, 6U}) ledger.release(PageId{page});
  EXPECT_EQ(ledger.free_pages(), 12U);
  expect_turns(4);
  EXPECT_EQ(ledger.free_pages(), 0U);
}

TEST(PageLedger, ReusesThePageGivenBackLast) {
  PageLedger ledger(4);
  const PageId first = ledger.acquire();
  const PageId second = ledger.acquire();
  static_cast<void>(ledger.acquire());
  ledger.release(first);
  ledger.release(second);
  EXPECT_EQ(ledger.acquire(), second);
  EXPECT_EQ(ledger.acquire(), first);
  EXPECT_EQ(ledger.acquire().value, 3U);
}

TEST(PageLedger, ASharedPageIsFreeOnceItsLastTableGaveItBack) {
  PageLedger ledger(2);
  const PageId page = ledger.acquire();
  EXPECT_FALSE(ledger.is_shared(page));
  ledger.retain(page);
  ledger.retain(page);
  EXPECT_TRUE(ledger.is_shared(page));
  EXPECT_EQ(ledger.shared_pages(), 1U);
  ledger.release(page);
  EXPECT_TRUE(ledger.is_shared(page));
  ledger.release(page);
  EXPECT_EQ(ledger.shared_pages(), 0U);
  EXPECT_EQ(ledger.free_pages(), 1U);
  ledger.release(page);
  EXPECT_EQ(ledger.free_pages(), 2U);
}

TEST(PageLedger, AnEmptyOneHandsOutFromTheLowestAgainWhateverTheOrderOfReturns) {
  PageLedger ledger(5);
  for (int i = 0; i < 4; ++i) static_cast<void>(ledger.acquire());
  for (const std::uint32_t page : {2U, 0U, 3U, 1U}) ledger.release(PageId{page});
  for (std::uint32_t page = 0; page < 5; ++page) EXPECT_EQ(ledger.acquire(), PageId{page});
}

TEST(PageRows, OfAllPagesAndSlotsAreDisjointAndAlignedLikeTheView) {
  PageRows<Half> pool(geometry, 3);
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

TEST(PagePool, HandlesAreOnePoolAndACopiedPageGoesItsOwnWay) {
  PagePool<float> pool(geometry, PageSummary::min_max, 3);
  PagePool<float> handle(pool);
  const PageId page = pool.acquire();
  const std::vector<float> ones(8, 1.0F);
  store_row(ones.data(), 5, pool.memory().rows.key_row(page, Slot{1}));
  pool.memory().summaries.add_key(page, pool.memory().rows.key_row(page, Slot{1}), true);
  EXPECT_TRUE(handle == pool);
  EXPECT_EQ(handle.free_pages(), 2U);
  pool = PagePool<float>(geometry, PageSummary::min_max, 1);
  EXPECT_FALSE(handle == pool);
  EXPECT_EQ(*handle.memory().rows.key_row(page, Slot{1}), 1.0F) << "the memory goes with the last handle";
  const PageId copy = pool.acquire_copy(handle, page);
  EXPECT_EQ(pool.memory().summaries.max(copy)[4], 1.0F);
  *pool.memory().rows.key_row(copy, Slot{1}) = 5.0F;
  EXPECT_EQ(*handle.memory().rows.key_row(page, Slot{1}), 1.0F);
  const PagePool<float> moved(std::move(handle));
  EXPECT_EQ(moved.references(page), 1U);
}

TEST(PagePool, IsNeverLargerThanTheBytesItMayHave) {
  constexpr Geometry two_heads{2, 2, 5, 3};
  const std::size_t least = PagePool<Half>::bytes_required(two_heads, PageSummary::min_max, 2);
  for (std::size_t bytes = least; bytes < 3 * least; bytes += 7) {
    const auto pool = PagePool<Half>::of_bytes(two_heads, PageSummary::min_max, bytes);
    EXPECT_EQ(pool.page_count() % 2, 0U);
    EXPECT_LE(PagePool<Half>::bytes_required(two_heads, PageSummary::min_max, pool.page_count()), bytes);
    EXPECT_GT(PagePool<Half>::bytes_required(two_heads, PageSummary::min_max, pool.page_count() + 2), bytes);
  }
  EXPECT_THROW(PagePool<Half>::of_bytes(two_heads, PageSummary::min_max, least - 1), ConfigError);
  EXPECT_THROW(PagePool<Half>(two_heads, PageSummary::none, 3), ConfigError);
  EXPECT_THROW(PagePool<Half>(two_heads, PageSummary::none, 0), ConfigError);
  EXPECT_THROW(PagePool<Half>(Geometry{1, 1, 0, 4}, PageSummary::none, 1), ConfigError);
  EXPECT_THROW(PagePool<Half>::of_bytes(Geometry{1, 0, 8, 4}, PageSummary::none, 1000), ConfigError);
}

TEST(PagePool, OfShapesAndSizesThatDoNotFitIsRefused) {
  const auto refusal = [](const Geometry& shape, std::size_t pages) {
    return kvsparse_test::refusal([&] { PagePool<float>(shape, PageSummary::none, pages); });
  };
  constexpr std::size_t too_wide = (std::size_t{1} << 20) + 1;
  EXPECT_EQ(refusal({1, 1, 8, 257}, 1), "a pool's page_size = 257 exceeds 256");
  for (const Geometry& wide :
       {Geometry{1, 1, too_wide, 4}, Geometry{1, too_wide, 8, 4}, Geometry{1, 1, 8, 4, too_wide}}) {
    EXPECT_EQ(refusal(wide, 1), "a pool's kv_heads, head_dim and value_dim are at most 2^20, not 1048577");
    EXPECT_THROW(PagePool<float>::of_bytes(wide, PageSummary::none, 1000), ConfigError);
  }
  EXPECT_EQ(refusal({1, 1, 8, 4}, std::size_t{1} << 31), "2147483648 pages exceed the limit of 2^31 - 1");
  // 2^13 pages of 2^19 bytes: where sizes have 32 bits the product would wrap to nothing.
  constexpr Geometry wide{1, 1, std::size_t{1} << 12, 16};
  constexpr std::size_t pages = std::size_t{1} << 13;
  if (sizeof(std::size_t) > 4) {
    EXPECT_GT(PagePool<float>::bytes_required(wide, PageSummary::none, pages) >> 16 >> 16, 0U);
  } else {
    const std::string sentence = "8192 pages of 524296 bytes exceed the 2^31 - 1 that can be addressed";
    EXPECT_EQ(refusal(wide, pages), sentence);
    EXPECT_THROW(PagePool<float>::bytes_required(wide, PageSummary::none, pages), ConfigError);
  }
}

template <class Scalar>
void expect_freed_page_to_hold_no_number() {
  PagePool<Scalar> pool(geometry, PageSummary::none, 2);
  const PageId page = pool.acquire(), other = pool.acquire();
  auto& rows = pool.memory().rows;
  const std::vector<float> ones(geometry.head_dim, 1.0F);
  const auto numbers = [&](PageId of) {
    std::size_t count = 0;
    std::vector<float> row(geometry.head_dim);
    for (std::uint32_t slot = 0; slot < geometry.page_size; ++slot) {
      rows.load_key(of, {slot}, row);
      for (const float element : row) count += std::isnan(element) ? 0 : 1;
      rows.load_value(of, {slot}, row);
      for (const float element : row) count += std::isnan(element) ? 0 : 1;
    }
    return count;
  };
  for (const PageId of : {page, other}) {
    for (std::uint32_t slot = 0; slot < geometry.page_size; ++slot) {
      store_row(ones.data(), geometry.head_dim, rows.key_row(of, {slot}));
      store_row(ones.data(), geometry.head_dim, rows.value_row(of, {slot}));
    }
  }
  const std::size_t all = 2 * geometry.page_size * geometry.head_dim;
  pool.retain(page);
  pool.release(page);
  EXPECT_EQ(numbers(page), all) << "somebody still holds it";
  pool.release(page);
  EXPECT_EQ(numbers(page), KVSPARSE_POISON_FREED_PAGES != 0 ? 0U : all);
  EXPECT_EQ(numbers(other), all);
}

TEST(PagePool, AFreedPageHoldsNoNumberInDebugBuilds) {
  expect_freed_page_to_hold_no_number<float>();
  expect_freed_page_to_hold_no_number<Half>();
  expect_freed_page_to_hold_no_number<Bfloat16>();
  expect_freed_page_to_hold_no_number<Int8>();
#ifndef NDEBUG
  EXPECT_EQ(KVSPARSE_POISON_FREED_PAGES, 1);
#endif
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
