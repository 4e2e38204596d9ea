// SPDX-License-Identifier: Apache-2.0
// A policy with its options as one word: "h2o", "h2o:pin_prompt=true", "raas:evidence=quest_bound:alpha=1e-4",
// "raas+quest:read_share=0.5".
#pragma once

#include <charconv>
#include <cstddef>
#include <string>
#include <system_error>
#include <vector>

#include "common/option_lists.hpp"
#include "idea_cache.hpp"

namespace kvsparse_tools {

namespace detail {

inline double parse_read_share(const std::string& text) {
  double share = 0.0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), share);
  if (error != std::errc{} || end != text.data() + text.size() || !(share > 0.0 && share <= 1.0)) {
    throw UsageError("read_share got " + in_quotes(text) + ", a part of the budget, above 0 and up to 1, was expected");
  }
  return share;
}

}  // namespace detail

struct PolicyVariant {
  std::string text;  // as given
  std::string policy;
  PolicySettings settings;
  double read_share = 1.0;      // of the budget, where the settings do not give the tokens to read
  bool ignores_budget = false;  // like dense: neither evicts nor selects
};

/// Whether the policy has the options, and the options the values, shows when a cache is made. Throws UsageError.
inline PolicyVariant parse_variant(const std::string& text) {
  const std::vector<std::string> parts = split_at(':', text);
  PolicyVariant variant;
  variant.text = text;
  variant.policy = parts.front();
  kvsparse::PolicyFacts facts;
  try {
    facts = idea_or_named_facts(variant.policy);
  } catch (const kvsparse::ConfigError&) {
    // A name goes back to the terminal, so it is quoted here and not by the library's sentence.
    std::string known;
    for (const auto& names : {kvsparse::policy_names(), idea_names()}) {
      for (const std::string& name : names) known += (known.empty() ? "" : ", ") + name;
    }
    throw UsageError("--policy names the unknown " + in_quotes(variant.policy) + "; known are " + known);
  }
  variant.ignores_budget = !facts.evicts && !facts.selects;
  for (std::size_t i = 1; i < parts.size(); ++i) {
    const std::size_t equals = parts[i].find('=');
    if (equals == std::string::npos || equals == 0) {
      throw UsageError("--policy got " + in_quotes(text) + ", name:key=value:key=value was expected");
    }
    const std::string key = parts[i].substr(0, equals), value = parts[i].substr(equals + 1);
    if (key == "read_budget" && facts.selects) {
      variant.settings.read_budget_tokens = parse_count("read_budget", value, 1, largest_budget);
    } else if (key == "read_share" && facts.selects) {
      variant.read_share = detail::parse_read_share(value);
    } else {
      variant.settings.options.push_back({key, value});
    }
  }
  return variant;
}

}  // namespace kvsparse_tools
