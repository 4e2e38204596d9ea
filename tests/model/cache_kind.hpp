// SPDX-License-Identifier: Apache-2.0
//
// Which cache a random test is about, drawn at random, with what the test needs to know of its policy beforehand.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "kvsparse/cache/any_cache.hpp"
#include "support/test_rng.hpp"

namespace kvsparse_test {

struct CacheKind {
  std::string policy;
  kvsparse::ScalarType scalar = kvsparse::ScalarType::f32;
  kvsparse::CacheConfig config;
  std::vector<kvsparse::OptionSetting> settings;

  bool evicts = false;
  bool selects = false;
  bool reads_as_needed = false;   ///< whatever the budget for reading
  bool reads_newest = true;       ///< whatever the query
  bool answers_for_gone = false;  ///< an answer is more than the softmax over what is read
  bool counts_in_cache = false;   ///< a query meets a page at the distance that the resident tokens give it
  bool trims = false;
  bool pins_prompt = false;
  bool shares_budget = false;  ///< among the heads of the layer
  double budget_floor = 0;     ///< that each is left with then
  std::size_t sink_pages = 0;

  kvsparse::AnyCache make() const;
  kvsparse::AnyCache make(const kvsparse::AnyPagePool& pool) const;

  kvsparse::Geometry geometry() const { return config.geometry(); }
  std::size_t decode_pages() const { return std::max<std::size_t>(1, geometry().pages_for(config.min_decode_tokens)); }
  /// As configured.
  std::size_t page_budget() const {
    return evicts ? config.budget_tokens / config.page_size : geometry().pages_for(config.max_tokens);
  }
  /// Pages that a head keeps once it had them, where heads share a budget.
  std::size_t page_floor() const {
    const auto share = static_cast<std::size_t>(budget_floor * static_cast<double>(page_budget()));
    return std::max<std::size_t>(1, share);
  }
  /// Pages that can never be victims once so many tokens of the prompt came; 0 where the prompt gives way.
  std::size_t pages_pinned_by(std::size_t prompt) const {
    if (!pins_prompt || config.prompt_overflow == kvsparse::PromptOverflow::unpin_middle) return 0;
    return std::max(sink_pages, geometry().pages_for(prompt));
  }
  /// Pages that a head has memory for, but for drafts.
  std::size_t page_capacity() const {
    const bool grows = evicts && pins_prompt && config.prompt_overflow == kvsparse::PromptOverflow::grow;
    const std::size_t grown = geometry().pages_for(config.max_prompt_tokens) + decode_pages();
    return grows ? std::max(page_budget(), grown) : page_budget();
  }
  /// Pages that a head may hold after a prompt of so many tokens, without drafts.
  std::size_t page_budget_after(std::size_t prompt) const {
    const std::size_t pinned = prompt == 0 ? 0 : pages_pinned_by(prompt);
    return evicts && pinned != 0 ? std::max(page_budget(), pinned + decode_pages()) : page_budget();
  }
  std::string describe() const;
};

/// What the caches of one pool have in common.
struct PoolShape {
  std::size_t kv_heads = 1, group = 1, head_dim = 8, value_dim = 8, page_size = 1;
  kvsparse::PageSummary summary = kvsparse::PageSummary::none;
};

/// Those of the name table, and the witnesses.
std::vector<std::string> policies_to_model();

/// Any shape that suits the policy.
PoolShape draw_shape(std::string_view policy, std::size_t page_size, TestRng& rng);
/// A cache of that policy for such a pool. Throws std::runtime_error if none can be found.
CacheKind draw_kind(std::string_view policy, kvsparse::ScalarType scalar, const PoolShape& shape, TestRng& rng);
/// A pool of `pages` pages for each kv head.
kvsparse::AnyPagePool make_pool(kvsparse::ScalarType scalar, const PoolShape& shape, std::size_t pages);

}  // namespace kvsparse_test
