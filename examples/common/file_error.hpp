// SPDX-License-Identifier: Apache-2.0
// The one exception of the tools for input that cannot be used, and the helpers that word its sentence.
#pragma once

#include <algorithm>
#include <cstddef>
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

/// Bytes of the printable character that `text` begins with; 0 for a control character and for what is not UTF-8.
inline std::size_t printable_character_bytes(std::string_view text) {
  const auto byte = [&](std::size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0U; };
  const unsigned lead = byte(0);
  if (lead < 0x80) return lead >= 0x20 && lead != 0x7f ? 1 : 0;
  if (lead < 0xc2 || lead > 0xf4) return 0;
  const std::size_t bytes = lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
  for (std::size_t i = 1; i < bytes; ++i) {
    if ((byte(i) & 0xc0U) != 0x80) return 0;
  }
  // The second byte tells control characters, overlong forms, surrogates and what lies beyond Unicode.
  const unsigned least = lead == 0xc2 || lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
  const unsigned most = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
  return byte(1) >= least && byte(1) <= most ? bytes : 0;
}

/// Text from an untrusted file, fit for one line of a terminal: quoted, cut to `longest` bytes, with a '?' for each
/// byte that is of no printable character.
inline std::string in_quotes(std::string_view text, std::size_t longest = 80) {
  std::string out = "'";
  std::size_t at = 0;
  while (at < text.size()) {
    const std::size_t bytes = printable_character_bytes(text.substr(at, 4));
    if (at + std::max<std::size_t>(bytes, 1) > longest) break;
    out += bytes == 0 ? "?" : text.substr(at, bytes);
    at += std::max<std::size_t>(bytes, 1);
  }
  return out + (at < text.size() ? "...'" : "'");
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

/// What git clone leaves in a large file's place when Git LFS is not installed: a text of three lines.
inline void refuse_git_lfs_pointer(const std::filesystem::path& file, std::string_view beginning) {
  if (beginning.rfind("version https://git-lfs", 0) != 0) return;
  throw FileError(file, "is a Git LFS pointer, not the file itself; `git lfs pull` in its directory fetches that");
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
