// SPDX-License-Identifier: Apache-2.0
// What a cache needs of a pool, and how a policy's views reach its rows without knowing the storage type.
#pragma once

#include <algorithm>
#include <span>
#include <string>

#include "../memory/page_bounds.hpp"
#include "../memory/page_pool.hpp"
#include "../policy/head_view.hpp"

namespace kvsparse::detail {

/// Functions whose first argument is a PageMemory<Key, Value> with summaries of that kind; null for what these lack.
template <StorageScalar Key, StorageScalar Value>
RowAccess row_access(PageSummary summary) {
  using Memory = PageMemory<Key, Value>;
  RowAccess access;
  access.load_key = [](const void* memory, PageId page, Slot slot, std::span<float> row) {
    static_cast<const Memory*>(memory)->rows.load_key(page, slot, row);
  };
  access.load_value = [](const void* memory, PageId page, Slot slot, std::span<float> row) {
    static_cast<const Memory*>(memory)->rows.load_value(page, slot, row);
  };
  if (summary == PageSummary::mean) {
    access.load_key_sum = [](const void* memory, PageId page, std::span<float> sum) {
      std::copy_n(static_cast<const Memory*>(memory)->summaries.sum(page), sum.size(), sum.begin());
    };
  }
  if (summary != PageSummary::min_max) return access;
  access.load_bounds = [](const void* memory, PageId page, std::span<float> lowest, std::span<float> highest) {
    load_row(static_cast<const Memory*>(memory)->summaries.min(page), lowest);
    load_row(static_cast<const Memory*>(memory)->summaries.max(page), highest);
  };
  access.upper_bounds = [](const void* memory, std::span<const ResidentPage> pages, const QueryGroup& queries,
                           BoundPooling pooling, std::span<float> padded_queries, std::span<float> bounds) {
    page_upper_bounds(static_cast<const Memory*>(memory)->summaries, pages, queries, pooling, padded_queries, bounds);
  };
  access.largest_magnitudes = [](const void* memory, std::span<const ResidentPage> pages, std::span<float> magnitudes) {
    page_largest_magnitudes(static_cast<const Memory*>(memory)->summaries, pages, magnitudes);
  };
  return access;
}

/// Whether others hold a page too.
struct IsShared {
  const PageLedger& ledger;
  bool operator()(PageId page) const { return ledger.is_shared(page); }
};

/// The owner of a cache's pages towards LayerPages, which need not know what the pool stores: its verbs, the longest of
/// the container, are compiled once for a policy.
class PageLender {
 public:
  /// evicted_shared_pages counts the pages given up that others still hold.
  template <StorageScalar Key, StorageScalar Value>
  PageLender(PagePool<Key, Value>& pool, std::size_t& evicted_shared_pages) noexcept
      : pool_(&pool),
        verbs_(&verbs_of<Key, Value>),
        is_shared_{pool.ledger()},
        evicted_shared_pages_(evicted_shared_pages) {}

  PageId acquire() { return verbs_->acquire(pool_); }
  void release(PageId page) {
    if (is_shared_(page)) ++evicted_shared_pages_;
    verbs_->release(pool_, page);
  }
  void release_truncated(PageId page) { verbs_->release(pool_, page); }
  void summarize(PageId page, Slot slot) { verbs_->summarize(pool_, page, slot); }

 private:
  struct Verbs {
    PageId (*acquire)(void* pool);
    void (*release)(void* pool, PageId page);
    void (*summarize)(void* pool, PageId page, Slot slot);
  };
  template <class Key, class Value>
  static constexpr Verbs verbs_of{
      [](void* pool) { return static_cast<PagePool<Key, Value>*>(pool)->acquire(); },
      [](void* pool, PageId page) { static_cast<PagePool<Key, Value>*>(pool)->release(page); },
      [](void* pool, PageId page, Slot slot) {
        auto& [rows, summaries] = static_cast<PagePool<Key, Value>*>(pool)->memory();
        summaries.add_key(page, rows.key_row(page, slot), slot.value == 0);
      }};

  void* pool_;
  const Verbs* verbs_;
  IsShared is_shared_;
  std::size_t& evicted_shared_pages_;
};

/// Throws ConfigError with a sentence that names the value and the limit.
template <StorageScalar Key, StorageScalar Value>
void check_pool_fits(const Geometry& geometry, const std::string& policy, PageSummary needed,
                     const PagePool<Key, Value>& pool) {
  const auto refuse_size = [](const char* name, std::size_t of_pool, std::size_t of_cache) {
    if (of_pool == of_cache) return;
    KVSPARSE_THROW(ConfigError("the pool's " + std::string(name) + " is " + std::to_string(of_pool) +
                               "; this cache needs " + std::to_string(of_cache)));
  };
  const Geometry& of_pool = pool.geometry();
  refuse_size("head_dim", of_pool.head_dim, geometry.head_dim);
  refuse_size("value_dim", of_pool.dim_of_values(), geometry.dim_of_values());
  refuse_size("page_size", of_pool.page_size, geometry.page_size);
  if (of_pool.values_in_keys != geometry.values_in_keys) {
    KVSPARSE_THROW(ConfigError(of_pool.values_in_keys
                                   ? "the pool has values_in_keys; this cache stores values beside the keys"
                                   : "this cache has values_in_keys; the pool stores values beside the keys"));
  }
  constexpr const char* names[] = {"no", "min_max", "mean"};
  if (needed != PageSummary::none && pool.summary() != needed) {
    KVSPARSE_THROW(ConfigError("the pool keeps " + std::string(names[static_cast<int>(pool.summary())]) +
                               " page summaries; policy " + policy + " needs " + names[static_cast<int>(needed)]));
  }
}

}  // namespace kvsparse::detail
