// SPDX-License-Identifier: Apache-2.0
#include "allocation_counter.hpp"

#include <cstdlib>
#include <new>

namespace {

thread_local constinit kvsparse_tools::AllocationCount counted{};
thread_local constinit std::size_t allocations_until_failure = 0;

// The size stands before the block, so that a delete without size can subtract it.
void* counted_new(std::size_t size, std::size_t alignment) {
  counted.wanted_bytes += size;
  const std::size_t header = alignment < 2 * sizeof(std::size_t) ? 2 * sizeof(std::size_t) : alignment;
  const std::size_t total = (header + size + alignment - 1) / alignment * alignment;
  if (total < size) throw std::bad_alloc();
  if (allocations_until_failure != 0 && --allocations_until_failure == 0) throw std::bad_alloc();
  void* block = alignment <= alignof(std::max_align_t) ? std::malloc(total) : std::aligned_alloc(alignment, total);
  if (block == nullptr) throw std::bad_alloc();
  ++counted.allocations;
  counted.live_bytes += size;
  char* data = static_cast<char*>(block) + header;
  reinterpret_cast<std::size_t*>(data)[-1] = size;
  reinterpret_cast<std::size_t*>(data)[-2] = header;
  return data;
}

void counted_delete(void* data) {
  if (data == nullptr) return;
  ++counted.deallocations;
  counted.live_bytes -= static_cast<std::size_t*>(data)[-1];
  std::free(static_cast<char*>(data) - static_cast<std::size_t*>(data)[-2]);
}

void* quiet_new(std::size_t size, std::size_t alignment) noexcept {
  try {
    return counted_new(size, alignment);
  } catch (...) {
    return nullptr;
  }
}

constexpr std::size_t usual = alignof(std::max_align_t);

}  // namespace

kvsparse_tools::AllocationCount kvsparse_tools::allocations_of_this_thread() noexcept { return counted; }
void kvsparse_tools::fail_allocation_of_this_thread(std::size_t count) noexcept { allocations_until_failure = count; }
bool kvsparse_tools::allocation_is_to_fail() noexcept { return allocations_until_failure != 0; }

void* operator new(std::size_t size) { return counted_new(size, usual); }
void* operator new[](std::size_t size) { return counted_new(size, usual); }
void* operator new(std::size_t size, const std::nothrow_t&) noexcept { return quiet_new(size, usual); }
void* operator new[](std::size_t size, const std::nothrow_t&) noexcept { return quiet_new(size, usual); }
void* operator new(std::size_t size, std::align_val_t a) { return counted_new(size, static_cast<std::size_t>(a)); }
void* operator new[](std::size_t size, std::align_val_t a) { return counted_new(size, static_cast<std::size_t>(a)); }
void* operator new(std::size_t size, std::align_val_t a, const std::nothrow_t&) noexcept {
  return quiet_new(size, static_cast<std::size_t>(a));
}
void* operator new[](std::size_t size, std::align_val_t a, const std::nothrow_t&) noexcept {
  return quiet_new(size, static_cast<std::size_t>(a));
}
void operator delete(void* data) noexcept { counted_delete(data); }
void operator delete[](void* data) noexcept { counted_delete(data); }
void operator delete(void* data, std::size_t) noexcept { counted_delete(data); }
void operator delete[](void* data, std::size_t) noexcept { counted_delete(data); }
void operator delete(void* data, const std::nothrow_t&) noexcept { counted_delete(data); }
void operator delete[](void* data, const std::nothrow_t&) noexcept { counted_delete(data); }
void operator delete(void* data, std::align_val_t) noexcept { counted_delete(data); }
void operator delete[](void* data, std::align_val_t) noexcept { counted_delete(data); }
void operator delete(void* data, std::size_t, std::align_val_t) noexcept { counted_delete(data); }
void operator delete[](void* data, std::size_t, std::align_val_t) noexcept { counted_delete(data); }
void operator delete(void* data, std::align_val_t, const std::nothrow_t&) noexcept { counted_delete(data); }
void operator delete[](void* data, std::align_val_t, const std::nothrow_t&) noexcept { counted_delete(data); }
