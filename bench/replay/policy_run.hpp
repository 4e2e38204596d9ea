// SPDX-License-Identifier: Apache-2.0
// One policy at one budget being replayed: its cache, and what is measured on the way.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <kvsparse/cache/any_cache.hpp>
#include <limits>
#include <new>
#include <span>
#include <string>
#include <vector>

#include "clairvoyant.hpp"
#include "common/trace.hpp"
#include "dense_reference.hpp"
#include "engine/named_cache.hpp"
#include "options.hpp"

namespace kvsparse_tools {

/// Means and maxima over decode queries and query heads. NaN before the first.
struct ReplayMetrics {
  std::size_t decode_steps = 0;
  double share = std::numeric_limits<double>::quiet_NaN();
  double mean_error = std::numeric_limits<double>::quiet_NaN();
  double max_error = std::numeric_limits<double>::quiet_NaN();
  double mean_step_us = std::numeric_limits<double>::quiet_NaN();
};

/// Of the latest decode query: means over the query heads of one kv head.
struct HeadLoss {
  double share = 0.0;
  double error = 0.0;
};

class PolicyRun {
 public:
  /// Throws UsageError if the policy cannot run at this budget, its prompt included. plan: of a clairvoyant.
  PolicyRun(const ReplayOptions& options, std::size_t policy, std::size_t budget, const Trace& trace, std::size_t layer,
            const EvictionPlan* plan)
      : trace_(trace),
        cache_(checked_cache(options, policy, budget, trace, layer, plan)),
        out_(trace.query_heads * trace.head_dim),
        head_losses_(trace.kv_heads) {}

  const kvsparse::AnyCache& cache() const { return cache_; }
  /// [query_heads, head_dim] of the latest query.
  std::span<const float> out() const { return out_; }
  /// Of the latest measure().
  const HeadLoss& loss(std::size_t kv_head) const { return head_losses_[kv_head]; }

  /// Appends the next token of the trace, then attends with its queries. A prompt token is a query like any other.
  void step(std::size_t token) {
    const bool is_prompt = token < trace_.prompt_tokens;
    const auto started = std::chrono::steady_clock::now();
    kvsparse::Status status = is_prompt ? cache_.append_prompt(trace_.key(token), trace_.value(token))
                                        : cache_.append(trace_.key(token), trace_.value(token));
    if (status) status = cache_.attend(trace_.query(token), out_);
    const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - started;
    if (!status) throw UsageError("at token " + std::to_string(token) + ": " + status.message());
    if (!is_prompt) step_us_ += took.count();
  }

  /// Compares the latest query, a decode query, with dense attention.
  void measure(const DenseReference& dense, std::size_t token) {
    const std::size_t group = trace_.query_heads / trace_.kv_heads;
    for (std::size_t h = 0; h < trace_.kv_heads; ++h) {
      const std::vector<kvsparse::Position> read = cache_.read_positions(h);
      HeadLoss sum;
      for (std::size_t q = h * group; q < (h + 1) * group; ++q) {
        const std::span<const double> weights = dense.weights(token, q);
        double share = 0.0;
        for (const kvsparse::Position position : read) share += weights[static_cast<std::size_t>(position.value)];
        share = std::min(share, 1.0);
        const double error =
            relative_error(std::span(out_).subspan(q * trace_.head_dim, trace_.head_dim), dense.out(token, q));
        share_sum_ += share;
        add_error(error);
        sum.share += share;
        sum.error += error;
      }
      head_losses_[h] = {sum.share / static_cast<double>(group), sum.error / static_cast<double>(group)};
    }
    ++decode_steps_;
  }

  ReplayMetrics metrics() const {
    ReplayMetrics metrics;
    metrics.decode_steps = decode_steps_;
    if (decode_steps_ == 0) return metrics;
    const auto steps = static_cast<double>(decode_steps_);
    const double rows = steps * static_cast<double>(trace_.query_heads);
    metrics.share = share_sum_ / rows;
    metrics.mean_error = error_sum_ / rows;
    metrics.max_error = max_error_;
    metrics.mean_step_us = step_us_ / steps;
    return metrics;
  }

