// SPDX-License-Identifier: Apache-2.0
// One arena of pages, allocated once. A page belongs to one kv head and holds the stored rows of its keys, then those
// of its values, unless these lie in the keys.
#pragma once

#include <cstddef>
#include <cstring>
#include <span>
#include <string>
#include <type_traits>

#include "../core/geometry.hpp"
#include "../core/stored_row.hpp"
#include "../core/views.hpp"
#include "aligned_array.hpp"

namespace kvsparse {

/// What is wrong with values that lie in the keys of such pages: a sentence that names the value and the limit; empty
/// if nothing is, or if they lie beside the keys.
template <StorageScalar Key = float, StorageScalar Value = Key>
std::string values_problem(const Geometry& geometry) {
  if (!geometry.values_in_keys) return {};
  if (geometry.dim_of_values() > geometry.head_dim) {
    return "value_dim = " + std::to_string(geometry.value_dim) +
           " exceeds head_dim = " + std::to_string(geometry.head_dim) +
           ", and values_in_keys takes the values from the keys";
  }
  if (std::is_same_v<Key, Value>) return {};
  return "keys are stored as " + std::string(scalar_name<Key>) + " and values as " + std::string(scalar_name<Value>) +
         ", but values_in_keys takes the values from the keys; store both in one type";
}

/// The rows of a pool's pages: [pages, page_size, head_dim] keys and, page by page behind them, values.
template <StorageScalar Key, StorageScalar Value = Key>
class PageRows {
 public:
  /// Allocates `pages` pages and touches none of their memory. Where values lie in the keys, Key is Value.
  PageRows(const Geometry& geometry, std::size_t pages)
      : geometry_(geometry),
        value_stride_(geometry.values_in_keys ? key_stride() : stored_row_size<Value>(geometry.dim_of_values())),
        first_value_(geometry.values_in_keys ? 0 : geometry.page_size * key_row_bytes(geometry)),
        page_bytes_(bytes_per_page(geometry)),
        storage_(pages * page_bytes_) {}

  /// Keys and values of one page, padding and scales included.
  static std::size_t bytes_per_page(const Geometry& geometry) {
    return geometry.page_size * (key_row_bytes(geometry) + value_row_bytes(geometry));
  }
  /// What a token takes of a page. Rows are whole multiples of 8 bytes, so that either type's strides within a page are
  /// whole.
  static std::size_t key_row_bytes(const Geometry& geometry) {
    return stored_row_size<Key>(geometry.head_dim) * sizeof(Key);
  }
  /// The same of a value; 0 where it lies in the key.
  static std::size_t value_row_bytes(const Geometry& geometry) {
    return geometry.values_in_keys ? 0 : stored_row_size<Value>(geometry.dim_of_values()) * sizeof(Value);
  }

  /// That of the caches; query_heads and kv_heads say nothing about the rows.
  const Geometry& geometry() const { return geometry_; }
  std::size_t page_count() const { return storage_.size() / page_bytes_; }  ///< as constructed

  /// The stored row, head_dim elements padded to stored_row_size<Key>(head_dim).
  Key* key_row(PageId page, Slot slot) { return keys(page) + slot.value * key_stride(); }
  /// The stored row, value_dim elements and padding; where values lie in the keys, the key's row.
  Value* value_row(PageId page, Slot slot) { return values(page) + slot.value * value_stride_; }
  /// To read alone.
  const Key* key_row(PageId page, Slot slot) const { return const_cast<PageRows*>(this)->key_row(page, slot); }
  /// To read alone.
  const Value* value_row(PageId page, Slot slot) const { return const_cast<PageRows*>(this)->value_row(page, slot); }

  /// row: [head_dim], as floats. O(row).
  void load_key(PageId page, Slot slot, std::span<float> row) const {
    load_row(key_row(page, slot), geometry_.head_dim, row);
  }
  /// row: [value_dim], as floats. O(row).
  void load_value(PageId page, Slot slot, std::span<float> row) const {
    load_row(value_row(page, slot), geometry_.values_in_keys ? geometry_.head_dim : geometry_.dim_of_values(), row);
  }

  /// Copies a page of the same geometry, of this arena or of another.
  void copy(const PageRows& from, PageId page, PageId to) {
    std::memcpy(storage_.data() + to.value * page_bytes_, from.storage_.data() + page.value * page_bytes_, page_bytes_);
  }

  /// Makes every element of the page NaN, and every scale.
  void poison(PageId page) {
    constexpr int of_all_types = 0xFF;  // also of an int8 row's scale
    std::memset(storage_.data() + page.value * page_bytes_, of_all_types, page_bytes_);
  }

  /// What the kernel reads.
  PagedKv<Key, Value> view() const {
    auto* self = const_cast<PageRows*>(this);
    return {self->keys({0}), self->values({0}), page_bytes_ / sizeof(Key), page_bytes_ / sizeof(Value),
            key_stride(),    value_stride_,     geometry_.head_dim,        geometry_.dim_of_values()};
  }

 private:
  std::size_t key_stride() const { return stored_row_size<Key>(geometry_.head_dim); }
  Key* keys(PageId page) { return reinterpret_cast<Key*>(storage_.data() + page.value * page_bytes_); }
  Value* values(PageId page) {
    return reinterpret_cast<Value*>(storage_.data() + page.value * page_bytes_ + first_value_);
  }

  Geometry geometry_;
  std::size_t value_stride_;  // elements
  std::size_t first_value_;   // bytes from the start of a page
  std::size_t page_bytes_;
  AlignedArray<std::byte> storage_;
};

}  // namespace kvsparse
