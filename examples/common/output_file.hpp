// SPDX-License-Identifier: Apache-2.0
// Files we write: complete or not there at all, so that an interrupt never leaves half a result under its final name.
#pragma once

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <ostream>
#include <string>
#include <string_view>

#include "file_error.hpp"

namespace kvsparse_tools {

/// A device, a pipe, or one of this process's open files (/dev/stdout, even when it is redirected to a regular file):
/// it takes what is written, and must never be renamed over.
inline bool is_stream(const std::filesystem::path& file) {
  const std::string name = file.lexically_normal().string();
  if (name.rfind("/dev/", 0) == 0 || name.rfind("/proc/", 0) == 0) return true;
  std::error_code error;
  const auto status = std::filesystem::status(file, error);
  return std::filesystem::exists(status) && !std::filesystem::is_regular_file(status) &&
         !std::filesystem::is_directory(status);
}

/// Calls `write` on a stream to a temporary neighbour of `file` and renames it into place. Devices and pipes
/// cannot be renamed over and are written directly; a symbolic link keeps pointing.
inline void write_file(const std::filesystem::path& file, const std::function<void(std::ostream&)>& write) {
  namespace fs = std::filesystem;
  std::error_code error;
  const fs::file_status status = fs::status(file, error);
  if (fs::is_directory(status)) throw FileError(file, "is a directory, a file was expected");
  if (file == "/dev/stdout") {  // opened a second time, a redirected stdout would be written over from its beginning
    write(std::cout);
    std::cout.flush();
    return;
  }
  const bool direct = is_stream(file);
  fs::path target = file;
  if (!direct && fs::is_symlink(fs::symlink_status(file, error)) && fs::exists(status))
    target = fs::canonical(file, error);
  fs::path written = target;
  if (!direct) written += ".partial." + std::to_string(::getpid());
  {
    std::ofstream out(written, direct ? std::ios::binary | std::ios::app : std::ios::binary);
    if (!out) throw FileError(file, "cannot be opened for writing");
    write(out);
    out.flush();
    if (!out) {
      out.close();
      if (!direct) fs::remove(written, error);
      throw FileError(file, "could not be written (is the disk full?)");
    }
  }
  if (direct) return;
  fs::rename(written, target, error);
  if (error) {
    const std::string reason = error.message();
    fs::remove(written, error);
    throw FileError(file, "could not be put in place: " + reason);
  }
}

inline void write_text_file(const std::filesystem::path& file, std::string_view text) {
  write_file(file, [&](std::ostream& out) { out.write(text.data(), static_cast<std::streamsize>(text.size())); });
}

}  // namespace kvsparse_tools
