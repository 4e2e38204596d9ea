// SPDX-License-Identifier: Apache-2.0
// A policy for an engine that keeps its keys and values itself, runs its own kernel, and owns its pages: only page ids,
// page lists and page masses cross. One layer of one sequence:
//
// clang-format off
//     PageSteering<Raas, Blocks> steering(config, blocks);           // the engine's allocator: acquire() and release()
//     steering.append([&](kv_head, page, slot) { ... });             // the token's rows go there
//     steering.select(q, lists);                                     // what the kernel shall read: page_lists.hpp
//     ... the engine's kernel ...
//     steering.observe(q, page_mass, log_sum_exp);                   // what it saw, for policies that want to know
// clang-format on
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "../cache/layer_pages.hpp"
#include "page_lists.hpp"

namespace kvsparse {

namespace detail {

/// Throws ConfigError where a policy asks for what cannot cross.
template <class Policy>
const Policy& check_steerable(const Policy& policy, const RowAccess& rows) {
  const std::string subject = "policy " + std::string(Policy::name);
  const EvidenceKind kinds = traits::evidence(policy);
  if (asks_for(kinds, EvidenceKind::largest_token_mass) || asks_for(kinds, EvidenceKind::token_weights)) {
    refuse(subject + " asks the kernel about single tokens; an engine's kernel brings back page masses alone");
  }
  if (traits::granularity<Policy>() == PolicyGranularity::token) {
    refuse(subject + " reads parts of pages, which page lists cannot say");
  }
  if (RepeatedSelector<Policy>) refuse(subject + " selects again while the kernel runs, which page lists cannot say");
  if (ResidualProvider<Policy>) refuse(subject + " adds to the kernel's sums, which an engine's kernel cannot do");
  if (traits::in_cache_positions(policy)) {
    refuse(subject +
           " counts positions in the cache, which takes a query rotated for each page; page lists cannot say it");
  }
  if (traits::reads_rows<Policy>() && (rows.load_key == nullptr || rows.load_value == nullptr)) {
    refuse(subject + " looks at stored keys or values; it needs RowAccess::load_key and load_value");
  }
  const PageSummary summary = traits::page_summary(policy);
  if (summary == PageSummary::min_max && (rows.load_bounds == nullptr || rows.upper_bounds == nullptr)) {
    refuse(subject + " looks at the bounds of pages; it needs RowAccess::load_bounds and upper_bounds");
  }
  if (summary == PageSummary::mean && rows.load_key_sum == nullptr) {
    refuse(subject + " looks at the mean keys of pages; it needs RowAccess::load_key_sum");
  }
  return policy;
}

}  // namespace detail

/// RowAccess::upper_bounds of an engine whose RowAccess::load_bounds is `load_bounds`. O(pages * group * head_dim).
template <auto load_bounds>
void upper_bounds_from(const void* store, std::span<const ResidentPage> pages, const QueryGroup& queries,
                       BoundPooling pooling, std::span<float> scratch, std::span<float> bounds) {
  const std::span<float> lowest = scratch.first(queries.head_dim);
  const std::span<float> highest = scratch.subspan(queries.head_dim, queries.head_dim);
  for (std::size_t page = 0; page < pages.size(); ++page) {
    load_bounds(store, pages[page].page, lowest, highest);
    for (std::size_t q = 0; q < queries.size; ++q) {
      float bound = 0.0F;
      for (std::size_t i = 0; i < queries.head_dim; ++i) {
        bound += std::max(queries[q][i] * lowest[i], queries[q][i] * highest[i]);
      }
      float& result = bounds[pooling == BoundPooling::max ? page : page * queries.size + q];
      result = pooling == BoundPooling::max && q > 0 ? std::max(result, bound) : bound;
    }
  }
}

/// For an engine whose pages hold all kv heads of a layer (vLLM's blocks): a page is taken once, for all heads, and
/// given back when the last head lets go of it. Where heads decide alike that is at once; else up to kv_heads times as
/// many pages are taken as a head may hold. Not for use by several threads at a time.
template <PageOwner Owner>
class PagesOfAllHeads {
 public:
  /// `owner` must outlive it and hands out ids below `page_count`.
  PagesOfAllHeads(Owner& owner, std::size_t kv_heads, std::size_t page_count)
      : owner_(&owner), kv_heads_(kv_heads), heads_holding_(page_count) {}

  /// The next head's page: the owner's for the first of kv_heads calls, the same for the others.
  PageId acquire() {
    if (heads_served_ == 0) page_ = owner_->acquire();
    KVSPARSE_ASSERT(page_.value < heads_holding_.size());
    heads_served_ = (heads_served_ + 1) % kv_heads_;
    ++heads_holding_[page_.value];
    return page_;
  }
  /// One head lets go of it.
  void release(PageId page) {
    KVSPARSE_ASSERT(page.value < heads_holding_.size() && heads_holding_[page.value] > 0);
    if (--heads_holding_[page.value] == 0) owner_->release(page);
  }

