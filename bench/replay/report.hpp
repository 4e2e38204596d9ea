// SPDX-License-Identifier: Apache-2.0
// What bench/replay found: as a table for people, as JSON and CSV for machines.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <optional>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "common/csv.hpp"
#include "common/text_table.hpp"
#include "options.hpp"
#include "policy_run.hpp"

namespace kvsparse_tools {

/// Version of the JSON that --json writes; raised when a field changes its meaning or goes.
inline constexpr int replay_json_schema = 1;

struct ReplayResult {
  std::string policy;
  std::size_t budget_tokens = 0;
  std::optional<std::size_t> read_budget_tokens;  // of policies that select
  std::string refused;                            // why there are no figures; empty where there are
  ReplayMetrics metrics;
  kvsparse::CacheStats cache;
};

class ReplayReport {
 public:
  ReplayReport(const ReplayOptions& options, const Trace& trace) : options_(options), trace_(trace) {}

  /// What is known after the first `tokens` tokens of the trace.
  void update(std::size_t tokens, std::vector<ReplayResult> results) {
    replayed_tokens_ = tokens;
    results_ = std::move(results);
  }

  using Json = nlohmann::ordered_json;

  Json data() const {
    Json json{{"schema", replay_json_schema}, {"tool", "replay"}, {"complete", replayed_tokens_ == trace_.tokens}};
    json["trace"] = {{"file", options_.trace_file},           {"tokens", trace_.tokens},
                     {"prompt_tokens", trace_.prompt_tokens}, {"query_heads", trace_.query_heads},
                     {"kv_heads", trace_.kv_heads},           {"head_dim", trace_.head_dim}};
    json["replayed_tokens"] = replayed_tokens_;
    json["page_size"] = options_.page_size;
    json["dtype"] = dtype();
    json["settings"] = options_.setting_texts;
    json["results"] = Json::array();
    for (const ReplayResult& result : results_) json["results"].push_back(fields(result));
    return json;
  }

  std::string json() const { return data().dump(2, ' ', false, Json::error_handler_t::replace) + "\n"; }

  /// A header line, then one line per result. An unknown value is an empty cell.
  std::string csv() const {
    std::string text = csv_header(fields({}));
    for (const ReplayResult& result : results_) text += csv_line(fields(result));
    return text;
  }

  void print(std::ostream& out) const {
    out << trace_.tokens << " tokens, " << trace_.prompt_tokens << " of them prompt; " << trace_.query_heads
        << " query heads over " << trace_.kv_heads << " kv heads, head_dim " << trace_.head_dim << "; pages of "
        << options_.page_size << " tokens, stored as " << dtype() << '\n';
    if (replayed_tokens_ < trace_.tokens) {
      out << "interrupted: the table covers the first " << replayed_tokens_ << " tokens only\n";
    }
    out << '\n';
    print_table(out);
    print_legend(out);
  }

 private:
  std::string dtype() const {
    return std::string(kvsparse::scalar_type_names[static_cast<std::size_t>(options_.dtype)]);
  }

  /// The columns of both files. NaN and infinity become null, as does every figure of what was refused.
  static Json fields(const ReplayResult& result) {
    const auto number = [](double value) { return std::isfinite(value) ? Json(value) : Json(); };
    Json json{{"policy", result.policy}, {"budget_tokens", result.budget_tokens}};
    json["read_budget_tokens"] = result.read_budget_tokens ? Json(*result.read_budget_tokens) : Json();
    json["refused"] = result.refused.empty() ? Json() : Json(result.refused);
    const auto count = [&](std::size_t value) { return result.refused.empty() ? Json(value) : Json(); };
    json["decode_steps"] = count(result.metrics.decode_steps);
    json["share"] = number(result.metrics.share);
    json["mean_error"] = number(result.metrics.mean_error);
    json["max_error"] = number(result.metrics.max_error);
    json["peak_resident_tokens"] = count(result.cache.peak_resident_tokens);
    json["peak_resident_bytes"] = count(result.cache.peak_resident_bytes);
    json["final_resident_bytes"] = count(result.cache.resident_bytes);
    json["evicted_tokens"] = count(result.cache.evicted_tokens);
    json["used_page_share"] = number(result.cache.used_page_share);
    json["mean_step_us"] = number(result.metrics.mean_step_us);
    return json;
  }

