// SPDX-License-Identifier: Apache-2.0
// What every replayed policy is measured against: attention to all tokens, in double, from the f32 trace.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <span>
#include <vector>

#include "common/trace.hpp"

namespace kvsparse_tools {

/// Dense attention of the queries of one token after another. It is computed for a block of tokens at once, so that
/// keys and values are converted once a block; only the weights of that block are in memory, never tokens x tokens of
/// them.
///
/// In plain loops that compilers vectorise: Eigen's products make g++ 12 warn of its own AVX-512 headers.
class DenseReference {
 public:
  /// `trace` must outlive the reference.
  explicit DenseReference(const Trace& trace)
      : trace_(trace),
        group_(trace.query_heads / trace.kv_heads),
        block_(block_tokens(trace)),
        weights_(trace.query_heads * block_ * trace.tokens),
        out_(trace.query_heads * block_ * trace.head_dim),
        query_(trace.head_dim),
        tile_(tile_tokens * trace.head_dim) {}

  /// Makes weights() and out() those of this token's queries. Most of the time cheap when it follows the one before.
  void advance_to(std::size_t token) {
    if (token >= block_begin_ && token < block_end_) return;
    block_begin_ = token;
    block_end_ = std::min(token + block_, trace_.tokens);
    for (std::size_t head = 0; head < trace_.kv_heads; ++head) attend_block(head);
  }

  /// [token + 1] shares of the softmax over all tokens up to this one, which must lie in the block of the latest
  /// advance_to.
  std::span<const double> weights(std::size_t token, std::size_t query_head) const {
    return {weights_.data() + row_of(token, query_head) * trace_.tokens, token + 1};
  }
  /// [head_dim]
  std::span<const double> out(std::size_t token, std::size_t query_head) const {
    return {out_.data() + row_of(token, query_head) * trace_.head_dim, trace_.head_dim};
  }

 private:
  static constexpr std::size_t tile_tokens = 64;

  static std::size_t block_tokens(const Trace& trace) {
    constexpr std::size_t weights_in_memory = std::size_t{4} << 20;  // 32 MiB
    return std::clamp<std::size_t>(weights_in_memory / trace.tokens / trace.query_heads, 1, 32);
  }

  std::size_t row_of(std::size_t token, std::size_t query_head) const {
    return (token - block_begin_) * trace_.query_heads + query_head;
  }
  std::span<double> weight_row(std::size_t token, std::size_t query_head) {
    return {weights_.data() + row_of(token, query_head) * trace_.tokens, trace_.tokens};
  }
  std::span<double> out_row(std::size_t token, std::size_t query_head) {
    return {out_.data() + row_of(token, query_head) * trace_.head_dim, trace_.head_dim};
  }

  /// out[j] += sum over r of coefficients[r] * rows[r, j]; rows: [coefficients.size(), out.size()] at that stride.
  static void add_combination(std::span<const double> coefficients, const double* rows, std::size_t stride,
                              std::span<double> out) {
    std::size_t r = 0;
    for (; r + 4 <= coefficients.size(); r += 4) {
      const double a = coefficients[r], b = coefficients[r + 1], c = coefficients[r + 2], d = coefficients[r + 3];
      const double* first = rows + r * stride;
      const double* second = first + stride;
      const double* third = second + stride;
      const double* fourth = third + stride;
      for (std::size_t j = 0; j < out.size(); ++j) {
        out[j] += a * first[j] + b * second[j] + (c * third[j] + d * fourth[j]);
      }
    }
    for (; r < coefficients.size(); ++r) {
      for (std::size_t j = 0; j < out.size(); ++j) out[j] += coefficients[r] * rows[r * stride + j];
    }
  }

  static void softmax(std::span<double> row) {
    const double largest = *std::max_element(row.begin(), row.end());
    double sum = 0.0;
    for (double& weight : row) sum += weight = std::exp(weight - largest);
    for (double& weight : row) weight /= sum;
  }

  /// visit(token, query head) for the block's tokens from `first` on and the heads of one group.
  template <class Visit>
  void for_each_query(std::size_t kv_head, std::size_t first, Visit&& visit) {
    for (std::size_t token = std::max(first, block_begin_); token < block_end_; ++token) {
      for (std::size_t g = 0; g < group_; ++g) visit(token, kv_head * group_ + g);
    }
  }

  void attend_block(std::size_t kv_head) {
    const std::size_t dim = trace_.head_dim;
    const double scale = 1.0 / std::sqrt(static_cast<double>(dim));
    for_each_query(kv_head, 0, [&](std::size_t token, std::size_t head) {
      std::ranges::fill(weight_row(token, head), 0.0);
      std::ranges::fill(out_row(token, head), 0.0);
    });
    for (std::size_t first = 0; first < block_end_; first += tile_tokens) {
      const std::size_t end = std::min(first + tile_tokens, block_end_);
      for (std::size_t t = first; t < end; ++t) {  // transposed: [head_dim, tile_tokens]
        const float* key = trace_.key(t).data() + kv_head * dim;
        for (std::size_t i = 0; i < dim; ++i) tile_[i * tile_tokens + t - first] = static_cast<double>(key[i]);
      }
      for_each_query(kv_head, first, [&](std::size_t token, std::size_t head) {
        const float* q = trace_.query(token).data() + head * dim;
        for (std::size_t i = 0; i < dim; ++i) query_[i] = scale * static_cast<double>(q[i]);
        const std::span<double> seen = weight_row(token, head).subspan(first, std::min(end, token + 1) - first);
        add_combination(query_, tile_.data(), tile_tokens, seen);
      });
    }
    for_each_query(kv_head, 0,
                   [&](std::size_t token, std::size_t head) { softmax(weight_row(token, head).first(token + 1)); });
    for (std::size_t first = 0; first < block_end_; first += tile_tokens) {
      const std::size_t end = std::min(first + tile_tokens, block_end_);
      for (std::size_t t = first; t < end; ++t) {  // [tile_tokens, head_dim]
        const float* value = trace_.value(t).data() + kv_head * dim;
        for (std::size_t i = 0; i < dim; ++i) tile_[(t - first) * dim + i] = static_cast<double>(value[i]);
      }
      for_each_query(kv_head, first, [&](std::size_t token, std::size_t head) {
        const std::span<const double> seen = weight_row(token, head).subspan(first, std::min(end, token + 1) - first);
        add_combination(seen, tile_.data(), dim, out_row(token, head));
      });
    }
  }

  const Trace& trace_;
  std::size_t group_;
  std::size_t block_;
  std::size_t block_begin_ = 0;
  std::size_t block_end_ = 0;
  std::vector<double> weights_;  // [block, query_heads, tokens]
  std::vector<double> out_;      // [block, query_heads, head_dim]
  std::vector<double> query_;    // [head_dim] scaled
  std::vector<double> tile_;     // some keys or values of one kv head
};

}  // namespace kvsparse_tools
