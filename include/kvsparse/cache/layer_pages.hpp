// SPDX-License-Identifier: Apache-2.0
// The decisions of one layer of one sequence: which pages each kv head holds, and what its policy knows of them. Holds
// no key and no value: those are PagedKvCache's, or an engine's own.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>

#include "layer_heads.hpp"

namespace kvsparse {

/// Who hands out page ids and takes them back: a pool, or an engine's block allocator. Neither verb may fail: see that
/// there are pages_wanted(tokens) before append.
template <class Owner>
concept PageOwner = requires(Owner owner, PageId page) {
  { owner.acquire() } -> std::same_as<PageId>;
  owner.release(page);
};

/// Page tables, pins, budget and policy state of all kv heads. A policy's views read keys, values and summaries through
/// `rows`; without any, policies that look at stored rows are not for this. Thread safety is that of PagedKvCache:
/// verbs of one object are exclusive, but those that take a kv head may run at the same time for different heads. After
/// construction nothing allocates, throws or locks. Copying copies everything, page ids included; see forget_reads().
template <class Policy>
class LayerPages : public LayerHeads<Policy> {
  using Heads = LayerHeads<Policy>;
  using typename Heads::Head;

 public:
  using Heads::geometry;
  using Heads::page_budget;

  /// Allocates everything it will ever use. Throws ConfigError. store: what the functions of `rows` take first.
  explicit LayerPages(const CacheConfig& config, const Policy& policy = {}, const RowAccess& rows = {},
                      const void* store = nullptr)
      : LayerPages(config, policy, detail::plan_layer<LayerPages>(config, policy), rows, store) {}

  /// Bytes that construction allocates. Throws ConfigError like the constructor.
  static std::size_t bytes_required(const CacheConfig& config, const Policy& policy = {}) {
    const detail::CachePlan plan = detail::plan_cache(config, policy);
    const SaturatingSize heads = (Head::bytes_required(plan, policy) + sizeof(Head)) * plan.geometry.kv_heads;
    const std::size_t rope = RopeRotation::bytes_required(config.rope, config.head_dim);
    return detail::addressable(heads + config.logits.bytes_required() + rope, plan);
  }

  // --- growing ---

  /// Whether so many decode tokens may come; changes nothing.
  Status check_append(std::size_t tokens = 1) const noexcept { return check_room(tokens); }
  /// Whether so many more tokens of the prompt may come; changes nothing.
  Status check_prompt(std::size_t tokens) const noexcept {
    using Code = Status::Code;
    if (prompt_ended_) return {Code::prompt_ended, next_index(), prompt_tokens_};
    if (const Status status = check_room(tokens); !status) return status;
    const std::size_t pinned = pages_pinned_by(tokens);
    if (pinned + decode_pages_ > page_capacity_) return {Code::prompt_exceeds_budget, pinned, page_capacity_};
    return {};
  }

  /// Pages that so many more tokens take from the owner, all heads together, less those that evictions give back; not
  /// less than it turns out to be. is_shared(PageId): others hold the page too. Which page a policy will give up is not
  /// known before, so those that evictions must first get past are counted as given up first; what trim gives back is
  /// not counted, and a prompt that may raise the budget is taken to have done so. O(kv_heads), or O(resident pages) if
  /// `any_shared`.
  template <class IsShared>
  std::size_t pages_wanted(std::size_t tokens, bool any_shared, IsShared&& is_shared) const {
    const std::size_t opened = pages_to_open(tokens);
    std::size_t budget = page_budget();
    if (!prompt_ended_ && pages_pinned_by(tokens) != 0) {
      budget = std::max(budget, std::min(page_capacity_, pages_pinned_by(tokens) + decode_pages_));
    }
    // Of so many heads that have a budget of their own.
    const auto wanted_by = [&](std::span<const Head> heads) {
      std::size_t held = 0;
      for (const Head& head : heads) held += head.table.size();
      const std::size_t wanted = heads.size() * opened;
      const std::size_t most = heads.size() * budget;
      std::size_t evictions = Evictor<Policy> && held + wanted > most ? held + wanted - most : 0;
      if (any_shared && evictions > 0) {
        const bool pins_give_way = config_.prompt_overflow == PromptOverflow::unpin_middle;
        for (const Head& head : heads) {
          evictions -= std::min(evictions, head.count_evictable(is_shared, pins_give_way, sink_pages_));
        }
      }
      return wanted - std::min(wanted, evictions);
    };
    const std::span<const Head> heads(heads_);
    if (SharedBudgetEvictor<Policy>) return wanted_by(heads);
    std::size_t wanted = 0;
    for (std::size_t h = 0; h < heads.size(); ++h) wanted += wanted_by(heads.subspan(h, 1));
    return wanted;
  }
  /// Pages that each head opens for so many more tokens.
  std::size_t pages_to_open(std::size_t tokens) const {
    return geometry().pages_for(SaturatingSize(tokens) + next_index()) - geometry().pages_for(next_index());
  }

