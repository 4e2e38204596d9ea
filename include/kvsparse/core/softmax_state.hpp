// SPDX-License-Identifier: Apache-2.0
// A softmax-weighted sum under construction. States over disjoint sets of tokens merge, in any order, into the state
// over their union: split caches, shared prefixes, residual summaries and further selections are all this one
// operation.
#pragma once

#include <cmath>
#include <cstddef>
#include <limits>

namespace kvsparse {

/// sum_j exp(s_j - max) and sum_j exp(s_j - max) * v_j of one query head over the tokens read so far.
struct SoftmaxState {
  float* accumulator = nullptr;                         ///< [value_dim], owned by the caller
  float max = -std::numeric_limits<float>::infinity();  ///< max_j s_j
  float sum = 0.0F;                                     ///< sum_j exp(s_j - max); 0 when no token was read

  /// log sum_j exp(s_j); -inf when no token was read.
  float log_sum_exp() const { return sum == 0.0F ? -std::numeric_limits<float>::infinity() : max + std::log(sum); }
};

/// Folds `other` into `state`. An empty state (sum 0) changes nothing, and two empty ones stay empty: without that case
/// -inf - -inf would make NaN. O(value_dim).
inline void merge(SoftmaxState& state, const SoftmaxState& other, std::size_t value_dim) {
  if (other.sum == 0.0F) return;
  const float max = state.max > other.max ? state.max : other.max;
  const float keep = state.sum == 0.0F ? 0.0F : std::exp(state.max - max);
  const float take = std::exp(other.max - max);
  for (std::size_t i = 0; i < value_dim; ++i) {
    state.accumulator[i] = state.accumulator[i] * keep + other.accumulator[i] * take;
  }
  state.sum = state.sum * keep + other.sum * take;
  state.max = max;
}

/// Adds exp(logit) to the denominator and no value: a learned sink. -inf changes nothing.
inline void add_sink(SoftmaxState& state, float logit, std::size_t value_dim) {
  if (logit == -std::numeric_limits<float>::infinity()) return;
  const float max = state.max > logit ? state.max : logit;
  const float keep = state.sum == 0.0F ? 0.0F : std::exp(state.max - max);
  for (std::size_t i = 0; i < value_dim; ++i) state.accumulator[i] *= keep;
  state.sum = state.sum * keep + std::exp(logit - max);
  state.max = max;
}

/// Writes the weighted mean of the values to out[value_dim]; zeros when no token was read.
inline void normalise(const SoftmaxState& state, float* out, std::size_t value_dim) {
  const float inverse = state.sum == 0.0F ? 0.0F : 1.0F / state.sum;
  for (std::size_t i = 0; i < value_dim; ++i) out[i] = state.accumulator[i] * inverse;
}

}  // namespace kvsparse
