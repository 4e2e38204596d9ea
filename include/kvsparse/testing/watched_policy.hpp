// SPDX-License-Identifier: Apache-2.0
// A policy with somebody who looks over its shoulder: every verb is passed on, and what the contract forbids is noted.
// Where a cache would abort, or overrule the policy without a word, a sentence is left that says what was wrong.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "../policy/contract_check.hpp"

namespace kvsparse::conformance {

/// How many allocations the calling thread has made, if anybody counts them: testing/count_allocations.hpp does, or a
/// test program may set a counter of its own.
inline std::size_t (*allocations_of_this_thread)() noexcept = nullptr;

/// The rules that a verb can break.
enum class Rule { victim, reading, writing, allocating, throwing };

/// What a policy did that the contract forbids.
class Findings {
 public:
  void add(Rule rule, const std::string& sentence) {
    Broken& broken = broken_[static_cast<std::size_t>(rule)];
    if (broken.times++ == 0) broken.first = sentence;
  }
  /// The first time that the rule was broken, and how often; empty if it was kept.
  std::string of(Rule rule) const {
    const Broken& broken = broken_[static_cast<std::size_t>(rule)];
    if (broken.times < 2) return broken.first;
    return broken.first + " (and " + std::to_string(broken.times - 1) + " times more)";
  }

 private:
  struct Broken {
    std::string first;
    std::size_t times = 0;
  };
  std::array<Broken, 5> broken_;
};

/// P, watched. Has P's name, options, traits and states. Findings outlive it.
template <class P>
struct Watched : P {
  Watched(P policy, Findings& findings) : P(std::move(policy)), findings_(&findings) {}

  void on_page_open(HeadView<Watched> head, PageIndex page) const requires PageOpenListener<P> {
    call("on_page_open", [&] { policy().on_page_open(of(head), page); });
  }
  void on_append(HeadView<Watched> head, PageIndex page, Slot slot) const requires AppendListener<P> {
    call("on_append", [&] { policy().on_append(of(head), page, slot); });
  }
  void on_page_full(HeadView<Watched> head, PageIndex page) const requires PageFullListener<P> {
    call("on_page_full", [&] { policy().on_page_full(of(head), page); });
  }
  void on_prompt_end(HeadView<Watched> head) const requires PromptEndListener<P> {
    call("on_prompt_end", [&] { policy().on_prompt_end(of(head)); });
  }
  void on_clear(HeadView<Watched> head) const requires ClearListener<P> {
    call("on_clear", [&] { policy().on_clear(of(head)); });
  }
  void on_evict(HeadView<Watched> head, PageIndex page) const requires EvictListener<P> {
    call("on_evict", [&] { policy().on_evict(of(head), page); });
  }
  void observe(HeadView<Watched> head, const Evidence& step) const requires Observer<P> {
    call("observe", [&] { policy().observe(of(head), step); });
  }
  void on_step_end(LayerView<Watched> layer) const requires StepObserver<P> {
    call("on_step_end", [&] { policy().on_step_end(of(layer)); });
  }

  PageIndex victim(HeadView<Watched> head) const requires HeadEvictor<P> {
    PageIndex page{};
    call("victim", [&] { page = policy().victim(of(head)); });
    return checked_victim(head, page);
  }
  PageIndex victim(LayerView<Watched> layer) const requires LayerEvictor<P> {
    PageIndex page{};
    call("victim", [&] { page = policy().victim(of(layer)); });
    return checked_victim(layer.head(0), page);
  }
  HeadPage victim(LayerView<Watched> layer) const requires SharedBudgetEvictor<P> {
    HeadPage page;
    call("victim", [&] { page = policy().victim(of(layer)); });
    return checked_victim(layer, page);
  }
  void trim(HeadView<Watched> head, PageList& pages) const requires Trimmer<P> {
    call("trim", [&] { policy().trim(of(head), pages); });
    for (const PageIndex page : pages.pages()) {
      if (page.value >= head.size()) findings_->add(Rule::victim, "trim named " + described(head, page));
    }
  }

  void select(HeadView<Watched> head, QueryGroup queries, Selection& chosen) const requires Selector<P> {
    call_without_writing("select", head, [&] { policy().select(of(head), queries, chosen); });
    check_reading(head, chosen);
  }
  void select_more(HeadView<Watched> head, QueryGroup queries, std::span<const SoftmaxState> states,
                   Selection& chosen) const requires RepeatedSelector<P> {
    call_without_writing("select_more", head, [&] { policy().select_more(of(head), queries, states, chosen); });
  }
  void residual(HeadView<Watched> head, QueryGroup queries,
                std::span<SoftmaxState> states) const requires ResidualProvider<P> {
    call_without_writing("residual", head, [&] { policy().residual(of(head), queries, states); });
  }
  PagesUsed pages_used(HeadView<Watched> head) const requires UseCounter<P> {
    PagesUsed used;
    call_without_writing("pages_used", head, [&] { used = policy().pages_used(of(head)); });
    return used;
  }

 private:
  static constexpr bool has_page_state = !std::is_empty_v<PageState<P>>;

  const P& policy() const { return *this; }

