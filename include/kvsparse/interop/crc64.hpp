// SPDX-License-Identifier: Apache-2.0
// CRC-64/XZ (ECMA-182's polynomial, reflected): finds every error of up to 64 bits in a row, and all others but one in
// 2^64. Eight bytes at a time.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace kvsparse {

namespace detail {

/// [k][byte]: what the byte adds to the remainder when k bytes follow it.
constexpr std::array<std::array<std::uint64_t, 256>, 8> make_crc64_tables() {
  constexpr std::uint64_t polynomial = 0xC96C5795D7870F42;
  std::array<std::array<std::uint64_t, 256>, 8> tables{};
  for (std::size_t byte = 0; byte < 256; ++byte) {
    std::uint64_t remainder = byte;
    for (int bit = 0; bit < 8; ++bit) remainder = remainder >> 1 ^ ((remainder & 1) != 0 ? polynomial : 0);
    tables[0][byte] = remainder;
  }
  for (std::size_t k = 1; k < 8; ++k) {
    for (std::size_t byte = 0; byte < 256; ++byte) {
      const std::uint64_t before = tables[k - 1][byte];
      tables[k][byte] = before >> 8 ^ tables[0][static_cast<std::size_t>(before & 0xFF)];
    }
  }
  return tables;
}
inline constexpr std::array<std::array<std::uint64_t, 256>, 8> crc64_tables = make_crc64_tables();

}  // namespace detail

/// The checksum of bytes that come in any number of pieces.
class Crc64 {
 public:
  /// The next bytes. O(bytes).
  void add(std::span<const std::byte> bytes) {
    const auto& tables = detail::crc64_tables;
    std::size_t i = 0;
    if constexpr (std::endian::native == std::endian::little) {
      for (; i + 8 <= bytes.size(); i += 8) {
        std::uint64_t word;
        std::memcpy(&word, bytes.data() + i, sizeof word);
        word ^= remainder_;
        remainder_ = 0;
        for (std::size_t k = 0; k < 8; ++k) remainder_ ^= tables[7 - k][word >> (8 * k) & 0xFF];
      }
    }
    for (; i < bytes.size(); ++i) {
      remainder_ = remainder_ >> 8 ^ tables[0][(remainder_ ^ std::to_integer<std::uint64_t>(bytes[i])) & 0xFF];
    }
  }
  std::uint64_t value() const { return ~remainder_; }  ///< of all bytes so far

 private:
  std::uint64_t remainder_ = ~std::uint64_t{0};
};

}  // namespace kvsparse
