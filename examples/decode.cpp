// SPDX-License-Identifier: Apache-2.0
// Decodes prompts greedily with a real model whose layers keep their keys and values in sparse caches.
#include <algorithm>
#include <iostream>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "common/interrupt.hpp"
#include "common/output_file.hpp"
#include "common/program.hpp"
#include "decode/estimate.hpp"
#include "decode/options.hpp"
#include "decode/policy_run.hpp"
#include "decode/prompts.hpp"
#include "decode/report.hpp"
#include "decode/saved_sequence.hpp"
#include "engine/model.hpp"
#include "engine/recorders.hpp"
#include "engine/tokenizer.hpp"

namespace {

using namespace kvsparse_tools;

int complain(const std::string& sentence, int exit_code) {
  return kvsparse_tools::complain("decode", sentence, exit_code);
}
void note(const std::string& sentence) { complain("note: " + sentence, 0); }

std::map<std::string, std::string> file_notes(const DecodeOptions& options, const std::string& policy) {
  return {{"policy", policy},
          {"budget", std::to_string(options.cache.budget_tokens)},
          {"budgets", options.cache.pyramid ? "pyramid" : "uniform"},
          {"page_size", std::to_string(options.cache.page_size)},
          {"dense_layers", std::to_string(options.cache.dense_layers)}};
}

/// Where a policy's files go: straight into the directory when it is the only one.
std::filesystem::path policy_directory(const DecodeOptions& options, const std::filesystem::path& directory,
                                       const std::string& policy) {
  return options.policies.size() == 1 ? directory : directory / policy;
}

/// What all policies decode.
struct Work {
  const DecodeOptions& options;
  const Model& model;
  const std::optional<Tokenizer>& tokenizer;
  std::vector<std::vector<TokenId>> prompts;
  std::optional<SavedSequence> saved;  // what the one sequence goes on from
  std::size_t max_tokens = 0;          // that a sequence may have

  bool one_sequence() const { return prompts.size() * options.forks == 1; }
  std::span<const TokenId> text_before() const { return saved ? std::span(saved->text()) : std::span<const TokenId>(); }
  std::vector<std::vector<TokenId>> texts() const {
    return saved ? std::vector<std::vector<TokenId>>{saved->text()} : prompts;
  }
};

/// Prints a sequence's text as it comes.
class LiveText {
 public:
  LiveText(std::ostream& out, const std::optional<Tokenizer>& tokenizer) : out_(out) {
    if (tokenizer) stream_.emplace(*tokenizer);
  }

  void show(const std::vector<TokenId>& tokens) {
    for (; shown_ < tokens.size(); ++shown_) {
      if (stream_) {
        out_ << stream_->push(tokens[shown_]);
      } else {
        out_ << (shown_ == 0 ? "" : ",") << tokens[shown_];
      }
    }
    out_.flush();
  }
  void finish() { out_ << (stream_ ? stream_->finish() : "") << "\n\n"; }

