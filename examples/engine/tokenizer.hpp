// SPDX-License-Identifier: Apache-2.0
// tokenizer.json of a Hugging Face model directory, of two kinds: byte-level BPE, as GPT-2, Llama 3 and Qwen2 have it,
// and WordLevel + WhitespaceSplit, where a word between blanks is a token. What else a file may ask for is refused by
// name, because a text split otherwise than in training is a prompt the model never saw; such a model's prompts can be
// given as token ids.
#pragma once

#include <cstddef>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "vocabulary.hpp"

namespace kvsparse_tools {

class Tokenizer {
 public:
  struct Encoding {
    std::vector<TokenId> ids;
    std::size_t put_before = 0;              // how many of them are not the text's, but stand before each text
    std::vector<std::string> unknown_words;  // encoded as the unknown token
  };

  /// What a kind of tokenizer must be able to do.
  class Kind {
   public:
    virtual ~Kind() = default;
    virtual Encoding encode(const std::string& text) const = 0;
    /// The bytes that a token adds to a text, which it may begin.
    virtual std::string text_of(TokenId id, bool at_begin) const = 0;
    virtual std::optional<TokenId> id_of(const std::string& word) const = 0;
  };

  /// Reads DIR/tokenizer.json, whose ids must be below `vocab_size`. Throws FileError.
  Tokenizer(const std::filesystem::path& directory, std::size_t vocab_size);

  /// The tokens of `text`, with those that the file's post_processor puts around it. O(n log n) in its length. Throws
  /// std::invalid_argument for what is not UTF-8, FileError for what the vocabulary cannot express.
  Encoding encode(const std::string& text) const { return kind_->encode(text); }

  /// Nothing for a word outside the vocabulary.
  std::optional<TokenId> id_of(const std::string& word) const { return kind_->id_of(word); }

  const std::filesystem::path& file() const { return file_; }

  /// The bytes that a token adds to a text. Byte-level tokens can end inside a character; an id without a word is <id>.
  std::string text_of(TokenId id, bool at_begin) const { return kind_->text_of(id, at_begin); }

  /// The text of all of them. Byte for byte what was encoded, except that words had any white space between them and
  /// that a normalizer changed what it changed.
  std::string decode(const std::vector<TokenId>& ids) const {
    std::string text;
    for (std::size_t i = 0; i < ids.size(); ++i) text += text_of(ids[i], i == 0);
    return text;
  }

 private:
  std::filesystem::path file_;
  std::shared_ptr<const Kind> kind_;
};

/// The text of tokens as they come, for a terminal: always UTF-8. A character whose bytes are spread over tokens
/// appears with its last byte; bytes that are none become U+FFFD.
class TextStream {
 public:
  explicit TextStream(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}

  /// What can be shown now.
  std::string push(TokenId token);

  /// The rest, when no more tokens come.
  std::string finish();

 private:
  const Tokenizer& tokenizer_;
  bool at_begin_ = true;
  std::string waiting_;
};

/// `ids` as a text that a terminal can show.
std::string printable_text(const Tokenizer& tokenizer, const std::vector<TokenId>& ids);

}  // namespace kvsparse_tools
