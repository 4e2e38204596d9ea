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
#include "../core/saturating_size.hpp"
#include "../core/simd.hpp"

namespace kvsparse {

/// One page to read. The defaults read the whole page as it is.
struct SelectedPage {
  PageIndex page;  ///< which resident page
  /// Bit s set: slot s is read. Empty: all. From Selection::token_mask.
  std::span<const std::uint64_t> tokens = {};
  /// log of how many tokens each token of the page stands for, in the softmax's denominator.
  float log_weight = 0.0F;
  /// The same in the numerator; SubGen keeps two.
  float value_log_weight = 0.0F;
  /// The query is rotated back by this many positions before it meets the page (StreamingLLM's in-cache positions).
  std::int64_t rotate_back = 0;
};

/// The pages that a query reads, each once. No verb allocates, throws or locks after construction.
class Selection {
 public:
  /// Room for `pages` pages; for their token masks too when the policy's granularity is token.
  Selection(std::size_t pages, std::size_t page_size, bool token_masks)
      : mask_words_(token_masks ? divide_up(page_size, 64) : 0) {
    entries_.reserve(pages);
    ranks_.resize(round_up(pages, simd::lanes));
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

  /// Bytes that construction allocates.
  static SaturatingSize bytes_required(std::size_t pages, std::size_t page_size, bool token_masks) {
    const std::size_t words = token_masks ? divide_up(page_size, 64) : 0;
    return SaturatingSize(pages) * (sizeof(SelectedPage) + 1 + words * sizeof(std::uint64_t)) +
           SaturatingSize(round_up(pages, simd::lanes)) * sizeof(std::int32_t);
  }

  /// Starts a selection among `resident` pages.
  void begin(std::size_t resident) {
    entries_.clear();
    selected_.assign(resident, 0);
  }
  std::size_t resident_pages() const { return selected_.size(); }   ///< pages to choose among
  std::span<const SelectedPage> pages() const { return entries_; }  ///< those chosen so far
  /// Whether the page, or part of it, is chosen.
  bool contains(PageIndex page) const {
    KVSPARSE_ASSERT(page.value < selected_.size());
    return selected_[page.value] != 0;
  }

  /// Reads a page; adding one twice has no effect.
  void add(SelectedPage selected) {
    KVSPARSE_ASSERT(selected.page.value < selected_.size());
    if (contains(selected.page)) return;
    selected_[selected.page.value] = 1;
    entries_.push_back(selected);
  }
  void add(PageIndex page) { add(SelectedPage{page, {}, 0.0F, 0.0F, 0}); }
  /// Reads every resident page.
  void add_all() {
    for (std::uint32_t page = 0; page < selected_.size(); ++page) add(PageIndex{page});
  }
  /// Adds the `count` pages with the highest score among those not yet added; ties go to the oldest page, and a page
  /// that nobody can rank (NaN) is read first. scores: [resident_pages()]. O(resident_pages()), 32 vector passes at
  /// most.
  void add_highest(std::span<const float> scores, std::size_t count) {
    KVSPARSE_ASSERT(scores.size() >= selected_.size());
    const std::size_t pages = selected_.size();
    count = std::min(count, pages - entries_.size());
    if (count == 0) return;
    rank(scores);
    // The count-th highest rank is found bit by bit, without a branch that depends on a score, as long as more ranks
    // reach it than are wanted; then pages come out in position order.
    std::uint32_t threshold = 0;
    std::size_t reaching = pages;
    for (std::uint32_t bit = std::uint32_t{1} << 31; bit != 0 && reaching != count; bit >>= 1) {
      const std::size_t count_of_half = count_ranks(as_rank(threshold | bit));
      if (count_of_half < count) continue;
      threshold |= bit;
      reaching = count_of_half;
    }
    const std::int32_t lowest = as_rank(threshold);
    std::size_t ties = count;
    if (reaching != count) ties -= count_ranks(lowest + 1);
    for (std::uint32_t page = 0; page < pages; ++page) {
      if (ranks_[page] < lowest) continue;
      if (reaching == count || ranks_[page] > lowest || (ties > 0 && ties-- > 0)) add(PageIndex{page});
    }
  }
  /// The page's token mask, all zero: set the bits of the slots to read and pass it as SelectedPage::tokens.
  std::span<std::uint64_t> token_mask(PageIndex page) {
    KVSPARSE_ASSERT(mask_words_ > 0 && page.value < selected_.size());
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
  static constexpr std::int32_t no_rank = std::numeric_limits<std::int32_t>::min();

  /// ranks_: integers in the order of the scores. Pages already added, and the padding, get the lowest.
  void rank(std::span<const float> scores) {
    const std::size_t pages = selected_.size();
    for (std::size_t page = 0; page < pages; page += simd::lanes) {
      simd::Floats score;
      if (page + simd::lanes <= pages) {
        score = simd::load(scores.data() + page);
      } else {
        score = simd::load_elements(scores.data() + page, pages - page);
      }
      score = score == score ? score : simd::broadcast(std::numeric_limits<float>::infinity());
      // Adding zero makes -0 a +0; then the bits of a float, its magnitude turned around when it is negative, order it.
      const simd::Ints bits = simd::bits_as<simd::Ints>(score + 0.0F);
      simd::store(ranks_.data() + page, bits ^ ((bits >> 31) & 0x7FFFFFFF));
    }
    for (const SelectedPage& added : entries_) ranks_[added.page.value] = no_rank;
    std::fill(ranks_.begin() + static_cast<std::ptrdiff_t>(pages), ranks_.end(), no_rank);
  }
  /// How many ranks are at least `lowest`.
  std::size_t count_ranks(std::int32_t lowest) const {
    simd::Ints below{};
    for (std::size_t page = 0; page < selected_.size(); page += simd::lanes) {
      below -= simd::load(ranks_.data() + page) >= lowest;
    }
    std::size_t count = 0;
    for (std::size_t lane = 0; lane < simd::lanes; ++lane) count += static_cast<std::size_t>(below[lane]);
    return count;
  }
  /// Bits whose unsigned order is that of the ranks.
  static std::int32_t as_rank(std::uint32_t bits) { return static_cast<std::int32_t>(bits ^ 0x80000000U); }

  std::size_t mask_words_;
  std::vector<SelectedPage> entries_;
  std::vector<std::int32_t> ranks_;  // of add_highest, padded to whole vectors
  std::vector<std::uint8_t> selected_;
  std::vector<std::uint64_t> masks_;
};

/// What `trim` writes: pages to give up. Pinned and open pages are passed over.
class PageList {
 public:
  /// Room for so many entries, allocated here.
  explicit PageList(std::size_t capacity) { pages_.reserve(capacity); }
  PageList(const PageList& other) { pages_.reserve(other.pages_.capacity()); }
  PageList& operator=(const PageList& other) {
    PageList copy(other);
    return *this = static_cast<PageList&&>(copy);
  }
  PageList(PageList&&) noexcept = default;
  PageList& operator=(PageList&&) noexcept = default;
  void clear() { pages_.clear(); }  ///< no page
  /// One more. There is room for each resident page once; what is too much is left out.
  void add(PageIndex page) {
    KVSPARSE_ASSERT(pages_.size() < pages_.capacity());
    if (pages_.size() < pages_.capacity()) pages_.push_back(page);
  }
  std::span<const PageIndex> pages() const { return pages_; }  ///< as they were added
  /// Each page once. Sorts in place.
  std::span<const PageIndex> newest_first() {
    std::sort(pages_.begin(), pages_.end(), std::greater<>());
    return {pages_.begin(), std::unique(pages_.begin(), pages_.end())};
  }

 private:
  std::vector<PageIndex> pages_;
};

}  // namespace kvsparse
