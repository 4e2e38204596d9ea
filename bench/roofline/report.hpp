// SPDX-License-Identifier: Apache-2.0
// What roofline found, as a table and as JSON.
#pragma once

#include <algorithm>
#include <nlohmann/json.hpp>
#include <ostream>
#include <string>
#include <vector>

#include "common/text_table.hpp"
#include "measurement.hpp"
#include "micro/context.hpp"

namespace kvsparse_bench {

/// Version of the JSON that --json writes; raised when a field changes its meaning or goes.
inline constexpr int roofline_json_schema = 1;

class RooflineReport {
 public:
  using Json = nlohmann::ordered_json;

  RooflineReport(const RooflineOptions& options, const RooflineMeasurement& measurement)
      : options_(options),
        measurement_(measurement),
        rounds_(measurement.rounds(options.rounds)),
        busy_(measurement.clean_rounds() < options.rounds) {}

  Json json() const {
    Json json{{"schema", roofline_json_schema}, {"tool", "roofline"}};
    json["command"] = options_.command;
    json["context"] = context_json();
    json["shape"] = shape_json(options_.shape);
    json["busy"] = busy_;  // then the ratios below are no more than a hint
    json["rounds"] = rounds_.size();
    json["rounds_tried"] = measurement_.rival().rounds();
    json["rounds_disturbed"] = measurement_.rival().disturbed_rounds();
    json["limits"] = Json::array();
    for (std::size_t t = 0; t < measurement_.thread_counts().size(); ++t) {
      Json limits{{"threads", measurement_.thread_counts()[t]}};
      for (const MemoryLevel level : memory_levels) {
        limits[std::string(name_of(level)) + "_bytes_per_second"] = bandwidth(t, level).json();
      }
      limits["flops_per_second"] = peak(t).json();
      json["limits"].push_back(std::move(limits));
    }
    json["steps"] = Json::array();
    for (std::size_t s = 0; s < measurement_.steps().size(); ++s) json["steps"].push_back(step(s));
    return json;
  }

  void print(std::ostream& out) const {
    using kvsparse_tools::fixed_text;
    const CacheSizes& caches = measurement_.caches();
    out << processor_name() << ", " << hardware_threads() << " hardware threads, vectors of " << kvsparse::simd::lanes
        << " floats; L2 " << kvsparse_tools::bytes_text(caches.l2_per_core) << " per core, L3 "
        << kvsparse_tools::bytes_text(caches.l3) << " (" << caches.source << ")\n"
        << build_info::compiler << ",  " << build_info::flags << ", commit " << build_info::commit << "\n\n";
    kvsparse_tools::TextTable limits({"threads", "L2 GB/s", "L3 GB/s", "DRAM GB/s", "GFLOP/s"});
    for (std::size_t t = 0; t < measurement_.thread_counts().size(); ++t) {
      std::vector<std::string> row{std::to_string(measurement_.thread_counts()[t])};
      for (const MemoryLevel level : memory_levels) row.push_back(giga(bandwidth(t, level)));
      row.push_back(giga(peak(t)));
      limits.add_row(row);
    }
    limits.print(out);
    out << "\ndense decode steps: " << options_.shape.query_heads << " query heads, " << options_.shape.kv_heads
        << " kv heads, head_dim " << options_.shape.head_dim << ", pages of " << options_.shape.page_size << "\n\n";
    kvsparse_tools::TextTable steps({"dtype", "N", "threads", "us/step", "KV GB/s", "plain read", "GFLOP/s", "KV in",
                                     "bound by", "bound us", "of roofline"});
    const Json all = json();
    for (const Json& s : all["steps"]) {
      const double seconds = s["seconds"]["median"], fraction = s["fraction"]["median"];
      const auto percent = [](double share) { return fixed_text(100.0 * share, 0); };
      std::string ratio =
          percent(fraction) + " % (" + percent(s["fraction"]["min"]) + "-" + percent(s["fraction"]["max"]) + ")";
      steps.add_row({s["dtype"], s["tokens"].dump(), s["threads"].dump(), fixed_text(seconds * 1e6, 1),
                     fixed_text(s["kv_bytes"].get<double>() / seconds * 1e-9, 1),
                     fixed_text(s["plain_read_bytes_per_second"]["median"].get<double>() * 1e-9, 1),
                     fixed_text(s["flops"].get<double>() / seconds * 1e-9, 1), s["level"], s["bound_by"],
                     fixed_text(s["bound_seconds"].get<double>() * 1e6, 1), busy_ ? "busy, " + ratio + "?" : ratio});
    }
    steps.print(out);
    out << "\nMedians of " << rounds_.size()
        << " rounds, in brackets their range. The bound is max(KV bytes / bandwidth "
        << "of the level they fit in, flops / FMA peak)\nof the same round; plain read: a loop that only loads as many "
        << "bytes.\n";
    const RivalLoad& rival = measurement_.rival();
    if (busy_) {
      out << rival.sentence() << "; the ratios are no more than a hint, run this again on a quiet machine\n";
    } else if (rival.disturbed_rounds() > 0) {
      out << rival.disturbed_rounds() << " of " << rival.rounds() << " rounds were disturbed and repeated\n";
    }
  }

