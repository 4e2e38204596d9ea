// SPDX-License-Identifier: Apache-2.0
// The container: one layer of one sequence, its keys and values in pages of a fixed budget, its policy told and asked.
// It decides nothing about sparsity. attend.hpp runs a query over it.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "../core/shape_check.hpp"
#include "attended_layer.hpp"
#include "page_image.hpp"
#include "pool_access.hpp"
#include "pool_demand.hpp"

namespace kvsparse {

/// The keys and values of one layer of one sequence, in pages, and a policy that decides which of them stay and which a
/// query reads. attend() runs queries over it.
///
/// Pages live in a PagePool: the cache's own, or one that many caches share. A copy has a pool of its own and copies
/// the pages; a fork shares the pool and the pages. Moving is cheap.
///
/// Thread safety: caches over different pools are independent; for caches over one pool see PagePool. Of one cache, the
/// verbs that change it and attend, which may use an executor's threads inside, are exclusive; the verbs that take a kv
/// head (select, record, observe) may run at the same time for different heads, and end_step is exclusive. Const
/// members may run at the same time as one another. After construction no verb of the decode step allocates, throws or
/// locks.
template <class Policy, StorageScalar Key = float, StorageScalar Value = Key>
class PagedKvCache : private LayerDrafts<Policy> {
  using Pages = LayerDrafts<Policy>;

 public:
  using policy_type = Policy;         ///< what decides
  using key_type = Key;               ///< what keys are stored in
  using value_type = Value;           ///< what values are stored in
  using Pool = PagePool<Key, Value>;  ///< where its pages may come from

  /// Allocates everything the cache will ever use, pages included: bytes_required(config, policy). Throws ConfigError.
  explicit PagedKvCache(const CacheConfig& config, Policy policy = {})
      : PagedKvCache(config, policy, plan_of(config, policy)) {}
  /// The same over pages of a pool that other caches may use too; allocates bytes_required_beside_pool(config, policy).
  /// Throws ConfigError, also if the pool's geometry or summaries are not what the cache needs.
  PagedKvCache(const CacheConfig& config, const Pool& pool, Policy policy = {})
      : PagedKvCache(config, policy, plan_of(config, policy), pool) {}

  /// A cache with the same pages, policy state and all, in a pool of its own: takes bytes_required(config, policy). Of
  /// a copy or a fork, read_positions() is empty until the next attend.
  PagedKvCache(const PagedKvCache& other)
      : Pages(other),
        pool_(own_pool(other.config(), other.policy())),
        scratch_(other.scratch_),
        evicted_shared_pages_(other.evicted_shared_pages_) {
    Pages::set_store(&pool_.memory());
    Pages::forget_reads();
    Pages::renumber([&](PageId page) { return pool_.acquire_copy(other.pool_, page); });
  }
  PagedKvCache& operator=(const PagedKvCache& other) {
    PagedKvCache copy(other);
    return *this = std::move(copy);
  }
  PagedKvCache(PagedKvCache&&) noexcept = default;
  PagedKvCache& operator=(PagedKvCache&& other) noexcept {
    if (this == &other) return *this;
    std::destroy_at(this);
    return *std::construct_at(this, std::move(other));
  }
  /// Gives the pages back.
  ~PagedKvCache() { release_pages(); }

  /// A cache that goes on from here by itself, over the same pool. Pages are shared until one side writes into them:
  /// then it takes a copy for itself. Costs the tables, bytes_required_beside_pool(config, policy), and no page.
  [[nodiscard]] PagedKvCache fork() {
    PagedKvCache child(*this, pool_);
    Pages::visit_newest_first([&](PageId page) { pool_.retain(page); });
    open_pages_may_be_shared_ = child.open_pages_may_be_shared_ = true;
    return child;
  }

