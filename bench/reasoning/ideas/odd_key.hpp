// SPDX-License-Identifier: Apache-2.0
// Odd key: keys that resemble all the others say nothing new, so give up the page outside the window whose mean key has
// the largest cosine with the mean key of the pages that could go. Source: KeyDiff (Park et al., 2504.15364).  Needs:
// mean key summaries, nothing from the kernel. Per step: O(L d / B^2), per eviction O(L d / B).  Memory: a key a page.
// Departs: pages instead of tokens, by their mean; the newest `window` tokens are kept.
#pragma once

#include <cmath>
#include <kvsparse/policy/policy.hpp>
#include <tuple>

namespace kvsparse_tools::ideas {

struct OddKey {
  static constexpr std::string_view name = "odd_key";
  static constexpr kvsparse::PageSummary page_summary = kvsparse::PageSummary::mean;

  struct Options {
    std::size_t window = 32;  ///< tokens
    bool pin_prompt = true;
    void visit(auto&& field) {
      field("window", window);
      field("pin_prompt", pin_prompt);
    }
  } options;

  struct HeadState {
    static constexpr std::size_t channels = 256;  // those beyond are not looked at
    float mean[channels];
  };

  bool pin_prompt() const { return options.pin_prompt; }

  kvsparse::PageIndex victim(kvsparse::HeadView<OddKey> head) const {
    const std::size_t channels = std::min(head.head_dim(), HeadState::channels);
    const std::span<float> key = head.scratch().first(head.head_dim());
    const std::span<float> mean(head.head_state().mean, channels);
    std::fill(mean.begin(), mean.end(), 0.0F);
    for (const kvsparse::PageIndex page : head.evictable_pages()) {
      head.load_mean_key(page, key);
      for (std::size_t i = 0; i < channels; ++i) mean[i] += key[i];
    }
    return head.lowest_evictable([&](kvsparse::PageIndex page) {
      head.load_mean_key(page, key);
      float dot = 0;
      float square = 1e-30F;
      for (std::size_t i = 0; i < channels; ++i) {
        dot += key[i] * mean[i];
        square += key[i] * key[i];
      }
      const bool is_new = head.end() - head.first_position(page) < static_cast<std::int64_t>(options.window);
      return std::pair(is_new, -dot / std::sqrt(square));
    });
  }
};

}  // namespace kvsparse_tools::ideas