 private:
  static std::string giga(const Spread& spread) {
    return kvsparse_tools::fixed_text(spread.median * 1e-9, 1) + " (" +
           kvsparse_tools::fixed_text(spread.least * 1e-9, 0) + "-" +
           kvsparse_tools::fixed_text(spread.most * 1e-9, 0) + ")";
  }

  template <class Value>
  Spread over_rounds(Value&& value) const {
    std::vector<double> values;
    for (const Round& round : rounds_) values.push_back(value(round));
    return Spread(values);
  }
  Spread bandwidth(std::size_t t, MemoryLevel level) const {
    return over_rounds([&](const Round& r) { return r.limits[t].bandwidth[static_cast<std::size_t>(level)]; });
  }
  Spread peak(std::size_t t) const {
    return over_rounds([&](const Round& r) { return r.limits[t].flops; });
  }

  Json step(std::size_t s) const {
    const StepBench& bench = *measurement_.steps()[s];
    const auto& counts = measurement_.thread_counts();
    const auto t = static_cast<std::size_t>(std::find(counts.begin(), counts.end(), bench.threads()) - counts.begin());
    const auto bound = [&](const Round& r) {
      return roofline(r.limits[t], measurement_.caches(), r.steps[s].bytes, r.steps[s].flops);
    };
    // Each round is held against its own limits: the machine is not equally fast in all of them.
    const Spread fraction = over_rounds([&](const Round& r) { return bound(r).seconds / r.steps[s].seconds; });
    const double bytes = over_rounds([&](const Round& r) { return r.steps[s].bytes; }).median;
    const double flops = over_rounds([&](const Round& r) { return r.steps[s].flops; }).median;
    MachineLimits medians{bench.threads(), {}, peak(t).median};
    for (const MemoryLevel level : memory_levels) {
      medians.bandwidth[static_cast<std::size_t>(level)] = bandwidth(t, level).median;
    }
    const Roofline typical = roofline(medians, measurement_.caches(), bytes, flops);
    return {{"dtype", bench.dtype()},
            {"tokens", bench.tokens()},
            {"threads", bench.threads()},
            {"seconds", over_rounds([&](const Round& r) { return r.steps[s].seconds; }).json()},
            {"kv_bytes", bytes},
            {"flops", flops},
            {"plain_read_bytes_per_second",
             over_rounds([&](const Round& r) { return r.steps[s].same_size_bandwidth; }).json()},
            {"level", name_of(typical.level)},
            {"bound_by", typical.is_memory_bound ? "memory" : "arithmetic"},
            {"bound_seconds", typical.seconds},
            {"fraction", fraction.json()}};
  }

  const RooflineOptions& options_;
  const RooflineMeasurement& measurement_;
  std::vector<Round> rounds_;
  bool busy_;
};

}  // namespace kvsparse_bench
