// SPDX-License-Identifier: Apache-2.0
// What is known of a page without reading it: channel-wise minimum and maximum of its keys, or their mean. Computed
// from the keys as stored, so that a bound on stored keys is a bound.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <span>

#include "../core/views.hpp"
#include "page_pool.hpp"
#include "page_table.hpp"

namespace kvsparse {

enum class PageSummary { none, min_max, mean };

/// Summaries of every page of a pool: min_max in the storage type (two rows a page), mean as a running sum of floats.
template <StorageScalar Scalar>
class PageSummaries {
 public:
  PageSummaries(const Geometry& geometry, PageSummary kind, std::size_t pages)
      : kind_(kind),
        row_stride_(geometry.row_stride()),
        bounds_(kind == PageSummary::min_max ? 2 * row_stride_ * pages : 0),
        sums_(kind == PageSummary::mean ? row_stride_ * pages : 0) {}

  PageSummaries(const PageSummaries& other)
      : kind_(other.kind_), row_stride_(other.row_stride_), bounds_(other.bounds_.size()), sums_(other.sums_.size()) {
    if (bounds_.size() != 0) {
      std::memcpy(static_cast<void*>(bounds_.data()), other.bounds_.data(), bounds_.size() * sizeof(Scalar));
    }
    if (sums_.size() != 0) std::memcpy(sums_.data(), other.sums_.data(), sums_.size() * sizeof(float));
  }
  PageSummaries& operator=(const PageSummaries& other) {
    PageSummaries copy(other);
    return *this = static_cast<PageSummaries&&>(copy);
  }
  PageSummaries(PageSummaries&&) noexcept = default;
  PageSummaries& operator=(PageSummaries&&) noexcept = default;

  static std::size_t bytes_per_page(const Geometry& geometry, PageSummary kind) {
    switch (kind) {
      case PageSummary::none: return 0;
      case PageSummary::min_max: return 2 * geometry.row_stride() * sizeof(Scalar);
      case PageSummary::mean: return geometry.row_stride() * sizeof(float);
    }
    return 0;
  }

  PageSummary kind() const { return kind_; }
  const Scalar* min(PageId page) const { return bounds_.data() + std::size_t{page.value} * 2 * row_stride_; }
  const Scalar* max(PageId page) const { return min(page) + row_stride_; }
  /// [head_dim] sum of the page's keys.
  const float* sum(PageId page) const { return sums_.data() + std::size_t{page.value} * row_stride_; }

  /// Takes in a stored key. The first of a page starts its summary anew. O(head_dim).
  void add_key(PageId page, const Scalar* key, bool first) {
    if (kind_ == PageSummary::none) return;
    if (kind_ == PageSummary::mean) {
      float* sum = sums_.data() + std::size_t{page.value} * row_stride_;
      for (std::size_t i = 0; i < row_stride_; ++i) sum[i] = (first ? 0.0F : sum[i]) + static_cast<float>(key[i]);
      return;
    }
    Scalar* lowest = bounds_.data() + std::size_t{page.value} * 2 * row_stride_;
    Scalar* highest = lowest + row_stride_;
    if (first) {
      std::memcpy(static_cast<void*>(lowest), key, row_stride_ * sizeof(Scalar));
      std::memcpy(static_cast<void*>(highest), key, row_stride_ * sizeof(Scalar));
      return;
    }
    std::size_t i = 0;
    for (; i + simd::lanes <= row_stride_; i += simd::lanes) {
      const simd::Floats element = simd::load(key + i);
      simd::store(lowest + i, simd::min(element, simd::load(lowest + i)));
      simd::store(highest + i, simd::max(element, simd::load(highest + i)));
    }
    for (; i < row_stride_; ++i) {
      if (key[i] < lowest[i]) lowest[i] = key[i];
      if (key[i] > highest[i]) highest[i] = key[i];
    }
  }

  /// out[q] = sum_i max(q_i * min_i, q_i * max_i): no key of the page has a larger dot product with query q (Quest,
  /// 2406.10774, section 3.3). `positive` and `negative` are the queries' parts above and below zero, [group,
  /// row_stride padded]; with them the maximum needs no comparison: q_i > 0 takes the maximum key, q_i < 0 the minimum.
  void upper_bounds(PageId page, const float* positive, const float* negative, std::size_t query_stride,
                    std::span<float> out) const {
    const Scalar* lowest = min(page);
    const Scalar* highest = max(page);
    for (std::size_t q = 0; q < out.size(); ++q) {
      const float* above = positive + q * query_stride;
      const float* below = negative + q * query_stride;
      simd::Floats from_max{};
      simd::Floats from_min{};
      std::size_t i = 0;
      for (; i + simd::lanes <= row_stride_; i += simd::lanes) {
        from_max = simd::fma(simd::load(above + i), simd::load(highest + i), from_max);
        from_min = simd::fma(simd::load(below + i), simd::load(lowest + i), from_min);
      }
      if constexpr (simd::lanes > row_padding) {
        if (i < row_stride_) {
          from_max = simd::fma(simd::load(above + i), simd::load_half_row(highest + i), from_max);
          from_min = simd::fma(simd::load(below + i), simd::load_half_row(lowest + i), from_min);
        }
      }
      out[q] = simd::sum(from_max + from_min);
    }
  }

 private:
  PageSummary kind_;
  std::size_t row_stride_;
  AlignedArray<Scalar> bounds_;
  AlignedArray<float> sums_;
};

/// bounds[page * group + q] for every page given; padded_queries: [2, group, round_up(head_dim, 16)] working memory.
/// O(pages * group * head_dim).
template <StorageScalar Scalar>
void page_upper_bounds(const PageSummaries<Scalar>& summaries, std::span<const ResidentPage> pages,
                       const QueryGroup& queries, std::span<float> padded_queries, std::span<float> bounds) {
  const std::size_t row = round_up(queries.head_dim, 16);
  float* positive = padded_queries.data();
  float* negative = padded_queries.data() + queries.size * row;
  std::fill(padded_queries.begin(), padded_queries.end(), 0.0F);
  for (std::size_t q = 0; q < queries.size; ++q) {
    for (std::size_t i = 0; i < queries.head_dim; ++i) {
      (queries[q][i] > 0.0F ? positive : negative)[q * row + i] = queries[q][i];
    }
  }
  for (std::size_t page = 0; page < pages.size(); ++page) {
    summaries.upper_bounds(pages[page].page, positive, negative, row,
                           bounds.subspan(page * queries.size, queries.size));
  }
}

}  // namespace kvsparse