 private:
  std::ostream& out_;
  std::optional<TextStream> stream_;
  std::size_t shown_ = 0;
};

PolicyResult run_policy(Work& work, const CacheChoice& cache, LiveText* live) {
  const DecodeOptions& options = work.options;
  std::optional<TraceRecorder> trace;
  std::optional<ResidencyRecorder> residency;
  PolicyRun::Hooks hooks;
  hooks.on_start = [&](Decoder& decoder) {
    if (work.saved) work.saved->restore(decoder);
    if (!options.trace_directory.empty()) decoder.observe(&trace.emplace(work.model.config()));
    if (!options.resident_directory.empty()) decoder.observe(&residency.emplace(work.model.config()));
  };
  hooks.on_step = [&](const GreedyDecoding& decoding) {
    if (live != nullptr) live->show(decoding.tokens());
  };
  hooks.shows_text = live != nullptr;
  hooks.on_end = [&](const Decoder& decoder, const GreedyDecoding& decoding) {
    if (options.save_file.empty() || !decoding.prompt_is_read()) return;
    std::vector<TokenId> text = work.texts().front();
    text.insert(text.end(), decoding.tokens().begin(), decoding.tokens().end());
    save_sequence(options.save_file, decoder, text, work.max_tokens);
  };
  PolicyResult result =
      PolicyRun(options, cache, work.model, work.prompts, work.max_tokens, work.text_before()).run(hooks);
  for (SequenceResult& sequence : result.sequences) {
    if (work.tokenizer) sequence.text = printable_text(*work.tokenizer, sequence.generation.tokens);
    sequence.answer = answer_of(sequence.generation, sequence.text);
  }

  const auto notes = file_notes(options, cache.policy);
  if (!interrupted() && trace) trace->save(policy_directory(options, options.trace_directory, cache.policy), notes);
  if (!interrupted() && residency) {
    residency->save(policy_directory(options, options.resident_directory, cache.policy), notes);
  }
  return result;
}

/// Reports what cannot be built or written before any time is spent on decoding.
void try_out(const Work& work) {
  const DecodeOptions& options = work.options;
  const ModelConfig& config = work.model.config();
  if (options.cache.dense_layers > config.layers) {
    throw UsageError("--dense-layers is " + std::to_string(options.cache.dense_layers) + ", the model has " +
                     std::to_string(config.layers) + " layers");
  }
  if (options.forks > config.vocab_size) {
    throw UsageError("--fork is " + std::to_string(options.forks) + ", the model has " +
                     std::to_string(config.vocab_size) + " tokens to begin with");
  }
  std::size_t longest = 0;
  for (const auto& prompt : work.prompts) longest = std::max(longest, prompt.size());
  const std::size_t tokens = work.text_before().size() + longest + options.max_new;
  if (tokens > work.max_tokens) {
    throw UsageError("the sequence would grow to " + std::to_string(tokens) + " tokens, but has room for " +
                     std::to_string(work.max_tokens) + (work.saved ? "; --save it with a larger --max-tokens" : ""));
  }
  if (config.max_positions != 0 && tokens > config.max_positions) {
    note(std::to_string(tokens) + " tokens exceed the model's " + std::to_string(config.max_positions) +
         " positions, beyond which it was not trained");
  }
  for (const CacheChoice& cache : options.caches) {
    (void)Decoder(work.model, cache, work.max_tokens);
    (void)PolicyRun(options, cache, work.model, work.prompts, work.max_tokens, work.text_before());
    for (const std::string& directory : {options.trace_directory, options.resident_directory}) {
      if (!directory.empty()) ensure_directory(policy_directory(options, directory, cache.policy));
    }
  }
}

Work plan_work(const DecodeOptions& options, const Model& model, const std::optional<Tokenizer>& tokenizer,
               std::vector<std::vector<TokenId>> prompts, std::size_t max_tokens) {
  Work work{options, model, tokenizer, std::move(prompts), {}, max_tokens};
  if (!options.load_file.empty()) {
    work.saved.emplace(options.load_file, model);
    work.prompts.emplace_back();
    work.max_tokens = work.saved->max_tokens();
    const auto& eos = model.config().eos_tokens;
    if (std::find(eos.begin(), eos.end(), work.saved->text().back()) != eos.end()) {
      throw UsageError(options.load_file + ": the text has ended, its last token is an end of text");
    }
    return work;
  }
  return work;
}

void write_json(const DecodeOptions& options, const nlohmann::ordered_json& json) {
  write_text_file(options.json_file,
                  json.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n");
}

int print_estimate(const DecodeOptions& options, RunEstimate& estimate) {
  estimate.measure_time();
  if (!options.json_file.empty()) write_json(options, estimate.json());
  if (!is_stream(options.json_file)) estimate.print(std::cout);
  std::cout.flush();
  return 0;
}

int run(const DecodeOptions& options) {
  // Weights come last: reading them takes a while, and most mistakes can be told without.
  const ModelConfig config = load_model_config(options.model_directory);
  const std::optional<Tokenizer> tokenizer = find_tokenizer(options, config);
  const std::vector<std::vector<TokenId>> prompts = prompt_tokens(options, config, tokenizer, note);
  const SequenceLengths lengths = lengths_of(options, prompts);
  RunEstimate estimate(options, config, lengths);
  if (options.estimate) return print_estimate(options, estimate);
  if (const std::string shortage = estimate.shortage(); !shortage.empty()) note(shortage);

  const Model model(config, options.model_directory);
  Work work = plan_work(options, model, tokenizer, prompts, lengths.max_tokens);
  try_out(work);

  DecodeReport report(options, work.texts());
  // Rewritten after every policy, and once before the first: an interrupt leaves valid JSON, a bad path is found early.
  const bool rewrite_json = !options.json_file.empty() && !is_stream(options.json_file);
  if (rewrite_json) write_json(options, report.json(false));
  catch_interrupts();
  std::optional<LiveText> live;  // JSON that goes to a stream may go to this one, so nothing gets in its way
  if (work.one_sequence() && !options.compare && !is_stream(options.json_file)) live.emplace(std::cout, tokenizer);
  for (std::size_t i = 0; i < options.caches.size() && !interrupted(); ++i) {
    report.add(run_policy(work, options.caches[i], live ? &*live : nullptr));
    if (rewrite_json) write_json(options, report.json(!interrupted() && i + 1 == options.caches.size()));
  }
  if (live) live->finish();
  if (!options.json_file.empty() && !rewrite_json) write_json(options, report.json(!interrupted()));
  report.print(std::cout, live.has_value());
  std::cout.flush();
  return interrupted() ? complain("interrupted; what was finished is above", interrupted_exit_code) : 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Decodes prompts greedily, every layer's keys and values in one sparse cache, and says what it cost.",
               "decode");
  return run_program(app, "not enough memory for this model, --max-new and policy",
                     [&] { return run(parse_decode_options(app, argc, argv)); });
}
