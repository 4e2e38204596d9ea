// SPDX-License-Identifier: Apache-2.0
// HalfSpace: instead of so many best pages, read every page that could matter: all whose largest possible share of the
// softmax is at least `epsilon` a page, however many they are. Source: the half-space reports of Chen et al.
// (2410.10165), with Quest's bound in place of their search tree, which is hopeless at 128 channels.  Needs: min/max
// page summaries, log-sum-exp. Per step: O(N/B d) + O(pages read * B d); the read budget does not cap it.  Memory: O(N)
// plus two key rows a page. Departs from the paper: the threshold comes from the last query's log-sum-exp, the smallest
// of the group, so it is safe while queries change slowly and proves nothing; Certified does. The first query of a
// sequence reads everything, as does one after a query whose log-sum-exp was no number.
#pragma once

#include <cmath>

#include "policy.hpp"

namespace kvsparse {

struct HalfSpace {
  static constexpr std::string_view name = "half_space";
  static constexpr bool select_always = true;
  static constexpr PageSummary page_summary = PageSummary::min_max;
  static constexpr EvidenceKind evidence = EvidenceKind::page_mass;

  struct Options {
    double epsilon = 1e-4;  ///< a page is skipped when it cannot have a larger share of the last query's softmax
    void visit(auto&& field) { field("epsilon", epsilon); }
    std::string problem() const {
      if (!(epsilon > 0.0 && epsilon < 1.0)) return "epsilon = " + std::to_string(epsilon) + " is not in (0, 1)";
      return {};
    }
  } options;

  struct HeadState {
    float log_sum_exp = -std::numeric_limits<float>::infinity();  // smallest of the group, at the latest query
  };

  void select(HeadView<HalfSpace> head, QueryGroup queries, Selection& selection) const {
    const std::span<float> bounds = head.scratch().first(head.size());
    head.pooled_upper_bounds(queries, bounds);
    const auto limit = static_cast<float>(static_cast<double>(head.head_state().log_sum_exp) +
                                          std::log(options.epsilon / static_cast<double>(head.page_size())));
    for (const PageIndex page : head.pages()) {
      const bool cannot_matter = queries.scale * bounds[page.value] < limit;
      if (!cannot_matter || head.is_open(page)) selection.add(page);
    }
  }

  void observe(HeadView<HalfSpace> head, const Evidence& step) const {
    float lowest = step.log_sum_exp(0);
    for (std::size_t q = 1; q < step.group(); ++q) lowest = std::min(lowest, step.log_sum_exp(q));
    head.head_state().log_sum_exp = lowest == lowest ? lowest : -std::numeric_limits<float>::infinity();
  }
};

}  // namespace kvsparse
