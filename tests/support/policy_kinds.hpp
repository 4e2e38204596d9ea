// SPDX-License-Identifier: Apache-2.0
// What tests of all named policies must know of some.
#pragma once

#include <cstddef>
#include <string_view>

namespace kvsparse_test {

/// Whether a policy trims to some tokens below its budget, `small_lag` of them in tests.
inline bool aims_below_budget(std::string_view policy) { return policy == "lazy_eviction" || policy == "r_kv"; }
inline constexpr std::size_t small_lag = 2;

/// Whether its answers are not those of the tokens it holds alone: something there stands for what was evicted.
inline bool answers_for_the_gone(std::string_view policy) {
  return policy == "clustered" || policy == "streaming_sketch";
}

}  // namespace kvsparse_test
