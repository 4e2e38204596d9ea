// SPDX-License-Identifier: Apache-2.0
// What a run will take, before the weights are read or even downloaded: config.json says how large they are, the
// caches' configuration how large those are, and a look at this machine how fast it multiplies.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <kvsparse/core/stored_row.hpp>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <ostream>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "common/text_table.hpp"
#include "engine/checkpoint.hpp"
#include "engine/config.hpp"
#include "engine/decoder.hpp"
#include "engine/model.hpp"
#include "engine/weight_list.hpp"
#include "options.hpp"

namespace kvsparse_tools {

/// Bytes that programs can still take without others being swapped out; nothing where the system does not say.
inline std::optional<std::uint64_t> available_memory() {
  std::ifstream in("/proc/meminfo");
  for (std::string line; std::getline(in, line);) {
    unsigned long long kibibytes = 0;
    if (std::sscanf(line.c_str(), "MemAvailable: %llu kB", &kibibytes) == 1) return kibibytes * 1024;
  }
  return std::nullopt;
}

/// Seconds that a processor of this machine takes for a weight, in matrices that its caches do not hold.
struct WeightTime {
  double one_token = 0.0;  // of a matrix-vector product: the time of reading it
  double chunk = 0.0;      // of a product with `chunk_tokens` columns
};

inline WeightTime measure_weight_time(std::size_t inputs, std::size_t chunk_tokens) {
  constexpr std::size_t weights = std::size_t{1} << 25;  // 128 MiB
  const std::size_t outputs = std::max<std::size_t>(weights / inputs, 1);
  const Linear matrix(outputs, inputs, std::vector<float>(outputs * inputs, 0.5F));
  const auto seconds_of = [&](std::size_t columns) {
    const Eigen::MatrixXf x =
        Eigen::MatrixXf::Constant(static_cast<Eigen::Index>(inputs), static_cast<Eigen::Index>(columns), 0.5F);
    Eigen::MatrixXf y(static_cast<Eigen::Index>(outputs), static_cast<Eigen::Index>(columns));
    double least = std::numeric_limits<double>::infinity();
    for (int round = 0; round < 3; ++round) {   // the least disturbed one
      const std::clock_t start = std::clock();  // of this process: others may be running too
      matrix.apply(x, y);
      least = std::min(least, static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC);
    }
    return least / static_cast<double>(outputs * inputs);
  };
  return {seconds_of(1), seconds_of(chunk_tokens)};
}

/// How large a model is, from its config.json and, where they are, its weights.
struct ModelEstimate {
  std::uint64_t parameters = 0;
  std::uint64_t weight_bytes = 0;       // in memory, as float32
  std::uint64_t weights_per_token = 0;  // that decoding a token multiplies with
  std::uint64_t weights_per_prompt_token = 0;
  std::optional<std::uint64_t> checkpoint_bytes;  // nothing when they are not there yet
  std::string checkpoint_dtypes;
};

/// Opens the weights if the directory has any, and checks them as loading does. Throws FileError, std::overflow_error.
inline ModelEstimate estimate_model(const ModelConfig& config, const std::filesystem::path& directory) {
  ModelEstimate estimate;
  estimate.parameters = parameter_count(config);
  estimate.weight_bytes = estimate.parameters * sizeof(float);
  const std::uint64_t embedding = std::uint64_t{config.vocab_size} * config.hidden_size;
  // An embedding is looked up; as a tied head it is multiplied with, but not for each token of a prompt.
  estimate.weights_per_token = estimate.parameters - (config.tied_embeddings ? 0 : embedding);
  estimate.weights_per_prompt_token = estimate.weights_per_token - embedding;
  if (!Checkpoint::is_in(directory)) return estimate;
  const Checkpoint checkpoint(directory);
  require_tensors(checkpoint, config);
  std::set<std::string> dtypes;
  std::uint64_t bytes = 0;
  const auto count = [&](const std::vector<WantedTensor>& tensors) {
    for (const WantedTensor& wanted : tensors) {
      const TensorInfo& tensor = checkpoint.tensor(wanted.name);
      bytes += tensor.end - tensor.begin;
      dtypes.insert(tensor.dtype);
    }
  };
  count(outer_tensors(config));
  for (std::size_t layer = 0; layer < config.layers; ++layer) count(layer_tensors(config, layer));
  estimate.checkpoint_bytes = bytes;
  for (const std::string& dtype : dtypes)
    estimate.checkpoint_dtypes += (estimate.checkpoint_dtypes.empty() ? "" : ", ") + dtype;
  return estimate;
}

/// The longest of the sequences, and how many there are.
struct SequenceLengths {
  std::size_t prompts = 1, forks = 1;
  std::size_t prompt_tokens = 0;
  std::size_t new_tokens = 0;
  std::size_t max_tokens = 0;  // that a cache which keeps everything has room for

