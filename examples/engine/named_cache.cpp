// SPDX-License-Identifier: Apache-2.0
#include "named_cache.hpp"

namespace kvsparse_tools {

kvsparse::AnyCache named_cache(std::string_view policy, kvsparse::ScalarType dtype, const kvsparse::CacheConfig& config,
                               std::span<const kvsparse::OptionSetting> settings) {
  return kvsparse::AnyCache(policy, dtype, config, settings);
}

kvsparse::AnyCache named_cache_over(const kvsparse::AnyPagePool& pool, std::string_view policy,
                                    const kvsparse::CacheConfig& config,
                                    std::span<const kvsparse::OptionSetting> settings) {
  return kvsparse::AnyCache(policy, config, pool, settings);
}

}  // namespace kvsparse_tools
