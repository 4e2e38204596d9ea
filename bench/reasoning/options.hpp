// SPDX-License-Identifier: Apache-2.0
// The command line of `reasoning`.
#pragma once

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "common/option_lists.hpp"
#include "experiments.hpp"
#include "variant.hpp"

namespace kvsparse_tools {

struct NamedModel {
  std::string name;
  std::string directory;
};

struct ReasoningOptions {
  std::vector<NamedModel> models;
  Experiment experiment;
  std::uint64_t seed = 100000000000;  // from 2^34 on, a seed is one that no training has seen
  kvsparse::ScalarType dtype = kvsparse::ScalarType::f32;
  std::size_t threads = 1;
  std::size_t dense_layers = 0;
  std::string csv_file;
  std::string json_file;
  bool texts = false;  // every problem's text goes into the JSON too
};

namespace detail {

/// NAME=DIR, or DIR alone, which is then the main model.
inline NamedModel parse_model(const std::string& text) {
  const std::size_t equals = text.find('=');
  const bool named = equals != std::string::npos && text.find('/') > equals;
  NamedModel model{named ? text.substr(0, equals) : "main", named ? text.substr(equals + 1) : text};
  const bool plain_name = !model.name.empty() && std::all_of(model.name.begin(), model.name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-' ||
           c == '.';
  });
  if (!plain_name || model.directory.empty()) {
    throw UsageError("--model got " + in_quotes(text) + ", DIR or NAME=DIR was expected");
  }
  return model;
}

/// A comma parts two sets, unless a setting of the set before it follows: "fall:gmax=4,life=12,mile" are two.
inline std::vector<std::string> parse_sets(const std::vector<std::string>& texts) {
  std::vector<std::string> sets;
  for (const std::string& text : texts) {
    const std::size_t first = sets.size();
    for (const std::string& part : list_of(text)) {
      const bool is_setting = part.find('=') != std::string::npos && part.find(':') == std::string::npos;
      if (is_setting && sets.size() > first) {
        sets.back() += "," + part;
      } else {
        sets.push_back(part);
      }
    }
  }
  for (const std::string& set : sets) static_cast<void>(SourceRule::parse(set));
  refuse_repeats("--set", sets, sets);
  return sets;
}

inline Experiment preset(const std::string& name) {
  if (name == "quick") return experiments::quick();
  if (name == "full") return experiments::full();
  if (name == "long") return experiments::long_chains();
  if (name == "ideas") return experiments::ideas(idea_names());
  if (name == "gate")
    return experiments::gate(kvsparse::policy_names<kvsparse::WithCompositions<kvsparse::ComposedPolicies>>());
  throw UsageError("--experiment got " + in_quotes(name) + ", quick, full, long, ideas or gate was expected");
}

inline void check_sweep(const Sweep& sweep) {
  for (const std::string& text : sweep.policies) static_cast<void>(parse_variant(text));
  refuse_repeats("--policy", sweep.policies, sweep.policies);
  const std::size_t most = lemma_chain::label_count(sweep.format) - 2;
  if (sweep.lines > most) {
    throw UsageError("--lines is " + std::to_string(sweep.lines) + ", the labels of this format reach for " +
                     std::to_string(most) + " lines");
  }
}

}  // namespace detail

