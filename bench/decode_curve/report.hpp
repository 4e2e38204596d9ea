// SPDX-License-Identifier: Apache-2.0
// What decode_curve found: CSV, JSON, and a summary for people.
#pragma once

#include <nlohmann/json.hpp>
#include <ostream>
#include <string>

#include "common/csv.hpp"
#include "common/text_table.hpp"
#include "curve.hpp"
#include "micro/context.hpp"

namespace kvsparse_bench {

/// Version of the JSON that --json writes; raised when a field changes its meaning or goes.
inline constexpr int curve_json_schema = 1;

class CurveReport {
 public:
  using Json = nlohmann::ordered_json;

  CurveReport(const CurveOptions& options, const DecodeCurve& curve) : options_(options), curve_(curve) {}

  std::string csv() const {
    std::string text = kvsparse_tools::csv_header(fields(CurvePoint{}));
    for (const CurvePoint& point : curve_.points()) text += kvsparse_tools::csv_line(fields(point));
    return text;
  }

  std::string json() const {
    Json json{{"schema", curve_json_schema}, {"tool", "decode_curve"}};
    json["command"] = options_.command;
    json["context"] = context_json();
    json["shape"] = shape_json(options_.shape);
    json["shape"]["dtype"] = "f16";
    json["shape"]["budget"] = options_.budget;
    json["tokens"] = options_.tokens;
    json["dense_tokens"] = options_.dense_tokens;
    json["rounds"] = curve_.rival().rounds();
    json["rounds_disturbed"] = curve_.rival().disturbed_rounds();
    json["points"] = Json::array();
    for (const CurvePoint& point : curve_.points()) json["points"].push_back(fields(point));
    json["flatness"] = Json::array();
    for (const Flatness& flat : curve_.flatness()) json["flatness"].push_back(fields(flat));
    return json.dump(2) + "\n";
  }

  void print(std::ostream& out) const {
    using kvsparse_tools::fixed_text;
    out << options_.shape.query_heads << " query heads, " << options_.shape.kv_heads << " kv heads, head_dim "
        << options_.shape.head_dim << ", pages of " << options_.shape.page_size << ", f16, budget " << options_.budget
        << "; " << processor_name() << ", " << build_info::compiler << ", commit " << build_info::commit << "\n\n";
    kvsparse_tools::TextTable points({"policy", "tokens", "us/step", "least", "append", "select", "observe",
                                      "bookkeeping", "resident", "allocator", "RSS growth", "allocations", ""});
    const auto megabytes = [](double bytes) { return fixed_text(bytes / (1 << 20), 1); };
    const auto percent = [](double share) { return fixed_text(100.0 * share, 1) + " %"; };
    for (const CurvePoint& point : curve_.points()) {
      const double total = point.phases.total();
      points.add_row({point.policy, fixed_text(point.tokens, 0), fixed_text(point.step_seconds * 1e6, 1),
                      fixed_text(point.least_seconds * 1e6, 1), percent(point.phases.append / total),
                      percent(point.phases.select / total), percent(point.phases.observe / total),
                      percent(bookkeeping(point)), megabytes(static_cast<double>(point.resident_bytes)),
                      megabytes(static_cast<double>(point.allocated_bytes)), megabytes(point.resident_growth),
                      std::to_string(point.allocations), point.disturbed ? "disturbed" : ""});
    }
    points.print(out);
    out << "\nMemory in MiB: by the cache's own count, by the allocator's, and what the process's RSS grew by in the "
           "policy's turns.\nbookkeeping: append (the victim included) and observe, as a share of the step.\n";
    for (const std::string& name : options_.policies) {
      visit_policy(name, [&]<class Policy>() {
        if (kvsparse::Evictor<Policy> || options_.dense_tokens == options_.tokens) return;
        out << name << " stops at " << options_.dense_tokens << " tokens (--dense-tokens): " << why_it_stops(name)
            << "\n";
      });
    }
    print_flatness(out);
    if (curve_.rival().disturbed_rounds() > 0) {
      out << curve_.rival().sentence()
          << (any_disturbed() ? "; what is marked is no more than a hint" : " and repeated") << "\n";
    }
  }

