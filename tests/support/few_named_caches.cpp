// SPDX-License-Identifier: Apache-2.0
//
// Linked in the place of kvsparse_named_cache where compiling all policies would take too long.
#include "few_named_caches.hpp"

#include <utility>

#include "engine/named_cache.hpp"

namespace kvsparse_tools {

namespace {

kvsparse::AnyCache from_few(std::string_view policy, kvsparse::ScalarType dtype, const kvsparse::CacheConfig& config,
                            std::span<const kvsparse::OptionSetting> settings, const kvsparse::AnyPagePool* pool) {
  auto cache = kvsparse::AnyCache::find<kvsparse_test::FewPolicies, float, kvsparse::Int8>(policy, dtype, config,
                                                                                           settings, pool);
  if (!cache) throw kvsparse::ConfigError("policy " + std::string(policy) + " is not compiled into this program");
  return std::move(*cache);
}

}  // namespace

kvsparse::AnyCache named_cache(std::string_view policy, kvsparse::ScalarType dtype, const kvsparse::CacheConfig& config,
                               std::span<const kvsparse::OptionSetting> settings) {
  return from_few(policy, dtype, config, settings, nullptr);
}

kvsparse::AnyCache named_cache_over(const kvsparse::AnyPagePool& pool, std::string_view policy,
                                    const kvsparse::CacheConfig& config,
                                    std::span<const kvsparse::OptionSetting> settings) {
  return from_few(policy, static_cast<kvsparse::ScalarType>(pool.index()), config, settings, &pool);
}

}  // namespace kvsparse_tools
