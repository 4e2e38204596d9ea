// SPDX-License-Identifier: Apache-2.0
// What `observe` reads: each page's exact share of the softmax, which the kernel has for free, page by page and query
// head by query head. A page that was not visited is unknown, not zero.
#pragma once

#include <cstddef>
#include <span>

#include "../config.hpp"
#include "../core/ids.hpp"
#include "../core/views.hpp"

namespace kvsparse {

/// What a policy asks the kernel for (the trait `evidence`); combine with |.
enum class EvidenceKind : unsigned {
  none = 0,
  page_mass = 1,           ///< each page's share of the softmax, per query head: two floats a page
  largest_token_mass = 2,  ///< the largest share of a single token of the page: free beside page_mass
  token_weights = 4,       ///< every token's share: page_size floats a page and query head
};
/// Both kinds.
constexpr EvidenceKind operator|(EvidenceKind a, EvidenceKind b) {
  return static_cast<EvidenceKind>(static_cast<unsigned>(a) | static_cast<unsigned>(b));
}
/// Whether `kind` is among what was asked for.
constexpr bool asks_for(EvidenceKind asked, EvidenceKind kind) {
  return (static_cast<unsigned>(asked) & static_cast<unsigned>(kind)) != 0;
}

/// A page's shares of the softmaxes of one query group, over the query heads that visited it.
struct PageShare {
  bool visited = false;  ///< by some query head
  float sum = 0.0F;      ///< of the shares, 0 .. query heads
  float peak = 0.0F;     ///< the largest share, 0 .. 1
};

/// The evidence of one query group over the resident pages of its kv head.
class Evidence {
 public:
  /// What the container fills in, or the test of a policy.
  struct Storage {
    Position position;                     ///< of the query's token
    bool is_prompt = false;                ///< whether that is the prompt's
    QueryGroup queries;                    ///< as attend got them
    std::size_t resident_pages = 0;        ///< of the kv head
    std::size_t page_size = 0;             ///< tokens
    const float* mass = nullptr;           ///< [resident_pages, group]; negative where not visited
    const float* largest_token = nullptr;  ///< [resident_pages, group] or null
    const float* token_weights = nullptr;  ///< [resident_pages, group, page_size] or null
    const float* log_sum_exp = nullptr;    ///< [group]
  };
  /// Over arrays that outlive it.
  explicit Evidence(const Storage& storage) : storage_(storage) {}

  /// The position of the token whose query this is.
  Position position() const { return storage_.position; }
  /// True for a query of the prompt.
  bool is_prompt() const { return storage_.is_prompt; }
  const QueryGroup& queries() const { return storage_.queries; }  ///< [group(), head_dim], not scaled
  std::size_t group() const { return storage_.queries.size; }     ///< query heads

  /// Whether the query head read the page, or part of it.
  bool visited(PageIndex page, std::size_t query) const { return !(storage_.mass[at(page, query)] < 0.0F); }
  /// Visited by some query head of the group.
  bool visited(PageIndex page) const {
    for (std::size_t q = 0; q < group(); ++q) {
      if (visited(page, q)) return true;
    }
    return false;
  }
  /// The page's share, 0 .. 1, of the softmax over what the query head read, and its sink logit if the layer has them;
  /// only for a visited page.
  float mass(PageIndex page, std::size_t query) const {
    KVSPARSE_ASSERT(visited(page, query));
    return storage_.mass[at(page, query)];
  }
  /// Sum and largest over the query heads of the group that visited the page.
  PageShare share(PageIndex page) const {
    PageShare result;
    for (std::size_t q = 0; q < group(); ++q) {  // no branch: which pages matter changes from step to step
      const float of_query = storage_.mass[at(page, q)];
      const bool visits = visited(page, q);
      result.visited |= visits;
      result.sum += visits ? of_query : 0.0F;
      result.peak = of_query > result.peak ? of_query : result.peak;
    }
    return result;
  }
  float group_mass(PageIndex page) const { return share(page).sum; }  ///< 0 where not visited
  float peak_mass(PageIndex page) const { return share(page).peak; }  ///< 0 where not visited
  /// The largest share of one token of the page; needs EvidenceKind::largest_token_mass.
  float largest_token_mass(PageIndex page, std::size_t query) const {
    KVSPARSE_ASSERT(storage_.largest_token != nullptr);
    return storage_.largest_token[at(page, query)];
  }
  /// [page_size] shares of the page's tokens, valid up to its token count; needs EvidenceKind::token_weights.
  std::span<const float> token_weights(PageIndex page, std::size_t query) const {
    KVSPARSE_ASSERT(storage_.token_weights != nullptr);
    return {storage_.token_weights + at(page, query) * storage_.page_size, storage_.page_size};
  }
  /// log of the softmax's denominator over what the query head read.
  float log_sum_exp(std::size_t query) const {
    KVSPARSE_ASSERT(query < group());
    return storage_.log_sum_exp[query];
  }

 private:
  std::size_t at(PageIndex page, std::size_t query) const {
    KVSPARSE_ASSERT(page.value < storage_.resident_pages && query < group());
    return page.value * group() + query;
  }
  Storage storage_;
};

}  // namespace kvsparse
