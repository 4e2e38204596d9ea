// SPDX-License-Identifier: Apache-2.0
// What `reasoning` found: as tables for people, as CSV and JSON for machines. No timings: the same run writes the same
// bytes on every machine load and thread count.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <nlohmann/json.hpp>
#include <optional>
#include <ostream>
#include <set>
#include <string>
#include <vector>

#include "cell.hpp"
#include "common/csv.hpp"
#include "common/text_table.hpp"

namespace kvsparse_tools {

/// Version of the JSON that --json writes; raised when a field changes its meaning or goes.
inline constexpr int reasoning_json_schema = 1;

class ReasoningReport {
 public:
  using Json = nlohmann::ordered_json;

  ReasoningReport(const ReasoningOptions& options, const std::vector<Cell>& cells)
      : options_(options), cells_(cells), results_(cells.size()) {}

  void add(std::size_t cell, CellResult result) { results_[cell] = std::move(result); }
  const std::optional<CellResult>& result(std::size_t cell) const { return results_[cell]; }
  bool complete() const {
    return std::all_of(results_.begin(), results_.end(), [](const auto& result) { return result.has_value(); });
  }

  /// A header line, then one line per finished cell.
  std::string csv() const {
    std::string text = csv_header(fields({}, {}));
    for (std::size_t i = 0; i < cells_.size(); ++i) {
      if (results_[i]) text += csv_line(fields(cells_[i], *results_[i]));
    }
    return text;
  }

  /// `text_of` turns tokens into words.
  template <class TextOf>
  std::string json(TextOf&& text_of) const {
    Json json{{"schema", reasoning_json_schema}, {"tool", "reasoning"}, {"complete", complete()}};
    json["experiment"] = options_.experiment.name.empty() ? Json() : Json(options_.experiment.name);
    for (const NamedModel& model : options_.models) json["models"][model.name] = model.directory;
    json["dense_layers"] = options_.dense_layers;
    json["cells"] = Json::array();
    for (std::size_t i = 0; i < cells_.size(); ++i) {
      if (!results_[i]) continue;
      Json cell = fields(cells_[i], *results_[i]);
      cell["refused"] = results_[i]->refusal.empty() ? Json() : Json(results_[i]->refusal);
      const auto per_problem = [&](const char* name, const auto& value) {
        cell[name] = Json::array();
        for (const Outcome& outcome : results_[i]->outcomes) cell[name].push_back(value(outcome));
      };
      per_problem("answers", [](const Outcome& o) { return o.answer; });
      per_problem("answers_right", [](const Outcome& o) { return o.answer_right; });
      per_problem("lines_right_each", [](const Outcome& o) { return o.lines_right; });
      per_problem("tokens_each", [](const Outcome& o) { return o.token_count; });
      if (options_.texts) {
        per_problem("texts", [&](const Outcome& o) { return text_of(cells_[i], o.tokens); });
      }
      json["cells"].push_back(std::move(cell));
    }
    return json.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
  }

  void print(std::ostream& out) const {
    // A table for each model, problem set and page size, in the order of the cells.
    std::vector<const Cell*> tables;
    for (const Cell& cell : cells_) {
      const auto in_table = [&](const Cell* table) {
        return table->same_table(cell) && table->page_size == cell.page_size;
      };
      if (std::none_of(tables.begin(), tables.end(), in_table)) tables.push_back(&cell);
    }
    for (const Cell* table : tables) print_table(out, *table);
    out << "cells          right answers in %, (standard error), lines before the first error\n"
           "budget         tokens a kv head may keep, prompt included; quest and oracle keep all and read as many\n"
           "right answer   the last number before the last \";\" of a text of the chain's length (varied: of a text "
           "that the model ended)\n";
  }

 private:
  static Json number(double value) { return std::isfinite(value) ? Json(value) : Json(); }

