// SPDX-License-Identifier: Apache-2.0
// Tokens that may be rejected (speculative decoding) and tokens taken back: LayerPages that can be cut.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "draft_journal.hpp"
#include "layer_pages.hpp"

namespace kvsparse {

namespace traits {

/// Whether later tokens and queries leave anything in the policy that earlier ones would not find there.
template <class P>
constexpr bool remembers() {
  if constexpr (requires { typename P::EvictPart; }) {
    return remembers<typename P::EvictPart>() || remembers<typename P::SelectPart>();
  } else {
    return !(std::is_empty_v<PageState<P>> && std::is_empty_v<HeadState<P>> && std::is_empty_v<LayerState<P>>);
  }
}

}  // namespace traits

/// Drafts are tokens that truncate() may take back, up to CacheConfig::max_speculative of them. On their behalf nothing
/// is evicted or trimmed: meanwhile a head may hold the pages they need beyond its budget. truncate(), or the next
/// append, accepts the drafts that are left, and only then gives up what is too much, in the order in which appends
/// would have.
template <class Policy>
class LayerDrafts : public LayerPages<Policy> {
  using Heads = LayerHeads<Policy>;
  using Pages = LayerPages<Policy>;
  using Head = detail::HeadStore<Policy>;
  using Journal = detail::DraftJournal<Policy>;

 public:
  using Heads::geometry;
  using Heads::next_position;

  /// As LayerPages; the journals of max_speculative drafts beside it.
  explicit LayerDrafts(const CacheConfig& config, const Policy& policy = {}, const RowAccess& rows = {},
                       const void* store = nullptr)
      : LayerDrafts(config, policy, detail::plan_layer<LayerDrafts>(config, policy), rows, store) {}

  /// Bytes that construction allocates. Throws ConfigError like the constructor.
  static std::size_t bytes_required(const CacheConfig& config, const Policy& policy = {}) {
    const detail::CachePlan plan = detail::plan_cache(config, policy);
    const SaturatingSize pages = Pages::bytes_required(config, policy);
    if (config.max_speculative == 0) return pages;
    const SaturatingSize journal = Journal::bytes_required(plan, policy) + sizeof(Journal);
    return detail::addressable(
        pages + journal * plan.geometry.kv_heads + SaturatingSize(plan.journal_queries()) * sizeof(Position), plan);
  }

  /// Tokens that truncate() may still take back whatever the policy.
  std::size_t drafts() const { return drafts_; }

  /// Whether so many more drafts may come; changes nothing.
  Status check_drafts(std::size_t tokens) const noexcept {
    const std::size_t drafts = SaturatingSize(tokens) + drafts_;
    const std::size_t most = this->config_.max_speculative;
    if (drafts > most) return {Status::Code::too_many_drafts, drafts, most};
    return Pages::check_room(tokens);
  }
  /// Whether the evidence of so many more queries can be kept until the drafts are settled.
  Status check_queries(std::size_t queries) const noexcept {
    if (drafts_ == 0) return {};
    for (const Journal& journal : journals_) {
      const std::size_t kept = journal.entries().size() + queries;
      if (kept > step_ends_.size()) return {Status::Code::too_many_draft_queries, kept, step_ends_.size()};
    }
    return {};
  }

  /// After check_drafts(), before the first open_draft_slot(): ends the prompt and remembers how things stand.
  template <PageOwner Owner>
  void begin_drafts(Owner& owner) noexcept {
    if (drafts_ != 0) return;
    Pages::end_prompt(owner);
    first_draft_ = next_position();
    steps_ = 0;
    layer_state_before_ = this->layer_state_;
    for (std::size_t h = 0; h < journals_.size(); ++h) journals_[h].begin(this->heads_[h]);
  }
  /// As open_slot(), for a draft, which add_draft() then adds.
  template <PageOwner Owner>
  void open_draft_slot(Owner& owner) noexcept {
    if (Pages::slot_of_next().value == 0) Pages::open_pages(owner);
  }
  /// The draft's rows are stored in every head: tells the policy.
  void add_draft() noexcept {
    Pages::add_token();
    ++drafts_;
  }

