// SPDX-License-Identifier: Apache-2.0
// Oracle: each query head reads the tokens that matter most to it, found by scoring every key exactly. No selector can
// read a larger share of the softmax with as many tokens, so it is the ceiling in comparisons; it is no way to save
// time. Source: the exact top-k attention that selectors approximate.  Needs: every stored key. Per step: O(N d), as
// dense.  Memory: O(N). Departs: nothing is forced, not even the open page; ties go to the oldest token.
#pragma once

#include <algorithm>
#include <functional>

#include "policy.hpp"

namespace kvsparse {

struct Oracle {
  static constexpr std::string_view name = "oracle";
  static constexpr PolicyGranularity granularity = PolicyGranularity::token;
  static constexpr SelectionScope selection = SelectionScope::query_head;
  static constexpr bool reads_rows = true;

  void select(HeadView<Oracle> head, QueryGroup queries, Selection& reads) const {
    const std::size_t budget = head.read_page_budget() * head.page_size();
    std::size_t tokens = 0;
    for (const PageIndex page : head.pages()) tokens += head.tokens(page);
    const std::span<float> key = head.scratch().first(head.head_dim());
    const std::span<float> logits = head.scratch().subspan(key.size(), tokens);
    const std::span<float> ranked = head.scratch().subspan(key.size() + tokens, tokens);
    std::size_t token = 0;
    for (const PageIndex page : head.pages()) {
      for (std::uint32_t slot = 0; slot < head.tokens(page); ++slot) {
        head.load_key(page, Slot{slot}, key);
        float logit = 0.0F;
        for (std::size_t i = 0; i < key.size(); ++i) logit += queries[0][i] * key[i];
        logits[token++] = logit == logit ? logit : std::numeric_limits<float>::infinity();
      }
    }
    std::copy(logits.begin(), logits.end(), ranked.begin());
    const auto last_read = ranked.begin() + static_cast<std::ptrdiff_t>(budget - 1);
    std::nth_element(ranked.begin(), last_read, ranked.end(), std::greater<>());
    const float threshold = *last_read;
    std::size_t ties = budget - static_cast<std::size_t>(std::count_if(ranked.begin(), last_read,
                                                                       [&](float logit) { return logit > threshold; }));

    token = 0;
    for (const PageIndex page : head.pages()) {
      const std::span<std::uint64_t> mask = reads.token_mask(page);
      bool any = false;
      for (std::uint32_t slot = 0; slot < head.tokens(page); ++slot) {
        const float logit = logits[token++];
        if (!(logit > threshold || (logit == threshold && ties > 0 && ties-- > 0))) continue;
        mask[slot / 64] |= std::uint64_t{1} << (slot % 64);
        any = true;
      }
      if (any) reads.add({page, mask, 0.0F, 0.0F, 0});
    }
  }
};

}  // namespace kvsparse
