// SPDX-License-Identifier: Apache-2.0
// What tokenizers ask of Unicode, through ICU: normal form C, and patterns over character classes.
#pragma once

#include <cstddef>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace kvsparse_tools {

/// Throws std::invalid_argument, naming the first byte that is wrong, unless `text` is UTF-8.
void check_utf8(std::string_view text);

/// Each maximal ill-formed part of `text` replaced by U+FFFD, so that a terminal can show it.
std::string printable_utf8(std::string_view text);

/// How many bytes at the end of `text` may be the beginning of a character whose rest is still to come: 0 to 3.
std::size_t unfinished_utf8_bytes(std::string_view text);

/// Normal form C of UTF-8 text.
std::string normal_form_c(std::string_view text);

/// A regular expression from a tokenizer.json, written for Oniguruma. Accepted is what Oniguruma and ICU read alike:
/// literals, \p{..} with a general category, \s, \S, \r, \n, \t, classes without classes in them, groups, (?i:..),
/// lookahead, alternatives, and single quantifiers.
class TextPattern {
 public:
  /// Throws FileError, naming `file` and the part that is not accepted.
  TextPattern(const std::string& pattern, std::filesystem::path file);

  /// The matches and what lies between them, in order, empty ones left out: together they are `text`. Throws FileError
  /// when the pattern needs too much time on this text.
  std::vector<std::string> split(std::string_view text) const;

 private:
  struct Compiled;
  std::shared_ptr<const Compiled> compiled_;
  std::filesystem::path file_;
};

}  // namespace kvsparse_tools
