// SPDX-License-Identifier: Apache-2.0
// State as bytes, in the machine's own order: a writer that counts or writes, and a reader that never reads beyond what
// it was given.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>

#include "../config.hpp"
#include "status.hpp"

namespace kvsparse {

/// Numbers without padding: every byte of them means something.
template <class T>
concept PlainNumber = std::is_arithmetic_v<T>;

/// Takes bytes in order.
class ByteWriter {
 public:
  virtual void write(std::span<const std::byte> bytes) = 0;  ///< the next ones

  /// Its sizeof(T) bytes.
  template <PlainNumber T>
  void put(T number) {
    write(std::as_bytes(std::span<const T, 1>(&number, 1)));
  }
  /// Its length as 64 bits, then its characters.
  void put(std::string_view text) {
    put(std::uint64_t{text.size()});
    write(std::as_bytes(std::span(text.data(), text.size())));
  }

 protected:
  ~ByteWriter() = default;
};

/// How many bytes a writer would get.
class ByteCounter final : public ByteWriter {
 public:
  void write(std::span<const std::byte> bytes) override { count_ += bytes.size(); }
  std::uint64_t count() const { return count_; }  ///< so far

 private:
  std::uint64_t count_ = 0;
};

/// Hands out bytes in order. Throws SnapshotError instead of reading beyond the end.
class ByteReader {
 public:
  /// The bytes stay where they lie and outlive the reader.
  explicit ByteReader(std::span<const std::byte> bytes) : bytes_(bytes) {}

  std::size_t left() const { return bytes_.size(); }  ///< bytes not yet taken

  /// The next `count` bytes, where they lie.
  std::span<const std::byte> take(std::size_t count) {
    if (count > bytes_.size()) {
      KVSPARSE_THROW(SnapshotError("the snapshot needs " + std::to_string(count) + " more bytes where only " +
                                   std::to_string(bytes_.size()) + " are left"));
    }
    const std::span<const std::byte> taken = bytes_.first(count);
    bytes_ = bytes_.subspan(count);
    return taken;
  }
  /// As ByteWriter::put wrote it.
  template <PlainNumber T>
  T number() {
    T value{};
    std::memcpy(&value, take(sizeof value).data(), sizeof value);
    return value;
  }
  /// A size, written as 64 bits; one that this machine's sizes cannot hold is refused.
  std::size_t size() {
    const auto size = number<std::uint64_t>();
    if (size > std::numeric_limits<std::size_t>::max()) {
      KVSPARSE_THROW(SnapshotError("the snapshot counts to " + std::to_string(size) + ", this machine to " +
                                   std::to_string(std::numeric_limits<std::size_t>::max())));
    }
    return static_cast<std::size_t>(size);
  }
  /// As ByteWriter::put wrote it; the characters stay where they lie.
  std::string_view text() {
    const std::span<const std::byte> characters = take(size());
    return {reinterpret_cast<const char*>(characters.data()), characters.size()};
  }

 private:
  std::span<const std::byte> bytes_;
};

}  // namespace kvsparse