 private:
  Owner* owner_;
  std::size_t kv_heads_;
  std::vector<std::uint32_t> heads_holding_;  // [page_count]
  PageId page_;
  std::size_t heads_served_ = 0;  // of page_
};

/// The decisions of one layer of one sequence for an engine's own pages and kernel.
///
/// Thread safety: that of LayerPages; select and observe are exclusive. After construction nothing allocates, locks or
/// throws; `store` alone may.
template <class Policy, PageOwner Owner>
class PageSteering : private LayerPages<Policy> {
  using Pages = LayerPages<Policy>;

 public:
  /// `owner` must outlive it; it is asked for a page of every head whenever the last ones are full, and gets every page
  /// back that is given up. rows: how the policy reads the engine's keys, values and bounds, if it does; its functions
  /// take `store` first. Throws ConfigError: a bad configuration, a policy that needs rows which `rows` lacks, or one
  /// that asks for more than page lists and masses.
  PageSteering(const CacheConfig& config, Owner& owner, const Policy& policy = {}, const RowAccess& rows = {},
               const void* store = nullptr)
      : Pages(config, detail::check_steerable(policy, rows), rows, store),
        owner_(&owner),
        listed_pages_(selection_rows(static_cast<const Pages&>(*this))),
        masses_(by_query_head() && asks() ? Pages::table(0).capacity() * geometry().group() : 0) {}
  PageSteering(PageSteering&& other) noexcept
      : Pages(static_cast<Pages&&>(other)),
        owner_(std::exchange(other.owner_, nullptr)),
        selected_at_(other.selected_at_),
        listed_pages_(std::move(other.listed_pages_)),
        masses_(std::move(other.masses_)) {}
  PageSteering& operator=(PageSteering&& other) noexcept {
    if (this == &other) return *this;
    give_back();
    static_cast<Pages&>(*this) = static_cast<Pages&&>(other);
    owner_ = std::exchange(other.owner_, nullptr);
    selected_at_ = other.selected_at_;
    listed_pages_ = std::move(other.listed_pages_);
    masses_ = std::move(other.masses_);
    return *this;
  }
  ~PageSteering() { give_back(); }

  const CacheConfig& config() const { return Pages::config(); }  ///< as constructed
  const Policy& policy() const { return Pages::policy(); }       ///< as constructed
  using Pages::check_append;
  using Pages::check_prompt;
  using Pages::geometry;
  using Pages::in_prompt;
  using Pages::next_position;
  using Pages::page_budget;
  using Pages::prompt_tokens;
  using Pages::read_positions;
  using Pages::resident_positions;
  using Pages::resident_tokens;
  using Pages::softmax_scale;
  using Pages::stats;
  using Pages::table;

  using Pages::check_latest_reads;  // for page_lists.hpp
  using Pages::latest_reads;        // for page_lists.hpp

  // --- growing ---

  /// Pages that so many more tokens take from the owner, less those that come back first: to be asked before append,
  /// since the owner must have them then. O(kv_heads).
  std::size_t pages_wanted(std::size_t tokens) const {
    return Pages::pages_wanted(tokens, false, [](PageId) { return false; });
  }
  /// One more token: store(kv_head, page, slot) puts its rows there, or notes that they shall go there before the next
  /// query. Where a page is due, the page that the policy gives up goes back to the owner first. Ends the prompt.
  template <class Store>
  Status append(Store&& store) {
    if (const Status status = Pages::check_append(); !status) return status;
    Pages::end_prompt(*owner_);
    add_token(store);
    return {};
  }
  /// So many tokens of the prompt, all or none: store(token, kv_head, page, slot), in order. A page that is given up
  /// within a chunk may be taken again for later tokens of it; map_slots tells where what is left lies.
  template <class Store>
  Status append_prompt(std::size_t tokens, Store&& store) {
    if (const Status status = Pages::check_prompt(tokens); !status) return status;
    Pages::begin_prompt(tokens);
    for (std::size_t token = 0; token < tokens; ++token) {
      add_token([&](std::size_t kv_head, PageId page, Slot slot) { store(token, kv_head, page, slot); });
    }
    return {};
  }
  /// No more prompt will come. The first append says the same. Observe the prompt's queries before.
  void end_prompt() {
    selected_at_ = Position{0};  // a page that was selected may go
    Pages::end_prompt(*owner_);
  }
  /// Gives every page back; the next token has position 0 and may start a prompt.
  void clear() {
    selected_at_ = Position{0};
    give_back();
    Pages::clear();
  }

  // --- a query of the newest token ---

  /// Lists what q, [query_heads, head_dim], reads, as list_selection does: a row for each kv head, or for each query
  /// head where the policy selects for each (selection_rows). q matters to policies that select.
  template <class Lists>
  Status select(HeadRows<const float> q, Lists& lists, const PageListOptions& options = {}) noexcept {
    selected_at_ = Position{0};
    const auto count = [this](std::size_t row, std::size_t pages) { listed_pages_[row] = pages; };
    Pages& pages = *this;
    if (const Status status = detail::add_selection(pages, q, options, lists, count); !status) return status;
    selected_at_ = next_position();
    return {};
  }

