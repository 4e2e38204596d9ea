// SPDX-License-Identifier: Apache-2.0
// What is known of a page without reading it: channel-wise minimum and maximum of its keys, or their mean. Computed
// from the keys as stored, so that a bound on stored keys is a bound.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../config.hpp"
#include "../core/geometry.hpp"
#include "../core/ids.hpp"
#include "../core/stored_row.hpp"
#include "aligned_array.hpp"

namespace kvsparse {

/// What is kept of each page's keys beside them; a policy's trait page_summary asks for it.
enum class PageSummary {
  none,
  min_max,  ///< channel-wise smallest and largest key: two rows a page
  mean,     ///< the keys' sum: a row of floats a page
};

/// What the summaries of keys stored as Key are stored in. Steps of a row's own scale could not bound several rows.
template <StorageScalar Key>
using SummaryScalar = std::conditional_t<has_scale<Key>, Half, Key>;

/// Summaries of every page of a pool, in the order of page ids: min_max as two rows of Scalar a page, mean as a running
/// sum of floats.
template <StorageScalar Scalar>
class PageSummaries {
 public:
  /// Allocates those of `pages` pages, and touches none.
  PageSummaries(const Geometry& geometry, PageSummary kind, std::size_t pages)
      : kind_(kind),
        row_stride_(geometry.row_stride()),
        bounds_(kind == PageSummary::min_max ? 2 * row_stride_ * pages : 0),
        sums_(kind == PageSummary::mean ? row_stride_ * pages : 0) {}

  /// Bytes that construction allocates for each page.
  static std::size_t bytes_per_page(const Geometry& geometry, PageSummary kind) {
    switch (kind) {
      case PageSummary::none: return 0;
      case PageSummary::min_max: return 2 * geometry.row_stride() * sizeof(Scalar);
      case PageSummary::mean: return geometry.row_stride() * sizeof(float);
    }
    return 0;
  }

  PageSummary kind() const { return kind_; }  ///< as constructed
  /// Elements of a row: head_dim padded to row_padding.
  std::size_t row_stride() const { return row_stride_; }
  /// [row_stride()] the page's lowest elements, as far as kind() is min_max.
  const Scalar* min(PageId page) const { return bounds_.data() + 2 * row_stride_ * page.value; }
  /// [row_stride()] the page's highest elements, which lie behind the lowest.
  const Scalar* max(PageId page) const { return min(page) + row_stride_; }
  /// [row_stride()] sum of the page's keys, as far as kind() is mean.
  const float* sum(PageId page) const { return sums_.data() + page.value * row_stride_; }

  /// Copies a page's summary from summaries of the same geometry and kind, these or others.
  void copy(const PageSummaries& from, PageId page, PageId to) {
    if (kind_ == PageSummary::min_max) {
      std::memcpy(static_cast<void*>(bounds_.data() + 2 * row_stride_ * to.value), from.min(page),
                  2 * row_stride_ * sizeof(Scalar));
    }
    if (kind_ == PageSummary::mean) {
      std::memcpy(sums_.data() + to.value * row_stride_, from.sum(page), row_stride_ * sizeof(float));
    }
  }

  /// Takes in a key as stored. What Scalar cannot hold exactly is rounded outwards, so that the bound stays one. The
  /// first key of a page starts its summary anew. O(head_dim).
  template <StorageScalar Key>
  void add_key(PageId page, const Key* key, bool first) {
    if (kind_ == PageSummary::none) return;
    const float scale = row_scale(key, row_stride_);  // head_dim, padded once more, is the same
    if (kind_ == PageSummary::mean) {
      float* sum = sums_.data() + page.value * row_stride_;
      for (std::size_t i = 0; i < row_stride_; ++i) sum[i] = (first ? 0.0F : sum[i]) + simd::widened(key[i]) * scale;
      return;
    }
    Scalar* lowest = bounds_.data() + 2 * row_stride_ * page.value;
    Scalar* highest = lowest + row_stride_;
    if constexpr (!std::same_as<Key, Scalar>) {
      for (std::size_t i = 0; i < row_stride_; ++i) {
        const Scalar below = at_most<Scalar>(simd::widened(key[i]) * scale);
        const Scalar above = at_least<Scalar>(simd::widened(key[i]) * scale);
        if (first || below < lowest[i]) lowest[i] = below;
        if (first || above > highest[i]) highest[i] = above;
      }
    } else if (first) {
      std::memcpy(static_cast<void*>(lowest), key, row_stride_ * sizeof(Scalar));
      std::memcpy(static_cast<void*>(highest), key, row_stride_ * sizeof(Scalar));
    } else {
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
  }

 private:
  PageSummary kind_;
  std::size_t row_stride_;
  AlignedArray<Scalar> bounds_;  // [pages, 2, row_stride]
  AlignedArray<float> sums_;     // [pages, row_stride]
};

}  // namespace kvsparse
