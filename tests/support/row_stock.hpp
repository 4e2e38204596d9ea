// SPDX-License-Identifier: Apache-2.0
//
// A stock of keys, values and queries that long random tests draw from, so that they spend their time in the library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kvsparse/cache/cache_config.hpp"
#include "rows.hpp"

namespace kvsparse_test {

/// Calls visit.template operator()<Scalar>() with the storage type of that name.
template <class Visit>
decltype(auto) with_scalar(kvsparse::ScalarType scalar, Visit&& visit) {
  switch (scalar) {
    case kvsparse::ScalarType::f32: return visit.template operator()<float>();
    case kvsparse::ScalarType::f16: return visit.template operator()<kvsparse::Half>();
    case kvsparse::ScalarType::bf16: return visit.template operator()<kvsparse::Bfloat16>();
    case kvsparse::ScalarType::int8: break;
  }
  return visit.template operator()<kvsparse::Int8>();
}

/// `count` tokens, each with keys, values and queries of all heads. Most are Gaussian; some have keys that are zero, or
/// large, or those of the token before.
class RowStock {
 public:
  static constexpr std::size_t count = 128;

  RowStock(const kvsparse::Geometry& geometry, kvsparse::ScalarType scalar, std::uint64_t seed)
      : geometry_(geometry),
        k_row_(geometry.kv_heads * geometry.head_dim),
        v_row_(geometry.kv_heads * geometry.dim_of_values()),
        q_row_(k_row_ * geometry.group()) {
    TestRng rng(seed);
    for (std::size_t i = 0; i < count; ++i) {
      const int kind = rng.below(16);
      for (std::size_t j = 0; j < k_row_; ++j) {
        const double gaussian = rng.gaussian();
        const bool again = kind == 0 && i > 0;
        const double key = again ? static_cast<double>(k_[k_.size() - k_row_]) : (kind == 1 ? 0 : kind == 2 ? 12 : 1);
        k_.push_back(static_cast<float>(again ? key : key * gaussian));
      }
      for (std::size_t j = 0; j < v_row_; ++j) v_.push_back(static_cast<float>(rng.gaussian()));
      for (std::size_t j = 0; j < q_row_; ++j) q_.push_back(static_cast<float>(1.5 * rng.gaussian()));
    }
    stored_k_ = k_;
    stored_v_ = v_;
    with_scalar(scalar, [&]<class Scalar>() {
      round_rows<Scalar>(stored_k_, geometry.head_dim);
      round_rows<Scalar>(stored_v_, geometry.dim_of_values());
    });
  }

  const kvsparse::Geometry& geometry() const { return geometry_; }

  /// [kv_heads, head_dim], [kv_heads, value_dim], [query_heads, head_dim].
  std::span<const float> k(std::size_t token) const { return rows(k_, k_row_, token); }
  std::span<const float> v(std::size_t token) const { return rows(v_, v_row_, token); }
  std::span<const float> q(std::size_t token) const { return rows(q_, q_row_, token); }
  std::span<const float> query(std::size_t token, std::size_t head) const {
    return q(token).subspan(head * geometry_.head_dim, geometry_.head_dim);
  }
  /// [head_dim], [value_dim]: what the storage type makes of a key or a value.
  std::span<const float> stored_key(std::size_t token, std::size_t kv_head) const {
    return rows(stored_k_, k_row_, token).subspan(kv_head * geometry_.head_dim, geometry_.head_dim);
  }
  std::span<const float> stored_value(std::size_t token, std::size_t kv_head) const {
    return rows(stored_v_, v_row_, token).subspan(kv_head * geometry_.dim_of_values(), geometry_.dim_of_values());
  }

 private:
  static std::span<const float> rows(const std::vector<float>& of, std::size_t size, std::size_t token) {
    return std::span<const float>(of).subspan(token % count * size, size);
  }

  kvsparse::Geometry geometry_;
  std::size_t k_row_, v_row_, q_row_;
  std::vector<float> k_, v_, q_, stored_k_, stored_v_;
};

}  // namespace kvsparse_test
