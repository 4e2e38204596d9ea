// SPDX-License-Identifier: Apache-2.0
#include "named_cache.hpp"

#include <utility>

namespace kvsparse_tools {

namespace {

constexpr std::size_t parts = KVSPARSE_NAMED_CACHE_PARTS;

/// What the part that knows the policy says. of_part.operator()<Part>(): nothing, where it does not.
template <class OfPart, std::size_t... Part>
auto from_any_part(std::index_sequence<Part...>, std::string_view policy, const OfPart& of_part) {
  decltype(of_part.template operator()<0>()) found;
  static_cast<void>(((found = of_part.template operator()<Part>()) || ...));
  if (!found) throw kvsparse::unknown_policy(policy);
  return std::move(*found);
}
template <class OfPart>
auto from_any_part(std::string_view policy, const OfPart& of_part) {
  return from_any_part(std::make_index_sequence<parts>{}, policy, of_part);
}

}  // namespace

kvsparse::AnyCache named_cache(std::string_view policy, kvsparse::ScalarType dtype, const kvsparse::CacheConfig& config,
                               std::span<const kvsparse::OptionSetting> settings) {
  return from_any_part(policy, [&]<std::size_t Part>() {
    return named_cache_of_part<Part, parts>(policy, dtype, config, settings, nullptr);
  });
}

kvsparse::AnyCache named_cache_over(const kvsparse::AnyPagePool& pool, std::string_view policy,
                                    const kvsparse::CacheConfig& config,
                                    std::span<const kvsparse::OptionSetting> settings) {
  const auto dtype = static_cast<kvsparse::ScalarType>(pool.index());
  return from_any_part(policy, [&]<std::size_t Part>() {
    return named_cache_of_part<Part, parts>(policy, dtype, config, settings, &pool);
  });
}

std::size_t named_cache_bytes(std::string_view policy, kvsparse::ScalarType dtype, const kvsparse::CacheConfig& config,
                              std::span<const kvsparse::OptionSetting> settings) {
  return from_any_part(policy, [&]<std::size_t Part>() {
    return named_cache_bytes_of_part<Part, parts>(policy, dtype, config, settings);
  });
}

}  // namespace kvsparse_tools
