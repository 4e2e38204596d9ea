// SPDX-License-Identifier: Apache-2.0
//
// clang-format off
// Compile-time checks of a policy, one sentence for each mistake: look for "kvsparse policy:" in what the compiler prints,
// before all else. Most sentences end with the line to write.
//
//   the sentence says                            because                                          so
//   the verb ... is called X                     nobody calls that name, however sensible; this   rename it to X
//                                                finds the usual ones, not every slip of a key
//   X has the wrong signature                    not const, another view, another result          write the line it gives
//   the trait X has the wrong type               as it stands it would count as absent            write the line it gives
//   the trait X promises a verb that is missing  the trait alone has no effect                    add the verb, or no trait
//   observe needs evidence                       the kernel tells no one who does not ask         add the trait evidence
//   trim alone cannot keep the budget            trim comes every `period` steps                  add victim
//   select_more continues a selection            nothing came before it                           add select
//   on_step_end, a shared victim, trim: scope    trim is for scope kv_head, the others are not    set or drop the trait scope
//   PageState, ... must be trivially copyable    states are moved, forked and saved as bytes      arrays of fixed size, no vector;
//                                                                                                 head.scratch() for a verb
//   options cannot be visited                    a member options without visit(field)            name each option in visit
//   the name is missing                          command lines, messages, snapshots need one      add it: a string_view
//   a policy is a copyable class, not final      each cache has its own copy                      no unique_ptr, no final
//   the first, second part of Compose must ...   an evictor comes first, a selector second        swap them, or take others
//
// P is your policy. An error without such a sentence lies in a verb's own body. No error at all, and yet no effect: a verb under
// a name that nobody calls. Where a policy that observes, remembers or asks for anything decides nothing therefore, the conformance
// suite says so; one that has nothing but a misspelt verb cannot be told from Dense.
//
// The container's template parameter is left plain on purpose: a constrained one would make the compiler print the concept
// instead of the sentence.
// clang-format on
#pragma once

#include <concepts>
#include <type_traits>

#include "../config.hpp"
#include "compose.hpp"

