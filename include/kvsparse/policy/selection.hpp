// SPDX-License-Identifier: Apache-2.0
// What `select` writes: the pages that a query group reads, whole or in part, and with which weight.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <span>
#include <vector>

#include "../config.hpp"
#include "../core/geometry.hpp"
#include "../core/ids.hpp"

namespace kvsparse {

/// One page to read. The defaults read the whole page as it is.
struct SelectedPage {
  PageIndex page;
  /// Bit s set: slot s is read. Empty: all. From Selection::token_mask.
  std::span<const std::uint64_t> tokens = {};
  /// log of how many tokens each token of the page stands for, in the denominator and in the numerator (SubGen keeps
  /// two).
  float log_weight = 0.0F;
  float value_log_weight = 0.0F;
  /// The query is rotated back by this many positions before it meets the page (StreamingLLM's in-cache positions).
  std::int64_t rotate_back = 0;
};

class Selection {
 public:
  /// Room for `pages` pages; for their token masks too when the policy's granularity is token.
  Selection(std::size_t pages, std::size_t page_size, bool token_masks)
      : mask_words_(token_masks ? divide_up(page_size, 64) : 0) {
    entries_.reserve(pages);
    order_.reserve(pages);
    selected_.reserve(pages);
    masks_.resize(mask_words_ * pages);
  }
  Selection(const Selection& other) : Selection(other.entries_.capacity(), 64, false) {
    mask_words_ = other.mask_words_;
    masks_.resize(other.masks_.size());
  }
  Selection& operator=(const Selection& other) {
    Selection copy(other);
    return *this = static_cast<Selection&&>(copy);
  }
  Selection(Selection&&) noexcept = default;
  Selection& operator=(Selection&&) noexcept = default;

  static std::size_t bytes_required(std::size_t pages, std::size_t page_size, bool token_masks) {
    const std::size_t words = token_masks ? divide_up(page_size, 64) : 0;
    return pages * (sizeof(SelectedPage) + sizeof(std::uint32_t) + 1 + words * sizeof(std::uint64_t));
  }

  /// Starts a selection among `resident` pages.
  void begin(std::size_t resident) {
    entries_.clear();
    selected_.assign(resident, 0);
  }
  std::size_t resident_pages() const { return selected_.size(); }
  std::span<const SelectedPage> pages() const { return entries_; }
  bool contains(PageIndex page) const { return selected_[page.value] != 0; }

  /// Reads a page; adding one twice has no effect.
  void add(SelectedPage selected) {
    KVSPARSE_ASSERT(selected.page.value < selected_.size());
    if (contains(selected.page)) return;
    selected_[selected.page.value] = 1;
    entries_.push_back(selected);
  }
  void add(PageIndex page) { add(SelectedPage{page, {}, 0.0F, 0.0F, 0}); }
  void add_all() {
    for (std::uint32_t page = 0; page < selected_.size(); ++page) add(PageIndex{page});
  }
  /// Adds the `count` pages with the highest score among those not yet added; ties go to the oldest page. scores:
  /// [resident_pages()], overwritten where they are NaN (a page nobody can rank is read first). O(resident_pages()).
  void add_highest(std::span<float> scores, std::size_t count) {
    order_.clear();
    for (std::uint32_t page = 0; page < selected_.size(); ++page) {
      if (contains({page})) continue;
      if (!(scores[page] == scores[page])) scores[page] = std::numeric_limits<float>::infinity();
      order_.push_back(page);
    }
    count = std::min(count, order_.size());
    if (count == 0) return;
    const auto better = [&](std::uint32_t a, std::uint32_t b) {
      return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
    };
    std::nth_element(order_.begin(), order_.begin() + static_cast<std::ptrdiff_t>(count - 1), order_.end(), better);
    for (std::size_t i = 0; i < count; ++i) add(PageIndex{order_[i]});
  }
  /// The page's token mask, all zero: set the bits of the slots to read and pass it as SelectedPage::tokens.
  std::span<std::uint64_t> token_mask(PageIndex page) {
    KVSPARSE_ASSERT(mask_words_ > 0);
    const std::span<std::uint64_t> mask(masks_.data() + page.value * mask_words_, mask_words_);
    std::fill(mask.begin(), mask.end(), 0);
    return mask;
  }

  /// Puts the pages into position order, so that reading everything has the order of reading densely.
  void sort_by_position() {
    std::sort(entries_.begin(), entries_.end(),
              [](const SelectedPage& a, const SelectedPage& b) { return a.page < b.page; });
  }

 private:
  std::size_t mask_words_;
  std::vector<SelectedPage> entries_;
  std::vector<std::uint32_t> order_;
  std::vector<std::uint8_t> selected_;
  std::vector<std::uint64_t> masks_;
};

/// What `trim` writes: pages to give up. Pinned and open pages are passed over.
class PageList {
 public:
  explicit PageList(std::size_t capacity) { pages_.reserve(capacity); }
  PageList(const PageList& other) { pages_.reserve(other.pages_.capacity()); }
  PageList& operator=(const PageList& other) {
    PageList copy(other);
    return *this = static_cast<PageList&&>(copy);
  }
  PageList(PageList&&) noexcept = default;
  PageList& operator=(PageList&&) noexcept = default;
  void clear() { pages_.clear(); }
  void add(PageIndex page) {
    KVSPARSE_ASSERT(pages_.size() < pages_.capacity());
    if (pages_.size() < pages_.capacity()) pages_.push_back(page);
  }
  std::span<const PageIndex> pages() const { return pages_; }
  /// Each page once. Sorts in place.
  std::span<const PageIndex> newest_first() {
    std::sort(pages_.begin(), pages_.end(), std::greater<>());
    return {pages_.begin(), std::unique(pages_.begin(), pages_.end())};
  }

 private:
  std::vector<PageIndex> pages_;
};

}  // namespace kvsparse
