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

#include "common/option_lists.hpp"
#include "common/policy_settings.hpp"
#include "engine/decoder.hpp"

namespace kvsparse_tools {

struct DecodeOptions {
  std::string model_directory;
  std::vector<std::string> policies;  // in the order they run; dense first when --compare is given
  bool compare = false;
  bool estimate = false;                         // says what it would take, and does nothing else
  std::vector<CacheChoice> caches;               // one per policy
  CacheChoice cache;                             // what they have in common
  std::vector<std::string> settings;             // --set, as given
  std::vector<std::string> prompts;              // texts, or
  std::vector<std::vector<TokenId>> prompt_ids;  // tokens, or
  std::string prompt_file;                       // a text a line
  std::size_t max_new = 128;
  std::size_t forks = 1;         // continuations of each prompt
  std::size_t draft_tokens = 0;  // guessed ahead
  std::size_t threads = 1;       // of the attention
  std::size_t prompt_chunk = Decoder::largest_chunk;
  std::uint64_t pool_bytes = 0;  // 0: room for every sequence at once
  std::size_t max_tokens = 0;    // a sequence's room in policies that keep everything; 0: what this run needs
  std::string save_file, load_file;
  std::string json_file;
  std::string trace_directory;
  std::string resident_directory;
};

namespace detail {

inline std::vector<TokenId> parse_ids(const std::string& text) {
  std::vector<TokenId> ids;
  for (const std::string& part : list_of(text)) {
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
  if (!compare.empty()) {
    for (const std::string& name : list_of(compare)) add(name);
  }
  return policies;
}

/// One sequence of one policy is saved, loaded and recorded.
inline void refuse_combinations(const DecodeOptions& options) {
  const bool several = options.forks > 1 || options.prompts.size() + options.prompt_ids.size() > 1;
  const auto refuse_with = [](const std::string& option, bool given, const std::string& with, bool with_given) {
    if (given && with_given) throw UsageError(option + " cannot be combined with " + with);
  };
  const bool saves = !options.save_file.empty(), loads = !options.load_file.empty();
  const bool records = !options.trace_directory.empty() || !options.resident_directory.empty();
  for (const auto& [option, given] : {std::pair("--save", saves), std::pair("--load", loads)}) {
    refuse_with(option, given, "--compare", options.compare);
    refuse_with(option, given, "several prompts, --prompt-file or --fork", several || !options.prompt_file.empty());
    refuse_with(option, given, "--pool-bytes", options.pool_bytes != 0);
    refuse_with(option, given, "--record-trace or --resident", records);
  }
  refuse_with("--record-trace or --resident", records, "several prompts, --prompt-file or --fork",
              several || !options.prompt_file.empty());
  refuse_with("--record-trace or --resident", records, "--speculative, whose guesses are taken back",
              options.draft_tokens != 0);
  for (const auto& [option, given] : {std::pair("--load", loads), std::pair("--speculative", options.draft_tokens != 0),
                                      std::pair("--pool-bytes", options.pool_bytes != 0)}) {
    refuse_with("--estimate", options.estimate, option, given);
  }
  refuse_with("--load", loads, "--max-tokens, which was settled when the file was saved", options.max_tokens != 0);
  refuse_shared_files({{"--save", options.save_file}, {"--json", options.json_file}});
}

}  // namespace detail

/// Throws UsageError, kvsparse::ConfigError (unknown policy), or what CLI11 throws (--help included).
inline DecodeOptions parse_decode_options(CLI::App& app, int argc, char** argv) {
  DecodeOptions options;
  std::string policy, compare, dtype = "f32", budgets = "uniform";
  std::vector<std::string> ids;
  const CLI::Range count(std::uint64_t{1}, std::uint64_t{1} << 24);
  app.add_option("--model", options.model_directory,
                 "Hugging Face directory of a Llama or Qwen2 model (config.json, model.safetensors or its shards)")
      ->required();
  app.add_flag("--estimate", options.estimate,
               "say what memory and time the run would take, and end; needs of the model no more than its config.json");
  app.add_option("--policy", policy,
                 "what each layer's cache keeps: dense, streaming_llm, h2o, quest, raas, kindred, random, a+b");
  app.add_option("--compare", compare,
                 "several policies, separated by commas; dense runs first, as what they depart from");
  app.add_option("--budget", options.cache.budget_tokens,
                 "tokens a kv head may keep (quest: may read); dense needs none")
      ->check(count);
  app.add_option("--page-size", options.cache.page_size, "tokens per page [16]");
  app.add_option("--budgets", budgets,
                 "uniform: --budget for every layer; pyramid: the same in sum, but more for lower layers (PyramidKV) "
                 "[uniform]")
      ->check(CLI::IsMember({"uniform", "pyramid"}));
  app.add_option("--dense-layers", options.cache.dense_layers, "the first layers that keep everything [0]");
  app.add_option("--dtype", dtype, "storage of keys and values: f32, f16, bf16 or int8 [f32]")
      ->check(CLI::IsMember({"f32", "f16", "bf16", "int8"}));
  auto* text = app.add_option("--prompt", options.prompts,
                              "text, which the model's tokenizer.json turns into tokens; several prompts take turns")
                   ->allow_extra_args(false);
  auto* numbers =
      app.add_option("--prompt-ids", ids, "token ids separated by commas; needs no tokenizer; may be repeated")
          ->allow_extra_args(false);
  auto* file = app.add_option("--prompt-file", options.prompt_file,
                              "a prompt a line; in a .jsonl file a JSON object a line, whose \"prompt\" it is");
  auto* load = app.add_option("--load", options.load_file, "go on from what --save wrote, with the same options");
  for (auto* source : {text, numbers, file, load}) {
    for (auto* other : {text, numbers, file, load}) {
      if (source != other) source->excludes(other);
    }
  }
  app.add_option("--save", options.save_file, "write the sequence to this file when it ends, for --load");
  app.add_option("--max-new", options.max_new, "tokens to generate, unless the model ends its text before [128]")
      ->check(count);
  app.add_option("--max-tokens", options.max_tokens,
                 "tokens that a sequence may grow to where a policy keeps everything [prompt and --max-new]")
      ->check(count);
  app.add_option("--fork", options.forks,
                 "continuations of each prompt, which share its pages; each begins with another one of the most likely "
                 "first tokens [1]")
      ->check(CLI::Range(1, 4096));
  app.add_option("--speculative", options.draft_tokens,
                 "tokens to guess ahead from what the text repeats; wrong guesses are taken back [0]")
      ->check(CLI::Range(std::size_t{0}, Decoder::largest_chunk - 1));
  app.add_option("--pool-bytes", options.pool_bytes,
                 "memory of the page pool of all layers and sequences; sequences that it has no room for wait [enough "
                 "for all]")
      ->check(CLI::Range(std::uint64_t{1}, std::uint64_t{1} << 48));
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
  for (const std::string& list : ids) {
    options.prompt_ids.push_back(detail::parse_ids(list));
    if (options.prompt_ids.back().empty()) throw UsageError("--prompt-ids is empty");
  }
  options.cache.dtype = kvsparse::scalar_type(dtype);
  options.cache.pyramid = budgets == "pyramid";
  if (options.estimate && options.policies.empty()) options.policies = {"dense"};
  if (policy.find(',') != std::string::npos) throw UsageError("--policy takes one policy, --compare takes several");
  if (options.policies.empty()) throw UsageError("--policy or --compare must name a policy");
  if (text->count() + numbers->count() + file->count() + load->count() == 0 && !options.estimate) {
    throw UsageError("--prompt, --prompt-ids, --prompt-file or --load must be given");
  }
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
  detail::refuse_combinations(options);
  return options;
}

}  // namespace kvsparse_tools
