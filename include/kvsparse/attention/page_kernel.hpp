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
/// Pages between the one computed with and the one prefetched: scattered pages defeat the hardware's own prefetcher.
inline constexpr std::size_t prefetch_distance = 2;

/// How a block of query heads shares a vector: lane q * tile + t belongs to query q and to the t-th token of a tile.
/// All queries' softmaxes then advance in the same instructions, and reductions stay within a query's lanes.
template <std::size_t Queries>
struct TileLanes {
  static constexpr std::size_t tile = lanes / Queries;

  /// One value for each query, spread over its lanes.
  template <class Value>
  static KVSPARSE_INLINE Floats spread(Value&& value) {
    Floats result{};
    KVSPARSE_UNROLL
    for (std::size_t lane = 0; lane < lanes; ++lane) result[lane] = value(lane / tile);
    return result;
  }
  /// Combines a query's lanes with one another; every one of them then holds the result.
  template <class Combine>
  static KVSPARSE_INLINE Floats reduce(Floats v, Combine&& combine) {
    if constexpr (tile > 1) v = combine(v, simd::exchange<1>(v));
    if constexpr (tile > 2) v = combine(v, simd::exchange<2>(v));
    if constexpr (tile > 4) v = combine(v, simd::exchange<4>(v));
    if constexpr (tile > 8) v = combine(v, simd::exchange<8>(v));
    return v;
  }
  /// Lanes of the tile's first `tokens` tokens keep their value, the others get `other`.
  static KVSPARSE_INLINE Floats keep_tokens(Floats v, std::size_t tokens, Floats other) {
    simd::Ints token{};
    KVSPARSE_UNROLL
    for (std::size_t lane = 0; lane < lanes; ++lane) token[lane] = static_cast<std::int32_t>(lane % tile);
    return token < static_cast<std::int32_t>(tokens) ? v : other;
  }
};

/// One page's logits, then softmax weights, of a block of query heads: vectors in the order of TileLanes.
struct alignas(64) PageWeights {
  float values[query_block * max_page_size];

  template <std::size_t Queries>
  KVSPARSE_INLINE float& at(std::size_t query, std::size_t token) {
    constexpr std::size_t tile = TileLanes<Queries>::tile;
    return values[token / tile * lanes + query * tile + token % tile];
  }
};

template <class Scalar>
KVSPARSE_INLINE void prefetch_rows(const Scalar* rows, std::size_t elements) {
  constexpr std::size_t line = 64;
  const char* bytes = reinterpret_cast<const char*>(rows);
  for (std::size_t i = 0; i < elements * sizeof(Scalar); i += line) simd::prefetch(bytes + i);
}

/// Logits of the page's tokens. Tiles of Queries x tile dot products live in registers; a tile that sticks out of the
/// page repeats the last row, so nothing beyond the page's tokens is read.
template <std::size_t Queries, class Key>
KVSPARSE_INLINE void page_logits(const Key* keys, std::size_t stride, std::size_t tokens, std::size_t row,
                                 const float* queries, std::size_t query_stride, const Key* next_keys,
                                 PageWeights& weights) {
  constexpr std::size_t tile = TileLanes<Queries>::tile;
  for (std::size_t first = 0; first < tokens; first += tile) {
    if (next_keys != nullptr) prefetch_rows(next_keys + first * stride, tile * stride);
    const Key* rows[tile];
    KVSPARSE_UNROLL
    for (std::size_t t = 0; t < tile; ++t) rows[t] = keys + std::min(first + t, tokens - 1) * stride;
    Floats sums[lanes] = {};
    const auto add_products = [&](std::size_t i, auto load_key) {
      Floats query[Queries];
      KVSPARSE_UNROLL
      for (std::size_t q = 0; q < Queries; ++q) query[q] = simd::load(queries + q * query_stride + i);
      KVSPARSE_UNROLL
      for (std::size_t t = 0; t < tile; ++t) {
        const Floats key = load_key(rows[t] + i);
        KVSPARSE_UNROLL
        for (std::size_t q = 0; q < Queries; ++q) {
          Floats& sum = sums[simd::slot_of_lane(q * tile + t)];
          sum = simd::fma(query[q], key, sum);
        }
      }
    };
    std::size_t i = 0;
    for (; i + lanes <= row; i += lanes) {
      add_products(i, [](const Key* key) { return simd::load(key); });
    }
    if constexpr (lanes > row_padding) {
      if (i < row) add_products(i, [](const Key* key) { return simd::load_half_row(key); });
    }
    simd::store(weights.values + first * Queries, simd::sum_each(sums));
  }
}

