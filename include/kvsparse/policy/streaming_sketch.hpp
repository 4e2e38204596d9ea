// SPDX-License-Identifier: Apache-2.0
// StreamingSketch: what leaves the window is folded into a sketch of fixed size, whose answer to a query is merged with
// that of the window: a softmax over everything, exact over the newest tokens and random over the rest. Source: the
// one-pass algorithm of Addanki et al. (2311.14652), with the positive random features of Choromanski et al.
// (2009.14794, lemma 1) in place of its polynomials, which 128 channels make too many.  Needs: keys and values, once,
// as they are evicted. Per step: O(L d + m d) for m features, and O(m d) a token evicted.  Memory: L tokens, and
// m (d + 1) numbers a head, whatever its length: 33 KB at m = 64 and d = 128. Departs from the papers: features are
// popcounts of hashed bits, drawn anew for each seed, layer and head, and so nearly normal; no sparse recovery. At 128
// channels 64 features say little about a single token: this is how a residual is written, and a baseline, no product.
//
//   exp(q k) is the mean over normal w of exp(w q - q q / 2) exp(w k - k k / 2)
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>

#include "counter_hash.hpp"
#include "policy.hpp"

namespace kvsparse {

template <std::size_t Features, std::size_t MostChannels>
struct BasicStreamingSketch {
  static constexpr std::string_view name = "streaming_sketch";
  static constexpr bool reads_rows = true;

  struct Options {
    std::uint64_t seed = 0;
    bool pin_prompt = false;
    void visit(auto&& field) {
      field("seed", seed);
      field("pin_prompt", pin_prompt);
    }
  } options;

  /// Sums over the tokens evicted so far of feature, and of feature times value, all divided by exp(log_unit).
  struct HeadState {
    bool holds_tokens;
    float log_unit;  // the largest exponent of a feature so far
    std::array<float, Features> denominator;
    std::array<std::array<float, MostChannels>, Features> numerator;
  };

  bool pin_prompt() const { return options.pin_prompt; }
  std::string problem(const Geometry& geometry) const {
    if (geometry.dim_of_values() <= MostChannels) return {};
    return "value_dim = " + std::to_string(geometry.dim_of_values()) + " exceeds the " + std::to_string(MostChannels) +
           " channels of its sketch";
  }

  PageIndex victim(HeadView<BasicStreamingSketch> head) const {
    return head.lowest_evictable([](PageIndex page) { return page.value; });
  }

  void on_evict(HeadView<BasicStreamingSketch> head, PageIndex page) const {
    HeadState& sketch = head.head_state();
    const std::span<float> key = head.scratch().first(head.head_dim());
    const std::span<float> value = head.scratch().subspan(head.head_dim(), head.value_dim());
    for (std::uint32_t slot = 0; slot < head.tokens(page); ++slot) {
      head.load_key(page, Slot{slot}, key);
      head.load_value(page, Slot{slot}, value);
      const Exponents exponents = exponents_of(head, key, std::sqrt(std::fabs(head.softmax_scale())));
      const float largest = *std::max_element(exponents.begin(), exponents.end());
      if (!sketch.holds_tokens || largest > sketch.log_unit) rescale(sketch, largest);
      for (std::size_t f = 0; f < Features; ++f) {
        const float feature = std::exp(exponents[f] - sketch.log_unit);
        sketch.denominator[f] += feature;
        for (std::size_t i = 0; i < value.size(); ++i) sketch.numerator[f][i] += feature * value[i];
      }
    }
  }

  void residual(HeadView<BasicStreamingSketch> head, QueryGroup queries, std::span<SoftmaxState> states) const {
    const HeadState& sketch = head.head_state();
    if (!sketch.holds_tokens) return;
    for (std::size_t q = 0; q < queries.size; ++q) {
      const float root = std::sqrt(std::fabs(queries.scale));
      const Exponents exponents = exponents_of(head, queries[q], queries.scale < 0.0F ? -root : root);
      const float largest = *std::max_element(exponents.begin(), exponents.end());
      SoftmaxState gone;
      gone.accumulator = head.scratch().data();
      gone.max = largest + sketch.log_unit - std::log(static_cast<float>(Features));
      std::fill_n(gone.accumulator, head.value_dim(), 0.0F);
      for (std::size_t f = 0; f < Features; ++f) {
        const float weight = std::exp(exponents[f] - largest);
        gone.sum += weight * sketch.denominator[f];
        for (std::size_t i = 0; i < head.value_dim(); ++i) gone.accumulator[i] += weight * sketch.numerator[f][i];
      }
      merge(states[q], gone, head.value_dim());
    }
  }

 private:
  using Exponents = std::array<float, Features>;

  /// w x - x x / 2 for x = row * root and each w, whose channels are sums of 64 fair coins, of variance 1.
  Exponents exponents_of(const HeadPages& head, std::span<const float> row, float root) const {
    Exponents exponents{};
    float square = 0.0F;
    for (std::size_t i = 0; i < row.size(); ++i) {
      const float x = row[i] * root;
      square += x * x;
      for (std::size_t f = 0; f < Features; ++f) {
        const std::uint64_t coins = counter_hash(options.seed, {head.layer(), head.kv_head(), f, i});
        exponents[f] += static_cast<float>(std::popcount(coins) - 32) * 0.25F * x;
      }
    }
    for (float& exponent : exponents) exponent -= 0.5F * square;
    return exponents;
  }

  /// Makes exp(log_unit) the unit of the sums.
  static void rescale(HeadState& sketch, float log_unit) {
    const float factor = sketch.holds_tokens ? std::exp(sketch.log_unit - log_unit) : 0.0F;
    for (std::size_t f = 0; f < Features; ++f) {
      sketch.denominator[f] *= factor;
      for (float& element : sketch.numerator[f]) element *= factor;
    }
    sketch.log_unit = log_unit;
    sketch.holds_tokens = true;
  }
};

/// The policy of the name table.
using StreamingSketch = BasicStreamingSketch<64, 128>;

}  // namespace kvsparse
