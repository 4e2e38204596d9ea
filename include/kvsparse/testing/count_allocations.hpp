// SPDX-License-Identifier: Apache-2.0
// Replaces the program's global operator new by one that counts, so that PolicyConformance can say which verb
// allocates. Include it in one source file of a test program, and in nothing that you ship: two such files do not link.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <limits>
#include <new>

#include "watched_policy.hpp"

namespace kvsparse::conformance {

inline thread_local constinit std::size_t counted_allocations = 0;

inline void* counted_new(std::size_t size, std::size_t alignment) {
  ++counted_allocations;
  if (size > std::numeric_limits<std::size_t>::max() - alignment) throw std::bad_alloc();
  const std::size_t whole = (size + alignment - 1) / alignment * alignment;
  void* const block = alignment <= alignof(std::max_align_t)
                          ? std::malloc(size == 0 ? 1 : size)
                          : std::aligned_alloc(alignment, whole == 0 ? alignment : whole);
  if (block == nullptr) throw std::bad_alloc();
  return block;
}

namespace {
// Before main: nobody asks earlier.
[[maybe_unused]] const bool counting = (
    allocations_of_this_thread = []() noexcept { return counted_allocations; }, true);
}  // namespace

}  // namespace kvsparse::conformance

// The other forms of new and delete come down to these. Inlined, g++ would see free() meet what new gave.
KVSPARSE_NOINLINE void* operator new(std::size_t size) {
  return kvsparse::conformance::counted_new(size, alignof(std::max_align_t));
}
KVSPARSE_NOINLINE void* operator new(std::size_t size, std::align_val_t alignment) {
  return kvsparse::conformance::counted_new(size, static_cast<std::size_t>(alignment));
}
KVSPARSE_NOINLINE void operator delete(void* block) noexcept { std::free(block); }
KVSPARSE_NOINLINE void operator delete(void* block, std::size_t) noexcept { std::free(block); }
KVSPARSE_NOINLINE void operator delete(void* block, std::align_val_t) noexcept { std::free(block); }
KVSPARSE_NOINLINE void operator delete(void* block, std::size_t, std::align_val_t) noexcept { std::free(block); }
