// SPDX-License-Identifier: Apache-2.0
// CSV lines from the fields that also make up the JSON, so that both files say the same.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace kvsparse_tools {

/// A null is an empty cell. A text that holds a comma or a quote is quoted, as RFC 4180 has it.
inline std::string csv_cell(const nlohmann::ordered_json& value) {
  if (value.is_null()) return "";
  if (!value.is_string()) return value.dump();
  const auto text = value.get<std::string>();
  if (text.find_first_of(",\"\n") == std::string::npos) return text;
  std::string quoted = "\"";
  for (const char c : text) quoted += c == '"' ? std::string("\"\"") : std::string(1, c);
  return quoted + "\"";
}

/// The names of the fields.
inline std::string csv_header(const nlohmann::ordered_json& fields) {
  std::string line;
  for (const auto& [name, value] : fields.items()) line += (line.empty() ? "" : ",") + name;
  return line + "\n";
}

inline std::string csv_line(const nlohmann::ordered_json& fields) {
  std::string line;
  bool first = true;
  for (const auto& [name, value] : fields.items()) {
    if (!first) line += ',';
    line += csv_cell(value);
    first = false;
  }
  return line + "\n";
}

}  // namespace kvsparse_tools
