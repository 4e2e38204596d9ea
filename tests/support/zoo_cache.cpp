// SPDX-License-Identifier: Apache-2.0
#include "zoo_cache.hpp"

#include <optional>
#include <stdexcept>
#include <string>

#include "kvsparse/policy/half_space.hpp"
#include "kvsparse/policy/hash_attention.hpp"
#include "kvsparse/policy/hierarchical_top_k.hpp"
#include "kvsparse/policy/key_diff.hpp"
#include "kvsparse/policy/key_norm.hpp"
#include "kvsparse/policy/lazy_eviction.hpp"
#include "kvsparse/policy/lrfu.hpp"
#include "kvsparse/policy/r_kv.hpp"
#include "kvsparse/policy/snap_kv.hpp"
#include "kvsparse/policy/tova.hpp"
#include "kvsparse/policy/value_aware.hpp"

namespace kvsparse_test {
namespace {

using namespace kvsparse;

template <class... Policies>
std::optional<AnyCache> find(std::string_view name, ScalarType scalar, const CacheConfig& config,
                             std::span<const OptionSetting> settings) {
  std::optional<AnyCache> cache;
  const auto try_policy = [&]<class Policy>() {
    if (Policy::name == name) cache.emplace(AnyCache::of<Policy, float, Half>(scalar, config, settings));
  };
  (try_policy.template operator()<Policies>(), ...);
  return cache;
}

}  // namespace

AnyCache zoo_cache(std::string_view policy, ScalarType scalar, const CacheConfig& config,
                   std::span<const OptionSetting> settings) {
  auto cache = find<KeyNorm, ValueAware, KeyDiff, Lrfu, Tova, LazyEviction, SnapKv, RKv, HashAttention,
                    HierarchicalTopK, HalfSpace>(policy, scalar, config, settings);
  if (!cache) throw std::invalid_argument("no policy " + std::string(policy));
  return *std::move(cache);
}

}  // namespace kvsparse_test
