// SPDX-License-Identifier: Apache-2.0
// What a query needs while a kv head is read: itself scaled and padded, and softmax states, cut into ranges that
// threads can share.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <vector>

#include "../attention/page_kernel.hpp"
#include "../core/geometry.hpp"
#include "../core/saturating_size.hpp"
#include "../core/softmax_state.hpp"
#include "../core/views.hpp"

namespace kvsparse::detail {

/// Tokens of the pages that one thread reads in one go, about 20 us of work at 4 query heads of 128. A constant, so
/// that the order of every sum follows from the pages read alone, whoever reads them.
inline constexpr std::size_t range_tokens = 1024;

/// Writes the queries scaled and padded: [group.size, row].
inline void pad_queries(QueryGroup group, float* padded, std::size_t row) {
  for (std::size_t q = 0; q < group.size; ++q) {
    float* query = padded + q * row;
    for (std::size_t i = 0; i < group.head_dim; ++i) query[i] = group[q][i] * group.scale;
    for (std::size_t i = group.head_dim; i < row; ++i) query[i] = 0.0F;
  }
}

/// Queries of a prompt's tokens that read a page together, the whole group of each token.
inline constexpr std::size_t tile_queries = 16;

/// Working memory of attend() for the query heads of one kv head. A list of reads is cut into ranges of pages, so that
/// threads can share a head. Each range has softmax states of its own; those of the first are the head's.
class AttendScratch {
 public:
  /// row, value_row: head_dim and value_dim, padded.
  AttendScratch(std::size_t pages, std::size_t page_size, std::size_t group, std::size_t row, std::size_t value_row)
      : range_pages(pages_of_range(page_size)),
        queries(group * row),
        group_(group),
        value_row_(value_row),
        states_(elements(pages, page_size, group, state_gap)),
        accumulators_(elements(pages, page_size, SaturatingSize(group) * value_row, accumulator_gap)) {}

  /// Bytes that construction allocates for a head of at most `pages` pages.
  static constexpr SaturatingSize bytes_required(std::size_t pages, std::size_t page_size, std::size_t group,
                                                 std::size_t row, std::size_t value_row) {
    const SaturatingSize queries = SaturatingSize(group) * row, values = SaturatingSize(group) * value_row;
    return (queries + elements(pages, page_size, values, accumulator_gap)) * sizeof(float) +
           elements(pages, page_size, group, state_gap) * sizeof(SoftmaxState);
  }

  /// Ranges of a list of so many reads.
  std::size_t ranges(std::size_t read_count) const { return divide_up(read_count, range_pages); }

  /// Empties a range's states of `count` query heads and returns them.
  std::span<SoftmaxState> start(std::size_t range, std::size_t first_query, std::size_t count) {
    const std::span<SoftmaxState> result = states(range, first_query, count);
    float* accumulator =
        accumulators_.data() + range * (group_ * value_row_ + accumulator_gap) + first_query * value_row_;
    std::fill_n(accumulator, count * value_row_, 0.0F);
    for (std::size_t q = 0; q < count; ++q) {
      result[q] = SoftmaxState{};
      result[q].accumulator = accumulator + q * value_row_;
    }
    return result;
  }
  std::span<SoftmaxState> states(std::size_t range, std::size_t first_query, std::size_t count) {
    return {states_.data() + range * (group_ + state_gap) + first_query, count};
  }

  std::size_t range_pages;           // pages of a range
  std::vector<float> queries;        // [group, padded head_dim] scaled
  std::span<const PageRead> reads;   // of the running query, when its group selects together
  bool reads_may_be_shared = false;  // threads may read the ranges of `reads` at the same time

 private:
  // Ranges that threads work on at the same time lie a cache line apart.
  static constexpr std::size_t state_gap = 64 / sizeof(SoftmaxState);
  static constexpr std::size_t accumulator_gap = 64 / sizeof(float);

  static constexpr std::size_t pages_of_range(std::size_t page_size) {
    return page_size < range_tokens ? range_tokens / page_size : 1;
  }
  /// The last range is followed by no gap.
  static constexpr SaturatingSize elements(std::size_t pages, std::size_t page_size, SaturatingSize of_range,
                                           std::size_t gap) {
    const std::size_t ranges = divide_up(pages, pages_of_range(page_size));
    return of_range * ranges + gap * (ranges - 1);
  }

  std::size_t group_;
  std::size_t value_row_;
  std::vector<SoftmaxState> states_;  // [ranges, group]
  std::vector<float> accumulators_;   // [ranges, group, padded value_dim]
};

}  // namespace kvsparse::detail
