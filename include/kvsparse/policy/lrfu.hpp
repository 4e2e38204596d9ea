// SPDX-License-Identifier: Apache-2.0
// Lrfu: between how recently and how often a page was used lies one number, its combined recency and frequency: every
// use adds 1, and every step multiplies it by a decay. The page with the lowest goes. Source: Lee et al., IEEE ToC 2001
// (LRFU); for a KV cache, Crystal-KV (2601.16986).  Needs: page mass. Per step: O(L d).  Memory: L tokens and one
// number a page. Departs from Crystal-KV: a use is a step in which the page's exact mass exceeds alpha under some query
// head of the group, as in Raas; budgets of layers and heads stay as configured. decay = 1 counts uses (LFU), a small
// decay goes by the last use (LRU). A page opens with one use, and is used while it is open.
#pragma once

#include "policy.hpp"

namespace kvsparse {

struct Lrfu {
  static constexpr std::string_view name = "lrfu";
  static constexpr EvidenceKind evidence = EvidenceKind::page_mass;

  struct Options {
    double alpha = 0.01;   ///< a page is used when its mass, under any query head of the group, exceeds this
    double decay = 0.995;  ///< of a past use's weight, per decode step
    bool pin_prompt = true;
    void visit(auto&& field) {
      field("alpha", alpha);
      field("decay", decay);
      field("pin_prompt", pin_prompt);
    }
    std::string problem() const {
      if (!(alpha >= 0.0 && alpha <= 1.0)) return "alpha = " + std::to_string(alpha) + " is not in [0, 1]";
      if (!(decay > 0.0 && decay <= 1.0)) return "decay = " + std::to_string(decay) + " is not in (0, 1]";
      return {};
    }
  } options;

  struct PageState {
    double recency_and_frequency = 1.0;
  };

  bool pin_prompt() const { return options.pin_prompt; }

  void observe(HeadView<Lrfu> head, const Evidence& step) const {
    if (step.is_prompt()) return;
    for (const PageIndex page : head.pages()) {
      const bool used = head.is_open(page) || static_cast<double>(step.peak_mass(page)) > options.alpha;
      double& value = head.state(page).recency_and_frequency;
      value = options.decay * value + (used ? 1.0 : 0.0);
    }
  }

  PageIndex victim(HeadView<Lrfu> head) const {
    return head.lowest_evictable([&](PageIndex page) { return head.state(page).recency_and_frequency; });
  }
};

}  // namespace kvsparse