  /// One more token in every head, if check_append() says so. The first ends the prompt.
  template <PageOwner Owner>
  Status append(Owner& owner) noexcept {
    if (const Status status = check_append(); !status) return status;
    end_prompt(owner);
    open_slot(owner);
    add_token();
    return {};
  }
  /// So many more tokens of the prompt, all or nothing, if check_prompt() says so.
  template <PageOwner Owner>
  Status append_prompt(std::size_t tokens, Owner& owner) noexcept {
    if (const Status status = check_prompt(tokens); !status) return status;
    begin_prompt(tokens);
    for (std::size_t token = 0; token < tokens; ++token) {
      open_slot(owner);
      add_token();
    }
    return {};
  }
  /// No more prompt will come; its pages may lose their pins, and the policy may give some up. Idempotent.
  template <PageOwner Owner>
  void end_prompt(Owner& owner) noexcept {
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
    trim(owner, true);
  }

  // The parts of append, for a container that stores rows between the last two: first begin_prompt or end_prompt, then
  // for each token open_slot, the rows of open_page(h) at slot_of_next(), and add_token.

  /// After check_prompt(tokens): the budget grows with a prompt that may make it.
  void begin_prompt(std::size_t tokens) noexcept {
    if (const std::size_t pinned = pages_pinned_by(tokens); pinned != 0) {
      context_.page_budget = std::max(page_budget(), pinned + decode_pages_);  // more only under PromptOverflow::grow
    }
  }
  /// A slot for the next token in every head: opens a page where one is due, and first gives up the page that the
  /// policy names where all are taken.
  template <PageOwner Owner>
  void open_slot(Owner& owner) noexcept {
    const Slot slot = slot_of_next();
    if (due_for_trim()) trim(owner, slot.value != 0);
    if (slot.value != 0) return;
    if constexpr (Evictor<Policy>) make_room(owner, page_budget() - 1);
    open_pages(owner);
  }
  Slot slot_of_next() const { return geometry().slot_of(next_); }  ///< the next token's place in its page
  /// The page of the newest token, or the one just opened for the next.
  PageId open_page(std::size_t kv_head) const { return heads_[kv_head].table.back().page; }
  /// The next token's rows are stored in every head: tells the policy.
  void add_token() noexcept {
    for (std::size_t h = 0; h < heads_.size(); ++h) add_token_of(h, next_);
    peak_resident_tokens_ = std::max(peak_resident_tokens_, Heads::tokens_of_a_head());
    next_ = next_ + 1;
    if (!prompt_ended_) ++prompt_tokens_;
  }

