// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <concepts>
#include <cstdint>
#include <limits>

#include "kvsparse/core/geometry.hpp"
#include "kvsparse/core/ids.hpp"
#include "kvsparse/core/saturating_size.hpp"

namespace kvsparse {
namespace {

template <class From, class To>
concept Converts = std::convertible_to<From, To> || std::assignable_from<To&, From>;

TEST(Ids, NoIdConvertsToAnotherOrToAndFromNumbers) {
  static_assert(!Converts<Position, PageIndex> && !Converts<PageIndex, Position>);
  static_assert(!Converts<PageId, PageIndex> && !Converts<PageIndex, PageId>);
  static_assert(!Converts<Slot, Position> && !Converts<Position, Slot> && !Converts<Slot, PageIndex>);
  static_assert(!std::convertible_to<int, Position> && !std::convertible_to<Position, std::int64_t>);
  static_assert(!std::convertible_to<std::uint32_t, PageIndex> && !std::convertible_to<std::uint32_t, Slot>);
}

TEST(Ids, PositionsAreOrderedAndSubtractToSignedDistances) {
  EXPECT_LT(Position{3}, Position{4});
  EXPECT_EQ(Position{3} + std::size_t{4}, Position{7});
  EXPECT_EQ(Position{3} - Position{7}, -4);
  EXPECT_EQ(Position{(std::int64_t{1} << 33) + 1} - Position{1}, std::int64_t{1} << 33);
  EXPECT_EQ(Position{}, Position{0});
}

TEST(Geometry, RowsArePaddedToWholeVectors) {
  EXPECT_EQ((Geometry{1, 1, 1, 1}.row_stride()), 8U);
  EXPECT_EQ((Geometry{1, 1, 8, 1}.row_stride()), 8U);
  EXPECT_EQ((Geometry{1, 1, 9, 1}.row_stride()), 16U);
  EXPECT_EQ((Geometry{1, 1, 130, 1}.row_stride()), 136U);
  EXPECT_EQ((Geometry{24, 8, 128, 16}.group()), 3U);
}

TEST(Geometry, PageBoundariesAreHalfOpen) {
  for (const std::size_t page_size : {1U, 3U, 7U, 16U, 256U}) {
    const Geometry geometry{1, 1, 8, page_size};
    const auto size = static_cast<std::int64_t>(page_size);
    EXPECT_EQ(geometry.pages_for(0), 0U);
    for (std::int64_t page = 0; page < 5; ++page) {
      const Position first{page * size};
      const Position last{(page + 1) * size - 1};
      EXPECT_EQ(geometry.page_number(first), static_cast<std::size_t>(page));
      EXPECT_EQ(geometry.page_number(last), static_cast<std::size_t>(page));
      EXPECT_EQ(geometry.slot_of(first), Slot{0});
      EXPECT_EQ(geometry.slot_of(last), Slot{static_cast<std::uint32_t>(page_size - 1)});
      EXPECT_EQ(geometry.pages_for(static_cast<std::size_t>(first.value)), static_cast<std::size_t>(page));
      EXPECT_EQ(geometry.pages_for(static_cast<std::size_t>(first.value) + 1), static_cast<std::size_t>(page + 1));
    }
  }
}

TEST(Sizes, AreDividedUpWhateverTheirSize) {
  constexpr std::size_t most = std::numeric_limits<std::size_t>::max();
  EXPECT_EQ(divide_up(0, 16), 0U);
  EXPECT_EQ(divide_up(1, 16), 1U);
  EXPECT_EQ(divide_up(16, 16), 1U);
  EXPECT_EQ(divide_up(17, 16), 2U);
  EXPECT_EQ(divide_up(most, 1), most);
  EXPECT_EQ(divide_up(most, 16), most / 16 + 1);
}

TEST(Sizes, SumsAndProductsAreExactOrTheLargest) {
  constexpr std::size_t most = std::numeric_limits<std::size_t>::max();
  constexpr int bits = std::numeric_limits<std::size_t>::digits;
  const auto power = [](int exponent) { return std::size_t{1} << exponent; };
  for (int i = 0; i < bits; ++i) {
    for (int j = 0; j < bits; ++j) {
      const SaturatingSize a = power(i), b = power(j);
      EXPECT_EQ(a * b, i + j < bits ? power(i + j) : most) << i << " " << j;
      EXPECT_EQ(a * power(j), a * b);
      EXPECT_EQ(power(i) * b, a * b);
      const bool sum_wraps = i == bits - 1 && j == bits - 1;
      EXPECT_EQ(a + b, sum_wraps ? most : power(i) + power(j)) << i << " " << j;
      EXPECT_EQ(a + power(j), a + b);
    }
    EXPECT_EQ(SaturatingSize(most - power(i)) + power(i), most);
    EXPECT_EQ(SaturatingSize(most - power(i)) + (power(i) + 1), most);
    EXPECT_EQ(SaturatingSize(most) * power(i) + power(i), most);
    EXPECT_EQ(SaturatingSize(most / power(i)) * power(i), most - (power(i) - 1));
  }
  EXPECT_EQ(SaturatingSize() * most, 0U);
  EXPECT_EQ(SaturatingSize(most) * std::size_t{0}, 0U);
}

TEST(Geometry, PositionsBeyond32BitsKeepTheirPageAndSlot) {
  const Geometry geometry{1, 1, 8, 7};
  const std::size_t far_page = std::numeric_limits<std::size_t>::max() / 16;
  const Position far{static_cast<std::int64_t>(far_page) * 7 + 5};
  EXPECT_EQ(geometry.page_number(far), far_page);
  EXPECT_EQ(geometry.slot_of(far), Slot{5});
}

}  // namespace
}  // namespace kvsparse
