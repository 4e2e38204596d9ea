// SPDX-License-Identifier: Apache-2.0
// Clustered: keys gather in clusters, so let a page that is much like another go and let the other stand for both: its
// tokens weigh as much as what they stand for. Source: SubGen (Zandieh et al., 2402.06082), section 2.  Needs: mean
// page summaries. Per step: O(L d), and for a victim, once a page, O((L/B)^2 d).  Memory: L tokens, a key row and a
// number a page. Departs from the paper: clusters are of pages by their mean key, and a victim is one of the two pages
// nearest to one another, where the paper samples tokens within balls of a fixed radius; the lighter page of the two
// goes, at equal weight the newer one. One weight serves denominator and numerator, where the paper samples values
// apart. The newest `window` tokens stay as they are, as in the paper, unless too few pages are older.
#pragma once

#include <algorithm>
#include <cmath>

#include "policy.hpp"

namespace kvsparse {

struct Clustered {
  static constexpr std::string_view name = "clustered";
  static constexpr PageSummary page_summary = PageSummary::mean;
  static constexpr bool select_always = true;  // weights, not a choice of pages: everything resident is read

  struct Options {
    std::size_t window = 64;  ///< newest tokens that neither go nor stand for others
    bool pin_prompt = false;  ///< prompt pages do not go, but may stand for others
    void visit(auto&& field) {
      field("window", window);
      field("pin_prompt", pin_prompt);
    }
  } options;

  struct PageState {
    double tokens_gone = 0.0;  // that the page stands for beside its own
  };

  bool pin_prompt() const { return options.pin_prompt; }

  void select(HeadView<Clustered> head, QueryGroup, Selection& selection) const {
    for (const PageIndex page : head.pages()) {
      const double gone = head.state(page).tokens_gone;
      const auto weight = static_cast<float>(std::log1p(gone / static_cast<double>(head.tokens(page))));
      selection.add({page, {}, weight, weight, 0});
    }
  }

  PageIndex victim(HeadView<Clustered> head) const {
    const std::uint32_t pages = gathering_pages(head);
    PageIndex lightest = head.lowest_evictable([](PageIndex page) { return page.value; });
    double smallest = std::numeric_limits<double>::infinity();
    for (PageIndex b{1}; b.value < pages; ++b.value) {
      load_mean(head, b, 0);
      for (PageIndex a{0}; a.value < b.value; ++a.value) {
        if (!head.is_evictable(a) && !head.is_evictable(b)) continue;
        const double distance = distance_to(head, a);
        if (!(distance < smallest)) continue;
        smallest = distance;
        const bool first_goes = !head.is_evictable(b) || (head.is_evictable(a) && weight(head, a) < weight(head, b));
        lightest = first_goes ? a : b;
      }
    }
    return lightest;
  }

  void on_evict(HeadView<Clustered> head, PageIndex page) const {
    load_mean(head, page, 0);
    const std::uint32_t pages = gathering_pages(head);
    PageIndex nearest = page;
    double smallest = std::numeric_limits<double>::infinity();
    for (PageIndex other{0}; other.value < pages; ++other.value) {
      if (other == page) continue;
      const double distance = distance_to(head, other);
      if (nearest == page || distance < smallest) {
        nearest = other;
        smallest = distance;
      }
    }
    if (nearest != page) head.state(nearest).tokens_gone += weight(head, page);
  }

 private:
  /// The oldest pages, among which clusters form: those before the window, or all if these are too few.
  std::uint32_t gathering_pages(const HeadPages& head) const {
    const std::size_t recent = head.geometry().pages_for(options.window);
    const auto older = static_cast<std::uint32_t>(head.size() - std::min(head.size(), recent));
    const auto all = static_cast<std::uint32_t>(head.size());
    std::uint32_t evictable = 0;
    for (std::uint32_t page = 0; page < older; ++page) evictable += head.is_evictable({page}) ? 1 : 0;
    return older >= 2 && evictable > 0 ? older : all;
  }
  static double weight(const HeadView<Clustered>& head, PageIndex page) {
    return static_cast<double>(head.tokens(page)) + head.state(page).tokens_gone;
  }
  /// The scratch holds the mean keys of two pages.
  static std::span<float> mean(const HeadPages& head, std::size_t which) {
    return head.scratch().subspan(which * head.head_dim(), head.head_dim());
  }
  static void load_mean(const HeadPages& head, PageIndex page, std::size_t which) {
    head.load_mean_key(page, mean(head, which));
  }
  /// Squared, from the first mean in the scratch.
  static double distance_to(const HeadPages& head, PageIndex page) {
    load_mean(head, page, 1);
    double sum = 0.0;
    for (std::size_t i = 0; i < head.head_dim(); ++i) {
      const double difference = static_cast<double>(mean(head, 0)[i]) - static_cast<double>(mean(head, 1)[i]);
      sum += difference * difference;
    }
    return sum;
  }
};

}  // namespace kvsparse
