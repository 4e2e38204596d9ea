// SPDX-License-Identifier: Apache-2.0
//
// Caches by name, of compositions too that have none in the library's table: lrfu+quest, ada_kv+quest,
// tova+hierarchical_top_k, lazy_eviction+half_space, in f32 and f16.
#pragma once

#include <span>
#include <string_view>

#include "kvsparse/cache/any_cache.hpp"

namespace kvsparse_test {

/// Throws ConfigError if there is no such policy.
kvsparse::AnyCache zoo_cache(std::string_view policy, kvsparse::ScalarType scalar, const kvsparse::CacheConfig& config,
                             std::span<const kvsparse::OptionSetting> settings);

}  // namespace kvsparse_test
