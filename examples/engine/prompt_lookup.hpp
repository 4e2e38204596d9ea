// SPDX-License-Identifier: Apache-2.0
// Guesses at what comes next, from the text itself: what followed the last few tokens when they came before. Right
// often where a text repeats itself, as code, quotations and chains of reasoning do; it costs no second model.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <map>
#include <span>
#include <vector>

#include "vocabulary.hpp"

namespace kvsparse_tools {

class PromptLookup {
 public:
  void add(TokenId token) {
    // A run of tokens is remembered when its follower comes, so the end of the text never finds itself.
    for (const std::size_t length : run_lengths) {
      if (text_.size() >= length) followers_[last_run(length)] = text_.size();
    }
    text_.push_back(token);
  }

  /// Up to `most` tokens that followed the latest earlier occurrence of the text's last tokens; none if there is none.
  /// O(most + log n) for n tokens so far.
  std::vector<TokenId> guess(std::size_t most) const {
    for (const std::size_t length : run_lengths) {
      if (text_.size() < length) continue;
      const auto found = followers_.find(last_run(length));
      if (found == followers_.end()) continue;
      const std::span<const TokenId> rest = std::span(text_).subspan(found->second);
      return {rest.begin(), rest.begin() + static_cast<std::ptrdiff_t>(std::min(most, rest.size()))};
    }
    return {};
  }

 private:
  static constexpr std::array<std::size_t, 2> run_lengths{3, 2};  // the longer one says more

  std::vector<TokenId> last_run(std::size_t length) const {
    return {text_.end() - static_cast<std::ptrdiff_t>(length), text_.end()};
  }

  std::vector<TokenId> text_;
  std::map<std::vector<TokenId>, std::size_t> followers_;  // where the text went on after the latest such run
};

}  // namespace kvsparse_tools