  /// Three significant digits.
  static std::string error_text(const ReplayMetrics& metrics, double value) {
    if (metrics.decode_steps == 0) return "-";
    if (!std::isfinite(value)) return "not finite";  // products of the trace exceed what a float holds
    char buffer[32];
    std::snprintf(buffer, sizeof buffer, "%.3g", value);
    return buffer;
  }

  bool any_selects() const {
    return std::any_of(results_.begin(), results_.end(), [](const ReplayResult& r) { return r.read_budget_tokens; });
  }
  bool any_judges() const {
    return std::any_of(results_.begin(), results_.end(),
                       [](const ReplayResult& r) { return !std::isnan(r.cache.used_page_share); });
  }

  void print_table(std::ostream& out) const {
    std::vector<std::string> header{"policy", "budget"};
    if (any_selects()) header.emplace_back("read budget");
    for (const char* name : {"mass read", "mean error", "max error", "peak tokens", "peak bytes", "evicted"}) {
      header.emplace_back(name);
    }
    if (any_judges()) header.emplace_back("used pages");
    header.emplace_back("us/step");
    TextTable table(header);
    for (const ReplayResult& result : results_) {
      const ReplayMetrics& m = result.metrics;
      std::vector<std::string> row{result.policy, std::to_string(result.budget_tokens)};
      if (any_selects()) row.push_back(result.read_budget_tokens ? std::to_string(*result.read_budget_tokens) : "-");
      row.push_back(std::isfinite(m.share) ? fixed_text(100.0 * m.share, 2) + " %" : "-");
      row.push_back(error_text(m, m.mean_error));
      row.push_back(error_text(m, m.max_error));
      const auto unless_refused = [&](std::string text) { return result.refused.empty() ? std::move(text) : "-"; };
      row.push_back(unless_refused(std::to_string(result.cache.peak_resident_tokens)));
      row.push_back(unless_refused(bytes_text(result.cache.peak_resident_bytes)));
      row.push_back(unless_refused(std::to_string(result.cache.evicted_tokens)));
      const double used = result.cache.used_page_share;
      if (any_judges()) row.push_back(std::isfinite(used) ? fixed_text(100.0 * used, 1) + " %" : "-");
      row.push_back(std::isfinite(m.mean_step_us) ? fixed_text(m.mean_step_us, 1) : "-");
      table.add_row(std::move(row));
    }
    table.print(out);
    bool first = true;
    for (const ReplayResult& result : results_) {
      if (result.refused.empty()) continue;
      if (std::exchange(first, false)) out << "\nrefused:\n";
      out << "  " << result.policy << " at budget " << result.budget_tokens << ": " << result.refused << '\n';
    }
  }

  void print_legend(std::ostream& out) const {
    out << "\nbudget       tokens a kv head may keep; dense keeps everything, as does what only selects (quest, "
           "oracle)\n";
    if (any_selects()) out << "read budget  tokens a query may read of those kept\n";
    out << "mass read    share of the dense softmax that lies on the tokens read (by any query head of the kv head's "
           "group),\n             mean over decode queries and query heads\n"
           "error        |out - dense| / |dense| of a query head, dense in double from the f32 trace; mean and max "
           "over "
           "the same\n"
           "peak tokens  most tokens that one kv head held at once, prompt included; where heads share a budget, on "
           "average\n"
           "peak bytes   most memory of resident pages: keys, values, page summaries and policy state, all kv heads\n"
           "evicted      tokens given up for good, summed over kv heads\n";
    if (any_judges()) {
      out << "used pages   share of the evictable pages that the policy found used, per step: near 100 % it is "
             "first-in first-out,\n             near 0 % it has no evidence\n";
    }
    out << "us/step      microseconds per decode token, append and attend, mean; kvsparse_bench measures speed with "
           "more care\n";
  }

  const ReplayOptions& options_;
  const Trace& trace_;
  std::size_t replayed_tokens_ = 0;
  std::vector<ReplayResult> results_;
};

}  // namespace kvsparse_tools
