// SPDX-License-Identifier: Apache-2.0
// OpenMP's threads as an executor; empty unless compiled with OpenMP. Not part of the umbrella header.
#pragma once

#if defined(_OPENMP)

#include <omp.h>

#include <cstddef>

#include "../core/executor.hpp"

namespace kvsparse {

/// Inside a parallel region it does what OpenMP is set to do with nested ones: by default all on the calling thread.
class OpenMpExecutor {
 public:
  /// 0: as many threads as OpenMP would take (OMP_NUM_THREADS).
  explicit OpenMpExecutor(std::size_t threads = 0)
      : threads_(threads != 0 ? static_cast<int>(threads) : omp_get_max_threads()) {}

  std::size_t concurrency() const noexcept { return static_cast<std::size_t>(threads_); }  ///< threads

  /// Runs body(i) for each i in [0, count); returns when all have returned.
  void operator()(std::size_t count, RangeBody body) const noexcept {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads_)
    for (std::size_t i = 0; i < count; ++i) body(i);
  }

 private:
  int threads_;
};

}  // namespace kvsparse

#endif
