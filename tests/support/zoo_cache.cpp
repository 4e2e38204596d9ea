// SPDX-License-Identifier: Apache-2.0
#include "zoo_cache.hpp"

#include <optional>
#include <stdexcept>
#include <string>

#include "kvsparse/policy/certified.hpp"
#include "kvsparse/policy/clustered.hpp"
#include "kvsparse/policy/half_space.hpp"
#include "kvsparse/policy/hash_attention.hpp"
#include "kvsparse/policy/hierarchical_top_k.hpp"
#include "kvsparse/policy/key_diff.hpp"
#include "kvsparse/policy/key_norm.hpp"
#include "kvsparse/policy/lazy_eviction.hpp"
#include "kvsparse/policy/lrfu.hpp"
#include "kvsparse/policy/r_kv.hpp"
#include "kvsparse/policy/snap_kv.hpp"
#include "kvsparse/policy/streaming_sketch.hpp"
#include "kvsparse/policy/tova.hpp"
#include "kvsparse/policy/value_aware.hpp"

namespace kvsparse_test {
namespace {

using namespace kvsparse;

using ZooPolicies = PolicyList<KeyNorm, ValueAware, KeyDiff, Lrfu, Tova, LazyEviction, SnapKv, RKv, HashAttention,
                               HierarchicalTopK, HalfSpace, Certified, Clustered, StreamingSketch, Compose<Raas, Quest>,
                               Compose<Lrfu, Quest>, Compose<Tova, HierarchicalTopK>, Compose<LazyEviction, HalfSpace>>;

}  // namespace

AnyCache zoo_cache(std::string_view policy, ScalarType scalar, const CacheConfig& config,
                   std::span<const OptionSetting> settings) {
  std::optional<AnyCache> cache;
  kvsparse::detail::visit_policies(ZooPolicies{}, [&]<class Policy>() {
    if (Policy::name == policy) cache.emplace(AnyCache::of<Policy, float, Half>(scalar, config, settings));
  });
  if (!cache) throw std::invalid_argument("no policy " + std::string(policy));
  return *std::move(cache);
}

std::vector<std::string> zoo_evictors() {
  std::vector<std::string> names;
  kvsparse::detail::visit_policies(ZooPolicies{}, [&]<class Policy>() {
    if (Evictor<Policy>) names.emplace_back(Policy::name);
  });
  return names;
}

}  // namespace kvsparse_test
