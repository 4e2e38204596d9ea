// SPDX-License-Identifier: Apache-2.0
// Clairvoyant: gives up the pages that the rest of the trace wants least. No policy of the library, because it needs
// the future: what Oracle is to selectors, this is to evictors, the ceiling of comparisons.
//
// It loses the least attention mass that any evictor of whole pages can lose with that budget in every head (AdaKv's
// heads share theirs, and may lose less): the mass of a page's
// dense attention over the decode queries still to come, summed over the query heads of its group, is what giving it up
// costs, and BestEvictions finds the evictions whose costs sum to the least. It is a ceiling of the mass kept alone: it
// knows nothing of values, nor how the softmax grows on what is left, so that another policy may come by a smaller
// error of the output. Nothing is pinned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <kvsparse/policy/name_table.hpp>
#include <map>
#include <optional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "best_evictions.hpp"
#include "common/interrupt.hpp"
#include "common/progress.hpp"
#include "common/trace.hpp"
#include "dense_reference.hpp"
#include "future_page_mass.hpp"

namespace kvsparse_tools {

/// The page that each kv head gives up when a page opens, at one budget.
class EvictionPlan {
 public:
  /// Names page 0 everywhere until it is written.
  EvictionPlan(std::size_t kv_heads, std::size_t pages) : pages_(pages), victims_(kv_heads * pages) {}
  /// [pages], by the number of the page that opens
  std::span<std::uint32_t> of(std::size_t kv_head) { return std::span(victims_).subspan(kv_head * pages_, pages_); }
  std::size_t victim(std::size_t kv_head, std::size_t opening) const { return victims_[kv_head * pages_ + opening]; }

 private:
  std::size_t pages_;
  std::vector<std::uint32_t> victims_;
};

/// The plans of all budgets being replayed.
class Foresight {
 public:
  /// `trace` must outlive it.
  Foresight(const Trace& trace, std::size_t page_size) : trace_(trace), page_size_(page_size) {}

  /// The plan for this budget, which look_ahead will write. It stays where it is.
  const EvictionPlan& plan_of(std::size_t page_budget) {
    return plans_.try_emplace(page_budget, trace_.kv_heads, (trace_.tokens + page_size_ - 1) / page_size_)
        .first->second;
  }

  /// O(tokens^2) for the masses, O(pages^3) at most for the plans. An interrupt ends it early, plans unwritten.
  void look_ahead(DenseReference& dense) {
    const FuturePageMass future(trace_, page_size_, dense);
    ProgressBar progress("planning", trace_.kv_heads * future.pages());
    for (std::size_t head = 0; head < trace_.kv_heads; ++head) {
      BestEvictions best(future, head);
      for (std::size_t opening = future.pages(); opening-- > plans_.begin()->first && !interrupted();) {
        best.add(opening);
        if (const auto plan = plans_.find(opening); plan != plans_.end()) best.write(plan->second.of(head));
        progress.update((head + 1) * future.pages() - opening);
      }
    }
  }

 private:
  const Trace& trace_;
  std::size_t page_size_;
  std::map<std::size_t, EvictionPlan> plans_;  // by budget in pages
};

struct Clairvoyant {
  static constexpr std::string_view name = "clairvoyant";

  const EvictionPlan* plan = nullptr;  // for the trace, page size and budget being replayed; must outlive the cache

  kvsparse::PageIndex victim(kvsparse::HeadView<Clairvoyant> head) const {
    const std::size_t planned = plan->victim(head.kv_head(), head.geometry().page_number(head.end()));
    // Only an unwritten plan names a page that is gone: then the oldest goes.
    return head.lowest_evictable([&](kvsparse::PageIndex page) {
      return head.geometry().page_number(head.first_position(page)) == planned ? 0 : 1;
    });
  }
};

namespace detail {

template <class List>
struct WithClairvoyant;
template <class... Policies>
struct WithClairvoyant<kvsparse::PolicyList<Policies...>> {
  using List = kvsparse::PolicyList<Policies..., Clairvoyant>;
};

}  // namespace detail

/// What can be replayed: all that has a name, and the clairvoyant.
using ReplayedPolicies = detail::WithClairvoyant<kvsparse::NamedPolicies>::List;

/// Throws kvsparse::ConfigError if there is no such policy.
inline kvsparse::PolicyFacts replayed_policy_facts(std::string_view name) {
  std::optional<kvsparse::PolicyFacts> facts = kvsparse::find_policy_facts<ReplayedPolicies>(name);
  if (!facts) throw kvsparse::unknown_policy(name);
  return std::move(*facts);
}

}  // namespace kvsparse_tools
