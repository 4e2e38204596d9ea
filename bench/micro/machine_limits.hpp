// SPDX-License-Identifier: Apache-2.0
// What this machine can do at most, measured the way a kernel works: reading whole vectors, one pass, nothing written;
// and multiplying and adding in registers. Together they are the roofline of a step.
#pragma once

#include <algorithm>
#include <array>
#include <barrier>
#include <chrono>
#include <cstddef>
#include <kvsparse/core/simd.hpp>
#include <kvsparse/memory/aligned_array.hpp>
#include <limits>
#include <thread>
#include <vector>

#include "cache_sizes.hpp"

namespace kvsparse_bench {

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

inline double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

inline std::size_t hardware_threads() { return std::max(1U, std::thread::hardware_concurrency()); }

/// Runs work(thread) on `threads` threads that start together; seconds from the first start to the last end.
template <class Work>
double team_seconds(std::size_t threads, Work&& work) {
  std::vector<Clock::time_point> starts(threads), ends(threads);
  std::barrier ready(static_cast<std::ptrdiff_t>(threads));
  const auto run = [&](std::size_t thread) {
    ready.arrive_and_wait();
    starts[thread] = Clock::now();
    work(thread);
    ends[thread] = Clock::now();
  };
  {
    std::vector<std::jthread> others;
    for (std::size_t thread = 1; thread < threads; ++thread) others.emplace_back(run, thread);
    run(0);
  }
  const Clock::duration taken =
      *std::max_element(ends.begin(), ends.end()) - *std::min_element(starts.begin(), starts.end());
  return std::chrono::duration<double>(taken).count();
}

/// One pass over the buffer in Streams runs side by side, which keeps more of the memory's prefetchers busy than one.
/// Eight independent sums, so that no addition waits for another; the result keeps the compiler from dropping the
/// reads.
template <std::size_t Streams>
[[gnu::noinline]] float read_streams(const float* data, std::size_t floats) {
  using kvsparse::simd::Floats;
  constexpr std::size_t vectors = 8 / Streams, step = vectors * kvsparse::simd::lanes;
  const std::size_t run = floats / Streams / step * step;
  Floats sums[Streams][vectors] = {};
  for (std::size_t i = 0; i < run; i += step) {
    KVSPARSE_UNROLL
    for (std::size_t s = 0; s < Streams; ++s) {
      KVSPARSE_UNROLL
      for (std::size_t v = 0; v < vectors; ++v) {
        sums[s][v] += kvsparse::simd::load(data + s * run + i + v * kvsparse::simd::lanes);
      }
    }
  }
  Floats total{};
  for (const auto& stream : sums) {
    for (const Floats& sum : stream) total += sum;
  }
  return kvsparse::simd::sum(total);
}

/// Bytes that read_streams really touches of `floats`.
constexpr std::size_t streamed_bytes(std::size_t floats) {
  return floats / (8 * kvsparse::simd::lanes) * (8 * kvsparse::simd::lanes) * sizeof(float);
}

/// `rounds` times 12 independent chains of multiply-adds: a core that starts two a cycle and waits four cycles for each
/// needs eight to be busy, and twelve and their two operands still fit into 16 registers. Values converge to 1, so none
/// is denormal.
[[gnu::noinline]] inline float multiply_add_chains(std::size_t rounds) {
  using kvsparse::simd::Floats;
  constexpr std::size_t chains = 12;
  Floats sums[chains];
  for (std::size_t c = 0; c < chains; ++c) sums[c] = kvsparse::simd::broadcast(static_cast<float>(c + 1));
  volatile float opaque = 0.5F;  // unknown to the compiler, which could otherwise foresee the result
  const Floats half = kvsparse::simd::broadcast(opaque);
  for (std::size_t i = 0; i < rounds; ++i) {
    KVSPARSE_UNROLL
    for (Floats& sum : sums) sum = kvsparse::simd::fma(sum, half, half);
  }
  Floats total{};
  for (const Floats& sum : sums) total += sum;
  return kvsparse::simd::sum(total);
}
constexpr double flops_per_round = 12.0 * 2.0 * kvsparse::simd::lanes;

/// Measures, one number a call, so that a bench can take turns with what it holds against them.
class LimitProbe {
 public:
  /// Buffers: half of every L2; a quarter of the L3, but more than the L2s hold; beyond all caches.
  LimitProbe(const CacheSizes& caches, std::size_t most_threads) {
    const std::size_t mib = std::size_t{1} << 20;
    bytes_[0] = caches.l2_per_core / 2;  // of each thread
    bytes_[1] = std::max(caches.l3 / 4, 4 * caches.l2_per_core * most_threads);
    bytes_[2] = std::clamp(4 * caches.l3, 256 * mib, 1024 * mib);
    buffer_ = kvsparse::AlignedArray<float>(std::max(bytes_[2], bytes_[0] * most_threads) / sizeof(float));
    std::fill_n(buffer_.data(), buffer_.size(), 1.0F);
  }

