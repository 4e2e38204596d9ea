// SPDX-License-Identifier: Apache-2.0
// One arena of pages, allocated once. A page belongs to one kv head and holds the stored rows of its keys, then those
// of its values.
#pragma once

#include <cstddef>
#include <cstring>

#include "../core/geometry.hpp"
#include "../core/stored_row.hpp"
#include "../core/views.hpp"
#include "aligned_array.hpp"

namespace kvsparse {

template <StorageScalar Key, StorageScalar Value = Key>
class PageRows {
 public:
  /// Allocates `pages` pages and touches none of their memory.
  PageRows(const Geometry& geometry, std::size_t pages)
      : head_dim_(geometry.head_dim), page_size_(geometry.page_size), storage_(pages * bytes_per_page(geometry)) {}

  static std::size_t bytes_per_page(const Geometry& geometry) {
    return geometry.page_size * (row_bytes<Key>(geometry.head_dim) + row_bytes<Value>(geometry.head_dim));
  }

  std::size_t head_dim() const { return head_dim_; }
  std::size_t page_size() const { return page_size_; }
  std::size_t page_count() const { return storage_.size() / page_bytes(); }

  Key* key_row(PageId page, Slot slot) { return keys(page) + slot.value * stored_row_size<Key>(head_dim_); }
  Value* value_row(PageId page, Slot slot) { return values(page) + slot.value * stored_row_size<Value>(head_dim_); }
  const Key* key_row(PageId page, Slot slot) const { return const_cast<PageRows*>(this)->key_row(page, slot); }
  const Value* value_row(PageId page, Slot slot) const { return const_cast<PageRows*>(this)->value_row(page, slot); }

  /// Copies a page of the same geometry, of this arena or of another.
  void copy(const PageRows& from, PageId page, PageId to) {
    std::memcpy(storage_.data() + to.value * page_bytes(), from.storage_.data() + page.value * page_bytes(),
                page_bytes());
  }

  PagedKv<Key, Value> view() const {
    auto* self = const_cast<PageRows*>(this);
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

  std::size_t head_dim_;
  std::size_t page_size_;
  AlignedArray<std::byte> storage_;
};

}  // namespace kvsparse