/// Throws UsageError, std::invalid_argument (set or format), or what CLI11 throws (--help included).
inline ReasoningOptions parse_reasoning_options(CLI::App& app, int argc, char** argv) {
  ReasoningOptions options;
  std::vector<std::string> models, sets;
  std::string policies, budgets, page_sizes = "4", format = "plain", dtype = "f32", preset, lines = "48";
  std::string problems, seed = std::to_string(options.seed), dense_layers = "0";
  std::string threads = std::to_string(std::max(1U, std::thread::hardware_concurrency()));
  const CLI::Validator file_name([](std::string& name) { return std::string(name.empty() ? "an empty name" : ""); },
                                 "FILE");
  app.add_option("--model", models,
                 "NAME=DIR, a Hugging Face directory trained on the format; DIR alone is called main. Several: repeat")
      ->required()
      ->allow_extra_args(false);
  auto* set = app.add_option("--set", sets,
                             "what a line cites: fall, fall:gmax=4,life=12, mile, lru, age, uniform; several by commas")
                  ->allow_extra_args(false);
  auto* policy = app.add_option("--policy", policies,
                                "name or name:key=value:key=value, several by commas: raas,h2o:pin_prompt=true,"
                                "quest:read_budget=64,raas+quest:read_share=0.5");
  auto* budget =
      app.add_option("--budget", budgets, "tokens a kv head may keep (what only selects: may read), several by commas");
  auto* page_size = app.add_option("--page-size", page_sizes, "tokens per page, several by commas [4]");
  auto* line_format = app.add_option("--format", format, "plain, varied or long [plain]");
  auto* line_count = app.add_option("--lines", lines, "lines per chain [48]");
  auto* experiment =
      app.add_option("--experiment", preset,
                     "quick (two minutes), full, long, ideas, or gate (exits with 1 when a check fails), "
                     "instead of lists of one's own; expects models named main, plain, varied, long "
                     "and skips what needs another");
  for (CLI::Option* list : {set, policy, budget, page_size, line_format, line_count}) experiment->excludes(list);
  app.add_option("--problems", problems, "problems per cell [128, or the experiment's]");
  app.add_option("--seed", seed, "of the problems; below 2^34 training may have seen them [" + seed + "]");
  app.add_option("--dtype", dtype, "storage of keys and values: f32, f16, bf16 or int8 [f32]");
  app.add_option("--dense-layers", dense_layers, "the first layers that keep everything [0]");
  app.add_option("--threads", threads, "problems decoded at the same time [all cores]");
  app.add_option("--csv", options.csv_file, "write a line per cell to this file, rewritten as cells end")
      ->check(file_name);
  app.add_option("--json", options.json_file, "the same as JSON, with every problem's outcome")->check(file_name);
  app.add_flag("--texts", options.texts, "put every decoded text into the JSON");
  app.parse(argc, argv);

  for (const std::string& model : models) options.models.push_back(detail::parse_model(model));
  for (std::size_t i = 0; i < options.models.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      if (options.models[i].name == options.models[j].name) {
        throw UsageError("--model names " + in_quotes(options.models[i].name) + " twice, give NAME=DIR");
      }
    }
  }
  if (experiment->count() != 0) {
    options.experiment = detail::preset(preset);
  } else {
    if (set->count() == 0 || policy->count() == 0) {
      throw UsageError("--set and --policy must be given, or --experiment instead");
    }
    Sweep sweep;
    sweep.format = parse_line_format(format);
    sweep.sets = detail::parse_sets(sets);
    sweep.policies = list_of(policies);
    sweep.page_sizes = parse_counts("--page-size", page_sizes, 1, 256);
    sweep.lines = parse_count("--lines", lines, 1, 1024);
    if (budget->count() != 0) sweep.budgets = parse_budgets(budgets);
    const bool needs_budget = std::any_of(sweep.policies.begin(), sweep.policies.end(),
                                          [](const std::string& text) { return !parse_variant(text).ignores_budget; });
    if (needs_budget && sweep.budgets.empty()) throw UsageError("--budget must be given: only dense needs none");
    if (sweep.budgets.empty()) sweep.budgets = {0};
    options.experiment.sweeps.push_back(std::move(sweep));
  }
  for (const Sweep& sweep : options.experiment.sweeps) detail::check_sweep(sweep);
  if (!problems.empty()) options.experiment.problems = parse_count("--problems", problems, 1, 1000000);
  options.seed = parse_count("--seed", seed, 0, SIZE_MAX);
  options.threads = parse_count("--threads", threads, 1, 1024);
  options.dense_layers = parse_count("--dense-layers", dense_layers, 0, 1 << 24);
  options.dtype = parse_dtype(dtype);
  if (options.texts && options.json_file.empty()) throw UsageError("--texts needs --json, where the texts go");
  refuse_shared_files({{"--csv", options.csv_file}, {"--json", options.json_file}});
  return options;
}

}  // namespace kvsparse_tools
