// SPDX-License-Identifier: Apache-2.0
// The frame of a snapshot in a stream, whatever is in it:
//
//   "KVSPARSE"  byte order (32 bits)  format (32 bits)
//   facts: length (64 bits), then name and value of each, each a length (64 bits) and characters
//   checksum of everything so far (64 bits: CRC-64/XZ)
//   state: length (64 bits), bytes
//   checksum of everything so far
//
// Numbers are in the byte order of the machine that saved; another one refuses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <istream>
#include <ostream>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "../cache/layer_check.hpp"
#include "crc64.hpp"

namespace kvsparse::detail {

inline constexpr std::string_view snapshot_magic = "KVSPARSE";
inline constexpr std::uint32_t snapshot_byte_order = 0x01020304;
inline constexpr std::uint32_t snapshot_byte_order_reversed = 0x04030201;
inline constexpr std::uint32_t snapshot_format = 1;
inline constexpr std::uint64_t longest_facts = std::uint64_t{1} << 16;

class SnapshotWriter final : public ByteWriter {
 public:
  explicit SnapshotWriter(std::ostream& out) : out_(out) {}

  void write(std::span<const std::byte> bytes) override {
    out_.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    if (!out_) refuse_snapshot("the stream failed after " + fact_text(written_) + " bytes of the snapshot");
    written_ += bytes.size();
    checksum_.add(bytes);
  }
  void put_checksum() { put(checksum_.value()); }

 private:
  std::ostream& out_;
  std::uint64_t written_ = 0;
  Crc64 checksum_;
};

class SnapshotReader {
 public:
  explicit SnapshotReader(std::istream& in) : in_(in) {}

  template <PlainNumber T>
  T number() {
    T value{};
    read(std::as_writable_bytes(std::span<T, 1>(&value, 1)));
    return value;
  }
  void read(std::span<std::byte> bytes) {
    in_.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    const auto got = static_cast<std::size_t>(in_.gcount());
    if (got != bytes.size()) {
      refuse_snapshot("the stream ends, or fails, after " + fact_text(read_ + got) + " bytes of the snapshot; " +
                      fact_text(bytes.size() - got) + " more were expected");
    }
    read_ += got;
    checksum_.add(bytes);
  }
  /// Bytes that come after their length. Memory grows with what really arrives, whatever the length claims.
  std::vector<std::byte> block(std::string_view what, std::uint64_t limit) {
    const auto size = number<std::uint64_t>();
    if (size > limit) {
      refuse_snapshot("the snapshot has " + fact_text(size) + " bytes of " + std::string(what) +
                      "; here there can be at most " + fact_text(limit));
    }
    constexpr std::uint64_t piece = std::uint64_t{1} << 20;
    std::vector<std::byte> bytes;
    while (bytes.size() < size) {
      const std::size_t before = bytes.size();
      bytes.resize(static_cast<std::size_t>(std::min(size, before + piece)));
      read(std::span(bytes).subspan(before));
    }
    return bytes;
  }
  void expect_checksum(std::string_view what) {
    const std::uint64_t computed = checksum_.value();
    if (number<std::uint64_t>() != computed) {
      refuse_snapshot("the snapshot is damaged: the checksum of its " + std::string(what) + " is wrong");
    }
  }

 private:
  std::istream& in_;
  std::uint64_t read_ = 0;
  Crc64 checksum_;
};

inline void write_header(SnapshotWriter& out, const CacheFacts& facts) {
  out.write(std::as_bytes(std::span(snapshot_magic)));
  out.put(snapshot_byte_order);
  out.put(snapshot_format);
  const auto put_facts = [&](ByteWriter& writer) {
    for (const CacheFact& fact : facts) {
      writer.put(std::string_view(fact.name));
      writer.put(std::string_view(fact.value));
    }
  };
  ByteCounter length;
  put_facts(length);
  out.put(length.count());
  put_facts(out);
  out.put_checksum();
}

/// Refuses what is no snapshot, and one of other facts.
inline void expect_header(SnapshotReader& in, const CacheFacts& facts) {
  std::string magic(snapshot_magic.size(), ' ');
  in.read(std::as_writable_bytes(std::span(magic)));
  if (magic != snapshot_magic) refuse_snapshot("this is no snapshot of kvsparse: it does not begin with KVSPARSE");
  const auto byte_order = in.number<std::uint32_t>();
  if (byte_order == snapshot_byte_order_reversed) {
    refuse_snapshot("the snapshot comes from a machine of the other byte order");
  }
  if (byte_order != snapshot_byte_order) refuse_snapshot("the snapshot is damaged: it has no byte order");
  const auto format = in.number<std::uint32_t>();
  if (format != snapshot_format) {
    refuse_snapshot("the snapshot is of format " + fact_text(format) + "; this library reads format " +
                    fact_text(snapshot_format));
  }
  const std::vector<std::byte> block = in.block("facts", longest_facts);
  in.expect_checksum("header");
  CacheFacts found;
  for (ByteReader reader(block); reader.left() > 0;) {
    CacheFact& fact = found.emplace_back();
    fact.name = reader.text();
    fact.value = reader.text();
  }
  if (const std::string sentence = difference(found, facts); !sentence.empty()) refuse_snapshot(sentence);
}

inline void write_snapshot(std::ostream& stream, const LayerImage& layer) {
  if (*layer.drafts != 0) {
    KVSPARSE_THROW(SnapshotError("a snapshot cannot hold " + fact_text(*layer.drafts) +
                                 " outstanding drafts; truncate, or accept them, first"));
  }
  SnapshotWriter out(stream);
  write_header(out, layer.facts);
  ByteCounter length;
  write_state(layer, length);
  out.put(length.count());
  write_state(layer, out);
  out.put_checksum();
}

/// The bytes of a layer's state; check_state must have the last word.
inline std::vector<std::byte> read_snapshot(std::istream& stream, const LayerImage& layer) {
  SnapshotReader in(stream);
  expect_header(in, layer.facts);
  std::vector<std::byte> state = in.block("state", largest_state(layer));
  in.expect_checksum("state");
  return state;
}

}  // namespace kvsparse::detail
