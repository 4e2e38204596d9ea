// SPDX-License-Identifier: Apache-2.0
// Which pages of a pool are free, and how many page tables name each of the others.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../config.hpp"
#include "../core/ids.hpp"

namespace kvsparse {

/// No verb allocates, throws or locks after construction.
class PageLedger {
 public:
  explicit PageLedger(std::size_t pages) : references_(pages) {
    free_.reserve(pages);
    for (std::size_t page = pages; page > 0; --page) free_.push_back({static_cast<std::uint32_t>(page - 1)});
  }

  static constexpr std::size_t bytes_per_page = sizeof(PageId) + sizeof(std::uint32_t);

  std::size_t page_count() const { return references_.size(); }
  std::size_t free_pages() const { return free_.size(); }
  /// Pages that more than one table names.
  std::size_t shared_pages() const { return shared_pages_; }
  /// How many tables name the page; 0: it is free.
  std::uint32_t references(PageId page) const { return references_[page.value]; }
  bool is_shared(PageId page) const { return references_[page.value] > 1; }

  /// Hands out the page given back last, or the lowest never used: positions that arrive together lie together.
  PageId acquire() {
    KVSPARSE_ASSERT(!free_.empty());
    const PageId page = free_.back();
    free_.pop_back();
    references_[page.value] = 1;
    used_ = std::max(used_, std::size_t{page.value} + 1);
    return page;
  }
  /// One more table names the page.
  void retain(PageId page) {
    KVSPARSE_ASSERT(references(page) > 0);
    if (++references_[page.value] == 2) ++shared_pages_;
  }
  /// One table less; the last one's page is free. Once all are, they are handed out from the lowest again: O(pages
  /// used), which is no more than they were taken.
  void release(PageId page) {
    KVSPARSE_ASSERT(references(page) > 0);
    const std::uint32_t left = --references_[page.value];
    if (left == 1) --shared_pages_;
    if (left > 0) return;
    free_.push_back(page);
    if (free_.size() < page_count()) return;
    for (std::size_t low = 0; low < used_; ++low) {
      free_[page_count() - 1 - low] = {static_cast<std::uint32_t>(low)};
    }
    used_ = 0;
  }

 private:
  std::vector<PageId> free_;  // the last is handed out first; below those given back lie the never used, lowest last
  std::vector<std::uint32_t> references_;
  std::size_t shared_pages_ = 0;
  std::size_t used_ = 0;  // pages below were handed out since all were free
};

}  // namespace kvsparse
