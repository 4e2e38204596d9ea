// SPDX-License-Identifier: Apache-2.0
// Eigen's ThreadPool as an executor. The only header that includes Eigen's unsupported modules. Not part of the
// umbrella header.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <unsupported/Eigen/CXX11/ThreadPool>

#include "../core/executor.hpp"

namespace kvsparse {

/// Refers to a pool, which must outlive it. The calling thread works beside the pool's, so a pool of one thread fewer
/// than processors fills the machine. Called on a thread of that pool it does all by itself: waiting there for other
/// tasks of the pool could wait for ever. Does not allocate.
class EigenExecutor {
 public:
  /// Over threads of the caller's.
  explicit EigenExecutor(Eigen::ThreadPoolInterface& pool) : pool_(&pool) {}

  /// The pool's threads and the calling one.
  std::size_t concurrency() const noexcept { return static_cast<std::size_t>(pool_->NumThreads()) + 1; }

  /// Runs body(i) for each i in [0, count); returns when all have returned.
  void operator()(std::size_t count, RangeBody body) const noexcept {
    if (count < 2 || pool_->CurrentThreadId() >= 0) return SerialExecutor{}(count, body);
    const std::size_t helpers = std::min(count - 1, concurrency() - 1);
    Run run(count, body, static_cast<unsigned>(helpers));
    for (std::size_t i = 0; i < helpers; ++i) {
      // One pointer, which std::function keeps without allocating.
      pool_->Schedule([shared = &run] {
        shared->work();
        shared->helpers.Notify();
      });
    }
    run.work();
    run.helpers.Wait();  // for all of them: one that comes late still looks at `run`
  }

 private:
  struct Run {
    Run(std::size_t range, RangeBody range_body, unsigned helper_count)
        : count(range), body(range_body), helpers(helper_count) {}
    void work() noexcept {
      for (std::size_t i = next++; i < count; i = next++) body(i);
    }
    std::size_t count;
    RangeBody body;
    std::atomic<std::size_t> next{0};
    Eigen::Barrier helpers;
  };

  Eigen::ThreadPoolInterface* pool_;
};

}  // namespace kvsparse
