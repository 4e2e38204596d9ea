// SPDX-License-Identifier: Apache-2.0
// Tova: the cache as a multi-state RNN drops the token that the newest query cares for least, averaged over the heads
// of the layer, so that all heads hold the same tokens. Source: Oren et al., EMNLP 2024 (2401.06104), section 3.2.
// Needs: page mass. Per step: O(L d).  Memory: L tokens and one number a page. Departs from the paper: pages instead of
// tokens (exact at page_size 1), a page's score being the summed mass of its tokens; no page is protected beside the
// one being filled. A page that a query did not read keeps the mass of the last query that did; one that none has
// read goes after all others, so beside a selector attend the prompt before decoding.
#pragma once

#include <limits>

#include "policy.hpp"

namespace kvsparse {

struct Tova {
  static constexpr std::string_view name = "tova";
  static constexpr PolicyScope scope = PolicyScope::layer;
  static constexpr EvidenceKind evidence = EvidenceKind::page_mass;

  struct Options {
    bool pin_prompt = false;
    void visit(auto&& field) { field("pin_prompt", pin_prompt); }
  } options;

  struct PageState {
    // Summed over the group, at the latest query that read the page; until one did, nothing speaks against it.
    float mass = std::numeric_limits<float>::infinity();
  };

  bool pin_prompt() const { return options.pin_prompt; }

  void observe(HeadView<Tova> head, const Evidence& step) const {
    for (const PageIndex page : head.pages()) {
      if (step.visited(page)) head.state(page).mass = step.group_mass(page);
    }
  }

  PageIndex victim(LayerView<Tova> layer) const {
    return layer.head(0).lowest_evictable([&](PageIndex page) {
      double mass = 0.0;
      for (std::size_t h = 0; h < layer.heads(); ++h) mass += static_cast<double>(layer.head(h).state(page).mass);
      return mass;
    });
  }
};

}  // namespace kvsparse