namespace kvsparse::detail {

KVSPARSE_DEFINE_HAS_MEMBER(victim)
KVSPARSE_DEFINE_HAS_MEMBER(trim)
KVSPARSE_DEFINE_HAS_MEMBER(select)
KVSPARSE_DEFINE_HAS_MEMBER(select_more)
KVSPARSE_DEFINE_HAS_MEMBER(observe)
KVSPARSE_DEFINE_HAS_MEMBER(on_step_end)
KVSPARSE_DEFINE_HAS_MEMBER(on_page_open)
KVSPARSE_DEFINE_HAS_MEMBER(on_append)
KVSPARSE_DEFINE_HAS_MEMBER(on_page_full)
KVSPARSE_DEFINE_HAS_MEMBER(on_prompt_end)
KVSPARSE_DEFINE_HAS_MEMBER(on_clear)
KVSPARSE_DEFINE_HAS_MEMBER(on_evict)
KVSPARSE_DEFINE_HAS_MEMBER(residual)
KVSPARSE_DEFINE_HAS_MEMBER(pinned_pages)
KVSPARSE_DEFINE_HAS_MEMBER(pages_used)
KVSPARSE_DEFINE_HAS_MEMBER(evidence)
KVSPARSE_DEFINE_HAS_MEMBER(page_summary)
KVSPARSE_DEFINE_HAS_MEMBER(in_cache_positions)
KVSPARSE_DEFINE_HAS_MEMBER(pin_prompt)
KVSPARSE_DEFINE_HAS_MEMBER(period)
KVSPARSE_DEFINE_HAS_MEMBER(query_window)
KVSPARSE_DEFINE_HAS_MEMBER(slack_tokens)
KVSPARSE_DEFINE_HAS_MEMBER(options)
KVSPARSE_DEFINE_HAS_MEMBER(selection)
KVSPARSE_DEFINE_HAS_MEMBER(budget_floor)
KVSPARSE_DEFINE_HAS_MEMBER(scope)
KVSPARSE_DEFINE_HAS_MEMBER(granularity)
KVSPARSE_DEFINE_HAS_MEMBER(reads_rows)
KVSPARSE_DEFINE_HAS_MEMBER(knows_logits)

KVSPARSE_DEFINE_HAS_TRAIT(selection)
KVSPARSE_DEFINE_HAS_TRAIT(evidence)
KVSPARSE_DEFINE_HAS_TRAIT(query_window)
KVSPARSE_DEFINE_HAS_TRAIT(page_summary)
KVSPARSE_DEFINE_HAS_TRAIT(slack_tokens)
KVSPARSE_DEFINE_HAS_TRAIT(period)
KVSPARSE_DEFINE_HAS_TRAIT(pin_prompt)
KVSPARSE_DEFINE_HAS_TRAIT(in_cache_positions)
KVSPARSE_DEFINE_HAS_TRAIT(budget_floor)

KVSPARSE_DEFINE_HAS_MEMBER(evict)
KVSPARSE_DEFINE_HAS_MEMBER(choose_victim)
KVSPARSE_DEFINE_HAS_MEMBER(select_victim)
KVSPARSE_DEFINE_HAS_MEMBER(pick_victim)
KVSPARSE_DEFINE_HAS_MEMBER(victims)
KVSPARSE_DEFINE_HAS_MEMBER(on_victim)
KVSPARSE_DEFINE_HAS_MEMBER(select_pages)
KVSPARSE_DEFINE_HAS_MEMBER(on_select)
KVSPARSE_DEFINE_HAS_MEMBER(selects)
KVSPARSE_DEFINE_HAS_MEMBER(observed)
KVSPARSE_DEFINE_HAS_MEMBER(on_observe)
KVSPARSE_DEFINE_HAS_MEMBER(on_attend)
KVSPARSE_DEFINE_HAS_MEMBER(append)
KVSPARSE_DEFINE_HAS_MEMBER(on_token)
KVSPARSE_DEFINE_HAS_MEMBER(on_open)
KVSPARSE_DEFINE_HAS_MEMBER(on_page_opened)
KVSPARSE_DEFINE_HAS_MEMBER(on_full)
KVSPARSE_DEFINE_HAS_MEMBER(on_page_close)
KVSPARSE_DEFINE_HAS_MEMBER(on_prefill_end)
KVSPARSE_DEFINE_HAS_MEMBER(prompt_end)
KVSPARSE_DEFINE_HAS_MEMBER(clear)
KVSPARSE_DEFINE_HAS_MEMBER(on_evicted)
KVSPARSE_DEFINE_HAS_MEMBER(step_end)
KVSPARSE_DEFINE_HAS_MEMBER(on_step)
KVSPARSE_DEFINE_HAS_MEMBER(pin_prompts)
KVSPARSE_DEFINE_HAS_MEMBER(pins_prompt)
KVSPARSE_DEFINE_HAS_MEMBER(summary)
KVSPARSE_DEFINE_HAS_MEMBER(summaries)
KVSPARSE_DEFINE_HAS_MEMBER(page_state)
KVSPARSE_DEFINE_HAS_MEMBER(pinned)

/// Instantiating this prints one sentence for each mistake in policy P.
template <class P>
struct ContractCheck {
  static_assert(std::is_class_v<P> && !std::is_final_v<P> && std::is_copy_constructible_v<P>,
                "kvsparse policy: a policy is a copyable class that is not final.");
  static_assert(
      requires {
        { P::name } -> std::convertible_to<std::string_view>;
      },
      "kvsparse policy: the name is missing. Write: static constexpr std::string_view name = \"my_policy\";");
  static_assert(std::is_trivially_copyable_v<PageState<P>> && std::is_trivially_copyable_v<HeadState<P>> &&
                    std::is_trivially_copyable_v<LayerState<P>>,
                "kvsparse policy: PageState, HeadState and LayerState must be trivially copyable: the container moves, "
                "forks and saves them as bytes. Write: arrays of fixed size, as float mass[8]; a verb finds working "
                "memory in head.scratch().");

