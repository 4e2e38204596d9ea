// SPDX-License-Identifier: Apache-2.0
// How much the latest queries, a window of them, would attend to each resident token: the evidence of SnapKv and RKv.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <span>

#include "policy.hpp"

namespace kvsparse {

/// How the query heads of a group speak together.
enum class GroupVote {
  mean_of_shares,  ///< each has its own softmax; the shares are averaged
  max_of_logits,   ///< one softmax over the largest logit of the group
};

/// The resident tokens that are older than the latest `window` tokens, in position order. They come first in every list
/// of tokens, since pages are in position order.
inline std::size_t tokens_before_window(const HeadPages& head, std::size_t window) {
  std::size_t count = 0;
  for (const PageIndex page : head.pages()) {
    const std::int64_t before = head.end() - head.first_position(page) - static_cast<std::int64_t>(window);
    count +=
        static_cast<std::size_t>(std::clamp<std::int64_t>(before, 0, static_cast<std::int64_t>(head.tokens(page))));
  }
  return count;
}

/// votes[token]: the mean over the window's queries of the token's share of the softmax over the tokens before the
/// window; those inside it stay anyway. votes and logits: [tokens_before_window]. Needs the query_window trait.
/// O(window * group * tokens * head_dim).
inline void count_votes(const HeadPages& head, GroupVote vote, std::span<float> votes, std::span<float> logits,
                        std::span<float> key) {
  std::fill(votes.begin(), votes.end(), 0.0F);
  if (votes.empty()) return;
  const std::size_t window = head.recent_query_count();
  const std::size_t softmaxes = vote == GroupVote::mean_of_shares ? head.geometry().group() : 1;
  const auto weight = 1.0 / static_cast<double>(window * softmaxes);
  for (std::size_t age = 0; age < window; ++age) {
    const QueryGroup queries = head.recent_queries(age);
    for (std::size_t s = 0; s < softmaxes; ++s) {
      const std::size_t first = vote == GroupVote::mean_of_shares ? s : 0;
      const std::size_t last = vote == GroupVote::mean_of_shares ? s + 1 : queries.size;
      std::size_t token = 0;
      for (const PageIndex page : head.pages()) {
        for (std::uint32_t slot = 0; slot < head.tokens(page) && token < votes.size(); ++slot, ++token) {
          head.load_key(page, Slot{slot}, key);
          double largest = -std::numeric_limits<double>::infinity();
          for (std::size_t q = first; q < last; ++q) {
            double product = 0.0;
            for (std::size_t i = 0; i < key.size(); ++i) {
              product += static_cast<double>(queries[q][i]) * static_cast<double>(key[i]);
            }
            largest = std::max(largest, product);
          }
          logits[token] = static_cast<float>(largest * static_cast<double>(queries.scale));
        }
      }
      const float highest = *std::max_element(logits.begin(), logits.end());
      double sum = 0.0;
      for (float& logit : logits) sum += static_cast<double>(logit = std::exp(logit - highest));
      for (std::size_t t = 0; t < votes.size(); ++t) {
        votes[t] += static_cast<float>(weight * static_cast<double>(logits[t]) / sum);
      }
    }
  }
}

/// The largest of the `kernel` (odd) votes around a token: what is next to a token that matters stays with it.
inline float pooled_vote(std::span<const float> votes, std::size_t token, std::size_t kernel) {
  const std::size_t reach = kernel / 2;
  const std::size_t first = token - std::min(token, reach);
  const std::size_t last = std::min(votes.size(), token + reach + 1);
  return *std::max_element(votes.begin() + static_cast<std::ptrdiff_t>(first),
                           votes.begin() + static_cast<std::ptrdiff_t>(last));
}

}  // namespace kvsparse
