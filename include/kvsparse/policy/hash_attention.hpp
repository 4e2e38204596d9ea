// SPDX-License-Identifier: Apache-2.0
// HashAttention: 32 bits of a key, and of a query, tell well enough which tokens a query wants, so keep everything and
// read the tokens whose bits differ least. Source: Desai et al., ICML 2025 (2412.14468), section 4.  Needs: keys, once,
// as they are appended. Per step: O(N) population counts + O(L d).  Memory: O(N) plus 4 bytes a slot. Departs from the
// paper: one selection for each kv head, by the nearest query head of its group; the open page is always read; the
// projection is a parameter, and the default is random hyperplanes instead of the paper's learned ones, which need the
// model's weights: 32 random bits find less than 32 learned ones do. Pages hold at most 64 tokens.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <concepts>

#include "counter_hash.hpp"
#include "policy.hpp"

namespace kvsparse {

/// Turns a key or a query into 32 bits.
template <class P>
concept SignatureProjection = requires(const P projection, std::span<const float> row) {
  { projection.signature(row) } -> std::same_as<std::uint32_t>;
};

/// Bit b is the side of the hyperplane whose normal has entries +1 and -1 drawn by hash: the angle between two rows is
/// about pi / 32 times the number of bits that differ (Charikar, STOC 2002). No weights are stored. O(32 d).
struct RandomHyperplanes {
  std::uint64_t seed = 0;  ///< of the hyperplanes
  /// The option `seed`.
  void visit(auto&& field) { field("seed", seed); }

  /// row: [head_dim]. O(32 * head_dim).
  std::uint32_t signature(std::span<const float> row) const {
    std::array<float, 32> side{};
    for (std::size_t i = 0; i < row.size(); ++i) {
      const std::uint64_t signs = counter_hash(seed, {i});
      for (unsigned b = 0; b < 32; ++b) side[b] += (signs >> b & 1) != 0 ? row[i] : -row[i];
    }
    std::uint32_t bits = 0;
    for (unsigned b = 0; b < 32; ++b) bits |= std::uint32_t{side[b] > 0.0F} << b;
    return bits;
  }
};

/// Learned hyperplanes: bit b is set where weights[b] * row > 0. weights: [32, head_dim], not owned; the caller's
/// arrays (a tensor of a safetensors file, say) outlive the cache.
struct LearnedHyperplanes {
  std::span<const float> weights;  ///< [32, head_dim]
  /// No option that a command line could set.
  void visit(auto&&) {}
  /// A sentence if the weights are not of this shape; else empty.
  std::string problem(const Geometry& geometry) const {
    if (weights.size() == 32 * geometry.head_dim) return {};
    return "its " + std::to_string(weights.size()) +
           " weights are not 32 rows of head_dim = " + std::to_string(geometry.head_dim);
  }

  /// row: [head_dim]. O(32 * head_dim).
  std::uint32_t signature(std::span<const float> row) const {
    KVSPARSE_ASSERT(weights.size() == 32 * row.size());
    std::uint32_t bits = 0;
    for (unsigned b = 0; b < 32; ++b) {
      float side = 0.0F;
      for (std::size_t i = 0; i < row.size(); ++i) side += weights[b * row.size() + i] * row[i];
      bits |= std::uint32_t{side > 0.0F} << b;
    }
    return bits;
  }
};

template <SignatureProjection Projection>
struct BasicHashAttention {
  static constexpr std::string_view name = "hash_attention";
  static constexpr bool reads_rows = true;
  static constexpr PolicyGranularity granularity = PolicyGranularity::token;
  static constexpr std::size_t max_page_tokens = 64;  ///< signatures that a page's state has room for

  using Options = Projection;
  Options options;

  struct PageState {
    std::array<std::uint32_t, max_page_tokens> signatures;  // [slots]
  };

  std::string problem(const Geometry& geometry) const {
    if (geometry.page_size > max_page_tokens) {
      return "page_size = " + std::to_string(geometry.page_size) + " exceeds the 64 signatures of a page";
    }
    if constexpr (requires { options.problem(geometry); }) return options.problem(geometry);
    return {};
  }

  void on_append(HeadView<BasicHashAttention> head, PageIndex page, Slot slot) const {
    const std::span<float> key = head.scratch().first(head.head_dim());
    head.load_key(page, slot, key);
    head.state(page).signatures[slot.value] = options.signature(key);
  }

  void select(HeadView<BasicHashAttention> head, QueryGroup queries, Selection& selection) const {
    const PageIndex open = head.open_page();
    selection.add(open);
    std::array<std::size_t, 33> tokens_at{};  // by distance
    for_each_distance(head, queries,
                      [&](PageIndex, std::uint32_t, int distance) { ++tokens_at[static_cast<std::size_t>(distance)]; });
    // Everything nearer than `limit` is read, and of the tokens at the limit the oldest ones.
    std::size_t left = head.read_page_budget() * head.page_size() - head.tokens(open);
    int limit = 0;
    while (limit < 32 && tokens_at[static_cast<std::size_t>(limit)] <= left) {
      left -= tokens_at[static_cast<std::size_t>(limit++)];
    }
    PageIndex current{};
    std::span<std::uint64_t> mask;
    for_each_distance(head, queries, [&](PageIndex page, std::uint32_t slot, int distance) {
      if (distance > limit || (distance == limit && left == 0)) return;
      if (distance == limit) --left;
      if (mask.empty() || page != current) mask = selection.token_mask(current = page);
      mask[slot / 64] |= std::uint64_t{1} << (slot % 64);
      selection.add({page, mask, 0.0F, 0.0F, 0});
    });
  }

 private:
  /// Calls visit(page, slot, distance) for every token outside the open page, in position order.
  template <class Visit>
  void for_each_distance(const HeadView<BasicHashAttention>& head, const QueryGroup& queries, Visit&& visit) const {
    constexpr std::size_t most = 64;  // query heads whose signatures fit here; the others of a larger group do not vote
    std::array<std::uint32_t, most> wanted{};
    const std::size_t group = std::min(queries.size, most);
    for (std::size_t q = 0; q < group; ++q) wanted[q] = options.signature(queries[q]);
    for (const PageIndex page : head.pages()) {
      if (head.is_open(page)) continue;
      const auto& signatures = head.state(page).signatures;
      for (std::uint32_t slot = 0; slot < head.tokens(page); ++slot) {
        int nearest = 32;
        for (std::size_t q = 0; q < group; ++q) {
          nearest = std::min(nearest, std::popcount(signatures[slot] ^ wanted[q]));
        }
        visit(page, slot, nearest);
      }
    }
  }
};

/// The policy of the name table, which needs no weights.
using HashAttention = BasicHashAttention<RandomHyperplanes>;

}  // namespace kvsparse
