// SPDX-License-Identifier: Apache-2.0
// Observers that write what a decode did to files: traces that bench/replay reads, and which tokens stayed in the
// cache.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "../common/trace.hpp"
#include "decoder.hpp"

namespace kvsparse_tools {

/// Creates the directory if needed. Throws FileError.
inline void ensure_directory(const std::filesystem::path& directory) {
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  if (!std::filesystem::is_directory(directory)) throw FileError(directory, "cannot be created: " + error.message());
}

inline std::filesystem::path layer_file(const std::filesystem::path& directory, std::size_t layer) {
  return directory / ("layer_" + std::to_string(layer) + ".safetensors");
}

/// Keeps q, k and v of every token and layer.
class TraceRecorder : public LayerObserver {
 public:
  explicit TraceRecorder(const ModelConfig& config) : traces_(config.layers) {
    for (Trace& trace : traces_) {
      trace.query_heads = config.query_heads;
      trace.kv_heads = config.kv_heads;
      trace.head_dim = config.head_dim;
    }
  }

  void after_attention(const Step& step) override {
    Trace& trace = traces_[step.layer];
    ++trace.tokens;
    if (step.is_prompt) ++trace.prompt_tokens;
    trace.q.insert(trace.q.end(), step.q.begin(), step.q.end());
    trace.k.insert(trace.k.end(), step.k.begin(), step.k.end());
    trace.v.insert(trace.v.end(), step.v.begin(), step.v.end());
  }

  /// Writes DIR/layer_0.safetensors, DIR/layer_1.safetensors, ...
  void save(const std::filesystem::path& directory, std::map<std::string, std::string> notes) const {
    ensure_directory(directory);
    for (std::size_t layer = 0; layer < traces_.size(); ++layer) {
      notes["layer"] = std::to_string(layer);
      save_trace(layer_file(directory, layer), traces_[layer], notes);
    }
  }

 private:
  std::vector<Trace> traces_;
};

/// Keeps, for every answer token, layer and kv head, which positions were in the cache when its query attended, and
/// which of them it read.
class ResidencyRecorder : public LayerObserver {
 public:
  explicit ResidencyRecorder(const ModelConfig& config)
      : kv_heads_(config.kv_heads), resident_(config.layers), read_(config.layers) {}

  void after_attention(const Step& step) override {
    tokens_ = step.position + 1;
    if (step.is_prompt) {
      prompt_tokens_ = tokens_;
      return;
    }
    for (std::size_t head = 0; head < kv_heads_; ++head) {
      resident_[step.layer].push_back(flags(step.cache.resident_positions(head)));
      read_[step.layer].push_back(flags(step.cache.read_positions(head)));
    }
  }

  /// Writes `resident` and `read`, U8 [answer tokens, kv_heads, tokens], per layer: DIR/layer_0.safetensors, ...
  void save(const std::filesystem::path& directory, std::map<std::string, std::string> notes) const {
    ensure_directory(directory);
    notes["prompt_tokens"] = std::to_string(prompt_tokens_);
    const TensorShape shape{tokens_ - prompt_tokens_, kv_heads_, tokens_};
    for (std::size_t layer = 0; layer < resident_.size(); ++layer) {
      const std::vector<std::byte> resident = table(resident_[layer]);
      const std::vector<std::byte> read = table(read_[layer]);
      notes["layer"] = std::to_string(layer);
      write_safetensors(layer_file(directory, layer),
                        {{"resident", "U8", shape, resident}, {"read", "U8", shape, read}}, notes);
    }
  }

 private:
  using Flags = std::vector<std::byte>;  // one per position up to the step's own

  Flags flags(const std::vector<kvsparse::Position>& positions) const {
    Flags row(tokens_, std::byte{0});
    for (const kvsparse::Position position : positions) row[static_cast<std::size_t>(position.value)] = std::byte{1};
    return row;
  }

  std::vector<std::byte> table(const std::vector<Flags>& rows) const {
    std::vector<std::byte> bytes(rows.size() * tokens_, std::byte{0});
    for (std::size_t r = 0; r < rows.size(); ++r) {
      std::copy(rows[r].begin(), rows[r].end(), bytes.begin() + static_cast<std::ptrdiff_t>(r * tokens_));
    }
    return bytes;
  }

  std::size_t kv_heads_;
  std::size_t tokens_ = 0;
  std::size_t prompt_tokens_ = 0;
  std::vector<std::vector<Flags>> resident_;  // [layer][answer token * kv_heads + head]
  std::vector<std::vector<Flags>> read_;
};

}  // namespace kvsparse_tools