  /// Bytes per second that `threads` threads read together.
  double read_bandwidth(MemoryLevel level, std::size_t threads) {
    const std::size_t bytes = bytes_[static_cast<std::size_t>(level)];
    return read_bandwidth(level == MemoryLevel::l2 ? bytes * threads : bytes, threads);
  }
  /// The same over a working set of `bytes`, at most all of the buffer: the fastest of three forms of the loop.
  double read_bandwidth(std::size_t bytes, std::size_t threads) {
    return std::max({read<1>(bytes, threads), read<4>(bytes, threads), read<8>(bytes, threads)});
  }
  /// Floating-point operations per second of `threads` threads together, a multiply-add being two: the best of several
  /// short runs, because one that was interrupted says nothing about the processor.
  double fma_peak(std::size_t threads) {
    constexpr std::size_t rounds = 100'000, runs = 5;
    double seconds = std::numeric_limits<double>::infinity();
    for (std::size_t run = 0; run < runs; ++run) {
      seconds = std::min(seconds, team_seconds(threads, [](std::size_t) { keep(multiply_add_chains(rounds)); }));
    }
    return static_cast<double>(rounds * threads) * flops_per_round / seconds;
  }
  std::size_t buffer_bytes() const { return buffer_.size() * sizeof(float); }

 private:
  /// Uses the value, and makes the compiler believe that memory changed, so that the next pass is not the same one.
  static void keep(float value) { asm volatile("" : : "g"(value) : "memory"); }

  template <std::size_t Streams>
  double read(std::size_t bytes, std::size_t threads) {
    const std::size_t floats = std::min(bytes / sizeof(float), buffer_.size()) / threads;
    const std::size_t part = streamed_bytes(floats);
    // Enough passes for the start of the threads not to count; one warms the caches.
    const std::size_t passes = std::max<std::size_t>(1, (std::size_t{128} << 20) / std::max<std::size_t>(part, 1));
    const bool is_cached = passes > 1;
    const auto run = [&](std::size_t times) {
      return team_seconds(threads, [&](std::size_t thread) {
        const float* mine = buffer_.data() + thread * floats;
        for (std::size_t pass = 0; pass < times; ++pass) keep(read_streams<Streams>(mine, floats));
      });
    };
    if (is_cached) run(1);
    return static_cast<double>(part * threads * passes) / run(passes);
  }

  std::array<std::size_t, 3> bytes_{};
  kvsparse::AlignedArray<float> buffer_;
};

/// Medians for one number of threads.
struct MachineLimits {
  std::size_t threads = 1;
  std::array<double, 3> bandwidth{};  // by MemoryLevel
  double flops = 0.0;
};

/// The least time that reading `bytes` and doing `operations` takes, and what sets it.
struct Roofline {
  double seconds = 0.0;
  MemoryLevel level = MemoryLevel::dram;  // where the bytes fit
  bool is_memory_bound = false;
};

inline Roofline roofline(const MachineLimits& limits, const CacheSizes& caches, double bytes, double operations) {
  const MemoryLevel level = caches.level_of(bytes, limits.threads);
  const double reading = bytes / limits.bandwidth[static_cast<std::size_t>(level)];
  const double computing = operations / limits.flops;
  return {std::max(reading, computing), level, reading > computing};
}

/// Medians of `rounds` rounds in which all of them take turns.
inline MachineLimits measure_limits(const CacheSizes& caches, std::size_t threads, std::size_t rounds = 7) {
  LimitProbe probe(caches, threads);
  std::array<std::vector<double>, 3> bandwidths;
  std::vector<double> peaks;
  for (std::size_t round = 0; round < rounds; ++round) {
    for (const MemoryLevel level : memory_levels) {
      bandwidths[static_cast<std::size_t>(level)].push_back(probe.read_bandwidth(level, threads));
    }
    peaks.push_back(probe.fma_peak(threads));
  }
  return {threads, {median(bandwidths[0]), median(bandwidths[1]), median(bandwidths[2])}, median(peaks)};
}

}  // namespace kvsparse_bench
