// SPDX-License-Identifier: Apache-2.0
// H2O: a few heavy hitters receive most of the attention mass, so keep those with the largest accumulated mass, plus
// the most recent tokens, half of the budget each. Source: Zhang et al., NeurIPS 2023 (2306.14048), algorithm 1. Needs:
// page mass.  Per step: O(L d). Memory: L tokens and one number a page. Departs from the paper: pages instead of tokens
// (exact at page_size 1); mass is summed over the query heads of a group, which the paper does not define; optionally
// the prompt is pinned and counts in neither half.
#pragma once

#include <algorithm>

#include "policy.hpp"

namespace kvsparse {

struct H2o {
  static constexpr std::string_view name = "h2o";
  static constexpr EvidenceKind evidence = EvidenceKind::page_mass;

  struct Options {
    bool pin_prompt = false;
    void visit(auto&& field) { field("pin_prompt", pin_prompt); }
  } options;

  struct PageState {
    double accumulated_mass = 0.0;  // of every query since the page opened, prompt included
  };

  bool pin_prompt() const { return options.pin_prompt; }

  void observe(HeadView<H2o> head, const Evidence& step) const {
    for (const PageIndex page : head.pages()) {
      if (step.visited(page)) head.state(page).accumulated_mass += static_cast<double>(step.group_mass(page));
    }
  }

  PageIndex victim(HeadView<H2o> head) const {
    const std::size_t evictable = head.size() - head.pinned_pages();
    const std::size_t budget = head.page_budget() - head.pinned_pages();
    const std::size_t recent = std::max<std::size_t>(1, budget / 2) - 1;  // full pages beside the one about to open
    return head.lowest_evictable([&](PageIndex page) { return head.state(page).accumulated_mass; }, evictable - recent);
  }
};

}  // namespace kvsparse
