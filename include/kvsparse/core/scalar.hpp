// SPDX-License-Identifier: Apache-2.0
// Storage types of keys and values. The only header of the library that includes Eigen.
#pragma once

#include <Eigen/Core>
#include <concepts>
#include <cstdint>
#include <string_view>

namespace kvsparse {

using Half = Eigen::half;          ///< f16: 1 sign, 5 exponent and 10 fraction bits
using Bfloat16 = Eigen::bfloat16;  ///< bf16: the upper half of a float

/// An element of a row that has a scale of its own, one for each token and kv head: element = scale * steps, steps in
/// -127 .. 127. See core/stored_row.hpp for where the scale lies.
struct Int8 {
  std::int8_t steps = 0;  ///< of the row's scale
};

/// What a cache can store keys and values in. Rows arrive as float or already in this type.
template <class T>
concept StorageScalar =
    std::same_as<T, float> || std::same_as<T, Half> || std::same_as<T, Bfloat16> || std::same_as<T, Int8>;

/// What rows may be given in to a cache of these: floats, which it converts, or its own type if that needs no scale.
template <class T, class Key, class Value = Key>
concept StorableAs = std::same_as<T, float> ||(std::same_as<T, Key>&& std::same_as<T, Value> && !std::same_as<T, Int8>);

/// The same choice at run time.
enum class ScalarType { f32, f16, bf16, int8 };

/// The names of ScalarType's values, in their order.
inline constexpr std::string_view scalar_type_names[] = {"f32", "f16", "bf16", "int8"};

/// The name of a storage type.
template <StorageScalar T>
inline constexpr std::string_view scalar_name = std::same_as<T, float>      ? "f32"
                                                : std::same_as<T, Half>     ? "f16"
                                                : std::same_as<T, Bfloat16> ? "bf16"
                                                                            : "int8";

/// The largest T that is not above x; NaN stays NaN.
template <StorageScalar T>
T at_most(float x) {
  const T nearest = static_cast<T>(x);
  if constexpr (std::same_as<T, float>) {
    return nearest;
  } else {
    if (!(static_cast<float>(nearest) > x)) return nearest;
    // The neighbour below: magnitudes are ordered like their bits, and below both zeros comes the smallest negative.
    const auto bits = Eigen::numext::bit_cast<std::uint16_t>(nearest);
    const bool zero = (bits & 0x7FFF) == 0;
    const int below = zero ? 0x8001 : bits < 0x8000 ? bits - 1 : bits + 1;
    return Eigen::numext::bit_cast<T>(static_cast<std::uint16_t>(below));
  }
}
/// The smallest T that is not below x; NaN stays NaN.
template <StorageScalar T>
T at_least(float x) {
  return -at_most<T>(-x);
}

}  // namespace kvsparse
