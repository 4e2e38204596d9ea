// SPDX-License-Identifier: Apache-2.0
// The one exception of the tools for input that cannot be used, and the helpers that word its sentence.
#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <string_view>

namespace kvsparse_tools {

/// A file that cannot be read, is malformed, or asks for something unsupported. what() is one sentence for people.
class FileError : public std::runtime_error {
 public:
  FileError(const std::filesystem::path& file, const std::string& problem)
      : std::runtime_error(file.string() + ": " + problem) {}
};

/// Text from an untrusted file, fit for one line of a terminal: quoted, shortened, without control characters.
inline std::string in_quotes(std::string_view text, std::size_t longest = 80) {
  std::string out = "'";
  for (const char c : text.substr(0, longest)) {
    const bool control = static_cast<unsigned char>(c) < 0x20 || c == 0x7f;
    out += control ? '?' : c;
  }
  return out + (text.size() > longest ? "...'" : "'");
}

/// Size of a regular file; anything else (missing, a directory, a device) is refused.
inline std::uint64_t regular_file_size(const std::filesystem::path& file) {
  std::error_code error;
  const auto status = std::filesystem::status(file, error);
  if (!std::filesystem::exists(status)) throw FileError(file, "no such file");
  if (!std::filesystem::is_regular_file(status)) throw FileError(file, "not a regular file");
  const auto size = std::filesystem::file_size(file, error);
  if (error) throw FileError(file, "its size cannot be read: " + error.message());
  return size;
}

/// A whole text file of at most `max_bytes`.
inline std::string read_text_file(const std::filesystem::path& file, std::uint64_t max_bytes) {
  const std::uint64_t size = regular_file_size(file);
  if (size > max_bytes) {
    throw FileError(file, std::to_string(size) + " bytes exceed the limit of " + std::to_string(max_bytes));
  }
  std::ifstream in(file, std::ios::binary);
  std::string text(static_cast<std::size_t>(size), '\0');
  if (!in.read(text.data(), static_cast<std::streamsize>(size))) throw FileError(file, "cannot be read");
  return text;
}

}  // namespace kvsparse_tools
