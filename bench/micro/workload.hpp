// SPDX-License-Identifier: Apache-2.0
// One layer that decodes random rows, and the geometry that every figure of the benches refers to unless it says other.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <kvsparse/kvsparse.hpp>
#include <span>
#include <stdexcept>
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

  /// Steps that a policy which keeps everything may take before its N is no longer the one it was asked for: 1 %.
  static constexpr std::size_t drift(std::size_t tokens) { return std::max<std::size_t>(2, tokens / 100); }

  Layer(const kvsparse::Geometry& shape, std::size_t tokens, std::size_t budget)
      : tokens_(tokens),
        budget_(budget),
        cache_(config(shape, tokens, budget)),
        k_(shape.kv_heads * shape.head_dim),
        v_(k_.size()),
        q_(shape.query_heads * shape.head_dim),
        out_(q_.size()) {
    rewind();
  }

  /// Decodes `tokens` tokens under a budget of `budget`. The last 2 * budget are attended, so that the policy's
  /// evidence and the scatter of its pages are those of a running decode.
  void rewind() {
    constexpr bool attends = kvsparse::Evictor<Policy>;
    cache_.clear();
    for (std::size_t t = 0; t < tokens_; ++t) {
      rows_.fill(k_);
      rows_.fill(v_);
      append();
      if (attends && t + 2 * budget_ >= tokens_) {
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
    const kvsparse::Geometry& shape = cache_.geometry();
    return {q_.data() + kv_head * shape.group() * shape.head_dim, shape.group(), shape.head_dim, shape.head_dim,
            cache_.softmax_scale()};
  }
  /// Keys and values that the latest attend read.
  double kv_bytes_read() const {
    return static_cast<double>(cache_.stats().last_read_tokens * 2 * cache_.geometry().head_dim * sizeof(Scalar));
  }
  /// What it computed with them: a multiply-add for each of those values and each query head of the group.
  double flops() const {
    return kv_bytes_read() / sizeof(Scalar) * 2.0 * static_cast<double>(cache_.geometry().group());
  }

 private:
  static kvsparse::CacheConfig config(const kvsparse::Geometry& shape, std::size_t tokens, std::size_t budget) {
    return {.query_heads = shape.query_heads,
            .kv_heads = shape.kv_heads,
            .head_dim = shape.head_dim,
            .page_size = shape.page_size,
            .budget_tokens = budget,
            .read_budget_tokens = 0,
            .max_tokens = tokens + drift(tokens)};
  }
  static void require(kvsparse::Status status) {
    if (!status) throw std::runtime_error(status.message());
  }

  std::size_t tokens_, budget_;
  Cache cache_;
  RandomRows rows_{1};
  std::vector<float> k_, v_, q_, out_;
};

}  // namespace kvsparse_bench
