// SPDX-License-Identifier: Apache-2.0
// How a token's key or value of one kv head lies in memory: head_dim elements, padded with zeros to a multiple of
// row_padding, so that kernels read whole vectors; behind them, for Int8, the row's scale.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstring>
#include <limits>
#include <span>

#include "geometry.hpp"
#include "scalar.hpp"
#include "simd.hpp"

namespace kvsparse {

/// Whether each row has a scale of its own.
template <StorageScalar Scalar>
inline constexpr bool has_scale = std::same_as<Scalar, Int8>;

/// Elements from one row to the next.
template <StorageScalar Scalar>
constexpr std::size_t stored_row_size(std::size_t head_dim) {
  return round_up(head_dim, row_padding) + (has_scale<Scalar> ? row_padding : 0);
}

/// What the elements of a row are to be multiplied by.
template <StorageScalar Scalar>
KVSPARSE_INLINE float row_scale([[maybe_unused]] const Scalar* row, [[maybe_unused]] std::size_t head_dim) {
  if constexpr (has_scale<Scalar>) {
    float scale;
    std::memcpy(&scale, row + round_up(head_dim, row_padding), sizeof scale);
    return scale;
  } else {
    return 1.0F;
  }
}

namespace detail {

/// Steps of a 127th of the row's largest magnitude, rounded to the nearest, so that no element is off by more than half
/// a step. A row with a NaN or an infinity is NaN as a whole; one below 1e-35 is zero.
inline void store_steps(const float* row, std::size_t head_dim, Int8* stored) {
  constexpr float most_steps = 127.0F;
  float largest = 0.0F;
  bool finite = true;
  for (std::size_t i = 0; i < head_dim; ++i) {
    const float magnitude = std::fabs(row[i]);
    largest = magnitude > largest ? magnitude : largest;
    finite &= magnitude <= std::numeric_limits<float>::max();
  }
  const bool vanishes = !(largest > 1e-35F);
  float scale = vanishes ? 0.0F : largest / most_steps;
  const float steps_per_unit = vanishes || !finite ? 0.0F : most_steps / largest;
  if (!finite) scale = std::numeric_limits<float>::quiet_NaN();
  for (std::size_t i = 0; i < head_dim; ++i) {
    constexpr float round = 12582912.0F;  // 1.5 * 2^23: the sum has no bits left below one
    const float rounded = finite ? row[i] * steps_per_unit + round : round;
    stored[i].steps =
        static_cast<std::int8_t>(simd::bits_as<std::int32_t>(rounded) - simd::bits_as<std::int32_t>(round));
  }
  const std::size_t padded = round_up(head_dim, row_padding);
  std::fill(stored + head_dim, stored + padded + row_padding, Int8{});
  std::memcpy(static_cast<void*>(stored + padded), &scale, sizeof scale);
}

}  // namespace detail

/// Stores a row of floats, or copies a row already stored as Scalar. O(head_dim).
template <StorageScalar Scalar, StorableAs<Scalar> Element>
void store_row(const Element* row, std::size_t head_dim, Scalar* stored) {
  if constexpr (has_scale<Scalar>) {
    detail::store_steps(row, head_dim, stored);
  } else {
    std::size_t i = 0;
    if constexpr (std::same_as<Element, Scalar>) {
      for (; i < head_dim; ++i) stored[i] = row[i];
    } else {
      for (; i + simd::lanes <= head_dim; i += simd::lanes) simd::store(stored + i, simd::load(row + i));
      for (; i < head_dim; ++i) stored[i] = static_cast<Scalar>(row[i]);
    }
    for (; i < round_up(head_dim, row_padding); ++i) stored[i] = Scalar(0);
  }
}

/// Widens the first row.size() elements of a stored row of head_dim. O(row.size()).
template <StorageScalar Scalar>
void load_row(const Scalar* stored, std::size_t head_dim, std::span<float> row) {
  const float scale = row_scale(stored, head_dim);
  for (std::size_t i = 0; i < row.size(); ++i) {
    row[i] = simd::widened(stored[i]);
    if constexpr (has_scale<Scalar>) row[i] *= scale;
  }
}
/// Widens a stored row into row[head_dim].
template <StorageScalar Scalar>
void load_row(const Scalar* stored, std::span<float> row) {
  load_row(stored, row.size(), row);
}

}  // namespace kvsparse
