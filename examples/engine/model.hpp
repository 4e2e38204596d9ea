// SPDX-License-Identifier: Apache-2.0
// The weights of a Llama-architecture decoder. A Model never changes once loaded, so any number of decoders, on any
// number of threads, can share one.
#pragma once

#include <Eigen/Core>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../common/progress.hpp"
#include "checkpoint.hpp"
#include "config.hpp"

namespace kvsparse_tools {

using Vector = Eigen::VectorXf;
using ConstVectorMap = Eigen::Map<const Eigen::VectorXf>;
/// One column per token.
using Columns = Eigen::Ref<Eigen::MatrixXf>;
using ConstColumns = Eigen::Ref<const Eigen::MatrixXf>;

/// A hash of the values' bits, which continues `hash`.
inline std::uint64_t fnv1a(const Eigen::Ref<const Vector>& values, std::uint64_t hash = 0xcbf29ce484222325) {
  for (const float value : values) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    hash = (hash ^ bits) * 0x100000001b3;
  }
  return hash;
}

/// y = W x + b. Weights are kept as float32 whatever the file holds.
class Linear {
 public:
  Linear(std::size_t outputs, std::size_t inputs, std::vector<float> weight, std::vector<float> bias = {})
      : outputs_(outputs), inputs_(inputs), weight_(std::move(weight)), bias_(std::move(bias)) {}

  /// For each column. `y` must have the right size already. Several columns are rounded otherwise than one at a time.
  void apply(const ConstColumns& x, Columns y) const {
    y.noalias() = matrix() * x;
    if (!bias_.empty()) y.colwise() += ConstVectorMap(bias_.data(), y.rows());
  }

  ConstVectorMap row(std::size_t index) const {
    return {weight_.data() + index * inputs_, static_cast<Eigen::Index>(inputs_)};
  }

 private:
  using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

  Eigen::Map<const RowMajor> matrix() const {
    return {weight_.data(), static_cast<Eigen::Index>(outputs_), static_cast<Eigen::Index>(inputs_)};
  }

  std::size_t outputs_;
  std::size_t inputs_;
  std::vector<float> weight_;  // [outputs, inputs]
  std::vector<float> bias_;    // empty: none
};

class RmsNorm {
 public:
  RmsNorm(std::vector<float> weight, float epsilon) : weight_(std::move(weight)), epsilon_(epsilon) {}

  void apply(const ConstColumns& x, Columns y) const {
    for (Eigen::Index i = 0; i < x.cols(); ++i) {
      const float mean_square = x.col(i).squaredNorm() / static_cast<float>(x.rows());
      const float scale = 1.0F / std::sqrt(mean_square + epsilon_);
      y.col(i) = (x.col(i) * scale).cwiseProduct(ConstVectorMap(weight_.data(), x.rows()));
    }
  }

 private:
  std::vector<float> weight_;
  float epsilon_;
};

struct LayerWeights {
  RmsNorm attention_norm;
  Linear query, key, value, output;
  RmsNorm mlp_norm;
  Linear gate, up, down;
};

class Model {
 public:
  /// Loads config.json and the weights of a Hugging Face model directory. Throws FileError.
  explicit Model(const std::filesystem::path& directory) : Model(load_model_config(directory), directory) {}

  const ModelConfig& config() const { return config_; }
  const std::vector<LayerWeights>& layers() const { return layers_; }
  const kvsparse::RopeRotation& rope() const { return rope_; }
  const RmsNorm& final_norm() const { return final_norm_; }
  ConstVectorMap embedding(std::size_t token) const { return embedding_.row(token); }
  const Linear& head() const { return head_ ? *head_ : embedding_; }

 private:
  Model(const ModelConfig& config, const std::filesystem::path& directory) : Model(config, Checkpoint(directory)) {}

  Model(const ModelConfig& config, const Checkpoint& checkpoint)
      : config_(config),
        rope_(config.rope, config.head_dim),
        embedding_(linear(checkpoint, "model.embed_tokens", config.vocab_size, config.hidden_size, false)),
        final_norm_(norm(checkpoint, "model.norm")) {
    if (!config.tied_embeddings) {
      if (!checkpoint.contains("lm_head.weight")) {
        checkpoint.fail("has no tensor 'lm_head.weight', and config.json does not set tie_word_embeddings to true");
      }
      head_.emplace(linear(checkpoint, "lm_head", config.vocab_size, config.hidden_size, false));
    }
    ProgressBar progress("loading", config.layers);
    layers_.reserve(std::min<std::size_t>(config.layers, 1024));  // the count comes from a stranger's file
    for (std::size_t layer = 0; layer < config.layers; ++layer) {
      layers_.push_back(load_layer(checkpoint, "model.layers." + std::to_string(layer) + "."));
      progress.update(layer + 1);
    }
  }

  LayerWeights load_layer(const Checkpoint& file, const std::string& prefix) const {
    const ModelConfig& c = config_;
    const std::size_t query_width = c.query_heads * c.head_dim;
    const std::size_t kv_width = c.kv_heads * c.head_dim;
    return {norm(file, prefix + "input_layernorm"),
            linear(file, prefix + "self_attn.q_proj", query_width, c.hidden_size, c.qkv_bias),
            linear(file, prefix + "self_attn.k_proj", kv_width, c.hidden_size, c.qkv_bias),
            linear(file, prefix + "self_attn.v_proj", kv_width, c.hidden_size, c.qkv_bias),
            linear(file, prefix + "self_attn.o_proj", c.hidden_size, query_width, c.output_bias),
            norm(file, prefix + "post_attention_layernorm"),
            linear(file, prefix + "mlp.gate_proj", c.intermediate_size, c.hidden_size, c.mlp_bias),
            linear(file, prefix + "mlp.up_proj", c.intermediate_size, c.hidden_size, c.mlp_bias),
            linear(file, prefix + "mlp.down_proj", c.hidden_size, c.intermediate_size, c.mlp_bias)};
  }

  RmsNorm norm(const Checkpoint& file, const std::string& name) const {
    return {file.read(name + ".weight", {config_.hidden_size}), config_.rms_norm_eps};
  }

  static Linear linear(const Checkpoint& file, const std::string& name, std::size_t outputs, std::size_t inputs,
                       bool with_bias) {
    std::vector<float> weight = file.read(name + ".weight", {outputs, inputs});
    std::vector<float> bias = with_bias ? file.read(name + ".bias", {outputs}) : std::vector<float>{};
    return {outputs, inputs, std::move(weight), std::move(bias)};
  }

  ModelConfig config_;
  kvsparse::RopeRotation rope_;
  Linear embedding_;
  RmsNorm final_norm_;
  std::optional<Linear> head_;  // empty: tied to the embedding
  std::vector<LayerWeights> layers_;
};

}  // namespace kvsparse_tools
