// SPDX-License-Identifier: Apache-2.0
// Pages and their summaries together, and how a policy's views reach them without knowing the storage type.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>

#include "../memory/page_bounds.hpp"
#include "../memory/page_pool.hpp"
#include "../memory/page_summary.hpp"
#include "../policy/head_view.hpp"

namespace kvsparse {

template <StorageScalar Key, StorageScalar Value>
struct PageStore {
  using Pool = PagePool<Key, Value>;
  using Summaries = PageSummaries<SummaryScalar<Key>>;

  PageStore(const Geometry& geometry, PageSummary kind, std::size_t pages)
      : pool(geometry, pages), summaries(geometry, kind, pages) {}

  static std::size_t bytes_required(const Geometry& geometry, PageSummary kind, std::size_t pages) {
    return Pool::bytes_required(geometry, pages) + pages * Summaries::bytes_per_page(geometry, kind);
  }
  static std::size_t bytes_per_page(const Geometry& geometry, PageSummary kind) {
    return Pool::bytes_per_page(geometry) + Summaries::bytes_per_page(geometry, kind);
  }

  static RowAccess row_access() {
    RowAccess access;
    access.load_key = [](const void* store, PageId page, Slot slot, std::span<float> row) {
      load_row(of(store).pool.key_row(page, slot), row);
    };
    access.load_value = [](const void* store, PageId page, Slot slot, std::span<float> row) {
      load_row(of(store).pool.value_row(page, slot), row);
    };
    access.load_bounds = [](const void* store, PageId page, std::span<float> lowest, std::span<float> highest) {
      load_row(of(store).summaries.min(page), lowest);
      load_row(of(store).summaries.max(page), highest);
    };
    access.load_key_sum = [](const void* store, PageId page, std::span<float> sum) {
      std::copy_n(of(store).summaries.sum(page), sum.size(), sum.begin());
    };
    access.upper_bounds = [](const void* store, std::span<const ResidentPage> pages, const QueryGroup& queries,
                             BoundPooling pooling, std::span<float> padded_queries, std::span<float> bounds) {
      page_upper_bounds(of(store).summaries, pages, queries, pooling, padded_queries, bounds);
    };
    return access;
  }

  Pool pool;
  Summaries summaries;

 private:
  static const PageStore& of(const void* store) { return *static_cast<const PageStore*>(store); }
};

}  // namespace kvsparse
