// SPDX-License-Identifier: Apache-2.0
// The command line of bench/roofline.
#pragma once

#include <CLI/CLI.hpp>
#include <cstddef>
#include <string>
#include <vector>

#include "common/option_lists.hpp"
#include "micro/context.hpp"
#include "micro/machine_limits.hpp"
#include "micro/shape_options.hpp"

namespace kvsparse_bench {

struct RooflineOptions {
  kvsparse::Geometry shape = layer_shape;
  std::vector<std::string> dtypes;
  std::vector<std::size_t> tokens;
  std::vector<std::size_t> threads;  // ascending
  std::size_t rounds = 7;
  std::size_t retries = 14;
  std::string json_file;
  std::string command;  // as given
};

/// 1, 2, 4, ... and all hardware threads.
inline std::string usual_thread_counts() {
  std::string text = "1";
  for (std::size_t threads = 2; threads < hardware_threads(); threads *= 2) text += "," + std::to_string(threads);
  return text + (hardware_threads() > 1 ? "," + std::to_string(hardware_threads()) : "");
}

/// Throws UsageError or what CLI11 throws (--help included).
inline RooflineOptions parse_roofline_options(CLI::App& app, int argc, char** argv) {
  using namespace kvsparse_tools;
  RooflineOptions options;
  std::string dtypes = "f32,f16,bf16,int8", tokens = "1024,4096,16384,65536", threads = usual_thread_counts();
  ShapeOptions shape;
  std::string rounds = std::to_string(options.rounds), retries = std::to_string(options.retries);
  app.add_option("--dtype", dtypes,
                 "storage of keys and values, one or several of f32, f16, bf16, int8 [" + dtypes + "]");
  app.add_option("--tokens", tokens, "tokens in the cache, one or several separated by commas [" + tokens + "]");
  app.add_option("--threads", threads, "threads whose bandwidth and peak are measured [" + threads + "]");
  shape.add_to(app);
  app.add_option("--rounds", rounds, "undisturbed rounds wanted, 3 to 1000 [" + rounds + "]");
  app.add_option("--retries", retries, "disturbed rounds that are repeated at most [" + retries + "]");
  app.add_option("--json", options.json_file, "write the numbers to this file as JSON");
  app.parse(argc, argv);

  options.command = command_line(argc, argv);
  options.dtypes = list_of(dtypes);
  for (const std::string& dtype : options.dtypes) parse_dtype(dtype);
  refuse_repeats("--dtype", options.dtypes, options.dtypes);
  options.tokens = parse_counts("--tokens", tokens, 1, std::size_t{1} << 24);
  options.threads = parse_counts("--threads", threads, 1, hardware_threads());
  std::sort(options.threads.begin(), options.threads.end());
  options.shape = shape.shape();
  options.rounds = parse_count("--rounds", rounds, 3, 1000);
  options.retries = parse_count("--retries", retries, 0, 1000);
  return options;
}

}  // namespace kvsparse_bench
