// SPDX-License-Identifier: Apache-2.0
// Measures what the machine can do, read bandwidth by cache level and multiply-adds, and which part of it a dense
// decode step reaches.
#include <CLI/CLI.hpp>
#include <iostream>

#include "common/interrupt.hpp"
#include "common/output_file.hpp"
#include "common/program.hpp"
#include "common/progress.hpp"
#include "roofline/measurement.hpp"
#include "roofline/options.hpp"
#include "roofline/report.hpp"

namespace {

using namespace kvsparse_bench;

int run(const RooflineOptions& options) {
  refuse_debug_build();
  RooflineMeasurement measurement(options);
  {
    kvsparse_tools::ProgressBar progress("measuring", options.rounds);
    const std::size_t most = options.rounds + options.retries;
    while (measurement.clean_rounds() < options.rounds && measurement.rival().rounds() < most) {
      if (kvsparse_tools::interrupted()) return kvsparse_tools::interrupted_exit_code;
      measurement.run_round();
      progress.update(measurement.clean_rounds());
    }
  }
  const RooflineReport report(options, measurement);
  if (options.json_file != "/dev/stdout") report.print(std::cout);
  if (!options.json_file.empty()) kvsparse_tools::write_text_file(options.json_file, report.json().dump(2) + "\n");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app(
      "Measures read bandwidth by cache level, the multiply-add peak, and which part of that roofline dense decode "
      "steps reach.",
      "roofline");
  return kvsparse_tools::run_program(app, "not enough memory for these caches", [&] {
    const RooflineOptions options = parse_roofline_options(app, argc, argv);
    kvsparse_tools::catch_interrupts();
    return run(options);
  });
}
