// SPDX-License-Identifier: Apache-2.0
// Storage types of keys and values. The only header of the library that includes Eigen.
#pragma once

#include <Eigen/Core>
#include <concepts>
#include <string_view>

namespace kvsparse {

using Half = Eigen::half;
using Bfloat16 = Eigen::bfloat16;

/// What a cache can store keys and values in. Rows arrive as float or already in this type.
template <class T>
concept StorageScalar = std::same_as<T, float> || std::same_as<T, Half> || std::same_as<T, Bfloat16>;

/// What rows may be given in to a cache of Scalar: floats, which it converts, or its own type.
template <class T, class Scalar>
concept StorableAs = std::same_as<T, float> || std::same_as<T, Scalar>;

/// The same choice at run time.
enum class ScalarType { f32, f16, bf16 };

inline constexpr std::string_view scalar_type_names[] = {"f32", "f16", "bf16"};

template <StorageScalar T>
inline constexpr std::string_view scalar_name = std::same_as<T, float>  ? "f32"
                                                : std::same_as<T, Half> ? "f16"
                                                                        : "bf16";

}  // namespace kvsparse
