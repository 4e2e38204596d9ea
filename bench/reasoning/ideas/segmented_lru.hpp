// SPDX-License-Identifier: Apache-2.0
// Segmented LRU: being read while new is no merit, since everything is; a page must be used again later. Pages begin on
// probation; one used when older than `window` is protected. The page given up is the least lately used on probation.
// The protected may fill `protected_share` of the room; beyond it the one unused for longest is back on probation.
// Source: SLRU (Karedla, Love and Wherry, IEEE Computer 1994) and 2Q (Johnson and Shasha, VLDB 1994).  Needs: page
// mass. Per step: O(L d), as RaaS.  Memory: a stamp and a bit a page.
#pragma once

#include <algorithm>
#include <kvsparse/policy/policy.hpp>
#include <tuple>

namespace kvsparse_tools::ideas {

struct SegmentedLru {
  static constexpr std::string_view name = "segmented_lru";
  static constexpr kvsparse::EvidenceKind evidence = kvsparse::EvidenceKind::page_mass;

  struct Options {
    double alpha = 0.01;
    std::size_t window = 32;       ///< tokens
    double protected_share = 0.6;  ///< of the pages that are not pinned
    bool pin_prompt = true;
    void visit(auto&& field) {
      field("alpha", alpha);
      field("window", window);
      field("protected_share", protected_share);
      field("pin_prompt", pin_prompt);
    }
  } options;

  struct PageState {
    kvsparse::Position stamp;
    bool is_protected = false;
  };

  bool pin_prompt() const { return options.pin_prompt; }

  void on_page_open(kvsparse::HeadView<SegmentedLru> head, kvsparse::PageIndex page) const {
    head.state(page) = {head.first_position(page), false};
  }

  void observe(kvsparse::HeadView<SegmentedLru> head, const kvsparse::Evidence& step) const {
    if (step.is_prompt()) return;
    std::size_t count = 0;
    for (const kvsparse::PageIndex page : head.pages()) {
      PageState& state = head.state(page);
      if (static_cast<double>(step.peak_mass(page)) > options.alpha) {
        state.stamp = step.position();
        state.is_protected |= step.position() - head.first_position(page) >= static_cast<std::int64_t>(options.window);
      }
      count += !head.is_pinned(page) && state.is_protected ? 1 : 0;
    }
    const auto room = static_cast<double>(head.page_budget() - head.pinned_pages());
    for (; static_cast<double>(count) > options.protected_share * room; --count) {
      head.state(head.lowest_evictable([&](kvsparse::PageIndex page) {
            return std::pair(!head.state(page).is_protected, head.state(page).stamp);
          }))
          .is_protected = false;
    }
  }

  kvsparse::PageIndex victim(kvsparse::HeadView<SegmentedLru> head) const {
    return head.lowest_evictable(
        [&](kvsparse::PageIndex page) { return std::pair(head.state(page).is_protected, head.state(page).stamp); });
  }
};

}  // namespace kvsparse_tools::ideas
