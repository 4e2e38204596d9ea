// SPDX-License-Identifier: Apache-2.0
// Decodes token by token under every policy, and measures the time per step and the memory on the way.
#include <unistd.h>
#include <CLI/CLI.hpp>
#include <cstdio>
#include <iostream>

#include "common/interrupt.hpp"
#include "common/output_file.hpp"
#include "common/program.hpp"
#include "common/progress.hpp"
#include "decode_curve/curve.hpp"
#include "decode_curve/options.hpp"
#include "decode_curve/report.hpp"

namespace {

using namespace kvsparse_bench;

void write_files(const CurveOptions& options, const CurveReport& report) {
  if (!options.csv_file.empty()) kvsparse_tools::write_text_file(options.csv_file, report.csv());
  if (!options.json_file.empty()) kvsparse_tools::write_text_file(options.json_file, report.json());
}

int run(const CurveOptions& options) {
  refuse_debug_build();
  DecodeCurve curve(options);
  const CurveReport report(options, curve);
  write_files(options, report);  // an unwritable path is found at once, and a kill leaves valid files
  bool complete = true;
  {
    std::size_t budgeted = 0, done = 0;
    for (const std::string& name : options.policies) {
      visit_policy(name, [&]<class Policy>() { budgeted += kvsparse::Evictor<Policy> ? 1 : 0; });
    }
    kvsparse_tools::ProgressBar progress("decoding", budgeted * options.tokens);
    const bool is_terminal = ::isatty(STDERR_FILENO) == 1;
    for (const std::size_t checkpoint : curve.checkpoints()) {
      complete = curve.run_to(checkpoint, [&](std::size_t steps) { progress.update(done += steps); });
      if (!complete) break;
      if (!is_terminal) std::fprintf(stderr, "decode_curve: %zu of %zu tokens\n", checkpoint, options.tokens);
      write_files(options, report);
    }
  }
  if (complete) curve.measure_flatness();
  write_files(options, report);
  report.print(std::cout);
  return complete ? 0 : kvsparse_tools::interrupted_exit_code;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app(
      "Decodes token by token under several policies: time per step, memory by three counts, and what the policies' "
      "bookkeeping costs, against the tokens decoded.",
      "decode_curve");
  return kvsparse_tools::run_program(app, "not enough memory for these caches", [&] {
    const CurveOptions options = parse_curve_options(app, argc, argv);
    kvsparse_tools::catch_interrupts();
    return run(options);
  });
}
