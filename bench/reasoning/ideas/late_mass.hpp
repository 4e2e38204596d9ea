// SPDX-License-Identifier: Apache-2.0
// Late mass: H2O's heavy hitters are mostly pages that were heavy while new. Count only the mass that a page gets at an
// age beyond `window` tokens, and give up the page outside the window with the lowest: its sum, or its peak. Source:
// none that we know; H2O (2306.14048) without the local part.  Needs: page mass. Per step: O(L d).  Memory: a number a
// page.
#pragma once

#include <algorithm>
#include <kvsparse/policy/policy.hpp>
#include <tuple>

namespace kvsparse_tools::ideas {

struct LateMass {
  static constexpr std::string_view name = "late_mass";
  static constexpr kvsparse::EvidenceKind evidence = kvsparse::EvidenceKind::page_mass;

  enum class Of { sum, peak };
  static constexpr std::string_view names_of(Of) { return "sum|peak"; }

  struct Options {
    Of of = Of::sum;
    std::size_t window = 32;  ///< tokens
    bool pin_prompt = true;
    void visit(auto&& field) {
      field("of", of);
      field("window", window);
      field("pin_prompt", pin_prompt);
    }
  } options;

  struct PageState {
    double mass = 0;
  };

  bool pin_prompt() const { return options.pin_prompt; }

  void observe(kvsparse::HeadView<LateMass> head, const kvsparse::Evidence& step) const {
    if (step.is_prompt()) return;
    for (const kvsparse::PageIndex page : head.evictable_pages()) {
      if (step.position() - head.first_position(page) < window()) break;
      double& mass = head.state(page).mass;
      mass = options.of == Of::sum ? mass + static_cast<double>(step.group_mass(page))
                                   : std::max(mass, static_cast<double>(step.peak_mass(page)));
    }
  }

  kvsparse::PageIndex victim(kvsparse::HeadView<LateMass> head) const {
    return head.lowest_evictable([&](kvsparse::PageIndex page) {
      return std::pair(head.end() - head.first_position(page) < window(), head.state(page).mass);
    });
  }

 private:
  std::int64_t window() const { return static_cast<std::int64_t>(options.window); }
};

}  // namespace kvsparse_tools::ideas