  /// Bytes that construction without a pool allocates. Throws ConfigError like the constructor.
  static std::size_t bytes_required(const CacheConfig& config, const Policy& policy = {}) {
    const detail::CachePlan plan = detail::plan_cache(config, policy);
    const SaturatingSize pool = Pool::bytes_required(plan.geometry, traits::page_summary(policy), plan.layer_pages());
    return detail::addressable(pool + bytes_required_beside_pool(config, policy), plan);
  }
  /// Bytes that construction over a pool allocates: tables, policy state, working memory of a query.
  static std::size_t bytes_required_beside_pool(const CacheConfig& config, const Policy& policy = {}) {
    const detail::CachePlan plan = detail::plan_cache(config, policy);
    const detail::HeadSizes n(plan, policy);
    const SaturatingSize scratch =
        detail::AttendScratch::bytes_required(n.pages, plan.geometry.page_size, n.group, n.row, n.value_row) +
        sizeof(detail::AttendScratch);
    return detail::addressable(scratch * plan.geometry.kv_heads + Pages::bytes_required(config, policy), plan);
  }

  const CacheConfig& config() const { return Pages::config(); }  ///< as constructed
  using Pages::geometry;
  const Policy& policy() const { return Pages::policy(); }  ///< with its options
  using Pages::rope;
  using Pages::softmax_scale;

  const Pool& pool() const { return pool_; }  ///< its own, or the shared one

  using Pages::in_prompt;
  using Pages::next_position;
  using Pages::page_budget;
  using Pages::prompt_tokens;
  using Pages::resident_tokens;

  // --- growing ---

  /// Appends one token; k: [kv_heads, head_dim], rotated at next_position(); v: [kv_heads, value_dim], or no row, {},
  /// where values lie in the keys. The first call ends the prompt. When it opens a page beyond the budget, each head
  /// first gives up the page its policy names. O(kv_heads * (head_dim + value_dim)), plus the policy's victim search
  /// once a page. Refuses wrong shapes, for policies that keep everything max_tokens, and what can_append(1) denies.
  template <StorableAs<Key, Value> Row>
  Status append(HeadRows<const Row> k, HeadRows<const Row> v) noexcept {
    if (const Status status = check_keys_and_values(k, v, geometry()); !status) return status;
    if (const Status status = Pages::check_append(); !status) return status;
    if (const Status status = check_pool(1); !status) return status;
    settle();
    own_open_pages();
    store_token(k, v);
    return {};
  }
  /// The same for a chunk of tokens, all or nothing; k: [tokens, kv_heads, head_dim], v: [tokens, kv_heads, value_dim]
  /// or {}.
  template <StorableAs<Key, Value> Row>
  Status append(TokenRows<const Row> k, TokenRows<const Row> v) noexcept {
    if (const Status status = check_keys_and_values(k, v, geometry()); !status) return status;
    if (const Status status = Pages::check_append(k.tokens); !status) return status;
    if (const Status status = check_pool(k.tokens); !status) return status;
    if (k.tokens == 0) return {};
    settle();
    own_open_pages();
    for (std::size_t token = 0; token < k.tokens; ++token) store_token(k.token(token), v.token(token));
    return {};
  }
  /// The same from contiguous floats.
  Status append(std::span<const float> k, std::span<const float> v) noexcept {
    const std::size_t value_dim = geometry().dim_of_values();
    if (const Status status = check_size(k.size(), geometry().kv_heads, geometry().head_dim); !status) return status;
    if (const Status status = check_size(v.size(), value_heads(), value_dim); !status) return status;
    return append(HeadRows<const float>(k.data(), geometry().kv_heads, geometry().head_dim),
                  HeadRows<const float>(v.data(), value_heads(), value_dim));
  }

  /// Appends a chunk of the prompt; k, v as append takes a chunk. Any number of chunks. Takes all or nothing.
  template <StorableAs<Key, Value> Row>
  Status append_prompt(TokenRows<const Row> k, TokenRows<const Row> v) noexcept {
    if (const Status status = Pages::check_prompt(k.tokens); !status) return status;
    if (const Status status = check_keys_and_values(k, v, geometry()); !status) return status;
    if (const Status status = check_pool(k.tokens); !status) return status;
    if (k.tokens == 0) return {};
    Pages::begin_prompt(k.tokens);
    own_open_pages();
    for (std::size_t token = 0; token < k.tokens; ++token) store_token(k.token(token), v.token(token));
    return {};
  }
  /// The same from contiguous floats.
  Status append_prompt(std::span<const float> k, std::span<const float> v) noexcept {
    const std::size_t row = geometry().kv_heads * geometry().head_dim;
    if (k.size() % row != 0) return {Status::Code::wrong_size, k.size(), row};
    const std::size_t tokens = k.size() / row;
    const std::size_t value_dim = geometry().dim_of_values();
    if (const Status status = check_size(v.size(), tokens * value_heads(), value_dim); !status) return status;
    return append_prompt(TokenRows<const float>(k.data(), tokens, geometry().kv_heads, geometry().head_dim),
                         TokenRows<const float>(v.data(), tokens, value_heads(), value_dim));
  }

