// SPDX-License-Identifier: Apache-2.0
// --report: one page that needs nothing but itself. What it shows is data inside of it; page/page.js draws that as SVG.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "page_text.hpp"
#include "waterfall.hpp"

namespace kvsparse_tools {

namespace detail {

/// Each {{name}} of `page` becomes value(name), which is not looked at again.
inline std::string filled_in(std::string_view page, const std::function<std::string(std::string_view)>& value) {
  std::string text;
  for (;;) {
    const std::size_t begin = page.find("{{");
    const std::size_t end = page.find("}}", begin);
    if (begin == std::string_view::npos || end == std::string_view::npos) return text.append(page);
    text.append(page.substr(0, begin)).append(value(page.substr(begin + 2, end - begin - 2)));
    page.remove_prefix(end + 2);
  }
}

inline std::string escaped_html(std::string_view text) {
  std::string escaped;
  for (const char character : text) {
    switch (character) {
      case '&': escaped += "&amp;"; break;
      case '<': escaped += "&lt;"; break;
      case '>': escaped += "&gt;"; break;
      case '"': escaped += "&quot;"; break;
      case '\'': escaped += "&#39;"; break;
      default: escaped += character;
    }
  }
  return escaped;
}

/// JSON that may stand inside of a <script>: nothing in it can end that element or begin another. What is no UTF-8
/// becomes the replacement character.
inline std::string script_json(const nlohmann::ordered_json& data) {
  std::string escaped;
  for (const char character : data.dump(-1, ' ', true, nlohmann::ordered_json::error_handler_t::replace)) {
    switch (character) {  // all three occur in strings alone
      case '<': escaped += "\\u003c"; break;
      case '>': escaped += "\\u003e"; break;
      case '&': escaped += "\\u0026"; break;
      default: escaped += character;
    }
  }
  return escaped;
}

/// Four significant digits, which is more than a reader wants; null for what is not finite.
inline nlohmann::ordered_json short_number(double value) {
  if (!std::isfinite(value)) return {};
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%.4g", value);
  return std::strtod(buffer, nullptr);
}

}  // namespace detail

/// The waterfalls of one run, by kv head.
using RunWaterfalls = std::vector<Waterfall>;

inline nlohmann::ordered_json waterfall_data(const Waterfall& waterfall) {
  using Json = nlohmann::ordered_json;
  Json resident = Json::array(), read = Json::array(), share = Json::array(), error = Json::array();
  for (const Waterfall::Row& row : waterfall.rows()) {
    resident.push_back(row.resident_tokens);
    read.push_back(row.read_tokens);
    share.push_back(std::round(row.share * 1e6) / 1e6);
    error.push_back(detail::short_number(row.error));
  }
  Json evicted = Json::object();
  for (const auto& [row, gone] : waterfall.evicted()) evicted[std::to_string(row)] = {gone.tokens, gone.ranges};
  return {{"columns", waterfall.text()}, {"resident", std::move(resident)}, {"read", std::move(read)},
          {"share", std::move(share)},   {"error", std::move(error)},       {"evicted", std::move(evicted)}};
}

/// data: what --json holds, and in each of its results "run", an index into `runs`, or null.
inline std::string html_report(nlohmann::ordered_json data, const WaterfallGrid& grid,
                               const std::vector<RunWaterfalls>& runs) {
  using Json = nlohmann::ordered_json;
  data["grid"] = {{"steps", grid.steps},     {"first_step", grid.first_step()},     {"step_stride", grid.step_stride},
                  {"columns", grid.columns}, {"column_tokens", grid.column_tokens}, {"kv_heads", grid.kv_heads}};
  data["runs"] = Json::array();
  for (const RunWaterfalls& run : runs) {
    Json heads = Json::array();
    for (const Waterfall& waterfall : run) heads.push_back(waterfall_data(waterfall));
    data["runs"].push_back(std::move(heads));
  }
  data["looks"] = Json::parse(report_page_looks);
  const std::string trace_name = std::filesystem::path(data["trace"]["file"].get<std::string>()).filename().string();
  return detail::filled_in(report_page_html, [&](std::string_view name) -> std::string {
    if (name == "trace") return detail::escaped_html(trace_name);
    if (name == "style") return report_page_css;
    if (name == "script") return report_page_js;
    return detail::script_json(data);
  });
}

}  // namespace kvsparse_tools
