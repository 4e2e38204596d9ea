// SPDX-License-Identifier: Apache-2.0
// Random: pin the prompt and give up a uniformly random page of the rest, independently in each head. A 2026 result
// says that it matches the best scored evictors, so it is the control beside every claim. Source: "Random Attention"
// (2609.03430).  Needs: nothing.  Per step: O(L d).  Memory: L tokens. Departs from the paper: pages instead of tokens.
// The numbers are a hash of (seed, layer, kv head, evictions so far).
#pragma once

#include "counter_hash.hpp"
#include "policy.hpp"

namespace kvsparse {

struct Random {
  static constexpr std::string_view name = "random";

  struct Options {
    std::uint64_t seed = 0;
    bool pin_prompt = true;
    void visit(auto&& field) {
      field("seed", seed);
      field("pin_prompt", pin_prompt);
    }
  } options;

  bool pin_prompt() const { return options.pin_prompt; }

  PageIndex victim(HeadView<Random> head) const {
    std::uint64_t candidates = head.size() - head.pinned_pages();
    const std::uint64_t hash = counter_hash(options.seed, {head.layer(), head.kv_head(), head.evictions()});
    // At most a million candidates against 2^64 hashes: the remainder's bias is below 1e-13.
    std::uint64_t skip = hash % candidates;
    for (const PageIndex page : head.evictable_pages()) {
      if (skip-- == 0) return page;
    }
    return {};
  }
};

}  // namespace kvsparse