  /// The columns of both files; what was not measured is null.
  Json fields(const Cell& cell, const CellResult& result) const {
    const bool measured = result.refusal.empty();
    const auto known = [&](const auto& value) { return measured ? number(static_cast<double>(value)) : Json(); };
    const auto counted = [&](const auto& value) { return measured ? Json(value) : Json(); };
    Json json{{"model", cell.model}, {"set", cell.set}, {"format", line_format_name(cell.format)}};
    json["lines"] = cell.lines;
    json["problems"] = options_.experiment.problems;
    json["seed"] = options_.seed;
    json["policy"] = cell.variant.text;
    json["page_size"] = cell.page_size;
    json["budget"] = cell.budget == 0 ? Json() : Json(cell.budget);
    json["dtype"] = kvsparse::scalar_type_names[static_cast<std::size_t>(options_.dtype)];
    json["answer_right"] = known(result.answer.mean);
    json["answer_stderr"] = known(result.answer.error);
    json["chain_right"] = known(result.chain.mean);
    json["chain_stderr"] = known(result.chain.error);
    json["lines_right"] = known(result.lines.mean);
    json["lines_stderr"] = known(result.lines.error);
    json["tokens_generated"] = known(result.tokens.mean);
    json["tokens_stderr"] = known(result.tokens.error);
    json["peak_resident_tokens"] = counted(result.peak_resident_tokens);
    json["peak_resident_bytes"] = counted(result.peak_resident_bytes);
    json["mean_resident_bytes"] = known(result.mean_resident_bytes);
    json["allocated_bytes"] = counted(result.allocated_bytes);
    json["stamped_share"] = known(result.stamped_share);
    json["refused"] = measured ? Json() : Json("refused");
    return json;
  }

  void print_table(std::ostream& out, const Cell& table) const {
    std::set<std::size_t> budgets;
    std::vector<std::string> variants;
    for (const Cell& cell : cells_) {
      if (!belongs(cell, table)) continue;
      if (cell.budget != 0) budgets.insert(cell.budget);
      if (std::find(variants.begin(), variants.end(), cell.variant.text) == variants.end()) {
        variants.push_back(cell.variant.text);
      }
    }
    if (budgets.empty()) budgets.insert(0);
    out << "model " << table.model << ", set " << table.set << ", pages of " << table.page_size << " tokens, "
        << options_.experiment.problems << " problems of " << table.lines << " lines ("
        << line_format_name(table.format) << ")\n\n";
    std::vector<std::string> header{"policy"};
    for (const std::size_t budget : budgets) header.push_back(budget == 0 ? "all kept" : std::to_string(budget));
    TextTable text(header);
    for (const std::string& variant : variants) {
      std::vector<std::string> row{variant};
      for (const std::size_t budget : budgets) row.push_back(text_of_cell(table, variant, budget));
      text.add_row(std::move(row));
    }
    text.print(out);
    out << '\n';
  }

  /// What ignores the budget stands in the tables of all page sizes.
  static bool belongs(const Cell& cell, const Cell& table) {
    return cell.same_table(table) && (cell.page_size == table.page_size || cell.variant.ignores_budget);
  }

  std::string text_of_cell(const Cell& table, const std::string& variant, std::size_t budget) const {
    for (std::size_t i = 0; i < cells_.size(); ++i) {
      const Cell& cell = cells_[i];
      if (!belongs(cell, table) || cell.variant.text != variant || !results_[i]) continue;
      if (!cell.variant.ignores_budget && cell.budget != budget) continue;
      if (!results_[i]->refusal.empty()) return "refused";
      return fixed_text(100.0 * results_[i]->answer.mean, 0) + " (" + fixed_text(100.0 * results_[i]->answer.error, 1) +
             ") " + fixed_text(results_[i]->lines.mean, 1);
    }
    return "-";
  }

  const ReasoningOptions& options_;
  const std::vector<Cell>& cells_;
  std::vector<std::optional<CellResult>> results_;  // by cell; empty: not finished
};

}  // namespace kvsparse_tools
