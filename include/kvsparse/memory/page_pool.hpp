// SPDX-License-Identifier: Apache-2.0
// One arena of pages, allocated once. A page belongs to one kv head and holds the stored rows of its keys, then those
// of its values; evicting a page gives its memory back here at once.
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
#include "../core/stored_row.hpp"
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

template <StorageScalar Key, StorageScalar Value = Key>
class PagePool {
 public:
  /// Allocates `pages` pages. Complexity: O(pages), none of the pages' memory is touched.
  PagePool(const Geometry& geometry, std::size_t pages)
      : head_dim_(geometry.head_dim), page_size_(geometry.page_size), storage_(pages * bytes_per_page(geometry)) {
    free_.reserve(pages);
    refill(pages);
  }

  PagePool(const PagePool& other)
      : head_dim_(other.head_dim_), page_size_(other.page_size_), storage_(other.storage_.size()) {
    free_.reserve(other.free_.capacity());
    free_ = other.free_;
    // Copies what was ever handed out; pages beyond have never been written.
    std::memcpy(storage_.data(), other.storage_.data(), other.touched_ * page_bytes());
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
    return geometry.page_size * (row_bytes<Key>(geometry.head_dim) + row_bytes<Value>(geometry.head_dim));
  }

  std::size_t page_count() const { return storage_.size() / page_bytes(); }
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

  Key* key_row(PageId page, Slot slot) { return keys(page) + slot.value * stored_row_size<Key>(head_dim_); }
  Value* value_row(PageId page, Slot slot) { return values(page) + slot.value * stored_row_size<Value>(head_dim_); }
  const Key* key_row(PageId page, Slot slot) const { return const_cast<PagePool*>(this)->key_row(page, slot); }
  const Value* value_row(PageId page, Slot slot) const { return const_cast<PagePool*>(this)->value_row(page, slot); }

  PagedKv<Key, Value> view() const {
    auto* self = const_cast<PagePool*>(this);
    return {self->keys({0}),
            self->values({0}),
            page_bytes() / sizeof(Key),
            page_bytes() / sizeof(Value),
            stored_row_size<Key>(head_dim_),
            stored_row_size<Value>(head_dim_),
            head_dim_};
  }

 private:
  // Rows are whole multiples of 8 bytes, so that either type's strides within a page are whole.
  template <class Scalar>
  static std::size_t row_bytes(std::size_t head_dim) {
    return stored_row_size<Scalar>(head_dim) * sizeof(Scalar);
  }
  std::size_t page_bytes() const { return page_size_ * (row_bytes<Key>(head_dim_) + row_bytes<Value>(head_dim_)); }
  Key* keys(PageId page) { return reinterpret_cast<Key*>(storage_.data() + page.value * page_bytes()); }
  Value* values(PageId page) {
    return reinterpret_cast<Value*>(storage_.data() + page.value * page_bytes() +
                                    page_size_ * row_bytes<Key>(head_dim_));
  }
  void refill(std::size_t pages) {
    free_.clear();
    for (std::size_t page = pages; page > 0; --page) free_.push_back({static_cast<std::uint32_t>(page - 1)});
  }

  std::size_t head_dim_;
  std::size_t page_size_;
  AlignedArray<std::byte> storage_;
  std::vector<PageId> free_;
  std::size_t touched_ = 0;
};

}  // namespace kvsparse
