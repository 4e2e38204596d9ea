// SPDX-License-Identifier: Apache-2.0
// Exact shape checks at the public boundary, in release builds too.
#pragma once

#include "geometry.hpp"
#include "status.hpp"
#include "views.hpp"

namespace kvsparse {

/// A flat span must hold exactly `heads` rows.
inline Status check_size(std::size_t elements, std::size_t heads, const Geometry& geometry) {
  const std::size_t expected = heads * geometry.head_dim;
  return elements == expected ? Status{} : Status{Status::Code::wrong_size, elements, expected};
}

template <class Row>
Status check_rows(const HeadRows<Row>& rows, std::size_t heads, const Geometry& geometry) {
  if (rows.heads != heads) return {Status::Code::wrong_heads, rows.heads, heads};
  if (rows.head_dim != geometry.head_dim) return {Status::Code::wrong_head_dim, rows.head_dim, geometry.head_dim};
  return {};
}
template <class Row>
Status check_rows(const TokenRows<Row>& rows, std::size_t heads, const Geometry& geometry) {
  return check_rows(HeadRows<Row>(rows.data, rows.heads, rows.head_dim), heads, geometry);
}

}  // namespace kvsparse
