// SPDX-License-Identifier: Apache-2.0
// Which pages of one kv head are resident, oldest first. Memory order in the pool is another matter: attention does not
// depend on order, so an eviction moves table entries, never keys or values.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../config.hpp"
#include "../core/ids.hpp"

namespace kvsparse {

/// A page that a kv head holds.
struct ResidentPage {
  Position first_position;   ///< of slot 0
  PageId page;               ///< where it lies in the pool
  std::uint32_t tokens = 0;  ///< stored in it; 0 between its opening and its first token
  bool pinned = false;       ///< never a victim
};

/// A kv head's resident pages, oldest first. No verb allocates, throws or locks after construction.
class PageTable {
 public:
  /// Room for so many pages.
  explicit PageTable(std::size_t capacity) { pages_.reserve(capacity); }
  PageTable(const PageTable& other) : pinned_(other.pinned_), resident_tokens_(other.resident_tokens_) {
    pages_.reserve(other.pages_.capacity());
    pages_ = other.pages_;
  }
  PageTable& operator=(const PageTable& other) {
    PageTable copy(other);
    return *this = static_cast<PageTable&&>(copy);
  }
  PageTable(PageTable&&) noexcept = default;
  PageTable& operator=(PageTable&&) noexcept = default;

  std::size_t size() const { return pages_.size(); }          ///< pages
  std::size_t capacity() const { return pages_.capacity(); }  ///< pages there is room for
  /// The index-th oldest page; index < size().
  const ResidentPage& operator[](PageIndex index) const {
    KVSPARSE_ASSERT(index.value < pages_.size());
    return pages_[index.value];
  }
  /// The newest page; there must be one.
  const ResidentPage& back() const {
    KVSPARSE_ASSERT(!pages_.empty());
    return pages_.back();
  }
  std::size_t pinned_pages() const { return pinned_; }              ///< pages
  std::size_t resident_tokens() const { return resident_tokens_; }  ///< in all pages

  /// A newer page; size() < capacity().
  void push_back(ResidentPage page) {
    KVSPARSE_ASSERT(pages_.size() < pages_.capacity());
    pinned_ += page.pinned ? 1 : 0;
    resident_tokens_ += page.tokens;
    pages_.push_back(page);
  }
  /// One more token in the newest page.
  void add_token() {
    KVSPARSE_ASSERT(!pages_.empty());
    ++pages_.back().tokens;
    ++resident_tokens_;
  }
  /// The entry's rows lie in another page of the pool from now on.
  void move_to(PageIndex index, PageId page) {
    KVSPARSE_ASSERT(index.value < pages_.size());
    pages_[index.value].page = page;
  }
  /// The page, which was pinned, may be evicted from now on.
  void unpin(PageIndex index) {
    KVSPARSE_ASSERT(index.value < pages_.size());
    KVSPARSE_ASSERT(pages_[index.value].pinned);
    pages_[index.value].pinned = false;
    --pinned_;
  }
  /// Removes an entry; the later ones move up. O(pages behind it).
  void erase(PageIndex index) {
    KVSPARSE_ASSERT(index.value < pages_.size());
    const ResidentPage& page = pages_[index.value];
    pinned_ -= page.pinned ? 1 : 0;
    resident_tokens_ -= page.tokens;
    pages_.erase(pages_.begin() + index.value);
  }
  /// Keeps the `pages` oldest, and `tokens` tokens of the last of them.
  void cut(std::size_t pages, std::size_t tokens) {
    KVSPARSE_ASSERT(pages <= pages_.size());
    pages_.resize(pages);
    if (pages > 0) pages_.back().tokens = static_cast<std::uint32_t>(tokens);
    pinned_ = resident_tokens_ = 0;
    for (const ResidentPage& page : pages_) {
      pinned_ += page.pinned ? 1 : 0;
      resident_tokens_ += page.tokens;
    }
  }
  /// Forgets all pages.
  void clear() {
    pages_.clear();
    pinned_ = 0;
    resident_tokens_ = 0;
  }

 private:
  std::vector<ResidentPage> pages_;
  std::size_t pinned_ = 0;
  std::size_t resident_tokens_ = 0;
};

}  // namespace kvsparse
