// SPDX-License-Identifier: Apache-2.0
// The kv heads of one layer as a query meets them: which pages it reads, what it leaves of evidence, what the policy
// makes of that. Holds no key and no value.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "../policy/contract_check.hpp"
#include "../policy/mass_bounds.hpp"
#include "cache_config.hpp"
#include "head_store.hpp"

namespace kvsparse {

/// Page tables and policy state of all kv heads, to be looked at and queried; LayerPages makes them grow.
template <class Policy>
class LayerHeads {
  static constexpr detail::ContractCheck<Policy> contract{};

 public:
  const CacheConfig& config() const { return config_; }           ///< as constructed
  const Geometry& geometry() const { return context_.geometry; }  ///< its shape
  const Policy& policy() const { return policy_; }                ///< with its options
  float softmax_scale() const { return scale_; }                  ///< what dot products are multiplied by
  /// Turns queries back by PageRead::rotate_back.
  const RopeRotation& rope() const { return rope_; }

  /// The position the next token will have: the length of the sequence.
  Position next_position() const { return next_; }
  std::size_t prompt_tokens() const { return prompt_tokens_; }  ///< appended as prompt so far
  bool in_prompt() const { return !prompt_ended_; }             ///< whether more prompt may come
  /// Tokens that a head holds.
  std::size_t resident_tokens(std::size_t kv_head) const { return table(kv_head).resident_tokens(); }
  /// The pages that a head holds, oldest first.
  const PageTable& table(std::size_t kv_head) const {
    KVSPARSE_ASSERT(kv_head < heads_.size());
    return heads_[kv_head].table;
  }
  /// Pages a head may hold: those of the budget, or more for a long prompt under PromptOverflow::grow. The mean over
  /// the heads, where they share it.
  std::size_t page_budget() const { return context_.page_budget; }

  // --- looking ---

  /// page_bytes: what one resident page of one kv head costs.
  CacheStats stats(std::size_t page_bytes) const {
    CacheStats stats;
    PagesUsed used;
    std::size_t pages = 0;
    for (std::size_t h = 0; h < heads_.size(); ++h) {
      const Head& head = heads_[h];
      stats.evicted_tokens += head.evicted_tokens;
      stats.last_read_tokens += head.read_tokens;
      stats.last_skipped_tokens += head.skipped_tokens;
      pages += head.table.size();
      if constexpr (UseCounter<Policy>) {
        const PagesUsed of_head = policy_.pages_used(const_cast<LayerHeads*>(this)->view(h));
        used.used += of_head.used;
        used.judged += of_head.judged;
      }
    }
    stats.tokens = next_index();
    stats.resident_tokens = tokens_of_a_head();
    stats.peak_resident_tokens = peak_resident_tokens_;
    stats.resident_bytes = pages * page_bytes;
    stats.peak_resident_bytes = peak_resident_pages_ * page_bytes;
    if (used.judged > 0) stats.used_page_share = static_cast<double>(used.used) / static_cast<double>(used.judged);
    return stats;
  }

  /// The positions a head holds, ascending. Allocates.
  std::vector<Position> resident_positions(std::size_t kv_head) const {
    KVSPARSE_ASSERT(kv_head < heads_.size());
    return heads_[kv_head].positions([](PageIndex, Slot) { return true; });
  }
  /// The positions that some query head of the group read in the latest attend, ascending; none once a page was given
  /// up since. Allocates. Valid until the next append.
  std::vector<Position> read_positions(std::size_t kv_head) const {
    KVSPARSE_ASSERT(kv_head < heads_.size());
    return heads_[kv_head].positions([&](PageIndex page, Slot slot) { return heads_[kv_head].was_read(page, slot); });
  }

  // --- a query, head by head: what attend() is made of, for an engine with a kernel of its own ---

