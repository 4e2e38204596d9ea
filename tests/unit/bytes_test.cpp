// SPDX-License-Identifier: Apache-2.0
#include "kvsparse/core/bytes.hpp"

#include <gtest/gtest.h>

#include <cstddef>
#include <string>
#include <vector>

#include "kvsparse/interop/crc64.hpp"
#include "support/random_trace.hpp"

namespace kvsparse_test {
namespace {

using kvsparse::ByteCounter;
using kvsparse::ByteReader;
using kvsparse::Crc64;
using kvsparse::SnapshotError;

class ByteList final : public kvsparse::ByteWriter {
 public:
  void write(std::span<const std::byte> more) override { bytes.insert(bytes.end(), more.begin(), more.end()); }
  std::vector<std::byte> bytes;
};

void put_some(kvsparse::ByteWriter& out) {
  out.put(std::uint8_t{7});
  out.put(std::int64_t{-2});
  out.put(std::string_view("a page"));
  out.put(0.5);
}

TEST(Bytes, AreReadAsTheyWereWritten) {
  ByteList list;
  put_some(list);
  ByteReader in(list.bytes);
  EXPECT_EQ(in.number<std::uint8_t>(), 7);
  EXPECT_EQ(in.number<std::int64_t>(), -2);
  EXPECT_EQ(in.text(), "a page");
  EXPECT_EQ(in.number<double>(), 0.5);
  EXPECT_EQ(in.left(), 0U);

  ByteCounter count;
  put_some(count);
  EXPECT_EQ(count.count(), list.bytes.size());
}

TEST(Bytes, NothingIsReadBeyondTheEnd) {
  const std::vector<std::byte> bytes(7);
  EXPECT_THROW(ByteReader(bytes).number<std::uint64_t>(), SnapshotError);
  EXPECT_THROW(ByteReader(bytes).take(8), SnapshotError);
  EXPECT_THROW(ByteReader({}).number<std::uint8_t>(), SnapshotError);
  ByteReader in(bytes);
  EXPECT_EQ(in.take(7).size(), 7U);
  EXPECT_EQ(in.take(0).size(), 0U);

  ByteList lying;  // a text that claims more characters than there are, and more than any memory holds
  lying.put(~std::uint64_t{0});
  lying.put(std::uint8_t{'a'});
  EXPECT_THROW(ByteReader(lying.bytes).text(), SnapshotError);
}

/// Straight from the definition: one bit after the other.
std::uint64_t slow_crc64(std::span<const std::byte> bytes) {
  std::uint64_t remainder = ~std::uint64_t{0};
  for (const std::byte byte : bytes) {
    for (int bit = 0; bit < 8; ++bit) {
      const bool differs = ((remainder ^ std::to_integer<std::uint64_t>(byte) >> bit) & 1) != 0;
      remainder >>= 1;
      if (differs) remainder ^= 0xC96C5795D7870F42;
    }
  }
  return ~remainder;
}

std::uint64_t crc64(std::span<const std::byte> bytes) {
  Crc64 checksum;
  checksum.add(bytes);
  return checksum.value();
}

TEST(Crc64, IsTheOneOfTheCatalogue) {
  EXPECT_EQ(crc64(std::as_bytes(std::span(std::string_view("123456789")))), 0x995DC9BBDF1939FA);
  EXPECT_EQ(crc64({}), 0U);
}

TEST(Crc64, DoesNotDependOnThePiecesThatBytesComeIn) {
  TestRng rng(1);
  for (std::size_t size = 0; size < 100; ++size) {
    std::vector<std::byte> bytes(size);
    for (std::byte& byte : bytes) byte = static_cast<std::byte>(rng.next());
    Crc64 checksum;
    for (std::size_t at = 0; at < size;) {
      const std::size_t piece = std::min(size - at, static_cast<std::size_t>(rng.below(20)));
      checksum.add(std::span(bytes).subspan(at, piece));
      at += piece;
    }
    EXPECT_EQ(checksum.value(), slow_crc64(bytes)) << size;
    EXPECT_EQ(crc64(bytes), slow_crc64(bytes)) << size;
  }
}

}  // namespace
}  // namespace kvsparse_test