  /// The drafts are tokens like any other from now on; gives up what they made too much.
  template <PageOwner Owner>
  void accept_drafts(Owner& owner) noexcept {
    if (drafts_ == 0) return;
    const std::size_t period = traits::period(this->policy_);
    const std::size_t end = this->next_index() - this->prompt_tokens_;
    const std::size_t begin = end - drafts_;
    drafts_ = 0;
    if (period != 0 && end > 0 && (end - 1) / period * period >= std::max<std::size_t>(begin, 1))
      Pages::trim(owner, true);
    if constexpr (Evictor<Policy>) Pages::make_room(owner, this->page_budget());
  }

  /// The oldest length that truncate() can go back to.
  std::size_t oldest_reachable() const {
    const std::size_t settled = this->next_index() - drafts_;
    if (traits::remembers<Policy>() || traits::query_window(this->policy_) > 0) return settled;
    const std::size_t prompt = traits::pin_prompt(this->policy_) ? this->prompt_tokens_ : 0;
    return std::min(settled, std::max(prompt, Pages::length_at_last_eviction()));
  }

  /// Takes back the tokens from `position` on, so that everything goes on as if they had never come, and accepts the
  /// drafts before it. For the summary of a page's keys the owner may have a member summarize(PageId, Slot): add the
  /// slot's key, the first slot anew; and release_truncated(PageId), to tell such pages from
  /// evicted ones. Call with a position in oldest_reachable() .. next_position().
  template <PageOwner Owner>
  void truncate(Position position, Owner& owner) noexcept {
    const Position first = first_draft_;
    const bool among_drafts = drafts_ != 0 && position >= first;
    if (position < next_position()) {
      drop(position, owner);
      if (among_drafts) {
        replay(position, owner);
      } else {
        for (std::size_t h = 0; h < this->heads_.size(); ++h) summarize_last_page(h, owner);
      }
    }
    drafts_ = among_drafts ? static_cast<std::size_t>(position - first) : 0;
    for (Head& head : this->heads_) head.forget_query();
    accept_drafts(owner);
  }

  /// The page that a cut at `position` leaves with fewer tokens; none if it falls between two pages.
  std::optional<PageIndex> page_cut_at(std::size_t kv_head, Position position) const {
    const PageTable& table = this->heads_[kv_head].table;
    for (std::size_t page = table.size(); page-- > 0;) {
      const PageIndex index{static_cast<std::uint32_t>(page)};
      if (table[index].first_position >= position) continue;
      const auto left = static_cast<std::size_t>(position - table[index].first_position);
      return left < table[index].tokens ? std::optional(index) : std::nullopt;
    }
    return std::nullopt;
  }

  /// As LayerPages::clear; there are no drafts then.
  void clear() noexcept {
    Pages::clear();
    drafts_ = 0;
  }

  // --- a query: the evidence is kept for truncate() ---

  /// As LayerHeads::observe.
  void observe(std::size_t kv_head, QueryGroup group) noexcept {
    if (drafts_ != 0) {
      const Head& head = this->heads_[kv_head];
      journals_[kv_head].record(head, {head.query_end, drafts_, steps_}, group);
    }
    Pages::observe(kv_head, group);
  }
  /// As LayerHeads::end_step.
  void end_step() noexcept {
    if (StepObserver<Policy> && drafts_ != 0 && steps_ < step_ends_.size()) {
      step_ends_[steps_++] = this->heads_[0].query_end;
    }
    Pages::end_step();
  }

 protected:
  LayerDrafts(const CacheConfig& config, const Policy& policy, const detail::CachePlan& plan, const RowAccess& rows,
              const void* store)
      : Pages(config, policy, plan, rows, store) {
    if (config.max_speculative == 0) return;
    step_ends_.resize(plan.journal_queries());
    journals_.reserve(plan.geometry.kv_heads);
    for (std::size_t h = 0; h < plan.geometry.kv_heads; ++h) journals_.push_back(Journal(plan, policy));
  }

  detail::LayerImage image() {
    detail::LayerImage image = Pages::image();
    image.drafts = &drafts_;
    return image;
  }

