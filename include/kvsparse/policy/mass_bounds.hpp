// SPDX-License-Identifier: Apache-2.0
// How much of the softmax the pages that a query has not read can hold at most, whatever their keys are: a proof, from
// the pages' smallest and largest keys, that reading them would change little.
//
//   U   the sum over unread tokens of exp(largest logit that the page's bounds allow)
//   R   the sum of exp(logit) over what was read, and of the sink logit
//   the share of the unread tokens in the whole softmax is at most U / (R + U)
//
// Every float operation on the way is taken to have gone the wrong way: a dot product of d floats is off by no more
// than gamma * ||query||_1 * (largest magnitude of the page's keys), with gamma = n u / (1 - n u) for n operations of
// unit roundoff u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1); U is rounded up and R
// down. Source: Quest's bound (2406.10774) used as a bound. Keys and queries must be finite; where a bound is not, the
// share is at most 1.
#pragma once

#include <cmath>
#include <cstddef>
#include <limits>
#include <span>

#include "../core/simd.hpp"
#include "../core/softmax_state.hpp"
#include "head_view.hpp"

namespace kvsparse {

/// Lies in the scratch of a HeadPages, of which it takes size() * (queries.size + 1) + queries.size floats from the
/// front: select may compute it and select_more find it there again.
class MassBounds {
 public:
  /// queries: those of the group from the first_query-th on.
  MassBounds(const HeadPages& head, const QueryGroup& queries, std::size_t first_query = 0)
      : head_(head),
        queries_(queries),
        first_query_(first_query),
        masses_(head.scratch().first(head.size() * queries.size)),
        magnitudes_(head.scratch().subspan(masses_.size(), head.size())),
        references_(head.scratch().subspan(masses_.size() + magnitudes_.size(), queries.size)) {}

  /// Scratch that is free beside it.
  std::span<float> free_scratch() const {
    return head_.scratch().subspan(masses_.size() + magnitudes_.size() + references_.size());
  }

  /// Fills it. Needs page_summary = min_max. The open page may hold tokens that the query does not see, such as drafts
  /// that will be rejected: all but its own mass() is as if they had not come. O(size() * queries.size * head_dim), at
  /// the bandwidth of the summaries.
  void compute() const {
    head_.upper_bounds(queries_, masses_);
    head_.largest_magnitudes(magnitudes_);
    magnitudes_[head_.open_page().value] = largest_visible_magnitude(head_.open_page());
    for (std::size_t q = 0; q < queries_.size; ++q) {
      const double norm = norm_of(q);
      float reference = -std::numeric_limits<float>::infinity();
      for (const PageIndex page : head_.pages()) {
        float& bound = masses_[at(page, q)];
        bound = logit_bound(page, q, static_cast<double>(bound), norm);
        if (head_.is_open(page) || !(bound <= std::numeric_limits<float>::max())) continue;
        if (bound > reference) reference = bound;
      }
      references_[q] = reference;
    }
    for (const PageIndex page : head_.pages()) {
      const auto tokens = static_cast<float>(head_.tokens_in_window(page));
      for (std::size_t q = 0; q < queries_.size; ++q) {
        float& mass = masses_[at(page, q)];
        mass = tokens == 0.0F ? 0.0F : tokens * exp_at_least(mass - references_[q]);
      }
    }
  }

  /// No more than this is the sum of exp(logit) over the page's visible tokens, in units of the query head's own.
  float mass(PageIndex page, std::size_t query) const { return masses_[at(page, query)]; }

  /// No less than this is the sum of exp(logit) over what was read, in the same units; state: of the query head, as the
  /// kernel left it. is_read(page): whether any of it was. O(size() + head_dim).
  template <class IsRead>
  double mass_read(std::size_t query, const SoftmaxState& state, IsRead&& is_read) const {
    const double norm = norm_of(query);
    double logit_error = 0.0;
    std::size_t pages_read = 0;
    for (const PageIndex page : head_.pages()) {
      if (!is_read(page)) continue;
      logit_error = std::fmax(logit_error, error_of_logits(page, query, norm));
      ++pages_read;
    }
    // Beside the logits: what exponents lose as they are taken relative to maxima, of which what matters lies within
    // 88, and so many exponentials of 1 ulp, products and sums.
    const auto operations = static_cast<double>(head_.page_size() + 4 * pages_read + 64);
    const double error = logit_error + 2e-5 + operations * 4.0 * unit;
    const double log_sum = static_cast<double>(state.max) + std::log(static_cast<double>(state.sum));
    return std::exp(log_sum - error - static_cast<double>(references_[query]));
  }

