// SPDX-License-Identifier: Apache-2.0
// Decode attention over a list of pages: online softmax, a chunk of pages at a time, each page loaded once for all
// query heads of its group. Knows neither cache nor policy: an engine can run it over its own memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <limits>
#include <span>

#include "../core/geometry.hpp"
#include "../core/simd.hpp"
#include "../core/softmax_state.hpp"
#include "../core/stored_row.hpp"
#include "../core/views.hpp"
#include "logit_map.hpp"

namespace kvsparse {

/// Queries and accumulators are padded with zeros to a multiple of this many floats, whatever the target's vectors are.
inline constexpr std::size_t query_padding = 16;

/// Where the kernel leaves what it saw of each page; null members are not written. A page's own maximum is its
/// reference, so pages with equal logits get equal numbers, wherever they stand in the list.
struct PageTap {
  float* page_max = nullptr;      ///< [reads, queries] largest logit
  float* page_sum = nullptr;      ///< [reads, queries] sum of exp(logit - page_max)
  float* token_logits = nullptr;  ///< [reads, queries, page_size]
  std::size_t queries = 0;        ///< row length; at least as many as attend
  std::size_t page_size = 0;      ///< row length of token_logits

  /// The same from another read and another query on.
  constexpr PageTap from(std::size_t read, std::size_t query) const {
    PageTap tap = *this;
    const std::size_t offset = read * queries + query;
    if (page_max != nullptr) tap.page_max += offset;
    if (page_sum != nullptr) tap.page_sum += offset;
    if (token_logits != nullptr) tap.token_logits += offset * page_size;
    return tap;
  }
};

namespace detail {

using simd::Floats;
using simd::lanes;

inline constexpr std::size_t query_block = 4;
/// Tokens whose softmax advances together: enough of them that rescaling the accumulators and moving the maximum cost
/// little, few enough that their keys and values stay in a near cache.
inline constexpr std::size_t chunk_tokens = 128;

/// How a block of query heads shares a vector: lane q * tile + t belongs to query q and to the t-th token of a tile.
/// All queries' softmaxes then advance in the same instructions, and reductions stay within a query's lanes.
template <std::size_t Queries>
struct TileLanes {
  static constexpr std::size_t tile = lanes / Queries;