  /// Which tokens the latest query read is not known any more. For a copy: what it knows of that lies with the
  /// original.
  void forget_reads() noexcept {
    for (Head& head : heads_) head.forget_reads();
  }
  /// Gives each resident page another id: new_id(PageId), page by page, for the heads in turn.
  template <class NewId>
  void renumber(NewId&& new_id) {
    std::size_t most = 0;
    for (const Head& head : heads_) most = std::max(most, head.table.size());
    for (std::uint32_t page = 0; page < most; ++page) {
      for (Head& head : heads_) {
        if (page < head.table.size()) head.table.move_to({page}, new_id(head.table[{page}].page));
      }
    }
  }
  /// The same for one page.
  void renumber_page(std::size_t kv_head, PageIndex index, PageId page) { heads_[kv_head].table.move_to(index, page); }
  /// Calls visit(PageId) for every resident page, so that taking them again in turn would order ids as before.
  template <class Visit>
  void visit_newest_first(Visit&& visit) const {
    std::size_t most = 0;
    for (const Head& head : heads_) most = std::max(most, head.table.size());
    for (std::size_t page = most; page-- > 0;) {
      for (std::size_t h = heads_.size(); h-- > 0;) {
        if (page < heads_[h].table.size()) visit(heads_[h].table[{static_cast<std::uint32_t>(page)}].page);
      }
    }
  }

  /// Forgets everything; the next token has position 0 and may start a prompt. The owner's pages are the caller's
  /// affair.
  void clear() noexcept {
    for (std::size_t h = 0; h < heads_.size(); ++h) {
      heads_[h].clear();
      if constexpr (ClearListener<Policy>) policy_.on_clear(view(h));
    }
    layer_state_ = {};
    context_.page_budget = configured_page_budget_;
    next_ = {};
    prompt_tokens_ = peak_resident_tokens_ = peak_resident_pages_ = length_at_last_eviction_ = 0;
    prompt_ended_ = false;
  }

 protected:
  LayerPages(const CacheConfig& config, const Policy& policy, const detail::CachePlan& plan, const RowAccess& rows,
             const void* store)
      : Heads(config, policy, plan, rows, store),
        configured_page_budget_(plan.page_budget),
        page_capacity_(plan.page_capacity),
        sink_pages_(plan.sink_pages),
        decode_pages_(plan.decode_pages) {}
  /// All but the facts and the rows.
  detail::LayerImage image() {
    detail::LayerImage image;
    image.geometry = geometry();
    image.max_tokens = Evictor<Policy> ? 0 : config_.max_tokens;
    image.page_budget = configured_page_budget_;
    image.page_capacity = page_capacity_;
    image.page_floor = context_.page_floor;
    image.sink_pages = sink_pages_;
    image.decode_pages = decode_pages_;
    image.pins_prompt = traits::pin_prompt(policy_);
    image.unpins_middle = config_.prompt_overflow == PromptOverflow::unpin_middle;
    image.heads_agree = LayerEvictor<Policy>;
    image.heads_share_budget = SharedBudgetEvictor<Policy>;
    image.next = &next_;
    image.prompt_ended = &prompt_ended_;
    image.prompt_tokens = &prompt_tokens_;
    image.running_page_budget = &context_.page_budget;
    image.length_at_last_eviction = &length_at_last_eviction_;
    image.peak_resident_tokens = &peak_resident_tokens_;
    image.peak_resident_pages = &peak_resident_pages_;
    image.layer_state = detail::StatesImage::of(std::span(&layer_state_, 1));
    for (Head& head : heads_) image.heads.push_back(head.image());
    return image;
  }
  /// After a copy whose rows lie elsewhere.
  void set_store(const void* store) { store_ = store; }

  using Heads::config_;
  using Heads::context_;
  using Heads::heads_;
  using Heads::layer_state_;
  using Heads::layer_view;
  using Heads::next_;
  using Heads::next_index;
  using Heads::peak_resident_pages_;
  using Heads::peak_resident_tokens_;
  using Heads::policy_;
  using Heads::prompt_ended_;
  using Heads::prompt_tokens_;
  using Heads::store_;
  using Heads::view;

  Status check_room([[maybe_unused]] std::size_t tokens) const {
    if constexpr (!Evictor<Policy>) {
      const std::size_t length = SaturatingSize(tokens) + next_index();
      if (length > config_.max_tokens) return {Status::Code::max_tokens_reached, length, config_.max_tokens};
    }
    return {};
  }
  /// Pages that can never be victims once so many more tokens of the prompt came; 0 where the prompt gives way.
  std::size_t pages_pinned_by(std::size_t tokens) const {
    if (!traits::pin_prompt(policy_) || config_.prompt_overflow == PromptOverflow::unpin_middle) return 0;
    return std::max(sink_pages_, geometry().pages_for(SaturatingSize(tokens) + prompt_tokens_));
  }

