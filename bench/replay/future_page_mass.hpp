// SPDX-License-Identifier: Apache-2.0
// What the rest of a trace will ask of each page: known to nobody who decodes, but to whoever replays.
#pragma once

#include <cstddef>
#include <kvsparse/core/ids.hpp>
#include <span>
#include <vector>

#include "common/interrupt.hpp"
#include "common/progress.hpp"
#include "common/trace.hpp"
#include "dense_reference.hpp"

namespace kvsparse_tools {

/// For each page that opens, and each older page, the mass that the older one has from then to the end of the trace:
/// its shares of dense attention, summed over the decode queries still to come and over the query heads of the group.
/// Queries of the prompt count nothing here, because the replay does not compare them either.
///
/// Memory: kv_heads * pages * (pages - 1) / 2 doubles.
class FuturePageMass {
 public:
  /// A pass of dense attention over the trace. An interrupt ends it early.
  FuturePageMass(const Trace& trace, std::size_t page_size, DenseReference& dense)
      : page_size_(page_size), pages_((trace.tokens + page_size - 1) / page_size), mass_(trace.kv_heads * pairs()) {
    const std::size_t group = trace.query_heads / trace.kv_heads;
    ProgressBar progress("looking ahead", trace.tokens - trace.prompt_tokens);
    for (std::size_t token = trace.prompt_tokens; token < trace.tokens && !interrupted(); ++token) {
      dense.advance_to(token);
      for (std::size_t head = 0; head < trace.query_heads; ++head) {
        add_query(head / group, token, dense.weights(token, head));
      }
      progress.update(token + 1 - trace.prompt_tokens);
    }
    for (std::size_t head = 0; head < trace.kv_heads; ++head) sum_backwards(head);
  }

  std::size_t pages() const { return pages_; }
  /// [opening] masses of the older pages from the moment at which page number `opening` opens.
  std::span<const double> from(std::size_t opening, std::size_t kv_head) const {
    return {mass_.data() + offset(opening, kv_head), opening};
  }

 private:
  std::size_t pairs() const { return pages_ * (pages_ - 1) / 2; }
  std::size_t offset(std::size_t opening, std::size_t kv_head) const {
    return kv_head * pairs() + opening * (opening - 1) / 2;
  }
  std::span<double> row(std::size_t opening, std::size_t kv_head) {
    return {mass_.data() + offset(opening, kv_head), opening};
  }

  /// To the row of the page that is open when the query comes.
  void add_query(std::size_t kv_head, std::size_t token, std::span<const double> weights) {
    const std::span<double> masses = row(token / page_size_, kv_head);
    for (std::size_t page = 0; page < masses.size(); ++page) {
      for (const double weight : weights.subspan(page * page_size_, page_size_)) masses[page] += weight;
    }
  }

  /// From the end, so that a small mass is never the difference of two large ones.
  void sum_backwards(std::size_t kv_head) {
    for (std::size_t opening = pages_ - 1; opening-- > 1;) {
      const std::span<const double> later = row(opening + 1, kv_head);
      const std::span<double> now = row(opening, kv_head);
      for (std::size_t page = 0; page < now.size(); ++page) now[page] += later[page];
    }
  }

  std::size_t page_size_;
  std::size_t pages_;
  std::vector<double> mass_;  // [kv_heads, opening page, older page]
};

}  // namespace kvsparse_tools
