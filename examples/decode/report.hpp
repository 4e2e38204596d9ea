// SPDX-License-Identifier: Apache-2.0
// What examples/decode found: as a table for people, as JSON for machines.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <ostream>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "common/text_table.hpp"
#include "engine/chain_answer.hpp"
#include "engine/generate.hpp"
#include "options.hpp"

namespace kvsparse_tools {

/// Version of the JSON that --json writes; raised when a field changes its meaning or goes.
inline constexpr int decode_json_schema = 1;

struct SequenceResult {
  std::size_t prompt = 0;  // which one, from 0
  std::size_t fork = 0;    // which continuation of it, from 0
  Generation generation;
  std::string text;    // empty without a tokenizer
  std::string answer;  // empty when nothing was generated
};

/// What several sequences used of the pool that they have in common.
struct PoolUse {
  std::uint64_t bytes = 0;
  std::uint64_t peak_bytes = 0;              // of pages in use at once
  std::uint64_t saved_when_forked = 0;       // bytes that forks would have held beside in pages of their own
  std::uint64_t saved_when_first_ended = 0;  // the same, just before the first of them ended
  std::size_t most_sequences = 0;            // at once
};

struct PolicyResult {
  std::string policy;
  std::vector<SequenceResult> sequences;
  std::optional<PoolUse> pool;  // nothing for a single sequence
};

/// Index of the first generated token that differs from dense; nothing when one sequence is a beginning of the other
/// only because it was interrupted, or when they are equal.
inline std::optional<std::size_t> first_departure(const Generation& dense, const Generation& other) {
  const std::size_t both = std::min(dense.tokens.size(), other.tokens.size());
  for (std::size_t i = 0; i < both; ++i) {
    if (dense.tokens[i] != other.tokens[i]) return i;
  }
  const bool cut = dense.stopped == StopReason::interrupted || other.stopped == StopReason::interrupted;
  return dense.tokens.size() == other.tokens.size() || cut ? std::nullopt : std::optional(both);
}

/// The answer of a chain that ends in ";", else the last few words, else the last few ids.
inline std::string answer_of(const Generation& generation, const std::string& text) {
  if (const auto answer = chain_answer(text)) return *answer;
  constexpr std::size_t tail = 4;
  std::vector<std::string> words;
  std::istringstream stream(text);
  for (std::string word; stream >> word;) words.push_back(word);
  if (words.empty()) {
    for (const TokenId id : generation.tokens) words.push_back(std::to_string(id));
  }
  std::string answer = words.size() > tail ? "..." : "";
  for (std::size_t i = words.size() - std::min(tail, words.size()); i < words.size(); ++i) {
    answer += (answer.empty() ? "" : " ") + words[i];
  }
  return answer;
}

class DecodeReport {
 public:
  DecodeReport(DecodeOptions options, std::vector<std::vector<TokenId>> prompts)
      : options_(std::move(options)), prompts_(std::move(prompts)) {}

  void add(PolicyResult result) { results_.push_back(std::move(result)); }

  nlohmann::ordered_json json(bool complete) const {
    nlohmann::ordered_json json{{"schema", decode_json_schema},
                                {"tool", "decode"},
                                {"complete", complete},
                                {"model", options_.model_directory},
                                {"budget", options_.cache.budget_tokens},
                                {"budgets", options_.cache.pyramid ? "pyramid" : "uniform"},
                                {"page_size", options_.cache.page_size},
                                {"dense_layers", options_.cache.dense_layers},
                                {"dtype", kvsparse::scalar_type_names[static_cast<std::size_t>(options_.cache.dtype)]},
                                {"max_new", options_.max_new}};
    json["settings"] = options_.settings;
    if (several()) {
      json["prompts"] = prompts_;
    } else {
      json["prompt_ids"] = prompts_.front();
    }
    json["policies"] = nlohmann::ordered_json::array();
    for (const PolicyResult& result : results_) json["policies"].push_back(policy_json(result));
    return json;
  }

  /// For one policy also what it generated, unless that was shown as it came.
  void print(std::ostream& out, bool text_was_shown) const {
    if (!options_.compare && !results_.empty() && !text_was_shown) {
      for (const SequenceResult& sequence : results_.front().sequences) print_text(out, sequence);
    }
    print_table(out);
    for (const PolicyResult& result : results_) print_pool(out, result);
    print_legend(out);
  }

 private:
  bool several() const { return prompts_.size() * options_.forks > 1; }
  bool has_dense() const { return !results_.empty() && options_.compare; }  // dense runs first then

  /// Nothing where nothing is compared, or nothing departs.
  std::optional<std::size_t> departure(const SequenceResult& sequence, std::size_t index) const {
    if (!has_dense() || index >= results_.front().sequences.size()) return std::nullopt;
    return first_departure(results_.front().sequences[index].generation, sequence.generation);
  }

  void print_text(std::ostream& out, const SequenceResult& sequence) const {
    if (several()) {
      out << "== prompt " << sequence.prompt;
      if (options_.forks > 1) out << ", fork " << sequence.fork;
      out << '\n';
    }
    const std::vector<TokenId>& tokens = sequence.generation.tokens;
    for (std::size_t i = 0; sequence.text.empty() && i < tokens.size(); ++i) out << (i == 0 ? "" : ",") << tokens[i];
    out << sequence.text << "\n\n";
  }

