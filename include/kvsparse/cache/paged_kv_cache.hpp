// SPDX-License-Identifier: Apache-2.0
// The container: one layer of one sequence, its keys and values in pages of a fixed budget, its policy told and asked.
// It decides nothing about sparsity. attend.hpp runs a query over it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "../core/shape_check.hpp"
#include "../policy/contract_check.hpp"
#include "cache_config.hpp"
#include "head_store.hpp"
#include "page_store.hpp"

namespace kvsparse {

/// Thread safety: distinct caches are independent. Of one cache, `append`, `append_prompt`, `end_prompt`, `clear` and
/// attend, which may use an executor's threads inside, are exclusive; the verbs that take a kv head (select, record,
/// observe) may run at the same time for different heads, and end_step is exclusive. Const members may run at the same
/// time as one another. After construction no verb of the decode step allocates, throws or locks. Copying copies pages,
/// policy state and all.
template <class Policy, StorageScalar Key = float, StorageScalar Value = Key>
class PagedKvCache {
  static constexpr detail::ContractCheck<Policy> contract{};

 public:
  using policy_type = Policy;
  using key_type = Key;
  using value_type = Value;

  /// Allocates everything the cache will ever use: bytes_required(config, policy). Throws ConfigError.
  explicit PagedKvCache(const CacheConfig& config, Policy policy = {})
      : PagedKvCache(config, policy, detail::plan_cache(config, policy)) {}

  /// Bytes that construction allocates. Throws ConfigError like the constructor.
  static std::size_t bytes_required(const CacheConfig& config, const Policy& policy = {}) {
    const detail::CachePlan plan = detail::plan_cache(config, policy);
    const std::size_t pages = plan.page_capacity * plan.geometry.kv_heads;
    return PageStore<Key, Value>::bytes_required(plan.geometry, traits::page_summary(policy), pages) +
           plan.geometry.kv_heads * (sizeof(Head) + Head::bytes_required(plan, policy));
  }

  const CacheConfig& config() const { return config_; }
  const Geometry& geometry() const { return context_.geometry; }
  const Policy& policy() const { return policy_; }
  float softmax_scale() const { return scale_; }

  /// The position the next token will have: the length of the sequence.
  Position next_position() const { return next_; }
  std::size_t prompt_tokens() const { return prompt_tokens_; }
  bool in_prompt() const { return !prompt_ended_; }
  std::size_t resident_tokens(std::size_t kv_head) const { return heads_[kv_head].table.resident_tokens(); }
  /// Pages a head may hold: those of the budget, or more for a long prompt under PromptOverflow::grow.
  std::size_t page_budget() const { return context_.page_budget; }

  // --- growing ---

  /// Appends one token; k, v: [kv_heads, head_dim], keys rotated at next_position(). The first call ends the prompt.
  /// When it opens a page beyond the budget, each head first gives up the page its policy names. O(kv_heads *
  /// head_dim), plus the policy's victim search once a page. Refuses wrong shapes and, for policies that keep
  /// everything, max_tokens.
  template <StorableAs<Key, Value> Row>
  Status append(HeadRows<const Row> k, HeadRows<const Row> v) noexcept {
    if (const Status status = check_rows(k, geometry().kv_heads, geometry()); !status) return status;
    if (const Status status = check_rows(v, geometry().kv_heads, geometry()); !status) return status;
    if (const Status status = check_room(1); !status) return status;
    finish_prompt();
    store_token(k, v);
    ++decode_tokens_;
    return {};
  }
  /// The same from contiguous [kv_heads * head_dim] floats.
  Status append(std::span<const float> k, std::span<const float> v) noexcept {
    if (const Status status = check_size(k.size(), geometry().kv_heads, geometry()); !status) return status;
    if (const Status status = check_size(v.size(), geometry().kv_heads, geometry()); !status) return status;
    return append(key_rows(k), key_rows(v));
  }

