// SPDX-License-Identifier: Apache-2.0
// What models do to the dot product of a query and a key, or to the softmax's denominator, beside scaling.
#pragma once

#include <cstddef>
#include <vector>

namespace kvsparse {

/// One layer's logits. In this order: dot product times softmax_scale, soft cap, ALiBi, window; then the softmax, with
/// the sink logit in its denominator. What is off costs nothing.
struct LogitOptions {
  /// Gemma: logit = soft_cap * tanh(logit / soft_cap). 0: none.
  float soft_cap = 0.0F;
  /// Sliding-window layers: a query sees the last `window` positions, its own included. 0: all. Pages that lie outside
  /// are not read, and are the first that a policy which evicts gives up.
  std::size_t window = 0;
  /// ALiBi: logit -= slope * (query position - key position), true positions. [query_heads] or empty.
  std::vector<float> alibi_slopes = {};
  /// gpt-oss: one more logit in each query head's denominator, without a value. Page masses then sum to less than 1,
  /// and log-sum-exp includes it: where states of split caches are merged, one part alone may have it. [query_heads]
  /// or empty; -inf: none for that head.
  std::vector<float> sink_logits = {};

  /// Of the two arrays, which a cache copies.
  std::size_t bytes_required() const { return sizeof(float) * (alibi_slopes.size() + sink_logits.size()); }
};

}  // namespace kvsparse
