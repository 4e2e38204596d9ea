// SPDX-License-Identifier: Apache-2.0
// Recurrence interval: a page that once came back after a long silence may do so again, so measure its silence by the
// longest it has had before: give up the page with the largest (now - last use) / (largest gap between uses). Source:
// LazyEviction (Zhang et al., 2506.15969), section 4.  Needs: page mass. Per step: O(L d), as RaaS.  Memory: two
// positions a page. Departs: decides page by page instead of every W steps; a page without a gap of `window` tokens
// counts as having had one, in place of the paper's second score for tokens that never recurred.
#pragma once

#include <algorithm>
#include <kvsparse/policy/policy.hpp>

namespace kvsparse_tools::ideas {

struct Recurrence {
  static constexpr std::string_view name = "recurrence";
  static constexpr kvsparse::EvidenceKind evidence = kvsparse::EvidenceKind::page_mass;

  struct Options {
    double alpha = 0.01;
    std::size_t window = 32;  ///< tokens: the newest are kept, and no gap counts as shorter
    bool pin_prompt = true;
    void visit(auto&& field) {
      field("alpha", alpha);
      field("window", window);
      field("pin_prompt", pin_prompt);
    }
  } options;

  struct PageState {
    kvsparse::Position stamp;
    std::int64_t largest_gap = 0;
  };

  bool pin_prompt() const { return options.pin_prompt; }

  void on_page_open(kvsparse::HeadView<Recurrence> head, kvsparse::PageIndex page) const {
    head.state(page) = {head.first_position(page), 0};
  }

  void observe(kvsparse::HeadView<Recurrence> head, const kvsparse::Evidence& step) const {
    if (step.is_prompt()) return;
    for (const kvsparse::PageIndex page : head.pages()) {
      if (!(static_cast<double>(step.peak_mass(page)) > options.alpha)) continue;
      PageState& state = head.state(page);
      state.largest_gap = std::max(state.largest_gap, step.position() - state.stamp);
      state.stamp = step.position();
    }
  }

  kvsparse::PageIndex victim(kvsparse::HeadView<Recurrence> head) const {
    const auto window = static_cast<std::int64_t>(std::max<std::size_t>(1, options.window));
    return head.lowest_evictable([&](kvsparse::PageIndex page) {
      const PageState& state = head.state(page);
      const auto silence = static_cast<double>(head.end() - state.stamp);
      const bool is_new = head.end() - head.first_position(page) < window;
      return is_new ? 1 / (1 + silence) : -silence / static_cast<double>(std::max(state.largest_gap, window));
    });
  }
};

}  // namespace kvsparse_tools::ideas
