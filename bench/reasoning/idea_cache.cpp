// SPDX-License-Identifier: Apache-2.0
#include "idea_cache.hpp"

#include <optional>
#include <utility>

#include "engine/named_cache.hpp"
#include "ideas/ideas.hpp"

namespace kvsparse_tools {

namespace {

using ideas::Ideas;  // research policies are plugged in there and nowhere else

template <class Visit, class... Policies>
void visit_ideas(kvsparse::PolicyList<Policies...>, Visit&& visit) {
  (visit.template operator()<Policies>(), ...);
}

}  // namespace

kvsparse::AnyCache idea_or_named_cache(std::string_view policy, kvsparse::ScalarType dtype,
                                       const kvsparse::CacheConfig& config,
                                       std::span<const kvsparse::OptionSetting> settings) {
  std::optional<kvsparse::AnyCache> cache;
  visit_ideas(Ideas{}, [&]<class Policy>() {
    if (Policy::name == policy) cache = kvsparse::AnyCache::of<Policy, float>(dtype, config, settings);
  });
  return cache ? std::move(*cache) : named_cache(policy, dtype, config, settings);
}

kvsparse::PolicyFacts idea_or_named_facts(std::string_view policy) {
  std::optional<kvsparse::PolicyFacts> facts;
  visit_ideas(Ideas{}, [&]<class Policy>() {
    if (Policy::name == policy) facts = kvsparse::policy_facts<Policy>();
  });
  return facts ? std::move(*facts) : kvsparse::policy_facts(policy);
}

std::vector<std::string> idea_names() {
  std::vector<std::string> names;
  visit_ideas(Ideas{}, [&]<class Policy>() { names.emplace_back(Policy::name); });
  return names;
}

}  // namespace kvsparse_tools
