// SPDX-License-Identifier: Apache-2.0
// WordLevel + WhitespaceSplit: a word between blanks is a token.
#pragma once

#include <cstddef>
#include <filesystem>
#include <optional>
#include <sstream>
#include <string>

#include "json_fields.hpp"
#include "tokenizer.hpp"
#include "vocabulary.hpp"

namespace kvsparse_tools {

class WordLevelTokenizer : public Tokenizer::Kind {
 public:
  /// Throws FileError.
  WordLevelTokenizer(const JsonFields& fields, const JsonFields& model, const std::filesystem::path& file,
                     std::size_t vocab_size)
      : words_(file, vocab_size) {
    for (const char* key : {"normalizer", "post_processor", "decoder"}) {
      if (fields.find(key) != nullptr) {
        fields.fail("it has a " + std::string(key) +
                    ", which this reader does not know beside WordLevel; give the prompt by --prompt-ids instead");
      }
    }
    const nlohmann::json* splitter = fields.find("pre_tokenizer");
    const std::string type =
        splitter == nullptr ? "absent" : JsonFields(*splitter, file, "pre_tokenizer").text("type", "untyped");
    if (type != "WhitespaceSplit") {
      fields.fail("its pre_tokenizer is " + in_quotes(type) +
                  "; beside WordLevel this reader knows WhitespaceSplit, give the prompt by --prompt-ids instead");
    }
    for (const auto& [word, id] : model.required_object("vocab").items()) words_.add(word, id);
    for (const nlohmann::json& entry : fields.array("added_tokens")) {
      const JsonFields token(entry, file, "an entry of added_tokens");
      words_.add(token.required_text("content"), token.required("id"));
    }
    unknown_ = words_.id_of(model.text("unk_token", ""));
  }

  /// Splits at ASCII white space.
  Tokenizer::Encoding encode(const std::string& text) const override {
    Tokenizer::Encoding encoding;
    std::istringstream words(text);
    for (std::string word; words >> word;) {
      const auto id = words_.id_of(word);
      if (!id && !unknown_) words_.fail("the word " + in_quotes(word) + " is not in its vocab");
      if (!id) encoding.unknown_words.push_back(word);
      encoding.ids.push_back(id ? *id : *unknown_);
    }
    return encoding;
  }

  /// Words have single blanks between them.
  std::string text_of(TokenId id, bool at_begin) const override {
    const std::string* word = words_.word_of(id);
    return (at_begin ? "" : " ") + (word == nullptr ? "<" + std::to_string(id) + ">" : *word);
  }

  std::optional<TokenId> id_of(const std::string& word) const override { return words_.id_of(word); }

 private:
  Vocabulary words_;
  std::optional<TokenId> unknown_;
};

}  // namespace kvsparse_tools
