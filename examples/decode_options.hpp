// SPDX-License-Identifier: Apache-2.0
// The command line of examples/decode.
#pragma once

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <kvsparse/core/scalar.hpp>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/policy_settings.hpp"
#include "engine/decoder.hpp"

namespace kvsparse_tools {

struct DecodeOptions {
  std::string model_directory;
  std::vector<std::string> policies;  // in the order they run; dense first when --compare is given
  bool compare = false;
  std::vector<CacheChoice> caches;    // one per policy
  CacheChoice cache;                  // what they have in common
  std::vector<std::string> settings;  // --set, as given
  std::string prompt;
  std::vector<TokenId> prompt_ids;  // used instead of `prompt` when not empty
  std::size_t max_new = 128;
  std::size_t threads = 1;  // of the attention
  std::size_t prompt_chunk = Decoder::largest_chunk;
  std::string json_file;
  std::string trace_directory;
  std::string resident_directory;
};

namespace detail {

inline std::vector<std::string> split_at_commas(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) {
    part.erase(0, part.find_first_not_of(" \t\n"));
    part.erase(part.find_last_not_of(" \t\n") + 1);
    parts.push_back(part);
  }
  return parts;
}

inline std::vector<TokenId> parse_ids(const std::string& text) {
  std::vector<TokenId> ids;
  for (const std::string& part : split_at_commas(text)) {
    const bool digits = !part.empty() && part.size() <= 9 && part.find_first_not_of("0123456789") == std::string::npos;
    if (!digits)
      throw UsageError("--prompt-ids holds " + in_quotes(part) + ", token ids separated by commas were expected");
    ids.push_back(static_cast<TokenId>(std::stoul(part)));
  }
  return ids;
}

inline std::vector<std::string> policies_to_run(const std::string& policy, const std::string& compare) {
  std::vector<std::string> policies;
  const auto add = [&](const std::string& name) {
    if (std::find(policies.begin(), policies.end(), name) == policies.end()) policies.push_back(name);
  };
  if (!compare.empty()) add("dense");  // what the others are compared with
  if (!policy.empty()) add(policy);
  for (const std::string& name : split_at_commas(compare)) add(name);
  return policies;
}

}  // namespace detail

/// Throws UsageError, kvsparse::ConfigError (unknown policy), or what CLI11 throws (--help included).
inline DecodeOptions parse_decode_options(CLI::App& app, int argc, char** argv) {
  DecodeOptions options;
  std::string policy, compare, ids, dtype = "f32";
  const CLI::Range count(std::uint64_t{1}, std::uint64_t{1} << 24);
  app.add_option("--model", options.model_directory,
                 "Hugging Face directory of a Llama or Qwen2 model (config.json, model.safetensors or its shards)")
      ->required();
  app.add_option("--policy", policy,
                 "what each layer's cache keeps: dense, streaming_llm, h2o, quest, raas, kindred, random, a+b");
  app.add_option("--compare", compare,
                 "several policies, separated by commas; dense runs first, as what they depart from");
  app.add_option("--budget", options.cache.budget_tokens,
                 "tokens a kv head may keep (quest: may read); dense needs none")
      ->check(count);
  app.add_option("--page-size", options.cache.page_size, "tokens per page [16]");
  app.add_option("--dense-layers", options.cache.dense_layers, "the first layers that keep everything [0]");
  app.add_option("--dtype", dtype, "storage of keys and values: f32, f16, bf16 or int8 [f32]")
      ->check(CLI::IsMember({"f32", "f16", "bf16", "int8"}));
  auto* text = app.add_option("--prompt", options.prompt, "text, which the model's tokenizer.json turns into tokens");
  auto* numbers = app.add_option("--prompt-ids", ids, "token ids separated by commas; needs no tokenizer");
  text->excludes(numbers);
  app.add_option("--max-new", options.max_new, "tokens to generate, unless the model ends its text before [128]")
      ->check(count);
  app.add_option("--threads", options.threads, "threads of the attention, for long contexts of large models [1]")
      ->check(CLI::Range(1, 1024));
  app.add_option("--prompt-chunk", options.prompt_chunk,
                 "prompt tokens that are read together while the policy keeps and reads all of them [64]")
      ->check(CLI::Range(std::size_t{1}, Decoder::largest_chunk));
  app.add_option("--json", options.json_file, "write the results to this file, per policy, rewritten as each one ends");
  app.add_option(
      "--record-trace", options.trace_directory,
      "write q, k, v of every token to DIR/layer_<n>.safetensors, for replay (several policies: DIR/<policy>/...)");
  app.add_option("--resident", options.resident_directory,
                 "write which tokens were resident and read at each step to DIR/layer_<n>.safetensors (several: "
                 "DIR/<policy>/...)");
  app.add_option("--set", options.settings,
                 "an option of a policy, e.g. alpha=0.02 or raas.alpha=0.02; may be repeated")
      ->allow_extra_args(false);
  app.parse(argc, argv);

  options.compare = !compare.empty();
  options.policies = detail::policies_to_run(policy, compare);
  options.prompt_ids = detail::parse_ids(ids);
  options.cache.dtype = kvsparse::scalar_type(dtype);
  if (policy.find(',') != std::string::npos) throw UsageError("--policy takes one policy, --compare takes several");
  if (options.policies.empty()) throw UsageError("--policy or --compare must name a policy");
  if (text->count() == 0 && numbers->count() == 0) throw UsageError("--prompt or --prompt-ids must be given");
  if (numbers->count() != 0 && options.prompt_ids.empty()) throw UsageError("--prompt-ids is empty");
  const bool only_dense = options.policies == std::vector<std::string>{"dense"};
  if (options.cache.budget_tokens == 0 && !only_dense) {
    throw UsageError("--budget must be given: every policy but dense needs one");
  }
  const std::vector<PolicySettings> settings = settings_per_policy(options.policies, options.settings);
  for (std::size_t i = 0; i < options.policies.size(); ++i) {
    CacheChoice cache = options.cache;
    cache.policy = options.policies[i];
    cache.settings = settings[i];
    options.caches.push_back(cache);
  }
  return options;
}

}  // namespace kvsparse_tools
