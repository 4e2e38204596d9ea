// SPDX-License-Identifier: Apache-2.0
// The evictions of one kv head that lose least, when all the future is known.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "future_page_mass.hpp"

namespace kvsparse_tools {

/// With a budget of P pages, each page from number P on that opens costs one older page; whatever that page would have
/// had from then on is lost. So each of those openings is to be assigned a page of its own, at the least sum: the
/// assignment problem, solved by shortest augmenting paths (Kuhn's Hungarian method as Jonker and Volgenant, 1987, run
/// it). Taking at every opening the page with the least to come is not enough: it holds on to pages that are wanted a
/// little for long, and every new page pays for them.
///
/// Openings are added from the last one backwards, so that one run passes through the best evictions of every budget,
/// the largest first.
class BestEvictions {
 public:
  /// `future` must outlive this.
  BestEvictions(const FuturePageMass& future, std::size_t kv_head)
      : future_(future),
        kv_head_(kv_head),
        opening_of_(future.pages() + 1, none),
        opening_price_(future.pages(), 0.0),
        page_price_(future.pages() + 1, 0.0),
        distance_(future.pages()),
        before_(future.pages()),
        reached_(future.pages() + 1) {}

  /// The eviction before page number `opening` >= 1 opens; call from the last page on downwards, one by one.
  /// O(pages^2), most often far less.
  void add(std::size_t opening) {
    const std::size_t start = future_.pages();  // stands for a page that the new opening holds until it has one
    opening_of_[start] = opening;
    distance_.assign(distance_.size(), std::numeric_limits<double>::infinity());
    reached_.assign(reached_.size(), false);
    std::size_t page = start;
    do {
      reached_[page] = true;
      look_from(page);
      page = nearest();
      move_prices(distance_[page]);
    } while (opening_of_[page] != none);
    while (page != start) {
      opening_of_[page] = opening_of_[before_[page]];
      page = before_[page];
    }
  }

  /// victims[opening]: the page given up for it, of those added so far. victims: [pages]
  void write(std::span<std::uint32_t> victims) const {
    for (std::size_t page = 0; page < future_.pages(); ++page) {
      if (opening_of_[page] != none) victims[opening_of_[page]] = static_cast<std::uint32_t>(page);
    }
  }

 private:
  static constexpr std::size_t none = std::numeric_limits<std::size_t>::max();

  /// What the opening that holds `page` could take instead: pages older than it.
  void look_from(std::size_t page) {
    const std::size_t opening = opening_of_[page];
    const std::span<const double> lost = future_.from(opening, kv_head_);
    for (std::size_t other = 0; other < lost.size(); ++other) {
      const double reduced = lost[other] - opening_price_[opening] - page_price_[other];
      if (reached_[other] || !(reduced < distance_[other])) continue;
      distance_[other] = reduced;
      before_[other] = page;
    }
  }
  std::size_t nearest() const {
    std::size_t nearest = none;
    for (std::size_t page = 0; page < distance_.size(); ++page) {
      if (!reached_[page] && (nearest == none || distance_[page] < distance_[nearest])) nearest = page;
    }
    return nearest;
  }
  void move_prices(double step) {
    for (std::size_t page = 0; page < reached_.size(); ++page) {
      if (reached_[page]) {
        opening_price_[opening_of_[page]] += step;
        page_price_[page] -= step;
      } else if (page < distance_.size()) {
        distance_[page] -= step;
      }
    }
  }

  const FuturePageMass& future_;
  std::size_t kv_head_;
  std::vector<std::size_t> opening_of_;  // [pages + 1] the opening that takes the page, or none
  std::vector<double> opening_price_;    // [pages] the dual solution: no price of a pair exceeds what the pair loses
  std::vector<double> page_price_;       // [pages + 1]
  std::vector<double> distance_;         // [pages] of the cheapest path to each page
  std::vector<std::size_t> before_;      // [pages] the page before it on that path
  std::vector<bool> reached_;            // [pages + 1]
};

}  // namespace kvsparse_tools
