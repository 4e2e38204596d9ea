// SPDX-License-Identifier: Apache-2.0
// A policy beside others on one layer: how much of the dense softmax it kept, and how far its outputs are from dense
// ones. For a look while a policy is being written; bench/replay does the same for recorded traces, policies by name
// and every budget. Needs no GoogleTest.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iomanip>
#include <ostream>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "../attention/exact.hpp"
#include "../cache/attend.hpp"

namespace kvsparse {

/// Rows of one layer: q [tokens, query_heads, head_dim], k and v [tokens, kv_heads, head_dim], keys after RoPE.
struct LayerTrace {
  std::size_t tokens = 0;         ///< of the sequence
  std::size_t prompt_tokens = 0;  ///< the first of them
  std::size_t query_heads = 1;    ///< a multiple of kv_heads
  std::size_t kv_heads = 1;       ///< heads of keys and values
  std::size_t head_dim = 0;       ///< floats of a row
  std::vector<float> q = {};      ///< [tokens, query_heads, head_dim]
  std::vector<float> k = {};      ///< [tokens, kv_heads, head_dim]
  std::vector<float> v = {};      ///< [tokens, kv_heads, head_dim]

  /// [head_dim]: one head's row of a token; rows: q, k or v; heads: as many as it has.
  std::span<const float> row(const std::vector<float>& rows, std::size_t heads, std::size_t token,
                             std::size_t head) const {
    return std::span(rows).subspan((token * heads + head) * head_dim, head_dim);
  }
  /// [heads, head_dim]: all rows of a token.
  std::span<const float> rows_of(const std::vector<float>& rows, std::size_t heads, std::size_t token) const {
    return std::span(rows).subspan(token * heads * head_dim, heads * head_dim);
  }
};

/// A synthetic layer of milestones: every so often a token comes that queries want for a while, less and less, and one
/// of the prompt that bursts of queries want late. What published policies differ on, not what a model's layer is like.
/// Throws ConfigError for a layer that is no longer than its prompt of 48 tokens.
inline LayerTrace milestone_layer(std::size_t tokens = 768, std::uint64_t seed = 1) {
  LayerTrace layer{tokens, 48, 4, 2, 32, {}, {}, {}};
  if (tokens <= layer.prompt_tokens) {
    detail::refuse("tokens = " + detail::quoted(tokens) + " leaves none to decode after a prompt of " +
                   detail::quoted(layer.prompt_tokens));
  }
  std::mt19937_64 random(seed);  // the same numbers everywhere, unlike the distributions of <random>
  const auto uniform = [&] { return static_cast<float>(random() >> 40) * 0x1.0p-24F; };
  const auto below = [&](std::size_t limit) { return static_cast<std::size_t>(random() % limit); };
  const auto gaussians = [&](std::size_t size) {
    std::vector<float> row(size);
    for (float& x : row) x = (uniform() + uniform() + uniform() + uniform() - 2.0F) * 1.7320508F;
    return row;
  };
  layer.q = gaussians(tokens * layer.query_heads * layer.head_dim);
  layer.k = gaussians(tokens * layer.kv_heads * layer.head_dim);
  layer.v = gaussians(tokens * layer.kv_heads * layer.head_dim);
  const auto add = [&](std::vector<float>& rows, std::size_t at, const std::vector<float>& direction, float scale) {
    for (std::size_t i = 0; i < direction.size(); ++i) rows[at * layer.head_dim + i] += scale * direction[i];
  };
  const std::size_t group = layer.query_heads / layer.kv_heads;
  const auto plant = [&](std::size_t head, std::size_t at, std::size_t first, std::size_t last, std::size_t step) {
    const std::vector<float> direction = gaussians(layer.head_dim);
    add(layer.k, at * layer.kv_heads + head, direction, 1.2F);
    const std::size_t query_head = head * group + below(group);
    for (std::size_t t = first; t < std::min(last, tokens); t += step) {
      const float fade = 1.0F - 0.6F * static_cast<float>(t - first) / static_cast<float>(last - first);
      add(layer.q, t * layer.query_heads + query_head, direction, 1.2F * fade);
    }
  };
  for (std::size_t head = 0; head < layer.kv_heads; ++head) {
    for (std::size_t at = layer.prompt_tokens + below(8); at < tokens; at += 10 + below(20)) {
      plant(head, at, at + 1, at + 9 + below(tokens / 2), 1);
    }
    plant(head, below(layer.prompt_tokens), tokens / 2, tokens, 7);
  }
  return layer;
}

/// What a policy did at one budget; means over the decode queries and query heads.
struct ReplayRow {
  std::string policy;              ///< its name
  std::size_t budget_tokens = 0;   ///< kept, or read, of each kv head
  double share = 0.0;              ///< of the dense softmax, on the tokens read
  double mean_error = 0.0;         ///< |out - dense| / |dense|
  std::size_t evicted_tokens = 0;  ///< summed over the kv heads
  /// Why the policy does not take the budget, or the prompt under it; the numbers mean nothing then.
  std::string refused;
};

/// The layer under a policy, token by token. budget: what an evictor keeps, or a selector reads, of each kv head. Keys
/// and values are f32. O(tokens^2).
template <class Policy>
ReplayRow replay(const LayerTrace& layer, std::size_t budget, std::size_t page_size, const Policy& policy = {}) {
  [[maybe_unused]] constexpr detail::ContractCheck<Policy> contract{};  // its sentences before all other errors
  ReplayRow row{std::string(Policy::name), budget, 0.0, 0.0, 0, {}};
  if (layer.prompt_tokens >= layer.tokens) {
    row.refused = "a prompt of " + std::to_string(layer.prompt_tokens) + " tokens leaves none of " +
                  std::to_string(layer.tokens) + " to decode";
    return row;
  }
  CacheConfig config{.query_heads = layer.query_heads, .kv_heads = layer.kv_heads, .head_dim = layer.head_dim};
  config.page_size = page_size;
  config.budget_tokens = budget;
  config.max_tokens = layer.tokens;
  try {
    PagedKvCache<Policy> cache(config, policy);
    std::vector<float> out(layer.query_heads * layer.head_dim);
    for (std::size_t t = 0; t < layer.tokens; ++t) {
      const bool is_prompt = t < layer.prompt_tokens;
      const auto k = layer.rows_of(layer.k, layer.kv_heads, t), v = layer.rows_of(layer.v, layer.kv_heads, t);
      Status status = is_prompt ? cache.append_prompt(k, v) : cache.append(k, v);
      if (status) status = attend(cache, layer.rows_of(layer.q, layer.query_heads, t), out);
      if (!status) {
        row.refused = status.message();
        return row;
      }
      if (is_prompt) continue;
      for (std::size_t head = 0; head < layer.query_heads; ++head) {
        const std::size_t kv_head = head / cache.geometry().group();
        const ExactAttention dense = exact_attention(
            layer.row(layer.q, layer.query_heads, t, head), t + 1,
            [&](std::size_t i) { return layer.row(layer.k, layer.kv_heads, i, kv_head); },
            [&](std::size_t i) { return layer.row(layer.v, layer.kv_heads, i, kv_head); },
            static_cast<double>(cache.softmax_scale()));
        for (const Position position : cache.read_positions(kv_head)) {
          row.share += dense.weights[static_cast<std::size_t>(position.value)];
        }
        double gap = 0.0, size = 0.0;
        for (std::size_t i = 0; i < layer.head_dim; ++i) {
          gap += std::pow(static_cast<double>(out[head * layer.head_dim + i]) - dense.out[i], 2);
          size += dense.out[i] * dense.out[i];
        }
        row.mean_error += gap == 0.0 ? 0.0 : std::sqrt(gap / size);
      }
    }
    const auto queries = static_cast<double>((layer.tokens - layer.prompt_tokens) * layer.query_heads);
    row.share /= queries;
    row.mean_error /= queries;
    row.evicted_tokens = cache.stats().evicted_tokens;
  } catch (const ConfigError& error) {
    row.refused = error.what();
  }
  return row;
}

/// Several policies, as they are by default, at several budgets.
template <class... Policies>
std::vector<ReplayRow> replay_each(const LayerTrace& layer, const std::vector<std::size_t>& budgets,
                                   std::size_t page_size) {
  std::vector<ReplayRow> rows;
  const auto add = [&]<class Policy>() {
    for (const std::size_t budget : budgets) rows.push_back(replay<Policy>(layer, budget, page_size));
  };
  (add.template operator()<Policies>(), ...);
  return rows;
}

/// A line for each row, for people.
inline void print_table(std::ostream& out, std::span<const ReplayRow> rows) {
  out << "policy                budget   softmax mass read   mean error of outputs\n" << std::fixed;
  for (const ReplayRow& row : rows) {
    out << std::left << std::setw(20) << row.policy << std::right << std::setw(8) << row.budget_tokens;
    if (row.refused.empty()) {
      out << std::setprecision(1) << std::setw(18) << 100.0 * row.share << " %" << std::setprecision(3) << std::setw(20)
          << row.mean_error << "\n";
    } else {
      out << "   " << row.refused << "\n";
    }
  }
}

/// The columns that `bench/plot.py sweep` draws.
inline void write_csv(std::ostream& out, std::span<const ReplayRow> rows) {
  out << "policy,budget_tokens,share,mean_error,evicted_tokens\n";
  for (const ReplayRow& row : rows) {
    out << row.policy << ',' << row.budget_tokens << ',';
    if (row.refused.empty()) out << row.share << ',' << row.mean_error;
    out << (row.refused.empty() ? "," : ",,") << row.evicted_tokens << "\n";
  }
}

}  // namespace kvsparse
