// SPDX-License-Identifier: Apache-2.0
// The checks of `--experiment gate`: what the house promises of its policies, on few problems.
#pragma once

#include <cstddef>
#include <ostream>
#include <string>
#include <vector>

#include "cell.hpp"
#include "common/text_table.hpp"
#include "report.hpp"

namespace kvsparse_tools {

/// Prints one line per check; false if one fails.
inline bool print_gate(std::ostream& out, const std::vector<Cell>& cells, const ReasoningReport& report) {
  bool all_hold = true;
  const auto print = [&](bool holds, const std::string& sentence) {
    out << (holds ? "ok      " : "FAILED  ") << sentence << '\n';
    all_hold = all_hold && holds;
  };
  const CellResult* dense = nullptr;
  for (std::size_t i = 0; i < cells.size(); ++i) {
    if (cells[i].variant.ignores_budget) dense = &*report.result(i);
  }
  for (std::size_t i = 0; i < cells.size(); ++i) {
    const CellResult& result = *report.result(i);
    const std::string& policy = cells[i].variant.text;
    if (!result.refusal.empty()) {
      print(false, policy + ": " + result.refusal);
      continue;
    }
    for (const experiments::GateBound& bound : experiments::gate_bounds) {
      if (policy != bound.policy || cells[i].budget == experiments::unlimited_budget) continue;
      const bool holds = bound.at_least ? result.answer.mean >= bound.share : result.answer.mean <= bound.share;
      const std::string where = cells[i].budget == 0 ? "" : " at budget " + std::to_string(cells[i].budget);
      print(holds, policy + where + ": " + fixed_text(100.0 * result.answer.mean, 1) + " % of the answers are right, " +
                       (bound.at_least ? "at least " : "at most ") + fixed_text(100.0 * bound.share, 0) + " % wanted");
    }
    if (cells[i].budget != experiments::unlimited_budget) continue;
    std::size_t same = 0;
    for (std::size_t p = 0; p < result.outcomes.size(); ++p) {
      same += result.outcomes[p].tokens == dense->outcomes[p].tokens ? 1 : 0;
    }
    print(same == result.outcomes.size(), policy + " without a limit: " + std::to_string(same) + " of " +
                                              std::to_string(result.outcomes.size()) +
                                              " texts are, token by token, those of dense");
  }
  return all_hold;
}

}  // namespace kvsparse_tools