  /// Appends a chunk of the prompt; k, v: [tokens, kv_heads, head_dim]. Any number of chunks. Takes all or nothing.
  template <StorableAs<Key, Value> Row>
  Status append_prompt(TokenRows<const Row> k, TokenRows<const Row> v) noexcept {
    using Code = Status::Code;
    if (prompt_ended_) return {Code::prompt_ended, next_index(), prompt_tokens_};
    if (k.tokens != v.tokens) return {Code::wrong_tokens, v.tokens, k.tokens};
    if (const Status status = check_rows(k, geometry().kv_heads, geometry()); !status) return status;
    if (const Status status = check_rows(v, geometry().kv_heads, geometry()); !status) return status;
    if (const Status status = check_room(k.tokens); !status) return status;
    if (traits::pin_prompt(policy_) && config_.prompt_overflow != PromptOverflow::unpin_middle) {
      const std::size_t pinned = std::max(sink_pages_, geometry().pages_for(prompt_tokens_ + k.tokens));
      if (pinned + decode_pages_ > page_capacity_) return {Code::prompt_exceeds_budget, pinned, page_capacity_};
      context_.page_budget = std::max(page_budget(), pinned + decode_pages_);  // more only under PromptOverflow::grow
    }
    for (std::size_t token = 0; token < k.tokens; ++token) {
      store_token(k.token(token), v.token(token));
      ++prompt_tokens_;
    }
    return {};
  }
  /// The same from contiguous [tokens * kv_heads * head_dim] floats.
  Status append_prompt(std::span<const float> k, std::span<const float> v) noexcept {
    const std::size_t row = geometry().kv_heads * geometry().head_dim;
    if (k.size() % row != 0) return {Status::Code::wrong_size, k.size(), row};
    if (v.size() != k.size()) return {Status::Code::wrong_size, v.size(), k.size()};
    const auto rows = [&](std::span<const float> flat) {
      return TokenRows<const float>(flat.data(), flat.size() / row, geometry().kv_heads, geometry().head_dim);
    };
    return append_prompt(rows(k), rows(v));
  }

  /// No more prompt will come. The first append says the same.
  void end_prompt() noexcept { finish_prompt(); }

  /// Empties the cache; the next token has position 0 and may start a prompt.
  void clear() noexcept {
    for (std::size_t h = 0; h < heads_.size(); ++h) {
      heads_[h].clear();
      if constexpr (ClearListener<Policy>) policy_.on_clear(view(h));
    }
    layer_state_ = {};
    context_.page_budget = configured_page_budget_;
    store_.pool.clear();
    next_ = {};
    prompt_tokens_ = decode_tokens_ = peak_resident_tokens_ = peak_resident_pages_ = 0;
    prompt_ended_ = false;
  }

  // --- looking ---

  CacheStats stats() const {
    CacheStats stats;
    PagesUsed used;
    std::size_t pages = 0;
    for (std::size_t h = 0; h < heads_.size(); ++h) {
      const Head& head = heads_[h];
      stats.resident_tokens = std::max(stats.resident_tokens, head.table.resident_tokens());
      stats.evicted_tokens += head.evicted_tokens;
      stats.last_read_tokens += head.read_tokens;
      stats.last_skipped_tokens += head.skipped_tokens;
      pages += head.table.size();
      if constexpr (UseCounter<Policy>) {
        const PagesUsed of_head = policy_.pages_used(const_cast<PagedKvCache*>(this)->view(h));
        used.used += of_head.used;
        used.judged += of_head.judged;
      }
    }
    stats.tokens = next_index();
    stats.peak_resident_tokens = peak_resident_tokens_;
    stats.resident_bytes = pages * bytes_per_resident_page();
    stats.peak_resident_bytes = peak_resident_pages_ * bytes_per_resident_page();
    if (used.judged > 0) stats.used_page_share = static_cast<double>(used.used) / static_cast<double>(used.judged);
    return stats;
  }

  /// What one resident page of one kv head costs: keys, values, summary, policy state.
  std::size_t bytes_per_resident_page() const {
    return PageStore<Key, Value>::bytes_per_page(geometry(), store_.summaries.kind()) + Head::page_state_bytes;
  }

  /// The positions a head holds, ascending. Allocates.
  std::vector<Position> resident_positions(std::size_t kv_head) const {
    return heads_[kv_head].positions([](PageIndex, Slot) { return true; });
  }
  /// The positions that some query head of the group read in the latest attend, ascending. Allocates. Valid until the
  /// next append.
  std::vector<Position> read_positions(std::size_t kv_head) const {
    return heads_[kv_head].positions([&](PageIndex page, Slot slot) { return heads_[kv_head].was_read(page, slot); });
  }

  // --- the decode step, head by head: what attend() is made of, for an engine with a kernel of its own ---

  PagedKv<Key, Value> pages() const { return store_.pool.view(); }

