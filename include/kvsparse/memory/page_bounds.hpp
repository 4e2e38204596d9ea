// SPDX-License-Identifier: Apache-2.0
// Quest's bound (2406.10774, section 3.3) of every page for a group of queries, at the bandwidth of the summaries:
// sum_i max(q_i * min_i, q_i * max_i), which no dot product of a query with a key of the page exceeds.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>

#include "../core/geometry.hpp"
#include "../core/simd.hpp"
#include "../core/views.hpp"
#include "page_summary.hpp"
#include "page_table.hpp"

namespace kvsparse {

/// What is written of a page's bounds: one for each query head, or the largest of them.
enum class BoundPooling { none, max };

namespace detail {

/// Queries split by sign, [2, group, stride]: the part above zero meets a page's maximum, the part below its minimum,
/// and no comparison is left.
struct SignedQueries {
  const float* positive;
  const float* negative;
  std::size_t stride;
};

/// Bounds of a tile of pages x Queries query heads, each pair a register until one tree adds up their lanes; query q
/// and page t come out in lane q * tile + t. rows: a page's minimum, behind it its maximum, [row] each. Those of
/// next_rows are prefetched in step.
template <std::size_t Queries, class Scalar>
KVSPARSE_INLINE simd::Floats tile_bounds(const Scalar* const* rows, const Scalar* const* next_rows, std::size_t row,
                                         const SignedQueries& queries) {
  constexpr std::size_t tile = simd::lanes / Queries;
  simd::Floats sums[simd::lanes] = {};
  const auto add_products = [&](const float* query_parts, std::size_t i, std::size_t offset, auto load_row) {
    simd::Floats query[Queries];
    KVSPARSE_UNROLL
    for (std::size_t q = 0; q < Queries; ++q) {
      query[q] = simd::in_register(simd::load(query_parts + q * queries.stride + i));
    }
    KVSPARSE_UNROLL
    for (std::size_t t = 0; t < tile; ++t) {
      simd::prefetch(next_rows[t] + offset + i);
      const simd::Floats element = simd::in_register(load_row(rows[t] + offset + i));
      KVSPARSE_UNROLL
      for (std::size_t q = 0; q < Queries; ++q) {
        simd::Floats& sum = sums[simd::slot_of_lane(q * tile + t)];
        sum = simd::fma(query[q], element, sum);
      }
    }
  };
  const auto add_column = [&](std::size_t i, auto load_row) {
    add_products(queries.negative, i, 0, load_row);
    add_products(queries.positive, i, row, load_row);
  };
  std::size_t i = 0;
  KVSPARSE_NO_UNROLL
  for (; i + simd::lanes <= row; i += simd::lanes) {
    add_column(i, [](const Scalar* p) { return simd::load(p); });
  }
  if constexpr (simd::lanes > row_padding) {
    if (i < row) add_column(i, [](const Scalar* p) { return simd::load_half_row(p); });
  }
  return simd::sum_each(sums);
}

}  // namespace detail

/// bounds [pages, group], or [pages] when pooled. padded_queries: [2, group, round_up(head_dim, 16)] working memory.
/// Neither the number of pages nor of queries changes the bits of a bound. A pooled bound is NaN when that of the
/// first query is, like std::max_element. O(pages * group * head_dim); each summary is loaded from memory once.
template <StorageScalar Scalar>
void page_upper_bounds(const PageSummaries<Scalar>& summaries, std::span<const ResidentPage> pages,
                       const QueryGroup& queries, BoundPooling pooling, std::span<float> padded_queries,
                       std::span<float> bounds) {
  const std::size_t stride = round_up(queries.head_dim, 16);
  const std::size_t row = summaries.row_stride();
  float* positive = padded_queries.data();
  float* negative = padded_queries.data() + queries.size * stride;
  std::fill_n(positive, 2 * queries.size * stride, 0.0F);
  for (std::size_t q = 0; q < queries.size; ++q) {
    for (std::size_t i = 0; i < queries.head_dim; ++i) {
      (queries[q][i] > 0.0F ? positive : negative)[q * stride + i] = queries[q][i];
    }
  }

  // A chunk holds whole tiles of every shape and stays in the first cache for all blocks of queries. Where it sticks
  // out, the last page is repeated. The chunk behind it is prefetched meanwhile.
  constexpr std::size_t chunk = simd::lanes;
  const Scalar* rows[chunk];
  const Scalar* next_rows[chunk];
  const auto locate = [&](std::size_t first, const Scalar** located) {
    for (std::size_t t = 0; t < chunk; ++t) {
      located[t] = summaries.min(pages[std::min(first + t, pages.size() - 1)].page);
    }
  };
  if (!pages.empty()) locate(0, next_rows);
  for (std::size_t first = 0; first < pages.size(); first += chunk) {
    std::copy_n(next_rows, chunk, rows);
    locate(first + chunk, next_rows);
    const std::size_t count = std::min(chunk, pages.size() - first);
    std::size_t block = 0;
    const auto score_block = [&]<std::size_t Queries>() {
      constexpr std::size_t tile = simd::lanes / Queries;
      const detail::SignedQueries of_block{positive + block * stride, negative + block * stride, stride};
      for (std::size_t t = 0; t < count; t += tile) {
        float of_tile[simd::lanes];
        simd::store(of_tile, detail::tile_bounds<Queries>(rows + t, next_rows + t, row, of_block));
        for (std::size_t page = t; page < std::min(t + tile, count); ++page) {
          if (pooling == BoundPooling::none) {
            float* of_page = bounds.data() + (first + page) * queries.size + block;
            for (std::size_t q = 0; q < Queries; ++q) of_page[q] = of_tile[q * tile + page - t];
          } else {
            float largest = block == 0 ? of_tile[page - t] : bounds[first + page];
            for (std::size_t q = 0; q < Queries; ++q) largest = std::max(largest, of_tile[q * tile + page - t]);
            bounds[first + page] = largest;
          }
        }
      }
      block += Queries;
    };
    while (queries.size - block >= 4) score_block.template operator()<4>();
    if (queries.size - block >= 2) score_block.template operator()<2>();
    if (queries.size - block >= 1) score_block.template operator()<1>();
  }
}

/// magnitudes [pages]: no element of a page's keys is larger in magnitude. O(pages * head_dim).
template <StorageScalar Scalar>
void page_largest_magnitudes(const PageSummaries<Scalar>& summaries, std::span<const ResidentPage> pages,
                             std::span<float> magnitudes) {
  const std::size_t row = summaries.row_stride();
  for (std::size_t page = 0; page < pages.size(); ++page) {
    const Scalar* lowest = summaries.min(pages[page].page);
    const Scalar* highest = summaries.max(pages[page].page);
    simd::Floats largest{};
    std::size_t i = 0;
    for (; i + simd::lanes <= row; i += simd::lanes) {
      largest = simd::max(simd::max(-simd::load(lowest + i), simd::load(highest + i)), largest);
    }
    float& magnitude = magnitudes[page] = 0.0F;
    for (std::size_t lane = 0; lane < simd::lanes; ++lane) magnitude = std::max(magnitude, largest[lane]);
    for (; i < row; ++i) magnitude = std::max({magnitude, -simd::widened(lowest[i]), simd::widened(highest[i])});
  }
}

}  // namespace kvsparse
