// SPDX-License-Identifier: Apache-2.0
// Sizes of arrays that follow from what a user configured: their products may be larger than any number of bytes.
#pragma once

#include <concepts>
#include <cstddef>
#include <limits>

namespace kvsparse {

/// A number of elements or bytes. Sums and products that do not fit are the largest std::size_t, which nothing can
/// allocate, where plain ones would wrap to a small one.
class SaturatingSize {
 public:
  constexpr SaturatingSize(std::size_t value = 0) : value_(value) {}  ///< exact
  constexpr operator std::size_t() const { return value_; }           ///< exact, or the largest

  /// What no sum or product exceeds.
  static constexpr std::size_t largest = std::numeric_limits<std::size_t>::max();

 private:
  std::size_t value_;
};

/// Exact, or SaturatingSize::largest. At least one operand is a SaturatingSize, the other a size.
template <std::convertible_to<std::size_t> A, std::convertible_to<std::size_t> B>
requires std::same_as<A, SaturatingSize> || std::same_as<B, SaturatingSize>
constexpr SaturatingSize operator+(A a, B b) {
  const auto x = static_cast<std::size_t>(a), y = static_cast<std::size_t>(b);
  return x > SaturatingSize::largest - y ? SaturatingSize::largest : x + y;
}
/// As the sum.
template <std::convertible_to<std::size_t> A, std::convertible_to<std::size_t> B>
requires std::same_as<A, SaturatingSize> || std::same_as<B, SaturatingSize>
constexpr SaturatingSize operator*(A a, B b) {
  const auto x = static_cast<std::size_t>(a), y = static_cast<std::size_t>(b);
  return y != 0 && x > SaturatingSize::largest / y ? SaturatingSize::largest : x * y;
}

/// No more bytes can be addressed in one piece.
inline constexpr std::size_t most_bytes = static_cast<std::size_t>(std::numeric_limits<std::ptrdiff_t>::max());
inline constexpr const char* most_bytes_text = sizeof(std::size_t) > 4 ? "2^63 - 1" : "2^31 - 1";  ///< for a sentence

}  // namespace kvsparse
