// SPDX-License-Identifier: Apache-2.0
// What a policy keeps and reads, step by step, small enough for a page of --report whatever the trace's length.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <kvsparse/cache/any_cache.hpp>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "common/trace.hpp"

namespace kvsparse_tools {

/// Which steps, positions and kv heads are shown. A row is one decode step, one in `step_stride`, the last one always
/// among them; a column is `column_tokens` positions, whole pages.
struct WaterfallGrid {
  std::size_t steps = 0;  // decode steps of the trace
  std::size_t tokens = 0;
  std::size_t prompt_tokens = 0;
  std::size_t step_stride = 1;
  std::size_t column_tokens = 1;
  std::size_t columns = 0;
  std::size_t kv_heads = 0;  // the first ones of the trace

  /// All waterfalls of `runs` runs together take at most about twelve million cells.
  static WaterfallGrid of(const Trace& trace, std::size_t page_size, std::size_t runs) {
    constexpr std::size_t all_cells = 12'000'000, most_panels = 2048, most_rows = 1024;
    WaterfallGrid grid;
    grid.tokens = trace.tokens;
    grid.prompt_tokens = trace.prompt_tokens;
    grid.steps = trace.tokens - trace.prompt_tokens;
    grid.kv_heads = std::clamp<std::size_t>(most_panels / runs, 1, trace.kv_heads);
    const std::size_t cells = std::max<std::size_t>(all_cells / (runs * grid.kv_heads), 4096);
    const auto most_columns = std::min<std::size_t>(static_cast<std::size_t>(std::sqrt(cells)), 256);
    const std::size_t pages = rounded_up(trace.tokens, page_size);
    grid.column_tokens = page_size * rounded_up(pages, most_columns);
    grid.columns = rounded_up(trace.tokens, grid.column_tokens);
    grid.step_stride = rounded_up(grid.steps, std::min(most_rows, cells / grid.columns));
    return grid;
  }

  bool shows_step(std::size_t step) const { return (steps - 1 - step) % step_stride == 0; }
  std::size_t first_step() const { return (steps - 1) % step_stride; }

 private:
  static std::size_t rounded_up(std::size_t count, std::size_t unit) { return (count + unit - 1) / unit; }
};

/// One kv head of one run: its waterfall, and the figures of each row.
class Waterfall {
 public:
  struct Row {
    std::size_t resident_tokens = 0;
    std::size_t read_tokens = 0;
    double share = 0.0;  // of the dense softmax on what was read, and the output's error: means over the query group
    double error = 0.0;
  };
  /// Positions that were resident, or not yet written, at the row before, and are gone.
  struct Evicted {
    std::size_t tokens = 0;
    std::vector<std::pair<std::size_t, std::size_t>> ranges;  // first and last position of the lowest ones
  };

  explicit Waterfall(const WaterfallGrid& grid) : grid_(grid), columns_(grid.columns) {}

  /// The next row, of a step that the grid shows, after its query attended. O(tokens).
  void add(const kvsparse::AnyCache& cache, std::size_t kv_head, std::size_t token, double share, double error) {
    const Flags resident = flags_of(cache.resident_positions(kv_head), token);
    const Flags read = flags_of(cache.read_positions(kv_head), token);
    for (std::size_t column = 0; column * grid_.column_tokens <= token; ++column) {
      const std::size_t begin = column * grid_.column_tokens;
      const std::size_t end = std::min(begin + grid_.column_tokens, token + 1);
      columns_[column].add(static_cast<char>('a' + 4 * level(resident, begin, end) + level(read, begin, end)));
    }
    note_evicted(resident);
    rows_.push_back({count(resident), count(read), share, error});
    resident_ = resident;
  }

  const std::vector<Row>& rows() const { return rows_; }
  /// By row; rows without an eviction are absent.
  const std::map<std::size_t, Evicted>& evicted() const { return evicted_; }

  /// The columns from position 0 on, separated by commas. A column is runs of equal cells from the row on at which it
  /// has a first token to the last row: a letter, and how many cells if more than one. The letter is
  /// 'a' + 4 * (share of the column's tokens that is resident) + (share that was read); shares are 0 for none, 1 for
  /// less than half, 2 for half or more, 3 for all.
  std::string text() const {
    std::string text;
    for (const Column& column : columns_)
      text += (&column == columns_.data() ? "" : ",") + column.runs + column.last_run();
    return text;
  }

 private:
  using Flags = std::vector<bool>;  // by position, up to the current one

  struct Column {
    std::string runs;  // all but the last
    char kind = 0;
    std::size_t cells = 0;

    void add(char next) {
      if (next != kind) {
        runs += last_run();
        kind = next;
        cells = 0;
      }
      ++cells;
    }
    std::string last_run() const {
      if (cells == 0) return "";
      return kind + (cells > 1 ? std::to_string(cells) : std::string());
    }
  };

  static Flags flags_of(const std::vector<kvsparse::Position>& positions, std::size_t token) {
    Flags flags(token + 1);
    for (const kvsparse::Position position : positions) flags[static_cast<std::size_t>(position.value)] = true;
    return flags;
  }
  static std::size_t count(const Flags& flags) {
    return static_cast<std::size_t>(std::count(flags.begin(), flags.end(), true));
  }
  static int level(const Flags& flags, std::size_t begin, std::size_t end) {
    const auto first = flags.begin();
    const auto set = static_cast<std::size_t>(
        std::count(first + static_cast<std::ptrdiff_t>(begin), first + static_cast<std::ptrdiff_t>(end), true));
    if (set == 0) return 0;
    if (set == end - begin) return 3;
    return 2 * set < end - begin ? 1 : 2;
  }

  void note_evicted(const Flags& resident) {
    constexpr std::size_t most_ranges = 6;
    Evicted gone;
    for (std::size_t position = 0; position < resident.size(); ++position) {
      const bool was_there = position >= resident_.size() || resident_[position];
      if (resident[position] || !was_there) continue;
      ++gone.tokens;
      if (!gone.ranges.empty() && gone.ranges.back().second + 1 == position) {
        gone.ranges.back().second = position;
      } else if (gone.ranges.size() < most_ranges) {
        gone.ranges.emplace_back(position, position);
      }
    }
    if (gone.tokens > 0) evicted_.emplace(rows_.size(), std::move(gone));
  }

  WaterfallGrid grid_;
  std::vector<Column> columns_;
  std::vector<Row> rows_;
  std::map<std::size_t, Evicted> evicted_;
  Flags resident_;  // at the latest row
};

}  // namespace kvsparse_tools
