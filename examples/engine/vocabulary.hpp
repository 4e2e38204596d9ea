// SPDX-License-Identifier: Apache-2.0
// The words of a tokenizer.json and their ids.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>

#include "../common/file_error.hpp"

namespace kvsparse_tools {

using TokenId = std::uint32_t;

class Vocabulary {
 public:
  /// `file` only names the file in errors.
  Vocabulary(std::filesystem::path file, std::size_t vocab_size) : file_(std::move(file)), vocab_size_(vocab_size) {}

  /// A word may come twice with one id, as added tokens do; two words never share an id. Throws FileError.
  TokenId add(const std::string& word, const nlohmann::json& id) {
    if (!id.is_number_unsigned() || id.get<std::uint64_t>() >= vocab_size_) {
      fail("the word " + in_quotes(word) + " has the id " + in_quotes(id.dump()) +
           ", it must be less than the model's vocab_size " + std::to_string(vocab_size_));
    }
    const auto token = static_cast<TokenId>(id.get<std::uint64_t>());
    if (const auto [known, is_new] = ids_.emplace(word, token); !is_new && known->second != token) {
      fail("the word " + in_quotes(word) + " has two ids, " + std::to_string(known->second) + " and " +
           std::to_string(token));
    }
    if (const auto [known, is_new] = words_.emplace(token, word); !is_new && known->second != word) {
      fail("the words " + in_quotes(known->second) + " and " + in_quotes(word) + " share the id " +
           std::to_string(token));
    }
    return token;
  }

  std::optional<TokenId> id_of(const std::string& word) const {
    const auto found = ids_.find(word);
    return found == ids_.end() ? std::nullopt : std::optional(found->second);
  }

  /// Null for an id without a word.
  const std::string* word_of(TokenId id) const {
    const auto found = words_.find(id);
    return found == words_.end() ? nullptr : &found->second;
  }

  [[noreturn]] void fail(const std::string& problem) const { throw FileError(file_, problem); }

 private:
  std::filesystem::path file_;
  std::size_t vocab_size_;
  std::unordered_map<std::string, TokenId> ids_;
  std::unordered_map<TokenId, std::string> words_;
};

}  // namespace kvsparse_tools
