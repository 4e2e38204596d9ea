// SPDX-License-Identifier: Apache-2.0
// How fast this process can read memory, measured the way a kernel reads: whole vectors, one pass, nothing written.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <kvsparse/core/simd.hpp>
#include <kvsparse/memory/page_pool.hpp>

namespace kvsparse_bench {

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// One pass over the buffer; the result keeps the compiler from dropping the reads.
inline float read_once(const float* data, std::size_t floats) {
  using kvsparse::simd::Floats;
  constexpr std::size_t step = kvsparse::simd::lanes;
  Floats sums[8] = {};
  for (std::size_t i = 0; i + 8 * step <= floats; i += 8 * step) {
    KVSPARSE_UNROLL
    for (std::size_t s = 0; s < 8; ++s) sums[s] += kvsparse::simd::load(data + i + s * step);
  }
  float total = 0.0F;
  for (const Floats& sum : sums) total += kvsparse::simd::sum(sum);
  return total;
}

/// A buffer of `bytes`, large against every cache when it stands for DRAM.
class ReadBuffer {
 public:
  explicit ReadBuffer(std::size_t bytes) : floats_(bytes / sizeof(float)) {
    std::fill_n(floats_.data(), floats_.size(), 1.0F);
  }
  float read() const { return read_once(floats_.data(), floats_.size()); }
  std::size_t bytes() const { return floats_.size() * sizeof(float); }

 private:
  kvsparse::AlignedArray<float> floats_;
};

/// Bytes per second of the median of `passes` passes over 512 MiB.
inline double measure_dram_bandwidth(int passes = 7) {
  const ReadBuffer buffer(std::size_t{512} << 20);
  std::vector<double> seconds;
  volatile float sink = buffer.read();
  for (int pass = 0; pass < passes; ++pass) {
    const Clock::time_point start = Clock::now();
    sink = buffer.read();
    seconds.push_back(seconds_since(start));
  }
  static_cast<void>(sink);
  std::nth_element(seconds.begin(), seconds.begin() + passes / 2, seconds.end());
  return static_cast<double>(buffer.bytes()) / seconds[static_cast<std::size_t>(passes / 2)];
}

}  // namespace kvsparse_bench
