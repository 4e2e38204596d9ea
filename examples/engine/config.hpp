// SPDX-License-Identifier: Apache-2.0
// config.json and generation_config.json of a Hugging Face model directory: Llama and Qwen2. What the engine does not
// implement is refused here, with a sentence, because a model that decodes nonsense is worse than one that does not
// load.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <kvsparse/core/rope.hpp>
#include <string>
#include <vector>

#include "../common/file_error.hpp"
#include "../common/untrusted_json.hpp"
#include "json_fields.hpp"

namespace kvsparse_tools {

struct ModelConfig {
  std::string model_type;
  std::size_t vocab_size = 0;
  std::size_t hidden_size = 0;
  std::size_t intermediate_size = 0;
  std::size_t layers = 0;
  std::size_t query_heads = 0;
  std::size_t kv_heads = 0;
  std::size_t head_dim = 0;
  std::size_t max_positions = 0;  // 0: the file does not say
  kvsparse::Rope rope = {.theta = 10000.0};
  float rms_norm_eps = 1e-6F;
  bool tied_embeddings = false;
  bool qkv_bias = false;
  bool output_bias = false;
  bool mlp_bias = false;
  std::vector<std::uint64_t> eos_tokens;  // empty: only the token limit ends a sequence
};

namespace detail {

inline void read_rope(const JsonFields& fields, const nlohmann::json& json, const std::filesystem::path& file,
                      ModelConfig& config) {
  // transformers 5 moved rope_theta and rope_scaling into one object, rope_parameters.
  const std::string key = fields.find("rope_parameters") != nullptr ? "rope_parameters" : "rope_scaling";
  config.rope.theta = fields.positive_number("rope_theta").value_or(config.rope.theta);
  if (fields.find(key) == nullptr) return;
  const JsonFields rope(json.at(key), file, key);
  config.rope.theta = rope.positive_number("rope_theta").value_or(config.rope.theta);
  const std::string type = rope.text("rope_type", rope.text("type", "default"));
  if (rope.positive_number("partial_rotary_factor").value_or(1.0) != 1.0)
    rope.fail("asks for partial rotation, which this engine does not have");
  if (type == "default") return;
  if (type != "llama3") rope.fail("is of type " + in_quotes(type) + "; this engine has 'default' and 'llama3'");
  config.rope.scaling = kvsparse::RopeScaling::llama3;
  config.rope.factor = rope.required_number("factor");
  config.rope.low_freq_factor = rope.required_number("low_freq_factor");
  config.rope.high_freq_factor = rope.required_number("high_freq_factor");
  config.rope.original_positions = rope.required_number("original_max_position_embeddings");
  if (config.rope.high_freq_factor <= config.rope.low_freq_factor)
    rope.fail("has a high_freq_factor not above its low_freq_factor");
}

inline std::vector<std::uint64_t> read_eos_tokens(const JsonFields& fields) {
  const nlohmann::json* value = fields.find("eos_token_id");
  if (value == nullptr) return {};
  std::vector<std::uint64_t> tokens;
  const nlohmann::json list = value->is_array() ? *value : nlohmann::json::array({*value});
  for (const nlohmann::json& token : list) {
    if (!token.is_number_unsigned()) fields.refuse("eos_token_id", *value, "a token id or a list of them was expected");
    tokens.push_back(token.get<std::uint64_t>());
  }
  return tokens;
}

inline void refuse_quantised(const JsonFields& fields) {
  for (const char* key : {"quantization_config", "quantization"}) {
    const nlohmann::json* quantised = fields.find(key);
    if (quantised == nullptr) continue;
    const auto method = quantised->is_object() ? quantised->find("quant_method") : quantised->end();
    fields.fail(
        std::string(key) + " is " +
        in_quotes(method != quantised->end() && method->is_string() ? method->get<std::string>() : quantised->dump()) +
        "; this engine reads unquantised f32, f16 and bf16 weights");
  }
}

/// Qwen2 files name a sliding_window even when use_sliding_window is false.
inline void refuse_sliding_windows(const JsonFields& fields, const std::string& model_type) {
  const nlohmann::json* window = fields.find("sliding_window");
  const bool slides = model_type == "qwen2" ? fields.flag("use_sliding_window", false) : window != nullptr;
  if (slides) {
    fields.fail("uses sliding-window attention (" +
                std::string(model_type == "qwen2" ? "use_sliding_window true, " : "") + "sliding_window " +
                in_quotes(window == nullptr ? "absent" : window->dump()) +
                "); every layer of this engine attends to the whole text");
  }
  for (const nlohmann::json& type : fields.array("layer_types")) {
    if (type != "full_attention") fields.refuse("layer_types", type, "every layer of this engine is 'full_attention'");
  }
}

inline void refuse_unsupported(const JsonFields& fields, const std::string& model_type) {
  if (model_type != "llama" && model_type != "qwen2") {
    fields.fail((model_type.empty() ? "has no model_type" : "model_type is " + in_quotes(model_type)) +
                "; this engine reads 'llama' and 'qwen2'");
  }
  if (const auto act = fields.text("hidden_act", "silu"); act != "silu" && act != "swish") {
    fields.fail("hidden_act is " + in_quotes(act) + "; this engine has 'silu'");
  }
  for (const char* key : {"num_experts", "num_local_experts", "n_routed_experts"}) {
    if (const nlohmann::json* experts = fields.find(key)) {
      fields.refuse(key, *experts, "this engine reads models without experts");
    }
  }
  if (fields.flag("use_mrope", false)) fields.fail("use_mrope is true; this engine rotates by one position per token");
  if (const double factor = fields.positive_number("partial_rotary_factor").value_or(1.0); factor != 1.0) {
    fields.fail("partial_rotary_factor is " + std::to_string(factor) + "; this engine rotates whole heads");
  }
  refuse_quantised(fields);
  refuse_sliding_windows(fields, model_type);
}

/// generation_config.json, where it is there and says so, rules over config.json: chat models end a turn with one token
/// and a text with another, and list both there.
inline std::vector<std::uint64_t> read_all_eos_tokens(const JsonFields& config,
                                                      const std::filesystem::path& directory) {
  const std::filesystem::path file = directory / "generation_config.json";
  if (std::filesystem::exists(file)) {
    const nlohmann::json json = parse_untrusted_json(read_text_file(file, std::uint64_t{1} << 24), file, 32);
    const JsonFields fields(json, file);
    if (fields.find("eos_token_id") != nullptr) return read_eos_tokens(fields);
  }
  return read_eos_tokens(config);
}

}  // namespace detail

/// Reads and checks DIR/config.json, and DIR/generation_config.json if there is one. Throws FileError.
inline ModelConfig load_model_config(const std::filesystem::path& directory) {
  const std::filesystem::path file = directory / "config.json";
  const nlohmann::json json = parse_untrusted_json(read_text_file(file, std::uint64_t{1} << 24), file, 32);
  const JsonFields fields(json, file);
  ModelConfig config;
  config.model_type = fields.text("model_type", "");
  detail::refuse_unsupported(fields, config.model_type);
  config.vocab_size = fields.required_size("vocab_size");
  config.hidden_size = fields.required_size("hidden_size");
  config.intermediate_size = fields.required_size("intermediate_size");
  config.layers = fields.required_size("num_hidden_layers");
  constexpr std::size_t most_layers = 1 << 16;  // far beyond any model; each takes memory before weights are looked for
  if (config.layers > most_layers) {
    fields.fail("num_hidden_layers " + std::to_string(config.layers) + " exceeds " + std::to_string(most_layers));
  }
  config.query_heads = fields.required_size("num_attention_heads");
  config.kv_heads = fields.size("num_key_value_heads").value_or(config.query_heads);
  if (config.query_heads % config.kv_heads != 0) {
    fields.fail("num_attention_heads " + std::to_string(config.query_heads) +
                " is not a multiple of num_key_value_heads " + std::to_string(config.kv_heads));
  }
  const auto head_dim = fields.size("head_dim");
  if (!head_dim && config.hidden_size % config.query_heads != 0) {
    fields.fail("has no head_dim, and hidden_size " + std::to_string(config.hidden_size) +
                " is not a multiple of num_attention_heads " + std::to_string(config.query_heads));
  }
  config.head_dim = head_dim.value_or(config.hidden_size / config.query_heads);
  if (config.head_dim % 2 != 0) {
    fields.fail("head_dim is " + std::to_string(config.head_dim) + ", RoPE needs an even one");
  }
  config.max_positions = fields.size("max_position_embeddings").value_or(0);
  detail::read_rope(fields, json, file, config);
  if (const std::string problem = config.rope.problem(config.head_dim); !problem.empty()) fields.fail(problem);
  const double rms_norm_eps = fields.positive_number("rms_norm_eps").value_or(1e-6);
  if (rms_norm_eps > 1.0) fields.fail("rms_norm_eps is " + std::to_string(rms_norm_eps) + ", the limit is 1");
  config.rms_norm_eps = static_cast<float>(rms_norm_eps);
  config.tied_embeddings = fields.flag("tie_word_embeddings", false);
  const bool attention_bias = config.model_type == "llama" && fields.flag("attention_bias", false);
  config.qkv_bias = config.model_type == "qwen2" || attention_bias;
  config.output_bias = attention_bias;
  config.mlp_bias = config.model_type == "llama" && fields.flag("mlp_bias", false);
  config.eos_tokens = detail::read_all_eos_tokens(fields, directory);
  return config;
}

}  // namespace kvsparse_tools
