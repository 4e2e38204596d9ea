// SPDX-License-Identifier: Apache-2.0
// The pages that caches live on: rows, summaries and reference counts, of a size that never changes. One cache has a
// pool of its own, or all layers and sequences of an engine share one.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "../core/saturating_size.hpp"
#include "../core/status.hpp"
#include "page_ledger.hpp"
#include "page_rows.hpp"
#include "page_summary.hpp"

namespace kvsparse {

/// Rows and summaries of a pool's pages.
template <StorageScalar Key, StorageScalar Value = Key>
struct PageMemory {
  /// Allocates all of it and touches none.
  PageMemory(const Geometry& geometry, PageSummary kind, std::size_t pages)
      : rows(geometry, pages), summaries(geometry, kind, pages) {}

  /// Copies a page from memory of the same geometry and kind, this or other.
  void copy(const PageMemory& from, PageId page, PageId to) {
    rows.copy(from.rows, page, to);
    summaries.copy(from.summaries, page, to);
  }

  PageRows<Key, Value> rows;                    ///< keys and values
  PageSummaries<SummaryScalar<Key>> summaries;  ///< of the keys
};

/// A handle: copies of it are the same pool, whose memory goes with the last of them; a cache keeps one.
///
/// Thread safety: a pool takes no lock. What takes, gives back or writes pages is exclusive among all caches of a pool:
/// append, append_prompt, append_draft, truncate, end_prompt, clear, fork, copying and destruction. What reads them may
/// run at the same time for different caches: attend and its parts, stats, can_append.
template <StorageScalar Key, StorageScalar Value = Key>
class PagePool {
 public:
  using Memory = PageMemory<Key, Value>;  ///< what its pages lie in

  /// Of `pages` pages, in whole multiples of the kv heads. The geometry's head_dim, value_dim, values_in_keys and
  /// page_size are those of every cache; its kv_heads only arranges the pages. Memory is touched when a page is first
  /// used. Throws ConfigError.
  PagePool(const Geometry& geometry, PageSummary kind, std::size_t pages)
      : shared_(new Shared(geometry, kind, checked(geometry, kind, pages))) {}

  /// As many pages as fit `bytes`, bookkeeping included. Throws ConfigError if that is less than one for each kv head.
  static PagePool of_bytes(const Geometry& geometry, PageSummary kind, std::size_t bytes) {
    check(geometry);
    const std::size_t each = bytes_per_page(geometry, kind) + PageLedger::bytes_per_page;
    const std::size_t pages = bytes < sizeof(Shared) ? 0 : (bytes - sizeof(Shared)) / each;
    if (pages < geometry.kv_heads) {
      KVSPARSE_THROW(ConfigError("a pool of " + std::to_string(bytes) + " bytes holds no page for each of " +
                                 std::to_string(geometry.kv_heads) + " kv heads; that takes " +
                                 std::to_string(bytes_required(geometry, kind, geometry.kv_heads))));
    }
    return PagePool(geometry, kind, pages / geometry.kv_heads * geometry.kv_heads);
  }

  PagePool(const PagePool& other) noexcept : shared_(other.shared_) {
    if (shared_ != nullptr) shared_->handles.fetch_add(1, std::memory_order_relaxed);
  }
  PagePool(PagePool&& other) noexcept : shared_(std::exchange(other.shared_, nullptr)) {}
  PagePool& operator=(PagePool other) noexcept {
    std::swap(shared_, other.shared_);
    return *this;
  }
  ~PagePool() {
    if (shared_ != nullptr && shared_->handles.fetch_sub(1, std::memory_order_acq_rel) == 1) delete shared_;
  }

  /// Bytes that construction allocates. Throws ConfigError for a geometry that the constructor refuses, and for more
  /// bytes than can be addressed.
  static std::size_t bytes_required(const Geometry& geometry, PageSummary kind, std::size_t pages) {
    check(geometry);
    const std::size_t each = bytes_per_page(geometry, kind) + PageLedger::bytes_per_page;
    const std::size_t bytes = SaturatingSize(pages) * each + sizeof(Shared);
    if (bytes > most_bytes) {
      KVSPARSE_THROW(ConfigError(std::to_string(pages) + " pages of " + std::to_string(each) + " bytes exceed the " +
                                 most_bytes_text + " that can be addressed"));
    }
    return bytes;
  }
  /// Keys, values and summary of one page.
  static std::size_t bytes_per_page(const Geometry& geometry, PageSummary kind) {
    return PageRows<Key, Value>::bytes_per_page(geometry) +
           PageSummaries<SummaryScalar<Key>>::bytes_per_page(geometry, kind);
  }
  std::size_t bytes_per_page() const { return shared_->bytes_per_page; }

