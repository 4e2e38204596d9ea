// SPDX-License-Identifier: Apache-2.0
// Options that take lists and counts, and the files of a command line that must not be the same.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "file_error.hpp"
#include "output_file.hpp"
#include "policy_settings.hpp"

namespace kvsparse_tools {

/// The parts between separators, one more than there are separators.
inline std::vector<std::string> split_at(char separator, std::string_view text) {
  std::vector<std::string> parts;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(separator, begin), text.size());
    parts.emplace_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

/// The parts between commas, without the blanks around them. Keeps empty parts, because "a,,b" is a slip of the pen.
inline std::vector<std::string> list_of(std::string_view text) {
  std::vector<std::string> parts = split_at(',', text);
  for (std::string& part : parts) {
    part.erase(0, part.find_first_not_of(" \t\n"));
    part.erase(part.find_last_not_of(" \t\n") + 1);
  }
  return parts;
}

inline std::size_t parse_count(const std::string& option, const std::string& text, std::size_t least,
                               std::size_t largest) {
  std::size_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || value < least || value > largest) {
    throw UsageError(option + " got " + in_quotes(text) + ", a whole number from " + std::to_string(least) + " to " +
                     std::to_string(largest) + " was expected");
  }
  return value;
}

template <class Value>
void refuse_repeats(const std::string& option, const std::vector<Value>& values,
                    const std::vector<std::string>& texts) {
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (std::find(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(i), values[i]) !=
        values.begin() + static_cast<std::ptrdiff_t>(i)) {
      throw UsageError(option + " lists " + in_quotes(texts[i]) + " twice");
    }
  }
}

inline std::vector<std::size_t> parse_counts(const std::string& option, const std::string& text, std::size_t least,
                                             std::size_t largest) {
  const std::vector<std::string> texts = list_of(text);
  std::vector<std::size_t> counts;
  for (const std::string& part : texts) counts.push_back(parse_count(option, part, least, largest));
  refuse_repeats(option, counts, texts);
  return counts;
}

inline constexpr std::size_t largest_budget = std::size_t{1} << 40;  // the library's own limit of a size

inline std::vector<std::size_t> parse_budgets(const std::string& text) {
  return parse_counts("--budget", text, 1, largest_budget);
}

inline kvsparse::ScalarType parse_dtype(const std::string& text) {
  const auto known = std::find(std::begin(kvsparse::scalar_type_names), std::end(kvsparse::scalar_type_names), text);
  if (known == std::end(kvsparse::scalar_type_names)) {
    throw UsageError("--dtype got " + in_quotes(text) + ", f32, f16, bf16 or int8 was expected");
  }
  return kvsparse::scalar_type(text);
}

/// Whether two names, possibly of files that do not exist yet, mean one file.
inline bool same_file(const std::filesystem::path& a, const std::filesystem::path& b) {
  std::error_code error;
  if (std::filesystem::equivalent(a, b, error)) return true;
  const auto place = [&](const std::filesystem::path& file) {
    return std::filesystem::weakly_canonical(std::filesystem::absolute(file, error), error);
  };
  return place(a) == place(b);
}

/// No output may overwrite an input or another output; files: option and name, empty names aside.
inline void refuse_shared_files(const std::vector<std::pair<std::string, std::string>>& files) {
  for (std::size_t i = 0; i < files.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      if (files[i].second.empty() || files[j].second.empty() || is_stream(files[i].second)) continue;
      if (same_file(files[i].second, files[j].second)) {
        throw UsageError(files[j].first + " and " + files[i].first + " name the same file " +
                         in_quotes(files[i].second));
      }
    }
  }
}

}  // namespace kvsparse_tools
