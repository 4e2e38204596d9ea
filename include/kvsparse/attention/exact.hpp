// SPDX-License-Identifier: Apache-2.0
// The slow, obvious oracle: attention in double precision, straight from the formula, two passes over all tokens.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

namespace kvsparse {

/// What one query head attends to, in full.
struct ExactAttention {
  std::vector<double> out;      ///< [value_dim]
  std::vector<double> weights;  ///< [tokens] shares of the softmax, summing to 1 unless there is a sink
  double log_sum_exp = -std::numeric_limits<double>::infinity();  ///< of the logits, and the sink
};

/// One query head's logits: LogitOptions by itself.
struct ExactLogits {
  double scale = 1.0;                                      ///< of dot products
  double soft_cap = 0.0;                                   ///< 0: none
  double alibi_slope = 0.0;                                ///< 0: none
  std::int64_t window = 0;                                 ///< 0: none
  double sink = -std::numeric_limits<double>::infinity();  ///< its logit; -inf: none
  std::int64_t query_position = 0;                         ///< windows and ALiBi look at it
};

/// q: [head_dim]; key(token), value(token): rows of head_dim and value_dim floats, position(token): where the token
/// stands, for token in 0 .. tokens - 1. Allocates; O(tokens * (head_dim + value_dim)).
template <class Keys, class Values, class Positions>
ExactAttention exact_attention(std::span<const float> q, std::size_t tokens, Keys&& key, Values&& value,
                               Positions&& position, const ExactLogits& logits, std::size_t value_dim) {
  ExactAttention result;
  result.out.assign(value_dim, 0.0);
  result.weights.resize(tokens);
  double max = logits.sink;
  for (std::size_t t = 0; t < tokens; ++t) {
    const auto row = key(t);
    double dot = 0.0;
    for (std::size_t i = 0; i < q.size(); ++i) dot += static_cast<double>(q[i]) * static_cast<double>(row[i]);
    double logit = dot * logits.scale;
    if (logits.soft_cap > 0.0) logit = logits.soft_cap * std::tanh(logit / logits.soft_cap);
    const std::int64_t distance = logits.query_position - static_cast<std::int64_t>(position(t));
    logit -= logits.alibi_slope * static_cast<double>(distance);
    if (logits.window > 0 && distance >= logits.window) logit = -std::numeric_limits<double>::infinity();
    result.weights[t] = logit;
    if (logit > max || std::isnan(logit)) max = logit;  // and NaN it stays
  }
  if (max == -std::numeric_limits<double>::infinity()) {  // nothing to attend to
    result.weights.assign(tokens, 0.0);
    return result;
  }
  double sum = std::exp(logits.sink - max);
  for (double& weight : result.weights) sum += weight = std::exp(weight - max);
  for (std::size_t t = 0; t < tokens; ++t) {
    result.weights[t] /= sum;
    const auto row = value(t);
    for (std::size_t i = 0; i < value_dim; ++i) result.out[i] += result.weights[t] * static_cast<double>(row[i]);
  }
  result.log_sum_exp = max + std::log(sum);
  return result;
}
/// The same of scaled dot products and nothing else, over values as wide as keys.
template <class Keys, class Values>
ExactAttention exact_attention(std::span<const float> q, std::size_t tokens, Keys&& key, Values&& value, double scale) {
  return exact_attention(
      q, tokens, key, value, [](std::size_t) { return 0; }, {.scale = scale}, q.size());
}

}  // namespace kvsparse