  const Geometry& geometry() const { return memory().rows.geometry(); }        ///< as constructed
  PageSummary summary() const { return memory().summaries.kind(); }            ///< as constructed
  std::size_t page_count() const { return shared_->ledger.page_count(); }      ///< as constructed
  std::size_t free_pages() const { return shared_->ledger.free_pages(); }      ///< that no cache holds
  std::size_t shared_pages() const { return shared_->ledger.shared_pages(); }  ///< that several caches hold
  /// How many caches hold the page; 0: it is free.
  std::uint32_t references(PageId page) const { return shared_->ledger.references(page); }
  const PageLedger& ledger() const { return shared_->ledger; }  ///< who holds what
  /// Whether several caches hold the page.
  bool is_shared(PageId page) const { return shared_->ledger.is_shared(page); }

  /// Takes a free page, of which there must be one. O(1).
  PageId acquire() { return shared_->ledger.acquire(); }
  /// One more holder of a page that is not free. O(1).
  void retain(PageId page) { shared_->ledger.retain(page); }
  /// One holder less; the last one's page is free. See PageLedger::release.
  void release(PageId page) {
    shared_->ledger.release(page);
    if constexpr (KVSPARSE_POISON_FREED_PAGES != 0) {
      if (references(page) == 0) memory().rows.poison(page);
    }
  }
  /// A new page with the rows and the summary of another one, of this pool or of one like it.
  PageId acquire_copy(const PagePool& from, PageId page) {
    const PageId copy = acquire();
    memory().copy(from.memory(), page, copy);
    return copy;
  }

  /// What the pages hold.
  Memory& memory() { return shared_->memory; }
  const Memory& memory() const { return shared_->memory; }

  friend bool operator==(const PagePool& a, const PagePool& b) { return a.shared_ == b.shared_; }

 private:
  struct Shared {
    Shared(const Geometry& geometry, PageSummary kind, std::size_t pages)
        : memory(geometry, kind, pages),
          ledger(pages, geometry.kv_heads),
          bytes_per_page(PagePool::bytes_per_page(geometry, kind)) {}
    Memory memory;
    PageLedger ledger;
    std::size_t bytes_per_page;
    std::atomic<std::size_t> handles{1};
  };

  static void check(const Geometry& geometry) {
    if (geometry.head_dim == 0 || geometry.page_size == 0 || geometry.kv_heads == 0) {
      KVSPARSE_THROW(ConfigError("a pool's head_dim, page_size and kv_heads must be at least 1"));
    }
    if (geometry.page_size > max_page_size) {
      KVSPARSE_THROW(ConfigError("a pool's page_size = " + std::to_string(geometry.page_size) + " exceeds " +
                                 std::to_string(max_page_size)));
    }
    const std::size_t widest = std::max({geometry.kv_heads, geometry.head_dim, geometry.value_dim});
    if (widest > most_channels) {
      KVSPARSE_THROW(
          ConfigError("a pool's kv_heads, head_dim and value_dim are at most 2^20, not " + std::to_string(widest)));
    }
    if (const std::string problem = values_problem<Key, Value>(geometry); !problem.empty()) {
      KVSPARSE_THROW(ConfigError(problem));
    }
  }
  static std::size_t checked(const Geometry& geometry, PageSummary kind, std::size_t pages) {
    check(geometry);
    if (pages > most_pages) KVSPARSE_THROW(ConfigError(std::to_string(pages) + " pages exceed the limit of 2^31 - 1"));
    if (pages == 0 || pages % geometry.kv_heads != 0) {
      KVSPARSE_THROW(ConfigError(std::to_string(pages) + " pages are not a multiple of " +
                                 std::to_string(geometry.kv_heads) + " kv heads"));
    }
    static_cast<void>(bytes_required(geometry, kind, pages));
    return pages;
  }

  Shared* shared_;
};

}  // namespace kvsparse
