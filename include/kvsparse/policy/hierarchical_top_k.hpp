// SPDX-License-Identifier: Apache-2.0
// HierarchicalTopK: neighbouring keys are alike, so the best pages are found by descent: cut the sequence into twice as
// many stretches as pages may be read, score each by the key in its middle, keep the better half, cut these in two, and
// so on down to single pages. Source: HiP (Lee et al., ICLR 2025, 2406.09827), section 3.  Needs: some stored keys. Per
// step: O(L/B log(N/L) d) to find pages + O(L d) to read them.  Memory: O(N). Departs from the paper: descends to
// pages, not to blocks of its kernel; one selection for each kv head, by the query head of its group that scores
// highest; no descent is reused by later steps; the open page is always read.
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <limits>

#include "policy.hpp"

namespace kvsparse {

struct HierarchicalTopK {
  static constexpr std::string_view name = "hierarchical_top_k";
  static constexpr bool reads_rows = true;

  void select(HeadView<HierarchicalTopK> head, QueryGroup queries, Selection& selection) const {
    selection.add(head.open_page());
    const std::size_t pages = head.size() - 1;
    const std::size_t kept = head.read_page_budget() - 1;
    if (kept == 0) return;
    std::size_t width = std::bit_ceil(divide_up(pages, 2 * kept));
    std::size_t stretches = divide_up(pages, width);
    Stretches list(head);
    for (std::size_t i = 0; i < stretches; ++i) list.set(i, i * width);
    keep_best(head, queries, width, list, stretches, kept);
    while (width > 1) {
      width /= 2;
      cut_in_two(width, pages, list, stretches);
      keep_best(head, queries, width, list, stretches, kept);
    }
    for (std::size_t i = 0; i < stretches; ++i) selection.add(PageIndex{list[i]});
  }

 private:
  /// The descent's list: the first page of each stretch. Lies in the scratch memory, bit for bit, because state is not
  /// for select to change.
  class Stretches {
   public:
    explicit Stretches(const HeadView<HierarchicalTopK>& head) : memory_(head.scratch().first(head.size())) {}
    std::uint32_t operator[](std::size_t i) const {
      std::uint32_t page;
      std::memcpy(&page, memory_.data() + i, sizeof page);
      return page;
    }
    void set(std::size_t i, std::size_t page) {
      const auto value = static_cast<std::uint32_t>(page);
      std::memcpy(memory_.data() + i, &value, sizeof value);
    }

   private:
    std::span<float> memory_;
    static_assert(sizeof(float) == sizeof(std::uint32_t));
  };

  /// Each stretch becomes two of `width` pages, in position order; the last one's second half may lie behind the pages.
  static void cut_in_two(std::size_t width, std::size_t pages, Stretches& list, std::size_t& stretches) {
    const bool last_is_whole = list[stretches - 1] + width < pages;
    for (std::size_t i = stretches; i-- > 0;) {
      const std::uint32_t first = list[i];
      if (i + 1 < stretches || last_is_whole) list.set(2 * i + 1, first + width);
      list.set(2 * i, first);
    }
    stretches = 2 * stretches - (last_is_whole ? 0 : 1);
  }

  /// Leaves the `kept` stretches whose middle key scores highest; ties go to the oldest, and a stretch that nobody can
  /// rank (NaN) is kept.
  static void keep_best(const HeadView<HierarchicalTopK>& head, const QueryGroup& queries, std::size_t width,
                        Stretches& list, std::size_t& stretches, std::size_t kept) {
    if (stretches <= kept) return;
    const std::span<float> rest = head.scratch().subspan(head.size());
    const std::span<float> key = rest.first(head.head_dim());
    const std::span<float> scores = rest.subspan(key.size(), stretches);
    const std::span<float> ranked = rest.subspan(key.size() + stretches, stretches);
    for (std::size_t i = 0; i < stretches; ++i) {
      const std::size_t first = list[i];
      const auto middle = static_cast<std::uint32_t>(first + std::min(width, head.size() - 1 - first) / 2);
      head.load_key({middle}, Slot{static_cast<std::uint32_t>(head.tokens({middle}) / 2)}, key);
      scores[i] = -std::numeric_limits<float>::infinity();
      for (std::size_t q = 0; q < queries.size; ++q) {
        float product = 0.0F;
        for (std::size_t c = 0; c < key.size(); ++c) product += queries[q][c] * key[c];
        if (product != product) product = std::numeric_limits<float>::infinity();
        scores[i] = std::max(scores[i], product);
      }
    }
    std::copy(scores.begin(), scores.end(), ranked.begin());
    const auto last = ranked.begin() + static_cast<std::ptrdiff_t>(kept - 1);
    std::nth_element(ranked.begin(), last, ranked.end(), std::greater<>());
    const float lowest = *last;
    auto ties = static_cast<std::ptrdiff_t>(kept) -
                std::count_if(ranked.begin(), last, [&](float score) { return score > lowest; });
    std::size_t left = 0;
    for (std::size_t i = 0; i < stretches; ++i) {
      if (scores[i] > lowest || (scores[i] == lowest && ties-- > 0)) list.set(left++, list[i]);
    }
    stretches = left;
  }
};

}  // namespace kvsparse
