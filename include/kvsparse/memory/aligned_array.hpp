// SPDX-License-Identifier: Apache-2.0
// Memory for pages and their summaries.
#pragma once

#include <cstddef>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kvsparse {

/// Memory aligned to cache lines, or to huge pages when it is large, that is not touched before it is used, so that a
/// large arena costs address space only.
template <class T>
class AlignedArray {
 public:
  AlignedArray() = default;  ///< empty
  /// Uninitialised elements. Throws std::bad_alloc.
  explicit AlignedArray(std::size_t size)
      : data_(size == 0 ? nullptr : static_cast<T*>(::operator new(size * sizeof(T), alignment_of(size)))),
        size_(size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    // Scattered pages of keys cost a TLB miss each under 4 KiB pages; a refused hint costs nothing.
    if (is_large(size)) static_cast<void>(madvise(data_, size * sizeof(T), MADV_HUGEPAGE));
#endif
  }
  AlignedArray(AlignedArray&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  AlignedArray& operator=(AlignedArray&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~AlignedArray() {
    if (data_ != nullptr) ::operator delete(data_, alignment_of(size_));
  }

  T* data() { return data_; }  ///< [size()]
  const T* data() const { return data_; }
  std::size_t size() const { return size_; }  ///< elements

 private:
  static constexpr std::size_t cache_line = 64;
  static constexpr std::size_t huge_page = std::size_t{2} << 20;
  static constexpr bool is_large(std::size_t size) { return size * sizeof(T) >= huge_page; }
  static constexpr std::align_val_t alignment_of(std::size_t size) {
    return std::align_val_t{is_large(size) ? huge_page : cache_line};
  }

  T* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace kvsparse
