// SPDX-License-Identifier: Apache-2.0
// What appends would take from pools, to be asked before an engine computes anything.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace kvsparse {

/// Of one cache. Two caches of one pool name the same pool.
struct PoolDemand {
  const void* pool = nullptr;  ///< which one: only to be compared
  std::size_t pages = 0;       ///< wanted
  std::size_t free_pages = 0;  ///< that the pool has
};

/// Of many caches together.
class PoolDemands {
 public:
  /// Allocates with the first demand on a pool.
  void add(const PoolDemand& demand) {
    const auto same =
        std::find_if(pools_.begin(), pools_.end(), [&](const PoolDemand& known) { return known.pool == demand.pool; });
    if (same == pools_.end()) {
      pools_.push_back(demand);
    } else {
      same->pages += demand.pages;
    }
  }
  /// Whether every pool has what is asked of it.
  bool fit() const {
    return std::all_of(pools_.begin(), pools_.end(),
                       [](const PoolDemand& pool) { return pool.pages <= pool.free_pages; });
  }

 private:
  std::vector<PoolDemand> pools_;
};

}  // namespace kvsparse
