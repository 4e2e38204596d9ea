// SPDX-License-Identifier: Apache-2.0
// AdaKv: heads whose attention is spread out need more of the cache than heads that look at a few tokens, so the heads
// of a layer share one budget: of all their pages the one that the latest queries cared for least goes, and no head
// goes below a share of what all heads would have. Source: Feng et al., NeurIPS 2025 (2407.11550), sections 4.1
// and 4.2. Needs: page mass. Per step: O(L d).  Memory: L tokens a head on average; one number and a count a page, and
// tables that could hold what one head may come to. Departs from the paper: pages instead of tokens (exact at page_size
// 1). The paper divides the budget once, by the votes of the prompt's last queries; here it is divided anew with each
// page that goes, so that it follows the decoding, and a page's score is the mean of its exact mass, over the first
// `window` queries that read it and then moving by 1 / window a query. The pages of the newest `window` tokens go last,
// oldest first, and so do those that no query has read: beside a selector attend the prompt before decoding.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "policy.hpp"

namespace kvsparse {

struct AdaKv {
  static constexpr std::string_view name = "ada_kv";
  static constexpr PolicyScope scope = PolicyScope::shared_budget;
  static constexpr EvidenceKind evidence = EvidenceKind::page_mass;

  struct Options {
    std::size_t window = 32;  ///< queries whose masses are averaged, and newest tokens that stay
    double safeguard = 0.2;   ///< the paper's alpha: share of the budget that every head is left with
    bool pin_prompt = false;
    void visit(auto&& field) {
      field("window", window);
      field("safeguard", safeguard);
      field("pin_prompt", pin_prompt);
    }
    std::string problem() const {
      if (window < 1 || window > (std::size_t{1} << 30)) {
        return "window = " + std::to_string(window) + " is not in 1 .. 2^30";
      }
      if (!(safeguard >= 0.0 && safeguard <= 1.0)) {
        return "safeguard = " + std::to_string(safeguard) + " is not in [0, 1]";
      }
      return {};
    }
  } options;

  struct PageState {
    float mass = 0.0F;          // of the group's average query head
    std::uint32_t queries = 0;  // that it is the mean of; at most `window`
  };

  bool pin_prompt() const { return options.pin_prompt; }
  double budget_floor() const { return options.safeguard; }

  void observe(HeadView<AdaKv> head, const Evidence& step) const {
    const auto group = static_cast<float>(head.geometry().group());
    for (const PageIndex page : head.pages()) {
      if (!step.visited(page)) continue;
      PageState& state = head.state(page);
      state.queries = std::min(state.queries + 1, static_cast<std::uint32_t>(options.window));
      state.mass += (step.group_mass(page) / group - state.mass) / static_cast<float>(state.queries);
    }
  }

  HeadPage victim(LayerView<AdaKv> layer) const {
    return layer.lowest_evictable([&](const HeadView<AdaKv>& head, PageIndex page) {
      const PageIndex newest{static_cast<std::uint32_t>(head.size() - 1)};
      const std::int64_t newer_tokens = head.first_position(newest) - head.first_position(page);
      const bool stays = newer_tokens < static_cast<std::int64_t>(options.window);
      const bool is_unread = head.state(page).queries == 0;
      return stays || is_unread ? std::numeric_limits<float>::infinity() : head.state(page).mass;
    });
  }
};

}  // namespace kvsparse