  /// Starts a query of the token before `end`: forgets the previous query's evidence.
  void begin_query(std::size_t kv_head, Position end) noexcept {
    KVSPARSE_ASSERT(kv_head < heads_.size() && end > Position{0} && end <= next_);
    const auto window = static_cast<std::int64_t>(config_.logits.window);
    const Position first_seen{window == 0 ? 0 : std::max<std::int64_t>(0, end.value - window)};
    heads_[kv_head].begin_query(end, first_seen, geometry().group());
  }

  /// Whether the running query reads every page: its policy selects none, or is not asked while all are within budget.
  bool reads_all(std::size_t kv_head) const {
    if (!Selector<Policy>) return true;
    return !traits::select_always<Policy>() && heads_[kv_head].visible_pages() <= context_.read_page_budget;
  }

  /// How many query heads a selection serves: the whole group, or one when the policy selects for each query head.
  /// While no more pages are resident than the read budget allows, everything is read, group by group, as Dense reads
  /// it.
  std::size_t queries_per_selection(std::size_t kv_head) const {
    const bool together = reads_all(kv_head) || traits::selection(policy_) == SelectionScope::kv_head;
    return together ? geometry().group() : 1;
  }

  /// The pages that these queries read, in position order. Valid until the head's next select, append or clear.
  std::span<const PageRead> select(std::size_t kv_head, QueryGroup queries) noexcept {
    Head& head = heads_[kv_head];
    const HeadView<Policy> pages = view(kv_head, head.query_end, true);
    head.read_count = 0;
    if constexpr (Selector<Policy>) {
      if (!reads_all(kv_head)) {
        head.selection.begin(pages.size());
        policy_.select(pages, queries, head.selection);
        head.selection.sort_by_position();
        for (const SelectedPage& selected : head.selection.pages()) head.add_read(pages, selected);
        return {head.reads.data(), head.read_count};
      }
    }
    const bool in_cache = traits::in_cache_positions(policy_);
    for (const PageIndex page : pages.pages()) {
      const std::int64_t rotate_back = in_cache ? static_cast<std::int64_t>(pages.evicted_after(page)) : 0;
      if (!head.is_outside_window(page)) head.add_read(pages, {page, {}, 0.0F, 0.0F, rotate_back});
    }
    return {head.reads.data(), head.read_count};
  }

  /// What the latest query read of a head, in the order of reading: for page lists. Refused when a token came or a page
  /// went since, in a copy, or when each query head read pages of its own, of which only the last one's are known.
  Status check_latest_reads(std::size_t kv_head) const {
    const Head& head = heads_[kv_head];
    const bool known = head.query_end == next_ && queries_per_selection(kv_head) == geometry().group();
    if (known && next_index() > 0) return {};
    return {Status::Code::query_is_over, static_cast<std::size_t>(head.query_end.value), next_index()};
  }
  /// Those reads; valid until the head's next select, append or clear.
  std::span<const PageRead> latest_reads(std::size_t kv_head) const {
    return {heads_[kv_head].reads.data(), heads_[kv_head].read_count};
  }

  /// More pages, given the softmax over those read so far; empty when the policy has enough.
  std::span<const PageRead> select_more(std::size_t kv_head, QueryGroup queries,
                                        std::span<const SoftmaxState> states) noexcept {
    Head& head = heads_[kv_head];
    const std::size_t before = head.read_count;
    if constexpr (RepeatedSelector<Policy>) {
      if (reads_all(kv_head)) return {};
      const HeadView<Policy> pages = view(kv_head, head.query_end, true);
      const std::size_t selected_before = head.selection.pages().size();
      policy_.select_more(pages, queries, states, head.selection);
      for (const SelectedPage& selected : head.selection.pages().subspan(selected_before)) {
        head.add_read(pages, selected);
      }
    }
    return {head.reads.data() + before, head.read_count - before};
  }

  /// Where the kernel leaves its evidence for the reads selected last, from the first_read-th on; empty if nobody asks.
  PageTap tap(std::size_t kv_head, std::size_t first_read = 0) noexcept {
    return heads_[kv_head].tap(queries_per_selection(kv_head), geometry().page_size).from(first_read, 0);
  }

