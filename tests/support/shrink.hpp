// SPDX-License-Identifier: Apache-2.0
//
// Makes a sequence that fails a test small enough to be read: delta debugging (Zeller and Hildebrandt, 2002, ddmin),
// then whatever makes single items simpler.
#pragma once

#include <algorithm>
#include <cstddef>
#include <optional>
#include <utility>
#include <vector>

namespace kvsparse_test {

/// A sequence that still fails, of which no item can be left out, nor replaced by the next simpler one. fails(items)
/// must be true for `items`; simpler(item, n) is the n-th thing to try instead of an item, or nothing.
template <class Item, class Fails, class Simpler>
std::vector<Item> shrink(std::vector<Item> items, Fails&& fails, Simpler&& simpler) {
  const auto without = [&](std::size_t first, std::size_t count) {
    std::vector<Item> rest = items;
    const auto begin = rest.begin() + static_cast<std::ptrdiff_t>(first);
    rest.erase(begin, begin + static_cast<std::ptrdiff_t>(count));
    return rest;
  };
  bool progress = true;
  while (progress) {
    progress = false;
    for (std::size_t piece = items.size(); piece > 0; piece /= 2) {
      for (std::size_t first = 0; first < items.size();) {
        std::vector<Item> rest = without(first, std::min(piece, items.size() - first));
        if (fails(rest)) {
          items = std::move(rest);
          progress = true;
        } else {
          first += piece;
        }
      }
    }
    for (std::size_t i = 0; i < items.size(); ++i) {
      for (std::size_t n = 0; const std::optional<Item> other = simpler(items[i], n); ++n) {
        std::vector<Item> changed = items;
        changed[i] = *other;
        if (!fails(changed)) continue;
        items = std::move(changed);
        progress = true;
        break;
      }
    }
  }
  return items;
}

}  // namespace kvsparse_test
