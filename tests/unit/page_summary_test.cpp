// SPDX-License-Identifier: Apache-2.0
#include "kvsparse/memory/page_bounds.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "../support/random_trace.hpp"
#include "kvsparse/memory/page_rows.hpp"

namespace kvsparse {
namespace {

constexpr std::size_t pages = 3;

/// Pages of stored keys with their summaries.
template <class Scalar>
struct Stored {
  Stored(std::size_t head_dim, std::size_t page_size, PageSummary kind, double scale)
      : geometry{1, 1, head_dim, page_size}, pool(geometry, pages), summaries(geometry, kind, pages) {
    kvsparse_test::TestRng rng(head_dim * 1000 + page_size);
    std::vector<float> key(head_dim);
    for (std::uint32_t page = 0; page < pages; ++page) {
      const PageId id{page};
      // The page was somebody else's before: whatever its summary says must be forgotten with the first key.
      for (float& element : key) element = static_cast<float>(100.0 * scale);
      store_row(key.data(), head_dim, pool.key_row(id, Slot{0}));
      summaries.add_key(id, pool.key_row(id, Slot{0}), true);
      for (std::uint32_t slot = 0; slot < page_size; ++slot) {
        for (float& element : key) element = static_cast<float>(scale * rng.gaussian());
        store_row(key.data(), head_dim, pool.key_row(id, Slot{slot}));
        summaries.add_key(id, pool.key_row(id, Slot{slot}), slot == 0);
      }
      table.push_back({Position{0}, id, static_cast<std::uint32_t>(page_size), false});
    }
  }
  double key(std::uint32_t page, std::uint32_t slot, std::size_t i) const {
    std::vector<float> row(geometry.head_dim);
    load_row(pool.key_row(PageId{page}, Slot{slot}), std::span<float>(row));
    return static_cast<double>(row[i]);
  }

