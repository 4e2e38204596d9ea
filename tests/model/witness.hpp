// SPDX-License-Identifier: Apache-2.0
//
// Policies that note what evidence the kernel shows them, so that a test can ask for it.
#pragma once

#include <cmath>
#include <string_view>

#include "kvsparse/policy/policy.hpp"

namespace kvsparse_test {

/// What of the latest query a witness keeps of a page. Groups of up to `queries` query heads.
struct WitnessedPage {
  static constexpr std::size_t queries = 4;
  float mass[queries] = {-1, -1, -1, -1};  // not visited
  float largest_token[queries] = {};
  float token_sum[queries] = {};  // of the page's token weights
};

/// Evicts any page but the newest, as good as at random. Reads everything.
template <class Witness, kvsparse::EvidenceKind Kinds>
struct WitnessOf {
  static constexpr kvsparse::EvidenceKind evidence = Kinds;
  using PageState = WitnessedPage;

  void observe(kvsparse::HeadView<Witness> head, const kvsparse::Evidence& step) const {
    using kvsparse::EvidenceKind;
    for (const kvsparse::PageIndex page : head.pages()) {
      WitnessedPage& seen = head.state(page) = {};
      for (std::size_t q = 0; q < step.group(); ++q) {
        if (!step.visited(page, q)) continue;
        seen.mass[q] = step.mass(page, q);
        if constexpr (kvsparse::asks_for(Kinds, EvidenceKind::largest_token_mass)) {
          seen.largest_token[q] = step.largest_token_mass(page, q);
        }
        if constexpr (kvsparse::asks_for(Kinds, EvidenceKind::token_weights)) {
          for (std::size_t t = 0; t < head.tokens(page); ++t) seen.token_sum[q] += step.token_weights(page, q)[t];
        }
      }
    }
  }
  kvsparse::PageIndex victim(kvsparse::HeadView<Witness> head) const {
    std::uint64_t skip = (head.evictions() * 7 + head.kv_head()) % head.evictable_count();
    for (const kvsparse::PageIndex page : head.evictable_pages()) {
      if (skip-- == 0) return page;
    }
    return {};
  }
};

struct MassWitness : WitnessOf<MassWitness, kvsparse::EvidenceKind::page_mass> {
  static constexpr std::string_view name = "mass_witness";
};

/// Asks for all evidence there is, and reads the open page and every second of the others.
struct TokenWitness
    : WitnessOf<TokenWitness, kvsparse::EvidenceKind::page_mass | kvsparse::EvidenceKind::largest_token_mass |
                                  kvsparse::EvidenceKind::token_weights> {
  static constexpr std::string_view name = "token_witness";
  static constexpr bool select_always = true;
  void select(kvsparse::HeadView<TokenWitness> head, kvsparse::QueryGroup, kvsparse::Selection& selection) const {
    for (const kvsparse::PageIndex page : head.pages()) {
      if ((head.size() - page.value) % 2 == 1) selection.add(page);
    }
  }
};

}  // namespace kvsparse_test
