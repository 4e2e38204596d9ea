// SPDX-License-Identifier: Apache-2.0
// How programs and tests get their caches. Every policy of the name table is compiled for every storage type once, in
// the library kvsparse_named_cache: in several parts, so that a machine's cores share the work.
#pragma once

#include <cstddef>
#include <functional>
#include <kvsparse/cache/any_cache.hpp>
#include <optional>
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

/// What named_cache would allocate, without making it. Throws kvsparse::ConfigError.
std::size_t named_cache_bytes(std::string_view policy, kvsparse::ScalarType dtype, const kvsparse::CacheConfig& config,
                              std::span<const kvsparse::OptionSetting> settings = {});

/// For those three: the policies whose place in the table is Part, modulo Parts; nothing for the others. pool: null for
/// pages of the cache's own. CMakeLists.txt writes a translation unit for each part.
template <std::size_t Part, std::size_t Parts>
std::optional<kvsparse::AnyCache> named_cache_of_part(std::string_view policy, kvsparse::ScalarType dtype,
                                                      const kvsparse::CacheConfig& config,
                                                      std::span<const kvsparse::OptionSetting> settings,
                                                      const kvsparse::AnyPagePool* pool);
template <std::size_t Part, std::size_t Parts>
std::optional<std::size_t> named_cache_bytes_of_part(std::string_view policy, kvsparse::ScalarType dtype,
                                                     const kvsparse::CacheConfig& config,
                                                     std::span<const kvsparse::OptionSetting> settings);

}  // namespace kvsparse_tools