  std::size_t sequences() const { return prompts * forks; }
  std::size_t tokens() const { return prompt_tokens + new_tokens; }
};

inline SequenceLengths lengths_of(const DecodeOptions& options, const std::vector<std::vector<TokenId>>& prompts) {
  SequenceLengths lengths;
  lengths.prompts = std::max<std::size_t>(prompts.size(), 1);
  lengths.forks = options.forks;
  for (const auto& prompt : prompts) lengths.prompt_tokens = std::max(lengths.prompt_tokens, prompt.size());
  lengths.new_tokens = options.max_new;
  lengths.max_tokens = options.max_tokens != 0 ? options.max_tokens : lengths.tokens();
  return lengths;
}

/// Of a key or a value of one head.
inline std::uint64_t stored_row_bytes(kvsparse::ScalarType dtype, std::size_t head_dim) {
  const auto bytes = [&]<class Scalar>(Scalar) { return kvsparse::stored_row_size<Scalar>(head_dim) * sizeof(Scalar); };
  switch (dtype) {
    case kvsparse::ScalarType::f32: return bytes(float{});
    case kvsparse::ScalarType::f16: return bytes(kvsparse::Half{});
    case kvsparse::ScalarType::bf16: return bytes(kvsparse::Bfloat16{});
    case kvsparse::ScalarType::int8: return bytes(kvsparse::Int8{});
  }
  return 0;
}

struct PolicyEstimate {
  std::string policy;
  std::uint64_t cache_bytes = 0;        // of all layers of all sequences; pages that forks share count for each
  std::uint64_t read_bytes_at_end = 0;  // keys and values that a sequence's last token attends to
  std::size_t tokens_in_chunks = 0;     // of a prompt: as long as every layer keeps and reads all
  double prompt_seconds = 0.0;          // of one prompt
  double token_seconds = 0.0;           // of the last token
  double seconds = 0.0;                 // of everything
};

/// Refuses what the caches of a run would refuse. Throws kvsparse::ConfigError.
inline PolicyEstimate estimate_memory(const ModelConfig& config, const CacheChoice& choice,
                                      const SequenceLengths& lengths) {
  PolicyEstimate estimate;
  estimate.policy = choice.policy;
  const std::uint64_t bytes_of_token = 2 * config.kv_heads * stored_row_bytes(choice.dtype, config.head_dim);
  const kvsparse::LayerSchedule schedule = layer_schedule(config, choice, lengths.max_tokens);
  const auto add = [&](std::size_t first, std::size_t end, std::size_t tokens_read) {
    if (first >= end) return;
    const kvsparse::LayerChoice& layer = schedule[first];
    const std::uint64_t bytes_of_layer = named_cache_bytes(layer.policy, layer.keys, layer.config, layer.options);
    estimate.cache_bytes += (end - first) * lengths.sequences() * bytes_of_layer;
    estimate.read_bytes_at_end += (end - first) * tokens_read * bytes_of_token;
  };
  const std::size_t dense_layers = std::min(choice.dense_layers, config.layers);
  add(0, dense_layers, lengths.tokens());
  const std::vector<std::size_t> budgets = choice.layer_budgets(config.layers);
  estimate.tokens_in_chunks = tokens_kept_and_read(choice, budgets);
  for (std::size_t layer = dense_layers, end = layer; layer < config.layers; layer = end) {
    while (end < config.layers && budgets[end] == budgets[layer]) ++end;
    const std::size_t kept = tokens_kept_and_read(choice, std::span(budgets).subspan(layer, 1));
    add(layer, end, std::min(lengths.tokens(), kept));
  }
  return estimate;
}

/// Multiplying and reading keys and values at the speed of memory; what else a step does is little beside it.
inline void estimate_time(PolicyEstimate& estimate, const ModelEstimate& model, const WeightTime& weight,
                          const DecodeOptions& options, const SequenceLengths& lengths) {
  const bool observed = !options.trace_directory.empty() || !options.resident_directory.empty();
  const std::size_t in_chunks = observed ? 0 : std::min(lengths.prompt_tokens, estimate.tokens_in_chunks);
  const double prompt_weights = static_cast<double>(model.weights_per_prompt_token);
  estimate.prompt_seconds =
      prompt_weights * (static_cast<double>(in_chunks) * weight.chunk / static_cast<double>(options.prompt_chunk) +
                        static_cast<double>(lengths.prompt_tokens - in_chunks) * weight.one_token);
  estimate.token_seconds = weight.one_token * (static_cast<double>(model.weights_per_token) +
                                               static_cast<double>(estimate.read_bytes_at_end) / sizeof(float));
  estimate.seconds = static_cast<double>(lengths.prompts) * estimate.prompt_seconds +
                     static_cast<double>(lengths.sequences() * lengths.new_tokens) * estimate.token_seconds;
}

/// What --estimate says.
class RunEstimate {
 public:
  /// `available`: bytes of memory, if known. Throws what estimate_model() and estimate_memory() throw.
  RunEstimate(const DecodeOptions& options, const ModelConfig& config, const SequenceLengths& lengths,
              std::optional<std::uint64_t> available = available_memory())
      : options_(options),
        config_(config),
        lengths_(lengths),
        available_(available),
        model_(estimate_model(config, options.model_directory)) {
    for (const CacheChoice& choice : options.caches) policies_.push_back(estimate_memory(config, choice, lengths));
  }