 private:
  static double bookkeeping(const CurvePoint& point) {
    return (point.phases.append + point.phases.observe) / point.phases.total();
  }

  static Json fields(const CurvePoint& point) {
    const double total = point.phases.total() > 0.0 ? point.phases.total() : 1.0;
    return {{"policy", point.policy},
            {"tokens", point.tokens},
            {"step_seconds", point.step_seconds},
            {"min_step_seconds", point.least_seconds},
            {"append_share", point.phases.append / total},
            {"select_share", point.phases.select / total},
            {"observe_share", point.phases.observe / total},
            {"bookkeeping_share", (point.phases.append + point.phases.observe) / total},
            {"resident_tokens", point.resident_tokens},
            {"resident_bytes", point.resident_bytes},
            {"allocator_bytes", point.allocated_bytes},
            {"rss_growth_bytes", point.resident_growth},
            {"allocations", point.allocations},
            {"disturbed", point.disturbed ? 1 : 0}};
  }
  Json fields(const Flatness& flat) const {
    const CurvePoint& last = last_of(flat.policy);
    return {{"policy", flat.policy},
            {"early_tokens", flat.early_tokens},
            {"late_tokens", flat.late_tokens},
            {"early_step_seconds", flat.early_seconds},
            {"late_step_seconds", flat.late_seconds},
            {"ratio", flat.late_seconds / flat.early_seconds},
            {"bookkeeping_share", bookkeeping(last)},
            {"allocations", last.allocations},
            {"disturbed", flat.disturbed ? 1 : 0}};
  }

  const CurvePoint& last_of(const std::string& policy) const {
    return *std::find_if(curve_.points().rbegin(), curve_.points().rend(),
                         [&](const CurvePoint& point) { return point.policy == policy; });
  }
  bool any_disturbed() const {
    const auto is_disturbed = [](const auto& measured) { return measured.disturbed; };
    return std::any_of(curve_.points().begin(), curve_.points().end(), is_disturbed) ||
           std::any_of(curve_.flatness().begin(), curve_.flatness().end(), is_disturbed);
  }

  std::string why_it_stops(const std::string& policy) const {
    const CurvePoint& last = last_of(policy);
    const double more = static_cast<double>(options_.tokens) / last.tokens;
    return "it holds " + kvsparse_tools::bytes_text(last.resident_bytes) + " there and a step takes " +
           kvsparse_tools::fixed_text(last.step_seconds * 1e3, 1) + " ms; at " + std::to_string(options_.tokens) +
           " it would hold about " +
           kvsparse_tools::bytes_text(static_cast<std::uint64_t>(static_cast<double>(last.resident_bytes) * more));
  }

  void print_flatness(std::ostream& out) const {
    if (curve_.flatness().empty()) return;
    const Flatness& any = curve_.flatness().front();
    out << "\nTime per step at " << any.late_tokens << " tokens against " << any.early_tokens
        << ", both measured at the end in turns (goal: within 5 %, no allocation, bookkeeping at most 5 %):\n\n";
    kvsparse_tools::TextTable table({"policy", "early us", "late us", "ratio", "allocations", "bookkeeping", ""});
    for (const Flatness& flat : curve_.flatness()) {
      const Json f = fields(flat);
      const auto number = [&](const char* name, double scale, int digits) {
        return kvsparse_tools::fixed_text(f[name].get<double>() * scale, digits);
      };
      table.add_row({flat.policy, number("early_step_seconds", 1e6, 1), number("late_step_seconds", 1e6, 1),
                     number("ratio", 1, 3), f["allocations"].dump(), number("bookkeeping_share", 100, 1) + " %",
                     flat.disturbed ? "disturbed" : ""});
    }
    table.print(out);
  }

  const CurveOptions& options_;
  const DecodeCurve& curve_;
};

}  // namespace kvsparse_bench
