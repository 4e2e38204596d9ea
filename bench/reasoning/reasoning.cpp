// SPDX-License-Identifier: Apache-2.0
// How right a model's reasoning stays when its caches are sparse: LemmaChain problems decoded from end to end through
// the real container and kernel, for every model, problem set, policy, page size and budget that is asked for.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstddef>
#include <iostream>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cell.hpp"
#include "common/interrupt.hpp"
#include "common/output_file.hpp"
#include "common/program.hpp"
#include "common/progress.hpp"
#include "engine/model.hpp"
#include "evaluate.hpp"
#include "gate.hpp"
#include "options.hpp"
#include "parallel.hpp"
#include "problem_set.hpp"
#include "report.hpp"

namespace {

using namespace kvsparse_tools;

int complain(const std::string& sentence, int exit_code) {
  return kvsparse_tools::complain("reasoning", sentence, exit_code);
}

class Evaluation {
 public:
  /// Throws FileError and UsageError for what would fail later, before any time is spent on decoding.
  explicit Evaluation(const ReasoningOptions& options)
      : options_(options), cells_(cells_of(options.experiment.sweeps, options.models)), report_(options, cells_) {
    note_skipped_sweeps();
    for (const NamedModel& model : options.models) load(model);
    for (const Cell& cell : cells_) make_problems(cell);
    std::set<std::pair<std::string, std::string>> tried;
    for (const Cell& cell : cells_) {
      if (tried.emplace(cell.model, cell.variant.text).second) try_variant(cell);
    }
    outcomes_.resize(cells_.size());
  }

  int run() {
    write_files(false);  // an unwritable path is found at once, and a kill leaves valid files
    catch_interrupts();
    const std::size_t problems = options_.experiment.problems;
    {
      ProgressBar progress("reasoning", cells_.size() * problems);
      std::size_t done = 0;
      run_in_parallel(cells_.size() * problems, options_.threads, [&](std::size_t task) {
        const std::size_t cell = task / problems;
        std::optional<Outcome> outcome = decode(cells_[cell], task % problems);
        if (!outcome) return false;
        const std::lock_guard lock(mutex_);
        store(cell, task % problems, std::move(*outcome));
        progress.update(++done);
        return true;
      });
    }
    write_files(true);
    const bool has_stdout = options_.csv_file != standard_output && options_.json_file != standard_output;
    if (has_stdout) report_.print(std::cout);
    bool holds = true;
    if (options_.experiment.has_checks && report_.complete()) holds = print_gate(std::cout, cells_, report_);
    std::cout.flush();
    if (!report_.complete()) {
      return complain("interrupted; the results hold the cells that were finished", interrupted_exit_code);
    }
    return holds ? 0 : 1;
  }

 private:
  static constexpr const char* standard_output = "/dev/stdout";

  struct Loaded {
    explicit Loaded(const std::string& directory) : model(directory), tokenizer(directory, model.config().vocab_size) {}
    Model model;
    Tokenizer tokenizer;
  };

  void note_skipped_sweeps() const {
    std::set<std::string> missing;
    for (const Sweep& sweep : options_.experiment.sweeps) {
      for (const std::string& wanted : sweep.models) {
        bool given = false;
        for (const NamedModel& model : options_.models) given = given || model.name == wanted;
        if (!given) missing.insert(wanted);
      }
    }
    std::string names;
    for (const std::string& name : missing) names += (names.empty() ? "" : ", ") + name;
    if (cells_.empty())
      throw UsageError("--experiment " + options_.experiment.name + " needs --model NAME=DIR of a model named " +
                       names);
    if (!missing.empty()) complain("note: what needs a model named " + names + " is skipped", 0);
  }

  void load(const NamedModel& model) {
    const Loaded& loaded = models_.try_emplace(model.name, model.directory).first->second;
    if (options_.dense_layers > loaded.model.config().layers) {
      throw UsageError("--dense-layers is " + std::to_string(options_.dense_layers) + ", the model has " +
                       std::to_string(loaded.model.config().layers) + " layers");
    }
  }

