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
#include "weight_list.hpp"

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
  /// The same with a config.json that is read already.
  Model(const ModelConfig& config, const std::filesystem::path& directory) : Model(config, Checkpoint(directory)) {}

  const ModelConfig& config() const { return config_; }
  const std::vector<LayerWeights>& layers() const { return layers_; }
  const kvsparse::RopeRotation& rope() const { return rope_; }
  const RmsNorm& final_norm() const { return final_norm_; }
  ConstVectorMap embedding(std::size_t token) const { return embedding_.row(token); }
  const Linear& head() const { return head_ ? *head_ : embedding_; }

 private:
  /// Refuses a checkpoint that lacks something before it reads the first tensor, and shows how far it is.
  class WeightReader {
   public:
    WeightReader(const Checkpoint& checkpoint, const ModelConfig& config)
        : checkpoint_(checkpoint), progress_("loading", static_cast<std::size_t>(parameter_count(config))) {
      require_tensors(checkpoint, config);
    }

    std::vector<float> values(const std::string& name) {
      std::vector<float> values = checkpoint_.read(name);
      read_ += values.size();
      progress_.update(read_);
      return values;
    }

    Linear linear(const std::string& name, bool with_bias) {
      const TensorShape& shape = checkpoint_.tensor(name + ".weight").shape;
      std::vector<float> weight = values(name + ".weight");
      std::vector<float> bias = with_bias ? values(name + ".bias") : std::vector<float>{};
      return {static_cast<std::size_t>(shape[0]), static_cast<std::size_t>(shape[1]), std::move(weight),
              std::move(bias)};
    }

   private:
    const Checkpoint& checkpoint_;
    ProgressBar progress_;
    std::size_t read_ = 0;
  };

  Model(const ModelConfig& config, const Checkpoint& checkpoint) : Model(config, WeightReader(checkpoint, config)) {}

  Model(const ModelConfig& config, WeightReader&& reader)
      : config_(config),
        rope_(config.rope, config.head_dim),
        embedding_(reader.linear("model.embed_tokens", false)),
        final_norm_(norm(reader, "model.norm")) {
    if (!config.tied_embeddings) head_.emplace(reader.linear("lm_head", false));
    layers_.reserve(config.layers);
    for (std::size_t layer = 0; layer < config.layers; ++layer) {
      layers_.push_back(load_layer(reader, "model.layers." + std::to_string(layer) + "."));
    }
  }

  LayerWeights load_layer(WeightReader& reader, const std::string& prefix) const {
    const ModelConfig& c = config_;
    return {norm(reader, prefix + "input_layernorm"),
            reader.linear(prefix + "self_attn.q_proj", c.qkv_bias),
            reader.linear(prefix + "self_attn.k_proj", c.qkv_bias),
            reader.linear(prefix + "self_attn.v_proj", c.qkv_bias),
            reader.linear(prefix + "self_attn.o_proj", c.output_bias),
            norm(reader, prefix + "post_attention_layernorm"),
            reader.linear(prefix + "mlp.gate_proj", c.mlp_bias),
            reader.linear(prefix + "mlp.up_proj", c.mlp_bias),
            reader.linear(prefix + "mlp.down_proj", c.mlp_bias)};
  }

  RmsNorm norm(WeightReader& reader, const std::string& name) const {
    return {reader.values(name + ".weight"), config_.rms_norm_eps};
  }

  ModelConfig config_;
  kvsparse::RopeRotation rope_;
  Linear embedding_;
  RmsNorm final_norm_;
  std::optional<Linear> head_;  // empty: tied to the embedding
  std::vector<LayerWeights> layers_;
};

}  // namespace kvsparse_tools
