// SPDX-License-Identifier: Apache-2.0
// Certified: sparse attention with a proof. Quest's bound on a page's dot products is a bound, so reading pages in its
// order may stop as soon as all that is unread together cannot hold more than `epsilon` of the softmax, under any query
// head: the output is then off by at most epsilon times the spread of the values. Source: kvsparse's own, from the
// bound of 2406.10774; the inequality and its roundings are in mass_bounds.hpp.  Needs: min/max page summaries. Per
// step: O(N/B d), a few rounds of O(N/B log(N/B)), and O(B d) a page read; as many pages as the proof takes, whatever
// the read budget is.  Memory: O(N) plus two key rows a page. Composed with an evictor the proof is about what is
// resident, and nothing is proved of what is gone. attend_certified() returns what was proved.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>

#include "mass_bounds.hpp"
#include "policy.hpp"

namespace kvsparse {

struct Certified {
  static constexpr std::string_view name = "certified";
  static constexpr bool select_always = true;
  static constexpr bool knows_logits = true;
  static constexpr PageSummary page_summary = PageSummary::min_max;

  struct Options {
    double epsilon = 1e-2;  ///< the largest share of the softmax, under each query head, that may stay unread
    void visit(auto&& field) { field("epsilon", epsilon); }
    std::string problem() const {
      if (!(epsilon > 0.0 && epsilon < 1.0)) return "epsilon = " + std::to_string(epsilon) + " is not in (0, 1)";
      return {};
    }
  } options;

  /// The open page, and for each query head the page that can hold most.
  void select(HeadView<Certified> head, QueryGroup queries, Selection& selection) const {
    const MassBounds bounds(head, queries);
    bounds.compute();
    selection.add(head.open_page());
    for (std::size_t q = 0; q < queries.size; ++q) {
      PageIndex best{};
      for (const PageIndex page : head.pages()) {
        if (!head.is_open(page) && bounds.mass(page, q) > bounds.mass(best, q)) best = page;
      }
      selection.add(best);
    }
  }

  /// The pages that prove it if those read next hold as much of their bounds as those read so far did.
  void select_more(HeadView<Certified> head, QueryGroup queries, std::span<const SoftmaxState> states,
                   Selection& selection) const {
    const MassBounds bounds(head, queries);
    const std::span<float> shares = bounds.free_scratch().first(head.size());
    std::fill(shares.begin(), shares.end(), 0.0F);
    bool is_proved = true;
    for (std::size_t q = 0; q < queries.size; ++q) {
      double unread = 0.0;
      for (const PageIndex page : head.pages()) {
        if (!selection.contains(page)) unread += static_cast<double>(bounds.mass(page, q));
      }
      const double read = bounds.mass_read(q, states[q], [&](PageIndex page) { return selection.contains(page); });
      if (MassBounds::largest_share(unread, read) <= options.epsilon) continue;
      is_proved = false;
      for (const PageIndex page : head.pages()) {
        const double share = static_cast<double>(bounds.mass(page, q)) / read;
        const bool is_known = share <= static_cast<double>(std::numeric_limits<float>::max());
        shares[page.value] =
            is_known ? std::max(shares[page.value], static_cast<float>(share)) : std::numeric_limits<float>::infinity();
      }
    }
    if (!is_proved) selection.add_highest(shares, pages_to_prove(head, shares, selection));
  }

 private:
  /// shares [size()]: what pages can hold at most, for the query head that needs them most, of what it has read.
  std::size_t pages_to_prove(const HeadView<Certified>& head, std::span<const float> shares,
                             const Selection& selection) const {
    const std::span<float> ranked = head.scratch().last(head.size());
    std::size_t unread = 0;
    double bounds_of_read = 0.0;
    for (const PageIndex page : head.pages()) {
      const float share = shares[page.value];
      if (selection.contains(page) && !head.is_open(page)) bounds_of_read += static_cast<double>(share);
      if (!selection.contains(page) && share != 0.0F) ranked[unread++] = share;
    }
    std::sort(ranked.data(), ranked.data() + unread, std::greater<>());
    std::size_t pages = 0;
    while (pages < unread && std::isinf(ranked[pages])) ++pages;  // of which nothing is known
    double rest = 0.0;
    for (std::size_t page = pages; page < unread; ++page) rest += static_cast<double>(ranked[page]);
    double read = 1.0;
    const double held = std::min(1.0, 1.0 / bounds_of_read);  // of its bound, by an average page
    while (pages < unread && rest > options.epsilon / (1.0 - options.epsilon) * read) {
      const auto share = static_cast<double>(ranked[pages++]);
      rest -= share;
      read += share * held;
    }
    return std::max<std::size_t>(pages, 1);
  }
};

}  // namespace kvsparse
