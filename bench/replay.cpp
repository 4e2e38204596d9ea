// SPDX-License-Identifier: Apache-2.0
// Replays a recorded trace of one attention layer through caches of several policies and budgets, and measures what
// each of them would have lost.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <iostream>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/interrupt.hpp"
#include "common/output_file.hpp"
#include "common/program.hpp"
#include "common/progress.hpp"
#include "common/trace.hpp"
#include "replay/clairvoyant.hpp"
#include "replay/dense_reference.hpp"
#include "replay/dump.hpp"
#include "replay/html_report.hpp"
#include "replay/options.hpp"
#include "replay/policy_run.hpp"
#include "replay/report.hpp"
#include "replay/waterfall.hpp"

namespace {

using namespace kvsparse_tools;

int complain(const std::string& sentence, int exit_code) {
  return kvsparse_tools::complain("replay", sentence, exit_code);
}

/// The layer that a trace of examples/decode comes from, else 0: Random draws other numbers in each layer, and should
/// draw here what it drew there.
std::size_t layer_of(const std::string& trace_file) {
  const SafetensorsFile file(trace_file);
  const auto found = file.metadata().find("layer");
  std::uint32_t layer = 0;
  if (found != file.metadata().end()) {
    std::from_chars(found->second.data(), found->second.data() + found->second.size(), layer);
  }
  return layer;
}

/// Every trace is finite; what a narrower type makes of it must be too, or attention yields NaN.
void refuse_overflow(const Trace& trace, kvsparse::ScalarType dtype) {
  const auto fits = [&](float value) {
    switch (dtype) {
      case kvsparse::ScalarType::f32: return true;
      case kvsparse::ScalarType::f16: return std::isfinite(static_cast<float>(kvsparse::Half(value)));
      case kvsparse::ScalarType::bf16: return std::isfinite(static_cast<float>(kvsparse::Bfloat16(value)));
      case kvsparse::ScalarType::int8: return true;  // every row has a scale of its own
    }
    return false;
  };
  for (const auto& [name, values] : {std::pair("k", &trace.k), std::pair("v", &trace.v)}) {
    const auto found = std::find_if_not(values->begin(), values->end(), fits);
    if (found == values->end()) continue;
    throw UsageError("tensor '" + std::string(name) + "' holds " + std::to_string(*found) + " at element " +
                     std::to_string(found - values->begin()) + ", too large for --dtype " +
                     std::string(kvsparse::scalar_type_names[static_cast<std::size_t>(dtype)]) + "; f32 holds it");
  }
}

/// A line of the table, and the run it reports, unless the policy refused the budget.
struct Row {
  std::string policy;
  std::size_t budget = 0;
  std::optional<std::size_t> read_budget;
  const PolicyRun* run = nullptr;
  std::string refused;
};

/// All policies at all budgets, stepping through the trace together, so that dense attention is computed only once.
class Replay {
 public:
  explicit Replay(const ReplayOptions& options)
      : options_(options), trace_(load_trace(options.trace_file)), dense_(trace_), report_(options_, trace_) {
    if (!options.dump_file.empty()) dump_.emplace(options.dump_file, trace_, options.force);
    refuse_overflow(trace_, options.dtype);
    const std::size_t layer = layer_of(options.trace_file);
    const std::vector<std::size_t> budgets =
        options.budgets.empty() ? swept_budgets(options.page_size, trace_.tokens) : options.budgets;
    for (std::size_t policy = 0; policy < options.policies.size(); ++policy) {
      for (const std::size_t budget : budgets) add_row(policy, budget, layer);
    }
    if (runs_.empty()) {
      throw UsageError("no policy takes any of the budgets; " + rows_.front().policy + " at budget " +
                       std::to_string(rows_.front().budget) + ": " + rows_.front().refused);
    }
    if (!options.report_file.empty()) {
      grid_ = WaterfallGrid::of(trace_, options.page_size, runs_.size());
      waterfalls_.assign(runs_.size(), RunWaterfalls(grid_.kv_heads, Waterfall(grid_)));
    }
  }
  Replay(const Replay&) = delete;
  Replay& operator=(const Replay&) = delete;

  /// False if it was interrupted.
  bool run() {
    write_files(false);  // an unwritable path is found at once, and a kill leaves valid files
    if (foresight_) foresight_->look_ahead(dense_);
    std::size_t token = 0;
    {
      // A token's work grows with its position; prompt queries are not compared with dense attention.
      const auto work = [&](std::size_t t) { return (t + 1) / (t < trace_.prompt_tokens ? 8 : 1) + 1; };
      std::size_t total = 0, done = 0;
      for (std::size_t t = 0; t < trace_.tokens; ++t) total += work(t);
      ProgressBar progress("replaying", total);
      for (; token < trace_.tokens && !interrupted(); ++token) {
        step(token);
        progress.update(done += work(token));
      }
    }
    const bool complete = token == trace_.tokens;
    report_.update(token, results());
    write_files(true);
    if (complete && dump_) dump_->write(dump_notes());
    const auto files = {options_.json_file, options_.csv_file, options_.report_file};
    if (std::ranges::find(files, standard_output) == files.end()) report_.print(std::cout);
    std::cout.flush();
    if (!complete) {
      complain("interrupted after " + std::to_string(token) + " of " + std::to_string(trace_.tokens) +
                   " tokens; the results cover those" + (dump_ ? ", and no dump was written" : ""),
               0);
    }
    return complete;
  }

