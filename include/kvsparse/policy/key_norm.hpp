// SPDX-License-Identifier: Apache-2.0
// KeyNorm: keys of small norm draw much attention, keys of large norm little, so give up the page whose keys are
// longest; no attention is looked at. Source: Devoto et al., EMNLP 2024 (2406.11430), section 3.  Needs: keys, once, as
// they are appended. Per step: O(L d).  Memory: L tokens and one number a page. Departs from the paper: pages instead
// of tokens (exact at page_size 1), a page's score being the mean norm of its keys; evicts while decoding, where the
// paper compresses once; the first two layers, which the paper leaves whole, are the layer schedule's affair.
#pragma once

#include <cmath>

#include "policy.hpp"

namespace kvsparse {

struct KeyNorm {
  static constexpr std::string_view name = "key_norm";
  static constexpr bool reads_rows = true;

  struct Options {
    bool pin_prompt = false;
    void visit(auto&& field) { field("pin_prompt", pin_prompt); }
  } options;

  struct PageState {
    double norms = 0.0;  // sum over the page's keys
  };

  bool pin_prompt() const { return options.pin_prompt; }

  void on_append(HeadView<KeyNorm> head, PageIndex page, Slot slot) const {
    const std::span<float> key = head.scratch().first(head.head_dim());
    head.load_key(page, slot, key);
    double squares = 0.0;
    for (const float x : key) squares += static_cast<double>(x) * static_cast<double>(x);
    head.state(page).norms += std::sqrt(squares);
  }

  PageIndex victim(HeadView<KeyNorm> head) const {
    return head.lowest_evictable(
        [&](PageIndex page) { return -head.state(page).norms / static_cast<double>(head.tokens(page)); });
  }
};

}  // namespace kvsparse
