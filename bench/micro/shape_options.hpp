// SPDX-License-Identifier: Apache-2.0
// The layer's shape on a timing bench's command line and in its JSON.
#pragma once

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <string>

#include "common/option_lists.hpp"
#include "workload.hpp"

namespace kvsparse_bench {

/// --group, --kv-heads, --head-dim and --page-size; those of layer_shape unless given.
class ShapeOptions {
 public:
  void add_to(CLI::App& app) {
    app.add_option("--group", group_, "query heads per kv head [" + group_ + "]");
    app.add_option("--kv-heads", kv_heads_, "kv heads [" + kv_heads_ + "]");
    app.add_option("--head-dim", head_dim_, "values per head [" + head_dim_ + "]");
    app.add_option("--page-size", page_size_, "tokens per page, 1 to 256 [" + page_size_ + "]");
  }
  /// After the command line was parsed. Throws UsageError.
  kvsparse::Geometry shape() const {
    using kvsparse_tools::parse_count;
    kvsparse::Geometry shape = layer_shape;
    shape.kv_heads = parse_count("--kv-heads", kv_heads_, 1, 1024);
    shape.query_heads = shape.kv_heads * parse_count("--group", group_, 1, 1024);
    shape.head_dim = parse_count("--head-dim", head_dim_, 1, 4096);
    shape.page_size = parse_count("--page-size", page_size_, 1, kvsparse::max_page_size);
    return shape;
  }

 private:
  std::string group_ = std::to_string(layer_shape.group()), kv_heads_ = std::to_string(layer_shape.kv_heads);
  std::string head_dim_ = std::to_string(layer_shape.head_dim), page_size_ = std::to_string(layer_shape.page_size);
};

inline nlohmann::ordered_json shape_json(const kvsparse::Geometry& shape) {
  return {{"query_heads", shape.query_heads},
          {"kv_heads", shape.kv_heads},
          {"head_dim", shape.head_dim},
          {"page_size", shape.page_size}};
}

}  // namespace kvsparse_bench
