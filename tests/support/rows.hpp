// SPDX-License-Identifier: Apache-2.0
//
// Random queries, keys and values for tests that talk to PagedKvCache directly, and the exact answer to compare with.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "kvsparse/attention/exact.hpp"
#include "kvsparse/cache/cache_config.hpp"
#include "kvsparse/core/stored_row.hpp"
#include "test_rng.hpp"

namespace kvsparse_test {

/// [rows, head_dim]: makes of each row what a storage type makes of it. What is stored of a row is the business of
/// stored_row_test.
template <class Scalar>
void round_rows(std::vector<float>& rows, std::size_t head_dim) {
  std::vector<Scalar> stored(kvsparse::stored_row_size<Scalar>(head_dim));
  for (std::size_t first = 0; first < rows.size(); first += head_dim) {
    const std::span<float> row = std::span<float>(rows).subspan(first, head_dim);
    kvsparse::store_row(row.data(), head_dim, stored.data());
    kvsparse::load_row(stored.data(), row);
  }
}

/// [tokens, heads, head_dim] of q, and of k and v.
struct Rows {
  std::size_t tokens, query_heads, kv_heads, head_dim;
  std::vector<float> q, k, v;

  Rows(std::size_t token_count, const kvsparse::CacheConfig& config, std::uint64_t seed, double query_scale = 1.5)
      : tokens(token_count), query_heads(config.query_heads), kv_heads(config.kv_heads), head_dim(config.head_dim) {
    TestRng rng(seed);
    for (std::size_t i = 0; i < tokens * query_heads * head_dim; ++i) {
      q.push_back(static_cast<float>(query_scale * rng.gaussian()));
    }
    for (std::vector<float>* rows : {&k, &v}) {
      for (std::size_t i = 0; i < tokens * kv_heads * head_dim; ++i)
        rows->push_back(static_cast<float>(rng.gaussian()));
    }
  }

  std::span<const float> token_q(std::size_t t) const { return token(q, query_heads, t); }
  std::span<const float> token_k(std::size_t t) const { return token(k, kv_heads, t); }
  std::span<const float> token_v(std::size_t t) const { return token(v, kv_heads, t); }
  std::span<const float> query(std::size_t t, std::size_t head) const { return row(q, query_heads, t, head); }
  std::span<const float> key(std::size_t t, std::size_t head) const { return row(k, kv_heads, t, head); }
  std::span<const float> value(std::size_t t, std::size_t head) const { return row(v, kv_heads, t, head); }

  double scale() const { return 1.0 / std::sqrt(static_cast<double>(head_dim)); }

  /// Query head `head` of token t over the tokens at `positions`.
  kvsparse::ExactAttention exact(std::size_t t, std::size_t head, const std::vector<std::size_t>& positions) const {
    const std::size_t kv_head = head / (query_heads / kv_heads);
    return kvsparse::exact_attention(
        query(t, head), positions.size(), [&](std::size_t i) { return key(positions[i], kv_head); },
        [&](std::size_t i) { return value(positions[i], kv_head); }, scale());
  }

  /// What a storage type makes of keys and values.
  template <class Key, class Value = Key>
  Rows stored_as() const {
    Rows rounded = *this;
    round_rows<Key>(rounded.k, head_dim);
    round_rows<Value>(rounded.v, head_dim);
    return rounded;
  }

 private:
  std::span<const float> token(const std::vector<float>& data, std::size_t heads, std::size_t t) const {
    return std::span<const float>(data).subspan(t * heads * head_dim, heads * head_dim);
  }
  std::span<const float> row(const std::vector<float>& data, std::size_t heads, std::size_t t, std::size_t h) const {
    return std::span<const float>(data).subspan((t * heads + h) * head_dim, head_dim);
  }
};

inline std::vector<std::size_t> first_positions(std::size_t count) {
  std::vector<std::size_t> positions(count);
  for (std::size_t i = 0; i < count; ++i) positions[i] = i;
  return positions;
}

}  // namespace kvsparse_test