 private:
  /// The tables forget the tokens from `position` on.
  void drop(Position position, auto& owner) {
    for (Head& head : this->heads_) {
      std::size_t pages = head.table.size();
      while (pages > 0 && head.table[{static_cast<std::uint32_t>(pages - 1)}].first_position >= position) {
        const PageId page = head.table[{static_cast<std::uint32_t>(--pages)}].page;
        if constexpr (requires { owner.release_truncated(page); }) {
          owner.release_truncated(page);
        } else {
          owner.release(page);
        }
      }
      if (pages == 0) {
        head.table.clear();
        continue;
      }
      const ResidentPage& last = head.table[{static_cast<std::uint32_t>(pages - 1)}];
      head.table.cut(pages,
                     std::min<std::size_t>(last.tokens, static_cast<std::size_t>(position - last.first_position)));
    }
    this->next_ = position;
    const auto length = static_cast<std::size_t>(position.value);
    if (length < this->prompt_tokens_) {  // a cut inside the prompt opens it again
      this->prompt_tokens_ = length;
      this->prompt_ended_ = false;
    }
  }

  /// The policy's state before the first draft, then what is left of the drafts and of the queries, in their order.
  void replay(Position position, auto& owner) {
    this->layer_state_ = layer_state_before_;
    for (std::size_t h = 0; h < journals_.size(); ++h) {
      journals_[h].restore(this->heads_[h]);
      summarize_last_page(h, owner);
    }
    const std::size_t kept = static_cast<std::size_t>(position - first_draft_);
    for (std::size_t step = 0; step <= steps_; ++step) {
      for (std::size_t h = 0; h < journals_.size(); ++h) replay_head(h, step, kept, owner);
      if (step < steps_ && step_ends_[step] <= position) Pages::end_step();
    }
    for (std::size_t h = 0; h < journals_.size(); ++h) add_drafts_again(h, kept, owner);
  }
  void replay_head(std::size_t kv_head, std::size_t step, std::size_t kept, auto& owner) {
    Head& head = this->heads_[kv_head];
    const Journal& journal = journals_[kv_head];
    const Position position = first_draft_ + kept;
    for (std::size_t i = 0; i < journal.entries().size(); ++i) {
      const detail::JournalEntry& entry = journal.entries()[i];
      if (entry.step != step || entry.end > position) continue;
      add_drafts_again(kv_head, std::min(entry.drafts, kept), owner);
      head.query_end = entry.end;
      head.remember_query(journal.queries(i, geometry()));
      if constexpr (Observer<Policy>) {
        const HeadView<Policy> pages = this->view(kv_head, entry.end, true);
        const bool is_prompt = entry.end <= Position{0} + this->prompt_tokens_;
        this->policy_.observe(pages, journal.evidence(i, geometry(), pages.size(), is_prompt));
      }
    }
  }
  /// Until the head has `drafts` of them.
  void add_drafts_again(std::size_t kv_head, std::size_t drafts, auto& owner) {
    Head& head = this->heads_[kv_head];
    const Journal& journal = journals_[kv_head];
    Position next = head.table.size() == 0 ? Position{0} : head.table.back().first_position + head.table.back().tokens;
    for (; next < first_draft_ + drafts; next = next + 1) {
      const Slot slot = geometry().slot_of(next);
      if (slot.value == 0) {
        Pages::open_page_of(kv_head, journal.drafted_page(head.table.size() - journal.pages_before()));
      }
      if constexpr (requires { owner.summarize(PageId{}, slot); }) owner.summarize(head.table.back().page, slot);
      Pages::add_token_of(kv_head, next);
    }
  }
  void summarize_last_page(std::size_t kv_head, [[maybe_unused]] auto& owner) {
    const PageTable& table = this->heads_[kv_head].table;
    if constexpr (requires { owner.summarize(PageId{}, Slot{}); }) {
      if (table.size() == 0 || table.back().tokens == geometry().page_size) return;
      for (std::uint32_t slot = 0; slot < table.back().tokens; ++slot) owner.summarize(table.back().page, {slot});
    }
  }

  std::vector<Journal> journals_;    // one for each kv head; none without max_speculative
  std::vector<Position> step_ends_;  // queries whose step ended, for policies of layer scope
  std::size_t steps_ = 0;
  LayerState<Policy> layer_state_before_{};
  Position first_draft_;
  std::size_t drafts_ = 0;
};

}  // namespace kvsparse
