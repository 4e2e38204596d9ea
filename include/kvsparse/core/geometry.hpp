// SPDX-License-Identifier: Apache-2.0
// Shapes, and the one place where page boundaries are computed: append, evict, select, attend and export all ask here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ids.hpp"

namespace kvsparse {

/// value / step rounded up; step > 0.
constexpr std::size_t divide_up(std::size_t value, std::size_t step) {
  return value / step + (value % step == 0 ? 0 : 1);
}
/// The smallest multiple of step that is not below value; step > 0.
constexpr std::size_t round_up(std::size_t value, std::size_t step) { return divide_up(value, step) * step; }

/// Stored rows are padded with zeros to a multiple of this many elements, so that kernels read whole vectors.
inline constexpr std::size_t row_padding = 8;

/// No configured size is larger, so that sums of sizes fit: 2^40, or 2^20 where sizes have 32 bits. For products see
/// SaturatingSize.
inline constexpr std::size_t largest_size = std::size_t{1} << (sizeof(std::size_t) > 4 ? 40 : 20);
inline constexpr const char* largest_size_text = sizeof(std::size_t) > 4 ? "2^40" : "2^20";  ///< for a sentence
/// No more heads, and no more elements of a row, so that a page's bytes fit.
inline constexpr std::size_t most_channels = std::size_t{1} << 20;
/// No pool or layer has more pages: their ids have 32 bits, and page lists give them a sign.
inline constexpr std::size_t most_pages = (std::size_t{1} << 31) - 1;
/// Tokens of a page at most: what the kernel has room for on its stack.
inline constexpr std::size_t max_page_size = 256;

/// The shape of one attention layer and of its pages. Query head i reads kv head i / group().
struct Geometry {
  std::size_t query_heads = 1;  ///< a multiple of kv_heads
  std::size_t kv_heads = 1;     ///< heads of keys and values
  std::size_t head_dim = 0;     ///< elements of a head's query or key
  std::size_t page_size = 16;   ///< tokens of one kv head in a page, 1 .. max_page_size
  std::size_t value_dim = 0;    ///< elements of a head's value or output; 0: head_dim
  bool values_in_keys = false;  ///< MLA's latent: a token's value is the first value_dim elements of its key

  constexpr std::size_t dim_of_values() const {
    return value_dim != 0 ? value_dim : head_dim;
  }                                                                       ///< value_dim, resolved
  constexpr std::size_t group() const { return query_heads / kv_heads; }  ///< query heads that read one kv head
  constexpr std::size_t row_stride() const { return round_up(head_dim, row_padding); }  ///< head_dim, padded

  /// Pages that hold `tokens` tokens starting at a page boundary.
  constexpr std::size_t pages_for(std::size_t tokens) const { return divide_up(tokens, page_size); }
  /// The position's place in its page.
  constexpr Slot slot_of(Position position) const {
    return {static_cast<std::uint32_t>(static_cast<std::uint64_t>(position.value) % page_size)};
  }
  /// A page holds the positions [j * page_size, (j + 1) * page_size); this is j.
  constexpr std::size_t page_number(Position position) const {
    return static_cast<std::size_t>(static_cast<std::uint64_t>(position.value) / page_size);
  }
};

}  // namespace kvsparse