  // --- near misses: a verb or trait under another name would silently never be called ---
  static_assert(
      !(has_member_evict<P> || has_member_choose_victim<P> || has_member_select_victim<P> ||
        has_member_pick_victim<P> || has_member_victims<P> || has_member_on_victim<P>),
      "kvsparse policy: the verb that names the page to give up is called victim. Write: "
      "PageIndex victim(HeadView<P> head) const; or, for all heads of a layer together, PageIndex or HeadPage "
      "victim(LayerView<P> layer) const; with the trait scope.");
  static_assert(!(has_member_select_pages<P> || has_member_on_select<P> || has_member_selects<P>),
                "kvsparse policy: the verb that chooses what a query reads is called select. Write: "
                "void select(HeadView<P> head, QueryGroup queries, Selection& selection) const;");
  static_assert(!(has_member_observed<P> || has_member_on_observe<P> || has_member_on_attend<P>),
                "kvsparse policy: the verb that receives page masses is called observe. Write: "
                "void observe(HeadView<P> head, const Evidence& evidence) const;");
  static_assert(!(has_member_append<P> || has_member_on_token<P>),
                "kvsparse policy: the verb for a stored token is called on_append. Write: "
                "void on_append(HeadView<P> head, PageIndex page, Slot slot) const;");
  static_assert(!(has_member_on_open<P> || has_member_on_page_opened<P>),
                "kvsparse policy: the verb for a new page is called on_page_open. Write: "
                "void on_page_open(HeadView<P> head, PageIndex page) const;");
  static_assert(!(has_member_on_full<P> || has_member_on_page_close<P>),
                "kvsparse policy: the verb for a filled page is called on_page_full. Write: "
                "void on_page_full(HeadView<P> head, PageIndex page) const;");
  static_assert(!(has_member_on_prefill_end<P> || has_member_prompt_end<P>),
                "kvsparse policy: the verb for the end of the prompt is called on_prompt_end. Write: "
                "void on_prompt_end(HeadView<P> head) const;");
  static_assert(!has_member_clear<P>,
                "kvsparse policy: the verb for an emptied head is called on_clear. Write: "
                "void on_clear(HeadView<P> head) const;");
  static_assert(!has_member_on_evicted<P>,
                "kvsparse policy: the verb for a page about to be given up is called on_evict. Write: "
                "void on_evict(HeadView<P> head, PageIndex page) const;");
  static_assert(!(has_member_step_end<P> || has_member_on_step<P>),
                "kvsparse policy: the verb for the end of a layer's step is called on_step_end. Write: "
                "void on_step_end(LayerView<P> layer) const;");
  static_assert(!(has_member_pin_prompts<P> || has_member_pins_prompt<P>),
                "kvsparse policy: the trait is called pin_prompt. Write: static constexpr bool pin_prompt = true; or "
                "bool pin_prompt() const;");
  static_assert(!(has_member_summary<P> || has_member_summaries<P>),
                "kvsparse policy: the trait is called page_summary. Write: "
                "static constexpr PageSummary page_summary = PageSummary::min_max;");
  static_assert(!has_member_page_state<P>,
                "kvsparse policy: a page's state is a nested type. Write: struct PageState { ... };");
  static_assert(!has_member_pinned<P>,
                "kvsparse policy: the number of pages pinned from the start is called pinned_pages. Write: "
                "std::size_t pinned_pages(const Geometry& geometry) const;");

