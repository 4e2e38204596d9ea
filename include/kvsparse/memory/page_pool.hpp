// SPDX-License-Identifier: Apache-2.0
// One arena of pages, allocated once. A page belongs to one kv head and holds its keys [page_size, row_stride], then
// its values [page_size, row_stride]; evicting a page gives its memory back here at once.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../config.hpp"
#include "../core/geometry.hpp"
#include "../core/simd.hpp"
#include "../core/views.hpp"

namespace kvsparse {

/// Memory aligned to cache lines, or to huge pages when it is large, that is not touched before it is used, so that a
/// large arena costs address space only.
template <class T>
class AlignedArray {
 public:
  AlignedArray() = default;
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

  T* data() { return data_; }
  const T* data() const { return data_; }
  std::size_t size() const { return size_; }

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

template <StorageScalar Scalar>
class PagePool {
 public:
  /// Allocates `pages` pages. Complexity: O(pages), none of the pages' memory is touched.
  PagePool(const Geometry& geometry, std::size_t pages)
      : row_stride_(geometry.row_stride()),
        head_dim_(geometry.head_dim),
        plane_(geometry.page_size * geometry.row_stride()),
        storage_(2 * plane_ * pages) {
    free_.reserve(pages);
    refill(pages);
  }

  PagePool(const PagePool& other)
      : row_stride_(other.row_stride_),
        head_dim_(other.head_dim_),
        plane_(other.plane_),
        storage_(other.storage_.size()) {
    free_.reserve(other.free_.capacity());
    free_ = other.free_;
    // Copies what was ever handed out; pages beyond have never been written.
    std::memcpy(static_cast<void*>(storage_.data()), other.storage_.data(),
                other.touched_ * 2 * plane_ * sizeof(Scalar));
    touched_ = other.touched_;
  }
  PagePool& operator=(const PagePool& other) {
    PagePool copy(other);
    return *this = std::move(copy);
  }
  PagePool(PagePool&&) noexcept = default;
  PagePool& operator=(PagePool&&) noexcept = default;

  static std::size_t bytes_required(const Geometry& geometry, std::size_t pages) {
    return pages * (bytes_per_page(geometry) + sizeof(PageId));
  }
  static std::size_t bytes_per_page(const Geometry& geometry) {
    return 2 * geometry.page_size * geometry.row_stride() * sizeof(Scalar);
  }

  std::size_t page_count() const { return storage_.size() / (2 * plane_); }
  std::size_t free_pages() const { return free_.size(); }

  /// Hands out the page given back last, or the lowest never used: positions that arrive together lie together.
  PageId acquire() {
    KVSPARSE_ASSERT(!free_.empty());
    const PageId page = free_.back();
    free_.pop_back();
    touched_ = std::max(touched_, std::size_t{page.value} + 1);
    return page;
  }
  void release(PageId page) {
    KVSPARSE_ASSERT(free_.size() < page_count());
    free_.push_back(page);
  }
  /// Takes every page back.
  void clear() { refill(page_count()); }

  Scalar* key_row(PageId page, Slot slot) { return storage_.data() + row_offset(page, slot); }
  Scalar* value_row(PageId page, Slot slot) { return storage_.data() + plane_ + row_offset(page, slot); }
  const Scalar* key_row(PageId page, Slot slot) const { return storage_.data() + row_offset(page, slot); }
  const Scalar* value_row(PageId page, Slot slot) const { return storage_.data() + plane_ + row_offset(page, slot); }

  PagedKv<Scalar, Scalar> view() const {
    return {storage_.data(), storage_.data() + plane_, 2 * plane_, 2 * plane_, row_stride_, row_stride_, head_dim_};
  }

 private:
  std::size_t row_offset(PageId page, Slot slot) const {
    return std::size_t{page.value} * 2 * plane_ + slot.value * row_stride_;
  }
  void refill(std::size_t pages) {
    free_.clear();
    for (std::size_t page = pages; page > 0; --page) free_.push_back({static_cast<std::uint32_t>(page - 1)});
  }

  std::size_t row_stride_;
  std::size_t head_dim_;
  std::size_t plane_;  // elements of a page's keys, and of its values
  AlignedArray<Scalar> storage_;
  std::vector<PageId> free_;
  std::size_t touched_ = 0;
};

/// Stores a row of floats, or copies a row already stored as Scalar, and zeroes the padding behind head_dim.
template <StorageScalar Scalar, class Element>
void store_row(const Element* row, std::size_t head_dim, Scalar* stored) {
  std::size_t i = 0;
  if constexpr (std::same_as<Element, Scalar>) {
    std::memcpy(static_cast<void*>(stored), row, head_dim * sizeof(Scalar));
    i = head_dim;
  } else {
    for (; i + simd::lanes <= head_dim; i += simd::lanes) simd::store(stored + i, simd::load(row + i));
    for (; i < head_dim; ++i) stored[i] = static_cast<Scalar>(row[i]);
  }
  for (; i < round_up(head_dim, row_padding); ++i) stored[i] = Scalar(0);
}

/// Widens a stored row into floats.
template <StorageScalar Scalar>
void load_row(const Scalar* stored, std::span<float> row) {
  for (std::size_t i = 0; i < row.size(); ++i) row[i] = static_cast<float>(stored[i]);
}

}  // namespace kvsparse