  /// Shows the policy what the kernel saw of the rows selected last. page_mass: [pages of all rows, query heads of a
  /// row], in the order of the lists, each page's share of that query head's softmax, exp(log-sum-exp over the page -
  /// log-sum-exp over all); log_sum_exp: [query_heads]. Both may be empty for a policy without evidence, which needs no
  /// observe at all unless it looks at recent queries.
  Status observe(HeadRows<const float> q, std::span<const float> page_mass,
                 std::span<const float> log_sum_exp) noexcept {
    const std::size_t queries = geometry().query_heads / listed_pages_.size();
    if (const Status status = check_rows(q, geometry().query_heads, geometry().head_dim); !status) return status;
    if (selected_at_ != next_position() || selected_at_ == Position{0}) {
      return {Status::Code::query_is_over, index(selected_at_), index(next_position())};
    }
    std::size_t masses = 0;
    for (const std::size_t pages : listed_pages_) masses += pages * queries;
    if (asks() && page_mass.size() != masses) return {Status::Code::wrong_size, page_mass.size(), masses};
    if (asks() && log_sum_exp.size() != geometry().query_heads) {
      return {Status::Code::wrong_size, log_sum_exp.size(), geometry().query_heads};
    }
    for (std::size_t h = 0; h < geometry().kv_heads; ++h) {
      const QueryGroup group = queries_of(q, h * geometry().group(), geometry().group());
      const std::size_t rows = listed_pages_.size() / geometry().kv_heads;
      std::size_t taken = 0;
      for (std::size_t row = h * rows; row < (h + 1) * rows; ++row) taken += listed_pages_[row] * queries;
      record_head(h, q, asks() ? page_mass.first(taken) : page_mass, log_sum_exp);
      if (asks()) page_mass = page_mass.subspan(taken);
      Pages::observe(h, group);
    }
    Pages::end_step();
    selected_at_ = Position{0};
    return {};
  }

 private:
  static std::size_t index(Position position) { return static_cast<std::size_t>(position.value); }
  bool asks() const { return traits::evidence(policy()) != EvidenceKind::none; }
  bool by_query_head() const { return traits::selection(policy()) == SelectionScope::query_head; }
  QueryGroup queries_of(HeadRows<const float> q, std::size_t first, std::size_t count) const {
    return {q.row(first), count, geometry().head_dim, q.head_stride, softmax_scale()};
  }

  void add_token(auto&& store) {
    Pages::open_slot(*owner_);
    for (std::size_t h = 0; h < geometry().kv_heads; ++h) store(h, Pages::open_page(h), Pages::slot_of_next());
    Pages::add_token();
  }

  /// masses: of this head's rows.
  void record_head(std::size_t kv_head, HeadRows<const float> q, std::span<const float> masses,
                   std::span<const float> log_sum_exp) {
    const std::size_t group = geometry().group();
    const std::size_t first = kv_head * group;
    const auto lse = [&](std::size_t query, std::size_t count) {
      return asks() ? log_sum_exp.subspan(first + query, count) : log_sum_exp;
    };
    if (!by_query_head()) {
      Pages::record_masses(kv_head, 0, masses, lse(0, group));
    } else if (Pages::reads_all(kv_head)) {
      // A row for each query head, but one reading of the group.
      const std::size_t pages = listed_pages_[first];
      if (asks()) {
        for (std::size_t i = 0; i < pages * group; ++i) masses_[i] = masses[i % group * pages + i / group];
      }
      Pages::record_masses(kv_head, 0, std::span<const float>(masses_).first(asks() ? pages * group : 0),
                           lse(0, group));
    } else {
      // The head remembers one selection at a time: the same one again, query head by query head.
      for (std::size_t query = 0; query < group; ++query) {
        const std::size_t pages = Pages::select(kv_head, queries_of(q, first + query, 1)).size();
        Pages::record_masses(kv_head, query, asks() ? masses.first(pages) : masses, lse(query, 1));
        if (asks()) masses = masses.subspan(pages);
      }
    }
  }

  void give_back() {
    if (owner_ == nullptr) return;
    for (std::size_t h = 0; h < geometry().kv_heads; ++h) {
      const PageTable& pages = table(h);
      for (std::size_t page = pages.size(); page > 0; --page) {
        owner_->release(pages[{static_cast<std::uint32_t>(page - 1)}].page);
      }
    }
  }

  Owner* owner_;
  Position selected_at_;  // the length of the sequence when its rows were selected; 0: they were not, or are observed
  std::vector<std::size_t> listed_pages_;  // [selection_rows]
  std::vector<float> masses_;              // [pages, group]
};

}  // namespace kvsparse
