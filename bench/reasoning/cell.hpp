// SPDX-License-Identifier: Apache-2.0
// A cell of the tables: a model, a set, a policy variant, a page size and a budget; and what its problems came to.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "evaluate.hpp"
#include "options.hpp"

namespace kvsparse_tools {

struct Cell {
  std::string model;
  LineFormat format = LineFormat::plain;
  std::string set;
  std::size_t lines = 0;
  PolicyVariant variant;
  std::size_t page_size = 0;
  std::size_t budget = 0;  // 0: the policy ignores it

  /// What names the problem set, whatever the model and the cache.
  using ProblemKey = std::tuple<LineFormat, std::string, std::size_t>;
  ProblemKey problem_key() const { return {format, set, lines}; }
  bool same_table(const Cell& other) const { return model == other.model && problem_key() == other.problem_key(); }
  bool same_measurement(const Cell& other) const {
    if (!same_table(other) || variant.text != other.variant.text) return false;
    return variant.ignores_budget || (page_size == other.page_size && budget == other.budget);
  }
};

/// All cells of the sweeps, each once, in order; what ignores the budget once for all budgets and page sizes.
inline std::vector<Cell> cells_of(const std::vector<Sweep>& sweeps, const std::vector<NamedModel>& models) {
  std::vector<Cell> cells;
  const auto add = [&](Cell cell) {
    if (cell.variant.ignores_budget) cell.budget = 0;
    const auto is_same = [&](const Cell& other) { return cell.same_measurement(other); };
    if (std::none_of(cells.begin(), cells.end(), is_same)) cells.push_back(std::move(cell));
  };
  for (const Sweep& sweep : sweeps) {
    for (const NamedModel& model : models) {
      const bool wanted =
          sweep.models.empty() || std::find(sweep.models.begin(), sweep.models.end(), model.name) != sweep.models.end();
      if (!wanted) continue;
      for (const std::string& set : sweep.sets) {
        for (const std::size_t page_size : sweep.page_sizes) {
          for (const std::string& policy : sweep.policies) {
            const PolicyVariant variant = parse_variant(policy);
            for (const std::size_t budget : sweep.budgets) {
              add({model.name, sweep.format, set, sweep.lines, variant, page_size, budget});
            }
          }
        }
      }
    }
  }
  return cells;
}

/// A mean and its standard error.
struct Estimate {
  double mean = 0.0;
  double error = 0.0;
};

struct CellResult {
  std::string refusal;
  Estimate answer, chain;  // shares
  Estimate lines, tokens;
  std::size_t peak_resident_tokens = 0;  // largest over the problems, as the next and the last but one
  std::uint64_t peak_resident_bytes = 0;
  double mean_resident_bytes = 0.0;
  std::size_t allocated_bytes = 0;
  double stamped_share = std::numeric_limits<double>::quiet_NaN();
  std::vector<Outcome> outcomes;  // by problem
};

namespace detail {

template <class Value>
Estimate mean_of(const std::vector<Outcome>& outcomes, Value&& value) {
  const auto n = static_cast<double>(outcomes.size());
  double sum = 0.0, squares = 0.0;
  for (const Outcome& outcome : outcomes) sum += static_cast<double>(value(outcome));
  const double mean = sum / n;
  for (const Outcome& outcome : outcomes) squares += std::pow(static_cast<double>(value(outcome)) - mean, 2);
  return {mean, outcomes.size() < 2 ? 0.0 : std::sqrt(squares / (n - 1) / n)};
}

template <class Holds>
Estimate share_of(const std::vector<Outcome>& outcomes, Holds&& holds) {
  const auto n = static_cast<double>(outcomes.size());
  const double share = static_cast<double>(std::count_if(outcomes.begin(), outcomes.end(), holds)) / n;
  return {share, std::sqrt(share * (1.0 - share) / n)};
}

}  // namespace detail

/// A cell is refused when one of its problems is.
inline CellResult summarize(std::vector<Outcome> outcomes) {
  CellResult result;
  const auto refused =
      std::find_if(outcomes.begin(), outcomes.end(), [](const Outcome& o) { return !o.refusal.empty(); });
  if (refused != outcomes.end()) {
    result.refusal = refused->refusal;
    return result;
  }
  result.answer = detail::share_of(outcomes, [](const Outcome& o) { return o.answer_right; });
  result.chain = detail::share_of(outcomes, [](const Outcome& o) { return o.chain_right; });
  result.lines = detail::mean_of(outcomes, [](const Outcome& o) { return o.lines_right; });
  result.tokens = detail::mean_of(outcomes, [](const Outcome& o) { return o.token_count; });
  result.mean_resident_bytes = detail::mean_of(outcomes, [](const Outcome& o) { return o.mean_resident_bytes; }).mean;
  result.stamped_share = detail::mean_of(outcomes, [](const Outcome& o) { return o.stamped_share; }).mean;
  for (const Outcome& o : outcomes) {
    result.peak_resident_tokens = std::max(result.peak_resident_tokens, o.peak_resident_tokens);
    result.peak_resident_bytes = std::max(result.peak_resident_bytes, o.peak_resident_bytes);
    result.allocated_bytes = std::max(result.allocated_bytes, o.allocated_bytes);
  }
  result.outcomes = std::move(outcomes);
  return result;
}

}  // namespace kvsparse_tools
