// SPDX-License-Identifier: Apache-2.0
// Non-owning views of the caller's rows. Strides are in elements; the innermost dimension is contiguous.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "ids.hpp"

namespace kvsparse {

/// [heads, head_dim]: one token's keys, values, queries or outputs. Of values and outputs, head_dim is their value_dim.
template <class T>
struct HeadRows {
  T* data = nullptr;
  std::size_t heads = 0;
  std::size_t head_dim = 0;
  std::size_t head_stride = 0;

  constexpr HeadRows() = default;
  constexpr HeadRows(T* rows, std::size_t head_count, std::size_t dim) : HeadRows(rows, head_count, dim, dim) {}
  constexpr HeadRows(T* rows, std::size_t head_count, std::size_t dim, std::size_t stride)
      : data(rows), heads(head_count), head_dim(dim), head_stride(stride) {}

  constexpr T* row(std::size_t head) const { return data + head * head_stride; }
  constexpr operator HeadRows<const T>() const { return {data, heads, head_dim, head_stride}; }
};

/// [tokens, heads, head_dim]: a chunk of tokens.
template <class T>
struct TokenRows {
  T* data = nullptr;
  std::size_t tokens = 0;
  std::size_t heads = 0;
  std::size_t head_dim = 0;
  std::size_t token_stride = 0;
  std::size_t head_stride = 0;

  constexpr TokenRows() = default;
  constexpr TokenRows(T* rows, std::size_t token_count, std::size_t head_count, std::size_t dim)
      : TokenRows(rows, token_count, head_count, dim, head_count * dim, dim) {}
  constexpr TokenRows(T* rows, std::size_t token_count, std::size_t head_count, std::size_t dim,
                      std::size_t stride_of_token, std::size_t stride_of_head)
      : data(rows),
        tokens(token_count),
        heads(head_count),
        head_dim(dim),
        token_stride(stride_of_token),
        head_stride(stride_of_head) {}

  constexpr HeadRows<T> token(std::size_t index) const {
    return {data + index * token_stride, heads, head_dim, head_stride};
  }
  constexpr operator TokenRows<const T>() const { return {data, tokens, heads, head_dim, token_stride, head_stride}; }
};

/// [size, head_dim]: the query heads that share one kv head, as given (not yet scaled). `scale` is what their dot
/// products are multiplied by before the softmax.
struct QueryGroup {
  const float* data = nullptr;
  std::size_t size = 0;
  std::size_t head_dim = 0;
  std::size_t head_stride = 0;
  float scale = 1.0F;

  constexpr std::span<const float> operator[](std::size_t query) const {
    return {data + query * head_stride, head_dim};
  }
  /// The group of that one query head.
  constexpr QueryGroup only(std::size_t query) const {
    return {data + query * head_stride, 1, head_dim, head_stride, scale};
  }
};

/// The pages of one layer wherever they lie: a cache's pool or an engine's own memory. Row `slot` of page `id` starts
/// at keys + id * key_page_stride + slot * key_row_stride. Rows are readable, and finite, up to round_up(head_dim,
/// row_padding), those of values up to round_up(value_dim, row_padding). MLA's latent: `values` is `keys`, with the
/// same strides, and a token's value is the first value_dim elements of its key.
template <class Key, class Value>
struct PagedKv {
  const Key* keys = nullptr;
  const Value* values = nullptr;
  std::size_t key_page_stride = 0;
  std::size_t value_page_stride = 0;
  std::size_t key_row_stride = 0;
  std::size_t value_row_stride = 0;
  std::size_t head_dim = 0;   ///< of queries and keys
  std::size_t value_dim = 0;  ///< of values and outputs; 0: head_dim

  constexpr std::size_t dim_of_values() const { return value_dim != 0 ? value_dim : head_dim; }
  /// The elements that stand before the scale of a value's row, where values have one.
  std::size_t dim_before_value_scale() const {
    const bool values_are_keys = static_cast<const void*>(values) == static_cast<const void*>(keys);
    return values_are_keys ? head_dim : dim_of_values();
  }
};

/// One page that a query group reads: what a selection becomes once the cache has looked up where the pages lie.
struct PageRead {
  PageId page;
  PageIndex index;
  std::uint32_t tokens = 0;                   ///< the first `tokens` slots are read, 1 .. 256
  const std::uint64_t* token_mask = nullptr;  ///< bit s set: slot s is read; null: all are
  float log_weight = 0.0F;                    ///< added to the logits in the denominator
  float value_log_weight = 0.0F;              ///< added to the logits in the numerator
  std::int64_t rotate_back = 0;               ///< positions by which the query is rotated back for this page
  Position first_position = {};               ///< of slot 0; only ALiBi and windows look at it
};

}  // namespace kvsparse
