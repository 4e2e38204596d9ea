// SPDX-License-Identifier: Apache-2.0
// safetensors files: an 8-byte little-endian header length, a JSON header, then the tensors' bytes without holes.
//
// Whatever the file claims is checked before it is used: these files come from strangers.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "file_error.hpp"
#include "output_file.hpp"
#include "untrusted_json.hpp"

namespace kvsparse_tools {

static_assert(std::endian::native == std::endian::little, "safetensors files are little-endian and are read in place");

/// Every element type the format knows. We can only convert F32, F16, BF16 and U8, but a checkpoint may hold others
/// beside the tensors we want.
struct DtypeName {
  std::string_view name;
  std::uint64_t bytes;
};
inline constexpr std::array<DtypeName, 15> known_dtypes{{{"F32", 4},
                                                         {"F16", 2},
                                                         {"BF16", 2},
                                                         {"U8", 1},
                                                         {"BOOL", 1},
                                                         {"I8", 1},
                                                         {"F8_E4M3", 1},
                                                         {"F8_E5M2", 1},
                                                         {"I16", 2},
                                                         {"U16", 2},
                                                         {"I32", 4},
                                                         {"U32", 4},
                                                         {"F64", 8},
                                                         {"I64", 8},
                                                         {"U64", 8}}};

inline std::optional<std::uint64_t> dtype_bytes(std::string_view dtype) {
  for (const DtypeName& known : known_dtypes) {
    if (known.name == dtype) return known.bytes;
  }
  return std::nullopt;
}

using TensorShape = std::vector<std::uint64_t>;

/// At most the first eight extents: the file says how many there are.
inline std::string shape_text(const TensorShape& shape) {
  constexpr std::size_t most = 8;
  std::string text = "[";
  for (std::size_t i = 0; i < std::min(shape.size(), most); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + (shape.size() > most ? ", ...]" : "]");
}

/// a * b, or nothing when it does not fit in 64 bits.
inline std::optional<std::uint64_t> checked_product(std::uint64_t a, std::uint64_t b) {
  if (a != 0 && b > std::numeric_limits<std::uint64_t>::max() / a) return std::nullopt;
  return a * b;
}

struct TensorInfo {
  std::string dtype;
  TensorShape shape;
  std::uint64_t elements = 0;
  std::uint64_t begin = 0;  // byte range, counted from the end of the header
  std::uint64_t end = 0;
};

inline float float_from_bf16(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

inline float float_from_f16(std::uint16_t bits) {
  const std::uint32_t magnitude = static_cast<std::uint32_t>(bits & 0x7fffU) << 13;  // exponent still has f16's bias
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000U) << 16;
  const float rebiased = std::bit_cast<float>(magnitude) * 0x1p112F;  // exact, subnormals included
  const bool infinite_or_nan = magnitude >= 0x0f800000U;
  const auto value = infinite_or_nan ? magnitude | 0x7f800000U : std::bit_cast<std::uint32_t>(rebiased);
  return std::bit_cast<float>(value | sign);
}

/// An opened safetensors file: its header, checked, and access to its tensors. Reading is const and thread-safe.
class SafetensorsFile {
 public:
  /// The reference implementation allows 100 MB; real headers are below 5 MB, and JSON multiplies in memory.
  static constexpr std::uint64_t max_header_bytes = std::uint64_t{16} << 20;

  explicit SafetensorsFile(std::filesystem::path path) : path_(std::move(path)) {
    const std::uint64_t size = regular_file_size(path_);
    if (size < 8) fail(std::to_string(size) + " bytes are too few, a safetensors file has at least 8");
    std::ifstream in(path_, std::ios::binary);
    std::array<char, 32> beginning{};
    in.read(beginning.data(), static_cast<std::streamsize>(std::min<std::uint64_t>(size, beginning.size())));
    refuse_git_lfs_pointer(path_, {beginning.data(), beginning.size()});
    in.seekg(0);
    std::array<char, 8> length_bytes{};
    if (!in.read(length_bytes.data(), 8)) fail("cannot be read");
    const auto header_bytes = std::bit_cast<std::uint64_t>(length_bytes);
    if (header_bytes > size - 8) {
      fail("header length " + std::to_string(header_bytes) + " exceeds the " + std::to_string(size - 8) +
           " bytes that follow it");
    }
    if (header_bytes > max_header_bytes) {
      fail("header length " + std::to_string(header_bytes) + " exceeds the limit of " +
           std::to_string(max_header_bytes) + " bytes");
    }
    data_begin_ = 8 + header_bytes;
    data_bytes_ = size - data_begin_;
    std::string header(static_cast<std::size_t>(header_bytes), '\0');
    if (!in.read(header.data(), static_cast<std::streamsize>(header_bytes))) fail("its header cannot be read");
    read_header(parse_untrusted_json(header, path_, /*max_depth=*/4));
    check_layout();
  }

  const std::filesystem::path& path() const { return path_; }
  const std::map<std::string, TensorInfo>& tensors() const { return tensors_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  bool contains(const std::string& name) const { return tensors_.count(name) != 0; }

  const TensorInfo& tensor(const std::string& name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) fail("has no tensor " + in_quotes(name));
    return found->second;
  }

  /// The tensor's raw bytes.
  std::vector<std::byte> read_bytes(const std::string& name) const {
    const TensorInfo& info = tensor(name);
    std::vector<std::byte> bytes(static_cast<std::size_t>(info.end - info.begin));
    read_at(info.begin, bytes.data(), bytes.size());
    return bytes;
  }

  /// The tensor's elements as floats; F32, F16, BF16 and U8 only.
  std::vector<float> read_floats(const std::string& name) const {
    const TensorInfo& info = tensor(name);
    const auto count = static_cast<std::size_t>(info.elements);
    if (info.dtype == "F32") {
      std::vector<float> values(count);
      read_at(info.begin, values.data(), count * sizeof(float));
      return values;
    }
    if (info.dtype == "F16") return convert<std::uint16_t>(info, float_from_f16);
    if (info.dtype == "BF16") return convert<std::uint16_t>(info, float_from_bf16);
    if (info.dtype == "U8") return convert<std::uint8_t>(info, [](std::uint8_t v) { return static_cast<float>(v); });
    fail("tensor " + in_quotes(name) + " has dtype " + info.dtype + "; only F32, F16, BF16 and U8 can be read");
  }

  [[noreturn]] void fail(const std::string& problem) const { throw FileError(path_, problem); }

 private:
  void read_header(const nlohmann::json& header) {
    if (!header.is_object()) fail("its header is not a JSON object");
    for (const auto& [name, entry] : header.items()) {
      if (name == "__metadata__") {
        read_metadata(entry);
      } else {
        tensors_.emplace(name, read_entry(name, entry));
      }
    }
  }

  void read_metadata(const nlohmann::json& entry) {
    if (!entry.is_object()) fail("__metadata__ is not a JSON object");
    for (const auto& [key, value] : entry.items()) {
      if (!value.is_string()) fail("__metadata__ entry " + in_quotes(key) + " is not a string");
      metadata_.emplace(key, value.get<std::string>());
    }
  }

  TensorInfo read_entry(const std::string& name, const nlohmann::json& entry) const {
    const std::string who = "tensor " + in_quotes(name);
    if (!entry.is_object()) fail(who + " is not described by a JSON object");
    const auto field = [&](const char* key) -> const nlohmann::json& {
      const auto found = entry.find(key);
      if (found == entry.end()) fail(who + " has no " + std::string(key));
      return *found;
    };
    TensorInfo info;
    const auto& dtype = field("dtype");
    if (!dtype.is_string()) fail("the dtype of " + who + " is not a string");
    info.dtype = dtype.get<std::string>();
    const auto element_bytes = dtype_bytes(info.dtype);
    if (!element_bytes) fail(who + " has the unknown dtype " + in_quotes(info.dtype));
    info.shape = unsigned_list(field("shape"), "the shape of " + who);
    const TensorShape offsets = unsigned_list(field("data_offsets"), "data_offsets of " + who);
    if (offsets.size() != 2)
      fail("data_offsets of " + who + " holds " + std::to_string(offsets.size()) + " numbers, not 2");
    info.begin = offsets[0];
    info.end = offsets[1];
    if (info.end < info.begin || info.end > data_bytes_) {
      fail("data_offsets " + shape_text(offsets) + " of " + who + " do not lie within the file's " +
           std::to_string(data_bytes_) + " bytes of data");
    }
    std::optional<std::uint64_t> elements = 1;
    for (const std::uint64_t extent : info.shape) elements = elements ? checked_product(*elements, extent) : elements;
    const auto bytes = elements ? checked_product(*elements, *element_bytes) : elements;
    if (!bytes) fail("the shape " + shape_text(info.shape) + " of " + who + " overflows 64 bits");
    if (*bytes != info.end - info.begin) {
      fail(who + " of dtype " + info.dtype + " and shape " + shape_text(info.shape) + " needs " +
           std::to_string(*bytes) + " bytes, data_offsets give " + std::to_string(info.end - info.begin));
    }
    info.elements = *elements;
    return info;
  }

  TensorShape unsigned_list(const nlohmann::json& list, const std::string& what) const {
    if (!list.is_array()) fail(what + " is not an array");
    TensorShape values;
    for (const auto& value : list) {
      if (!value.is_number_unsigned())
        fail(what + " holds " + in_quotes(value.dump()) + ", not a non-negative integer");
      values.push_back(value.get<std::uint64_t>());
    }
    return values;
  }

  /// The format forbids overlaps and holes: each tensor begins where the one before it ends, the last at the file's
  /// end.
  void check_layout() const {
    std::vector<std::pair<std::string, const TensorInfo*>> in_file_order;
    for (const auto& [name, info] : tensors_) in_file_order.emplace_back(name, &info);
    std::sort(in_file_order.begin(), in_file_order.end(), [](const auto& a, const auto& b) {
      return std::pair(a.second->begin, a.second->end) < std::pair(b.second->begin, b.second->end);
    });
    std::uint64_t expected = 0;
    for (const auto& [name, info] : in_file_order) {
      if (info->begin != expected) {
        fail("tensor " + in_quotes(name) + " begins at byte " + std::to_string(info->begin) +
             (info->begin < expected ? ", inside the tensor before it, which ends at "
                                     : ", leaving a hole after the tensor before it, which ends at ") +
             std::to_string(expected));
      }
      expected = info->end;
    }
    if (expected != data_bytes_) {
      fail(std::to_string(data_bytes_ - expected) + " bytes at its end belong to no tensor");
    }
  }

  void read_at(std::uint64_t offset, void* into, std::size_t bytes) const {
    if (bytes == 0) return;
    std::ifstream in(path_, std::ios::binary);
    in.seekg(static_cast<std::streamoff>(data_begin_ + offset));
    if (!in.read(static_cast<char*>(into), static_cast<std::streamsize>(bytes))) fail("cannot be read to its end");
  }

  template <typename Stored, typename Conversion>
  std::vector<float> convert(const TensorInfo& info, Conversion conversion) const {
    constexpr std::size_t block = 1 << 16;  // a checkpoint's tensor can be large: do not hold it twice
    std::vector<float> values(static_cast<std::size_t>(info.elements));
    std::vector<Stored> stored(std::min(block, values.size()));
    for (std::size_t first = 0; first < values.size(); first += block) {
      const std::size_t count = std::min(block, values.size() - first);
      read_at(info.begin + first * sizeof(Stored), stored.data(), count * sizeof(Stored));
      std::transform(stored.data(), stored.data() + count, values.data() + first, conversion);
    }
    return values;
  }

  std::filesystem::path path_;
  std::uint64_t data_begin_ = 0;
  std::uint64_t data_bytes_ = 0;
  std::map<std::string, TensorInfo> tensors_;
  std::map<std::string, std::string> metadata_;
};

/// A tensor to be written; the bytes stay the caller's.
struct TensorToWrite {
  std::string name;
  std::string dtype;
  TensorShape shape;
  std::span<const std::byte> bytes;
};

/// Writes the file whole or not at all. A wrong dtype or size is a mistake of the program, not of a user.
inline void write_safetensors(const std::filesystem::path& path, std::vector<TensorToWrite> tensors,
                              const std::map<std::string, std::string>& metadata = {}) {
  // Widest elements first keeps every tensor aligned for readers that map the file.
  std::stable_sort(tensors.begin(), tensors.end(), [](const TensorToWrite& a, const TensorToWrite& b) {
    return dtype_bytes(a.dtype).value_or(0) > dtype_bytes(b.dtype).value_or(0);
  });
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  std::uint64_t offset = 0;
  for (const TensorToWrite& tensor : tensors) {
    std::uint64_t bytes = dtype_bytes(tensor.dtype).value_or(0);
    for (const std::uint64_t extent : tensor.shape) bytes *= extent;
    if (bytes != tensor.bytes.size())
      throw std::logic_error("tensor " + tensor.name + " has not the size of its shape");
    header[tensor.name] = {
        {"dtype", tensor.dtype}, {"shape", tensor.shape}, {"data_offsets", {offset, offset + bytes}}};
    offset += bytes;
  }
  std::string text = header.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
  text.append((8 - text.size() % 8) % 8, ' ');
  write_file(path, [&](std::ostream& out) {
    const std::uint64_t length = text.size();
    std::array<char, 8> length_bytes{};
    std::memcpy(length_bytes.data(), &length, 8);
    out.write(length_bytes.data(), 8);
    out.write(text.data(), static_cast<std::streamsize>(text.size()));
    for (const TensorToWrite& tensor : tensors) {
      out.write(reinterpret_cast<const char*>(tensor.bytes.data()), static_cast<std::streamsize>(tensor.bytes.size()));
    }
  });
}

}  // namespace kvsparse_tools
