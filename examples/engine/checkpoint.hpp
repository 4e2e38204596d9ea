// SPDX-License-Identifier: Apache-2.0
// The weights of a Hugging Face model directory by name, whether they lie in one safetensors file or in shards.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "../common/safetensors.hpp"
#include "json_fields.hpp"

namespace kvsparse_tools {

class Checkpoint {
 public:
  /// Whether the directory holds weights that this class opens.
  static bool is_in(const std::filesystem::path& directory) {
    return std::filesystem::exists(directory / "model.safetensors") ||
           std::filesystem::exists(directory / "model.safetensors.index.json");
  }

  /// Opens DIR/model.safetensors, or the shards that DIR/model.safetensors.index.json lists. Throws FileError.
  explicit Checkpoint(const std::filesystem::path& directory) {
    const std::filesystem::path single = directory / "model.safetensors";
    const std::filesystem::path index = directory / "model.safetensors.index.json";
    if (!is_in(directory)) refuse_other_weights(directory);
    if (std::filesystem::exists(single) || !std::filesystem::exists(index)) {
      described_by_ = single;
      files_.emplace_back(single);
      for (const auto& entry : files_.front().tensors()) file_of_.emplace(entry.first, 0);
    } else {
      described_by_ = index;
      open_shards(directory, index);
    }
  }

  bool contains(const std::string& name) const { return file_of_.count(name) != 0; }

  /// Refuses a tensor that is not there, has another shape, or is not of floating point; reads nothing.
  void require(const std::string& name, const TensorShape& shape) const {
    if (!contains(name)) fail("has no tensor " + in_quotes(name) + ", which config.json calls for");
    const TensorInfo& stored = tensor(name);
    const std::string who = "tensor " + in_quotes(name);
    if (stored.shape != shape) {
      file_of(name).fail(who + " has shape " + shape_text(stored.shape) + ", config.json calls for " +
                         shape_text(shape));
    }
    if (stored.dtype != "F32" && stored.dtype != "F16" && stored.dtype != "BF16") {
      file_of(name).fail(who + " has dtype " + stored.dtype + "; this engine reads F32, F16 and BF16 weights");
    }
  }

  /// Of a tensor that is there.
  const TensorInfo& tensor(const std::string& name) const { return file_of(name).tensor(name); }
  std::vector<float> read(const std::string& name) const { return file_of(name).read_floats(name); }

  [[noreturn]] void fail(const std::string& problem) const { throw FileError(described_by_, problem); }

 private:
  const SafetensorsFile& file_of(const std::string& name) const { return files_[file_of_.at(name)]; }

  /// Weights in another form, or shards without their index, are named. Returns when there is nothing.
  static void refuse_other_weights(const std::filesystem::path& directory) {
    const std::set<std::string> extensions{".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ggml", ".h5", ".msgpack"};
    std::set<std::string> found;
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator(directory, error)) {
      if (extensions.count(entry.path().extension().string()) != 0) found.insert(entry.path().filename().string());
    }
    if (found.empty()) return;
    throw FileError(directory, "holds " + in_quotes(*found.begin()) +
                                   "; this engine reads model.safetensors, or the shards that a "
                                   "model.safetensors.index.json lists");
  }

  void open_shards(const std::filesystem::path& directory, const std::filesystem::path& index) {
    const auto json = parse_untrusted_json(read_text_file(index, std::uint64_t{1} << 26), index, 8);
    const nlohmann::json* weight_map = JsonFields(json, index).find("weight_map");
    if (weight_map == nullptr) fail("has no weight_map");
    if (!weight_map->is_object()) fail("weight_map is not a JSON object");
    std::set<std::string> shards;
    for (const auto& [name, shard] : weight_map->items()) {
      if (!shard.is_string()) fail("the shard of tensor " + in_quotes(name) + " is not a string");
      const auto shard_name = shard.get<std::string>();
      const std::filesystem::path plain = std::filesystem::path(shard_name).filename();
      if (plain.empty() || plain == ".." || plain == "." || plain.string() != shard_name) {
        fail("the shard " + in_quotes(shard_name) + " is not a plain file name");  // keep to the model's directory
      }
      shards.insert(shard_name);
    }
    refuse_missing_shards(directory, shards);
    std::map<std::string, std::size_t> opened;
    for (const auto& [name, shard] : weight_map->items()) {
      const auto shard_name = shard.get<std::string>();
      const auto [entry, is_new] = opened.emplace(shard_name, files_.size());
      if (is_new) files_.emplace_back(directory / shard_name);
      if (!files_[entry->second].contains(name)) {
        fail("tensor " + in_quotes(name) + " is not in the shard " + in_quotes(shard_name) + " that should hold it");
      }
      file_of_.emplace(name, entry->second);
    }
  }

  /// A download that broke off lacks several: all are counted before the first is opened.
  void refuse_missing_shards(const std::filesystem::path& directory, const std::set<std::string>& shards) const {
    const auto missing = [&](const std::string& shard) {
      std::error_code error;
      return !std::filesystem::exists(directory / shard, error);
    };
    const auto count = std::count_if(shards.begin(), shards.end(), missing);
    if (count == 0) return;
    fail("shards missing from the directory: " + std::to_string(count) + " of " + std::to_string(shards.size()) +
         ", the first is " + in_quotes(*std::find_if(shards.begin(), shards.end(), missing)));
  }

  std::filesystem::path described_by_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, std::size_t> file_of_;
};

}  // namespace kvsparse_tools
