// SPDX-License-Identifier: Apache-2.0
#include "zoo_cache.hpp"

#include <optional>

#include "engine/named_cache.hpp"

namespace kvsparse_test {
namespace {

using namespace kvsparse;

using UnnamedCompositions = PolicyList<Compose<Lrfu, Quest>, Compose<AdaKv, Quest>, Compose<Tova, HierarchicalTopK>,
                                       Compose<LazyEviction, HalfSpace>>;

}  // namespace

AnyCache zoo_cache(std::string_view policy, ScalarType scalar, const CacheConfig& config,
                   std::span<const OptionSetting> settings) {
  std::optional<AnyCache> cache = AnyCache::find<UnnamedCompositions, float, Half>(policy, scalar, config, settings);
  return cache ? *std::move(cache) : kvsparse_tools::named_cache(policy, scalar, config, settings);
}

}  // namespace kvsparse_test
