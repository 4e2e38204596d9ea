// SPDX-License-Identifier: Apache-2.0
// ValueAware: what a token can add to the output is bounded by its value, so give up the page whose values are
// shortest; no attention is looked at. Source: the norm of VATP (Guo et al., EMNLP 2024, 2406.12335, section 3: the
// L1 norm of the value) by itself, as the protection of large values in VaSE (2606.03928) suggests.  Needs: values,
// once, as they are appended. Per step: O(L d).  Memory: L tokens and one number a page. Departs from both: neither
// multiplies the norm by attention here nor draws lots; pages instead of tokens (exact at page_size 1), a page's score
// being the mean norm of its values. The sequence's first page is kept whatever its values: sinks have tiny ones, and
// both papers keep sinks.
#pragma once

#include <cmath>

#include "policy.hpp"

namespace kvsparse {

struct ValueAware {
  static constexpr std::string_view name = "value_aware";
  static constexpr bool reads_rows = true;

  struct Options {
    bool pin_prompt = false;
    void visit(auto&& field) { field("pin_prompt", pin_prompt); }
  } options;

  struct PageState {
    double norms = 0.0;  // sum over the page's values
  };

  bool pin_prompt() const { return options.pin_prompt; }
  std::size_t pinned_pages(const Geometry&) const { return 1; }

  void on_append(HeadView<ValueAware> head, PageIndex page, Slot slot) const {
    const std::span<float> value = head.scratch().first(head.value_dim());
    head.load_value(page, slot, value);
    for (const float x : value) head.state(page).norms += static_cast<double>(std::abs(x));
  }

  PageIndex victim(HeadView<ValueAware> head) const {
    return head.lowest_evictable(
        [&](PageIndex page) { return head.state(page).norms / static_cast<double>(head.tokens(page)); });
  }
};

}  // namespace kvsparse
