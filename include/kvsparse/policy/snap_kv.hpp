// SPDX-License-Identifier: Apache-2.0
// SnapKv: the last queries of a prompt already show which of its tokens the answer will need, so let them vote, and
// keep what they vote for and the latest tokens. Source: Li et al., NeurIPS 2024 (2404.14469), section 4; period > 0 is
// SnapKV-D of the R-KV authors, which votes again while decoding.  Needs: a window of recent queries and all resident
// keys, at each vote. Per step: O(L d), per vote O(window * group * L d).  Memory: L tokens, `window` queries a head, a
// number a page. Departs from the paper: pages instead of tokens (exact at page_size 1), a page's score being the sum
// of its tokens' pooled votes; the budget counts decoded tokens too: between votes the page with the lowest vote goes
// first, and pages that were not yet voted on after all others, oldest first. Attend the prompt before it ends.
#pragma once

#include "policy.hpp"
#include "window_votes.hpp"

namespace kvsparse {

struct SnapKv {
  static constexpr std::string_view name = "snap_kv";
  static constexpr bool reads_rows = true;

  struct Options {
    std::size_t window = 32;  ///< queries that vote, and latest tokens that stay
    std::size_t kernel = 7;   ///< votes are max-pooled over so many neighbouring tokens; odd
    std::size_t period = 0;   ///< decode steps between two votes; 0: at the end of the prompt alone
    bool pin_prompt = false;
    void visit(auto&& field) {
      field("window", window);
      field("kernel", kernel);
      field("period", period);
      field("pin_prompt", pin_prompt);
    }
    std::string problem() const {
      if (window < 1 || window > 4096) return "window = " + std::to_string(window) + " is not in 1 .. 4096";
      if (kernel % 2 == 0 || kernel > 255) return "kernel = " + std::to_string(kernel) + " is not odd and below 256";
      if (period > (std::size_t{1} << 30)) return "period = " + std::to_string(period) + " exceeds 2^30";
      return {};
    }
  } options;

  struct PageState {
    float votes = std::numeric_limits<float>::max();  // at the latest vote; the largest where none was
  };

  bool pin_prompt() const { return options.pin_prompt; }
  std::size_t query_window() const { return options.window; }
  std::size_t period() const { return options.period; }
  std::size_t slack_tokens() const { return options.period; }

  void trim(HeadView<SnapKv> head, PageList& victims) const {
    vote(head);
    const std::size_t slack = head.geometry().pages_for(options.period);
    const std::size_t target = head.page_budget() - std::min(head.page_budget(), slack);
    if (head.size() <= target) return;
    const std::span<float> scores = head.scratch().first(head.size());
    for (const PageIndex page : head.pages()) scores[page.value] = -head.state(page).votes;
    head.visit_highest_evictable(scores, head.size() - target, [&](PageIndex page) { victims.add(page); });
  }

  PageIndex victim(HeadView<SnapKv> head) const {
    return head.lowest_evictable([&](PageIndex page) { return head.state(page).votes; });
  }

 private:
  void vote(const HeadView<SnapKv>& head) const {
    if (head.recent_query_count() == 0) return;
    const std::size_t voted_on = tokens_before_window(head, options.window);
    const std::span<float> key = head.scratch().first(head.head_dim());
    const std::span<float> votes = head.scratch().subspan(key.size(), voted_on);
    count_votes(head, GroupVote::mean_of_shares, votes, head.scratch().subspan(key.size() + voted_on, voted_on), key);
    std::size_t token = 0;
    for (const PageIndex page : head.pages()) {
      if (token + head.tokens(page) > voted_on) break;  // it reaches into the window
      float sum = 0.0F;
      for (std::size_t last = token + head.tokens(page); token < last; ++token) {
        sum += pooled_vote(votes, token, options.kernel);
      }
      head.state(page).votes = sum;
    }
  }
};

}  // namespace kvsparse
