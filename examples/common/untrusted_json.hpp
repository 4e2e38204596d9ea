// SPDX-License-Identifier: Apache-2.0
// JSON that somebody else wrote: bounded depth, no duplicate keys, one sentence when it does not parse.
#pragma once

#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "file_error.hpp"

namespace kvsparse_tools {

/// Parses `text` (taken from `file`, which only names it in errors). Nesting deeper than `max_depth` is refused while
/// parsing, so a hostile file cannot make the parser build it. Duplicate keys are refused because parsers differ in
/// which of the two they keep.
inline nlohmann::json parse_untrusted_json(std::string_view text, const std::filesystem::path& file, int max_depth) {
  using Json = nlohmann::json;
  refuse_git_lfs_pointer(file, text);
  std::vector<std::set<std::string>> keys_at_depth;
  const auto guard = [&](int depth, Json::parse_event_t event, Json& parsed) {
    const bool opens = event == Json::parse_event_t::object_start || event == Json::parse_event_t::array_start;
    if (opens && depth >= max_depth) {
      throw FileError(file, "JSON nested deeper than the limit of " + std::to_string(max_depth) + " levels");
    }
    const auto level = static_cast<std::size_t>(depth);
    if (event == Json::parse_event_t::object_start) {
      if (keys_at_depth.size() < level + 2) keys_at_depth.resize(level + 2);
      keys_at_depth[level + 1].clear();  // the keys of this object are reported one level below it
    } else if (event == Json::parse_event_t::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!keys_at_depth[level].insert(key).second)
        throw FileError(file, "JSON key " + in_quotes(key) + " appears twice");
    }
    return true;
  };
  try {
    return Json::parse(text.begin(), text.end(), guard);
  } catch (const Json::exception& error) {
    std::string_view reason = error.what();
    if (const auto end = reason.find("] "); end != std::string_view::npos) reason.remove_prefix(end + 2);
    throw FileError(file, "not valid JSON: " + in_quotes(reason, 200));
  }
}

}  // namespace kvsparse_tools