  /// Appends tokens that may be rejected; k, v as append takes a chunk. Nothing is evicted on their behalf. They are
  /// attended to by attend_prompt and attend like any token. truncate() takes back what was rejected and accepts the
  /// others; the next append accepts all. Ends the prompt. Refuses more than max_speculative outstanding drafts.
  template <StorableAs<Key, Value> Row>
  Status append_draft(TokenRows<const Row> k, TokenRows<const Row> v) noexcept {
    if (const Status status = check_keys_and_values(k, v, geometry()); !status) return status;
    if (const Status status = Pages::check_drafts(k.tokens); !status) return status;
    if (const Status status = check_pool_for_drafts(k.tokens); !status) return status;
    if (k.tokens == 0) return {};
    detail::PageLender lender = this->lender();
    Pages::begin_drafts(lender);
    own_open_pages();
    for (std::size_t token = 0; token < k.tokens; ++token) {
      Pages::open_draft_slot(lender);
      store_rows(k.token(token), v.token(token));
      Pages::add_draft();
    }
    return {};
  }
  /// Drafts outstanding.
  using Pages::drafts;

  /// Takes back the tokens from `position` on: everything goes on as if they had never come. Among the drafts always;
  /// behind them as far as oldest_reachable(): where no page was given up since and the policy remembers nothing of
  /// later tokens. The drafts before `position` are accepted, all of them by truncate(next_position()). O(drafts kept *
  /// (head_dim + policy)). Refuses other positions; and when a fork shares the page that is cut, a full pool.
  Status truncate(Position position) noexcept {
    const auto length = static_cast<std::size_t>(std::max<std::int64_t>(position.value, 0));
    const std::size_t now = static_cast<std::size_t>(next_position().value);
    const std::size_t oldest = Pages::oldest_reachable();
    if (position < Position{0} + oldest) return {Status::Code::unreachable_length, length, oldest};
    if (length > now) return {Status::Code::unreachable_length, length, now};
    const PoolDemand demand = truncate_demand(position);
    if (demand.pages > demand.free_pages) return {Status::Code::pool_exhausted, demand.pages, demand.free_pages};
    for (std::size_t h = 0; h < geometry().kv_heads; ++h) {
      if (shares_page_cut_at(h, position)) own_page(h, *Pages::page_cut_at(h, position));
    }
    detail::PageLender lender = this->lender();
    Pages::truncate(position, lender);
    open_pages_may_be_shared_ = pool_.shared_pages() > 0;  // the page that is the newest now may be
    return {};
  }
  /// The pages that truncate(position) copies because a fork shares what is cut. O(kv_heads).
  PoolDemand truncate_demand(Position position) const noexcept {
    std::size_t wanted = 0;
    for (std::size_t h = 0; h < geometry().kv_heads; ++h) wanted += shares_page_cut_at(h, position) ? 1 : 0;
    return {&pool_.memory(), wanted, pool_.free_pages()};
  }
  /// The shortest length that truncate() can go back to.
  using Pages::oldest_reachable;

  /// No more prompt will come. The first append says the same.
  void end_prompt() noexcept {
    detail::PageLender lender = this->lender();
    Pages::end_prompt(lender);
  }