  // --- wrong signatures ---
  static_assert(!has_member_victim<P> || traits::scope<P>() != PolicyScope::kv_head || HeadEvictor<P>,
                "kvsparse policy: victim has the wrong signature. Write: PageIndex victim(HeadView<P> head) const; or, "
                "for PageIndex victim(LayerView<P> layer) const, also: static constexpr PolicyScope scope = "
                "PolicyScope::layer; for HeadPage victim(LayerView<P> layer) const: PolicyScope::shared_budget;");
  static_assert(!has_member_victim<P> || traits::scope<P>() != PolicyScope::layer || LayerEvictor<P>,
                "kvsparse policy: victim of a layer-scoped policy has the wrong signature. Write: "
                "PageIndex victim(LayerView<P> layer) const;");
  static_assert(!has_member_victim<P> || traits::scope<P>() != PolicyScope::shared_budget || SharedBudgetEvictor<P>,
                "kvsparse policy: victim of a policy whose heads share a budget has the wrong signature. Write: "
                "HeadPage victim(LayerView<P> layer) const;");
  static_assert(!has_member_trim<P> || Trimmer<P>,
                "kvsparse policy: trim has the wrong signature. Write: "
                "void trim(HeadView<P> head, PageList& pages) const;");
  static_assert(!has_member_select<P> || Selector<P>,
                "kvsparse policy: select has the wrong signature. Write: "
                "void select(HeadView<P> head, QueryGroup queries, Selection& selection) const;");
  static_assert(!has_member_select_more<P> || RepeatedSelector<P>,
                "kvsparse policy: select_more has the wrong signature. Write: void select_more(HeadView<P> head, "
                "QueryGroup queries, std::span<const SoftmaxState> states, Selection& selection) const;");
  static_assert(!has_member_observe<P> || Observer<P>,
                "kvsparse policy: observe has the wrong signature. Write: "
                "void observe(HeadView<P> head, const Evidence& evidence) const;");
  static_assert(
      !has_member_on_step_end<P> || StepObserver<P>,
      "kvsparse policy: on_step_end has the wrong signature. Write: void on_step_end(LayerView<P> layer) const;");
  static_assert(!has_member_on_page_open<P> || PageOpenListener<P>,
                "kvsparse policy: on_page_open has the wrong signature. Write: "
                "void on_page_open(HeadView<P> head, PageIndex page) const;");
  static_assert(!has_member_on_append<P> || AppendListener<P>,
                "kvsparse policy: on_append has the wrong signature. Write: "
                "void on_append(HeadView<P> head, PageIndex page, Slot slot) const;");
  static_assert(!has_member_on_page_full<P> || PageFullListener<P>,
                "kvsparse policy: on_page_full has the wrong signature. Write: "
                "void on_page_full(HeadView<P> head, PageIndex page) const;");
  static_assert(
      !has_member_on_prompt_end<P> || PromptEndListener<P>,
      "kvsparse policy: on_prompt_end has the wrong signature. Write: void on_prompt_end(HeadView<P> head) const;");
  static_assert(!has_member_on_clear<P> || ClearListener<P>,
                "kvsparse policy: on_clear has the wrong signature. Write: void on_clear(HeadView<P> head) const;");
  static_assert(!has_member_on_evict<P> || EvictListener<P>,
                "kvsparse policy: on_evict has the wrong signature. Write: "
                "void on_evict(HeadView<P> head, PageIndex page) const;");
  static_assert(!has_member_residual<P> || ResidualProvider<P>,
                "kvsparse policy: residual has the wrong signature. Write: void residual(HeadView<P> head, QueryGroup "
                "queries, std::span<SoftmaxState> states) const;");
  static_assert(!has_member_pinned_pages<P> || Pinner<P>,
                "kvsparse policy: pinned_pages has the wrong signature. Write: "
                "std::size_t pinned_pages(const Geometry& geometry) const;");
  static_assert(
      !has_member_pages_used<P> || UseCounter<P>,
      "kvsparse policy: pages_used has the wrong signature. Write: PagesUsed pages_used(HeadView<P> head) const;");
  static_assert(!has_member_options<P> || HasOptions<P>,
                "kvsparse policy: options cannot be visited. Write: struct Options { ...; void visit(auto&& field) { "
                "field(\"alpha\", alpha); } } options;");

  // --- a trait of the wrong type, or a function that is not const, would silently count as absent ---
  static_assert(
      !has_member_scope<P> ||
          requires {
            { P::scope } -> std::convertible_to<PolicyScope>;
          },
      "kvsparse policy: the trait scope has the wrong type. Write: static constexpr PolicyScope scope = "
      "PolicyScope::layer;");
  static_assert(
      !has_member_granularity<P> ||
          requires {
            { P::granularity } -> std::convertible_to<PolicyGranularity>;
          },
      "kvsparse policy: the trait granularity has the wrong type. Write: static constexpr PolicyGranularity "
      "granularity = PolicyGranularity::token;");
  static_assert(
      !has_member_reads_rows<P> ||
          requires {
            { P::reads_rows } -> std::convertible_to<bool>;
          },
      "kvsparse policy: the trait reads_rows has the wrong type. Write: static constexpr bool reads_rows = true;");
  static_assert(
      !has_member_knows_logits<P> ||
          requires {
            { P::knows_logits } -> std::convertible_to<bool>;
          },
      "kvsparse policy: the trait knows_logits has the wrong type. Write: static constexpr bool knows_logits = true;");
  static_assert(has_trait_selection<P, SelectionScope>,
                "kvsparse policy: the trait selection has the wrong type. Write: static constexpr SelectionScope "
                "selection = SelectionScope::query_head; or SelectionScope selection() const;");
  static_assert(has_trait_evidence<P, EvidenceKind>,
                "kvsparse policy: the trait evidence has the wrong type. Write: static constexpr EvidenceKind evidence "
                "= EvidenceKind::page_mass; or EvidenceKind evidence() const;");
  static_assert(has_trait_query_window<P, std::size_t>,
                "kvsparse policy: the trait query_window has the wrong type. Write: static constexpr std::size_t "
                "query_window = 8; or std::size_t query_window() const;");
  static_assert(has_trait_page_summary<P, PageSummary>,
                "kvsparse policy: the trait page_summary has the wrong type. Write: static constexpr PageSummary "
                "page_summary = PageSummary::min_max; or PageSummary page_summary() const;");
  static_assert(has_trait_slack_tokens<P, std::size_t>,
                "kvsparse policy: the trait slack_tokens has the wrong type. Write: static constexpr std::size_t "
                "slack_tokens = 128; or std::size_t slack_tokens() const;");
  static_assert(has_trait_period<P, std::size_t>,
                "kvsparse policy: the trait period has the wrong type. Write: static constexpr std::size_t period = "
                "128; or std::size_t period() const;");
  static_assert(has_trait_pin_prompt<P, bool>,
                "kvsparse policy: the trait pin_prompt has the wrong type. Write: static constexpr bool pin_prompt = "
                "true; or bool pin_prompt() const;");

