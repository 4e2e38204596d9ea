// SPDX-License-Identifier: Apache-2.0
// Exact shape checks at the public boundary, in release builds too.
#pragma once

#include "geometry.hpp"
#include "status.hpp"
#include "views.hpp"

namespace kvsparse {

/// A flat span must hold exactly `heads` rows; else wrong_size.
inline Status check_size(std::size_t elements, std::size_t heads, std::size_t head_dim) {
  const std::size_t expected = heads * head_dim;
  return elements == expected ? Status{} : Status{Status::Code::wrong_size, elements, expected};
}

/// Rows must be [heads, head_dim] of each token; else wrong_heads or wrong_head_dim.
template <class Row>
Status check_rows(const HeadRows<Row>& rows, std::size_t heads, std::size_t head_dim) {
  if (rows.heads != heads) return {Status::Code::wrong_heads, rows.heads, heads};
  if (rows.head_dim != head_dim) return {Status::Code::wrong_head_dim, rows.head_dim, head_dim};
  return {};
}
template <class Row>
Status check_rows(const TokenRows<Row>& rows, std::size_t heads, std::size_t head_dim) {
  return check_rows(HeadRows<Row>(rows.data, rows.heads, rows.head_dim), heads, head_dim);
}

/// One token's keys and values, or those of a chunk; else one of wrong_tokens, wrong_heads, wrong_head_dim. Where
/// values lie in the keys, `v` must hold no row: a row would be a value that is not stored.
template <class Rows>
Status check_keys_and_values(const Rows& k, const Rows& v, const Geometry& geometry) {
  if constexpr (requires { k.tokens; }) {
    if (!geometry.values_in_keys && v.tokens != k.tokens) return {Status::Code::wrong_tokens, v.tokens, k.tokens};
  }
  if (const Status status = check_rows(k, geometry.kv_heads, geometry.head_dim); !status) return status;
  if (!geometry.values_in_keys) return check_rows(v, geometry.kv_heads, geometry.dim_of_values());
  return v.heads == 0 ? Status{} : Status{Status::Code::wrong_heads, v.heads, 0};
}

}  // namespace kvsparse
