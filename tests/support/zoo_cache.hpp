// SPDX-License-Identifier: Apache-2.0
//
// Caches of the policies that have no name in the library's table, by name, for the tests. zoo_cache.cpp compiles them
// for f32 and f16.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvsparse/cache/any_cache.hpp"

namespace kvsparse_test {

/// Throws std::invalid_argument if there is no such policy.
kvsparse::AnyCache zoo_cache(std::string_view policy, kvsparse::ScalarType scalar, const kvsparse::CacheConfig& config,
                             std::span<const kvsparse::OptionSetting> settings);

/// The names of those that evict.
std::vector<std::string> zoo_evictors();

}  // namespace kvsparse_test
