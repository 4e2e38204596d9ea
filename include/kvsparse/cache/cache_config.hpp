// SPDX-License-Identifier: Apache-2.0
// How large a cache is, what it does with a long prompt, and what it reports.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>

#include "../attention/page_kernel.hpp"
#include "../core/geometry.hpp"
#include "../core/logit_options.hpp"
#include "../core/rope.hpp"
#include "../core/saturating_size.hpp"
#include "../core/status.hpp"
#include "../memory/page_rows.hpp"
#include "../policy/policy.hpp"
#include "logit_checks.hpp"

namespace kvsparse {

/// What happens when a pinned prompt leaves no page to decode in.
enum class PromptOverflow {
  error,         ///< append_prompt refuses the chunk, changing nothing
  grow,          ///< the budget becomes the prompt's pages plus min_decode_tokens; needs max_prompt_tokens
  unpin_middle,  ///< prompt pages lose their pin from the middle outwards, the first page last
};

/// One layer of one sequence. Token counts are per kv head.
struct CacheConfig {
  std::size_t query_heads = 1;  ///< a multiple of kv_heads: query head i reads kv head i / (query_heads / kv_heads)
  std::size_t kv_heads = 1;     ///< heads of keys and values
  std::size_t head_dim = 0;     ///< of queries and keys
  std::size_t value_dim = 0;    ///< of values and outputs; 0 means head_dim
  /// MLA's latent: a token's value is the first value_dim elements of its key, and no other value is stored. Appends
  /// take no values then. Keys and values are of one storage type.
  bool values_in_keys = false;
  std::size_t page_size = 16;  ///< tokens of one kv head that come and go together, 1 .. 256
  /// Evicting policies: cap on resident tokens, prompt included, in whole pages (rounded down). Where heads share their
  /// budget (PolicyScope::shared_budget), the cap on the mean over the heads.
  std::size_t budget_tokens = 0;
  /// Selecting policies: cap on tokens read by a query, in whole pages; 0 means budget_tokens.
  std::size_t read_budget_tokens = 0;
  /// Policies that keep everything: tokens there is room for.
  std::size_t max_tokens = 0;
  PromptOverflow prompt_overflow = PromptOverflow::error;  ///< of a policy that pins the prompt
  std::size_t max_prompt_tokens = 0;                       ///< for PromptOverflow::grow
  std::size_t min_decode_tokens = 0;  ///< room kept for decoding beside a long prompt; 0 means one page
  /// Tokens at the end of the sequence that may be rejected (append_draft, truncate); nothing is evicted on their
  /// behalf, so a head has room for their pages beyond the budget.
  std::size_t max_speculative = 0;
  std::size_t layer = 0;       ///< this cache's layer: keeps the random numbers of layers apart
  float softmax_scale = 0.0F;  ///< 0 means 1 / sqrt(head_dim)
  Rope rope = {};              ///< of the model; needed where queries are rotated back: in-cache positions

  LogitOptions logits = {};  ///< soft cap, sliding window, ALiBi, sink logits

  /// Its shape.
  Geometry geometry() const { return {query_heads, kv_heads, head_dim, page_size, value_dim, values_in_keys}; }
};

/// Counters since construction or the last clear().
struct CacheStats {
  std::size_t tokens = 0;                ///< appended so far: the sequence's length
  std::size_t resident_tokens = 0;       ///< largest over the kv heads; the mean, rounded up, where they share a budget
  std::size_t peak_resident_tokens = 0;  ///< the most there were of them
  std::size_t resident_bytes = 0;        ///< pages, summaries and policy state of the resident pages, all kv heads
  std::size_t peak_resident_bytes = 0;   ///< the most there were of them
  std::size_t shared_bytes = 0;          ///< of resident_bytes: keys, values and summaries that a fork holds too
  std::size_t evicted_tokens = 0;        ///< summed over kv heads, as the three below
  std::size_t evicted_shared_pages = 0;  ///< evicted while a fork still held them: no memory became free
  std::size_t last_read_tokens = 0;      ///< by the latest attend
  std::size_t last_skipped_tokens = 0;   ///< resident but read by no query head of the group in the latest attend
  /// Share of the evictable pages that an evictor which judges pages (RaaS) found used, over all steps; NaN if none
  /// judged. Near 1 the policy has degenerated into first-in first-out, near 0 into one that has no evidence.
  double used_page_share = std::numeric_limits<double>::quiet_NaN();
};

namespace detail {

/// A validated configuration: what the container allocates and enforces.
struct CachePlan {
  Geometry geometry;
  std::size_t page_budget = 0;    // resident pages of a head; on average, where heads share the budget
  std::size_t page_capacity = 0;  // those there is memory for: more, where a long prompt may grow the budget
  std::size_t head_capacity = 0;  // of one head: more, where it may take what others leave
  std::size_t page_floor = 0;     // and what each is left with then
  std::size_t read_pages = 0;
  std::size_t sink_pages = 0;    // pinned from the start, prompt or not
  std::size_t decode_pages = 1;  // kept free of pins
  std::size_t draft_pages = 0;   // opened by as many drafts as there may be
  std::size_t spare_pages = 0;   // those of them that are not within page_capacity
  std::size_t max_speculative = 0;
  float scale = 1.0F;