  /// Starts a query of the token before `end`: forgets the previous query's evidence.
  void begin_query(std::size_t kv_head, Position end) noexcept { heads_[kv_head].begin_query(end, geometry().group()); }

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
    for (const PageIndex page : pages.pages()) head.add_read(pages, {page, {}, 0.0F, 0.0F, 0});
    return {head.reads.data(), head.read_count};
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

  /// Lets the policy add what its summaries of evicted tokens stand for.
  void add_residual(std::size_t kv_head, QueryGroup queries, std::span<SoftmaxState> states) noexcept {
    if constexpr (ResidualProvider<Policy>) {
      policy_.residual(view(kv_head, heads_[kv_head].query_end, true), queries, states);
    }
  }

  /// Turns the tap of the reads selected last into evidence; states: of those queries, the first being query head
  /// `first_query` of the group.
  void record(std::size_t kv_head, std::size_t first_query, std::span<const SoftmaxState> states) noexcept {
    heads_[kv_head].weigh_pages(states);
    heads_[kv_head].record(first_query, states, geometry().group(), tap(kv_head));
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

 private:
  using Head = detail::HeadStore<Policy>;

  PagedKvCache(const CacheConfig& config, Policy policy, const detail::CachePlan& plan)
      : config_(config),
        policy_(policy),
        context_{plan.geometry, config.layer, plan.page_budget, plan.read_pages, PageStore<Key, Value>::row_access()},
        scale_(plan.scale),
        configured_page_budget_(plan.page_budget),
        page_capacity_(plan.page_capacity),
        sink_pages_(plan.sink_pages),
        decode_pages_(plan.decode_pages),
        store_(plan.geometry, traits::page_summary(policy), plan.page_capacity * plan.geometry.kv_heads) {
    heads_.reserve(plan.geometry.kv_heads);
    for (std::size_t h = 0; h < plan.geometry.kv_heads; ++h) heads_.push_back(Head(plan, policy));
  }

  std::size_t next_index() const { return static_cast<std::size_t>(next_.value); }
  HeadRows<const float> key_rows(std::span<const float> flat) const {
    return {flat.data(), geometry().kv_heads, geometry().head_dim};
  }
  Status check_room(std::size_t tokens) const {
    if constexpr (!Evictor<Policy>) {
      if (next_index() + tokens > config_.max_tokens) {
        return {Status::Code::max_tokens_reached, next_index() + tokens, config_.max_tokens};
      }
    }
    return {};
  }

  // A head's pages as its policy sees them outside a query: no page is open while a victim is looked for.
  HeadView<Policy> view(std::size_t kv_head) { return view(kv_head, next_, false); }
  HeadView<Policy> view(std::size_t kv_head, Position end, bool has_open_page) {
    return heads_[kv_head].view(context_, &store_, kv_head, end, has_open_page);
  }
  LayerView<Policy> layer_view(typename LayerView<Policy>::HeadOf head_of) {
    return {this, head_of, heads_.size(), layer_state_};
  }
  static HeadView<Policy> victim_view(void* cache, std::size_t kv_head) {
    return static_cast<PagedKvCache*>(cache)->view(kv_head);
  }
  static HeadView<Policy> query_view(void* cache, std::size_t kv_head) {
    auto* self = static_cast<PagedKvCache*>(cache);
    return self->view(kv_head, self->heads_[kv_head].query_end, true);
  }

  template <class Row>
  void store_token(HeadRows<const Row> k, HeadRows<const Row> v) {
    const Slot slot = geometry().slot_of(next_);
    if (due_for_trim()) trim(slot.value != 0);
    if (slot.value == 0) open_pages();
    [[maybe_unused]] const bool full = slot.value + 1 == geometry().page_size;
    for (std::size_t h = 0; h < heads_.size(); ++h) {
      Head& head = heads_[h];
      const PageId page = head.table.back().page;
      store_row(k.row(h), geometry().head_dim, store_.pool.key_row(page, slot));
      store_row(v.row(h), geometry().head_dim, store_.pool.value_row(page, slot));
      store_.summaries.add_key(page, store_.pool.key_row(page, slot), slot.value == 0);
      head.table.add_token();
      if constexpr (AppendListener<Policy> || PageFullListener<Policy>) {
        const HeadView<Policy> pages = view(h, next_ + 1, true);
        if constexpr (AppendListener<Policy>) policy_.on_append(pages, pages.open_page(), slot);
        if constexpr (PageFullListener<Policy>) {
          if (full) policy_.on_page_full(pages, pages.open_page());
        }
      }
      peak_resident_tokens_ = std::max(peak_resident_tokens_, head.table.resident_tokens());
    }
    next_ = next_ + 1;
  }

  void open_pages() {
    if constexpr (Evictor<Policy>) make_room();
    std::size_t resident_pages = 0;
    const bool pinned = geometry().page_number(next_) < sink_pages_ || (!prompt_ended_ && traits::pin_prompt(policy_));
    for (std::size_t h = 0; h < heads_.size(); ++h) {
      Head& head = heads_[h];
      head.open_page({next_, store_.pool.acquire(), 0, pinned});
      if constexpr (PageOpenListener<Policy>) {
        policy_.on_page_open(view(h, next_ + 1, true), PageIndex{static_cast<std::uint32_t>(head.table.size() - 1)});
      }
      resident_pages += head.table.size();
    }
    peak_resident_pages_ = std::max(peak_resident_pages_, resident_pages);
  }

  // Each head that is full gives up one page, before the page to be opened exists.
  void make_room() {
    if constexpr (LayerEvictor<Policy>) {
      if (heads_[0].table.size() < page_budget()) return;
      for (Head& head : heads_) head.unpin_middle(page_budget() - 1, sink_pages_);
      const PageIndex victim = policy_.victim(layer_view(&victim_view));
      for (std::size_t h = 0; h < heads_.size(); ++h) evict(h, victim);
    } else {
      for (std::size_t h = 0; h < heads_.size(); ++h) {
        if (heads_[h].table.size() < page_budget()) continue;
        heads_[h].unpin_middle(page_budget() - 1, sink_pages_);
        evict(h, policy_.victim(view(h)));
      }
    }
  }

  void evict(std::size_t kv_head, PageIndex victim) {
    Head& head = heads_[kv_head];
    KVSPARSE_ASSERT(victim.value < head.table.size() && !head.table[victim].pinned &&
                    "victim must name a resident page that is not pinned");
    // The budget and the pins are the container's word, whatever a policy answers.
    if (victim.value >= head.table.size() || head.table[victim].pinned) victim = head.oldest_unpinned();
    if constexpr (EvictListener<Policy>) policy_.on_evict(view(kv_head), victim);
    store_.pool.release(head.table[victim].page);
    head.erase_page(victim);
  }

  void finish_prompt() {
    if (prompt_ended_) return;
    prompt_ended_ = true;
    if (prompt_tokens_ == 0) return;
    for (std::size_t h = 0; h < heads_.size(); ++h) {
      if constexpr (Evictor<Policy>) {
        if (config_.prompt_overflow == PromptOverflow::unpin_middle) {
          heads_[h].unpin_middle(page_budget() - decode_pages_, sink_pages_);
        }
      }
      if constexpr (PromptEndListener<Policy>) policy_.on_prompt_end(view(h, next_, true));
    }
    trim(true);
  }

  bool due_for_trim() const {
    const std::size_t period = traits::period(policy_);
    return period != 0 && decode_tokens_ != 0 && decode_tokens_ % period == 0;
  }
  /// The page of the newest token stays open until the append that opens another, even when it is full.
  void trim([[maybe_unused]] bool has_open_page) {
    if constexpr (Trimmer<Policy>) {
      for (std::size_t h = 0; h < heads_.size(); ++h) {
        Head& head = heads_[h];
        const HeadView<Policy> pages = view(h, next_, has_open_page);
        head.trimmed.clear();
        policy_.trim(pages, head.trimmed);
        for (const PageIndex victim : head.trimmed.newest_first()) {  // so that the older indices stay valid
          if (victim.value < pages.size() && pages.is_evictable(victim)) evict(h, victim);
        }
      }
    }
  }

  CacheConfig config_;
  Policy policy_;
  LayerContext context_;
  float scale_;
  std::size_t configured_page_budget_;
  std::size_t page_capacity_;
  std::size_t sink_pages_;
  std::size_t decode_pages_;
  PageStore<Key, Value> store_;
  std::vector<Head> heads_;
  LayerState<Policy> layer_state_{};
  Position next_;
  std::size_t prompt_tokens_ = 0;
  std::size_t decode_tokens_ = 0;
  std::size_t peak_resident_tokens_ = 0;
  std::size_t peak_resident_pages_ = 0;
  bool prompt_ended_ = false;
};

}  // namespace kvsparse