  static HeadView<P> of(const HeadView<Watched>& head) {
    void* states = nullptr;
    if constexpr (has_page_state) states = &head.state(PageIndex{0});
    return {head, states, sizeof(PageState<P>), &head.head_state()};
  }
  static LayerView<P> of(LayerView<Watched>& layer) {
    const auto head_of = [](void* owner, std::size_t kv_head) {
      return of(static_cast<LayerView<Watched>*>(owner)->head(kv_head));
    };
    return {&layer, head_of, layer.heads(), layer.layer_state()};
  }

  template <class Act>
  void call(std::string_view verb, Act&& act) const {
    const auto count = [] { return allocations_of_this_thread == nullptr ? 0 : allocations_of_this_thread(); };
    const std::size_t before = count();
    std::size_t allocations = 0;
    try {
      act();
      allocations = count() - before;
    } catch (const std::exception& error) {
      findings_->add(Rule::throwing, std::string(verb) + " threw: " + error.what());
    } catch (...) {
      findings_->add(Rule::throwing, std::string(verb) + " threw");
    }
    if (allocations > 0) {
      findings_->add(Rule::allocating, std::string(verb) + " allocated " + std::to_string(allocations) + " times");
    }
  }

  /// For verbs that are not called again after rejected drafts, and so must leave no trace.
  template <class Act>
  void call_without_writing(std::string_view verb, const HeadView<Watched>& head, Act&& act) const {
    const std::vector<std::byte> before = state_bytes(head);
    call(verb, act);
    if (state_bytes(head) != before)
      findings_->add(Rule::writing, std::string(verb) + " wrote into the policy's state");
  }
  static std::vector<std::byte> state_bytes(const HeadView<Watched>& head) {
    const std::size_t pages = has_page_state ? head.size() * sizeof(PageState<P>) : 0;
    std::vector<std::byte> bytes(sizeof(HeadState<P>) + pages);
    std::memcpy(bytes.data(), static_cast<const void*>(&head.head_state()), sizeof(HeadState<P>));
    if constexpr (has_page_state) {
      if (pages > 0)
        std::memcpy(bytes.data() + sizeof(HeadState<P>), static_cast<const void*>(&head.state({0})), pages);
    }
    return bytes;
  }

  /// The policy's answer, or a page that may go.
  PageIndex checked_victim(const HeadPages& head, PageIndex page) const {
    if (page.value < head.size() && head.is_evictable(page)) return page;
    findings_->add(Rule::victim, "victim named " + described(head, page));
    return head.evictable_count() == 0 ? page : *head.evictable_pages().begin();
  }
  HeadPage checked_victim(const LayerView<Watched>& layer, const HeadPage& named) const {
    if (named.kv_head >= layer.heads()) {
      findings_->add(Rule::victim,
                     "victim named kv head " + std::to_string(named.kv_head) + " of " + std::to_string(layer.heads()));
    } else if (!layer.may_give(layer.head(named.kv_head))) {
      findings_->add(Rule::victim, "victim named " + described(layer.head(named.kv_head), named.page) +
                                       ", of a head that is at its floor");
    } else {
      return {named.kv_head, checked_victim(layer.head(named.kv_head), named.page)};
    }
    return layer.lowest_evictable(
        [](const HeadView<Watched>& head, PageIndex page) { return head.first_position(page); });
  }
  static std::string described(const HeadPages& head, PageIndex page) {
    const std::string named = "page " + std::to_string(page.value) + " of kv head " + std::to_string(head.kv_head());
    if (page.value >= head.size()) return named + ", which holds " + std::to_string(head.size()) + " pages";
    return named + ", at position " + std::to_string(head.first_position(page).value) +
           (head.is_pinned(page) ? ", which is pinned"
            : head.is_open(page) ? ", which is the open page"
                                 : "");
  }

  void check_reading(const HeadPages& head, const Selection& chosen) const {
    std::size_t tokens = 0;
    for (const SelectedPage& selected : chosen.pages()) tokens += tokens_read(head, selected);
    if (tokens == 0) findings_->add(Rule::reading, "select named no token to read");
    if (traits::select_always<P>() || RepeatedSelector<P>) return;  // these read as much as they need
    const std::size_t limit = head.read_page_budget();
    const bool exceeds = traits::granularity<P>() == PolicyGranularity::token ? tokens > limit * head.page_size()
                                                                              : chosen.pages().size() > limit;
    if (exceeds) {
      findings_->add(Rule::reading, "select named " + std::to_string(chosen.pages().size()) + " pages, " +
                                        std::to_string(tokens) + " tokens; read_page_budget() is " +
                                        std::to_string(limit) + " pages of " + std::to_string(head.page_size()));
    }
  }
  static std::size_t tokens_read(const HeadPages& head, const SelectedPage& selected) {
    const std::size_t tokens = head.tokens(selected.page);
    if (selected.tokens.empty()) return tokens;
    std::size_t read = 0;
    for (std::size_t slot = 0; slot < tokens; ++slot) read += selected.tokens[slot / 64] >> (slot % 64) & 1;
    return read;
  }

  Findings* findings_;
};

}  // namespace kvsparse::conformance

/// The watcher has a member for every verb; what the policy has is what was written by hand.
template <class P>
struct kvsparse::detail::ContractCheck<kvsparse::conformance::Watched<P>> {
  static constexpr ContractCheck<P> policy{};
};
