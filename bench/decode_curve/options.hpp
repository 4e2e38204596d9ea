// SPDX-License-Identifier: Apache-2.0
// The command line of bench/decode_curve.
#pragma once

#include <CLI/CLI.hpp>
#include <cstddef>
#include <string>
#include <vector>

#include "common/option_lists.hpp"
#include "micro/context.hpp"
#include "micro/shape_options.hpp"

namespace kvsparse_bench {

inline const std::vector<std::string> curve_policies{"dense", "quest",   "streaming_llm", "h2o",
                                                     "raas",  "kindred", "random",        "raas+quest"};

struct CurveOptions {
  kvsparse::Geometry shape = layer_shape;
  std::vector<std::string> policies;
  std::size_t tokens = 1'000'000;
  std::size_t dense_tokens = 65536;
  std::size_t budget = 1024;
  std::size_t turns = 5;
  std::size_t retries = 2;
  std::string csv_file;
  std::string json_file;
  std::string command;  // as given
};

/// Throws UsageError or what CLI11 throws (--help included).
inline CurveOptions parse_curve_options(CLI::App& app, int argc, char** argv) {
  using namespace kvsparse_tools;
  CurveOptions options;
  std::string policies = "dense,quest,streaming_llm,h2o,raas,kindred,random";
  std::string tokens = std::to_string(options.tokens), dense_tokens = std::to_string(options.dense_tokens);
  std::string budget = std::to_string(options.budget), turns = std::to_string(options.turns);
  std::string retries = std::to_string(options.retries);
  ShapeOptions shape;
  std::string known;
  for (const std::string& name : curve_policies) known += (known.empty() ? "" : ", ") + name;
  app.add_option("--policy", policies, "of " + known + ", separated by commas [" + policies + "]");
  app.add_option("--tokens", tokens, "tokens that policies with a budget decode [" + tokens + "]");
  app.add_option("--dense-tokens", dense_tokens,
                 "tokens that policies which keep everything decode: their memory, and all but the steps that are "
                 "timed is append alone, because attending does not change what they hold [" +
                     dense_tokens + "]");
  app.add_option("--budget", budget, "tokens a kv head may keep, or read where all are kept [" + budget + "]");
  app.add_option("--turns", turns, "turns that the policies take at a checkpoint, 16 steps each [" + turns + "]");
  app.add_option("--retries", retries, "how often a disturbed checkpoint is measured again at most [" + retries + "]");
  shape.add_to(app);
  app.add_option("--csv", options.csv_file, "write a line per policy and checkpoint to this file as CSV");
  app.add_option("--json", options.json_file, "write the same, the context and the summary to this file as JSON");
  app.parse(argc, argv);

  options.command = command_line(argc, argv);
  options.policies = list_of(policies);
  for (const std::string& name : options.policies) {
    if (std::find(curve_policies.begin(), curve_policies.end(), name) == curve_policies.end()) {
      throw UsageError("--policy names the unknown " + in_quotes(name) + "; known are " + known);
    }
  }
  refuse_repeats("--policy", options.policies, options.policies);
  constexpr std::size_t longest = std::size_t{1} << 30;
  options.tokens = parse_count("--tokens", tokens, 1000, longest);
  options.dense_tokens = std::min(options.tokens, parse_count("--dense-tokens", dense_tokens, 1000, longest));
  options.turns = parse_count("--turns", turns, 1, 100);
  options.retries = parse_count("--retries", retries, 0, 100);
  options.shape = shape.shape();
  options.budget = parse_count("--budget", budget, options.shape.page_size, longest);
  refuse_shared_files({{"--csv", options.csv_file}, {"--json", options.json_file}});
  return options;
}

}  // namespace kvsparse_bench
