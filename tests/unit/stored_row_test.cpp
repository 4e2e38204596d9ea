// SPDX-License-Identifier: Apache-2.0
#include "kvsparse/core/stored_row.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../support/random_trace.hpp"

namespace kvsparse {
namespace {

constexpr std::size_t head_dims[] = {1, 7, 8, 12, 40, 64, 80, 130};

std::vector<float> gaussian_row(std::size_t head_dim, double scale, std::uint64_t seed) {
  kvsparse_test::TestRng rng(seed);
  std::vector<float> row(head_dim);
  for (float& element : row) element = static_cast<float>(scale * rng.gaussian());
  return row;
}

float largest_magnitude(const std::vector<float>& row) {
  float largest = 0.0F;
  for (const float element : row) largest = std::max(largest, std::abs(element));
  return largest;
}

template <class Scalar>
std::vector<float> round_trip(const std::vector<float>& row) {
  std::vector<Scalar> stored(stored_row_size<Scalar>(row.size()), Scalar{});
  store_row(row.data(), row.size(), stored.data());
  std::vector<float> loaded(row.size());
  load_row(stored.data(), std::span<float>(loaded));
  return loaded;
}

TEST(Int8Rows, AreWithinHalfAStepOfWhatWasStored) {
  for (const std::size_t head_dim : head_dims) {
    for (const double scale : {1e-30, 1e-3, 1.0, 300.0, 1e30}) {
      const std::vector<float> row = gaussian_row(head_dim, scale, head_dim);
      const std::vector<float> loaded = round_trip<Int8>(row);
      const double step = static_cast<double>(largest_magnitude(row)) / 127;
      for (std::size_t i = 0; i < head_dim; ++i) {
        ASSERT_LE(std::abs(static_cast<double>(loaded[i]) - static_cast<double>(row[i])), 0.50001 * step)
            << "head_dim " << head_dim << ", scale " << scale;
      }
    }
  }
}

TEST(Int8Rows, KeepTheLargestElementAndZero) {
  const std::vector<float> row{0.0F, -6.35F, 3.0F, 0.01F};
  const std::vector<float> loaded = round_trip<Int8>(row);
  EXPECT_EQ(loaded[0], 0.0F);
  EXPECT_NEAR(loaded[1], -6.35F, 1e-6);
  EXPECT_NEAR(loaded[2], 3.0F, 1e-6);  // 60 steps of .05
  EXPECT_EQ(loaded[3], 0.0F);
}

TEST(Int8Rows, AreZeroWhenAllIsZeroOrVanishes) {
  for (const float tiny : {0.0F, 1e-36F, std::numeric_limits<float>::denorm_min()}) {
    for (const float element : round_trip<Int8>({tiny, 0.0F, -tiny})) EXPECT_EQ(element, 0.0F);
  }
}

TEST(Int8Rows, AreNanAsAWholeWhenAnElementIsNotFinite) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float odd : {infinity, -infinity, std::numeric_limits<float>::quiet_NaN()}) {
    for (const float element : round_trip<Int8>({1.0F, odd, 2.0F})) EXPECT_TRUE(std::isnan(element));
  }
}

TEST(Int8Rows, HoldTheScaleBehindPaddingOfZeros) {
  const std::vector<float> row = gaussian_row(12, 1.0, 3);
  std::vector<Int8> stored(stored_row_size<Int8>(12), Int8{99});
  ASSERT_EQ(stored.size(), 24U);
  store_row(row.data(), 12, stored.data());
  for (std::size_t i = 12; i < 16; ++i) EXPECT_EQ(stored[i].steps, 0);
  EXPECT_FLOAT_EQ(row_scale(stored.data(), 12), largest_magnitude(row) / 127);
}

TEST(RowsWithoutAScale, AreRoundedElementByElementAndPadded) {
  for (const std::size_t head_dim : head_dims) {
    const std::vector<float> row = gaussian_row(head_dim, 1.0, head_dim);
    EXPECT_EQ(round_trip<float>(row), row);
    const std::vector<float> half = round_trip<Half>(row);
    for (std::size_t i = 0; i < head_dim; ++i) ASSERT_EQ(half[i], static_cast<float>(static_cast<Half>(row[i])));
    EXPECT_EQ(row_scale(static_cast<const Half*>(nullptr), head_dim), 1.0F);
  }
}

template <class T>
void expect_neighbours(float x) {
  const float below = static_cast<float>(at_most<T>(x));
  const float above = static_cast<float>(at_least<T>(x));
  ASSERT_LE(below, x);
  ASSERT_GE(above, x);
  const float nearest = static_cast<float>(static_cast<T>(x));
  ASSERT_TRUE(below == nearest || above == nearest) << x;
  if (nearest == x) {
    ASSERT_EQ(below, above);
  }
}

TEST(OutwardRounding, BracketsEveryFloatByNeighbours) {
  kvsparse_test::TestRng rng(4);
  for (int i = 0; i < 20000; ++i) {
    const float x = static_cast<float>(rng.gaussian() * std::pow(10.0, static_cast<double>(rng.below(12)) - 8.0));
    expect_neighbours<Half>(std::clamp(x, -60000.0F, 60000.0F));
    expect_neighbours<Bfloat16>(x);
    expect_neighbours<float>(x);
  }
  for (const float x : {0.0F, -0.0F, 1.0F, -1.0F, 1e-9F, -1e-9F, 65504.0F, -65504.0F}) {
    expect_neighbours<Half>(x);
    expect_neighbours<Bfloat16>(x);
  }
  EXPECT_TRUE(std::isnan(static_cast<float>(at_most<Half>(std::numeric_limits<float>::quiet_NaN()))));
  EXPECT_EQ(static_cast<float>(at_least<Half>(1e6F)), std::numeric_limits<float>::infinity());
  EXPECT_EQ(static_cast<float>(at_most<Half>(1e6F)), 65504.0F);
}

}  // namespace
}  // namespace kvsparse
