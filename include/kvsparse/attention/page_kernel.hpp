// SPDX-License-Identifier: Apache-2.0
// Decode attention over a list of pages: online softmax, one page at a time, each page loaded once for all query heads
// of its group. Knows neither cache nor policy: an engine can run it over its own memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <limits>
#include <span>

#include "../core/geometry.hpp"
#include "../core/simd.hpp"
#include "../core/softmax_state.hpp"
#include "../core/views.hpp"

namespace kvsparse {

inline constexpr std::size_t max_page_size = 256;
/// Queries and accumulators are padded with zeros to a multiple of this many floats, whatever the target's vectors are.
inline constexpr std::size_t query_padding = 16;

/// Where the kernel leaves what it saw of each page; null members are not written. A page's own maximum is its
/// reference, so pages with equal logits get equal numbers, wherever they stand in the list.
struct PageTap {
  float* page_max = nullptr;      ///< [reads, group] largest logit
  float* page_sum = nullptr;      ///< [reads, group] sum of exp(logit - page_max)
  float* token_logits = nullptr;  ///< [reads, group, page_size]
  std::size_t page_size = 0;      ///< row length of token_logits

  /// Moves on by `reads` pages of `queries` query heads.
  constexpr void advance(std::size_t reads, std::size_t queries) {
    if (page_max != nullptr) page_max += reads * queries;
    if (page_sum != nullptr) page_sum += reads * queries;
    if (token_logits != nullptr) token_logits += reads * queries * page_size;
  }
};

namespace detail {

using simd::Floats;
using simd::lanes;

inline constexpr std::size_t query_block = 4;

/// One page's logits, then softmax weights, of a block of query heads.
struct alignas(64) PageWeights {
  float row[query_block][max_page_size];
};

template <class Scalar>
KVSPARSE_INLINE void prefetch_rows(const Scalar* rows, std::size_t elements) {
  constexpr std::size_t line = 64;
  const char* bytes = reinterpret_cast<const char*>(rows);
  for (std::size_t i = 0; i < elements * sizeof(Scalar); i += line) simd::prefetch(bytes + i);
}

/// weights.row[q][t] = query q . key t. Tiles of Queries x (lanes / Queries) dot products live in registers; a tile
/// that sticks out of the page repeats the last row, so nothing beyond the page's tokens is read.
template <std::size_t Queries, class Key>
KVSPARSE_INLINE void page_logits(const Key* keys, std::size_t stride, std::size_t tokens, std::size_t row,
                                 const float* queries, std::size_t query_stride, const Key* next_keys,
                                 PageWeights& weights) {
  constexpr std::size_t tile = lanes / Queries;
  for (std::size_t first = 0; first < tokens; first += tile) {
    if (next_keys != nullptr) prefetch_rows(next_keys + first * stride, tile * stride);
    const Key* rows[tile];
    KVSPARSE_UNROLL
    for (std::size_t t = 0; t < tile; ++t) rows[t] = keys + std::min(first + t, tokens - 1) * stride;
    Floats sums[lanes] = {};
    std::size_t i = 0;
    for (; i + lanes <= row; i += lanes) {
      KVSPARSE_UNROLL
      for (std::size_t t = 0; t < tile; ++t) {
        const Floats key = simd::load(rows[t] + i);
        KVSPARSE_UNROLL
        for (std::size_t q = 0; q < Queries; ++q) {
          Floats& sum = sums[simd::slot_of_lane(q * tile + t)];
          sum = simd::fma(simd::load(queries + q * query_stride + i), key, sum);
        }
      }
    }
    if constexpr (lanes > row_padding) {
      if (i < row) {
        KVSPARSE_UNROLL
        for (std::size_t t = 0; t < tile; ++t) {
          const Floats key = simd::load_half_row(rows[t] + i);
          KVSPARSE_UNROLL
          for (std::size_t q = 0; q < Queries; ++q) {
            Floats& sum = sums[simd::slot_of_lane(q * tile + t)];
            sum = simd::fma(simd::load(queries + q * query_stride + i), key, sum);
          }
        }
      }
    }
    float dots[lanes];
    simd::store(dots, simd::sum_each(sums));
    const std::size_t count = std::min(tile, tokens - first);
    for (std::size_t q = 0; q < Queries; ++q) {
      std::memcpy(weights.row[q] + first, dots + q * tile, count * sizeof(float));
    }
  }
}

/// accumulator = keep * accumulator + sum_t weight_t * value_t over Vectors vectors of the row from `offset`.
template <std::size_t Queries, std::size_t Vectors, bool HalfRow, class Value>
KVSPARSE_INLINE void add_values(const Value* values, std::size_t stride, std::size_t tokens, std::size_t offset,
                                const PageWeights& weights, const float* keep, SoftmaxState* states,
                                const Value* next_values) {
  Floats sums[Queries][Vectors];
  KVSPARSE_UNROLL
  for (std::size_t q = 0; q < Queries; ++q) {
    KVSPARSE_UNROLL
    for (std::size_t v = 0; v < Vectors; ++v) {
      sums[q][v] = simd::load(states[q].accumulator + offset + v * lanes) * keep[q];
    }
  }
  for (std::size_t t = 0; t < tokens; ++t) {
    const Value* value = values + t * stride + offset;
    if (next_values != nullptr) prefetch_rows(next_values + t * stride + offset, Vectors * lanes);
    KVSPARSE_UNROLL
    for (std::size_t v = 0; v < Vectors; ++v) {
      Floats element;
      if constexpr (HalfRow) {
        element = simd::load_half_row(value);
      } else {
        element = simd::load(value + v * lanes);
      }
      KVSPARSE_UNROLL
      for (std::size_t q = 0; q < Queries; ++q) {
        sums[q][v] = simd::fma(simd::broadcast(weights.row[q][t]), element, sums[q][v]);
      }
    }
  }
  KVSPARSE_UNROLL
  for (std::size_t q = 0; q < Queries; ++q) {
    KVSPARSE_UNROLL
    for (std::size_t v = 0; v < Vectors; ++v) {
      simd::store(states[q].accumulator + offset + v * lanes, sums[q][v]);
    }
  }
}

template <std::size_t Queries, class Value>
KVSPARSE_INLINE void page_values(const Value* values, std::size_t stride, std::size_t tokens, std::size_t row,
                                 const PageWeights& weights, const float* keep, SoftmaxState* states,
                                 const Value* next_values) {
  // As many accumulators as hide the latency of a fused multiply-add and still fit the registers.
  constexpr std::size_t registers = lanes == 16 ? 16 : 8;
  constexpr std::size_t wide = std::min<std::size_t>(registers / Queries, 8);
  std::size_t i = 0;
  for (; i + wide * lanes <= row; i += wide * lanes) {
    add_values<Queries, wide, false>(values, stride, tokens, i, weights, keep, states, next_values);
  }
  for (; i + 2 * lanes <= row; i += 2 * lanes) {
    add_values<Queries, 2, false>(values, stride, tokens, i, weights, keep, states, next_values);
  }
  for (; i + lanes <= row; i += lanes) {
    add_values<Queries, 1, false>(values, stride, tokens, i, weights, keep, states, next_values);
  }
  if constexpr (lanes > row_padding) {
    if (i < row) add_values<Queries, 1, true>(values, stride, tokens, i, weights, keep, states, next_values);
  }
}

/// Masked tokens leave the softmax; a page that stands for evicted tokens enters it with its weight.
inline void apply_read_options(const PageRead& read, std::size_t queries, PageWeights& weights) {
  constexpr float minus_infinity = -std::numeric_limits<float>::infinity();
  for (std::size_t q = 0; q < queries; ++q) {
    for (std::size_t t = 0; t < read.tokens; ++t) {
      const bool masked = read.token_mask != nullptr && (read.token_mask[t / 64] >> (t % 64) & 1) == 0;
      weights.row[q][t] = masked ? minus_infinity : weights.row[q][t] + read.log_weight;
    }
  }
}

/// Turns a row of logits into exp(logit - max) and returns {max, sum}; the row is padded to whole vectors with zeros.
inline std::pair<float, float> exponentiate(float* row, std::size_t tokens) {
  const std::size_t padded = round_up(tokens, lanes);
  for (std::size_t t = tokens; t < padded; ++t) row[t] = -std::numeric_limits<float>::infinity();
  Floats largest = simd::load(row);
  for (std::size_t t = lanes; t < padded; t += lanes) largest = simd::max(largest, simd::load(row + t));
  // A page whose tokens are all masked keeps a finite maximum: -inf - -inf would be NaN.
  const float max = std::max(simd::max_lane(largest), std::numeric_limits<float>::lowest());
  Floats sum{};
  for (std::size_t t = 0; t < padded; t += lanes) {
    const Floats weight = simd::exp_nonpositive(simd::load(row + t) - max);
    simd::store(row + t, weight);
    sum += weight;
  }
  return {max, simd::sum(sum)};
}

template <std::size_t Queries, class Key, class Value>
KVSPARSE_INLINE void attend_page(const PagedKv<Key, Value>& kv, const PageRead& read, const PageRead* next,
                                 const float* queries, std::size_t query_stride, SoftmaxState* states, PageTap tap) {
  const std::size_t row = round_up(kv.head_dim, row_padding);
  const auto keys_of = [&](const PageRead& r) { return kv.keys + r.page.value * kv.key_page_stride; };
  const auto values_of = [&](const PageRead& r) { return kv.values + r.page.value * kv.value_page_stride; };
  PageWeights weights;
  page_logits<Queries>(keys_of(read), kv.key_row_stride, read.tokens, row, queries, query_stride,
                       next != nullptr ? keys_of(*next) : nullptr, weights);
  if (read.token_mask != nullptr || read.log_weight != 0.0F) apply_read_options(read, Queries, weights);

  // Lanes 0..3 rescale what was accumulated before, lanes 4..7 (a second vector where lanes == 4) the page's weights.
  alignas(64) float rescale[2][lanes] = {};
  float page_sum[Queries];
  for (std::size_t q = 0; q < Queries; ++q) {
    if (tap.token_logits != nullptr) {
      std::memcpy(tap.token_logits + q * tap.page_size, weights.row[q], read.tokens * sizeof(float));
    }
    const auto [max, sum] = exponentiate(weights.row[q], read.tokens);
    if (tap.page_max != nullptr) tap.page_max[q] = max;
    if (tap.page_sum != nullptr) tap.page_sum[q] = sum;
    page_sum[q] = sum;
    const float running = std::max(states[q].max, max);
    rescale[0][q] = states[q].max - running;
    rescale[1][q] = max - running;
    states[q].max = running;
  }
  simd::store(rescale[0], simd::exp_nonpositive(simd::load(rescale[0])));
  simd::store(rescale[1], simd::exp_nonpositive(simd::load(rescale[1])));
  for (std::size_t q = 0; q < Queries; ++q) {
    states[q].sum = states[q].sum * rescale[0][q] + page_sum[q] * rescale[1][q];
    float take = rescale[1][q];
    if (read.value_log_weight != read.log_weight) take *= std::exp(read.value_log_weight - read.log_weight);
    for (std::size_t t = 0; t < read.tokens; t += lanes) {
      simd::store(weights.row[q] + t, simd::load(weights.row[q] + t) * take);
    }
  }
  page_values<Queries>(values_of(read), kv.value_row_stride, read.tokens, row, weights, rescale[0], states,
                       next != nullptr ? values_of(*next) : nullptr);
}

}  // namespace detail

/// Attends to `reads`, in order, and folds them into `states` [group]; empty states are started, others continued.
/// queries: [group, query_stride], already multiplied by the softmax scale and zero from head_dim up to
/// round_up(head_dim, query_padding); every accumulator has that many floats. O(tokens read * head_dim * group); does
/// not allocate. Source: online softmax of Milakov and Gimelshein (1805.02867), page by page as in FlashInfer
/// (2501.01005).
template <class Key, class Value>
void attend_pages(const PagedKv<Key, Value>& kv, std::span<const PageRead> reads, const float* queries,
                  std::size_t query_stride, std::span<SoftmaxState> states, PageTap tap = {}) noexcept {
  const std::size_t group = states.size();
  for (std::size_t r = 0; r < reads.size(); ++r) {
    const PageRead* next = r + 1 < reads.size() ? &reads[r + 1] : nullptr;
    std::size_t q = 0;
    const auto block = [&]<std::size_t Queries>() {
      detail::attend_page<Queries>(kv, reads[r], q == 0 ? next : nullptr, queries + q * query_stride, query_stride,
                                   states.data() + q, tap);
      q += Queries;
      tap.advance(1, Queries);
    };
    while (group - q >= 4) block.template operator()<4>();
    if (group - q >= 2) block.template operator()<2>();
    if (group - q >= 1) block.template operator()<1>();
  }
}

}  // namespace kvsparse
