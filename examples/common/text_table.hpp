// SPDX-License-Identifier: Apache-2.0
// Columns that line up, and numbers worded for people.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

namespace kvsparse_tools {

inline std::string fixed_text(double value, int digits) {
  std::array<char, 64> buffer{};
  std::snprintf(buffer.data(), buffer.size(), "%.*f", digits, value);
  return buffer.data();
}

inline std::string bytes_text(std::uint64_t bytes) {
  const auto value = static_cast<double>(bytes);
  if (bytes < 1024) return std::to_string(bytes) + " B";
  if (bytes < 1024 * 1024) return fixed_text(value / 1024.0, 1) + " KiB";
  if (bytes < std::uint64_t{1} << 30) return fixed_text(value / (1024.0 * 1024.0), 1) + " MiB";
  return fixed_text(value / (1024.0 * 1024.0 * 1024.0), 2) + " GiB";
}

/// A table whose first column is left-aligned and whose other columns are right-aligned.
class TextTable {
 public:
  explicit TextTable(std::vector<std::string> header) { rows_.push_back(std::move(header)); }

  void add_row(std::vector<std::string> row) {
    row.resize(rows_.front().size());
    rows_.push_back(std::move(row));
  }

  void print(std::ostream& out) const {
    std::vector<std::size_t> widths(rows_.front().size(), 0);
    for (const auto& row : rows_) {
      for (std::size_t c = 0; c < row.size(); ++c) widths[c] = std::max(widths[c], row[c].size());
    }
    for (std::size_t r = 0; r < rows_.size(); ++r) {
      print_row(out, rows_[r], widths);
      if (r == 0) print_rule(out, widths);
    }
  }

 private:
  static void print_row(std::ostream& out, const std::vector<std::string>& row,
                        const std::vector<std::size_t>& widths) {
    for (std::size_t c = 0; c < row.size(); ++c) {
      const std::string padding(widths[c] - row[c].size(), ' ');
      const bool last = c + 1 == row.size();
      out << (c == 0 ? row[c] + (last ? "" : padding) : "  " + padding + row[c]);
    }
    out << '\n';
  }

  static void print_rule(std::ostream& out, const std::vector<std::size_t>& widths) {
    std::size_t total = 0;
    for (const std::size_t width : widths) total += width;
    out << std::string(total + 2 * (widths.size() - 1), '-') << '\n';
  }

  std::vector<std::vector<std::string>> rows_;
};

}  // namespace kvsparse_tools