  static HeadView<Policy> victim_view(void* pages, std::size_t kv_head) {
    return static_cast<LayerPages*>(pages)->full_view(kv_head);
  }
  void open_pages(auto& owner) {
    std::size_t resident_pages = 0;
    const bool pinned = geometry().page_number(next_) < sink_pages_ || (!prompt_ended_ && traits::pin_prompt(policy_));
    for (std::size_t h = 0; h < heads_.size(); ++h) {
      open_page_of(h, {next_, owner.acquire(), 0, pinned});
      resident_pages += heads_[h].table.size();
    }
    peak_resident_pages_ = std::max(peak_resident_pages_, resident_pages);
  }
  void open_page_of(std::size_t kv_head, const ResidentPage& page) {
    Head& head = heads_[kv_head];
    head.open_page(page);
    if constexpr (PageOpenListener<Policy>) {
      policy_.on_page_open(view(kv_head, page.first_position + 1, true),
                           PageIndex{static_cast<std::uint32_t>(head.table.size() - 1)});
    }
  }
  void add_token_of(std::size_t kv_head, Position position) {
    Head& head = heads_[kv_head];
    head.table.add_token();
    if constexpr (AppendListener<Policy> || PageFullListener<Policy>) {
      const Slot slot = geometry().slot_of(position);
      const HeadView<Policy> pages = view(kv_head, position + 1, true);
      if constexpr (AppendListener<Policy>) policy_.on_append(pages, pages.open_page(), slot);
      if constexpr (PageFullListener<Policy>) {
        if (slot.value + 1 == geometry().page_size) policy_.on_page_full(pages, pages.open_page());
      }
    }
  }

  // Each head that holds more than `keep` pages, or all heads together while they hold more than `keep` on average,
  // give up one after the other: one that the layer's window has left behind, or else the policy's choice. The policy
  // sees the oldest pages that fit the budget and no open page, as if the next page were about to be opened.
  void make_room(auto& owner, std::size_t keep) {
    if constexpr (LayerEvictor<Policy>) {
      while (heads_[0].table.size() > keep) {
        for (Head& head : heads_) head.unpin_middle(page_budget() - 1, sink_pages_);
        const bool left = left_window(heads_[0]);
        const PageIndex victim = left ? heads_[0].oldest_unpinned() : policy_.victim(layer_view(&victim_view));
        for (std::size_t h = 0; h < heads_.size(); ++h) evict(owner, h, victim);
      }
    } else if constexpr (SharedBudgetEvictor<Policy>) {
      for (std::size_t pages = pages_of_all_heads(); pages > keep * heads_.size(); --pages) {
        for (Head& head : heads_) head.unpin_middle(page_budget() - 1, sink_pages_);
        const HeadPage victim = victim_of_any_head();
        evict(owner, victim.kv_head, victim.page);
      }
    } else {
      for (std::size_t h = 0; h < heads_.size(); ++h) {
        while (heads_[h].table.size() > keep) {
          heads_[h].unpin_middle(page_budget() - 1, sink_pages_);
          evict(owner, h, left_window(heads_[h]) ? heads_[h].oldest_unpinned() : policy_.victim(full_view(h)));
        }
      }
    }
  }
  /// Whether the oldest page that may go lies before the window of the next token's query.
  bool left_window(const Head& head) const {
    if (config_.logits.window == 0) return false;
    const std::int64_t end =
        head.table[head.oldest_unpinned()].first_position.value + static_cast<std::int64_t>(geometry().page_size);
    return end + static_cast<std::int64_t>(config_.logits.window) <= next_.value + 1;
  }

