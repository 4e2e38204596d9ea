// SPDX-License-Identifier: Apache-2.0
//
// Every mistake that policy/contract_check.hpp knows, made once in each way. check_mistakes.py compiles this file,
// which must fail, and looks for the sentence that stands behind EXPECT in the output that belongs to the struct. A
// sentence stands here up to the point where no other begins alike.
#include <string>

#include "kvsparse/policy/contract_check.hpp"
#include "kvsparse/policy/quest.hpp"
#include "kvsparse/policy/raas.hpp"

#if defined(IN_THE_CONTAINER)
#include "kvsparse/cache/attend.hpp"
#endif

namespace mistakes {

using namespace kvsparse;

struct Named {
  static constexpr std::string_view name = "mistaken";
};
template <class P>
struct Evicting : Named {
  PageIndex victim(HeadView<P>) const { return {}; }
};

// EXPECT a policy is a copyable class that is not final.
struct NotCopyable : Named {
  NotCopyable() = default;
  NotCopyable(const NotCopyable&) = delete;
};
// EXPECT a policy is a copyable class that is not final. AND MORE
struct Final final : Named {};
// EXPECT the name is missing.
struct Nameless {};
// EXPECT the name is missing.
struct NumberedName {
  static constexpr int name = 7;
};
// EXPECT PageState, HeadState and LayerState must be trivially copyable
struct PageStateOwns : Named {
  struct PageState {
    std::string text;
  };
};
// EXPECT PageState, HeadState and LayerState must be trivially copyable
struct HeadStateOwns : Named {
  struct HeadState {
    std::string text;
  };
};
// EXPECT PageState, HeadState and LayerState must be trivially copyable
struct LayerStateOwns : Named {
  struct LayerState {
    std::string text;
  };
};

// --- near misses ---

#define NEAR_MISS(Struct, member) \
  struct Struct : Named {         \
    void member() const {}        \
  }

// EXPECT the verb that names the page to give up is called victim.
NEAR_MISS(Evict, evict);
// EXPECT the verb that names the page to give up is called victim.
NEAR_MISS(ChooseVictim, choose_victim);
// EXPECT the verb that names the page to give up is called victim.
NEAR_MISS(SelectVictim, select_victim);
// EXPECT the verb that names the page to give up is called victim.
NEAR_MISS(PickVictim, pick_victim);
// EXPECT the verb that names the page to give up is called victim.
NEAR_MISS(Victims, victims);
// EXPECT the verb that names the page to give up is called victim.
NEAR_MISS(OnVictim, on_victim);
// EXPECT the verb that chooses what a query reads is called select.
NEAR_MISS(SelectPages, select_pages);
// EXPECT the verb that chooses what a query reads is called select.
NEAR_MISS(OnSelect, on_select);
// EXPECT the verb that chooses what a query reads is called select.
NEAR_MISS(Selects, selects);
// EXPECT the verb that receives page masses is called observe.
NEAR_MISS(Observed, observed);
// EXPECT the verb that receives page masses is called observe.
NEAR_MISS(OnObserve, on_observe);
// EXPECT the verb that receives page masses is called observe.
NEAR_MISS(OnAttend, on_attend);
// EXPECT the verb for a stored token is called on_append.
NEAR_MISS(Append, append);
// EXPECT the verb for a stored token is called on_append.
NEAR_MISS(OnToken, on_token);
// EXPECT the verb for a new page is called on_page_open.
NEAR_MISS(OnOpen, on_open);
// EXPECT the verb for a new page is called on_page_open.
NEAR_MISS(OnPageOpened, on_page_opened);
// EXPECT the verb for a filled page is called on_page_full.
NEAR_MISS(OnFull, on_full);
// EXPECT the verb for a filled page is called on_page_full.
NEAR_MISS(OnPageClose, on_page_close);
// EXPECT the verb for the end of the prompt is called on_prompt_end.
NEAR_MISS(OnPrefillEnd, on_prefill_end);
// EXPECT the verb for the end of the prompt is called on_prompt_end.
NEAR_MISS(PromptEnd, prompt_end);
// EXPECT the verb for an emptied head is called on_clear.
NEAR_MISS(Clear, clear);
// EXPECT the verb for a page about to be given up is called on_evict.
NEAR_MISS(OnEvicted, on_evicted);
// EXPECT the verb for the end of a layer's step is called on_step_end.
NEAR_MISS(StepEnd, step_end);
// EXPECT the verb for the end of a layer's step is called on_step_end.
NEAR_MISS(OnStep, on_step);
// EXPECT the trait is called pin_prompt.
NEAR_MISS(PinPrompts, pin_prompts);
// EXPECT the trait is called pin_prompt.
NEAR_MISS(PinsPrompt, pins_prompt);
// EXPECT the trait is called page_summary.
NEAR_MISS(Summary, summary);
// EXPECT the trait is called page_summary.
NEAR_MISS(Summaries, summaries);
// EXPECT a page's state is a nested type.
NEAR_MISS(StateMember, page_state);
// EXPECT the number of pages pinned from the start is called pinned_pages.
NEAR_MISS(Pinned, pinned);

// --- wrong signatures ---

// EXPECT victim has the wrong signature.
struct VictimOfNothing : Named {
  PageIndex victim() const { return {}; }
};
// EXPECT victim has the wrong signature.
struct VictimNotConst : Named {
  PageIndex victim(HeadView<VictimNotConst>) { return {}; }
};
// EXPECT victim has the wrong signature.
struct VictimIsAnId : Named {
  PageId victim(HeadView<VictimIsAnId>) const { return {}; }
};
// EXPECT victim has the wrong signature.
struct VictimOfAnothersView : Named {
  PageIndex victim(HeadView<Raas>) const { return {}; }
};
// EXPECT victim of a layer-scoped policy has the wrong signature.
struct LayerVictim : Named {
  static constexpr PolicyScope scope = PolicyScope::layer;
  PageIndex victim(HeadView<LayerVictim>) const { return {}; }
};
// EXPECT victim of a policy whose heads share a budget has the wrong signature.
struct SharedBudgetVictim : Named {
  static constexpr PolicyScope scope = PolicyScope::shared_budget;
  PageIndex victim(LayerView<SharedBudgetVictim>) const { return {}; }
};
// EXPECT trim has the wrong signature.
struct Trim : Evicting<Trim> {
  void trim(HeadView<Trim>) const {}
};
// EXPECT select has the wrong signature.
struct Select : Named {
  void select(HeadView<Select>, Selection&) const {}
};
// EXPECT select has the wrong signature.
struct SelectNotConst : Named {
  void select(HeadView<SelectNotConst>, QueryGroup, Selection&) {}
};
// EXPECT select_more has the wrong signature.
struct SelectMore : Named {
  void select(HeadView<SelectMore>, QueryGroup, Selection&) const {}
  void select_more(HeadView<SelectMore>, QueryGroup, Selection&) const {}
};
// EXPECT observe has the wrong signature.
struct Observe : Named {
  static constexpr EvidenceKind evidence = EvidenceKind::page_mass;
  void observe(HeadView<Observe>) const {}
};
// EXPECT on_step_end has the wrong signature.
struct OnStepEnd : Named {
  static constexpr PolicyScope scope = PolicyScope::layer;
  PageIndex victim(LayerView<OnStepEnd>) const { return {}; }
  void on_step_end(HeadView<OnStepEnd>) const {}
};
// EXPECT on_page_open has the wrong signature.
struct OnPageOpen : Named {
  void on_page_open(HeadView<OnPageOpen>) const {}
};
// EXPECT on_append has the wrong signature.
struct OnAppend : Named {
  void on_append(HeadView<OnAppend>, Position) const {}
};
// EXPECT on_page_full has the wrong signature.
struct OnPageFull : Named {
  void on_page_full() const {}
};
// EXPECT on_prompt_end has the wrong signature.
struct OnPromptEnd : Named {
  void on_prompt_end(HeadView<OnPromptEnd>, Position) const {}
};
// EXPECT on_clear has the wrong signature.
struct OnClear : Named {
  void on_clear() const {}
};
// EXPECT on_evict has the wrong signature.
struct OnEvict : Named {
  void on_evict(HeadView<OnEvict>, Position) const {}
};
// EXPECT residual has the wrong signature.
struct Residual : Named {
  void residual(HeadView<Residual>, std::span<SoftmaxState>) const {}
};
// EXPECT pinned_pages has the wrong signature.
struct PinnedPages : Named {
  std::size_t pinned_pages() const { return 1; }
};
// EXPECT pages_used has the wrong signature.
struct PagesUsedDouble : Named {
  double pages_used(HeadView<PagesUsedDouble>) const { return 1.0; }
};
// EXPECT options cannot be visited.
struct OptionsWithoutVisit : Named {
  struct Options {
    int depth = 1;
  } options;
};

// --- traits of the wrong type ---

// EXPECT the trait scope has the wrong type.
struct ScopeAsFunction : Evicting<ScopeAsFunction> {
  PolicyScope scope() const { return PolicyScope::kv_head; }
};
// EXPECT the trait granularity has the wrong type.
struct GranularityAsFunction : Named {
  PolicyGranularity granularity() const { return PolicyGranularity::token; }
};
// EXPECT the trait selection has the wrong type.
struct SelectionNotConst : Named {
  SelectionScope selection() { return SelectionScope::query_head; }
  void select(HeadView<SelectionNotConst>, QueryGroup, Selection&) const {}
};
// EXPECT the trait evidence has the wrong type.
struct EvidenceIsTrue : Named {
  static constexpr bool evidence = true;
  void observe(HeadView<EvidenceIsTrue>, const Evidence&) const {}
};
// EXPECT the trait query_window has the wrong type.
struct WindowNotConst : Named {
  std::size_t query_window() { return 8; }
};
// EXPECT the trait page_summary has the wrong type.
struct SummaryIsTrue : Named {
  static constexpr bool page_summary = true;
};
// EXPECT the trait slack_tokens has the wrong type.
struct SlackNotConst : Evicting<SlackNotConst> {
  std::size_t slack_tokens() { return 8; }
  void trim(HeadView<SlackNotConst>, PageList&) const {}
};
// EXPECT the trait period has the wrong type.
struct PeriodNotConst : Evicting<PeriodNotConst> {
  std::size_t period() { return 8; }
  void trim(HeadView<PeriodNotConst>, PageList&) const {}
};
// EXPECT the trait pin_prompt has the wrong type.
struct PinPromptNotConst : Evicting<PinPromptNotConst> {
  bool pin_prompt() { return true; }
};
// EXPECT the trait in_cache_positions has the wrong type.
struct InCachePositionsNotConst : Evicting<InCachePositionsNotConst> {
  bool in_cache_positions() { return true; }
};
// EXPECT the trait budget_floor has the wrong type.
struct BudgetFloorNotConst : Named {
  static constexpr PolicyScope scope = PolicyScope::shared_budget;
  HeadPage victim(LayerView<BudgetFloorNotConst>) const { return {}; }
  double budget_floor() { return 0.5; }
};
// EXPECT the trait reads_rows has the wrong type.
struct ReadsRowsIsAsked : Named {
  bool reads_rows() const { return true; }
};

// EXPECT the trait knows_logits has the wrong type.
struct KnowsLogitsIsAsked : Named {
  bool knows_logits() const { return true; }
};

// --- promises ---

// EXPECT the trait evidence promises a verb that is missing.
struct EvidenceForNobody : Named {
  static constexpr EvidenceKind evidence = EvidenceKind::page_mass;
};
// EXPECT observe needs evidence.
struct ObserveWithoutEvidence : Named {
  void observe(HeadView<ObserveWithoutEvidence>, const Evidence&) const {}
};
// EXPECT the trait period promises a verb that is missing.
struct PeriodWithoutTrim : Evicting<PeriodWithoutTrim> {
  static constexpr std::size_t period = 8;
};
// EXPECT the trait slack_tokens is for a policy that trims.
struct SlackWithoutTrim : Evicting<SlackWithoutTrim> {
  static constexpr std::size_t slack_tokens = 8;
};
// EXPECT trim alone cannot keep the budget between its calls.
struct TrimWithoutVictim : Named {
  void trim(HeadView<TrimWithoutVictim>, PageList&) const {}
};
// EXPECT select_more continues a selection.
struct SelectMoreOfNothing : Named {
  void select_more(HeadView<SelectMoreOfNothing>, QueryGroup, std::span<const SoftmaxState>, Selection&) const {}
};
// EXPECT on_step_end is for policies of layer scope.
struct StepEndOfAHead : Named {
  void on_step_end(LayerView<StepEndOfAHead>) const {}
};
// EXPECT trim works head by head, but under this scope heads evict together.
struct TrimOfALayer : Named {
  static constexpr PolicyScope scope = PolicyScope::layer;
  PageIndex victim(LayerView<TrimOfALayer>) const { return {}; }
  void trim(HeadView<TrimOfALayer>, PageList&) const {}
};
// EXPECT scope = layer promises a shared victim.
struct LayerWithoutVictim : Named {
  static constexpr PolicyScope scope = PolicyScope::layer;
};
// EXPECT scope = shared_budget promises a victim of any head.
struct SharedBudgetWithoutVictim : Named {
  static constexpr PolicyScope scope = PolicyScope::shared_budget;
};
// EXPECT the trait budget_floor is for heads that share a budget.
struct FloorOfAHead : Evicting<FloorOfAHead> {
  static constexpr double budget_floor = 0.5;
};
// EXPECT the trait selection promises a verb that is missing.
struct SelectionWithoutSelect : Named {
  static constexpr SelectionScope selection = SelectionScope::query_head;
};
// EXPECT pin_prompt protects the prompt from a victim that does not exist.
struct PinWithoutVictim : Named {
  static constexpr bool pin_prompt = true;
};

// --- compositions ---

// EXPECT the first part of Compose must evict
struct NotAnEvictor : Named {};
// EXPECT the first part of Compose must not select
struct SelectsToo : Evicting<SelectsToo> {
  void select(kvsparse::HeadView<SelectsToo>, kvsparse::QueryGroup, kvsparse::Selection&) const {}
};
// EXPECT the second part of Compose must select and not evict
struct NotASelector : Named {};

}  // namespace mistakes

#if defined(IN_THE_CONTAINER)
template <class P>
void use() {
  kvsparse::PagedKvCache<P> cache(kvsparse::CacheConfig{}, P{});
  static_cast<void>(cache.stats());
}
#define MISTAKE(Struct) template void use<mistakes::Struct>();
#else
#define MISTAKE(Struct) template struct kvsparse::detail::ContractCheck<mistakes::Struct>;
#endif
#include "mistakes.inc"

#if !defined(IN_THE_CONTAINER)
constexpr std::size_t first_part = sizeof(kvsparse::Compose<mistakes::NotAnEvictor, kvsparse::Quest>);
constexpr std::size_t selecting_part = sizeof(kvsparse::Compose<mistakes::SelectsToo, kvsparse::Quest>);
constexpr std::size_t second_part = sizeof(kvsparse::Compose<kvsparse::Raas, mistakes::NotASelector>);
#endif