/// accumulator = keep * accumulator + sum_t weight_t * value_t over Vectors vectors of the row from `offset`.
template <std::size_t Queries, std::size_t Vectors, bool HalfRow, class Value>
KVSPARSE_INLINE void add_values(const Value* values, std::size_t stride, std::size_t tokens, std::size_t offset,
                                const PageWeights& weights, const float* keep, SoftmaxState* states,
                                const Value* next_values) {
  constexpr std::size_t tile = TileLanes<Queries>::tile;
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
        const float weight = weights.values[t / tile * lanes + q * tile + t % tile];
        sums[q][v] = simd::fma(simd::broadcast(weight), element, sums[q][v]);
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
template <std::size_t Queries>
void apply_read_options(const PageRead& read, PageWeights& weights) {
  constexpr float minus_infinity = -std::numeric_limits<float>::infinity();
  for (std::size_t q = 0; q < Queries; ++q) {
    for (std::size_t t = 0; t < read.tokens; ++t) {
      const bool masked = read.token_mask != nullptr && (read.token_mask[t / 64] >> (t % 64) & 1) == 0;
      float& logit = weights.at<Queries>(q, t);
      logit = masked ? minus_infinity : logit + read.log_weight;
    }
  }
}

/// Turns the page's logits into weights relative to the running maximum and folds their sums into the states. Writes by
/// how much each query's accumulator shrinks to keep[Queries].
template <std::size_t Queries>
KVSPARSE_INLINE void page_softmax(const PageRead& read, SoftmaxState* states, PageWeights& weights, float* keep,
                                  PageTap tap) {
  using Tile = TileLanes<Queries>;
  const auto max = [](Floats a, Floats b) { return simd::max(a, b); };
  const auto add = [](Floats a, Floats b) { return a + b; };
  KVSPARSE_ASSERT(read.tokens >= 1 && read.tokens <= max_page_size);
  const std::size_t tiles = divide_up(read.tokens, Tile::tile);
  float* last = weights.values + (tiles - 1) * lanes;
  simd::store(last, Tile::keep_tokens(simd::load(last), read.tokens - (tiles - 1) * Tile::tile,
                                      simd::broadcast(-std::numeric_limits<float>::infinity())));
  // A page whose tokens are all masked keeps a finite maximum: -inf - -inf would be NaN.
  Floats page_max = simd::broadcast(std::numeric_limits<float>::lowest());
  for (std::size_t i = 0; i < tiles; ++i) page_max = simd::max(page_max, simd::load(weights.values + i * lanes));
  page_max = Tile::reduce(page_max, max);
  Floats page_sum{};
  for (std::size_t i = 0; i < tiles; ++i) {
    const Floats weight = simd::exp_nonpositive(simd::load(weights.values + i * lanes) - page_max);
    simd::store(weights.values + i * lanes, weight);
    page_sum += weight;
  }
  page_sum = Tile::reduce(page_sum, add);

  const Floats old_max = Tile::spread([&](std::size_t q) { return states[q].max; });
  const Floats old_sum = Tile::spread([&](std::size_t q) { return states[q].sum; });
  const Floats new_max = simd::max(old_max, page_max);
  const Floats keep_old = simd::exp_nonpositive(old_max - new_max);
  Floats take_page = simd::exp_nonpositive(page_max - new_max);
  const Floats new_sum = simd::fma(old_sum, keep_old, page_sum * take_page);
  if (read.value_log_weight != read.log_weight) {
    take_page *= simd::broadcast(std::exp(read.value_log_weight - read.log_weight));
  }
  for (std::size_t i = 0; i < tiles; ++i) {
    simd::store(weights.values + i * lanes, simd::load(weights.values + i * lanes) * take_page);
  }
  KVSPARSE_UNROLL
  for (std::size_t q = 0; q < Queries; ++q) {
    constexpr std::size_t tile = Tile::tile;
    keep[q] = keep_old[q * tile];
    states[q].max = new_max[q * tile];
    states[q].sum = new_sum[q * tile];
    if (tap.page_max != nullptr) tap.page_max[q] = page_max[q * tile];
    if (tap.page_sum != nullptr) tap.page_sum[q] = page_sum[q * tile];
  }
}

template <std::size_t Queries, class Key, class Value>
void attend_page(const PagedKv<Key, Value>& kv, const PageRead& read, const PageRead* next, const float* queries,
                 std::size_t query_stride, SoftmaxState* states, PageTap tap) {
  const std::size_t row = round_up(kv.head_dim, row_padding);
  const auto keys_of = [&](const PageRead& r) { return kv.keys + r.page.value * kv.key_page_stride; };
  const auto values_of = [&](const PageRead& r) { return kv.values + r.page.value * kv.value_page_stride; };
  PageWeights weights;
  page_logits<Queries>(keys_of(read), kv.key_row_stride, read.tokens, row, queries, query_stride,
                       next != nullptr ? keys_of(*next) : nullptr, weights);
  if (read.token_mask != nullptr || read.log_weight != 0.0F) apply_read_options<Queries>(read, weights);
  if (tap.token_logits != nullptr) {
    for (std::size_t q = 0; q < Queries; ++q) {
      for (std::size_t t = 0; t < read.tokens; ++t) {
        tap.token_logits[q * tap.page_size + t] = weights.at<Queries>(q, t);
      }
    }
  }
  float keep[Queries];
  page_softmax<Queries>(read, states, weights, keep, tap);
  page_values<Queries>(values_of(read), kv.value_row_stride, read.tokens, row, weights, keep, states,
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
    const PageRead* next =
        r + detail::prefetch_distance < reads.size() ? &reads[r + detail::prefetch_distance] : nullptr;
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