 private:
  static constexpr const char* standard_output = "/dev/stdout";

  void add_row(std::size_t policy, std::size_t budget, std::size_t layer) {
    const kvsparse::PolicyFacts facts = replayed_policy_facts(options_.policies[policy]);
    Row row{options_.policies[policy], budget, std::nullopt, nullptr, ""};
    const bool ignores_budget = !facts.evicts && !facts.selects;
    const bool reuses =
        ignores_budget && !rows_.empty() && rows_.back().policy == row.policy && rows_.back().run != nullptr;
    const std::size_t read_budget = options_.settings[policy].read_budget_tokens;
    if (facts.selects) row.read_budget = read_budget != 0 ? read_budget : budget;
    try {
      if (!reuses) runs_.emplace_back(options_, policy, budget, trace_, layer, plan_of(row));
      row.run = &runs_.back();
    } catch (const UsageError& error) {
      if (!options_.sweep) throw UsageError(row.policy + " at budget " + std::to_string(budget) + ": " + error.what());
      row.refused = error.what();
    }
    rows_.push_back(std::move(row));
  }

  /// Null for all but the clairvoyant.
  const EvictionPlan* plan_of(const Row& row) {
    if (row.policy != Clairvoyant::name || row.budget < options_.page_size) return nullptr;
    if (!foresight_) foresight_.emplace(trace_, options_.page_size);
    return &foresight_->plan_of(row.budget / options_.page_size);
  }

  void step(std::size_t token) {
    for (PolicyRun& run : runs_) run.step(token);
    if (token < trace_.prompt_tokens) return;
    dense_.advance_to(token);
    for (PolicyRun& run : runs_) run.measure(dense_, token);
    if (dump_) dump_->add(runs_.front().cache(), runs_.front().out());
    if (!waterfalls_.empty() && grid_.shows_step(token - trace_.prompt_tokens)) add_waterfall_row(token);
  }

  void add_waterfall_row(std::size_t token) {
    for (std::size_t run = 0; run < runs_.size(); ++run) {
      for (std::size_t head = 0; head < grid_.kv_heads; ++head) {
        const HeadLoss& loss = runs_[run].loss(head);
        waterfalls_[run][head].add(runs_[run].cache(), head, token, loss.share, loss.error);
      }
    }
  }

  std::vector<ReplayResult> results() const {
    std::vector<ReplayResult> results;
    for (const Row& row : rows_) {
      ReplayResult result{row.policy, row.budget, row.read_budget, row.refused, {}, {}};
      if (row.run != nullptr) {
        result.metrics = row.run->metrics();
        result.cache = row.run->cache().stats();
      }
      results.push_back(std::move(result));
    }
    return results;
  }

  /// Streams are written once, at the end; files also before.
  void write_files(bool at_the_end) const {
    const auto write = [&](const std::string& file, const auto& text) {
      if (!file.empty() && (at_the_end || !is_stream(file))) write_text_file(file, text());
    };
    write(options_.json_file, [&] { return report_.json(); });
    write(options_.csv_file, [&] { return report_.csv(); });
    write(options_.report_file, [&] { return page(); });
  }

  std::string page() const {
    ReplayReport::Json data = report_.data();
    for (std::size_t i = 0; i < data["results"].size(); ++i) {
      const auto run = std::ranges::find_if(runs_, [&](const PolicyRun& of) { return &of == rows_[i].run; });
      data["results"][i]["run"] = run == runs_.end() ? ReplayReport::Json() : ReplayReport::Json(run - runs_.begin());
    }
    return html_report(std::move(data), grid_, waterfalls_);
  }

  std::map<std::string, std::string> dump_notes() const {
    return {{"policy", options_.policies.front()},
            {"budget", std::to_string(options_.budgets.front())},
            {"page_size", std::to_string(options_.page_size)},
            {"prompt_tokens", std::to_string(trace_.prompt_tokens)}};
  }

  const ReplayOptions& options_;
  Trace trace_;
  DenseReference dense_;
  ReplayReport report_;
  std::optional<Foresight> foresight_;
  std::optional<Dump> dump_;
  std::deque<PolicyRun> runs_;
  WaterfallGrid grid_;                     // for --report
  std::vector<RunWaterfalls> waterfalls_;  // by run
  std::vector<Row> rows_;
};

}  // namespace

int main(int argc, char** argv) {
  CLI::App app(
      "Replays a trace of one attention layer through sparse KV caches: what each policy keeps, reads and loses.",
      "replay");
  return run_program(app, "not enough memory for this trace, its policies and budgets", [&] {
    const ReplayOptions options = parse_replay_options(app, argc, argv);
    catch_interrupts();
    return Replay(options).run() ? 0 : interrupted_exit_code;
  });
}