  /// Whether append() would take so many more tokens: max_tokens leaves room for them, and the pool has the pages to
  /// open and those to copy because a fork shares them, less those that evictions give back. A true answer holds until
  /// another cache takes pages; an append asks the same question. Evictions are taken to hit shared pages first, which
  /// give nothing back.
  bool can_append(std::size_t tokens) const noexcept {
    return Pages::check_append(tokens).ok() && check_pool(tokens).ok();
  }
  /// The same of append_prompt().
  bool can_append_prompt(std::size_t tokens) const noexcept {
    return Pages::check_prompt(tokens).ok() && check_pool(tokens).ok();
  }
  /// The pages in question, to be summed over the caches of a pool. O(pages) when some are shared, else O(kv_heads).
  PoolDemand pool_demand(std::size_t tokens) const noexcept {
    return {&pool_.memory(), pages_wanted(tokens), pool_.free_pages()};
  }
  /// What the pool would have back if this cache were cleared: keys, values and summaries that no fork holds.
  std::size_t bytes_reclaimable() const {
    std::size_t pages = 0;
    Pages::visit_newest_first([&](PageId page) { pages += pool_.is_shared(page) ? 0 : 1; });
    return pages * pool_.bytes_per_page();
  }

  /// Empties the cache; the next token has position 0 and may start a prompt.
  void clear() noexcept {
    release_pages();
    Pages::clear();
    evicted_shared_pages_ = 0;
  }

  // --- looking ---

  /// Counters since construction or the last clear(). O(resident pages).
  CacheStats stats() const {
    CacheStats stats = Pages::stats(bytes_per_resident_page());
    Pages::visit_newest_first([&](PageId page) {
      if (pool_.is_shared(page)) stats.shared_bytes += pool_.bytes_per_page();
    });
    stats.evicted_shared_pages = evicted_shared_pages_;
    return stats;
  }
  using Pages::check_latest_reads;
  using Pages::latest_reads;
  using Pages::read_positions;
  using Pages::resident_positions;
  using Pages::table;

  /// What one resident page of one kv head costs: keys, values, summary, policy state.
  std::size_t bytes_per_resident_page() const {
    return pool_.bytes_per_page() + detail::HeadStore<Policy>::page_state_bytes;
  }

  // --- the decode step, head by head: what attend() is made of, for an engine with a kernel of its own ---

  /// Where the rows lie of the pages that select() names.
  PagedKv<Key, Value> pages() const { return pool_.memory().rows.view(); }
  using Pages::add_residual, Pages::add_sinks, Pages::begin_query, Pages::bound_lost_mass, Pages::check_queries,
      Pages::end_step, Pages::logit_map, Pages::observe, Pages::queries_per_selection, Pages::reads_all, Pages::record,
      Pages::select, Pages::select_more, Pages::tap;

  detail::AttendedLayer<Policy> attended() noexcept {  // for attend() alone
    return {*this, scratch_, detail::PageReader(pool_.memory())};
  }

 private:
  /// Throws ConfigError before anything is allocated, also for what cannot be addressed.
  static detail::CachePlan plan_of(const CacheConfig& config, const Policy& policy) {
    static_cast<void>(bytes_required_beside_pool(config, policy));
    return detail::plan_cache(config, policy);
  }
  friend struct detail::ImageAccess;
  detail::LayerImage image() {
    detail::LayerImage image = Pages::image();
    image.facts = detail::cache_facts<Policy, Key, Value>(config(), policy());
    image.pages = detail::pages_image(pool_);
    image.evicted_shared_pages = &evicted_shared_pages_;
    return image;
  }

  PagedKvCache(const CacheConfig& config, const Policy& policy, const detail::CachePlan& plan)
      : PagedKvCache(config, policy, plan, own_pool(config, policy)) {}
  PagedKvCache(const CacheConfig& config, const Policy& policy, const detail::CachePlan& plan, const Pool& pool)
      : Pages(config, policy, plan, detail::row_access<Key, Value>(pool.summary()), &pool.memory()), pool_(pool) {
    detail::check_pool_fits(plan.geometry, std::string(Policy::name), traits::page_summary(policy), pool);
    const detail::HeadSizes n(plan, policy);
    scratch_.reserve(plan.geometry.kv_heads);
    for (std::size_t h = 0; h < plan.geometry.kv_heads; ++h) {
      scratch_.push_back(detail::AttendScratch(n.pages, plan.geometry.page_size, n.group, n.row, n.value_row));
    }
  }
  PagedKvCache(const PagedKvCache& other, const Pool& pool)
      : Pages(other), pool_(pool), scratch_(other.scratch_), evicted_shared_pages_(other.evicted_shared_pages_) {
    Pages::forget_reads();
  }

  static Pool own_pool(const CacheConfig& config, const Policy& policy) {
    const detail::CachePlan plan = detail::plan_cache(config, policy);
    return Pool(plan.geometry, traits::page_summary(policy), plan.layer_pages());
  }