  /// Of weights and caches, under the policy that takes most: they run one after the other.
  std::uint64_t bytes() const {
    std::uint64_t most = 0;
    for (const PolicyEstimate& policy : policies_) most = std::max(most, policy.cache_bytes);
    return model_.weight_bytes + most;
  }

  /// A sentence when the memory that is left will not do. Pools and saved sequences have sizes of their own.
  std::string shortage() const {
    const bool has_own_size = options_.pool_bytes != 0 || !options_.load_file.empty();
    if (!available_ || has_own_size || bytes() <= *available_) return {};
    return "weights and caches take " + bytes_text(bytes()) + ", and " + bytes_text(*available_) +
           " of memory are available; --estimate says what takes it";
  }

  /// Multiplies for about a second, to see how fast that goes.
  void measure_time() {
    weight_ = measure_weight_time(config_.hidden_size, options_.prompt_chunk);
    for (std::size_t i = 0; i < policies_.size(); ++i) {
      estimate_time(policies_[i], model_, weight_, options_, lengths_);
    }
  }

  void print(std::ostream& out) const {
    out << "model      " << config_.model_type << ", " << model_.parameters << " parameters: " << config_.layers
        << " layers, " << config_.query_heads << " query heads over " << config_.kv_heads << " kv heads of "
        << config_.head_dim << (config_.tied_embeddings ? ", tied head" : "") << '\n'
        << "weights    " << bytes_text(model_.weight_bytes) << " in memory, as float32; ";
    if (model_.checkpoint_bytes) {
      out << bytes_text(*model_.checkpoint_bytes) << " in the directory, as " << model_.checkpoint_dtypes << '\n';
    } else {
      out << "none in the directory (" << bytes_text(model_.parameters * 2) << " to fetch, if they are of 16 bits)\n";
    }
    out << "sequences  " << lengths_.sequences() << ", of up to " << lengths_.tokens()
        << " tokens: " << lengths_.prompt_tokens << " of the prompt, " << lengths_.new_tokens << " new\n"
        << "memory     " << bytes_text(bytes()) << " for weights and caches";
    if (available_) out << "; " << bytes_text(*available_) << " are available";
    out << "\ntime       each token reads " << bytes_text(model_.weights_per_token * sizeof(float))
        << " of weights; a processor of this machine just read "
        << fixed_text(sizeof(float) / weight_.one_token / 1e9, 1) << " GB/s in a matrix-vector product\n\n";
    TextTable table({"policy", "caches", "kv read by the last token", "prompt", "a token", "all"});
    for (const PolicyEstimate& policy : policies_) {
      table.add_row({policy.policy, bytes_text(policy.cache_bytes), bytes_text(policy.read_bytes_at_end),
                     fixed_text(policy.prompt_seconds, 1) + " s", fixed_text(policy.token_seconds, 3) + " s",
                     fixed_text(policy.seconds, 0) + " s"});
    }
    table.print(out);
  }

  nlohmann::ordered_json json() const {
    nlohmann::ordered_json json{{"parameters", model_.parameters},
                                {"weight_bytes", model_.weight_bytes},
                                {"checkpoint_bytes", nullptr},
                                {"sequences", lengths_.sequences()},
                                {"prompt_tokens", lengths_.prompt_tokens},
                                {"new_tokens", lengths_.new_tokens},
                                {"bytes", bytes()},
                                {"weight_bytes_per_token", model_.weights_per_token * sizeof(float)}};
    if (model_.checkpoint_bytes) json["checkpoint_bytes"] = *model_.checkpoint_bytes;
    json["policies"] = nlohmann::ordered_json::array();
    for (const PolicyEstimate& policy : policies_) {
      json["policies"].push_back({{"policy", policy.policy},
                                  {"cache_bytes", policy.cache_bytes},
                                  {"read_bytes_at_end", policy.read_bytes_at_end},
                                  {"prompt_seconds", policy.prompt_seconds},
                                  {"token_seconds", policy.token_seconds},
                                  {"seconds", policy.seconds}});
    }
    return json;
  }

 private:
  const DecodeOptions& options_;
  const ModelConfig& config_;
  SequenceLengths lengths_;
  std::optional<std::uint64_t> available_;
  ModelEstimate model_;
  WeightTime weight_;
  std::vector<PolicyEstimate> policies_;
};

}  // namespace kvsparse_tools
