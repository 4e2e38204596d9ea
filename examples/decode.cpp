// SPDX-License-Identifier: Apache-2.0
// Decodes a prompt greedily with a real model whose layers keep their keys and values in sparse caches.
#include <iostream>
#include <kvsparse/interop/thread_team.hpp>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "common/interrupt.hpp"
#include "common/output_file.hpp"
#include "common/program.hpp"
#include "common/progress.hpp"
#include "decode_options.hpp"
#include "decode_report.hpp"
#include "engine/generate.hpp"
#include "engine/model.hpp"
#include "engine/recorders.hpp"
#include "engine/tokenizer.hpp"

namespace {

using namespace kvsparse_tools;

int complain(const std::string& sentence, int exit_code) {
  return kvsparse_tools::complain("decode", sentence, exit_code);
}

/// Needed for a prompt of words; for a prompt of ids it only makes the output readable.
std::optional<Tokenizer> find_tokenizer(const DecodeOptions& options, const Model& model) {
  if (options.prompt_ids.empty()) return Tokenizer(options.model_directory, model.config().vocab_size);
  try {
    return Tokenizer(options.model_directory, model.config().vocab_size);
  } catch (const FileError&) {
    return std::nullopt;
  }
}

std::vector<TokenId> prompt_tokens(const DecodeOptions& options, const Model& model,
                                   const std::optional<Tokenizer>& tokenizer) {
  std::vector<TokenId> prompt = options.prompt_ids;
  if (prompt.empty()) {
    Tokenizer::Encoding encoding = tokenizer->encode(options.prompt);
    if (!encoding.unknown_words.empty()) {
      complain("note: " + std::to_string(encoding.unknown_words.size()) +
                   " words of the prompt are not in the vocabulary, the first is " +
                   in_quotes(encoding.unknown_words.front()),
               0);
    }
    prompt = std::move(encoding.ids);
  }
  if (prompt.empty()) throw UsageError("the prompt is empty, it must have at least one token");
  for (const TokenId token : prompt) {
    if (token >= model.config().vocab_size) {
      throw UsageError("--prompt-ids holds " + std::to_string(token) +
                       ", it must be less than the model's vocab_size " + std::to_string(model.config().vocab_size));
    }
  }
  return prompt;
}

std::map<std::string, std::string> file_notes(const DecodeOptions& options, const std::string& policy) {
  return {{"policy", policy},
          {"budget", std::to_string(options.cache.budget_tokens)},
          {"page_size", std::to_string(options.cache.page_size)},
          {"dense_layers", std::to_string(options.cache.dense_layers)}};
}

/// Where a policy's files go: straight into the directory when it is the only one.
std::filesystem::path policy_directory(const DecodeOptions& options, const std::filesystem::path& directory,
                                       const std::string& policy) {
  return options.policies.size() == 1 ? directory : directory / policy;
}

PolicyResult run_policy(const DecodeOptions& options, const Model& model, const std::optional<Tokenizer>& tokenizer,
                        const std::vector<TokenId>& prompt, const CacheChoice& cache) {
  const std::string& policy = cache.policy;
  const std::size_t total = prompt.size() + options.max_new;
  kvsparse::ThreadTeam team(options.threads);
  Decoder decoder(model, cache, total);
  decoder.attend_on(team);
  decoder.read_prompt_by(options.prompt_chunk);
  std::optional<TraceRecorder> trace;
  std::optional<ResidencyRecorder> residency;
  if (!options.trace_directory.empty()) decoder.observe(&trace.emplace(model.config()));
  if (!options.resident_directory.empty()) decoder.observe(&residency.emplace(model.config()));

  ProgressBar progress(policy, total);
  PolicyResult result;
  result.policy = policy;
  result.generation = generate(decoder, prompt, options.max_new, [&](std::size_t read) {
    progress.update(read);
    return !interrupted();
  });
  progress.clear();
  if (tokenizer) result.text = printable_text(*tokenizer, result.generation.tokens);
  result.answer = answer_of(result.generation, result.text);

  const bool whole = result.generation.stopped != StopReason::interrupted;
  const auto notes = file_notes(options, policy);
  if (whole && trace) trace->save(policy_directory(options, options.trace_directory, policy), notes);
  if (whole && residency) residency->save(policy_directory(options, options.resident_directory, policy), notes);
  return result;
}

int run(const DecodeOptions& options) {
  const Model model(options.model_directory);
  const ModelConfig& config = model.config();
  const std::optional<Tokenizer> tokenizer = find_tokenizer(options, model);
  const std::vector<TokenId> prompt = prompt_tokens(options, model, tokenizer);
  if (options.cache.dense_layers > config.layers) {
    throw UsageError("--dense-layers is " + std::to_string(options.cache.dense_layers) + ", the model has " +
                     std::to_string(config.layers) + " layers");
  }
  if (config.max_positions != 0 && prompt.size() + options.max_new > config.max_positions) {
    complain("note: " + std::to_string(prompt.size() + options.max_new) + " tokens exceed the model's " +
                 std::to_string(config.max_positions) + " positions, beyond which it was not trained",
             0);
  }
  // What cannot be built or written is reported before any time is spent on decoding.
  for (const CacheChoice& cache : options.caches) {
    (void)Decoder(model, cache, prompt.size() + options.max_new);
    for (const std::string& directory : {options.trace_directory, options.resident_directory}) {
      if (!directory.empty()) ensure_directory(policy_directory(options, directory, cache.policy));
    }
  }

  DecodeReport report(options, prompt);
  const auto write_json = [&](bool complete) {
    using Json = nlohmann::ordered_json;
    const std::string text = report.json(complete).dump(-1, ' ', false, Json::error_handler_t::replace);
    write_text_file(options.json_file, text + "\n");
  };
  // Rewritten after every policy, and once before the first: an interrupt leaves valid JSON, a bad path is found early.
  const bool rewrite_json = !options.json_file.empty() && !is_stream(options.json_file);
  if (rewrite_json) write_json(false);
  catch_interrupts();
  for (std::size_t i = 0; i < options.caches.size() && !interrupted(); ++i) {
    report.add(run_policy(options, model, tokenizer, prompt, options.caches[i]));
    if (rewrite_json) write_json(!interrupted() && i + 1 == options.caches.size());
  }
  if (!options.json_file.empty() && !rewrite_json) write_json(!interrupted());
  report.print(std::cout);
  std::cout.flush();
  return interrupted() ? complain("interrupted; what was finished is above", interrupted_exit_code) : 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Decodes a prompt greedily, every layer's keys and values in one sparse cache, and says what it cost.",
               "decode");
  return run_program(app, "not enough memory for this model, --max-new and policy",
                     [&] { return run(parse_decode_options(app, argc, argv)); });
}
