// SPDX-License-Identifier: Apache-2.0
//
// clang-format off
// The policy contract. A policy is a small copyable struct: its verbs decide, its traits say what they need. The container
// owns all state, calls the verbs and moves the pages. Only `name` is required; what is absent costs nothing. Verbs are const
// members and take views by value; none may allocate, throw or lock. testing/policy_conformance.hpp tests a policy for all this.
//
// State, Options
//   PageState, HeadState, LayerState   trivially copyable structs, by default none. A page's is value-initialised when it is
//                                      opened, all are when the cache is emptied; the container moves, forks, takes back and
//                                      saves them. With any, or a query_window, truncate() goes back no further than drafts.
//   struct Options { double alpha = .1; void visit(auto&& field) { field("alpha", alpha); } } options;
//                                      bools, numbers and enums, named once: command lines set them (--set alpha=.2), snapshots
//                                      store them. May have std::string problem() const, a sentence if a value is out of range,
//                                      and bool preset(std::string_view) with static constexpr std::string_view presets = "a|b".
//                                      Of an enum E the policy has static constexpr std::string_view names_of(E): "a|b" again.
//
// Verbs: H is HeadView<P> head, L is LayerView<P> layer, of the policy P. A token: victim, on_page_open, on_append,
// on_page_full. A query: select, select_more, residual, observe for each head; then on_step_end.
//   verb                               called                                           may                      absent
//   on_page_open(H, PageIndex)         a page was opened, still empty                   write state              -
//   on_append(H, PageIndex, Slot)      a token was stored                               write state              -
//   on_page_full(H, PageIndex)         its last slot was stored                         write state              -
//   on_prompt_end(H)                   once, before the first decode token              write state              -
//   on_clear(H)                        the head was emptied                             write state              -
//   select(H, QueryGroup, Selection&)  a query came, and more pages are resident than   add pages to read, in    all is read
//                                      read_page_budget()                               part or weighted
//   select_more(H, QueryGroup,         those pages were read: the softmax so far;       add more pages           they suffice
//     span<const SoftmaxState>,        again until it adds nothing
//     Selection&)
//   residual(H, QueryGroup,            all was read                                     merge what stands for    what is gone
//     span<SoftmaxState>)                                                               evicted tokens           is gone
//   observe(H, const Evidence&)        the query attended                               write state              -
//   on_step_end(L)                     all heads observed (scope not kv_head)           write state              -
//   PageIndex victim(H)                a page is to be opened while page_budget() are   write state; name one    all is kept,
//   PageIndex victim(L)                resident (scope kv_head; scope layer: one page   evictable page, which    to max_tokens
//   HeadPage victim(L)                 index for every head; scope shared_budget: a     is lost
//                                      page of any head that may_give() one, as often
//                                      as there are heads)
//   trim(H, PageList&)                 the prompt ended, and every `period` decode      write state; add evict-  -
//                                      steps (scope kv_head; needs victim too)          able pages, to be lost
//   on_evict(H, PageIndex)             a page goes; its rows can still be loaded        write state              -
//   size_t pinned_pages(const          at construction                                  answer how many first    0
//     Geometry&)                                                                        pages are no victims
//   string problem(const Geometry&)    at construction                                  refuse a shape, in a     any shape
//                                                                                       sentence
//   PagesUsed pages_used(H)            by stats()                                       count                    NaN in stats()
//
// Traits: static constexpr members, or (*) const member functions of the same name where an option decides
//   trait                values: the default first       what it is for, and costs
//   name                 required                        "my_policy", on command lines
//   scope                PolicyScope::kv_head, layer,    layer: all heads of a layer evict the same positions, one victim for
//                        shared_budget                   all. shared_budget: they hold kv_heads * page_budget() pages together,
//                                                        each as many as victim leaves it; tables of each have room for that
//   budget_floor       * 0, up to 1                      scope shared_budget: share of page_budget() that each head is left with
//   granularity          PolicyGranularity::page, token  select may read part of a page: a bit a token; page lists refuse it
//   select_always        false, true                     select is called below the read budget too: there Dense's bits are lost
//   selection          * SelectionScope::kv_head,        select is called for each query head by itself: a page may be loaded
//                        query_head                      once for each of a group
//   evidence           * EvidenceKind::none, page_mass,  what observe needs; | joins them. page_mass, largest_token_mass: some
//                        largest_token_mass,             floats a page and query head; token_weights: page_size floats more,
//                        token_weights                   and a prompt's queries go one by one
//   query_window       * 0, queries                      recent queries kept for recent_queries(): so many rows a query head
//   page_summary       * PageSummary::none, min_max,     bounds of a page's keys, two rows a page; or their mean, one of floats
//                        mean
//   reads_rows           false, true                     load_key or load_value is called: an engine must lend its rows
//   knows_logits         false, true                     scores keys as logits() says (MassBounds does), not by dot products
//                                                        alone: windows, ALiBi and soft caps are no reason to refuse it
//   period             * 0, decode steps                 between two calls of trim
//   slack_tokens       * 0, tokens                       trim aims so far below the budget: a smaller budget is refused
//   pin_prompt         * false, true                     pages with a prompt token are no victims: a prompt may be refused
//   in_cache_positions * false, true                     distances count resident tokens alone; not for policies that select.
//                                                        Needs the model's rope; one thread reads a head
//
// A victim is looked for while no page is open; the page filled last is an ordinary one. Evictable: neither pinned nor open.
// A chunk of a prompt is stored, victims and all, before its queries attend: victim meets pages that no query has seen, in the
// state they were opened with. Chunks of one token show it a long prompt token by token; pinned, none of it goes unseen.
// Of a page that a query did not read nothing is known, which is not zero: what a policy noted of it (a stamp, a last mass, a
// sum) stays as it was. Ages and decays go on. A mass is a share of what was read, so it is larger the more is left unread.
// With an executor, verbs of different heads run at the same time; those of one head never do, those that take L run alone.
// After rejected drafts state is set back, and the verbs that may write it are called again for what remains; select,
// select_more and residual are not.
// Random numbers are a hash of (seed, layer, kv_head, evictions()), so that they survive fork, rollback and snapshots.
//
// What the arguments offer (head_view.hpp, evidence.hpp, selection.hpp). A page is named by its place among the resident ones,
// a PageIndex, oldest first, valid within the verb: when an older page goes, states move along.
//   H          pages(), evictable_pages(), size(), state(page), head_state(), tokens(page), first_position(page), end(),
//              is_pinned(page), is_open(page), is_of_prompt(page), kv_head(), geometry(), page_budget(), read_page_budget()
//              lowest_evictable(score), ties to the oldest; visit_highest_evictable(scores, count, visit); evictions()
//              load_key(page, slot, row), load_value, load_mean_key, load_bounds, upper_bounds, recent_queries(age)
//              scratch(): floats to work with, where another program would allocate
//   L          heads(), head(kv_head), an H, O(1); layer_state(). Scope layer: one page index is the same positions in each head,
//              its state each head's own. Heads that share a budget: may_give(H), lowest_evictable
//   Evidence   visited(page), mass(page, query head of the group), group_mass(page): their sum, peak_mass(page): the largest,
//              log_sum_exp(query head), position(), is_prompt()
//   Selection  add(page), add({page, token mask, weights}), add_highest(scores, count), contains(page)
//   PageList   add(page)
//
// Where to start from in policy/: observe H2o, Raas, Lrfu; one victim for all heads Tova, one budget AdaKv. Keys and values as
// they come KeyNorm, ValueAware. trim LazyEviction; votes of recent queries SnapKv, RKv. on_evict with weights Clustered, with
// residual StreamingSketch. select Quest, HierarchicalTopK; tokens HashAttention; a threshold HalfSpace; select_more Certified.
// Token-level papers are exact at page_size 1; at larger pages a page's score is the summed mass of its tokens.
// clang-format on
#pragma once

