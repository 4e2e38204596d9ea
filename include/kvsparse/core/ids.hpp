// SPDX-License-Identifier: Apache-2.0
// Position, page and slot are different things: mixing them up is the bug that peers fixed again and again (a retained
// row count reported as a position). So they are different types, and none converts to another.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>

namespace kvsparse {

/// A token's index in its sequence, counted from 0. Never reused, never derived from where the token is stored.
struct Position {
  std::int64_t value = 0;  ///< 0: the sequence's first token
  friend constexpr auto operator<=>(Position, Position) = default;
  /// So many tokens later.
  friend constexpr Position operator+(Position position, std::size_t tokens) {
    return {position.value + static_cast<std::int64_t>(tokens)};
  }
  friend constexpr std::int64_t operator-(Position a, Position b) { return a.value - b.value; }  ///< tokens from b to a
};

/// A page's place in the pool: where its memory lies. Reused as soon as the page is given back.
struct PageId {
  std::uint32_t value = 0;  ///< below the pool's page_count()
  friend constexpr auto operator<=>(PageId, PageId) = default;
};

/// A page's place among the resident pages of one kv head, oldest first. Valid until that head opens or evicts a page.
struct PageIndex {
  std::uint32_t value = 0;  ///< 0: the oldest
  friend constexpr auto operator<=>(PageIndex, PageIndex) = default;
};

/// A token's place inside its page, 0 .. page_size - 1.
struct Slot {
  std::uint32_t value = 0;  ///< 0: the page's first token
  friend constexpr auto operator<=>(Slot, Slot) = default;
};

}  // namespace kvsparse
