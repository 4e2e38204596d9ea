// SPDX-License-Identifier: Apache-2.0
// The slow, obvious oracle: attention in double precision, straight from the formula, two passes over all tokens.
#pragma once

#include <cmath>
#include <cstddef>
#include <limits>
#include <span>
#include <vector>

namespace kvsparse {

/// What one query head attends to, in full.
struct ExactAttention {
  std::vector<double> out;      ///< [head_dim]
  std::vector<double> weights;  ///< [tokens] shares of the softmax, summing to 1
  double log_sum_exp = -std::numeric_limits<double>::infinity();
};

/// q: [head_dim]; key(token), value(token): rows of head_dim floats, token in 0 .. tokens - 1. Allocates; O(tokens *
/// head_dim).
template <class Keys, class Values>
ExactAttention exact_attention(std::span<const float> q, std::size_t tokens, Keys&& key, Values&& value, double scale) {
  ExactAttention result;
  result.out.assign(q.size(), 0.0);
  result.weights.resize(tokens);
  double max = -std::numeric_limits<double>::infinity();
  for (std::size_t t = 0; t < tokens; ++t) {
    const auto row = key(t);
    double dot = 0.0;
    for (std::size_t i = 0; i < q.size(); ++i) dot += static_cast<double>(q[i]) * static_cast<double>(row[i]);
    result.weights[t] = dot * scale;
    if (result.weights[t] > max) max = result.weights[t];
  }
  double sum = 0.0;
  for (double& weight : result.weights) sum += weight = std::exp(weight - max);
  for (std::size_t t = 0; t < tokens; ++t) {
    result.weights[t] /= sum;
    const auto row = value(t);
    for (std::size_t i = 0; i < q.size(); ++i) result.out[i] += result.weights[t] * static_cast<double>(row[i]);
  }
  if (tokens > 0) result.log_sum_exp = max + std::log(sum);
  return result;
}

}  // namespace kvsparse