  Geometry geometry;
  PageRows<Scalar> pool;
  PageSummaries<SummaryScalar<Scalar>> summaries;
  std::vector<ResidentPage> table;
};

template <class Scalar>
class Summaries : public testing::Test {};
using Scalars = testing::Types<float, Half, Bfloat16, Int8>;
class ScalarName {
 public:
  template <class Scalar>
  static std::string GetName(int) {
    return std::string(scalar_name<Scalar>);
  }
};
TYPED_TEST_SUITE(Summaries, Scalars, ScalarName);

constexpr std::size_t head_dims[] = {1, 7, 8, 12, 16, 20, 24, 40, 64, 130};

TYPED_TEST(Summaries, MinAndMaxAreThoseOfTheStoredKeys) {
  for (const std::size_t head_dim : head_dims) {
    const Stored<TypeParam> stored(head_dim, 7, PageSummary::min_max, 1.0);
    for (std::uint32_t page = 0; page < pages; ++page) {
      for (std::size_t i = 0; i < head_dim; ++i) {
        double lowest = stored.key(page, 0, i);
        double highest = lowest;
        for (std::uint32_t slot = 1; slot < 7; ++slot) {
          lowest = std::min(lowest, stored.key(page, slot, i));
          highest = std::max(highest, stored.key(page, slot, i));
        }
        const auto below = static_cast<double>(static_cast<float>(stored.summaries.min(PageId{page})[i]));
        const auto above = static_cast<double>(static_cast<float>(stored.summaries.max(PageId{page})[i]));
        if constexpr (std::is_same_v<SummaryScalar<TypeParam>, TypeParam>) {
          ASSERT_EQ(below, lowest) << head_dim << ' ' << i;
          ASSERT_EQ(above, highest) << head_dim << ' ' << i;
        } else {  // rounded to the next f16 outside
          ASSERT_LE(below, lowest) << head_dim << ' ' << i;
          ASSERT_GE(above, highest) << head_dim << ' ' << i;
          ASSERT_GT(below, lowest - std::abs(lowest) / 1024 - 1e-7) << head_dim << ' ' << i;
          ASSERT_LT(above, highest + std::abs(highest) / 1024 + 1e-7) << head_dim << ' ' << i;
        }
      }
    }
  }
}

TYPED_TEST(Summaries, BoundsAreTheQuestFormulaAndBoundEveryStoredKey) {
  kvsparse_test::TestRng rng(5);
  for (const std::size_t head_dim : head_dims) {
    for (const std::size_t page_size : {1U, 3U, 16U}) {
      for (const std::size_t group : {1U, 3U, 8U}) {
        const Stored<TypeParam> stored(head_dim, page_size, PageSummary::min_max, 3.0);
        std::vector<float> q(group * head_dim);
        for (float& element : q) element = static_cast<float>(rng.gaussian());
        q[0] = 0.0F;
        std::vector<float> padded(2 * group * round_up(head_dim, 16), 7.0F);
        std::vector<float> bounds(pages * group);
        page_upper_bounds(stored.summaries, std::span<const ResidentPage>(stored.table),
                          QueryGroup{q.data(), group, head_dim, head_dim, 1.0F}, BoundPooling::none,
                          std::span<float>(padded), std::span<float>(bounds));
        for (std::uint32_t page = 0; page < pages; ++page) {
          for (std::size_t head = 0; head < group; ++head) {
            double expected = 0.0;
            double magnitude = 0.0;
            for (std::size_t i = 0; i < head_dim; ++i) {
              const auto query = static_cast<double>(q[head * head_dim + i]);
              const auto low = static_cast<double>(static_cast<float>(stored.summaries.min(PageId{page})[i]));
              const auto high = static_cast<double>(static_cast<float>(stored.summaries.max(PageId{page})[i]));
              expected += std::max(query * low, query * high);
              magnitude += std::max(std::abs(query * low), std::abs(query * high));
            }
            const auto bound = static_cast<double>(bounds[page * group + head]);
            const double rounding = 1e-6 * magnitude;
            ASSERT_NEAR(bound, expected, rounding);
            for (std::uint32_t slot = 0; slot < page_size; ++slot) {
              double dot = 0.0;
              for (std::size_t i = 0; i < head_dim; ++i) {
                dot += static_cast<double>(q[head * head_dim + i]) * stored.key(page, slot, i);
              }
              ASSERT_LE(dot, bound + rounding) << "head_dim " << head_dim << " page_size " << page_size;
            }
          }
        }
      }
    }
  }
}

TYPED_TEST(Summaries, SumsAreThoseOfTheStoredKeys) {
  for (const std::size_t head_dim : head_dims) {
    const Stored<TypeParam> stored(head_dim, 5, PageSummary::mean, 1.0);
    for (std::uint32_t page = 0; page < pages; ++page) {
      for (std::size_t i = 0; i < head_dim; ++i) {
        double sum = 0.0;
        for (std::uint32_t slot = 0; slot < 5; ++slot) sum += stored.key(page, slot, i);
        ASSERT_NEAR(static_cast<double>(stored.summaries.sum(PageId{page})[i]), sum, 1e-5);
      }
    }
  }
}

TEST(PageSummaries, NoneCostsNothingAndACopiedPageGoesItsOwnWay) {
  const Geometry geometry{1, 1, 8, 4};
  EXPECT_EQ(PageSummaries<float>::bytes_per_page(geometry, PageSummary::none), 0U);
  EXPECT_EQ(PageSummaries<Half>::bytes_per_page(geometry, PageSummary::min_max), 32U);
  EXPECT_EQ(PageSummaries<Half>::bytes_per_page(geometry, PageSummary::mean), 32U);
  PageSummaries<float> original(geometry, PageSummary::min_max, 1);
  const std::vector<float> ones(8, 1.0F);
  const std::vector<float> twos(8, 2.0F);
  original.add_key(PageId{0}, ones.data(), true);
  PageSummaries<float> other(geometry, PageSummary::min_max, 2);
  other.copy(original, PageId{0}, PageId{1});
  other.add_key(PageId{1}, twos.data(), false);
  EXPECT_EQ(original.max(PageId{0})[3], 1.0F);
  EXPECT_EQ(other.max(PageId{1})[3], 2.0F);
  EXPECT_EQ(other.min(PageId{1})[3], 1.0F);
  PageSummaries<float> sums(geometry, PageSummary::mean, 2);
  sums.add_key(PageId{0}, ones.data(), true);
  sums.add_key(PageId{0}, twos.data(), false);
  sums.copy(sums, PageId{0}, PageId{1});
  EXPECT_EQ(sums.sum(PageId{1})[3], 3.0F);
}

}  // namespace
}  // namespace kvsparse