  /// The largest share of the softmax that unread tokens can have. mass_unread: the sum of their mass().
  static double largest_share(double mass_unread, double mass_read) {
    if (mass_unread == 0.0) return 0.0;
    const double ratio = mass_unread / mass_read;
    const double share = ratio / (1.0 + ratio);
    return share <= 1.0 ? std::fmax(share * (1.0 + 1e-9), smallest) : 1.0;
  }

 private:
  static constexpr double unit = 1.0 / (1 << 24);  // roundoff of a float
  static constexpr double smallest = static_cast<double>(std::numeric_limits<float>::min());

  std::size_t at(PageIndex page, std::size_t query) const { return page.value * queries_.size + query; }
  double norm_of(std::size_t query) const {
    double norm = 0.0;
    for (const float element : queries_[query]) norm += std::fabs(static_cast<double>(element));
    return norm;
  }
  float largest_visible_magnitude(PageIndex page) const {
    const std::span<float> row = free_scratch().first(head_.head_dim());
    float largest = 0.0F;
    for (std::uint32_t slot = 0; slot < head_.tokens(page); ++slot) {
      head_.load_key(page, Slot{slot}, row);
      for (const float element : row) largest = std::fmax(largest, std::fabs(element));
    }
    return largest;
  }
  float slope(std::size_t query) const {
    const std::vector<float>& slopes = head_.logits().alibi_slopes;
    const std::size_t head = head_.kv_head() * head_.geometry().group() + first_query_ + query;
    return slopes.empty() ? 0.0F : slopes[head];
  }

  /// By how much a scaled dot product of the query and a key of the page may be off, be it the kernel's or the bound's.
  double error_of_dot(PageIndex page, double norm) const {
    const auto operations = static_cast<double>(2 * round_up(head_.head_dim(), row_padding) + 16);
    const double gamma = operations * unit / (1.0 - operations * unit);
    const auto magnitude = static_cast<double>(magnitudes_[page.value]);
    const double scale = std::fabs(static_cast<double>(queries_.scale));
    constexpr auto underflow = static_cast<double>(std::numeric_limits<float>::denorm_min());
    return gamma * scale * norm * magnitude + operations * underflow * (1.0 + magnitude) * (1.0 + scale);
  }
  double error_of_logits(PageIndex page, std::size_t query, double norm) const {
    const auto distance = static_cast<double>(head_.end() - head_.first_position(page));
    return error_of_dot(page, norm) + static_cast<double>(head_.logits().soft_cap) * 2e-7 +
           std::fabs(static_cast<double>(slope(query))) * distance * 8.0 * unit;
  }

  /// dot: the bound of the page's unscaled dot products.
  float logit_bound(PageIndex page, std::size_t query, double dot, double norm) const {
    constexpr float unknown = std::numeric_limits<float>::infinity();
    // A sum that overflowed downwards bounds nothing, nor does the largest product under a negative scale.
    if (!std::isfinite(dot) || queries_.scale < 0.0F) return unknown;
    double logit = static_cast<double>(queries_.scale) * dot + error_of_dot(page, norm);
    if (const auto cap = static_cast<double>(head_.logits().soft_cap); cap > 0.0) logit = cap * std::tanh(logit / cap);
    const auto of_query = static_cast<double>(slope(query));
    // The nearest token has the largest bias, or the farthest one if it grows with distance.
    const Position biased = head_.first_position(page) + (of_query > 0.0 ? head_.tokens(page) - 1 : 0);
    logit -= of_query * static_cast<double>(head_.end() - biased - 1);
    const auto rounded = static_cast<float>(logit);
    if (!std::isfinite(rounded)) return unknown;
    return std::nextafter(rounded, unknown);
  }

  /// e^x or more, for an x that was rounded; an exponential that underflowed is the smallest normal float.
  static float exp_at_least(float x) {
    if (!(x <= 87.0F)) return std::numeric_limits<float>::infinity();
    return std::fmax(std::exp(x), std::numeric_limits<float>::min()) * (1.0F + 2e-5F);
  }

  const HeadPages& head_;
  QueryGroup queries_;
  std::size_t first_query_;
  std::span<float> masses_;      // [size(), queries], relative to exp(reference)
  std::span<float> magnitudes_;  // [size()]
  std::span<float> references_;  // [queries] the largest logit that a full page's bounds allow
};

}  // namespace kvsparse
