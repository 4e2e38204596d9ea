// SPDX-License-Identifier: Apache-2.0
// StreamingLLM: the first tokens of a sequence are attention sinks, so keep them and a window of the most recent
// tokens; everything between is given up. Source: Xiao et al., ICLR 2024 (2309.17453), section 3.2.  Needs: nothing
// from the kernel. Per step: O(L d).  Memory: L tokens. Departs from the paper: sinks and window are whole pages; keys
// stay rotated at their true positions. in_cache_positions = true gives the paper's distances, counted within the
// cache, so that a stream never leaves the context a model was trained on: the sinks meet the query rotated back by
// what was evicted, no key is rewritten. It needs CacheConfig::rope.
#pragma once

#include "policy.hpp"

namespace kvsparse {

struct StreamingLlm {
  static constexpr std::string_view name = "streaming_llm";

  struct Options {
    std::size_t sinks = 4;  ///< tokens, rounded up to whole pages
    bool pin_prompt = false;
    bool in_cache_positions = false;  ///< distances as in the paper, not as in the sequence
    void visit(auto&& field) {
      field("sinks", sinks);
      field("pin_prompt", pin_prompt);
      field("in_cache_positions", in_cache_positions);
    }
    std::string problem() const {
      return sinks <= largest_size ? "" : "sinks = " + std::to_string(sinks) + " exceeds " + largest_size_text;
    }
  } options;

  bool pin_prompt() const { return options.pin_prompt; }
  bool in_cache_positions() const { return options.in_cache_positions; }
  std::size_t pinned_pages(const Geometry& geometry) const { return geometry.pages_for(options.sinks); }

  PageIndex victim(HeadView<StreamingLlm> head) const {
    return head.lowest_evictable([&](PageIndex page) { return head.first_position(page); });
  }
};

}  // namespace kvsparse