  void make_problems(const Cell& cell) {
    const ProblemSet& set = sets_
                                .try_emplace(cell.problem_key(), cell.set, cell.format, cell.lines, options_.seed,
                                             options_.experiment.problems)
                                .first->second;
    const Loaded& loaded = models_.at(cell.model);
    if (!checked_.emplace(cell.model, &set).second) return;
    set.check_vocabulary(loaded.tokenizer);
    std::size_t longest = 0;
    for (const Problem& p : set.problems()) longest = std::max(longest, p.prompt.size() + p.chain.size());
    const std::size_t positions = loaded.model.config().max_positions;
    if (positions != 0 && longest > positions) {
      complain("note: the problems of set " + cell.set + " have " + std::to_string(longest) + " tokens, model " +
                   cell.model + " was trained on " + std::to_string(positions) + " positions",
               0);
    }
  }

  CacheChoice choice_of(const Cell& cell) const {
    CacheChoice choice;
    choice.policy = cell.variant.policy;
    choice.settings = cell.variant.settings;
    choice.dtype = options_.dtype;
    choice.budget_tokens = cell.budget;
    choice.page_size = cell.page_size;
    if (choice.settings.read_budget_tokens == 0 && cell.variant.read_share < 1.0) {
      const auto tokens = static_cast<std::size_t>(static_cast<double>(cell.budget) * cell.variant.read_share);
      choice.settings.read_budget_tokens = std::max(tokens, cell.page_size);
    }
    choice.dense_layers = options_.dense_layers;
    return choice;
  }

  /// With room in plenty, what is refused is the variant itself: an option or a value that the policy does not have.
  void try_variant(const Cell& cell) const {
    constexpr std::size_t plenty = 8192;
    CacheChoice choice = choice_of(cell);
    choice.budget_tokens = choice.settings.read_budget_tokens = plenty;
    try {
      (void)Decoder(models_.at(cell.model).model, choice, plenty, audited_cache);
    } catch (const kvsparse::ConfigError& error) {
      throw UsageError("--policy " + in_quotes(cell.variant.text) + ": " + error.what());
    }
  }

  bool keeps_tokens() const { return options_.texts || options_.experiment.has_checks; }

  std::optional<Outcome> decode(const Cell& cell, std::size_t problem) const {
    const Loaded& loaded = models_.at(cell.model);
    return evaluate(loaded.model, loaded.tokenizer, choice_of(cell), cell.format,
                    sets_.at(cell.problem_key()).problems()[problem], keeps_tokens());
  }

  /// Called by one thread at a time.
  void store(std::size_t cell, std::size_t problem, Outcome outcome) {
    CellInWork& in_work = outcomes_[cell];
    if (in_work.outcomes.empty()) in_work.outcomes.resize(options_.experiment.problems);
    in_work.outcomes[problem] = std::move(outcome);
    if (++in_work.finished < options_.experiment.problems) return;
    report_.add(cell, summarize(std::exchange(in_work.outcomes, {})));
    write_files(false);
  }

  /// Streams are written once, at the end; files whenever a cell is finished.
  void write_files(bool at_the_end) const {
    const auto write = [&](const std::string& file, const auto& text) {
      if (!file.empty() && (at_the_end || !is_stream(file))) write_text_file(file, text());
    };
    write(options_.csv_file, [&] { return report_.csv(); });
    write(options_.json_file, [&] {
      return report_.json([&](const Cell& cell, const std::vector<TokenId>& tokens) {
        return models_.at(cell.model).tokenizer.decode(tokens);
      });
    });
  }

  struct CellInWork {
    std::vector<Outcome> outcomes;
    std::size_t finished = 0;
  };

  const ReasoningOptions& options_;
  std::vector<Cell> cells_;
  ReasoningReport report_;
  std::map<std::string, Loaded> models_;
  std::map<Cell::ProblemKey, ProblemSet> sets_;
  std::set<std::pair<std::string, const ProblemSet*>> checked_;  // against the vocabulary of a model
  std::mutex mutex_;
  std::vector<CellInWork> outcomes_;
};

}  // namespace

int main(int argc, char** argv) {
  CLI::App app(
      "Decodes LemmaChain problems with sparse KV caches and says how many answers stay right, and what it cost.",
      "reasoning");
  return run_program(app, "not enough memory for these models, budgets and --threads", [&] {
    const ReasoningOptions options = parse_reasoning_options(app, argc, argv);
    return Evaluation(options).run();
  });
}