  /// One value for each query, spread over its lanes.
  template <class Value>
  static KVSPARSE_INLINE Floats spread(Value&& value) {
    Floats values{};
    KVSPARSE_UNROLL
    for (std::size_t q = 0; q < Queries; ++q) values[q] = value(q);
    return spread(values, std::make_index_sequence<lanes>{});
  }
  /// One value for each token of a tile, repeated for every query.
  template <class Value>
  static KVSPARSE_INLINE Floats of_tokens(Value&& value) {
    Floats values{};
    KVSPARSE_UNROLL
    for (std::size_t t = 0; t < tile; ++t) values[t] = value(t);
    return repeat(values, std::make_index_sequence<lanes>{});
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
  /// To lanes t * Queries + q.
  static KVSPARSE_INLINE Floats token_major(Floats v) { return transpose(v, std::make_index_sequence<lanes>{}); }

  /// Where a page's tiles hold the lane of a query and a token.
  static constexpr std::size_t at(std::size_t query, std::size_t token) {
    return token / tile * lanes + query * tile + token % tile;
  }
  /// Floats that a page's tiles take.
  static constexpr std::size_t page_floats(const PageRead& read) { return round_up(read.tokens, tile) * Queries; }

 private:
  template <std::size_t... Lane>
  static KVSPARSE_INLINE Floats spread(Floats v, std::index_sequence<Lane...>) {
    return __builtin_shufflevector(v, v, static_cast<int>(Lane / tile)...);
  }
  template <std::size_t... Lane>
  static KVSPARSE_INLINE Floats repeat(Floats v, std::index_sequence<Lane...>) {
    return __builtin_shufflevector(v, v, static_cast<int>(Lane % tile)...);
  }
  template <std::size_t... Lane>
  static KVSPARSE_INLINE Floats transpose(Floats v, std::index_sequence<Lane...>) {
    return __builtin_shufflevector(v, v, static_cast<int>(Lane % Queries * tile + Lane / Queries)...);
  }
};

/// Pages whose softmax advances together, and what follows them: the keys to prefetch.
struct Chunk {
  std::span<const PageRead> reads;
  std::span<const PageRead> next;
};

/// A chunk's logits for a block of query heads, page after page in the lanes of TileLanes; then its softmax weights,
/// page after page, [tokens, Queries].
struct alignas(64) ChunkWeights {
  float values[query_block * max_page_size];
};

/// As many pages as make up a chunk, at least one.
inline Chunk first_chunk(std::span<const PageRead> reads) {
  std::size_t pages = 0;
  std::size_t tokens = 0;
  std::size_t padded = 0;  // a page's tiles are whole, whatever they cost
  while (pages < reads.size()) {
    tokens += reads[pages].tokens;
    padded += round_up(reads[pages].tokens, lanes);
    if (pages > 0 && (tokens > chunk_tokens || padded > max_page_size)) break;
    ++pages;
  }
  const std::size_t ahead = std::min(reads.size() - pages, pages);
  return {reads.first(pages), reads.subspan(pages, ahead)};
}

template <std::size_t Count, class Scalar>
KVSPARSE_INLINE void prefetch_elements(const Scalar* elements) {
  constexpr std::size_t line = 64;
  const char* bytes = reinterpret_cast<const char*>(elements);
  KVSPARSE_UNROLL
  for (std::size_t i = 0; i < Count * sizeof(Scalar); i += line) simd::prefetch(bytes + i);
}

/// Logits of the page's tokens, -inf in the lanes beyond them. Tiles of Queries x tile dot products live in registers;
/// a tile that sticks out of the page repeats the last row, so nothing beyond the page's tokens is read. The page's
/// values, wanted next, are prefetched meanwhile, as many elements in each round as keys are read: a loop of its own
/// would cost more than the prefetches.
template <std::size_t Queries, class Key, class Value>
KVSPARSE_INLINE void page_logits(const PagedKv<Key, Value>& kv, const PageRead& read, const float* queries,
                                 std::size_t query_stride, float* logits) {
  using Tile = TileLanes<Queries>;
  constexpr std::size_t tile = Tile::tile;
  const Key* keys = kv.keys + read.page.value * kv.key_page_stride;
  const Value* values = kv.values + read.page.value * kv.value_page_stride;
  const std::size_t row = round_up(kv.head_dim, row_padding);
  const std::size_t last = read.tokens - 1;
  for (std::size_t first = 0; first <= last; first += tile) {
    const Value* wanted_next = values + first * kv.value_row_stride;
    const Key* rows[tile];
    KVSPARSE_UNROLL
    for (std::size_t t = 0; t < tile; ++t) rows[t] = keys + std::min(first + t, last) * kv.key_row_stride;
    Floats sums[lanes] = {};
    const auto add_products = [&](std::size_t i, auto load_key) {
      prefetch_elements<tile * lanes>(wanted_next + tile * i);
      Floats query[Queries];
      KVSPARSE_UNROLL
      for (std::size_t q = 0; q < Queries; ++q) {
        query[q] = simd::in_register(simd::load(queries + q * query_stride + i));
      }
      KVSPARSE_UNROLL
      for (std::size_t t = 0; t < tile; ++t) {
        const Floats key = simd::in_register(load_key(rows[t] + i));
        KVSPARSE_UNROLL
        for (std::size_t q = 0; q < Queries; ++q) {
          Floats& sum = sums[simd::slot_of_lane(q * tile + t)];
          sum = simd::fma(query[q], key, sum);
        }
      }
    };
    std::size_t i = 0;
    KVSPARSE_NO_UNROLL
    for (; i + lanes <= row; i += lanes) {
      add_products(i, [](const Key* key) { return simd::load(key); });
    }
    if constexpr (lanes > row_padding) {
      if (i < row) add_products(i, [](const Key* key) { return simd::load_half_row(key); });
    }
    if constexpr (has_scale<Value>) simd::prefetch(wanted_next + tile * kv.value_row_stride - 1);
    Floats products = simd::sum_each(sums);
    if constexpr (has_scale<Key>)
      products *= Tile::of_tokens([&](std::size_t t) { return row_scale(rows[t], kv.head_dim); });
    simd::store(logits + first * Queries, products);
  }
  float* last_tile = logits + last / tile * lanes;
  simd::store(last_tile, Tile::keep_tokens(simd::load(last_tile), last % tile + 1,
                                           simd::broadcast(-std::numeric_limits<float>::infinity())));
}

/// Masked tokens leave the softmax; a page that stands for evicted tokens enters it with its weight.
template <std::size_t Queries>
void apply_read_options(const PageRead& read, float* logits) {
  for (std::size_t q = 0; q < Queries; ++q) {
    for (std::size_t t = 0; t < read.tokens; ++t) {
      const bool masked = read.token_mask != nullptr && (read.token_mask[t / 64] >> (t % 64) & 1) == 0;
      float& logit = logits[TileLanes<Queries>::at(q, t)];
      logit = masked ? -std::numeric_limits<float>::infinity() : logit + read.log_weight;
    }
  }
}

/// Turns the chunk's logits into weights relative to the running maximum, times the scales of the values' rows, and
/// folds the weights' sums into the states. Writes by how much each query's accumulator shrinks to keep[Queries].
template <std::size_t Queries, class Key, class Value>
KVSPARSE_INLINE void chunk_softmax([[maybe_unused]] const PagedKv<Key, Value>& kv, std::span<const PageRead> reads,
                                   SoftmaxState* states, ChunkWeights& weights, float* keep, PageTap tap) {
  using Tile = TileLanes<Queries>;
  const auto max = [](Floats a, Floats b) { return simd::max(a, b); };
  const auto add = [](Floats a, Floats b) { return a + b; };
  Floats page_max[chunk_tokens];
  Floats page_sum[chunk_tokens];
  const Floats old_max = Tile::spread([&](std::size_t q) { return states[q].max; });
  const Floats old_sum = Tile::spread([&](std::size_t q) { return states[q].sum; });
  Floats new_max = old_max;
  float* page = weights.values;
  for (std::size_t r = 0; r < reads.size(); ++r) {
    const std::size_t floats = Tile::page_floats(reads[r]);
    // A page whose tokens are all masked keeps a finite maximum: -inf - -inf would be NaN.
    Floats largest = simd::broadcast(std::numeric_limits<float>::lowest());
    for (std::size_t i = 0; i < floats; i += lanes) largest = simd::max(largest, simd::load(page + i));
    largest = Tile::reduce(largest, max);
    Floats sum{};
    for (std::size_t i = 0; i < floats; i += lanes) {
      const Floats weight = simd::exp_nonpositive(simd::load(page + i) - largest);
      simd::store(page + i, weight);
      sum += weight;
    }
    page_max[r] = largest;
    page_sum[r] = Tile::reduce(sum, add);
    new_max = simd::max(new_max, largest);
    page += floats;
  }
  const Floats keep_old = simd::exp_nonpositive(old_max - new_max);
  Floats new_sum = old_sum * keep_old;
  page = weights.values;
  for (std::size_t r = 0; r < reads.size(); ++r) {
    Floats take_page = simd::exp_nonpositive(page_max[r] - new_max);
    new_sum = simd::fma(page_sum[r], take_page, new_sum);
    if (reads[r].value_log_weight != reads[r].log_weight) {
      take_page *= simd::broadcast(std::exp(reads[r].value_log_weight - reads[r].log_weight));
    }
    const std::size_t floats = Tile::page_floats(reads[r]);
    for (std::size_t i = 0; i < floats; i += lanes) {
      Floats weight = simd::load(page + i) * take_page;
      if constexpr (has_scale<Value>) {
        const Value* values = kv.values + reads[r].page.value * kv.value_page_stride;
        weight *= Tile::of_tokens([&](std::size_t t) {
          const std::size_t token = std::min<std::size_t>(i / Queries + t, reads[r].tokens - 1);
          return row_scale(values + token * kv.value_row_stride, kv.dim_before_value_scale());
        });
      }
      simd::store(page + i, Tile::token_major(weight));
    }
    page += floats;
    for (std::size_t q = 0; q < Queries; ++q) {
      if (tap.page_max != nullptr) tap.page_max[r * tap.queries + q] = page_max[r][q * Tile::tile];
      if (tap.page_sum != nullptr) tap.page_sum[r * tap.queries + q] = page_sum[r][q * Tile::tile];
    }
  }
  KVSPARSE_UNROLL
  for (std::size_t q = 0; q < Queries; ++q) {
    keep[q] = keep_old[q * Tile::tile];
    states[q].max = new_max[q * Tile::tile];
    states[q].sum = new_sum[q * Tile::tile];
  }
}

/// accumulator = keep * accumulator + sum_t weight_t * value_t over the chunk's tokens, for Vectors vectors of the row
/// from `offset`. Prefetches the same share of the next chunk's keys.
template <std::size_t Queries, std::size_t Vectors, bool HalfRow, class Key, class Value>
KVSPARSE_INLINE void add_values(const PagedKv<Key, Value>& kv, const Chunk& chunk, std::size_t offset,
                                const ChunkWeights& weights, const float* keep, SoftmaxState* states) {
  Floats sums[Queries][Vectors];
  KVSPARSE_UNROLL
  for (std::size_t q = 0; q < Queries; ++q) {
    KVSPARSE_UNROLL
    for (std::size_t v = 0; v < Vectors; ++v) {
      sums[q][v] = simd::load(states[q].accumulator + offset + v * lanes) * keep[q];
    }
  }
  const float* weight = weights.values;
  for (std::size_t r = 0; r < chunk.reads.size(); ++r) {
    const PageRead& read = chunk.reads[r];
    const PageRead& next = r < chunk.next.size() ? chunk.next[r] : read;
    const Key* wanted_next = kv.keys + next.page.value * kv.key_page_stride + offset;
    const Value* value = kv.values + read.page.value * kv.value_page_stride + offset;
    KVSPARSE_NO_UNROLL
    for (std::size_t t = 0; t < read.tokens; ++t) {
      prefetch_elements<Vectors * lanes>(wanted_next);
      if constexpr (has_scale<Key>) simd::prefetch(wanted_next + Vectors * lanes);
      wanted_next += kv.key_row_stride;
      Floats of_query[Queries];
      KVSPARSE_UNROLL
      for (std::size_t q = 0; q < Queries; ++q) {
        of_query[q] = simd::in_register(simd::broadcast(weight[t * Queries + q]));
      }
      KVSPARSE_UNROLL
      for (std::size_t v = 0; v < Vectors; ++v) {
        const Floats element = simd::in_register(HalfRow ? simd::load_half_row(value) : simd::load(value + v * lanes));
        KVSPARSE_UNROLL
        for (std::size_t q = 0; q < Queries; ++q) sums[q][v] = simd::fma(of_query[q], element, sums[q][v]);
      }
      value += kv.value_row_stride;
    }
    weight += TileLanes<Queries>::page_floats(read);
  }
  KVSPARSE_UNROLL
  for (std::size_t q = 0; q < Queries; ++q) {
    KVSPARSE_UNROLL
    for (std::size_t v = 0; v < Vectors; ++v) {
      simd::store(states[q].accumulator + offset + v * lanes, sums[q][v]);
    }
  }
}

template <std::size_t Queries, class Key, class Value>
KVSPARSE_INLINE void chunk_values(const PagedKv<Key, Value>& kv, const Chunk& chunk, const ChunkWeights& weights,
                                  const float* keep, SoftmaxState* states) {
  const std::size_t row = round_up(kv.dim_of_values(), row_padding);
  // As many accumulators as hide the latency of a fused multiply-add and, with what they are made of, fit the
  // registers.
  constexpr std::size_t accumulators = lanes == 16 ? 16 : 12;
  constexpr std::size_t wide = std::min<std::size_t>(accumulators / Queries, 8);
  std::size_t i = 0;
  const auto vectors_left = [&] { return (row - i) / lanes; };
  const auto add = [&]<std::size_t Vectors>() {
    add_values<Queries, Vectors, false>(kv, chunk, i, weights, keep, states);
    i += Vectors * lanes;
  };
  // A single vector has too few accumulators: four are split two and two, not three and one.
  while (vectors_left() >= wide && (wide != 3 || vectors_left() != 4)) add.template operator()<wide>();
  while (vectors_left() >= 2) add.template operator()<2>();
  while (vectors_left() >= 1) add.template operator()<1>();
  if constexpr (lanes > row_padding) {
    if (i < row) add_values<Queries, 1, true>(kv, chunk, i, weights, keep, states);
  }
}

/// A chunk for a block of query heads; map: null if logits are the scaled dot products; tap: of the chunk's first page
/// and the block's first head.
template <std::size_t Queries, class Key, class Value>
void attend_chunk(const PagedKv<Key, Value>& kv, const Chunk& chunk, const float* queries, std::size_t query_stride,
                  const LogitMap* map, SoftmaxState* states, PageTap tap) {
  using Tile = TileLanes<Queries>;
  ChunkWeights weights;
  float* logits = weights.values;
  for (std::size_t r = 0; r < chunk.reads.size(); ++r) {
    const PageRead& read = chunk.reads[r];
    KVSPARSE_ASSERT(read.tokens >= 1 && read.tokens <= max_page_size);
    page_logits<Queries>(kv, read, queries, query_stride, logits);
    if (map != nullptr) map_logits<Queries, Tile>(*map, read, logits);
    if (read.token_mask != nullptr || read.log_weight != 0.0F) apply_read_options<Queries>(read, logits);
    if (tap.token_logits != nullptr) {
      for (std::size_t q = 0; q < Queries; ++q) {
        float* of_query = tap.token_logits + (r * tap.queries + q) * tap.page_size;
        for (std::size_t t = 0; t < read.tokens; ++t) of_query[t] = logits[Tile::at(q, t)];
      }
    }
    logits += Tile::page_floats(read);
  }
  float keep[Queries];
  chunk_softmax<Queries>(kv, chunk.reads, states, weights, keep, tap);
  chunk_values<Queries>(kv, chunk, weights, keep, states);
}

}  // namespace detail

/// Attends to `reads`, in order, and folds them into `states` [group]; empty states are started, others continued.
/// queries: [group, query_stride], already multiplied by the softmax scale and zero from head_dim up to
/// round_up(head_dim, query_padding); every accumulator has round_up(value_dim, query_padding) floats. map: what
/// becomes of the scaled dot products. O(tokens read * (head_dim + value_dim) * group); does not allocate. Source:
/// online softmax of Milakov and Gimelshein (1805.02867), page by page as in FlashInfer (2501.01005).
template <class Key, class Value>
void attend_pages(const PagedKv<Key, Value>& kv, std::span<const PageRead> reads, const float* queries,
                  std::size_t query_stride, std::span<SoftmaxState> states, PageTap tap = {},
                  const LogitMap& map = {}) noexcept {
  const std::size_t group = states.size();
  const bool maps = !map.is_identity();
  while (!reads.empty()) {
    const detail::Chunk chunk = detail::first_chunk(reads);
    std::size_t q = 0;
    const auto block = [&]<std::size_t Queries>() {
      const LogitMap of_block = map.from(q);
      detail::attend_chunk<Queries>(kv, chunk, queries + q * query_stride, query_stride, maps ? &of_block : nullptr,
                                    states.data() + q, tap.from(0, q));
      q += Queries;
    };
    // NOLINTNEXTLINE(bugprone-infinite-loop): block advances q.
    while (group - q >= 4) block.template operator()<4>();
    if (group - q >= 2) block.template operator()<2>();
    if (group - q >= 1) block.template operator()<1>();
    tap = tap.from(chunk.reads.size(), 0);
    reads = reads.subspan(chunk.reads.size());
  }
}

}  // namespace kvsparse
