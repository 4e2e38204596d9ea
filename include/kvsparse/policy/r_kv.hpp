// SPDX-License-Identifier: Apache-2.0
// RKv: long reasoning repeats itself, so weigh how important a token is to the latest queries against how redundant its
// key is among the resident ones, and give up the worst every `period` steps. Source: Cai et al., NeurIPS 2025
// (2505.24133), section 3, and its code where the paper is silent (max-pooled importance).  Needs: a window of recent
// queries and all resident keys, at each trim. Per step: O(L d), per trim O(L^2 d): 134 MFLOP at L = 1024, d = 128.
// Memory: L tokens, `window` queries a head, a number a page. Departs from the paper: pages instead of tokens (exact at
// page_size 1), a page's score being the sum of its tokens'; residents go down to budget - period and up to the budget,
// where the paper goes from the budget to budget + period. Pages younger than the latest trim count as kept.
#pragma once

#include "policy.hpp"
#include "window_votes.hpp"

namespace kvsparse {

struct RKv {
  static constexpr std::string_view name = "r_kv";
  static constexpr bool reads_rows = true;

  struct Options {
    double lambda = 0.1;       ///< weight of importance; 1 - lambda is that of redundancy (the code has 0.07)
    double similarity = 0.5;   ///< cosine above which two keys say the same: the later one is then exempted
    std::size_t window = 8;    ///< queries that vote, and latest tokens that stay
    std::size_t kernel = 7;    ///< importance is max-pooled over so many neighbouring tokens; odd
    std::size_t period = 128;  ///< decode steps between two trims
    bool pin_prompt = false;
    void visit(auto&& field) {
      field("lambda", lambda);
      field("similarity", similarity);
      field("window", window);
      field("kernel", kernel);
      field("period", period);
      field("pin_prompt", pin_prompt);
    }
    std::string problem() const {
      if (!(lambda >= 0.0 && lambda <= 1.0)) return "lambda = " + std::to_string(lambda) + " is not in [0, 1]";
      if (!(similarity >= -1.0 && similarity <= 1.0)) {
        return "similarity = " + std::to_string(similarity) + " is not in [-1, 1]";
      }
      if (window < 1 || window > 4096) return "window = " + std::to_string(window) + " is not in 1 .. 4096";
      if (kernel % 2 == 0 || kernel > 255) return "kernel = " + std::to_string(kernel) + " is not odd and below 256";
      if (period < 1 || period > (std::size_t{1} << 30)) {
        return "period = " + std::to_string(period) + " is not in 1 .. 2^30";
      }
      return {};
    }
  } options;

  struct PageState {
    float score = std::numeric_limits<float>::max();  // at the latest trim; the largest where none was
  };

  bool pin_prompt() const { return options.pin_prompt; }
  std::size_t query_window() const { return options.window; }
  std::size_t period() const { return options.period; }
  std::size_t slack_tokens() const { return options.period; }

  void trim(HeadView<RKv> head, PageList& victims) const {
    const std::size_t slack = head.geometry().pages_for(options.period);
    const std::size_t target = head.page_budget() - std::min(head.page_budget(), slack);
    if (head.size() <= target || head.recent_query_count() == 0) return;
    score_pages(head);
    const std::span<float> scores = head.scratch().first(head.size());
    for (const PageIndex page : head.pages()) scores[page.value] = -head.state(page).score;
    head.visit_highest_evictable(scores, head.size() - target, [&](PageIndex page) { victims.add(page); });
  }

  PageIndex victim(HeadView<RKv> head) const {
    return head.lowest_evictable([&](PageIndex page) { return head.state(page).score; });
  }

 private:
  void score_pages(const HeadView<RKv>& head) const {
    const std::size_t scored = tokens_before_window(head, options.window);
    const std::size_t resident = tokens_before_window(head, 0);
    std::span<float> rest = head.scratch();
    const auto take = [&](std::size_t count) {
      const std::span<float> taken = rest.first(count);
      rest = rest.subspan(count);
      return taken;
    };
    const std::span<float> key = take(head.head_dim());
    const std::span<float> other = take(head.head_dim());
    const std::span<float> importance = take(scored);
    const std::span<float> redundancy = take(resident);
    count_votes(head, GroupVote::max_of_logits, importance, redundancy.first(scored), key);
    count_likeness(head, redundancy, key, other);
    const float highest = *std::max_element(redundancy.begin(), redundancy.end());
    double sum = 0.0;
    for (float& x : redundancy) sum += static_cast<double>(x = std::exp(x - highest));

    std::size_t token = 0;
    for (const PageIndex page : head.pages()) {
      if (token + head.tokens(page) > scored) break;  // it reaches into the window
      double score = 0.0;
      for (std::size_t last = token + head.tokens(page); token < last; ++token) {
        score += options.lambda * static_cast<double>(pooled_vote(importance, token, options.kernel)) -
                 (1.0 - options.lambda) * static_cast<double>(redundancy[token]) / sum;
      }
      head.state(page).score = static_cast<float>(score);
    }
  }

  /// likeness[token]: mean cosine of all other keys with its key, where each key exempts the latest of those that are
  /// more similar to it than the limit.
  void count_likeness(const HeadView<RKv>& head, std::span<float> likeness, std::span<float> key,
                      std::span<float> other) const {
    std::fill(likeness.begin(), likeness.end(), 0.0F);
    const auto weight = 1.0F / static_cast<float>(likeness.size());
    std::size_t from = 0;
    for (const PageIndex page : head.pages()) {
      for (std::uint32_t slot = 0; slot < head.tokens(page); ++slot, ++from) {
        const double length = load_key(head, page, slot, key);
        bool exempted = false;
        std::size_t to = likeness.size();
        for (auto later = static_cast<std::uint32_t>(head.size()); later-- > 0;) {
          for (auto s = static_cast<std::uint32_t>(head.tokens({later})); s-- > 0;) {
            if (--to == from) continue;
            const double lengths = length * load_key(head, {later}, s, other);
            double product = 0.0;
            for (std::size_t i = 0; i < key.size(); ++i) {
              product += static_cast<double>(key[i]) * static_cast<double>(other[i]);
            }
            const double cosine = lengths > 0.0 ? product / lengths : 0.0;
            if (!exempted && cosine > options.similarity) {
              exempted = true;
            } else {
              likeness[to] += weight * static_cast<float>(cosine);
            }
          }
        }
      }
    }
  }

  /// Returns the key's length.
  static double load_key(const HeadView<RKv>& head, PageIndex page, std::uint32_t slot, std::span<float> key) {
    head.load_key(page, Slot{slot}, key);
    double squares = 0.0;
    for (const float x : key) squares += static_cast<double>(x) * static_cast<double>(x);
    return std::sqrt(squares);
  }
};

}  // namespace kvsparse