  void print_table(std::ostream& out) const {
    std::vector<std::string> header{"policy"};
    if (several()) header.emplace_back("prompt");
    if (options_.forks > 1) header.emplace_back("fork");
    header.emplace_back("generated");
    if (has_dense()) header.emplace_back("departs at");
    if (options_.draft_tokens > 0) header.emplace_back("guesses right");
    for (const char* name : {"answer", "peak tokens", "peak bytes", "evicted", "tokens/s"}) header.emplace_back(name);
    TextTable table(header);
    for (const PolicyResult& result : results_) {
      for (std::size_t i = 0; i < result.sequences.size(); ++i) table.add_row(row(result, i));
    }
    table.print(out);
  }

  std::vector<std::string> row(const PolicyResult& result, std::size_t index) const {
    const SequenceResult& sequence = result.sequences[index];
    const Generation& g = sequence.generation;
    std::vector<std::string> row{result.policy};
    if (several()) row.push_back(std::to_string(sequence.prompt));
    if (options_.forks > 1) row.push_back(std::to_string(sequence.fork));
    row.push_back(std::to_string(g.tokens.size()));
    if (has_dense()) {
      const auto at = departure(sequence, index);
      row.push_back(at ? std::to_string(*at) : "never");
    }
    if (options_.draft_tokens > 0) {
      row.push_back(std::to_string(g.accepted_drafts) + " of " + std::to_string(g.drafted_tokens));
    }
    row.push_back(sequence.answer.empty() ? "-" : sequence.answer);
    row.push_back(std::to_string(g.cache.peak_resident_tokens));
    row.push_back(bytes_text(g.cache.peak_resident_bytes));
    row.push_back(std::to_string(g.cache.evicted_tokens));
    row.push_back(g.tokens.empty() ? "-" : fixed_text(g.tokens_per_second(), 0));
    return row;
  }

  void print_pool(std::ostream& out, const PolicyResult& result) const {
    if (!result.pool) return;
    out << "\npool of " << result.policy << ": at most " << bytes_text(result.pool->peak_bytes) << " of "
        << bytes_text(result.pool->bytes) << " in use, by at most " << result.pool->most_sequences
        << " sequences at once";
    if (options_.forks > 1) {
      out << "; sharing saved " << bytes_text(result.pool->saved_when_forked) << " when the forks began, "
          << bytes_text(result.pool->saved_when_first_ended) << " when the first of them ended";
    }
    out << '\n';
  }

  nlohmann::ordered_json policy_json(const PolicyResult& result) const {
    nlohmann::ordered_json json{{"policy", result.policy}};
    if (!several()) {
      for (const SequenceResult& only : result.sequences) json.update(sequence_json(only, 0));
      return json;
    }
    if (result.pool) {
      json["pool"] = {{"bytes", result.pool->bytes},
                      {"peak_bytes", result.pool->peak_bytes},
                      {"saved_when_forked", result.pool->saved_when_forked},
                      {"saved_when_first_ended", result.pool->saved_when_first_ended},
                      {"most_sequences", result.pool->most_sequences}};
    }
    json["sequences"] = nlohmann::ordered_json::array();
    for (std::size_t i = 0; i < result.sequences.size(); ++i) {
      nlohmann::ordered_json entry{{"prompt", result.sequences[i].prompt}, {"fork", result.sequences[i].fork}};
      entry.update(sequence_json(result.sequences[i], i));
      json["sequences"].push_back(entry);
    }
    return json;
  }

  nlohmann::ordered_json sequence_json(const SequenceResult& sequence, std::size_t index) const {
    const Generation& g = sequence.generation;
    nlohmann::ordered_json json{{"generated_tokens", g.tokens.size()}, {"stopped", stop_reason_name(g.stopped)}};
    if (has_dense()) {
      const auto at = departure(sequence, index);
      json["departs_from_dense_at"] = at ? nlohmann::ordered_json(*at) : nlohmann::ordered_json();
    }
    if (options_.draft_tokens > 0) {
      json["drafted_tokens"] = g.drafted_tokens;
      json["accepted_drafts"] = g.accepted_drafts;
    }
    json["answer"] = sequence.answer;
    json["peak_resident_tokens"] = g.cache.peak_resident_tokens;
    json["peak_resident_bytes"] = g.cache.peak_resident_bytes;
    json["evicted_tokens"] = g.cache.evicted_tokens;
    json["tokens_per_second"] =
        g.tokens.empty() ? nlohmann::ordered_json() : nlohmann::ordered_json(g.tokens_per_second());
    json["text"] = sequence.text;
    json["tokens"] = g.tokens;
    json["logits"] = g.logits;
    return json;
  }

  void print_legend(std::ostream& out) const {
    out << "\ngenerated      tokens decoded after the prompt";
    if (!several()) out << " of " << prompts_.front().size() << " tokens";
    out << '\n';
    if (has_dense()) {
      out << "departs at     index, from 0, of the first generated token that differs from dense's\n";
    }
    if (options_.draft_tokens > 0) {
      out << "guesses right  tokens that were guessed from the text and confirmed by the model, of all guessed\n";
    }
    out << "answer         the last number before the last \";\" if the text has one, else how the output ends\n"
           "peak tokens    most tokens that one kv head of one layer held at once, prompt included; where heads share\n"
           "               a budget, on average\n"
           "peak bytes     most memory the caches filled: keys, values, page summaries and policy state, all layers "
           "and heads\n"
           "evicted        tokens given up for good, summed over layers and kv heads\n"
           "tokens/s       generated tokens per second of decoding, the prompt not counted\n";
  }

  DecodeOptions options_;
  std::vector<std::vector<TokenId>> prompts_;
  std::vector<PolicyResult> results_;
};

}  // namespace kvsparse_tools
