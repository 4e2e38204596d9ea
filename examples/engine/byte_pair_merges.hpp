// SPDX-License-Identifier: Apache-2.0
// Byte pair encoding: which two neighbouring tokens become one, and in what order.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <queue>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "vocabulary.hpp"

namespace kvsparse_tools {

class BytePairMerges {
 public:
  /// `merges`: an array whose entries are "left right" or ["left", "right"], the first to be done first. Both sides and
  /// the token they make must be words of `vocabulary`. Throws FileError.
  BytePairMerges(const nlohmann::json& merges, const Vocabulary& vocabulary) {
    if (!merges.is_array()) vocabulary.fail("its merges are not an array");
    merges_.reserve(merges.size());
    for (const nlohmann::json& entry : merges) {
      const auto [left, right] = sides(entry, vocabulary);
      const auto known_id = [&](const std::string& word) {
        const auto id = vocabulary.id_of(word);
        if (!id)
          vocabulary.fail("the merge " + in_quotes(entry.dump()) + " needs the word " + in_quotes(word) +
                          ", which its vocab lacks");
        return *id;
      };
      const auto pair = key(known_id(left), known_id(right));
      if (!merges_.emplace(pair, Merge{merges_.size(), known_id(left + right)}).second) {
        vocabulary.fail("the merge " + in_quotes(entry.dump()) + " appears twice");
      }
    }
  }

  /// Merges neighbours, of all possible merges always the earliest in the list and among equals the leftmost, until
  /// none is possible. O(n log n) for n tokens.
  std::vector<TokenId> apply(std::vector<TokenId> tokens) const {
    constexpr std::size_t none = SIZE_MAX;
    struct Node {
      TokenId token;
      std::size_t before, after;
      bool merged_away;
    };
    std::vector<Node> nodes;
    nodes.reserve(tokens.size());
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      nodes.push_back({tokens[i], i == 0 ? none : i - 1, i + 1 == tokens.size() ? none : i + 1, false});
    }

    // Candidates stay in the queue when a merge beside them outdates them; `left` and `right` tell.
    struct Candidate {
      std::size_t rank, at;
      TokenId left, right, merged;
      bool operator>(const Candidate& other) const { return std::tie(rank, at) > std::tie(other.rank, other.at); }
    };
    std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> candidates;
    const auto propose = [&](std::size_t at) {
      if (at == none || nodes[at].after == none) return;
      const TokenId left = nodes[at].token;
      const TokenId right = nodes[nodes[at].after].token;
      const auto merge = merges_.find(key(left, right));
      if (merge != merges_.end()) candidates.push({merge->second.rank, at, left, right, merge->second.token});
    };
    for (std::size_t i = 0; i < nodes.size(); ++i) propose(i);

    while (!candidates.empty()) {
      const Candidate best = candidates.top();
      candidates.pop();
      Node& node = nodes[best.at];
      if (node.merged_away || node.after == none || node.token != best.left) continue;
      Node& gone = nodes[node.after];
      if (gone.token != best.right) continue;
      node.token = best.merged;
      node.after = gone.after;
      gone.merged_away = true;
      if (node.after != none) nodes[node.after].before = best.at;
      propose(node.before);
      propose(best.at);
    }

    tokens.clear();
    for (const Node& node : nodes) {
      if (!node.merged_away) tokens.push_back(node.token);
    }
    return tokens;
  }

 private:
  struct Merge {
    std::size_t rank;
    TokenId token;
  };

  static std::uint64_t key(TokenId left, TokenId right) { return std::uint64_t{left} << 32 | right; }

  static std::pair<std::string, std::string> sides(const nlohmann::json& entry, const Vocabulary& vocabulary) {
    if (entry.is_array() && entry.size() == 2 && entry[0].is_string() && entry[1].is_string()) {
      return {entry[0].get<std::string>(), entry[1].get<std::string>()};
    }
    if (entry.is_string()) {
      const auto& text = entry.get_ref<const std::string&>();
      const std::size_t blank = text.find(' ');
      if (blank != std::string::npos && text.find(' ', blank + 1) == std::string::npos) {
        return {text.substr(0, blank), text.substr(blank + 1)};
      }
    }
    vocabulary.fail("the merge " + in_quotes(entry.dump()) + " is not a pair of words");
  }

  std::unordered_map<std::uint64_t, Merge> merges_;  // by pair of tokens
};

}  // namespace kvsparse_tools
