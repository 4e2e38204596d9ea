// SPDX-License-Identifier: Apache-2.0
// Caches by name for `reasoning`: the research policies of ideas/ first, then the library's name table. Compiled once,
// in idea_cache.cpp, which is also the only place that knows which ideas there are.
#pragma once

#include <kvsparse/cache/any_cache.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace kvsparse_tools {

/// A CacheFactory. Ideas store float only. Throws kvsparse::ConfigError.
kvsparse::AnyCache idea_or_named_cache(std::string_view policy, kvsparse::ScalarType dtype,
                                       const kvsparse::CacheConfig& config,
                                       std::span<const kvsparse::OptionSetting> settings);

/// Throws kvsparse::ConfigError for a name that is neither an idea's nor in the name table.
kvsparse::PolicyFacts idea_or_named_facts(std::string_view policy);

/// The names of the ideas alone.
std::vector<std::string> idea_names();

}  // namespace kvsparse_tools