  HeadView<Policy> full_view(std::size_t kv_head) {
    HeadView<Policy> pages = view(kv_head);
    if constexpr (SharedBudgetEvictor<Policy>) {
      const std::size_t held = pages_of_all_heads();
      const std::size_t most = page_budget() * heads_.size();
      const std::size_t too_many = held <= most ? 0 : divide_up(held - most, heads_.size());  // in every head: drafts
      pages.hide_newer_than(pages.size() - std::min(pages.size(), too_many));
    } else {
      pages.hide_newer_than(page_budget());
    }
    return pages;
  }
  std::size_t pages_of_all_heads() const {
    std::size_t pages = 0;
    for (const Head& head : heads_) pages += head.table.size();
    return pages;
  }
  /// Where heads share a budget. Some head is over its floor then and has an unpinned page: the fullest.
  HeadPage victim_of_any_head() requires SharedBudgetEvictor<Policy> {
    const LayerView<Policy> layer = layer_view(&victim_view);
    HeadPage oldest, fullest;
    bool has_left = false;
    for (std::size_t h = 0; h < heads_.size(); ++h) {
      const HeadPage candidate{h, heads_[h].oldest_unpinned()};
      if (heads_[h].table.size() > heads_[fullest.kv_head].table.size() || h == 0) fullest = candidate;
      if (!layer.may_give(layer.head(h)) || !left_window(heads_[h])) continue;
      const auto position = [&](const HeadPage& page) { return heads_[page.kv_head].table[page.page].first_position; };
      if (!has_left || position(candidate) < position(oldest)) oldest = candidate;
      has_left = true;
    }
    if (has_left) return oldest;
    const HeadPage victim = policy_.victim(layer);
    const auto is_possible = [&] {
      if (victim.kv_head >= heads_.size()) return false;
      const HeadView<Policy> head = layer.head(victim.kv_head);
      return layer.may_give(head) && victim.page.value < head.size() && head.is_evictable(victim.page);
    };
    KVSPARSE_ASSERT(is_possible() && "victim must name a page that a head over its floor holds and that is not pinned");
    return is_possible() ? victim : fullest;
  }

  void evict(auto& owner, std::size_t kv_head, PageIndex victim) {
    Head& head = heads_[kv_head];
    KVSPARSE_ASSERT(victim.value < head.table.size() && !head.table[victim].pinned &&
                    "victim must name a resident page that is not pinned");
    // The budget and the pins are the container's word, whatever a policy answers.
    if (victim.value >= head.table.size() || head.table[victim].pinned) victim = head.oldest_unpinned();
    if constexpr (EvictListener<Policy>) policy_.on_evict(full_view(kv_head), victim);
    owner.release(head.table[victim].page);
    head.erase_page(victim);
    head.forget_reads();
    length_at_last_eviction_ = next_index() + 1;
  }

  /// The length of the sequence with the token on whose behalf a page was last given up.
  std::size_t length_at_last_eviction() const { return length_at_last_eviction_; }

  bool due_for_trim() const {
    const std::size_t period = traits::period(policy_);
    const std::size_t decode_tokens = next_index() - prompt_tokens_;
    return period != 0 && decode_tokens != 0 && decode_tokens % period == 0;
  }
  /// The page of the newest token stays open until the append that opens another, even when it is full.
  void trim([[maybe_unused]] auto& owner, [[maybe_unused]] bool has_open_page) {
    if constexpr (Trimmer<Policy>) {
      for (std::size_t h = 0; h < heads_.size(); ++h) {
        Head& head = heads_[h];
        const HeadView<Policy> pages = view(h, next_, has_open_page);
        head.trimmed.clear();
        policy_.trim(pages, head.trimmed);
        for (const PageIndex victim : head.trimmed.newest_first()) {  // so that the older indices stay valid
          if (victim.value < pages.size() && pages.is_evictable(victim)) evict(owner, h, victim);
        }
      }
    }
  }

 private:
  std::size_t configured_page_budget_;
  std::size_t page_capacity_;
  std::size_t sink_pages_;
  std::size_t decode_pages_;
  std::size_t length_at_last_eviction_ = 0;  // that of the token on whose behalf it was
};

}  // namespace kvsparse
