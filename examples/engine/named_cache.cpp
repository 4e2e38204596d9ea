// SPDX-License-Identifier: Apache-2.0
#include "named_cache.hpp"

#include <utility>

namespace kvsparse_tools {

namespace {

constexpr std::size_t parts = KVSPARSE_NAMED_CACHE_PARTS;

template <std::size_t... Part>
kvsparse::AnyCache from_any_part(std::index_sequence<Part...>, std::string_view policy, kvsparse::ScalarType dtype,
                                 const kvsparse::CacheConfig& config, std::span<const kvsparse::OptionSetting> settings,
                                 const kvsparse::AnyPagePool* pool) {
  std::optional<kvsparse::AnyCache> cache;
  static_cast<void>(((cache = named_cache_of_part<Part, parts>(policy, dtype, config, settings, pool)) || ...));
  if (!cache) throw kvsparse::unknown_policy(policy);
  return std::move(*cache);
}

}  // namespace

kvsparse::AnyCache named_cache(std::string_view policy, kvsparse::ScalarType dtype, const kvsparse::CacheConfig& config,
                               std::span<const kvsparse::OptionSetting> settings) {
  return from_any_part(std::make_index_sequence<parts>{}, policy, dtype, config, settings, nullptr);
}

kvsparse::AnyCache named_cache_over(const kvsparse::AnyPagePool& pool, std::string_view policy,
                                    const kvsparse::CacheConfig& config,
                                    std::span<const kvsparse::OptionSetting> settings) {
  const auto dtype = static_cast<kvsparse::ScalarType>(pool.index());
  return from_any_part(std::make_index_sequence<parts>{}, policy, dtype, config, settings, &pool);
}

}  // namespace kvsparse_tools
