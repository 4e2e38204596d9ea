// SPDX-License-Identifier: Apache-2.0
// The prompts of a command line as tokens.
#pragma once

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "common/file_error.hpp"
#include "common/untrusted_json.hpp"
#include "engine/config.hpp"
#include "engine/json_fields.hpp"
#include "engine/tokenizer.hpp"
#include "options.hpp"

namespace kvsparse_tools {

/// Needed for prompts of text; for prompts of ids and for a saved sequence it only makes the output readable.
inline std::optional<Tokenizer> find_tokenizer(const DecodeOptions& options, const ModelConfig& model) {
  const auto load = [&] { return Tokenizer(options.model_directory, model.vocab_size); };
  if (!options.prompts.empty() || !options.prompt_file.empty()) return load();
  try {
    return load();
  } catch (const FileError&) {
    return std::nullopt;
  }
}

/// The prompts of a file, one a line. Throws FileError.
inline std::vector<std::string> read_prompt_file(const std::filesystem::path& file) {
  std::istringstream lines(read_text_file(file, std::uint64_t{1} << 30));
  std::vector<std::string> prompts;
  for (std::string line; std::getline(lines, line);) {
    if (!line.empty() && line.back() == '\r') line.pop_back();
    if (line.empty()) continue;
    if (file.extension() == ".jsonl") {
      const nlohmann::json json = parse_untrusted_json(line, file, 16);
      line = JsonFields(json, file, "line " + std::to_string(prompts.size() + 1)).required_text("prompt");
    }
    prompts.push_back(std::move(line));
  }
  if (prompts.empty()) throw FileError(file, "holds no prompt");
  return prompts;
}

/// A chat model's prompt spells out its first token, which many a tokenizer.json puts there too. Once is meant.
template <class Note>
std::vector<TokenId> without_doubled_beginning(Tokenizer::Encoding encoding, const Tokenizer& tokenizer, Note&& note) {
  std::vector<TokenId> ids = std::move(encoding.ids);
  const auto text = ids.begin() + static_cast<std::ptrdiff_t>(encoding.put_before);
  if (encoding.put_before == 0 || ids.size() < 2 * encoding.put_before || !std::equal(ids.begin(), text, text))
    return ids;
  note("the prompt begins with " + in_quotes(tokenizer.decode({ids.begin(), text})) +
       ", which tokenizer.json puts before every text; it is read once");
  ids.erase(ids.begin(), text);
  return ids;
}

/// Words of a prompt that its tokenizer does not know are reported to `note`. Throws UsageError, FileError, and what
/// Tokenizer::encode throws.
template <class Note>
std::vector<std::vector<TokenId>> prompt_tokens(const DecodeOptions& options, const ModelConfig& model,
                                                const std::optional<Tokenizer>& tokenizer, Note&& note) {
  std::vector<std::vector<TokenId>> prompts = options.prompt_ids;
  for (const std::string& text :
       options.prompt_file.empty() ? options.prompts : read_prompt_file(options.prompt_file)) {
    Tokenizer::Encoding encoding = tokenizer->encode(text);
    if (!encoding.unknown_words.empty()) {
      note(std::to_string(encoding.unknown_words.size()) +
           " words of the prompt are not in the vocabulary, the first is " + in_quotes(encoding.unknown_words.front()));
    }
    prompts.push_back(without_doubled_beginning(std::move(encoding), *tokenizer, note));
  }
  for (const std::vector<TokenId>& prompt : prompts) {
    if (prompt.empty()) throw UsageError("the prompt is empty, it must have at least one token");
    for (const TokenId token : prompt) {
      if (token < model.vocab_size) continue;
      throw UsageError("--prompt-ids holds " + std::to_string(token) +
                       ", it must be less than the model's vocab_size " + std::to_string(model.vocab_size));
    }
  }
  return prompts;
}

}  // namespace kvsparse_tools
