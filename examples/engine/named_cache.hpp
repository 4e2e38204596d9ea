// SPDX-License-Identifier: Apache-2.0
// How a program gets its caches. named_cache() is compiled once, in the library kvsparse_engine: it instantiates every
// policy of the name table for every storage type, which takes most of a minute.
#pragma once

#include <functional>
#include <kvsparse/cache/any_cache.hpp>
#include <span>
#include <string_view>

namespace kvsparse_tools {

/// Makes the cache of one layer. Throws kvsparse::ConfigError.
using CacheFactory = std::function<kvsparse::AnyCache(std::string_view policy, kvsparse::ScalarType dtype,
                                                      const kvsparse::CacheConfig& config,
                                                      std::span<const kvsparse::OptionSetting> settings)>;

/// The factory of the library's name table.
kvsparse::AnyCache named_cache(std::string_view policy, kvsparse::ScalarType dtype, const kvsparse::CacheConfig& config,
                               std::span<const kvsparse::OptionSetting> settings = {});

/// The same over pages of a pool, stored as the pool stores them.
kvsparse::AnyCache named_cache_over(const kvsparse::AnyPagePool& pool, std::string_view policy,
                                    const kvsparse::CacheConfig& config,
                                    std::span<const kvsparse::OptionSetting> settings = {});

}  // namespace kvsparse_tools