  detail::PageLender lender() noexcept { return {pool_, evicted_shared_pages_}; }

  Status check_pool(std::size_t tokens) const noexcept {
    if (tokens == 0) return {};
    const std::size_t heads = geometry().kv_heads;
    const std::size_t at_most = heads * (Pages::pages_to_open(tokens) + (open_pages_may_be_shared_ ? 1 : 0));
    if (at_most <= pool_.free_pages()) return {};
    const std::size_t wanted = pages_wanted(tokens);
    if (wanted <= pool_.free_pages()) return {};
    return {Status::Code::pool_exhausted, wanted, pool_.free_pages()};
  }
  std::size_t pages_wanted(std::size_t tokens) const noexcept {
    return Pages::pages_wanted(tokens, pool_.shared_pages() > 0, detail::IsShared{pool_.ledger()}) + pages_to_copy();
  }
  Status check_pool_for_drafts(std::size_t tokens) const noexcept {
    if (tokens == 0) return {};
    const std::size_t wanted = geometry().kv_heads * Pages::pages_to_open(tokens) + pages_to_copy();
    if (wanted <= pool_.free_pages()) return {};
    return {Status::Code::pool_exhausted, wanted, pool_.free_pages()};
  }
  std::size_t pages_to_copy() const {
    std::size_t pages = 0;
    for (std::size_t h = 0; h < geometry().kv_heads && writes_into_open_pages(); ++h) {
      pages += pool_.is_shared(Pages::open_page(h)) ? 1 : 0;
    }
    return pages;
  }
  bool writes_into_open_pages() const { return open_pages_may_be_shared_ && Pages::slot_of_next().value != 0; }

  // Copy on write: the next token goes into the open pages.
  void own_open_pages() {
    if (!open_pages_may_be_shared_) return;
    for (std::size_t h = 0; h < geometry().kv_heads && writes_into_open_pages(); ++h) {
      if (!pool_.is_shared(Pages::open_page(h))) continue;
      own_page(h, {static_cast<std::uint32_t>(Pages::table(h).size() - 1)});
    }
    open_pages_may_be_shared_ = false;
  }
  void own_page(std::size_t kv_head, PageIndex index) {
    const PageId page = Pages::table(kv_head)[index].page;
    Pages::renumber_page(kv_head, index, pool_.acquire_copy(pool_, page));
    pool_.release(page);
  }
  bool shares_page_cut_at(std::size_t kv_head, Position position) const {
    const auto cut = Pages::page_cut_at(kv_head, position);
    return cut && pool_.is_shared(Pages::table(kv_head)[*cut].page);
  }
  void settle() {
    detail::PageLender lender = this->lender();
    Pages::accept_drafts(lender);
    Pages::end_prompt(lender);
  }
  void release_pages() {
    Pages::visit_newest_first([&](PageId page) { pool_.release(page); });
  }

  /// Heads whose values are brought and stored.
  std::size_t value_heads() const { return geometry().values_in_keys ? 0 : geometry().kv_heads; }

  template <class Row>
  void store_token(HeadRows<const Row> k, HeadRows<const Row> v) {
    detail::PageLender lender = this->lender();
    Pages::open_slot(lender);
    store_rows(k, v);
    Pages::add_token();
  }
  template <class Row>
  void store_rows(HeadRows<const Row> k, HeadRows<const Row> v) {
    const Slot slot = Pages::slot_of_next();
    PageMemory<Key, Value>& memory = pool_.memory();
    for (std::size_t h = 0; h < geometry().kv_heads; ++h) {
      const PageId page = Pages::open_page(h);
      store_row(k.row(h), geometry().head_dim, memory.rows.key_row(page, slot));
      if (value_heads() > 0) store_row(v.row(h), geometry().dim_of_values(), memory.rows.value_row(page, slot));
      memory.summaries.add_key(page, memory.rows.key_row(page, slot), slot.value == 0);
    }
  }

  Pool pool_;
  std::vector<detail::AttendScratch> scratch_;
  std::size_t evicted_shared_pages_ = 0;
  bool open_pages_may_be_shared_ = false;
};

}  // namespace kvsparse