  /// Pages that a head's table holds at most.
  std::size_t table_pages() const { return head_capacity + spare_pages; }
  /// Pages that all heads hold together at most.
  std::size_t layer_pages() const { return geometry.kv_heads * (page_capacity + spare_pages); }
  /// Queries whose evidence is kept while drafts are outstanding: each draft's, and that of the token before them.
  std::size_t journal_queries() const { return max_speculative == 0 ? 0 : max_speculative + 1; }
};

/// Pages that one of `heads` heads can come to, which share a budget of `mean` pages a head, where each keeps `floor`.
constexpr std::size_t most_pages_of_a_head(std::size_t heads, std::size_t mean, std::size_t floor) {
  return heads * mean - (heads - 1) * floor;
}

inline std::string quoted(std::size_t value) { return std::to_string(value); }

[[noreturn]] inline void refuse(const std::string& sentence) { KVSPARSE_THROW(ConfigError(sentence)); }

/// The bytes that a cache of the plan takes. Throws ConfigError if they cannot be addressed.
inline std::size_t addressable(SaturatingSize bytes, const CachePlan& plan) {
  if (bytes <= most_bytes) return bytes;
  refuse("pages, tables, state and scratch of " + quoted(plan.geometry.kv_heads) + " kv heads and " +
         quoted(plan.geometry.query_heads) + " query heads of " + quoted(plan.geometry.head_dim) +
         " elements, for up to " + quoted(plan.table_pages()) + " pages of " + quoted(plan.geometry.page_size) +
         " tokens a head and max_speculative = " + quoted(plan.max_speculative) + ", exceed the " + most_bytes_text +
         " bytes that can be addressed");
}

/// Throws ConfigError with a sentence that names the value and the limit.
template <class Policy>
CachePlan plan_cache(const CacheConfig& config, const Policy& policy) {
  const std::string name(Policy::name);
  if (config.head_dim == 0) refuse("head_dim is 0; it must be at least 1");
  if (config.query_heads == 0) refuse("query_heads is 0; it must be at least 1");
  if (config.kv_heads == 0) refuse("kv_heads is 0; it must be at least 1");
  if (config.query_heads % config.kv_heads != 0) {
    refuse("kv_heads = " + quoted(config.kv_heads) + " does not divide query_heads = " + quoted(config.query_heads));
  }
  if (config.page_size == 0 || config.page_size > max_page_size) {
    refuse("page_size = " + quoted(config.page_size) + " is not in 1 .. " + quoted(max_page_size));
  }
  for (const std::size_t value :
       {config.query_heads, config.head_dim, config.value_dim, config.budget_tokens, config.read_budget_tokens,
        config.max_tokens, config.max_prompt_tokens, config.min_decode_tokens, config.max_speculative}) {
    if (value > largest_size) refuse("a configured size of " + quoted(value) + " exceeds " + largest_size_text);
  }
  if (config.query_heads > most_channels) refuse("query_heads = " + quoted(config.query_heads) + " exceeds 2^20");
  if (config.head_dim > most_channels) refuse("head_dim = " + quoted(config.head_dim) + " exceeds 2^20");
  if (config.value_dim > most_channels) refuse("value_dim = " + quoted(config.value_dim) + " exceeds 2^20");
  if (!std::isfinite(config.softmax_scale)) {
    refuse("softmax_scale = " + std::to_string(config.softmax_scale) + " must be finite");
  }
  if (const std::string problem = config.rope.problem(config.head_dim); !problem.empty()) refuse(problem);
  if (const std::string problem = logit_problem(config.logits, config.query_heads, policy); !problem.empty()) {
    refuse(problem);
  }
  if (const std::string problem = position_problem(config.logits, config.rope, policy); !problem.empty()) {
    refuse(problem);
  }
  if (const std::string problem = values_problem(config.geometry()); !problem.empty()) refuse(problem);
  if (config.values_in_keys && traits::in_cache_positions(policy)) {
    refuse("policy " + name + " turns queries back in a head's first dimensions, which values_in_keys makes values");
  }
  if (const std::string problem = traits::options_problem(policy); !problem.empty()) {
    refuse("policy " + name + ": " + problem);
  }
  if constexpr (requires {
                  { policy.summaries_agree() } -> std::same_as<bool>;
                }) {
    if (!policy.summaries_agree()) refuse("policy " + name + ": its two parts need different page summaries");
  }

  if (const std::string problem = traits::geometry_problem(policy, config.geometry()); !problem.empty()) {
    refuse("policy " + name + ": " + problem);
  }

  CachePlan plan;
  plan.geometry = config.geometry();
  plan.scale =
      config.softmax_scale != 0.0F ? config.softmax_scale : 1.0F / std::sqrt(static_cast<float>(config.head_dim));
  if constexpr (Evictor<Policy>) {
    if (config.budget_tokens < config.page_size) {
      refuse("budget_tokens = " + quoted(config.budget_tokens) + " holds no page of " + quoted(config.page_size) +
             " tokens; policy " + name + " needs at least one page");
    }
    plan.page_budget = plan.page_capacity = config.budget_tokens / config.page_size;
    plan.sink_pages = traits::pinned_pages(policy, plan.geometry);
    plan.decode_pages = std::max<std::size_t>(1, plan.geometry.pages_for(config.min_decode_tokens));
    if (config.prompt_overflow == PromptOverflow::grow) {
      if (config.max_prompt_tokens == 0) refuse("PromptOverflow::grow needs max_prompt_tokens; it is 0");
      if (traits::pin_prompt(policy)) {
        plan.page_capacity =
            std::max(plan.page_budget, plan.geometry.pages_for(config.max_prompt_tokens) + plan.decode_pages);
      }
    }
    if (SaturatingSize(plan.sink_pages) + plan.decode_pages > plan.page_budget) {
      refuse("the budget of " + quoted(plan.page_budget) + " pages is smaller than the " + quoted(plan.sink_pages) +
             " pages that policy " + name + " pins plus " + quoted(plan.decode_pages) + " to decode in");
    }
    if (SaturatingSize(traits::slack_tokens(policy)) + config.page_size > config.budget_tokens) {
      refuse("policy " + name + " aims " + quoted(traits::slack_tokens(policy)) + " tokens below the budget of " +
             quoted(config.budget_tokens) + ", which leaves no page");
    }
  } else {
    if (config.max_tokens == 0) {
      refuse("max_tokens is 0; policy " + name + " keeps every token and needs to know how many to make room for");
    }
    plan.page_budget = plan.page_capacity = plan.geometry.pages_for(config.max_tokens);
  }
  if constexpr (Selector<Policy>) {
    const std::size_t read = config.read_budget_tokens != 0 ? config.read_budget_tokens : config.budget_tokens;
    if (read < config.page_size) {
      refuse("read_budget_tokens = " + quoted(read) + " holds no page of " + quoted(config.page_size) +
             " tokens; policy " + name + " reads at least one page");
    }
    plan.read_pages = read / config.page_size;
  }
  const auto require_room = [&](std::size_t pages) {
    if (SaturatingSize(pages) * config.kv_heads > most_pages) {
      refuse(quoted(pages) + " pages for each of " + quoted(config.kv_heads) +
             " kv heads exceed the limit of 2^31 - 1");
    }
  };
  require_room(plan.page_capacity);
  plan.head_capacity = plan.page_capacity;
  if constexpr (SharedBudgetEvictor<Policy>) {
    const double floor = traits::budget_floor(policy);
    if (!(floor >= 0.0 && floor <= 1.0)) {
      refuse("policy " + name + ": budget_floor = " + std::to_string(floor) + " is not in [0, 1]");
    }
    const auto share = static_cast<std::size_t>(floor * static_cast<double>(plan.page_budget));
    plan.page_floor = std::clamp<std::size_t>(share, 1, plan.page_budget);
    plan.head_capacity = most_pages_of_a_head(plan.geometry.kv_heads, plan.page_capacity, plan.page_floor);
  }
  plan.max_speculative = config.max_speculative;
  plan.draft_pages = plan.geometry.pages_for(config.max_speculative);
  plan.spare_pages = Evictor<Policy> ? plan.draft_pages : 0;
  require_room(plan.table_pages());
  return plan;
}

/// The plan of a Layer, before anything is allocated. Throws ConfigError as plan_cache and Layer::bytes_required do.
template <class Layer, class Policy>
CachePlan plan_layer(const CacheConfig& config, const Policy& policy) {
  static_cast<void>(Layer::bytes_required(config, policy));
  return plan_cache(config, policy);
}

}  // namespace detail

}  // namespace kvsparse
