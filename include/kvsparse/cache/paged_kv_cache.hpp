// SPDX-License-Identifier: Apache-2.0
// The container: one layer of one sequence, its keys and values in pages of a fixed budget, its policy told and asked.
// It decides nothing about sparsity. attend.hpp runs a query over it.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "../core/shape_check.hpp"
#include "attend_scratch.hpp"
#include "layer_pages.hpp"
#include "page_image.hpp"
#include "page_store.hpp"

namespace kvsparse {

/// Thread safety: distinct caches are independent. Of one cache, `append`, `append_prompt`, `end_prompt`, `clear` and
/// attend, which may use an executor's threads inside, are exclusive; the verbs that take a kv head (select, record,
/// observe) may run at the same time for different heads, and end_step is exclusive. Const members may run at the same
/// time as one another. After construction no verb of the decode step allocates, throws or locks. Copying copies pages,
/// policy state and all.
template <class Policy, StorageScalar Key = float, StorageScalar Value = Key>
class PagedKvCache : private LayerPages<Policy> {
  using Pages = LayerPages<Policy>;
  using Store = PageStore<Key, Value>;

 public:
  using policy_type = Policy;
  using key_type = Key;
  using value_type = Value;

  /// Allocates everything the cache will ever use: bytes_required(config, policy). Throws ConfigError.
  explicit PagedKvCache(const CacheConfig& config, Policy policy = {})
      : PagedKvCache(config, policy, detail::plan_cache(config, policy)) {}
  PagedKvCache(const PagedKvCache& other)
      : Pages(other), store_(std::make_unique<Store>(*other.store_)), scratch_(other.scratch_) {
    Pages::set_store(store_.get());
  }
  PagedKvCache& operator=(const PagedKvCache& other) {
    PagedKvCache copy(other);
    return *this = std::move(copy);
  }
  PagedKvCache(PagedKvCache&&) noexcept = default;
  PagedKvCache& operator=(PagedKvCache&&) noexcept = default;
  ~PagedKvCache() = default;

  /// Bytes that construction allocates. Throws ConfigError like the constructor.
  static std::size_t bytes_required(const CacheConfig& config, const Policy& policy = {}) {
    const detail::CachePlan plan = detail::plan_cache(config, policy);
    const detail::HeadSizes n(plan, policy);
    const std::size_t scratch = detail::AttendScratch::bytes_required(n.pages, plan.geometry.page_size, n.group, n.row);
    return Pages::bytes_required(config, policy) + sizeof(Store) +
           Store::bytes_required(plan.geometry, traits::page_summary(policy),
                                 plan.page_capacity * plan.geometry.kv_heads) +
           plan.geometry.kv_heads * (sizeof(detail::AttendScratch) + scratch);
  }

  const CacheConfig& config() const { return Pages::config(); }
  using Pages::geometry;
  const Policy& policy() const { return Pages::policy(); }
  using Pages::rope;
  using Pages::softmax_scale;

  using Pages::in_prompt;
  using Pages::next_position;
  using Pages::page_budget;
  using Pages::prompt_tokens;
  using Pages::resident_tokens;

  // --- growing ---

