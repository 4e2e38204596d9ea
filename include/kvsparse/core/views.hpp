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
  T* data = nullptr;            ///< head 0's row
  std::size_t heads = 0;        ///< rows
  std::size_t head_dim = 0;     ///< elements of a row
  std::size_t head_stride = 0;  ///< elements from one row to the next

  constexpr HeadRows() = default;  ///< no row
  /// Contiguous rows.
  constexpr HeadRows(T* rows, std::size_t head_count, std::size_t dim) : HeadRows(rows, head_count, dim, dim) {}
  /// Rows `stride` elements apart.
  constexpr HeadRows(T* rows, std::size_t head_count, std::size_t dim, std::size_t stride)
      : data(rows), heads(head_count), head_dim(dim), head_stride(stride) {}

  constexpr T* row(std::size_t head) const { return data + head * head_stride; }                 ///< [head_dim]
  constexpr operator HeadRows<const T>() const { return {data, heads, head_dim, head_stride}; }  ///< to read alone
};

/// [tokens, heads, head_dim]: the rows of a chunk of tokens, oldest first.
template <class T>
struct TokenRows {
  T* data = nullptr;             ///< the first token's head 0
  std::size_t tokens = 0;        ///< in the chunk
  std::size_t heads = 0;         ///< rows of a token
  std::size_t head_dim = 0;      ///< elements of a row
  std::size_t token_stride = 0;  ///< elements from one token to the next
  std::size_t head_stride = 0;   ///< elements from one row of a token to the next

  constexpr TokenRows() = default;  ///< no token
  /// Contiguous rows.
  constexpr TokenRows(T* rows, std::size_t token_count, std::size_t head_count, std::size_t dim)
      : TokenRows(rows, token_count, head_count, dim, head_count * dim, dim) {}
  /// Tokens, and rows of a token, so many elements apart.
  constexpr TokenRows(T* rows, std::size_t token_count, std::size_t head_count, std::size_t dim,
                      std::size_t stride_of_token, std::size_t stride_of_head)
      : data(rows),
        tokens(token_count),
        heads(head_count),
        head_dim(dim),
        token_stride(stride_of_token),
        head_stride(stride_of_head) {}

  /// [heads, head_dim]
  constexpr HeadRows<T> token(std::size_t index) const {
    return {data + index * token_stride, heads, head_dim, head_stride};
  }
  /// To read alone.
  constexpr operator TokenRows<const T>() const { return {data, tokens, heads, head_dim, token_stride, head_stride}; }
};

/// [size, head_dim]: the query heads that share one kv head, as given (not yet scaled).
struct QueryGroup {
  const float* data = nullptr;  ///< the first query head's row
  std::size_t size = 0;         ///< query heads
  std::size_t head_dim = 0;     ///< floats of a row
  std::size_t head_stride = 0;  ///< floats from one row to the next
  float scale = 1.0F;           ///< what dot products with keys are multiplied by before the softmax

  /// [head_dim]
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
  const Key* keys = nullptr;          ///< page 0, slot 0
  const Value* values = nullptr;      ///< page 0, slot 0
  std::size_t key_page_stride = 0;    ///< elements, as the three below
  std::size_t value_page_stride = 0;  ///< from one page to the next
  std::size_t key_row_stride = 0;     ///< from one slot to the next
  std::size_t value_row_stride = 0;   ///< from one slot to the next
  std::size_t head_dim = 0;           ///< of queries and keys
  std::size_t value_dim = 0;          ///< of values and outputs; 0: head_dim

  constexpr std::size_t dim_of_values() const { return value_dim != 0 ? value_dim : head_dim; }  ///< resolved
  /// The elements that stand before the scale of a value's row, where values have one.
  std::size_t dim_before_value_scale() const {
    const bool values_are_keys = static_cast<const void*>(values) == static_cast<const void*>(keys);
    return values_are_keys ? head_dim : dim_of_values();
  }
};

/// One page that a query group reads: what a selection becomes once the cache has looked up where the pages lie.
struct PageRead {
  PageId page;                                ///< where it lies
  PageIndex index;                            ///< which of the head's resident pages it is
  std::uint32_t tokens = 0;                   ///< the first `tokens` slots are read, 1 .. 256
  const std::uint64_t* token_mask = nullptr;  ///< bit s set: slot s is read; null: all are
  float log_weight = 0.0F;                    ///< added to the logits in the denominator
  float value_log_weight = 0.0F;              ///< added to the logits in the numerator
  std::int64_t rotate_back = 0;               ///< positions by which the query is rotated back for this page
  Position first_position = {};               ///< of slot 0; only ALiBi and windows look at it
};

}  // namespace kvsparse
