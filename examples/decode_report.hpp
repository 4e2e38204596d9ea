// SPDX-License-Identifier: Apache-2.0
// What examples/decode found: as a table for people, as JSON for machines.
#pragma once

#include <algorithm>
#include <cstddef>
#include <nlohmann/json.hpp>
#include <optional>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "common/text_table.hpp"
#include "decode_options.hpp"
#include "engine/chain_answer.hpp"
#include "engine/generate.hpp"

namespace kvsparse_tools {

/// Version of the JSON that --json writes; raised when a field changes its meaning or goes.
inline constexpr int decode_json_schema = 1;

struct PolicyResult {
  std::string policy;
  Generation generation;
  std::string text;    // empty without a tokenizer
  std::string answer;  // empty when nothing was generated
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
  DecodeReport(DecodeOptions options, std::vector<TokenId> prompt)
      : options_(std::move(options)), prompt_(std::move(prompt)) {}

  void add(PolicyResult result) { results_.push_back(std::move(result)); }

  nlohmann::ordered_json json(bool complete) const {
    nlohmann::ordered_json json{{"schema", decode_json_schema},
                                {"tool", "decode"},
                                {"complete", complete},
                                {"model", options_.model_directory},
                                {"budget", options_.cache.budget_tokens},
                                {"page_size", options_.cache.page_size},
                                {"dense_layers", options_.cache.dense_layers},
                                {"dtype", kvsparse::scalar_type_names[static_cast<std::size_t>(options_.cache.dtype)]},
                                {"max_new", options_.max_new}};
    json["settings"] = options_.settings;
    json["prompt_ids"] = prompt_;
    json["policies"] = nlohmann::ordered_json::array();
    for (const PolicyResult& result : results_) json["policies"].push_back(policy_json(result));
    return json;
  }

  /// For one policy also what it generated.
  void print(std::ostream& out) const {
    if (!options_.compare && !results_.empty()) {
      const PolicyResult& only = results_.front();
      for (std::size_t i = 0; only.text.empty() && i < only.generation.tokens.size(); ++i) {
        out << (i == 0 ? "" : ",") << only.generation.tokens[i];
      }
      out << only.text << "\n\n";
    }
    print_table(out);
    print_legend(out);
  }

 private:
  void print_table(std::ostream& out) const {
    std::vector<std::string> header{"policy",     "generated", "answer",  "peak tokens",
                                    "peak bytes", "evicted",   "tokens/s"};
    if (has_dense()) header.insert(header.begin() + 2, "departs at");
    TextTable table(header);
    for (const PolicyResult& result : results_) {
      const Generation& g = result.generation;
      std::vector<std::string> row{result.policy,
                                   std::to_string(g.tokens.size()),
                                   result.answer.empty() ? "-" : result.answer,
                                   std::to_string(g.cache.peak_resident_tokens),
                                   bytes_text(g.cache.peak_resident_bytes),
                                   std::to_string(g.cache.evicted_tokens),
                                   g.tokens.empty() ? "-" : fixed_text(g.tokens_per_second(), 0)};
      if (has_dense()) {
        const auto departure = first_departure(results_.front().generation, g);
        row.insert(row.begin() + 2, departure ? std::to_string(*departure) : "never");
      }
      table.add_row(std::move(row));
    }
    table.print(out);
  }

  bool has_dense() const { return !results_.empty() && options_.compare; }  // dense runs first then

  nlohmann::ordered_json policy_json(const PolicyResult& result) const {
    const Generation& g = result.generation;
    nlohmann::ordered_json json{
        {"policy", result.policy}, {"generated_tokens", g.tokens.size()}, {"stopped", stop_reason_name(g.stopped)}};
    if (has_dense()) {
      const auto departure = first_departure(results_.front().generation, g);
      json["departs_from_dense_at"] = departure ? nlohmann::ordered_json(*departure) : nlohmann::ordered_json();
    }
    json["answer"] = result.answer;
    json["peak_resident_tokens"] = g.cache.peak_resident_tokens;
    json["peak_resident_bytes"] = g.cache.peak_resident_bytes;
    json["evicted_tokens"] = g.cache.evicted_tokens;
    json["tokens_per_second"] =
        g.tokens.empty() ? nlohmann::ordered_json() : nlohmann::ordered_json(g.tokens_per_second());
    json["text"] = result.text;
    json["tokens"] = g.tokens;
    json["logits"] = g.logits;
    return json;
  }

  void print_legend(std::ostream& out) const {
    out << "\ngenerated      tokens decoded after the prompt of " << prompt_.size() << " tokens\n";
    if (has_dense()) {
      out << "departs at     index, from 0, of the first generated token that differs from dense's\n";
    }
    out << "answer         the last number before the last \";\" if the text has one, else how the output ends\n"
           "peak tokens    most tokens that one kv head of one layer held at once, prompt included\n"
           "peak bytes     most memory the caches filled: keys, values, page summaries and policy state, all layers "
           "and heads\n"
           "evicted        tokens given up for good, summed over layers and kv heads\n"
           "tokens/s       generated tokens per second of decoding on one thread, the prompt not counted\n";
  }

  DecodeOptions options_;
  std::vector<TokenId> prompt_;
  std::vector<PolicyResult> results_;
};

}  // namespace kvsparse_tools
