// SPDX-License-Identifier: Apache-2.0
// Quest: a page's channel-wise minimum and maximum key bound every dot product with the query, so read the pages with
// the highest bound and keep them all. Source: Tang et al., ICML 2024 (2406.10774), section 3.3.  Needs: min/max page
// summaries. Per step: O(N/B d + L d).  Memory: O(N) plus two key rows a page.  The budget caps reads, not residency.
// Departs from the paper: one selection for each kv head, by the largest bound in its query group (pool = query_head
// gives one for each query head, as the evaluation code does); queries of the prompt select like any other query (the
// paper prefills densely: below the read budget the two are the same). over = prompt is the other half of what the RaaS
// paper (2502.11147) advises for long prompts, Compose<Raas, Quest>: every decoded page is read, so that RaaS sees what
// all it may evict is worth, and the rest of the read budget goes to the best pages of the prompt. Where decoded pages
// alone fill the read budget, Quest chooses among all, as ever.
#pragma once

#include "policy.hpp"

namespace kvsparse {

struct Quest {
  static constexpr std::string_view name = "quest";
  static constexpr PageSummary page_summary = PageSummary::min_max;

  /// Whose bound ranks a page: the largest in the query group, or each query head's own.
  enum class Pool { max, query_head };
  /// Which pages are chosen among.
  enum class Over { all, prompt };
  static constexpr std::string_view names_of(Pool) { return "max|query_head"; }
  static constexpr std::string_view names_of(Over) { return "all|prompt"; }

  struct Options {
    Pool pool = Pool::max;  ///< query_head: a selection for each query head
    Over over = Over::all;  ///< what is chosen among; pages without a token of the prompt are all read under `prompt`
    void visit(auto&& field) {
      field("pool", pool);
      field("over", over);
    }
  } options;

  SelectionScope selection() const {
    return options.pool == Pool::max ? SelectionScope::kv_head : SelectionScope::query_head;
  }

  void select(HeadView<Quest> head, QueryGroup queries, Selection& selection) const {
    selection.add(head.open_page());
    HeadPages candidates = head;
    const std::size_t of_prompt = prompt_pages(head);
    if (options.over == Over::prompt && head.size() - of_prompt < head.read_page_budget()) {
      candidates.hide_newer_than(of_prompt);
      for (auto page = static_cast<std::uint32_t>(of_prompt); page < head.size(); ++page)
        selection.add(PageIndex{page});
    }
    const std::span<float> bounds = head.scratch().first(head.size());
    candidates.pooled_upper_bounds(queries, bounds);
    selection.add_highest(bounds, head.read_page_budget() - selection.pages().size());
  }

 private:
  /// They are the oldest.
  static std::size_t prompt_pages(const HeadPages& head) {
    std::uint32_t pages = 0;
    while (pages < head.size() && head.is_of_prompt({pages})) ++pages;
    return pages;
  }
};

}  // namespace kvsparse
