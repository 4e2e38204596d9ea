// SPDX-License-Identifier: Apache-2.0
// Which tensors a model is read from, and how large they are: known from config.json alone, before anything is read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../common/safetensors.hpp"
#include "checkpoint.hpp"
#include "config.hpp"

namespace kvsparse_tools {

struct WantedTensor {
  std::string name;
  TensorShape shape;
};

namespace detail {

inline void want_linear(std::vector<WantedTensor>& tensors, const std::string& name, std::size_t outputs,
                        std::size_t inputs, bool with_bias) {
  tensors.push_back({name + ".weight", {outputs, inputs}});
  if (with_bias) tensors.push_back({name + ".bias", {outputs}});
}

inline std::optional<std::uint64_t> element_count(const std::vector<WantedTensor>& tensors) {
  std::uint64_t sum = 0;
  for (const WantedTensor& tensor : tensors) {
    std::optional<std::uint64_t> elements = 1;
    for (const std::uint64_t extent : tensor.shape) elements = elements ? checked_product(*elements, extent) : elements;
    if (!elements || *elements > UINT64_MAX - sum) return std::nullopt;
    sum += *elements;
  }
  return sum;
}

}  // namespace detail

/// Of one layer, named as Hugging Face names them.
inline std::vector<WantedTensor> layer_tensors(const ModelConfig& c, std::size_t layer) {
  const std::string prefix = "model.layers." + std::to_string(layer) + ".";
  const std::size_t query_width = c.query_heads * c.head_dim;
  const std::size_t kv_width = c.kv_heads * c.head_dim;
  std::vector<WantedTensor> tensors;
  tensors.push_back({prefix + "input_layernorm.weight", {c.hidden_size}});
  detail::want_linear(tensors, prefix + "self_attn.q_proj", query_width, c.hidden_size, c.qkv_bias);
  detail::want_linear(tensors, prefix + "self_attn.k_proj", kv_width, c.hidden_size, c.qkv_bias);
  detail::want_linear(tensors, prefix + "self_attn.v_proj", kv_width, c.hidden_size, c.qkv_bias);
  detail::want_linear(tensors, prefix + "self_attn.o_proj", c.hidden_size, query_width, c.output_bias);
  tensors.push_back({prefix + "post_attention_layernorm.weight", {c.hidden_size}});
  detail::want_linear(tensors, prefix + "mlp.gate_proj", c.intermediate_size, c.hidden_size, c.mlp_bias);
  detail::want_linear(tensors, prefix + "mlp.up_proj", c.intermediate_size, c.hidden_size, c.mlp_bias);
  detail::want_linear(tensors, prefix + "mlp.down_proj", c.hidden_size, c.intermediate_size, c.mlp_bias);
  return tensors;
}

/// Beside the layers. A tied head is the embedding.
inline std::vector<WantedTensor> outer_tensors(const ModelConfig& c) {
  std::vector<WantedTensor> tensors;
  detail::want_linear(tensors, "model.embed_tokens", c.vocab_size, c.hidden_size, false);
  tensors.push_back({"model.norm.weight", {c.hidden_size}});
  if (!c.tied_embeddings) detail::want_linear(tensors, "lm_head", c.vocab_size, c.hidden_size, false);
  return tensors;
}

/// Numbers that the model is made of. Throws std::overflow_error beyond 64 bits.
inline std::uint64_t parameter_count(const ModelConfig& config) {
  const std::optional<std::uint64_t> outer = detail::element_count(outer_tensors(config));
  const std::optional<std::uint64_t> layer = detail::element_count(layer_tensors(config, 0));
  const std::optional<std::uint64_t> layers = layer ? checked_product(*layer, config.layers) : layer;
  if (!outer || !layers || *layers > UINT64_MAX / sizeof(float) - *outer) {
    throw std::overflow_error("config.json describes a model whose size overflows 64 bits");
  }
  return *outer + *layers;
}

/// Refuses a checkpoint that lacks a tensor of the model, or has it in another shape or type, before any is read.
inline void require_tensors(const Checkpoint& checkpoint, const ModelConfig& config) {
  if (!config.tied_embeddings && !checkpoint.contains("lm_head.weight")) {
    checkpoint.fail("has no tensor 'lm_head.weight', and config.json does not set tie_word_embeddings to true");
  }
  for (const WantedTensor& tensor : outer_tensors(config)) checkpoint.require(tensor.name, tensor.shape);
  for (std::size_t layer = 0; layer < config.layers; ++layer) {
    for (const WantedTensor& tensor : layer_tensors(config, layer)) checkpoint.require(tensor.name, tensor.shape);
  }
}

}  // namespace kvsparse_tools
