// SPDX-License-Identifier: Apache-2.0
// What tests of all named policies must know of some.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "kvsparse/policy/options.hpp"

namespace kvsparse_test {

/// Whether a policy trims to some tokens below its budget, `small_lag` of them in tests.
inline bool aims_below_budget(std::string_view policy) { return policy == "lazy_eviction" || policy == "r_kv"; }
inline constexpr std::size_t small_lag = 2;

/// Of a policy with these options: settings that make its windows and periods as short as small budgets need them.
inline std::vector<kvsparse::OptionSetting> short_periods(const std::vector<std::string>& option_keys,
                                                          std::size_t tokens) {
  std::vector<kvsparse::OptionSetting> settings;
  for (const std::string& key : option_keys) {
    if (key == "window" || key == "period") settings.push_back({key, std::to_string(tokens)});
  }
  return settings;
}

/// Whether its answers are not those of the tokens it holds alone: something there stands for what was evicted.
inline bool answers_for_the_gone(std::string_view policy) {
  return policy == "clustered" || policy == "streaming_sketch";
}

}  // namespace kvsparse_test
