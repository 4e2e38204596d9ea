// SPDX-License-Identifier: Apache-2.0
// Words of a text that are tokens of their own whatever surrounds them, as <|eot_id|>: found before anything else.
#pragma once

#include <cstddef>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "vocabulary.hpp"

namespace kvsparse_tools {

class AddedTokens {
 public:
  static constexpr std::size_t longest = 1024;  // bytes; bounds the search at each position of a text

  /// A part of a text: plain, or the added token that it is.
  struct Part {
    std::string_view text;
    std::optional<TokenId> token;
  };

  void add(std::string_view word, TokenId token) {
    std::size_t node = 0;
    for (const char c : word) {
      const auto [next, is_new] = nodes_[node].next.emplace(c, nodes_.size());
      node = next->second;
      if (is_new) nodes_.emplace_back();
    }
    nodes_[node].token = token;
  }

  /// Cuts at the leftmost occurrences, of several that begin together at the longest. The parts are `text` in order.
  std::vector<Part> cut(std::string_view text) const {
    std::vector<Part> parts;
    std::size_t plain = 0;
    for (std::size_t at = 0; at < text.size();) {
      const Part found = longest_at(text.substr(at));
      if (!found.token) {
        ++at;
        continue;
      }
      if (at > plain) parts.push_back({text.substr(plain, at - plain), {}});
      parts.push_back(found);
      plain = at += found.text.size();
    }
    if (plain < text.size()) parts.push_back({text.substr(plain), {}});
    return parts;
  }

 private:
  struct Node {
    std::map<char, std::size_t> next;
    std::optional<TokenId> token;  // of the word that ends here
  };

  Part longest_at(std::string_view text) const {
    Part found;
    std::size_t node = 0;
    for (std::size_t i = 0; i < text.size(); ++i) {
      const auto next = nodes_[node].next.find(text[i]);
      if (next == nodes_[node].next.end()) break;
      node = next->second;
      if (nodes_[node].token) found = {text.substr(0, i + 1), nodes_[node].token};
    }
    return found;
  }

  std::vector<Node> nodes_{Node{}};
};

}  // namespace kvsparse_tools
