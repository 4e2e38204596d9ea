// SPDX-License-Identifier: Apache-2.0
#include "kvsparse/core/simd.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "../support/random_trace.hpp"

namespace kvsparse {
namespace {

using simd::Floats;
using simd::lanes;

constexpr float infinity = std::numeric_limits<float>::infinity();

float exp_of(float x) { return simd::exp_nonpositive(simd::broadcast(x))[0]; }

/// |computed - exact| in units of the last place of the rounded exact value, which is a normal float.
double ulps(float computed, double exact) {
  const auto rounded = static_cast<float>(exact);
  const double unit = static_cast<double>(std::nextafter(rounded, infinity)) - static_cast<double>(rounded);
  return std::abs(static_cast<double>(computed) - exact) / unit;
}

TEST(ExpNonpositive, IsWithinTwoUnitsInTheLastPlaceOfStdExp) {
  double worst = 0.0;
  float worst_at = 0.0F;
  const auto check = [&](const float* x) {
    const Floats result = simd::exp_nonpositive(simd::load(x));
    for (std::size_t lane = 0; lane < lanes; ++lane) {
      const double error = ulps(result[lane], std::exp(static_cast<double>(x[lane])));
      if (error > worst) {
        worst = error;
        worst_at = x[lane];
      }
    }
  };
  // Every 97th float from -87.33 up to -2^-40, then a fine even grid: both ends of the exponent range are dense.
  float block[lanes];
  std::size_t filled = 0;
  const auto add = [&](float x) {
    block[filled++] = x;
    if (filled == lanes) {
      check(block);
      filled = 0;
    }
  };
  for (auto bits = std::bit_cast<std::uint32_t>(-0x1p-40F); bits < std::bit_cast<std::uint32_t>(-87.33F); bits += 97) {
    add(std::bit_cast<float>(bits));
  }
  for (int i = 0; i <= 200000; ++i) add(-87.33F * static_cast<float>(i) / 200000.0F);
  EXPECT_LE(worst, 2.0) << "at x = " << worst_at;
}

TEST(ExpNonpositive, HasExactLimits) {
  EXPECT_EQ(exp_of(0.0F), 1.0F);
  EXPECT_EQ(exp_of(-0.0F), 1.0F);
  EXPECT_EQ(exp_of(-std::numeric_limits<float>::denorm_min()), 1.0F);
  EXPECT_EQ(exp_of(-infinity), 0.0F);
  EXPECT_EQ(exp_of(std::numeric_limits<float>::lowest()), 0.0F);
  EXPECT_EQ(exp_of(-88.0F), 0.0F);
  EXPECT_GE(exp_of(-87.33654F), std::numeric_limits<float>::min());
  EXPECT_TRUE(std::isnan(exp_of(std::numeric_limits<float>::quiet_NaN())));
}

TEST(ExpNonpositive, TreatsEachLaneByItself) {
  float x[lanes];
  for (std::size_t lane = 0; lane < lanes; ++lane) {
    x[lane] = lane % 4 == 0 ? -infinity : lane % 4 == 1 ? 0.0F : lane % 4 == 2 ? -300.0F : -1.0F;
  }
  const Floats result = simd::exp_nonpositive(simd::load(x));
  for (std::size_t lane = 0; lane < lanes; ++lane) EXPECT_EQ(result[lane], exp_of(x[lane])) << lane;
}

TEST(Sums, OneByOneAndManyAtOnceHaveTheSameBits) {
  kvsparse_test::TestRng rng(1);
  for (int round = 0; round < 200; ++round) {
    Floats vectors[lanes];
    for (Floats& vector : vectors) {
      for (std::size_t lane = 0; lane < lanes; ++lane) {
        vector[lane] = static_cast<float>(std::exp(10.0 * rng.gaussian()) * (rng.below(2) == 0 ? 1.0 : -1.0));
      }
    }
    const Floats sums = simd::sum_each(vectors);
    for (std::size_t lane = 0; lane < lanes; ++lane) {
      const float alone = simd::sum(vectors[simd::slot_of_lane(lane)]);
      EXPECT_EQ(std::bit_cast<std::uint32_t>(sums[lane]), std::bit_cast<std::uint32_t>(alone)) << lane;
    }
  }
}

TEST(Sums, AddEveryLaneOnce) {
  Floats powers{};
  for (std::size_t lane = 0; lane < lanes; ++lane) powers[lane] = static_cast<float>(1U << lane);
  EXPECT_EQ(simd::sum(powers), static_cast<float>((1U << lanes) - 1));
}

TEST(Sums, SlotsOfLanesAreAPermutation) {
  unsigned seen = 0;
  for (std::size_t lane = 0; lane < lanes; ++lane) seen |= 1U << simd::slot_of_lane(lane);
  EXPECT_EQ(seen, (1U << lanes) - 1);
}

TEST(Exchange, SwapsLanesAtADistance) {
  Floats v{};
  for (std::size_t lane = 0; lane < lanes; ++lane) v[lane] = static_cast<float>(lane);
  const Floats one = simd::exchange<1>(v);
  const Floats two = simd::exchange<2>(v);
  for (std::size_t lane = 0; lane < lanes; ++lane) {
    EXPECT_EQ(one[lane], static_cast<float>(lane ^ 1U));
    EXPECT_EQ(two[lane], static_cast<float>(lane ^ 2U));
  }
}

template <class Scalar>
Scalar from_bits(std::uint16_t bits) {
  return std::bit_cast<Scalar>(bits);
}

template <class Scalar>
class StoredScalar : public testing::Test {};
using Narrow = testing::Types<Half, Bfloat16>;
class NarrowName {
 public:
  template <class Scalar>
  static std::string GetName(int) {
    return std::string(scalar_name<Scalar>);
  }
};
TYPED_TEST_SUITE(StoredScalar, Narrow, NarrowName);

TYPED_TEST(StoredScalar, LoadsAll65536PatternsAsEigenWidensThem) {
  for (std::uint32_t first = 0; first < 65536; first += lanes) {
    TypeParam stored[lanes];
    for (std::size_t lane = 0; lane < lanes; ++lane) {
      stored[lane] = from_bits<TypeParam>(static_cast<std::uint16_t>(first + lane));
    }
    const Floats loaded = simd::load(stored);
    const Floats half_row = simd::load_half_row(stored);
    for (std::size_t lane = 0; lane < lanes; ++lane) {
      const auto expected = static_cast<float>(stored[lane]);
      if (std::isnan(expected)) {
        ASSERT_TRUE(std::isnan(loaded[lane])) << first + lane;
        continue;
      }
      ASSERT_EQ(std::bit_cast<std::uint32_t>(loaded[lane]), std::bit_cast<std::uint32_t>(expected)) << first + lane;
      if (lane < lanes / 2) {
        ASSERT_EQ(half_row[lane], expected) << first + lane;
      }
    }
  }
}

TYPED_TEST(StoredScalar, StoringWhatWasLoadedGivesTheSamePattern) {
  for (std::uint32_t first = 0; first < 65536; first += lanes) {
    TypeParam stored[lanes];
    TypeParam again[lanes];
    for (std::size_t lane = 0; lane < lanes; ++lane) {
      stored[lane] = from_bits<TypeParam>(static_cast<std::uint16_t>(first + lane));
    }
    simd::store(again, simd::load(stored));
    for (std::size_t lane = 0; lane < lanes; ++lane) {
      if (std::isnan(static_cast<float>(stored[lane]))) {
        ASSERT_TRUE(std::isnan(static_cast<float>(again[lane]))) << first + lane;
      } else {
        ASSERT_EQ(std::bit_cast<std::uint16_t>(again[lane]), first + lane);
      }
    }
  }
}

TYPED_TEST(StoredScalar, RoundsFloatsAsEigenDoes) {
  kvsparse_test::TestRng rng(2);
  for (int round = 0; round < 20000; ++round) {
    float values[lanes];
    for (float& value : values) {
      do {  // any finite float, ties between two stored values among them
        auto bits = static_cast<std::uint32_t>(rng.next());
        if (rng.below(4) == 0) bits &= 0xFFFFF000U;
        value = std::bit_cast<float>(bits);
        if (rng.below(2) == 0) value = static_cast<float>(rng.gaussian() * 100.0);
      } while (!std::isfinite(value));
    }
    TypeParam stored[lanes];
    simd::store(stored, simd::load(values));
    for (std::size_t lane = 0; lane < lanes; ++lane) {
      ASSERT_EQ(std::bit_cast<std::uint16_t>(stored[lane]),
                std::bit_cast<std::uint16_t>(static_cast<TypeParam>(values[lane])))
          << values[lane];
    }
  }
}

TEST(HalfRow, OfFloatsLeavesTheUpperLanesZero) {
  float row[lanes];
  for (std::size_t lane = 0; lane < lanes; ++lane) row[lane] = static_cast<float>(lane + 1);
  const Floats loaded = simd::load_half_row(row);
  for (std::size_t lane = 0; lane < lanes; ++lane) EXPECT_EQ(loaded[lane], lane < lanes / 2 ? row[lane] : 0.0F);
}

}  // namespace
}  // namespace kvsparse
