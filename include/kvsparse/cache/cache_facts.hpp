// SPDX-License-Identifier: Apache-2.0
// What a cache is, as a list of names and values: two caches with the same facts can continue each other's sequence.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "../core/scalar.hpp"
#include "../policy/options.hpp"
#include "../version.hpp"
#include "cache_config.hpp"

namespace kvsparse::detail {

struct CacheFact {
  std::string name;
  std::string value;
  friend bool operator==(const CacheFact&, const CacheFact&) = default;
};
using CacheFacts = std::vector<CacheFact>;

/// The index-th of "a|b|c".
inline std::string_view name_at(std::string_view names, std::size_t index) {
  while (index-- > 0) names.remove_prefix(std::min(names.size(), names.find('|') + 1));
  return names.substr(0, names.find('|'));
}

/// A number in the shortest digits that read back as the same; names: of an enum.
template <class Value>
std::string fact_text(const Value& value, std::string_view names = {}) {
  if constexpr (std::is_same_v<Value, bool>) {
    return value ? "true" : "false";
  } else if constexpr (std::is_enum_v<Value>) {
    return std::string(name_at(names, static_cast<std::size_t>(value)));
  } else {
    char digits[32];
    return {digits, std::to_chars(digits, digits + sizeof digits, value).ptr};
  }
}

inline std::string fact_text(const std::vector<float>& values) {
  std::string text;
  for (const float value : values) text += (text.empty() ? "" : " ") + fact_text(value);
  return text.empty() ? "none" : text;
}

/// Every field of a configuration. A field added to CacheConfig does not compile before it is named here.
inline void add_facts(CacheFacts& facts, const CacheConfig& config) {
  const auto& [query_heads, kv_heads, head_dim, value_dim, values_in_keys, page_size, budget_tokens, read_budget_tokens,
               max_tokens, prompt_overflow, max_prompt_tokens, min_decode_tokens, max_speculative, layer, softmax_scale,
               rope, logits] = config;
  const auto& [soft_cap, window, alibi_slopes, sink_logits] = logits;
  facts.push_back({"query_heads", fact_text(query_heads)});
  facts.push_back({"kv_heads", fact_text(kv_heads)});
  facts.push_back({"head_dim", fact_text(head_dim)});
  facts.push_back({"value_dim", fact_text(value_dim != 0 ? value_dim : head_dim)});
  facts.push_back({"values_in_keys", fact_text(values_in_keys)});
  facts.push_back({"page_size", fact_text(page_size)});
  facts.push_back({"budget_tokens", fact_text(budget_tokens)});
  facts.push_back({"read_budget_tokens", fact_text(read_budget_tokens)});
  facts.push_back({"max_tokens", fact_text(max_tokens)});
  facts.push_back({"prompt_overflow", fact_text(prompt_overflow, "error|grow|unpin_middle")});
  facts.push_back({"max_prompt_tokens", fact_text(max_prompt_tokens)});
  facts.push_back({"min_decode_tokens", fact_text(min_decode_tokens)});
  facts.push_back({"max_speculative", fact_text(max_speculative)});
  facts.push_back({"layer", fact_text(layer)});
  facts.push_back({"softmax_scale", fact_text(softmax_scale)});
  const auto& [theta, rotary_dims, layout, scaling, factor, low_freq_factor, high_freq_factor, original_positions] =
      rope;
  facts.push_back({"rope.theta", fact_text(theta)});
  facts.push_back({"rope.rotary_dims", fact_text(rotary_dims)});
  facts.push_back({"rope.layout", fact_text(layout, "halves|interleaved")});
  facts.push_back({"rope.scaling", fact_text(scaling, "none|linear|llama3")});
  facts.push_back({"rope.factor", fact_text(factor)});
  facts.push_back({"rope.low_freq_factor", fact_text(low_freq_factor)});
  facts.push_back({"rope.high_freq_factor", fact_text(high_freq_factor)});
  facts.push_back({"rope.original_positions", fact_text(original_positions)});
  facts.push_back({"soft_cap", fact_text(soft_cap)});
  facts.push_back({"window", fact_text(window)});
  facts.push_back({"alibi_slopes", fact_text(alibi_slopes)});
  facts.push_back({"sink_logits", fact_text(sink_logits)});
}

/// The policy's options, and what it makes of the layout. Its state is saved as the bytes it is, so the sizes matter.
template <class Policy>
void add_facts(CacheFacts& facts, Policy policy) {
  visit_options(policy, [&](std::string_view name, const auto& value, std::string_view names) {
    facts.push_back({"option " + std::string(name), fact_text(value, names)});
  });
  facts.push_back({"page_summary", fact_text(traits::page_summary(policy), "none|min_max|mean")});
  facts.push_back({"query_window", fact_text(traits::query_window(policy))});
  facts.push_back({"bytes of page state", fact_text(sizeof(PageState<Policy>))});
  facts.push_back({"bytes of head state", fact_text(sizeof(HeadState<Policy>))});
  facts.push_back({"bytes of layer state", fact_text(sizeof(LayerState<Policy>))});
}

inline std::string version_text() {
  return fact_text(KVSPARSE_VERSION_MAJOR) + "." + fact_text(KVSPARSE_VERSION_MINOR) + "." +
         fact_text(KVSPARSE_VERSION_PATCH);
}

template <class Policy, StorageScalar Key, StorageScalar Value>
CacheFacts cache_facts(const CacheConfig& config, const Policy& policy) {
  CacheFacts facts{{"kvsparse", version_text()},
                   {"policy", std::string(Policy::name)},
                   {"keys", std::string(scalar_name<Key>)},
                   {"values", std::string(scalar_name<Value>)}};
  add_facts(facts, config);
  add_facts(facts, policy);
  return facts;
}

/// What a snapshot states, fit for a sentence: true facts are printable and, but for lists of many heads, short.
inline std::string shown_fact(std::string_view text) {
  constexpr std::size_t longest = 400;
  std::string shown;
  for (const char c : text.substr(0, longest)) shown += c >= ' ' && c <= '~' ? c : '?';
  return shown + (text.size() > longest ? "..." : "");
}

/// How the facts of a snapshot differ from those of the cache that is to continue from it: a sentence about the first
/// difference, empty if there is none.
inline std::string difference(const CacheFacts& snapshot, const CacheFacts& cache) {
  for (std::size_t i = 0; i < snapshot.size() && i < cache.size(); ++i) {
    if (snapshot[i] == cache[i]) continue;
    if (snapshot[i].name == cache[i].name) {
      return cache[i].name + " is " + shown_fact(snapshot[i].value) + " in the snapshot and " + cache[i].value +
             " here";
    }
    return "the snapshot says " + shown_fact(snapshot[i].name) + " = " + shown_fact(snapshot[i].value) +
           " where this cache has " + cache[i].name + " = " + cache[i].value;
  }
  if (snapshot.size() == cache.size()) return {};
  return "the snapshot states " + fact_text(snapshot.size()) + " facts and this cache " + fact_text(cache.size());
}

}  // namespace kvsparse::detail
