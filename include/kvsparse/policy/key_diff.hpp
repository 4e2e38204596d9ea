// SPDX-License-Identifier: Apache-2.0
// KeyDiff: keys that point where all keys point are redundant, so give up the page whose keys are most like the mean
// direction; no attention is looked at. Source: Park et al. (2504.15364), section 4: cosine with the mean of the
// normalised keys.  Needs: the resident keys, when a page is given up. Per step: O(L d), and 2/B of that again for a
// victim.  Memory: L tokens, no state. Departs from the paper: pages instead of tokens (exact at page_size 1), a page's
// score being the mean cosine of its keys; evicts page by page while decoding, where the paper does it block by block.
// A key of length zero points nowhere: its cosine is 0.
#pragma once

#include <algorithm>
#include <cmath>

#include "policy.hpp"

namespace kvsparse {

struct KeyDiff {
  static constexpr std::string_view name = "key_diff";
  static constexpr bool reads_rows = true;

  struct Options {
    bool pin_prompt = false;
    void visit(auto&& field) { field("pin_prompt", pin_prompt); }
  } options;

  bool pin_prompt() const { return options.pin_prompt; }

  PageIndex victim(HeadView<KeyDiff> head) const {
    const std::span<float> key = head.scratch().first(head.head_dim());
    const std::span<float> anchor = head.scratch().subspan(head.head_dim(), head.head_dim());
    std::fill(anchor.begin(), anchor.end(), 0.0F);
    for (const PageIndex page : head.pages()) {
      for (std::uint32_t slot = 0; slot < head.tokens(page); ++slot) {
        load_direction(head, page, Slot{slot}, key);
        for (std::size_t i = 0; i < key.size(); ++i) anchor[i] += key[i];
      }
    }
    return head.lowest_evictable([&](PageIndex page) {
      double likeness = 0.0;  // cosines times the anchor's length, which is the same for all
      for (std::uint32_t slot = 0; slot < head.tokens(page); ++slot) {
        load_direction(head, page, Slot{slot}, key);
        for (std::size_t i = 0; i < key.size(); ++i) {
          likeness += static_cast<double>(key[i]) * static_cast<double>(anchor[i]);
        }
      }
      return -likeness / static_cast<double>(head.tokens(page));
    });
  }

 private:
  /// The key at length 1, or 0 where it has none.
  static void load_direction(const HeadView<KeyDiff>& head, PageIndex page, Slot slot, std::span<float> key) {
    head.load_key(page, slot, key);
    double squares = 0.0;
    for (const float x : key) squares += static_cast<double>(x) * static_cast<double>(x);
    const double length = std::sqrt(squares);
    for (float& x : key) x = length > 0.0 ? static_cast<float>(static_cast<double>(x) / length) : 0.0F;
  }
};

}  // namespace kvsparse
