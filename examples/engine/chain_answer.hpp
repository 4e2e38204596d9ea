// SPDX-License-Identifier: Apache-2.0
// The answer in a text that our own test models write.
#pragma once

#include <optional>
#include <sstream>
#include <string>

namespace kvsparse_tools {

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
