// SPDX-License-Identifier: Apache-2.0
// Sharpest token: a page may pass alpha because many of its tokens get a little each; a milestone is one token that
// gets much. RaaS with the largest mass of a single token as evidence. Source: none that we know; RaaS (2502.11147)
// with other evidence.  Needs: page mass and the largest token mass. Per step: O(L d), as RaaS.  Memory: a stamp a
// page.
#pragma once

#include <algorithm>
#include <kvsparse/policy/policy.hpp>

namespace kvsparse_tools::ideas {

struct SharpestToken {
  static constexpr std::string_view name = "sharpest_token";
  static constexpr kvsparse::EvidenceKind evidence =
      kvsparse::EvidenceKind::page_mass | kvsparse::EvidenceKind::largest_token_mass;

  struct Options {
    double alpha = 0.01;  ///< of one token
    bool pin_prompt = true;
    void visit(auto&& field) {
      field("alpha", alpha);
      field("pin_prompt", pin_prompt);
    }
  } options;

  struct PageState {
    kvsparse::Position stamp;
  };

  bool pin_prompt() const { return options.pin_prompt; }

  void on_page_open(kvsparse::HeadView<SharpestToken> head, kvsparse::PageIndex page) const {
    head.state(page).stamp = head.first_position(page);
  }

  void observe(kvsparse::HeadView<SharpestToken> head, const kvsparse::Evidence& step) const {
    if (step.is_prompt()) return;
    for (const kvsparse::PageIndex page : head.pages()) {
      float largest = 0;
      for (std::size_t q = 0; q < step.group(); ++q) {
        if (step.visited(page, q)) largest = std::max(largest, step.largest_token_mass(page, q));
      }
      if (static_cast<double>(largest) > options.alpha) head.state(page).stamp = step.position();
    }
  }

  kvsparse::PageIndex victim(kvsparse::HeadView<SharpestToken> head) const {
    return head.lowest_evictable([&](kvsparse::PageIndex page) { return head.state(page).stamp; });
  }
};

}  // namespace kvsparse_tools::ideas