  /// Appends one token; k, v: [kv_heads, head_dim], keys rotated at next_position(). The first call ends the prompt.
  /// When it opens a page beyond the budget, each head first gives up the page its policy names. O(kv_heads *
  /// head_dim), plus the policy's victim search once a page. Refuses wrong shapes and, for policies that keep
  /// everything, max_tokens.
  template <StorableAs<Key, Value> Row>
  Status append(HeadRows<const Row> k, HeadRows<const Row> v) noexcept {
    if (const Status status = check_rows(k, geometry().kv_heads, geometry()); !status) return status;
    if (const Status status = check_rows(v, geometry().kv_heads, geometry()); !status) return status;
    if (const Status status = Pages::check_append(); !status) return status;
    end_prompt();
    store_token(k, v);
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
    if (const Status status = Pages::check_prompt(k.tokens); !status) return status;
    if (k.tokens != v.tokens) return {Status::Code::wrong_tokens, v.tokens, k.tokens};
    if (const Status status = check_rows(k, geometry().kv_heads, geometry()); !status) return status;
    if (const Status status = check_rows(v, geometry().kv_heads, geometry()); !status) return status;
    Pages::begin_prompt(k.tokens);
    for (std::size_t token = 0; token < k.tokens; ++token) store_token(k.token(token), v.token(token));
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
  void end_prompt() noexcept { Pages::end_prompt(store_->pool); }

  /// Empties the cache; the next token has position 0 and may start a prompt.
  void clear() noexcept {
    Pages::clear();
    store_->pool.clear();
  }

  // --- looking ---

  CacheStats stats() const { return Pages::stats(bytes_per_resident_page()); }
  using Pages::check_latest_reads;
  using Pages::latest_reads;
  using Pages::read_positions;
  using Pages::resident_positions;
  using Pages::table;

  /// What one resident page of one kv head costs: keys, values, summary, policy state.
  std::size_t bytes_per_resident_page() const {
    return Store::bytes_per_page(geometry(), store_->summaries.kind()) + detail::HeadStore<Policy>::page_state_bytes;
  }

  // --- the decode step, head by head: what attend() is made of, for an engine with a kernel of its own ---

  PagedKv<Key, Value> pages() const { return store_->pool.view(); }
  using Pages::add_residual;
  using Pages::add_sinks;
  using Pages::begin_query;
  using Pages::end_step;
  using Pages::logit_map;
  using Pages::observe;
  using Pages::queries_per_selection;
  using Pages::reads_all;
  using Pages::record;
  using Pages::select;
  using Pages::select_more;
  using Pages::tap;

  using Pages::head;                                                                        // for attend() alone
  detail::AttendScratch& attend_scratch(std::size_t kv_head) { return scratch_[kv_head]; }  // for attend() alone

 private:
  friend struct detail::ImageAccess;
  detail::LayerImage image() {
    detail::LayerImage image = Pages::image();
    image.facts = detail::cache_facts<Policy, Key, Value>(config(), policy());
    image.pages = detail::pages_image(*store_, geometry().head_dim);
    return image;
  }

  PagedKvCache(const CacheConfig& config, const Policy& policy, const detail::CachePlan& plan)
      : Pages(config, policy, plan, Store::row_access(), nullptr),
        store_(std::make_unique<Store>(plan.geometry, traits::page_summary(policy),
                                       plan.page_capacity * plan.geometry.kv_heads)) {
    Pages::set_store(store_.get());
    const detail::HeadSizes n(plan, policy);
    scratch_.reserve(plan.geometry.kv_heads);
    for (std::size_t h = 0; h < plan.geometry.kv_heads; ++h) {
      scratch_.push_back(detail::AttendScratch(n.pages, plan.geometry.page_size, n.group, n.row));
    }
  }

  HeadRows<const float> key_rows(std::span<const float> flat) const {
    return {flat.data(), geometry().kv_heads, geometry().head_dim};
  }

  template <class Row>
  void store_token(HeadRows<const Row> k, HeadRows<const Row> v) {
    Pages::open_slot(store_->pool);
    const Slot slot = Pages::slot_of_next();
    for (std::size_t h = 0; h < geometry().kv_heads; ++h) {
      const PageId page = Pages::open_page(h);
      store_row(k.row(h), geometry().head_dim, store_->pool.key_row(page, slot));
      store_row(v.row(h), geometry().head_dim, store_->pool.value_row(page, slot));
      store_->summaries.add_key(page, store_->pool.key_row(page, slot), slot.value == 0);
    }
    Pages::add_token();
  }

  std::unique_ptr<Store> store_;  // where it lies the policy's views read rows, wherever the cache moves
  std::vector<detail::AttendScratch> scratch_;
};

}  // namespace kvsparse
