// SPDX-License-Identifier: Apache-2.0
// The policies that can be asked for by name at run time, and what is known of each before a cache is made. Types and
// names alone: including it instantiates no cache.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "ada_kv.hpp"
#include "certified.hpp"
#include "clustered.hpp"
#include "compose.hpp"
#include "dense.hpp"
#include "h2o.hpp"
#include "half_space.hpp"
#include "hash_attention.hpp"
#include "hierarchical_top_k.hpp"
#include "key_diff.hpp"
#include "key_norm.hpp"
#include "kindred.hpp"
#include "lazy_eviction.hpp"
#include "lrfu.hpp"
#include "options.hpp"
#include "oracle.hpp"
#include "quest.hpp"
#include "r_kv.hpp"
#include "raas.hpp"
#include "random.hpp"
#include "snap_kv.hpp"
#include "streaming_llm.hpp"
#include "streaming_sketch.hpp"
#include "tova.hpp"
#include "value_aware.hpp"

namespace kvsparse {

/// Types to compile caches for.
template <class... Policies>
struct PolicyList {};

/// The name table: a new policy is one more name here.
using KnownPolicies = PolicyList<Dense, StreamingLlm, H2o, Raas, Kindred, Tova, SnapKv, AdaKv, RKv, LazyEviction, Lrfu,
                                 KeyNorm, KeyDiff, ValueAware, Clustered, StreamingSketch, Random, Quest, HashAttention,
                                 HierarchicalTopK, HalfSpace, Certified, Oracle>;

/// Those whose compositions have names too. Any evictor composes with any selector (`Compose`); each pair costs as much
/// to compile as a policy.
using ComposedPolicies = PolicyList<StreamingLlm, H2o, Raas, Kindred, Random, Quest, Oracle>;

namespace detail {

template <class... Lists>
struct Joined;
template <>
struct Joined<> {
  using List = PolicyList<>;
};
template <class... Policies>
struct Joined<PolicyList<Policies...>> {
  using List = PolicyList<Policies...>;
};
template <class... First, class... Second, class... Rest>
struct Joined<PolicyList<First...>, PolicyList<Second...>, Rest...> : Joined<PolicyList<First..., Second...>, Rest...> {
};

template <class Evict, class Select>
using CompositionIfAny = std::conditional_t<Evictor<Evict> && !Selector<Evict> && Selector<Select> && !Evictor<Select>,
                                            PolicyList<Compose<Evict, Select>>, PolicyList<>>;

template <class List>
struct Compositions;
template <class... Policies>
struct Compositions<PolicyList<Policies...>> {
  template <class Evict>
  using Of = typename Joined<CompositionIfAny<Evict, Policies>...>::List;
  using List = typename Joined<Of<Policies>...>::List;
};

template <class List, std::size_t Part, std::size_t Parts, class Indices>
struct EveryNth;
template <class... Policies, std::size_t Part, std::size_t Parts, std::size_t... Index>
struct EveryNth<PolicyList<Policies...>, Part, Parts, std::index_sequence<Index...>>
    : Joined<std::conditional_t<Index % Parts == Part, PolicyList<Policies>, PolicyList<>>...> {};

template <class... Policies>
constexpr auto indices_of(PolicyList<Policies...>) {
  return std::index_sequence_for<Policies...>{};
}

/// Calls visit.template operator()<Policy>() for every policy of the list.
template <class Visit, class... Policies>
void visit_policies(PolicyList<Policies...>, Visit&& visit) {
  (visit.template operator()<Policies>(), ...);
}
/// For the one of that name alone, if there is one.
template <class List, class Visit>
void visit_policy(std::string_view name, Visit&& visit) {
  visit_policies(List{}, [&]<class Policy>() {
    if (Policy::name == name) visit.template operator()<Policy>();
  });
}

}  // namespace detail

/// The policies of a list, then every evictor a of another with every selector b of that, by the name "a+b".
template <class List, class Composed = List>
using WithCompositions = typename detail::Joined<List, typename detail::Compositions<Composed>::List>::List;

/// All that has a name.
using NamedPolicies = WithCompositions<KnownPolicies, ComposedPolicies>;

/// Every Parts-th policy of a list, from the Part-th on. Caches of many policies take long to compile; the parts of a
/// table are compiled side by side, each in a translation unit of its own.
template <class List, std::size_t Part, std::size_t Parts>
using PartOfPolicies = typename detail::EveryNth<List, Part, Parts, decltype(detail::indices_of(List{}))>::List;

/// What a caller may want to know of a named policy before it configures a cache.
struct PolicyFacts {
  bool evicts = false;                   ///< budget_tokens caps residency; without it the policy keeps max_tokens
  bool selects = false;                  ///< read_budget_tokens caps reads
  bool shares_budget = false;            ///< budget_tokens caps the mean over a layer's heads, not each of them
  std::vector<std::string> option_keys;  ///< what OptionSetting::key may be
};

/// Of a policy known by type.
template <class Policy>
PolicyFacts policy_facts() {
  return {Evictor<Policy>, Selector<Policy>, SharedBudgetEvictor<Policy>, option_keys<Policy>()};
}

/// Names of a list of policies.
template <class List = NamedPolicies>
std::vector<std::string> policy_names() {
  std::vector<std::string> names;
  detail::visit_policies(List{}, [&]<class Policy>() { names.emplace_back(Policy::name); });
  return names;
}

/// The facts of the policy of that name in a list, or nothing.
template <class List>
std::optional<PolicyFacts> find_policy_facts(std::string_view name) {
  std::optional<PolicyFacts> facts;
  detail::visit_policy<List>(name, [&]<class Policy>() { facts = policy_facts<Policy>(); });
  return facts;
}

/// The error for a name that no policy has: its sentence lists the known names.
inline ConfigError unknown_policy(std::string_view name) {
  std::string known;
  for (const std::string& policy : policy_names()) known += (known.empty() ? "" : ", ") + policy;
  return ConfigError("unknown policy " + std::string(name) + "; known are " + known);
}

/// Of the policy of that name. Throws ConfigError, listing the known names, if there is none.
inline PolicyFacts policy_facts(std::string_view name) {
  std::optional<PolicyFacts> facts = find_policy_facts<NamedPolicies>(name);
  if (!facts) KVSPARSE_THROW(unknown_policy(name));
  return std::move(*facts);
}

}  // namespace kvsparse