#include <concepts>
#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>

#include "../core/softmax_state.hpp"
#include "../memory/page_summary.hpp"
#include "evidence.hpp"
#include "head_view.hpp"
#include "selection.hpp"

namespace kvsparse {

/// Trait scope: what evicts together, or out of one budget.
enum class PolicyScope { kv_head, layer, shared_budget };
/// Trait granularity: what select may leave out.
enum class PolicyGranularity { page, token };
/// Trait selection: whose queries read together.
enum class SelectionScope { kv_head, query_head };

/// Of `judged` pages looked at since the last clear, `used` were found used.
struct PagesUsed {
  std::uint64_t used = 0;    ///< of them
  std::uint64_t judged = 0;  ///< pages, once for each step that judged them
};

// The verbs as concepts, for a policy author to static_assert on.

template <class P>
concept HeadEvictor = requires(const P policy, HeadView<P> head) {
  { policy.victim(head) } -> std::same_as<PageIndex>;
};
template <class P>
concept LayerEvictor = requires(const P policy, LayerView<P> layer) {
  { policy.victim(layer) } -> std::same_as<PageIndex>;
};
/// Gives up pages, so that a budget caps what is resident.
template <class P>
concept SharedBudgetEvictor = requires(const P policy, LayerView<P> layer) {
  { policy.victim(layer) } -> std::same_as<HeadPage>;
};
template <class P>
concept Evictor = HeadEvictor<P> || LayerEvictor<P> || SharedBudgetEvictor<P>;
template <class P>
concept Trimmer = requires(const P policy, HeadView<P> head, PageList& pages) {
  policy.trim(head, pages);
};
template <class P>
concept Selector = requires(const P policy, HeadView<P> head, QueryGroup queries, Selection& selection) {
  policy.select(head, queries, selection);
};
template <class P>
concept RepeatedSelector = requires(const P policy, HeadView<P> head, QueryGroup queries,
                                    std::span<const SoftmaxState> states, Selection& selection) {
  policy.select_more(head, queries, states, selection);
};
template <class P>
concept Observer = requires(const P policy, HeadView<P> head, const Evidence& evidence) {
  policy.observe(head, evidence);
};
template <class P>
concept StepObserver = requires(const P policy, LayerView<P> layer) {
  policy.on_step_end(layer);
};
template <class P>
concept PageOpenListener = requires(const P policy, HeadView<P> head, PageIndex page) {
  policy.on_page_open(head, page);
};
template <class P>
concept AppendListener = requires(const P policy, HeadView<P> head, PageIndex page, Slot slot) {
  policy.on_append(head, page, slot);
};
template <class P>
concept PageFullListener = requires(const P policy, HeadView<P> head, PageIndex page) {
  policy.on_page_full(head, page);
};
template <class P>
concept PromptEndListener = requires(const P policy, HeadView<P> head) {
  policy.on_prompt_end(head);
};
template <class P>
concept ClearListener = requires(const P policy, HeadView<P> head) {
  policy.on_clear(head);
};
template <class P>
concept EvictListener = requires(const P policy, HeadView<P> head, PageIndex page) {
  policy.on_evict(head, page);
};
template <class P>
concept ResidualProvider = requires(const P policy, HeadView<P> head, QueryGroup queries,
                                    std::span<SoftmaxState> states) {
  policy.residual(head, queries, states);
};
template <class P>
concept Pinner = requires(const P policy, const Geometry& geometry) {
  { policy.pinned_pages(geometry) } -> std::same_as<std::size_t>;
};
template <class P>
concept UseCounter = requires(const P policy, HeadView<P> head) {
  { policy.pages_used(head) } -> std::same_as<PagesUsed>;
};
/// Has options that can be set by name.
template <class P>
concept HasOptions = requires(P policy) {
  policy.options.visit([](std::string_view, auto&) {});
};

/// A policy's traits as the container asks for them: what the policy says, or the contract's default.
namespace traits {

template <class P>
constexpr PolicyScope scope() {
  if constexpr (requires { P::scope; }) {
    return P::scope;
  } else {
    return PolicyScope::kv_head;
  }
}
template <class P>
constexpr PolicyGranularity granularity() {
  if constexpr (requires { P::granularity; }) {
    return P::granularity;
  } else {
    return PolicyGranularity::page;
  }
}
template <class P>
constexpr bool select_always() {
  if constexpr (requires {
                  { P::select_always } -> std::convertible_to<bool>;
                }) {
    return P::select_always;
  } else {
    return false;
  }
}
template <class P>
constexpr bool reads_rows() {
  if constexpr (requires {
                  { P::reads_rows } -> std::convertible_to<bool>;
                }) {
    return P::reads_rows;
  } else {
    return false;
  }
}
template <class P>
constexpr bool knows_logits() {
  if constexpr (requires {
                  { P::knows_logits } -> std::convertible_to<bool>;
                }) {
    return P::knows_logits;
  } else {
    return false;
  }
}

// The others may depend on an option, so they are asked of the policy object.
template <class P>
constexpr SelectionScope selection(const P& policy) {
  if constexpr (requires {
                  { policy.selection() } -> std::same_as<SelectionScope>;
                }) {
    return policy.selection();
  } else if constexpr (requires {
                         { P::selection } -> std::convertible_to<SelectionScope>;
                       }) {
    return P::selection;
  } else {
    return SelectionScope::kv_head;
  }
}
template <class P>
constexpr EvidenceKind evidence(const P& policy) {
  if constexpr (requires {
                  { policy.evidence() } -> std::same_as<EvidenceKind>;
                }) {
    return policy.evidence();
  } else if constexpr (requires {
                         { P::evidence } -> std::convertible_to<EvidenceKind>;
                       }) {
    return P::evidence;
  } else {
    return EvidenceKind::none;
  }
}
template <class P>
constexpr std::size_t query_window(const P& policy) {
  if constexpr (requires {
                  { policy.query_window() } -> std::convertible_to<std::size_t>;
                }) {
    return policy.query_window();
  } else if constexpr (requires {
                         { P::query_window } -> std::convertible_to<std::size_t>;
                       }) {
    return P::query_window;
  } else {
    return 0;
  }
}
template <class P>
constexpr PageSummary page_summary(const P& policy) {
  if constexpr (requires {
                  { policy.page_summary() } -> std::same_as<PageSummary>;
                }) {
    return policy.page_summary();
  } else if constexpr (requires {
                         { P::page_summary } -> std::convertible_to<PageSummary>;
                       }) {
    return P::page_summary;
  } else {
    return PageSummary::none;
  }
}
template <class P>
constexpr std::size_t slack_tokens(const P& policy) {
  if constexpr (requires {
                  { policy.slack_tokens() } -> std::convertible_to<std::size_t>;
                }) {
    return policy.slack_tokens();
  } else if constexpr (requires {
                         { P::slack_tokens } -> std::convertible_to<std::size_t>;
                       }) {
    return P::slack_tokens;
  } else {
    return 0;
  }
}
template <class P>
constexpr std::size_t period(const P& policy) {
  if constexpr (requires {
                  { policy.period() } -> std::convertible_to<std::size_t>;
                }) {
    return policy.period();
  } else if constexpr (requires {
                         { P::period } -> std::convertible_to<std::size_t>;
                       }) {
    return P::period;
  } else {
    return 0;
  }
}
template <class P>
constexpr bool pin_prompt(const P& policy) {
  if constexpr (requires {
                  { policy.pin_prompt() } -> std::convertible_to<bool>;
                }) {
    return policy.pin_prompt();
  } else if constexpr (requires {
                         { P::pin_prompt } -> std::convertible_to<bool>;
                       }) {
    return P::pin_prompt;
  } else {
    return false;
  }
}
template <class P>
constexpr bool in_cache_positions(const P& policy) {
  if constexpr (requires {
                  { policy.in_cache_positions() } -> std::convertible_to<bool>;
                }) {
    return policy.in_cache_positions();
  } else if constexpr (requires {
                         { P::in_cache_positions } -> std::convertible_to<bool>;
                       }) {
    return P::in_cache_positions;
  } else {
    return false;
  }
}
template <class P>
constexpr double budget_floor(const P& policy) {
  if constexpr (requires {
                  { policy.budget_floor() } -> std::convertible_to<double>;
                }) {
    return policy.budget_floor();
  } else if constexpr (requires {
                         { P::budget_floor } -> std::convertible_to<double>;
                       }) {
    return P::budget_floor;
  } else {
    return 0.0;
  }
}
template <class P>
constexpr std::size_t pinned_pages(const P& policy, const Geometry& geometry) {
  if constexpr (Pinner<P>) {
    return policy.pinned_pages(geometry);
  } else {
    return 0;
  }
}
/// A sentence on what is wrong with the policy's options; empty when nothing is.
template <class P>
std::string options_problem(const P& policy) {
  if constexpr (requires { typename P::EvictPart; }) {
    const std::string problem = options_problem(policy.evict);
    return problem.empty() ? options_problem(policy.select_part) : problem;
  } else if constexpr (requires {
                         { policy.options.problem() } -> std::convertible_to<std::string>;
                       }) {
    return policy.options.problem();
  } else {
    return {};
  }
}
/// A sentence on what of the geometry the policy cannot do; empty when it can do all of it.
template <class P>
std::string geometry_problem(const P& policy, const Geometry& geometry) {
  if constexpr (requires { typename P::EvictPart; }) {
    const std::string problem = geometry_problem(policy.evict, geometry);
    return problem.empty() ? geometry_problem(policy.select_part, geometry) : problem;
  } else if constexpr (requires {
                         { policy.problem(geometry) } -> std::convertible_to<std::string>;
                       }) {
    return policy.problem(geometry);
  } else {
    return {};
  }
}
}  // namespace traits

}  // namespace kvsparse
