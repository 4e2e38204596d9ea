// SPDX-License-Identifier: Apache-2.0
// What a kv head remembers while drafts are outstanding, so that those rejected leave no trace: its policy's state
// before the first of them, and the evidence of every query since. Sums of floats do not invert, so the state is set
// back and what remains is told again.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "../policy/policy.hpp"
#include "cache_config.hpp"
#include "head_store.hpp"

namespace kvsparse::detail {

/// A query that a head observed while drafts were outstanding.
struct JournalEntry {
  Position end;            // it saw the tokens before
  std::size_t drafts = 0;  // outstanding then
  std::size_t step = 0;    // steps that had ended then
};

template <class Policy>
class DraftJournal {
  using Store = HeadStore<Policy>;

  /// For each array: how many elements it has.
  struct Sizes {
    Sizes(const CachePlan& plan, const Policy& policy) {
      const HeadSizes head(plan, policy);
      queries = plan.journal_queries();
      page_states = head.page_states;
      window = head.query_window;
      const bool asks = Observer<Policy> || traits::query_window(policy) > 0;
      query = asks ? SaturatingSize(head.group) * plan.geometry.head_dim : SaturatingSize();
      mass = head.mass;
      token_mass = head.token_mass;
      token_weights = head.token_weights;
      log_sum_exp = head.group;
      drafts = plan.draft_pages + 1;
    }
    std::size_t queries, page_states, log_sum_exp, drafts;
    SaturatingSize window, query, mass, token_mass, token_weights;
    SaturatingSize floats() const { return query + mass + token_mass + token_weights + log_sum_exp; }
  };

 public:
  DraftJournal(const CachePlan& plan, const Policy& policy) : DraftJournal(Sizes(plan, policy)) {}

  static SaturatingSize bytes_required(const CachePlan& plan, const Policy& policy) {
    const Sizes n(plan, policy);
    return SaturatingSize(n.page_states) * sizeof(PageState<Policy>) +
           (n.window + n.floats() * n.queries) * sizeof(float) + SaturatingSize(n.queries) * sizeof(JournalEntry) +
           SaturatingSize(n.drafts) * sizeof(ResidentPage);
  }

  bool is_full() const { return count_ == entries_.size(); }
  std::span<const JournalEntry> entries() const { return {entries_.data(), count_}; }

  /// Before the first draft.
  void begin(const Store& head) {
    count_ = 0;
    pages_ = head.table.size();
    tokens_of_last_ = pages_ == 0 ? 0 : head.table.back().tokens;
    std::copy(head.page_states.begin(), head.page_states.end(), page_states_.begin());
    state_ = head.state;
    queries_seen_ = head.copy_query_window(window_);
  }

  /// After the query's evidence is known to the head, before the policy sees it.
  void record(const Store& head, const JournalEntry& entry, const QueryGroup& queries) {
    KVSPARSE_ASSERT(!is_full());
    if (is_full()) return;
    float* at = floats_.data() + count_ * sizes_.floats();
    if (sizes_.query > 0) {
      for (std::size_t q = 0; q < queries.size; ++q) at = std::copy(queries[q].begin(), queries[q].end(), at);
      scale_ = queries.scale;
    }
    head.copy_evidence(std::span(at, sizes_.floats() - sizes_.query));
    entries_[count_++] = entry;
  }

  /// The head as it was before the first draft; the pages opened since are kept aside for reopen().
  void restore(Store& head) {
    const std::size_t opened = head.table.size() - pages_;
    for (std::size_t i = 0; i < opened; ++i) drafted_[i] = head.table[{static_cast<std::uint32_t>(pages_ + i)}];
    for (std::size_t i = 0; i < opened; ++i) drafted_[i].tokens = 0;
    head.table.cut(pages_, tokens_of_last_);
    std::copy(page_states_.begin(), page_states_.end(), head.page_states.begin());
    head.state = state_;
    head.set_query_window(window_, queries_seen_);
  }
  std::size_t pages_before() const { return pages_; }
  std::size_t tokens_before_in_last_page() const { return tokens_of_last_; }
  const ResidentPage& drafted_page(std::size_t index) const { return drafted_[index]; }

  QueryGroup queries(std::size_t entry, const Geometry& geometry) const {
    return {floats_.data() + entry * sizes_.floats(), geometry.group(), geometry.head_dim, geometry.head_dim, scale_};
  }
  Evidence evidence(std::size_t entry, const Geometry& geometry, std::size_t visible_pages, bool is_prompt) const {
    const float* mass = floats_.data() + entry * sizes_.floats() + sizes_.query;
    const float* token_mass = mass + sizes_.mass;
    const float* token_weights = token_mass + sizes_.token_mass;
    const float* log_sum_exp = token_weights + sizes_.token_weights;
    return Evidence({{entries_[entry].end.value - 1},
                     is_prompt,
                     queries(entry, geometry),
                     visible_pages,
                     geometry.page_size,
                     mass,
                     sizes_.token_mass == 0 ? nullptr : token_mass,
                     sizes_.token_weights == 0 ? nullptr : token_weights,
                     log_sum_exp});
  }

 private:
  explicit DraftJournal(const Sizes& n)
      : sizes_(n),
        page_states_(n.page_states),
        window_(n.window),
        floats_(n.floats() * n.queries),
        entries_(n.queries),
        drafted_(n.drafts) {}

  Sizes sizes_;
  std::size_t pages_ = 0;
  std::size_t tokens_of_last_ = 0;
  std::vector<PageState<Policy>> page_states_;
  HeadState<Policy> state_{};
  std::vector<float> window_;
  std::size_t queries_seen_ = 0;

  std::vector<float> floats_;  // [queries, query | mass | token mass | token weights | log-sum-exp]
  std::vector<JournalEntry> entries_;
  std::size_t count_ = 0;
  float scale_ = 1.0F;
  std::vector<ResidentPage> drafted_;
};

}  // namespace kvsparse::detail
