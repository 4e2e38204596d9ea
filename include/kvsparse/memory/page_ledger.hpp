// SPDX-License-Identifier: Apache-2.0
// Which pages of a pool are free, and how many page tables name each of the others.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../config.hpp"
#include "../core/ids.hpp"

namespace kvsparse {

/// Hands out the ids of a pool's pages and counts who holds them. No verb allocates, throws or locks after
/// construction.
///
/// kv heads open their pages in turn, but a query reads one head after another. So the pages never used before are
/// handed out, turn by turn, from one stretch of the memory for each head: what a head reads lies in one piece.
class PageLedger {
 public:
  /// `pages` of all heads together, as many for each of the `heads` that take turns.
  explicit PageLedger(std::size_t pages, std::size_t heads = 1) : heads_(heads), references_(pages) {
    KVSPARSE_ASSERT(pages % heads == 0);
    free_.reserve(pages);
    for (std::size_t turn = pages; turn > 0; --turn) free_.push_back(page_of_turn(turn - 1));
  }

  /// Bytes that construction allocates for each page.
  static constexpr std::size_t bytes_per_page = sizeof(PageId) + sizeof(std::uint32_t);

  std::size_t page_count() const { return references_.size(); }  ///< free or not
  std::size_t free_pages() const { return free_.size(); }        ///< that acquire() can hand out
  /// Pages that more than one table names.
  std::size_t shared_pages() const { return shared_pages_; }
  /// How many tables name the page; 0: it is free.
  std::uint32_t references(PageId page) const {
    KVSPARSE_ASSERT(page.value < references_.size());
    return references_[page.value];
  }
  bool is_shared(PageId page) const { return references(page) > 1; }  ///< named by several

  /// Hands out the page given back last, or the next one never used; for one table. There must be a free page. O(1).
  PageId acquire() {
    KVSPARSE_ASSERT(!free_.empty());
    if (free_.size() + turns_ == page_count()) ++turns_;
    const PageId page = free_.back();
    free_.pop_back();
    references_[page.value] = 1;
    return page;
  }
  /// One more table names the page.
  void retain(PageId page) {
    KVSPARSE_ASSERT(references(page) > 0);
    if (++references_[page.value] == 2) ++shared_pages_;
  }
  /// One table less; the last one's page is free. Once all are, they are handed out as at first again: O(pages used),
  /// which is no more than they were taken.
  void release(PageId page) {
    KVSPARSE_ASSERT(references(page) > 0);
    const std::uint32_t left = --references_[page.value];
    if (left == 1) --shared_pages_;
    if (left > 0) return;
    free_.push_back(page);
    if (free_.size() < page_count()) return;
    for (std::size_t turn = 0; turn < turns_; ++turn) free_[page_count() - 1 - turn] = page_of_turn(turn);
    turns_ = 0;
  }

 private:
  PageId page_of_turn(std::size_t turn) const {
    const std::size_t pages_per_head = references_.size() / heads_;
    return {static_cast<std::uint32_t>(turn % heads_ * pages_per_head + turn / heads_)};
  }

  std::size_t heads_;
  std::vector<PageId> free_;  // the last is handed out first; below those given back lie the never used
  std::vector<std::uint32_t> references_;
  std::size_t shared_pages_ = 0;
  std::size_t turns_ = 0;  // pages handed out for the first time since all were free
};

}  // namespace kvsparse
