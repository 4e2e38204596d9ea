// SPDX-License-Identifier: Apache-2.0
#include "named_cache.hpp"

#include <utility>

namespace kvsparse_tools {

namespace {

/// What the part that knows the policy says. of_part.operator()<Part, Parts>(): nothing, where it does not.
template <class OfPart>
auto from_any_part(std::string_view policy, const OfPart& of_part) {
  constexpr std::size_t parts = KVSPARSE_NAMED_CACHE_PARTS;
  return [&]<std::size_t... Part>(std::index_sequence<Part...>) {
    decltype(of_part.template operator()<0, parts>()) found;
    static_cast<void>(((found = of_part.template operator()<Part, parts>()) || ...));
    if (!found) throw kvsparse::unknown_policy(policy);
    return std::move(*found);
  }
  (std::make_index_sequence<parts>{});
}

}  // namespace

kvsparse::AnyCache named_cache(std::string_view policy, kvsparse::ScalarType dtype, const kvsparse::CacheConfig& config,
                               std::span<const kvsparse::OptionSetting> settings) {
  return from_any_part(policy, [&]<std::size_t Part, std::size_t Parts>() {
    return named_cache_of_part<Part, Parts>(policy, dtype, config, settings, nullptr);
  });
}

kvsparse::AnyCache named_cache_over(const kvsparse::AnyPagePool& pool, std::string_view policy,
                                    const kvsparse::CacheConfig& config,
                                    std::span<const kvsparse::OptionSetting> settings) {
  const auto dtype = static_cast<kvsparse::ScalarType>(pool.index());
  return from_any_part(policy, [&]<std::size_t Part, std::size_t Parts>() {
    return named_cache_of_part<Part, Parts>(policy, dtype, config, settings, &pool);
  });
}

std::size_t named_cache_bytes(std::string_view policy, kvsparse::ScalarType dtype, const kvsparse::CacheConfig& config,
                              std::span<const kvsparse::OptionSetting> settings) {
  return from_any_part(policy, [&]<std::size_t Part, std::size_t Parts>() {
    return named_cache_bytes_of_part<Part, Parts>(policy, dtype, config, settings);
  });
}

}  // namespace kvsparse_tools
