// SPDX-License-Identifier: Apache-2.0
// Decayed mass: between H2O, which never forgets, and RaaS, which remembers the last use alone, lies a mass that fades:
// score = score * 2^(-dt / half_life) + mass; give up the lowest. Source: LRFU (Lee et al., IEEE Trans. Computers
// 2001), as in Crystal-KV (2601.16986) and G-KV (2512.00504).  Needs: page mass. Per step: O(L d), as RaaS. Memory: a
// number a page. Departs: the sum is over exact page masses of the group, where Crystal-KV counts hits.
#pragma once

#include <cmath>
#include <kvsparse/policy/policy.hpp>

namespace kvsparse_tools::ideas {

struct DecayedMass {
  static constexpr std::string_view name = "decayed_mass";
  static constexpr kvsparse::EvidenceKind evidence = kvsparse::EvidenceKind::page_mass;

  struct Options {
    double half_life = 64;  ///< decode steps
    bool pin_prompt = true;
    void visit(auto&& field) {
      field("half_life", half_life);
      field("pin_prompt", pin_prompt);
    }
    std::string problem() const { return half_life > 0 ? "" : "half_life is not positive"; }
  } options;

  struct PageState {
    double score = 1;  // its creation counts as a use
  };

  bool pin_prompt() const { return options.pin_prompt; }

  void observe(kvsparse::HeadView<DecayedMass> head, const kvsparse::Evidence& step) const {
    if (step.is_prompt()) return;
    const double decay = std::exp2(-1 / options.half_life);
    for (const kvsparse::PageIndex page : head.pages()) {
      double& score = head.state(page).score;
      score = score * decay + static_cast<double>(step.group_mass(page));
    }
  }

  kvsparse::PageIndex victim(kvsparse::HeadView<DecayedMass> head) const {
    return head.lowest_evictable([&](kvsparse::PageIndex page) { return head.state(page).score; });
  }
};

}  // namespace kvsparse_tools::ideas
