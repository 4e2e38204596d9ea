// SPDX-License-Identifier: Apache-2.0
// What this thread took from operator new, and what it is refused. Linking allocation_counter.cpp replaces the global
// operators, so only programs that want the numbers should; sanitizers cannot look behind them.
#pragma once

#include <cstddef>

namespace kvsparse_tools {

struct AllocationCount {
  std::size_t allocations = 0;
  std::size_t deallocations = 0;
  /// Asked for in all, also where it was refused.
  std::size_t wanted_bytes = 0;
  /// Allocated less given back. Wraps around when this thread gives back what others took: differences stay right.
  std::size_t live_bytes = 0;
};

AllocationCount allocations_of_this_thread() noexcept;

/// The count-th allocation of this thread from now on fails, that one alone. 0: none does any more.
void fail_allocation_of_this_thread(std::size_t count) noexcept;
/// Whether the allocation that is to fail is still to come.
bool allocation_is_to_fail() noexcept;

}  // namespace kvsparse_tools
