// SPDX-License-Identifier: Apache-2.0
// From scaled dot products to logits: soft cap, ALiBi, sliding window. A pass of its own over a page's logits, out of
// the kernel's inner loops, for those who need it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "../core/ids.hpp"
#include "../core/simd.hpp"
#include "../core/views.hpp"

namespace kvsparse {

/// For queries that attend together: `group` query heads of a token, then those of the next token, and so on. A member
/// that is 0 or null changes nothing.
struct LogitMap {
  float soft_cap = 0.0F;                ///< logit = soft_cap * tanh(logit / soft_cap)
  std::size_t window = 0;               ///< positions that a query sees, its own included
  const float* alibi_slopes = nullptr;  ///< [group]
  std::size_t group = 1;                ///< query heads of a token
  Position position;                    ///< of the first token
  std::size_t first_query = 0;          ///< the first of these queries, counted from the first token's first

  /// Whether logits stay as they are.
  constexpr bool is_identity() const { return !(soft_cap > 0.0F) && window == 0 && alibi_slopes == nullptr; }
  /// The same from another query on.
  constexpr LogitMap from(std::size_t query) const {
    LogitMap map = *this;
    map.first_query += query;
    return map;
  }
  /// Of the token whose query this is.
  constexpr Position position_of(std::size_t query) const { return position + (first_query + query) / group; }
  /// Where there are slopes.
  constexpr float slope_of(std::size_t query) const { return alibi_slopes[(first_query + query) % group]; }
};

namespace detail {

/// cap * tanh(x / cap); NaN stays NaN. Off by no more than cap * 1e-7.
KVSPARSE_INLINE simd::Floats soft_capped(simd::Floats x, float cap) {
  using simd::Floats;
  const Floats scaled = x / cap;
  const Floats size = simd::max(scaled, -scaled);
  const Floats decay = simd::exp_nonpositive(size * -2.0F);
  const Floats far = (1.0F - decay) / (1.0F + decay);
  // Near zero 1 - decay cancels; there the series of tanh has converged.
  const Floats square = size * size;
  Floats near = square * simd::broadcast(62.0F / 2835.0F) - 17.0F / 315.0F;
  near = simd::fma(near, square, simd::broadcast(2.0F / 15.0F));
  near = simd::fma(near, square, simd::broadcast(-1.0F / 3.0F));
  near = simd::fma(near * square, size, size);
  const Floats magnitude = (size < 0.25F ? near : far) * cap;
  return x == x ? (x < 0.0F ? -magnitude : magnitude) : x;
}

/// Maps a page's scaled dot products, which lie in the lanes of Tile, Queries query heads at once. Lanes beyond the
/// page's tokens stay -inf.
template <std::size_t Queries, class Tile>
KVSPARSE_NOINLINE void map_logits(const LogitMap& map, const PageRead& read, float* logits) {
  using simd::Floats;
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const std::size_t floats = Tile::page_floats(read);
  if (map.soft_cap > 0.0F) {
    for (std::size_t i = 0; i < floats; i += simd::lanes) {
      simd::store(logits + i, soft_capped(simd::load(logits + i), map.soft_cap));
    }
    float* last_tile = logits + floats - simd::lanes;
    const std::size_t tokens_of_it = (read.tokens - 1) % Tile::tile + 1;
    simd::store(last_tile, Tile::keep_tokens(simd::load(last_tile), tokens_of_it, simd::broadcast(-infinity)));
  }
  if (map.alibi_slopes != nullptr) {
    const Floats slopes = Tile::spread([&](std::size_t q) { return map.slope_of(q); });
    const auto behind = [&](std::size_t q) { return static_cast<float>(read.first_position - map.position_of(q)); };
    Floats ahead = Tile::spread(behind) + Tile::of_tokens([](std::size_t t) { return static_cast<float>(t); });
    for (std::size_t i = 0; i < floats; i += simd::lanes) {
      simd::store(logits + i, simd::fma(slopes, ahead, simd::load(logits + i)));
      ahead += static_cast<float>(Tile::tile);
    }
  }
  if (map.window == 0) return;
  for (std::size_t q = 0; q < Queries; ++q) {
    const std::int64_t first_seen = map.position_of(q).value + 1 - static_cast<std::int64_t>(map.window);
    const std::int64_t unseen = std::min<std::int64_t>(first_seen - read.first_position.value, read.tokens);
    for (std::int64_t t = 0; t < unseen; ++t) logits[Tile::at(q, static_cast<std::size_t>(t))] = -infinity;
  }
}

}  // namespace detail

}  // namespace kvsparse
