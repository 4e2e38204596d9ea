// SPDX-License-Identifier: Apache-2.0
//
// Random numbers for tests: the same from the same seed with any compiler and standard library, so that a failure can
// be named by its seed. Hence the own generator and the own distributions (those of <random> are unspecified).
#pragma once

#include <cstdint>

namespace kvsparse_test {

// splitmix64: one addition and two multiplications a number, any seed is good.
class TestRng {
 public:
  explicit TestRng(std::uint64_t seed) : state_(seed) {}

  std::uint64_t next() {
    state_ += 0x9E3779B97F4A7C15ULL;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    return z ^ (z >> 31);
  }

  // [0, 1)
  double uniform() { return static_cast<double>(next() >> 11) * 0x1.0p-53; }

  // 0 .. n-1; the bias of the remainder is far below what a test could see.
  int below(int n) { return static_cast<int>(next() % static_cast<std::uint64_t>(n)); }

  // Mean 0, variance 1: the sum of twelve uniforms, which needs no log and no cos.
  double gaussian() {
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }

 private:
  std::uint64_t state_;
};

}  // namespace kvsparse_test
