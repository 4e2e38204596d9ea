// SPDX-License-Identifier: Apache-2.0
#include "support/shrink.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

namespace kvsparse_test {
namespace {

using Numbers = std::vector<int>;

std::optional<int> one_less(int number, std::size_t n) {
  return n == 0 && number > 0 ? std::optional(number - 1) : std::nullopt;
}

TEST(Shrink, KeepsWhatMattersInItsOrder) {
  Numbers numbers(500);
  std::iota(numbers.begin(), numbers.end(), 0);
  std::size_t runs = 0;
  const auto fails = [&](const Numbers& some) {
    ++runs;
    const auto first = std::find(some.begin(), some.end(), 300);
    return first != some.end() && std::find(first, some.end(), 417) != some.end();
  };
  const auto as_it_is = [](int, std::size_t) { return std::optional<int>(); };
  EXPECT_EQ(shrink(numbers, fails, as_it_is), (Numbers{300, 417}));
  EXPECT_LT(runs, 200U);
}

TEST(Shrink, MakesItemsSimplerWhileTheyFail) {
  const auto fails = [](const Numbers& some) { return std::accumulate(some.begin(), some.end(), 0) >= 10; };
  const Numbers shrunk = shrink(Numbers{3, 50, 7}, fails, one_less);
  EXPECT_EQ(shrunk, Numbers{10});
}

TEST(Shrink, LeavesNothingOfWhatFailsByItself) {
  EXPECT_TRUE(shrink(
                  Numbers{1, 2, 3}, [](const Numbers&) { return true; }, one_less)
                  .empty());
}

}  // namespace
}  // namespace kvsparse_test
