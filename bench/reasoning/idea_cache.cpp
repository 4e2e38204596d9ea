// SPDX-License-Identifier: Apache-2.0
#include "idea_cache.hpp"

#include <utility>

#include "engine/named_cache.hpp"
#include "ideas/ideas.hpp"

namespace kvsparse_tools {

using ideas::Ideas;  // research policies are plugged in there and nowhere else

kvsparse::AnyCache idea_or_named_cache(std::string_view policy, kvsparse::ScalarType dtype,
                                       const kvsparse::CacheConfig& config,
                                       std::span<const kvsparse::OptionSetting> settings) {
  auto cache = kvsparse::AnyCache::find<Ideas, float>(policy, dtype, config, settings);
  return cache ? std::move(*cache) : named_cache(policy, dtype, config, settings);
}

kvsparse::PolicyFacts idea_or_named_facts(std::string_view policy) {
  auto facts = kvsparse::find_policy_facts<Ideas>(policy);
  return facts ? std::move(*facts) : kvsparse::policy_facts(policy);
}

std::vector<std::string> idea_names() { return kvsparse::policy_names<Ideas>(); }

}  // namespace kvsparse_tools
