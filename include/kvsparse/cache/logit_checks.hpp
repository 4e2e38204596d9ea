// SPDX-License-Identifier: Apache-2.0
// Which logit options a cache refuses: values out of range, and options that its policy would not know of.
#pragma once

#include <cmath>
#include <cstddef>
#include <limits>
#include <string>

#include "../core/logit_options.hpp"
#include "../core/rope.hpp"
#include "../policy/policy.hpp"

namespace kvsparse::detail {

/// Whether the policy scores keys by dot products of its own, which know nothing of the kernel's logits.
template <class Policy>
bool scores_keys(const Policy& policy) {
  if constexpr (requires { typename Policy::EvictPart; }) {
    return scores_keys(policy.evict) || scores_keys(policy.select_part);
  }
  if (traits::knows_logits<Policy>()) return false;
  return Selector<Policy> || ResidualProvider<Policy> || traits::page_summary(policy) != PageSummary::none ||
         traits::query_window(policy) != 0;
}

/// Whether it needs those scores to be the logits, not merely to rank as they do.
template <class Policy>
bool needs_exact_scores(const Policy& policy) {
  if constexpr (requires { typename Policy::EvictPart; }) {
    return needs_exact_scores(policy.evict) || needs_exact_scores(policy.select_part);
  } else {
    const bool only_ranks = Selector<Policy> && !RepeatedSelector<Policy> && !traits::select_always<Policy>();
    return scores_keys(policy) && (!only_ranks || ResidualProvider<Policy>);
  }
}

/// A sentence that names the value and the limit; empty if nothing is wrong.
template <class Policy>
std::string logit_problem(const LogitOptions& logits, std::size_t query_heads, const Policy& policy) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  if (!(logits.soft_cap >= 0.0F && logits.soft_cap < infinity)) {
    return "soft_cap = " + std::to_string(logits.soft_cap) + " must be positive and finite, or 0 for none";
  }
  if (logits.window > largest_size) {
    return "window = " + std::to_string(logits.window) + " exceeds " + largest_size_text;
  }
  const std::string heads = std::to_string(query_heads);
  if (const std::size_t slopes = logits.alibi_slopes.size(); slopes != 0 && slopes != query_heads) {
    return "alibi_slopes has " + std::to_string(slopes) + " slopes for " + heads + " query heads";
  }
  if (const std::size_t sinks = logits.sink_logits.size(); sinks != 0 && sinks != query_heads) {
    return "sink_logits has " + std::to_string(sinks) + " logits for " + heads + " query heads";
  }
  for (const float slope : logits.alibi_slopes) {
    if (!std::isfinite(slope)) return "alibi_slopes has a slope of " + std::to_string(slope) + "; it must be finite";
  }
  for (const float sink : logits.sink_logits) {
    if (!(sink < infinity)) return "sink_logits has a logit of " + std::to_string(sink) + "; it must be below infinity";
  }
  const std::string scores = "policy " + std::string(Policy::name) + " scores keys by their dot products alone";
  if (logits.window != 0 && scores_keys(policy)) {
    return scores + " and would count on pages outside the window = " + std::to_string(logits.window) +
           "; use one that does not, such as dense or streaming_llm, in a sliding-window layer";
  }
  if (!logits.alibi_slopes.empty() && scores_keys(policy)) {
    return scores + ", which rank otherwise than logits with ALiBi slopes";
  }
  if (logits.soft_cap != 0.0F && needs_exact_scores(policy)) {
    return scores + " and compares them with numbers that soft_cap = " + std::to_string(logits.soft_cap) + " changes";
  }
  return {};
}

/// The same of in-cache positions.
template <class Policy>
std::string position_problem(const LogitOptions& logits, const Rope& rope, const Policy& policy) {
  if (!traits::in_cache_positions(policy)) return {};
  const std::string counts = "policy " + std::string(Policy::name) + " counts positions within the cache";
  if (rope.theta == 0.0) return counts + " and turns queries back: it needs the model's rope.theta, which is 0";
  if (logits.window != 0) {
    return counts + ", window = " + std::to_string(logits.window) + " in the sequence; set one of them";
  }
  if (!logits.alibi_slopes.empty()) return counts + ", ALiBi slopes those in the sequence; set one of them";
  if (scores_keys(policy)) return counts + ", but scores keys by queries at their positions in the sequence";
  return {};
}

}  // namespace kvsparse::detail
