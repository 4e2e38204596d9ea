// SPDX-License-Identifier: Apache-2.0
// Quest: a page's channel-wise minimum and maximum key bound every dot product with the query, so read the pages with
// the highest bound and keep them all. Source: Tang et al., ICML 2024 (2406.10774), section 3.3.  Needs: min/max page
// summaries. Per step: O(N/B d + L d).  Memory: O(N) plus two key rows a page.  The budget caps reads, not residency.
// Departs from the paper: one selection for each kv head, by the largest bound in its query group (pool = query_head
// gives one for each query head, as the evaluation code does); queries of the prompt select like any other query (the
// paper prefills densely: below the read budget the two are the same).
#pragma once

#include "policy.hpp"

namespace kvsparse {

struct Quest {
  static constexpr std::string_view name = "quest";
  static constexpr PageSummary page_summary = PageSummary::min_max;

  enum class Pool { max, query_head };
  static constexpr std::string_view names_of(Pool) { return "max|query_head"; }

  struct Options {
    Pool pool = Pool::max;
    void visit(auto&& field) { field("pool", pool); }
  } options;

  SelectionScope selection() const {
    return options.pool == Pool::max ? SelectionScope::kv_head : SelectionScope::query_head;
  }

  void select(HeadView<Quest> head, QueryGroup queries, Selection& selection) const {
    const std::span<float> bounds = head.scratch().first(head.size());
    head.pooled_upper_bounds(queries, bounds);
    selection.add(head.open_page());
    selection.add_highest(bounds, head.read_page_budget() - 1);
  }
};

}  // namespace kvsparse
