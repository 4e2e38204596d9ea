// SPDX-License-Identifier: Apache-2.0
// Causal attention of a prompt's chunk, several tokens at a time: each page is loaded once for a tile of queries.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>

#include "../core/executor.hpp"
#include "../core/softmax_state.hpp"
#include "../core/views.hpp"
#include "attend_scratch.hpp"
#include "attended_layer.hpp"

namespace kvsparse::detail {

/// The queries of the newest q.tokens tokens, for policies that read everything and look at one kv head at a time. What
/// the policy sees is what it would see token by token, up to the rounding of sums.
template <class Policy>
class AttendTiles {
 public:
  AttendTiles(const AttendedLayer<Policy>& layer, TokenRows<const float> q, TokenRows<float> out)
      : layer_(layer),
        q_(q),
        out_(out),
        first_(static_cast<std::size_t>(layer.heads.next_position().value) - q.tokens) {}

  /// Whether tiles can do this chunk, and save anything over going token by token.
  bool suit() const {
    if constexpr (StepObserver<Policy> || ResidualProvider<Policy> || traits::select_always<Policy>()) return false;
    if (asks_for(traits::evidence(layer_.heads.policy()), EvidenceKind::token_weights)) return false;
    if (layer_.heads.drafts() != 0) return false;
    for (std::size_t h = 0; h < layer_.heads.geometry().kv_heads; ++h) {
      layer_.heads.begin_query(h, layer_.heads.next_position());
      if (!layer_.heads.reads_all(h)) return false;
      const bool has_gap = layer_.heads.resident_tokens(h) < first_ + q_.tokens;
      if (has_gap && traits::in_cache_positions(layer_.heads.policy()))
        return false;  // queries turn back, each its own way
    }
    return std::min(tokens_per_tile(), q_.tokens) > 1;
  }

  void run(ExecutorRef executor) const {
    const auto whole_head = [this](std::size_t h) noexcept {
      for (std::size_t token = 0; token < q_.tokens; token += tokens_per_tile()) {
        attend_tile(h, token, std::min(tokens_per_tile(), q_.tokens - token));
      }
    };
    executor(layer_.heads.geometry().kv_heads, whole_head);
  }

 private:
  static constexpr std::size_t tile_floats = tile_queries * 128;

  std::size_t row() const { return round_up(layer_.heads.geometry().head_dim, query_padding); }
  std::size_t value_row() const { return round_up(layer_.heads.geometry().dim_of_values(), query_padding); }
  std::size_t tokens_per_tile() const {
    return std::min(tile_queries, tile_floats / std::max(row(), value_row())) / layer_.heads.geometry().group();
  }
  QueryGroup group_of(std::size_t kv_head, std::size_t token) const {
    const std::size_t group = layer_.heads.geometry().group();
    const HeadRows<const float> rows = q_.token(token);
    return {rows.row(kv_head * group), group, layer_.heads.geometry().head_dim, rows.head_stride,
            layer_.heads.softmax_scale()};
  }
  /// Starts the token's query.
  std::span<const PageRead> select(std::size_t kv_head, std::size_t token) const {
    layer_.heads.begin_query(kv_head, Position{0} + (first_ + token + 1));
    return layer_.heads.select(kv_head, group_of(kv_head, token));
  }

  /// How many of the pages that the tile's first token reads have left a later token's window.
  static std::size_t pages_left(PageIndex first_page, std::span<const PageRead> reads) {
    return reads.empty() ? 0 : reads[0].index.value - first_page.value;
  }

  KVSPARSE_NOINLINE void attend_tile(std::size_t kv_head, std::size_t first, std::size_t tokens) const {
    const std::size_t group = layer_.heads.geometry().group();
    alignas(64) float queries[tile_floats];
    alignas(64) float accumulators[tile_floats];
    SoftmaxState states[tile_queries];
    const std::size_t count = tokens * group;
    std::fill_n(accumulators, count * value_row(), 0.0F);
    for (std::size_t i = 0; i < count; ++i) states[i].accumulator = accumulators + i * value_row();
    for (std::size_t t = 0; t < tokens; ++t) {
      pad_queries(group_of(kv_head, first + t), queries + t * group * row(), row());
    }

    auto& head = layer_.heads.head(kv_head);
    const PageTap tap = head.tap(count, layer_.heads.geometry().page_size);
    // All pages before the first token's last one are whole for every token; what follows is cut at each one's own.
    const auto whole = select(kv_head, first);
    const std::size_t shared = whole.size() - std::min<std::size_t>(whole.size(), 1);
    const PageIndex first_page = whole.empty() ? PageIndex{} : whole[0].index;
    layer_.read_pages(whole.first(shared), queries, row(), {states, count}, tap,
                      layer_.heads.logit_map(kv_head, 0, group));
    std::size_t reads_of_tile = 0;
    for (std::size_t t = 0; t < tokens; ++t) {
      const std::size_t query = t * group;
      const auto reads = select(kv_head, first + t);
      const std::size_t left = pages_left(first_page, reads);
      const std::size_t read = shared - std::min(shared, left);
      layer_.read_pages(reads.subspan(read), queries + query * row(), row(), {states + query, group},
                        tap.from(left + read, query), layer_.heads.logit_map(kv_head, 0, group));
      reads_of_tile = left + reads.size();
      layer_.heads.add_sinks(kv_head, 0, {states + query, group});
    }
    head.weigh_pages({states, count}, reads_of_tile);
    for (std::size_t t = 0; t < tokens; ++t) {
      const std::span<const SoftmaxState> of_token(states + t * group, group);
      const std::size_t left = pages_left(first_page, select(kv_head, first + t));
      head.record(0, of_token, group, tap.from(left, t * group));
      for (std::size_t q = 0; q < group; ++q) {
        normalise(of_token[q], out_.token(first + t).row(kv_head * group + q), layer_.heads.geometry().dim_of_values());
      }
      layer_.heads.observe(kv_head, group_of(kv_head, first + t));
    }
  }

  AttendedLayer<Policy> layer_;
  TokenRows<const float> q_;
  TokenRows<float> out_;
  std::size_t first_;  // position of the chunk's first token
};

}  // namespace kvsparse::detail
