// SPDX-License-Identifier: Apache-2.0
// Compose<Evict, Select>: the first policy decides what stays resident, the second what of it each query reads. Of a
// page that was not read nothing is known: its stamp, last mass and accumulated mass stay as they were, it is not told
// that nobody wanted it. Ages go on, and a mass is a share of what was read, which leaves out what was not. An evictor
// that must see all it may give up is composed with a selector that reads all of that, such as Quest with over =
// prompt. Source: the combination that the RaaS paper (2502.11147) advises for long prompts.  Costs: those of the
// parts.
#pragma once

#include <array>

#include "policy.hpp"

namespace kvsparse {

template <class Evict, class Select>
struct Compose {
  static_assert(Evictor<Evict>, "kvsparse: the first part of Compose must evict: it needs the verb victim.");
  static_assert(!Selector<Evict>,
                "kvsparse: the first part of Compose must not select: what it would read, or weigh, is for the second "
                "part to say.");
  static_assert(Selector<Select> && !Evictor<Select>,
                "kvsparse: the second part of Compose must select and not evict: it needs the verb select alone.");
  using EvictPart = Evict;    ///< decides what stays
  using SelectPart = Select;  ///< decides what is read

 private:
  static constexpr auto joined_name = [] {
    std::array<char, Evict::name.size() + 1 + Select::name.size()> joined{};
    std::size_t at = 0;
    for (const char c : Evict::name) joined[at++] = c;
    joined[at++] = '+';
    for (const char c : Select::name) joined[at++] = c;
    return joined;
  }();

 public:
  static constexpr std::string_view name{joined_name.data(), joined_name.size()};
  static constexpr PolicyScope scope = traits::scope<Evict>();
  static constexpr PolicyGranularity granularity = traits::granularity<Select>();

  Evict evict;         ///< with its options
  Select select_part;  ///< with its options

  struct PageState {
    kvsparse::PageState<Evict> evict;
    kvsparse::PageState<Select> select;
  };
  struct HeadState {
    kvsparse::HeadState<Evict> evict;
    kvsparse::HeadState<Select> select;
  };
  using LayerState = kvsparse::LayerState<Evict>;

  static constexpr bool select_always = traits::select_always<Select>();
  static constexpr bool reads_rows = traits::reads_rows<Evict>() || traits::reads_rows<Select>();

  SelectionScope selection() const { return traits::selection(select_part); }
  EvidenceKind evidence() const { return traits::evidence(evict) | traits::evidence(select_part); }
  std::size_t query_window() const { return std::max(traits::query_window(evict), traits::query_window(select_part)); }
  std::size_t slack_tokens() const { return traits::slack_tokens(evict); }
  std::size_t period() const { return traits::period(evict); }
  bool pin_prompt() const { return traits::pin_prompt(evict); }
  bool in_cache_positions() const { return traits::in_cache_positions(evict); }
  double budget_floor() const { return traits::budget_floor(evict); }
  std::size_t pinned_pages(const Geometry& geometry) const { return traits::pinned_pages(evict, geometry); }
  /// Both parts may want summaries, but there is one kind for a cache; see the constructor of PagedKvCache.
  PageSummary page_summary() const {
    const PageSummary of_select = traits::page_summary(select_part);
    return of_select == PageSummary::none ? traits::page_summary(evict) : of_select;
  }
  /// Whether the parts want summaries of one kind, or one of them wants none.
  bool summaries_agree() const {
    const PageSummary a = traits::page_summary(evict);
    const PageSummary b = traits::page_summary(select_part);
    return a == PageSummary::none || b == PageSummary::none || a == b;
  }

  void on_page_open(HeadView<Compose> head, PageIndex page) const {
    if constexpr (PageOpenListener<Evict>) evict.on_page_open(evict_view(head), page);
    if constexpr (PageOpenListener<Select>) select_part.on_page_open(select_view(head), page);
  }
  void on_append(HeadView<Compose> head, PageIndex page, Slot slot) const
      requires(AppendListener<Evict> || AppendListener<Select>) {
    if constexpr (AppendListener<Evict>) evict.on_append(evict_view(head), page, slot);
    if constexpr (AppendListener<Select>) select_part.on_append(select_view(head), page, slot);
  }
  void on_page_full(HeadView<Compose> head, PageIndex page) const {
    if constexpr (PageFullListener<Evict>) evict.on_page_full(evict_view(head), page);
    if constexpr (PageFullListener<Select>) select_part.on_page_full(select_view(head), page);
  }
  void on_prompt_end(HeadView<Compose> head) const {
    if constexpr (PromptEndListener<Evict>) evict.on_prompt_end(evict_view(head));
    if constexpr (PromptEndListener<Select>) select_part.on_prompt_end(select_view(head));
  }
  void on_clear(HeadView<Compose> head) const {
    if constexpr (ClearListener<Evict>) evict.on_clear(evict_view(head));
    if constexpr (ClearListener<Select>) select_part.on_clear(select_view(head));
  }
  void on_evict(HeadView<Compose> head, PageIndex page) const requires(EvictListener<Evict> || EvictListener<Select>) {
    if constexpr (EvictListener<Evict>) evict.on_evict(evict_view(head), page);
    if constexpr (EvictListener<Select>) select_part.on_evict(select_view(head), page);
  }
  void select(HeadView<Compose> head, QueryGroup queries, Selection& selection) const {
    select_part.select(select_view(head), queries, selection);
  }
  void select_more(HeadView<Compose> head, QueryGroup queries, std::span<const SoftmaxState> states,
                   Selection& selection) const requires RepeatedSelector<Select> {
    select_part.select_more(select_view(head), queries, states, selection);
  }
  void observe(HeadView<Compose> head, const Evidence& step) const requires(Observer<Evict> || Observer<Select>) {
    if constexpr (Observer<Evict>) evict.observe(evict_view(head), step);
    if constexpr (Observer<Select>) select_part.observe(select_view(head), step);
  }
  void on_step_end(LayerView<Compose> layer) const requires StepObserver<Evict> {
    evict.on_step_end(evict_view(layer));
  }
  PageIndex victim(HeadView<Compose> head) const requires HeadEvictor<Evict> { return evict.victim(evict_view(head)); }
  auto victim(LayerView<Compose> layer) const requires(LayerEvictor<Evict> || SharedBudgetEvictor<Evict>) {
    return evict.victim(evict_view(layer));
  }
  void trim(HeadView<Compose> head, PageList& pages) const requires Trimmer<Evict> {
    evict.trim(evict_view(head), pages);
  }
  void residual(HeadView<Compose> head, QueryGroup queries,
                std::span<SoftmaxState> states) const requires ResidualProvider<Evict> {
    evict.residual(evict_view(head), queries, states);
  }
  PagesUsed pages_used(HeadView<Compose> head) const requires UseCounter<Evict> {
    return evict.pages_used(evict_view(head));
  }

 private:
  static HeadView<Evict> evict_view(const HeadView<Compose>& head) {
    return head.template part<Evict>(&PageState::evict, &HeadState::evict);
  }
  static HeadView<Select> select_view(const HeadView<Compose>& head) {
    return head.template part<Select>(&PageState::select, &HeadState::select);
  }
  static LayerView<Evict> evict_view(LayerView<Compose>& layer) {
    const auto head_of = [](void* owner, std::size_t kv_head) {
      return evict_view(static_cast<LayerView<Compose>*>(owner)->head(kv_head));
    };
    return {&layer, head_of, layer.heads(), layer.layer_state()};
  }
};

}  // namespace kvsparse
