// SPDX-License-Identifier: Apache-2.0
// LazyEviction: a token that came back after a long silence before may do so again, so remember the largest gap between
// two uses of each page, and give up, every W steps, the pages that have been silent for long against that gap. Source:
// Zhang et al., ACL 2026 (2506.15969), section 4.  Needs: page mass. Per step: O(L d).  Memory: L tokens; a stamp and a
// gap a page. Departs from the paper: pages instead of tokens (exact at page_size 1); residents go down to budget - W
// and up to the budget, where the paper goes from the budget to budget + W; a page is used when its exact mass exceeds
// alpha under some query head of the group. What the paper's text leaves open is decided so: the score is
//   sigmoid(-silence / gap) + sigmoid(-gap / W)   both doubled, so in 0 .. 2; 0 for a page that was never used again
// and the pages of the newest W tokens stay.
#pragma once

#include <algorithm>
#include <cmath>

#include "policy.hpp"

namespace kvsparse {

struct LazyEviction {
  static constexpr std::string_view name = "lazy_eviction";
  static constexpr EvidenceKind evidence = EvidenceKind::page_mass;

  struct Options {
    double alpha = 0.01;      ///< a page is used when its mass, under any query head of the group, exceeds this
    std::size_t window = 32;  ///< W: decode steps between two evictions, and how many of the newest tokens stay
    bool pin_prompt = true;
    void visit(auto&& field) {
      field("alpha", alpha);
      field("window", window);
      field("pin_prompt", pin_prompt);
    }
    std::string problem() const {
      if (!(alpha >= 0.0 && alpha <= 1.0)) return "alpha = " + std::to_string(alpha) + " is not in [0, 1]";
      if (window < 1 || window > (std::size_t{1} << 30)) {
        return "window = " + std::to_string(window) + " is not in 1 .. 2^30";
      }
      return {};
    }
  } options;

  struct PageState {
    Position last_use;
    std::int64_t largest_gap = 0;
  };

  bool pin_prompt() const { return options.pin_prompt; }
  std::size_t period() const { return options.window; }
  std::size_t slack_tokens() const { return options.window; }

  void on_page_open(HeadView<LazyEviction> head, PageIndex page) const {
    head.state(page) = {head.first_position(page), 0};
  }

  void observe(HeadView<LazyEviction> head, const Evidence& step) const {
    if (step.is_prompt()) return;
    for (const PageIndex page : head.pages()) {
      if (!(static_cast<double>(step.peak_mass(page)) > options.alpha)) continue;
      PageState& state = head.state(page);
      state.largest_gap = std::max(state.largest_gap, step.position() - state.last_use);
      state.last_use = step.position();
    }
  }

  void trim(HeadView<LazyEviction> head, PageList& victims) const {
    const std::size_t window_pages = head.geometry().pages_for(options.window);
    const std::size_t target = head.page_budget() - std::min(head.page_budget(), window_pages);
    if (head.size() <= target) return;
    const std::span<float> silence = head.scratch().first(head.size());
    for (const PageIndex page : head.pages()) silence[page.value] = static_cast<float>(-score(head, page));
    head.visit_highest_evictable(silence, head.size() - target, [&](PageIndex page) { victims.add(page); });
  }

  /// Between two trims the slack holds what is appended; a budget of few pages may still need one more.
  PageIndex victim(HeadView<LazyEviction> head) const {
    return head.lowest_evictable([&](PageIndex page) { return score(head, page); });
  }

 private:
  double score(const HeadView<LazyEviction>& head, PageIndex page) const {
    constexpr double stays = 3.0;
    const auto window = static_cast<std::int64_t>(options.window);
    if (head.end() - (head.first_position(page) + head.tokens(page)) < window) return stays;
    const PageState& state = head.state(page);
    if (state.largest_gap == 0) return 0.0;
    const auto gap = static_cast<double>(state.largest_gap);
    const auto silence = static_cast<double>(head.end() - state.last_use);
    return 2.0 / (1.0 + std::exp(silence / gap)) + 2.0 / (1.0 + std::exp(gap / static_cast<double>(window)));
  }
};

}  // namespace kvsparse
