// SPDX-License-Identifier: Apache-2.0
// --dump: every decode query's output, and which positions were resident and read when it attended.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <kvsparse/cache/any_cache.hpp>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "common/policy_settings.hpp"
#include "common/safetensors.hpp"
#include "common/text_table.hpp"
#include "common/trace.hpp"

namespace kvsparse_tools {

class Dump {
 public:
  /// Throws, before any work is done, for a file that cannot be written and, unless forced, for one above 2 GiB.
  Dump(std::string file, const Trace& trace, bool force)
      : file_(std::move(file)), trace_(trace), decode_tokens_(trace.tokens - trace.prompt_tokens) {
    refuse_unwritable();
    // In double, because the product may pass 64 bits.
    const double flags = static_cast<double>(decode_tokens_ * trace.kv_heads) * static_cast<double>(trace.tokens);
    const double floats = static_cast<double>(decode_tokens_ * trace.query_heads * trace.head_dim);
    const double bytes = 2.0 * flags + 4.0 * floats;
    if (bytes > 2.0 * 1024.0 * 1024.0 * 1024.0 && !force) {
      throw UsageError("the dump would take " + fixed_text(bytes / (1024.0 * 1024.0 * 1024.0), 2) +
                       " GiB, more than 2 GiB; --force writes it nevertheless");
    }
    out_.reserve(static_cast<std::size_t>(floats));
    resident_.resize(static_cast<std::size_t>(flags));
    read_.resize(static_cast<std::size_t>(flags));
  }

  /// Call once for each decode token, in order, after its query attended.
  void add(const kvsparse::AnyCache& cache, std::span<const float> out) {
    out_.insert(out_.end(), out.begin(), out.end());
    for (std::size_t head = 0; head < trace_.kv_heads; ++head) {
      flag(resident_, cache.resident_positions(head));
      flag(read_, cache.read_positions(head));
      ++rows_;
    }
  }

  void write(const std::map<std::string, std::string>& notes) const {
    const TensorShape out_shape{decode_tokens_, trace_.query_heads, trace_.head_dim};
    const TensorShape flag_shape{decode_tokens_, trace_.kv_heads, trace_.tokens};
    write_safetensors(file_,
                      {{"out", "F32", out_shape, std::as_bytes(std::span(out_))},
                       {"resident", "U8", flag_shape, resident_},
                       {"read", "U8", flag_shape, read_}},
                      notes);
  }

 private:
  void refuse_unwritable() const {
    namespace fs = std::filesystem;
    std::error_code error;
    if (fs::is_directory(file_, error)) throw FileError(file_, "is a directory, a file was expected");
    const fs::path parent = file_.has_parent_path() ? file_.parent_path() : fs::path(".");
    if (!fs::is_directory(parent, error)) throw FileError(file_, "its directory does not exist");
    if (!is_stream(file_) && ::access(parent.c_str(), W_OK) != 0)
      throw FileError(file_, "cannot be opened for writing");
  }

  void flag(std::vector<std::byte>& table, const std::vector<kvsparse::Position>& positions) const {
    std::byte* row = table.data() + rows_ * trace_.tokens;
    for (const kvsparse::Position position : positions) row[position.value] = std::byte{1};
  }

  std::filesystem::path file_;
  const Trace& trace_;
  std::size_t decode_tokens_;
  std::size_t rows_ = 0;  // decode tokens x kv heads so far
  std::vector<float> out_;
  std::vector<std::byte> resident_;
  std::vector<std::byte> read_;
};

}  // namespace kvsparse_tools