  /// What the kernel does to the logits of the running query, whose block of query heads begins with the group's
  /// first_query-th.
  LogitMap logit_map(std::size_t kv_head, std::size_t first_query, std::size_t queries) const noexcept {
    const LogitOptions& logits = config_.logits;
    const std::size_t head = kv_head * geometry().group() + first_query;
    const float* slopes = logits.alibi_slopes.empty() ? nullptr : logits.alibi_slopes.data() + head;
    return {logits.soft_cap, logits.window, slopes, queries, {heads_[kv_head].query_end.value - 1}, 0};
  }

  /// Once a query's tokens are read: adds the sink logits of its query heads, if the layer has any.
  void add_sinks(std::size_t kv_head, std::size_t first_query, std::span<SoftmaxState> states) const noexcept {
    const std::vector<float>& sinks = config_.logits.sink_logits;
    if (sinks.empty()) return;
    const std::size_t head = kv_head * geometry().group() + first_query;
    for (std::size_t q = 0; q < states.size(); ++q) add_sink(states[q], sinks[head + q], geometry().dim_of_values());
  }

  /// Lets the policy add what its summaries of evicted tokens stand for.
  void add_residual(std::size_t kv_head, QueryGroup queries, std::span<SoftmaxState> states) noexcept {
    if constexpr (ResidualProvider<Policy>) {
      policy_.residual(view(kv_head, heads_[kv_head].query_end, true), queries, states);
    }
  }

  /// Bounds what the reads selected last leave unread of the softmax; states: of those queries, sinks and all. Needs
  /// page_summary = min_max of a policy that selects. lost_mass: [queries.size]. The next verb's scratch is
  /// overwritten.
  void bound_lost_mass(std::size_t kv_head, std::size_t first_query, const QueryGroup& queries,
                       std::span<const SoftmaxState> states, float* lost_mass) noexcept {
    std::fill_n(lost_mass, queries.size, 0.0F);
    if (reads_all(kv_head)) return;
    const HeadPages pages = view(kv_head, heads_[kv_head].query_end, true);
    const MassBounds bounds(pages, queries, first_query);
    bounds.compute();
    // What of each page was not read; where tokens have weights or turned queries, their sum says nothing of the pages.
    const std::span<float> unread = bounds.free_scratch().first(pages.size());
    for (const PageIndex page : pages.pages()) unread[page.value] = 1.0F;
    bool is_plain = true;
    for (const PageRead& read : latest_reads(kv_head)) {
      is_plain &= read.log_weight == 0.0F && read.value_log_weight == 0.0F && read.rotate_back == 0;
      unread[read.index.value] = heads_[kv_head].share_left_out(read);
    }
    for (std::size_t q = 0; q < queries.size; ++q) {
      double mass = 0.0;
      for (const PageIndex page : pages.pages()) {
        if (unread[page.value] != 0.0F) mass += static_cast<double>(unread[page.value] * bounds.mass(page, q));
      }
      const auto is_read = [&](PageIndex page) { return unread[page.value] != 1.0F; };
      const double share = MassBounds::largest_share(mass, bounds.mass_read(q, states[q], is_read));
      const float above = std::nextafter(static_cast<float>(share), 1.0F);
      lost_mass[q] = !is_plain ? 1.0F : share == 0.0 ? 0.0F : above;
    }
  }

  /// Turns the tap of the reads selected last into evidence; states: of those queries, the first being query head
  /// `first_query` of the group.
  void record(std::size_t kv_head, std::size_t first_query, std::span<const SoftmaxState> states) noexcept {
    heads_[kv_head].weigh_pages(states, heads_[kv_head].read_count);
    heads_[kv_head].record(first_query, states, geometry().group(), tap(kv_head));
  }
  /// The same from page masses that another kernel found. masses: [reads selected last, queries], each page's share of
  /// that query's softmax; log_sum_exp: [queries]. The largest token's mass and token weights are not known then: for
  /// policies that ask for page mass alone.
  void record_masses(std::size_t kv_head, std::size_t first_query, std::span<const float> masses,
                     std::span<const float> log_sum_exp) noexcept {
    heads_[kv_head].record_masses(first_query, masses, log_sum_exp, geometry().group());
  }

