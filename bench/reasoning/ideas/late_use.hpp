// SPDX-License-Identifier: Apache-2.0
// Late use: a page read while it is recent is local context; one to which attention returns at an age beyond `window`
// tokens is a milestone. Outside the window, pages without a late use go first, oldest first, then milestones by last
// use. Source: none that we know; RaaS (2502.11147) with the evidence restricted to late uses.  Needs: page mass. Per
// step: O(L d), as RaaS.  Memory: a stamp and a bit a page.
#pragma once

#include <kvsparse/policy/policy.hpp>
#include <tuple>

namespace kvsparse_tools::ideas {

struct LateUse {
  static constexpr std::string_view name = "late_use";
  static constexpr kvsparse::EvidenceKind evidence = kvsparse::EvidenceKind::page_mass;

  struct Options {
    double alpha = 0.01;
    std::size_t window = 32;  ///< tokens
    bool pin_prompt = true;
    void visit(auto&& field) {
      field("alpha", alpha);
      field("window", window);
      field("pin_prompt", pin_prompt);
    }
  } options;

  struct PageState {
    kvsparse::Position stamp;  // of the last late use, else where the page begins
    bool is_milestone = false;
  };

  bool pin_prompt() const { return options.pin_prompt; }

  void on_page_open(kvsparse::HeadView<LateUse> head, kvsparse::PageIndex page) const {
    head.state(page) = {head.first_position(page), false};
  }

  void observe(kvsparse::HeadView<LateUse> head, const kvsparse::Evidence& step) const {
    if (step.is_prompt()) return;
    for (const kvsparse::PageIndex page : head.evictable_pages()) {
      if (step.position() - head.first_position(page) < window()) break;
      if (static_cast<double>(step.peak_mass(page)) > options.alpha) head.state(page) = {step.position(), true};
    }
  }

  kvsparse::PageIndex victim(kvsparse::HeadView<LateUse> head) const {
    return head.lowest_evictable([&](kvsparse::PageIndex page) {
      const bool is_new = head.end() - head.first_position(page) < window();
      return std::tuple(is_new, head.state(page).is_milestone, head.state(page).stamp);
    });
  }

 private:
  std::int64_t window() const { return static_cast<std::int64_t>(options.window); }
};

}  // namespace kvsparse_tools::ideas
