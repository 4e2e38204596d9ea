// SPDX-License-Identifier: Apache-2.0
// The weights of a Hugging Face model directory by name, whether they lie in one safetensors file or in shards.
#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "../common/safetensors.hpp"
#include "config.hpp"

namespace kvsparse_tools {

class Checkpoint {
 public:
  /// Opens DIR/model.safetensors, or the shards that DIR/model.safetensors.index.json lists. Throws FileError.
  explicit Checkpoint(const std::filesystem::path& directory) {
    const std::filesystem::path single = directory / "model.safetensors";
    const std::filesystem::path index = directory / "model.safetensors.index.json";
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

  /// The tensor as floats, which must have exactly this shape.
  std::vector<float> read(const std::string& name, const TensorShape& shape) const {
    const auto found = file_of_.find(name);
    if (found == file_of_.end()) fail("has no tensor " + in_quotes(name) + ", which config.json calls for");
    const SafetensorsFile& file = files_[found->second];
    const TensorShape& stored = file.tensor(name).shape;
    if (stored != shape) {
      file.fail("tensor " + in_quotes(name) + " has shape " + shape_text(stored) + ", config.json calls for " +
                shape_text(shape));
    }
    return file.read_floats(name);
  }

  [[noreturn]] void fail(const std::string& problem) const { throw FileError(described_by_, problem); }

 private:
  void open_shards(const std::filesystem::path& directory, const std::filesystem::path& index) {
    const auto json = parse_untrusted_json(read_text_file(index, std::uint64_t{1} << 26), index, 8);
    const nlohmann::json* weight_map = JsonFields(json, index).find("weight_map");
    if (weight_map == nullptr) fail("has no weight_map");
    if (!weight_map->is_object()) fail("weight_map is not a JSON object");
    std::map<std::string, std::size_t> opened;
    for (const auto& [name, shard] : weight_map->items()) {
      if (!shard.is_string()) fail("the shard of tensor " + in_quotes(name) + " is not a string");
      const auto shard_name = shard.get<std::string>();
      const std::filesystem::path plain = std::filesystem::path(shard_name).filename();
      if (plain.empty() || plain == ".." || plain == "." || plain.string() != shard_name) {
        fail("the shard " + in_quotes(shard_name) + " is not a plain file name");  // keep to the model's directory
      }
      const auto [entry, is_new] = opened.emplace(shard_name, files_.size());
      if (is_new) files_.emplace_back(directory / shard_name);
      if (!files_[entry->second].contains(name)) {
        fail("tensor " + in_quotes(name) + " is not in the shard " + in_quotes(shard_name) + " that should hold it");
      }
      file_of_.emplace(name, entry->second);
    }
  }

  std::filesystem::path described_by_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, std::size_t> file_of_;
};

}  // namespace kvsparse_tools
