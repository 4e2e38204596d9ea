// SPDX-License-Identifier: Apache-2.0
// What every replayed policy is measured against: attention to all tokens, in double, from the f32 trace.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <span>

#include "../../examples/common/trace.hpp"

namespace kvsparse_tools {

/// Dense attention of the queries of one token after another. It is computed for a block of tokens at once, as matrix
/// products; only the weights of that block are in memory, never tokens x tokens of them.
class DenseReference {
 public:
  /// `trace` must outlive the reference.
  explicit DenseReference(const Trace& trace)
      : trace_(trace), group_(trace.query_heads / trace.kv_heads), block_(block_tokens(trace)) {
    const Eigen::Index rows = index(trace.kv_heads * group_ * block_);
    weights_.resize(rows, index(trace.tokens));
    out_.resize(rows, index(trace.head_dim));
  }

  /// Makes weights() and out() those of this token's queries. Cheap for a token right after the one before, most of
  /// the time.
  void advance_to(std::size_t token) {
    if (token >= block_begin_ && token < block_end_) return;
    block_begin_ = token;
    block_end_ = std::min(token + block_, trace_.tokens);
    for (std::size_t head = 0; head < trace_.kv_heads; ++head) attend_block(head);
  }

  /// [token + 1] shares of the softmax over all tokens up to this one, which is the latest or lies in its block.
  std::span<const double> weights(std::size_t token, std::size_t query_head) const {
    return {weights_.data() + row_of(token, query_head) * trace_.tokens, token + 1};
  }
  /// [head_dim]
  std::span<const double> out(std::size_t token, std::size_t query_head) const {
    return {out_.data() + row_of(token, query_head) * trace_.head_dim, trace_.head_dim};
  }

 private:
  using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

  static Eigen::Index index(std::size_t value) { return static_cast<Eigen::Index>(value); }

  static std::size_t block_tokens(const Trace& trace) {
    constexpr std::size_t weights_in_memory = std::size_t{4} << 20;  // 32 MiB
    return std::clamp<std::size_t>(weights_in_memory / (trace.tokens * trace.query_heads), 1, 32);
  }

  /// The rows of a kv head are together, and in them those of a token.
  std::size_t row_of(std::size_t token, std::size_t query_head) const {
    return (query_head / group_ * block_ + (token - block_begin_)) * group_ + query_head % group_;
  }

  /// Rows first .. first + count - 1 of `values`, [tokens, kv_heads, head_dim], of one kv head.
  void load_tile(const std::vector<float>& values, std::size_t kv_head, std::size_t first, std::size_t count) {
    using Rows = Eigen::Map<const Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>, 0,
                            Eigen::OuterStride<>>;
    const std::size_t stride = trace_.kv_heads * trace_.head_dim;
    tile_ = Rows(values.data() + first * stride + kv_head * trace_.head_dim, index(count), index(trace_.head_dim),
                 Eigen::OuterStride<>(index(stride)))
                .cast<double>();
  }

  template <class Use>
  void for_each_tile(const std::vector<float>& values, std::size_t kv_head, Use&& use) {
    constexpr std::size_t tile_tokens = 256;
    for (std::size_t first = 0; first < block_end_; first += tile_tokens) {
      const std::size_t count = std::min(tile_tokens, block_end_ - first);
      load_tile(values, kv_head, first, count);
      use(index(first), index(count));
    }
  }

  /// In plain loops: Eigen's would make g++ 12 warn of its own AVX-512 headers.
  static void softmax(std::span<double> row) {
    const double largest = *std::max_element(row.begin(), row.end());
    double sum = 0.0;
    for (double& weight : row) sum += weight = std::exp(weight - largest);
    for (double& weight : row) weight /= sum;
  }

  void attend_block(std::size_t kv_head) {
    const std::size_t tokens = block_end_ - block_begin_;
    const std::size_t first_row = row_of(block_begin_, kv_head * group_);
    queries_.resize(index(tokens * group_), index(trace_.head_dim));
    const double scale = 1.0 / std::sqrt(static_cast<double>(trace_.head_dim));
    for (std::size_t t = 0; t < tokens; ++t) {
      const float* q = trace_.query(block_begin_ + t).data() + kv_head * group_ * trace_.head_dim;
      double* row = queries_.data() + t * group_ * trace_.head_dim;
      std::transform(q, q + group_ * trace_.head_dim, row, [&](float x) { return scale * static_cast<double>(x); });
    }
    auto weights = weights_.middleRows(index(first_row), index(tokens * group_));
    for_each_tile(trace_.k, kv_head, [&](Eigen::Index first, Eigen::Index count) {
      weights.middleCols(first, count).noalias() = queries_ * tile_.transpose();
    });
    for (std::size_t t = 0; t < tokens; ++t) {
      for (std::size_t g = 0; g < group_; ++g) {
        double* row = weights_.data() + (first_row + t * group_ + g) * trace_.tokens;
        softmax(std::span(row, block_begin_ + t + 1));
        std::fill(row + block_begin_ + t + 1, row + block_end_, 0.0);
      }
    }
    auto out = out_.middleRows(index(first_row), index(tokens * group_));
    out.setZero();
    for_each_tile(trace_.v, kv_head, [&](Eigen::Index first, Eigen::Index count) {
      out.noalias() += weights.middleCols(first, count) * tile_;
    });
  }

  const Trace& trace_;
  std::size_t group_;
  std::size_t block_;
  std::size_t block_begin_ = 0;
  std::size_t block_end_ = 0;
  Matrix weights_;  // [kv_heads, block, group] x tokens
  Matrix out_;      // [kv_heads, block, group] x head_dim
  Matrix queries_;  // [block, group] x head_dim, scaled
  Matrix tile_;     // some keys or values of one kv head
};

}  // namespace kvsparse_tools