  static_assert(has_trait_in_cache_positions<P, bool>,
                "kvsparse policy: the trait in_cache_positions has the wrong type. Write: static constexpr bool "
                "in_cache_positions = true; or bool in_cache_positions() const;");
  static_assert(has_trait_budget_floor<P, double>,
                "kvsparse policy: the trait budget_floor has the wrong type. Write: static constexpr double "
                "budget_floor = 0.2; or double budget_floor() const;");

  // --- a trait that promises a verb, a verb that needs a trait ---
  template <class T>
  static constexpr bool promises = has_member_evidence<T>;
  static_assert(!promises<P> || has_member_observe<P>,
                "kvsparse policy: the trait evidence promises a verb that is missing. If its name is not misspelt, "
                "write: void observe(HeadView<P> head, const Evidence& evidence) const; or remove the trait.");
  static_assert(promises<P> || !has_member_observe<P>,
                "kvsparse policy: observe needs evidence. Write: "
                "static constexpr EvidenceKind evidence = EvidenceKind::page_mass;");
  static_assert(!has_member_period<P> || has_member_trim<P>,
                "kvsparse policy: the trait period promises a verb that is missing. Write: "
                "void trim(HeadView<P> head, PageList& pages) const; or remove the trait.");
  static_assert(!has_member_slack_tokens<P> || has_member_trim<P>,
                "kvsparse policy: the trait slack_tokens is for a policy that trims. Write: "
                "void trim(HeadView<P> head, PageList& pages) const; or remove the trait.");
  static_assert(!has_member_trim<P> || has_member_victim<P>,
                "kvsparse policy: trim alone cannot keep the budget between its calls. Write also: "
                "PageIndex victim(HeadView<P> head) const;");
  static_assert(
      !has_member_trim<P> || traits::scope<P>() == PolicyScope::kv_head,
      "kvsparse policy: trim works head by head, but under this scope heads evict together. Remove trim, or the trait "
      "scope.");
  static_assert(!has_member_select_more<P> || has_member_select<P>,
                "kvsparse policy: select_more continues a selection. Write also: "
                "void select(HeadView<P> head, QueryGroup queries, Selection& selection) const;");
  static_assert(!has_member_on_step_end<P> || traits::scope<P>() != PolicyScope::kv_head,
                "kvsparse policy: on_step_end is for policies of layer scope. Write: "
                "static constexpr PolicyScope scope = PolicyScope::layer;");
  static_assert(traits::scope<P>() != PolicyScope::layer || has_member_victim<P>,
                "kvsparse policy: scope = layer promises a shared victim. Write: "
                "PageIndex victim(LayerView<P> layer) const; or remove the trait.");
  static_assert(traits::scope<P>() != PolicyScope::shared_budget || has_member_victim<P>,
                "kvsparse policy: scope = shared_budget promises a victim of any head. Write: "
                "HeadPage victim(LayerView<P> layer) const; or remove the trait.");
  static_assert(!has_member_budget_floor<P> || traits::scope<P>() == PolicyScope::shared_budget,
                "kvsparse policy: the trait budget_floor is for heads that share a budget. Write: "
                "static constexpr PolicyScope scope = PolicyScope::shared_budget; or remove the trait.");
  static_assert(!has_member_selection<P> || has_member_select<P>,
                "kvsparse policy: the trait selection promises a verb that is missing. Write: "
                "void select(HeadView<P> head, QueryGroup queries, Selection& selection) const; or remove the trait.");
  static_assert(!has_member_pin_prompt<P> || has_member_victim<P>,
                "kvsparse policy: pin_prompt protects the prompt from a victim that does not exist. Write: "
                "PageIndex victim(HeadView<P> head) const; or remove the trait.");
};

/// A composition has every verb that its parts may have; the parts are what was written by hand.
template <class Evict, class Select>
struct ContractCheck<Compose<Evict, Select>> {
  static constexpr ContractCheck<Evict> evict{};
  static constexpr ContractCheck<Select> select{};
};

}  // namespace kvsparse::detail
