// SPDX-License-Identifier: Apache-2.0
// Rows for one layer of the geometry that every figure of the benches refers to, and a cache filled with them.
#pragma once

#include <cstdint>
#include <kvsparse/kvsparse.hpp>
#include <vector>

namespace kvsparse_bench {

inline constexpr kvsparse::Geometry layer_shape{.query_heads = 32, .kv_heads = 8, .head_dim = 128, .page_size = 16};

/// Uniform values in [-1, 1): attention over them is broad, so no page's weight underflows and no work is skipped.
class RandomRows {
 public:
  explicit RandomRows(std::uint64_t seed) : state_(seed) {}
  void fill(std::vector<float>& rows) {
    for (float& value : rows) {
      state_ = state_ * 6364136223846793005U + 1442695040888963407U;
      value = static_cast<float>(static_cast<std::int32_t>(state_ >> 32)) * 0x1p-31F;
    }
  }

 private:
  std::uint64_t state_;
};

template <class Policy, class Scalar>
class Layer {
 public:
  using Cache = kvsparse::PagedKvCache<Policy, Scalar>;

  /// Decodes `tokens` tokens under a budget of `budget`. The last 2 * budget are attended, so that the policy's
  /// evidence and the scatter of its pages are those of a running decode.
  Layer(std::size_t tokens, std::size_t budget)
      : cache_(config(tokens, budget)),
        k_(layer_shape.kv_heads * layer_shape.head_dim),
        v_(k_.size()),
        q_(layer_shape.query_heads * layer_shape.head_dim),
        out_(q_.size()) {
    constexpr bool attends = kvsparse::Evictor<Policy>;
    for (std::size_t t = 0; t < tokens; ++t) {
      rows_.fill(k_);
      rows_.fill(v_);
      append();
      if (attends && t + 2 * budget >= tokens) {
        rows_.fill(q_);
        attend();
      }
    }
    rows_.fill(q_);
  }

  void append() { require(cache_.append(k_, v_)); }
  void attend() { attend(kvsparse::SerialExecutor{}); }
  void attend(kvsparse::Executor auto&& executor) {
    require(kvsparse::attend(cache_, std::span<const float>(q_), std::span<float>(out_), {}, executor));
  }
  void step() { step(kvsparse::SerialExecutor{}); }
  void step(kvsparse::Executor auto&& executor) {
    append();
    attend(executor);
  }
  Cache& cache() { return cache_; }
  kvsparse::QueryGroup queries(std::size_t kv_head) const {
    return {q_.data() + kv_head * layer_shape.group() * layer_shape.head_dim, layer_shape.group(), layer_shape.head_dim,
            layer_shape.head_dim, cache_.softmax_scale()};
  }
  /// Keys and values that the latest attend read.
  double kv_bytes_read() const {
    return static_cast<double>(cache_.stats().last_read_tokens * 2 * layer_shape.head_dim * sizeof(Scalar));
  }

 private:
  static kvsparse::CacheConfig config(std::size_t tokens, std::size_t budget) {
    return {.query_heads = layer_shape.query_heads,
            .kv_heads = layer_shape.kv_heads,
            .head_dim = layer_shape.head_dim,
            .page_size = layer_shape.page_size,
            .budget_tokens = budget,
            .read_budget_tokens = 0,
            .max_tokens = tokens + tokens / 100 + 1};
  }
  static void require(kvsparse::Status status) {
    if (!status) throw std::runtime_error(status.message());
  }

  Cache cache_;
  RandomRows rows_{1};
  std::vector<float> k_, v_, q_, out_;
};

}  // namespace kvsparse_bench