  /// Shows the evidence of the whole group to the policy. After it, the head's query is done.
  void observe(std::size_t kv_head, QueryGroup group) noexcept {
    Head& head = heads_[kv_head];
    head.finish_query(group);
    if constexpr (Observer<Policy>) {
      const bool is_prompt = head.query_end <= Position{0} + prompt_tokens_;
      policy_.observe(view(kv_head, head.query_end, true), head.evidence(group, is_prompt, geometry().page_size));
    }
  }

  /// After all heads observed. Serial.
  void end_step() noexcept {
    if constexpr (StepObserver<Policy>) policy_.on_step_end(layer_view(&query_view));
  }

  detail::HeadStore<Policy>& head(std::size_t kv_head) { return heads_[kv_head]; }  // for attend() alone

 protected:
  using Head = detail::HeadStore<Policy>;

  LayerHeads(const CacheConfig& config, const Policy& policy, const detail::CachePlan& plan, const RowAccess& rows,
             const void* store)
      : config_(config),
        policy_(policy),
        context_{plan.geometry, config.layer, plan.page_budget, plan.page_floor, plan.read_pages, rows, plan.scale},
        store_(store),
        scale_(plan.scale),
        rope_(config.rope, config.head_dim) {
    heads_.reserve(plan.geometry.kv_heads);
    for (std::size_t h = 0; h < plan.geometry.kv_heads; ++h) heads_.push_back(Head(plan, policy));
  }

  std::size_t next_index() const { return static_cast<std::size_t>(next_.value); }
  /// What is to be compared with the budget: tokens of the fullest head, or of the average one, rounded up, where heads
  /// share it.
  std::size_t tokens_of_a_head() const {
    std::size_t tokens = 0;
    for (const Head& head : heads_) {
      const std::size_t of_head = head.table.resident_tokens();
      tokens = SharedBudgetEvictor<Policy> ? tokens + of_head : std::max(tokens, of_head);
    }
    return SharedBudgetEvictor<Policy> ? divide_up(tokens, heads_.size()) : tokens;
  }
  // A head's pages as its policy sees them outside a query: no page is open while a victim is looked for.
  HeadView<Policy> view(std::size_t kv_head) { return view(kv_head, next_, false); }
  HeadView<Policy> view(std::size_t kv_head, Position end, bool has_open_page) {
    const HeadPages::Storage of_layer{.context = &context_,
                                      .logits = &config_.logits,
                                      .rows = store_,
                                      .kv_head = kv_head,
                                      .prompt_end = Position{0} + prompt_tokens_};
    return heads_[kv_head].view(of_layer, end, has_open_page);
  }
  LayerView<Policy> layer_view(typename LayerView<Policy>::HeadOf head_of) {
    return {this, head_of, heads_.size(), layer_state_};
  }
  static HeadView<Policy> query_view(void* pages, std::size_t kv_head) {
    auto* self = static_cast<LayerHeads*>(pages);
    return self->view(kv_head, self->heads_[kv_head].query_end, true);
  }

  CacheConfig config_;
  Policy policy_;
  LayerContext context_;
  const void* store_;
  float scale_;
  RopeRotation rope_;
  std::vector<Head> heads_;
  LayerState<Policy> layer_state_{};
  Position next_;
  std::size_t prompt_tokens_ = 0;
  std::size_t peak_resident_tokens_ = 0;
  std::size_t peak_resident_pages_ = 0;
  bool prompt_ended_ = false;
};

}  // namespace kvsparse
