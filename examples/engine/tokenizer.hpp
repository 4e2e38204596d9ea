// SPDX-License-Identifier: Apache-2.0
// tokenizer.json of kind WordLevel + WhitespaceSplit: a word between blanks is a token. Other kinds are refused; their
// prompts can be given as token ids.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "../common/file_error.hpp"
#include "config.hpp"

namespace kvsparse_tools {

using TokenId = std::uint32_t;

class Tokenizer {
 public:
  /// Reads DIR/tokenizer.json, whose ids must be below `vocab_size`. Throws FileError.
  Tokenizer(const std::filesystem::path& directory, std::size_t vocab_size) : file_(directory / "tokenizer.json") {
    const auto json = parse_untrusted_json(read_text_file(file_, std::uint64_t{1} << 28), file_, 64);
    const JsonFields fields(json, file_);
    check_kind(fields, json);
    const JsonFields model(json.at("model"), file_, "model");
    const nlohmann::json* vocab = model.find("vocab");
    if (vocab == nullptr || !vocab->is_object()) model.fail("has no vocab object");
    for (const auto& [word, id] : vocab->items()) add(word, id, vocab_size);
    if (const nlohmann::json* added = fields.find("added_tokens")) {
      if (!added->is_array()) fields.fail("added_tokens is not an array");
      for (const auto& entry : *added) {
        const JsonFields token(entry, file_, "an entry of added_tokens");
        if (token.find("id") == nullptr) token.fail("has no id");
        add(token.text("content", ""), *token.find("id"), vocab_size);
      }
    }
    if (const auto unknown = ids_.find(model.text("unk_token", "")); unknown != ids_.end()) unknown_ = unknown->second;
  }

  struct Encoding {
    std::vector<TokenId> ids;
    std::vector<std::string> unknown_words;  // encoded as the unknown token
  };

  /// Splits at ASCII white space. Throws FileError for a word outside the vocabulary when there is no unknown token.
  Encoding encode(const std::string& text) const {
    Encoding encoding;
    std::istringstream words(text);
    for (std::string word; words >> word;) {
      const auto found = ids_.find(word);
      if (found == ids_.end() && !unknown_)
        throw FileError(file_, "the word " + in_quotes(word) + " is not in its vocab");
      if (found == ids_.end()) encoding.unknown_words.push_back(word);
      encoding.ids.push_back(found == ids_.end() ? *unknown_ : found->second);
    }
    return encoding;
  }

  /// Nothing for a word outside the vocabulary.
  std::optional<TokenId> id_of(const std::string& word) const {
    const auto found = ids_.find(word);
    return found == ids_.end() ? std::nullopt : std::optional(found->second);
  }

  const std::filesystem::path& file() const { return file_; }

  /// The words with single blanks between them; an id without a word becomes <id>.
  std::string decode(const std::vector<TokenId>& ids) const {
    std::string text;
    for (const TokenId id : ids) {
      const auto found = words_.find(id);
      text += (text.empty() ? "" : " ") + (found == words_.end() ? "<" + std::to_string(id) + ">" : found->second);
    }
    return text;
  }

 private:
  void check_kind(const JsonFields& fields, const nlohmann::json& json) const {
    const std::string instead =
        "; this engine reads WordLevel with WhitespaceSplit, give the prompt by --prompt-ids instead";
    const auto type_of = [&](const char* key) -> std::string {
      return fields.find(key) == nullptr ? "absent" : JsonFields(json.at(key), file_, key).text("type", "untyped");
    };
    if (const auto type = type_of("model"); type != "WordLevel")
      fields.fail("its model is " + in_quotes(type) + instead);
    if (const auto type = type_of("pre_tokenizer"); type != "WhitespaceSplit") {
      fields.fail("its pre_tokenizer is " + in_quotes(type) + instead);
    }
    for (const char* key : {"normalizer", "post_processor", "truncation", "padding"}) {
      if (fields.find(key) != nullptr) fields.fail("it has a " + std::string(key) + instead);
    }
  }

  void add(const std::string& word, const nlohmann::json& id, std::size_t vocab_size) {
    if (!id.is_number_unsigned() || id.get<std::uint64_t>() >= vocab_size) {
      throw FileError(file_, "the word " + in_quotes(word) + " has the id " + in_quotes(id.dump()) +
                                 ", it must be less than the model's vocab_size " + std::to_string(vocab_size));
    }
    const auto token = static_cast<TokenId>(id.get<std::uint64_t>());
    ids_[word] = token;
    words_[token] = word;
  }

  std::filesystem::path file_;
  std::map<std::string, TokenId> ids_;
  std::map<TokenId, std::string> words_;
  std::optional<TokenId> unknown_;
};

/// The answer that a numbered chain of lemmas ends with: the last word of digits before the last ";", if there is one.
inline std::optional<std::string> chain_answer(const std::string& text) {
  std::istringstream words(text);
  std::string last_number;
  std::optional<std::string> answer;
  for (std::string word; words >> word;) {
    if (word.find_first_not_of("0123456789") == std::string::npos) last_number = word;
    if (word == ";" && !last_number.empty()) answer = last_number;
  }
  return answer;
}

}  // namespace kvsparse_tools