 private:
  static kvsparse::CacheConfig config_of(const ReplayOptions& options, std::size_t policy, std::size_t budget,
                                         const Trace& trace, std::size_t layer) {
    kvsparse::CacheConfig config;
    config.query_heads = trace.query_heads;
    config.kv_heads = trace.kv_heads;
    config.head_dim = trace.head_dim;
    config.page_size = options.page_size;
    config.budget_tokens = budget;
    config.read_budget_tokens = options.settings[policy].read_budget_tokens;
    config.max_tokens = trace.tokens;  // for policies that keep everything
    config.layer = layer;
    return config;
  }

  static kvsparse::AnyCache checked_cache(const ReplayOptions& options, std::size_t policy, std::size_t budget,
                                          const Trace& trace, std::size_t layer, const EvictionPlan* plan) {
    const std::string& name = options.policies[policy];
    const std::vector<kvsparse::OptionSetting>& settings = options.settings[policy].options;
    try {
      const kvsparse::CacheConfig config = config_of(options, policy, budget, trace, layer);
      kvsparse::AnyCache cache = name == Clairvoyant::name
                                     ? kvsparse::AnyCache::of(Clairvoyant{plan}, options.dtype, config, settings)
                                     : named_cache(name, options.dtype, config, settings);
      if (trace.prompt_tokens > 0 && replayed_policy_facts(name).evicts) rehearse_prompt(cache, trace);
      return cache;
    } catch (const kvsparse::ConfigError& error) {
      throw UsageError(error.what());
    } catch (const std::bad_alloc&) {
      throw UsageError("not enough memory for a cache of that size");
    }
  }

  /// A prompt that is too long to pin would be refused in the middle of the replay, or never if the trace is shorter
  /// than the budget. Given as one chunk to a copy of the cache, it is refused at once.
  static void rehearse_prompt(kvsparse::AnyCache copy, const Trace& trace) {
    const std::size_t elements = trace.prompt_tokens * trace.kv_heads * trace.head_dim;
    const kvsparse::Status status =
        copy.append_prompt(std::span(trace.k).first(elements), std::span(trace.v).first(elements));
    if (status.code() == kvsparse::Status::Code::prompt_exceeds_budget) {
      throw UsageError("the prompt would pin " + std::to_string(status.value()) + " pages of " +
                       std::to_string(copy.config().page_size) + " tokens, but the budget of " +
                       std::to_string(status.limit()) +
                       " pages must leave one for decoding; raise --budget or --set pin_prompt=false");
    }
    if (!status) throw UsageError(status.message());
  }

  static double relative_error(std::span<const float> out, std::span<const double> dense) {
    double difference = 0.0;
    double size = 0.0;
    for (std::size_t i = 0; i < dense.size(); ++i) {
      const double gap = static_cast<double>(out[i]) - dense[i];
      difference += gap * gap;
      size += dense[i] * dense[i];
    }
    // Equal is no error, even if both are zero; anything is infinitely far from zero.
    return difference == 0.0 ? 0.0 : std::sqrt(difference) / std::sqrt(size);
  }

  void add_error(double error) {
    error_sum_ += error;
    if (!(error <= max_error_) && !std::isnan(max_error_)) max_error_ = error;  // one NaN makes the maximum NaN
  }

  const Trace& trace_;
  kvsparse::AnyCache cache_;
  std::vector<float> out_;
  std::vector<HeadLoss> head_losses_;  // [kv_heads]
  std::size_t decode_steps_ = 0;
  double share_sum_ = 0.0;
  double error_sum_ = 0.0;
  double max_error_ = 0.0;
  double step_us_ = 0.0;
};

}  // namespace kvsparse_tools
