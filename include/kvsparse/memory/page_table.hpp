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

struct ResidentPage {
  Position first_position;
  PageId page;
  std::uint32_t tokens = 0;
  bool pinned = false;
};

class PageTable {
 public:
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

  std::size_t size() const { return pages_.size(); }
  std::size_t capacity() const { return pages_.capacity(); }
  const ResidentPage& operator[](PageIndex index) const { return pages_[index.value]; }
  const ResidentPage& back() const { return pages_.back(); }
  std::size_t pinned_pages() const { return pinned_; }
  std::size_t resident_tokens() const { return resident_tokens_; }

  void push_back(ResidentPage page) {
    KVSPARSE_ASSERT(pages_.size() < pages_.capacity());
    pinned_ += page.pinned ? 1 : 0;
    resident_tokens_ += page.tokens;
    pages_.push_back(page);
  }
  /// One more token in the newest page.
  void add_token() {
    ++pages_.back().tokens;
    ++resident_tokens_;
  }
  /// The entry's rows lie in another page of the pool from now on.
  void move_to(PageIndex index, PageId page) { pages_[index.value].page = page; }
  void unpin(PageIndex index) {
    KVSPARSE_ASSERT(pages_[index.value].pinned);
    pages_[index.value].pinned = false;
    --pinned_;
  }
  /// Removes an entry; the later ones move up. O(pages behind it).
  void erase(PageIndex index) {
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
