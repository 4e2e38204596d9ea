// SPDX-License-Identifier: Apache-2.0
// Runs queries over a cache: per kv head select, read, record, observe. On one thread, or on those of an executor.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <type_traits>

#include "../core/executor.hpp"
#include "../core/shape_check.hpp"
#include "attend_tile.hpp"
#include "attended_layer.hpp"
#include "paged_kv_cache.hpp"

namespace kvsparse {

namespace detail {

/// Some query heads of a kv head's group, those that one selection serves.
struct QueryBlock {
  std::size_t kv_head;
  std::size_t first_query;  // of the group
  QueryGroup queries;
};

/// Reads range `range` of `reads` into the block's states of that range; the first range continues the head's states.
/// Pages are read in runs that meet the query under the same rotation; where one rotates, only one thread may read the
/// head. first_read: how many reads of this query came before `reads`.
template <class Policy>
KVSPARSE_NOINLINE void read_range(const AttendedLayer<Policy>& layer, const QueryBlock& block,
                                  std::span<const PageRead> reads, std::size_t first_read, std::size_t range) {
  LayerDrafts<Policy>& heads = layer.heads;
  AttendScratch& scratch = layer.scratch[block.kv_head];
  const std::size_t group = block.queries.size;
  const std::size_t begin = range * scratch.range_pages;
  const std::size_t end = std::min(begin + scratch.range_pages, reads.size());
  const std::span<SoftmaxState> states =
      range == 0 ? scratch.states(0, block.first_query, group) : scratch.start(range, block.first_query, group);
  const std::size_t row = round_up(block.queries.head_dim, query_padding);
  float* padded = scratch.queries.data() + block.first_query * row;
  PageTap tap = heads.tap(block.kv_head, first_read + begin);
  const LogitMap map = heads.logit_map(block.kv_head, block.first_query, group);
  std::int64_t rotation = 0;
  for (std::size_t first = begin; first < end;) {
    std::size_t last = first + 1;
    while (last < end && reads[last].rotate_back == reads[first].rotate_back) ++last;
    if (reads[first].rotate_back != rotation) {
      rotation = reads[first].rotate_back;
      pad_queries(block.queries, padded, row);
      heads.rope().turn(padded, group, row, -rotation);
    }
    layer.read_pages(reads.subspan(first, last - first), padded, row, states, tap, map);
    tap = tap.from(last - first, 0);
    first = last;
  }
  if (rotation != 0) pad_queries(block.queries, padded, row);
}

/// One query of each query head over the tokens before `end`. Each kv head goes through begin, read its ranges and
/// finish; how these are spread over threads changes no bit, because a range is a range for one thread as for many, and
/// a head's ranges are merged in their order.
template <class Policy>
class AttendStep {
 public:
  /// lse, lost_mass: [query_heads] or null.
  AttendStep(const AttendedLayer<Policy>& layer, HeadRows<const float> q, HeadRows<float> out, float* lse, Position end,
             float* lost_mass = nullptr)
      : layer_(layer), q_(q), out_(out), lse_(lse), lost_mass_(lost_mass), end_(end) {}

  void run(ExecutorRef executor) const {
    const std::size_t heads = layer_.heads.geometry().kv_heads;
    const auto whole_head = [this](std::size_t h) noexcept {
      begin(h);
      finish(h, false);
    };
    if (heads_are_enough(executor.concurrency(), heads)) {
      executor(heads, whole_head);
    } else {
      const auto begin_head = [this](std::size_t h) noexcept {
        begin(h);
        AttendScratch& scratch = layer_.scratch[h];
        const auto is_plain = [](const PageRead& read) { return read.rotate_back == 0; };
        scratch.reads_may_be_shared = std::all_of(scratch.reads.begin(), scratch.reads.end(), is_plain);
      };
      executor(heads, begin_head);
      std::size_t most = 0;
      for (std::size_t h = 0; h < heads; ++h) most = std::max(most, shared_ranges(h));
      const auto read = [this, most](std::size_t task) noexcept {
        const std::size_t h = task / most;
        const std::size_t range = task % most;
        if (range < shared_ranges(h)) read_range(layer_, whole_group(h), layer_.scratch[h].reads, 0, range);
      };
      if (most > 1) executor(heads * most, read);
      const auto finish_head = [this, most](std::size_t h) noexcept { finish(h, most > 1 && shared_ranges(h) > 0); };
      executor(heads, finish_head);
    }
    layer_.heads.end_step();
  }

 private:
  /// Whether there is no use in sharing a head: all are short, or whole heads keep the threads busy, of whose time an
  /// eighth may be lost where they do not divide evenly.
  bool heads_are_enough(std::size_t threads, std::size_t heads) const {
    std::size_t longest = 0;
    for (std::size_t h = 0; h < heads; ++h) longest = std::max(longest, layer_.heads.resident_tokens(h));
    if (longest <= range_tokens) return true;
    return threads != 0 && 8 * (round_up(heads, threads) - heads) <= heads;
  }

  QueryBlock whole_group(std::size_t kv_head) const {
    const std::size_t group = layer_.heads.geometry().group();
    return {kv_head,
            0,
            {q_.row(kv_head * group), group, layer_.heads.geometry().head_dim, q_.head_stride,
             layer_.heads.softmax_scale()}};
  }

  std::size_t shared_ranges(std::size_t kv_head) const {
    const AttendScratch& scratch = layer_.scratch[kv_head];
    return scratch.reads_may_be_shared ? scratch.ranges(scratch.reads.size()) : 0;
  }

  KVSPARSE_NOINLINE void begin(std::size_t kv_head) const {
    AttendScratch& scratch = layer_.scratch[kv_head];
    const QueryGroup group = whole_group(kv_head).queries;
    layer_.heads.begin_query(kv_head, end_);
    pad_queries(group, scratch.queries.data(), round_up(group.head_dim, query_padding));
    scratch.start(0, 0, group.size);
    // Where each query head selects for itself, the next selection overwrites the one before: all of it is finish's.
    const bool together = layer_.heads.queries_per_selection(kv_head) == group.size;
    scratch.reads = together ? layer_.heads.select(kv_head, group) : std::span<const PageRead>();
  }

  /// ranges_are_read: those of the first selection are, and wait to be merged.
  KVSPARSE_NOINLINE void finish(std::size_t kv_head, bool ranges_are_read) const {
    AttendScratch& scratch = layer_.scratch[kv_head];
    const QueryGroup group = whole_group(kv_head).queries;
    const std::size_t size = layer_.heads.queries_per_selection(kv_head);
    for (std::size_t first = 0; first < group.size; first += size) {
      QueryBlock block{kv_head, first, group};
      block.queries.data = group[first].data();
      block.queries.size = size;
      const std::span<SoftmaxState> states = scratch.states(0, first, size);
      auto reads = size == group.size ? scratch.reads : layer_.heads.select(kv_head, block.queries);
      for (std::size_t seen = 0; !reads.empty();) {
        for (std::size_t range = 0; range < scratch.ranges(reads.size()); ++range) {
          if (!ranges_are_read) read_range(layer_, block, reads, seen, range);
          if (range == 0) continue;
          const std::span<const SoftmaxState> part = scratch.states(range, first, size);
          for (std::size_t q = 0; q < size; ++q) merge(states[q], part[q], layer_.heads.geometry().dim_of_values());
        }
        ranges_are_read = false;
        seen += reads.size();
        reads = layer_.heads.select_more(kv_head, block.queries, states);
      }
      layer_.heads.add_residual(kv_head, block.queries, states);
      layer_.heads.add_sinks(kv_head, first, states);
      if constexpr (!Evictor<Policy>) {
        if (lost_mass_ != nullptr) {
          layer_.heads.bound_lost_mass(kv_head, first, block.queries, states,
                                       lost_mass_ + kv_head * group.size + first);
        }
      }
      layer_.heads.record(kv_head, first, states);
    }
    for (std::size_t q = 0; q < group.size; ++q) {
      const SoftmaxState& state = scratch.states(0, q, 1)[0];
      normalise(state, out_.row(kv_head * group.size + q), layer_.heads.geometry().dim_of_values());
      if (lse_ != nullptr) lse_[kv_head * group.size + q] = state.log_sum_exp();
    }
    layer_.heads.observe(kv_head, group);
  }

  AttendedLayer<Policy> layer_;
  HeadRows<const float> q_;
  HeadRows<float> out_;
  float* lse_;
  float* lost_mass_;
  Position end_;
};

/// What attend refuses.
template <class Policy>
Status check_attend(const LayerDrafts<Policy>& heads, HeadRows<const float> q, HeadRows<float> out,
                    std::span<float> log_sum_exp) {
  const Geometry& geometry = heads.geometry();
  if (heads.next_position() == Position{0}) return {Status::Code::nothing_to_attend, 1, 0};
  if (const Status status = check_rows(q, geometry.query_heads, geometry.head_dim); !status) return status;
  if (const Status status = check_rows(out, geometry.query_heads, geometry.dim_of_values()); !status) return status;
  if (!log_sum_exp.empty() && log_sum_exp.size() != geometry.query_heads) {
    return {Status::Code::wrong_size, log_sum_exp.size(), geometry.query_heads};
  }
  return heads.check_queries(1);
}

/// What attend_prompt refuses.
template <class Policy>
Status check_attend_prompt(const LayerDrafts<Policy>& heads, TokenRows<const float> q, TokenRows<float> out) {
  const Geometry& geometry = heads.geometry();
  const auto length = static_cast<std::size_t>(heads.next_position().value);
  if (q.tokens > length) return {Status::Code::nothing_to_attend, q.tokens, length};
  if (const Status status = heads.check_queries(q.tokens); !status) return status;
  if (out.tokens != q.tokens) return {Status::Code::wrong_tokens, out.tokens, q.tokens};
  if (q.tokens == 0) return {};
  if (const Status status = check_rows(q, geometry.query_heads, geometry.head_dim); !status) return status;
  return check_rows(out, geometry.query_heads, geometry.dim_of_values());
}

/// After check_attend_prompt().
template <class Policy>
void attend_tokens(const AttendedLayer<Policy>& layer, TokenRows<const float> q, TokenRows<float> out,
                   ExecutorRef executor) {
  if (const AttendTiles<Policy> tiles(layer, q, out); tiles.suit()) return tiles.run(executor);
  const auto length = static_cast<std::size_t>(layer.heads.next_position().value);
  for (std::size_t token = 0; token < q.tokens; ++token) {
    const Position end = Position{0} + (length - q.tokens + token + 1);
    AttendStep<Policy>(layer, q.token(token), out.token(token), nullptr, end).run(executor);
  }
}

}  // namespace detail

/// Attends with the newest token's queries, q [query_heads, head_dim], to what the policy reads of what is resident,
/// that token included, and shows the policy the evidence. out: [query_heads, value_dim]; log_sum_exp: [query_heads] or
/// empty. O(tokens read * (head_dim + value_dim) * group) per kv head, plus the policy's selection. Refuses wrong
/// shapes and an empty cache.
///
/// The executor's threads share the kv heads and, where these are too few for them, also ranges of 1024 tokens of a
/// head. Bits do not depend on the executor: the serial overloads do the same sums in the same order. Policies are
/// called for one head by one thread at a time, for different heads at the same time. Throws what the executor throws,
/// and is noexcept when the executor is. Then `out` is unspecified, and the policy may have observed this query for
/// some heads and not for others; the cache is as good as before, and attending again is fine.
template <class Policy, StorageScalar Key, StorageScalar Value, Executor E>
Status attend(PagedKvCache<Policy, Key, Value>& cache, HeadRows<const float> q, HeadRows<float> out,
              std::span<float> log_sum_exp, E&& executor) noexcept(is_nothrow_executor<E>) {
  const detail::AttendedLayer<Policy> layer = cache.attended();
  if (const Status status = detail::check_attend(layer.heads, q, out, log_sum_exp); !status) return status;
  float* lse = log_sum_exp.empty() ? nullptr : log_sum_exp.data();
  detail::AttendStep<Policy>(layer, q, out, lse, cache.next_position()).run(executor);
  return {};
}
/// The same over contiguous rows.
template <class Policy, StorageScalar Key, StorageScalar Value, Executor E>
Status attend(PagedKvCache<Policy, Key, Value>& cache, std::span<const float> q, std::span<float> out,
              std::span<float> log_sum_exp, E&& executor) noexcept(is_nothrow_executor<E>) {
  const Geometry& geometry = cache.geometry();
  if (const Status status = check_size(q.size(), geometry.query_heads, geometry.head_dim); !status) return status;
  if (const Status status = check_size(out.size(), geometry.query_heads, geometry.dim_of_values()); !status)
    return status;
  return attend(cache, HeadRows<const float>(q.data(), geometry.query_heads, geometry.head_dim),
                HeadRows<float>(out.data(), geometry.query_heads, geometry.dim_of_values()), log_sum_exp, executor);
}
/// The same on the calling thread.
template <class Policy, StorageScalar Key, StorageScalar Value>
Status attend(PagedKvCache<Policy, Key, Value>& cache, HeadRows<const float> q, HeadRows<float> out,
              std::span<float> log_sum_exp = {}) noexcept {
  return attend(cache, q, out, log_sum_exp, SerialExecutor{});
}
template <class Policy, StorageScalar Key, StorageScalar Value>
Status attend(PagedKvCache<Policy, Key, Value>& cache, std::span<const float> q, std::span<float> out,
              std::span<float> log_sum_exp = {}) noexcept {
  return attend(cache, q, out, log_sum_exp, SerialExecutor{});
}

/// Attends causally, in order, with the queries of the newest q.tokens tokens: query i sees the tokens up to its own.
/// q: [tokens, query_heads, head_dim], out: [tokens, query_heads, value_dim]. Tokens that were evicted while the chunk
/// was appended are gone for its early queries too; an evicting policy that must see a long prompt token by token is
/// fed chunks of one token. Refuses wrong shapes and more queries than tokens. While drafts are outstanding this is how
/// a chunk of them is verified: queries go one by one then, so that no bit depends on how many drafts there are, and no
/// more may come than there are drafts, plus the token before them.
///
/// While the policy reads everything, tiles of 16 queries share each page they load, and the executor's threads share
/// the kv heads; the sums are those of one token at a time, rounded in another order. Where it selects pages, asks for
/// token weights, looks at the whole layer or adds residuals, and for groups of more than 8 query heads, queries go one
/// by one as in attend. The executor may throw as in attend; what the early queries did then stands.
template <class Policy, StorageScalar Key, StorageScalar Value, Executor E>
Status attend_prompt(PagedKvCache<Policy, Key, Value>& cache, TokenRows<const float> q, TokenRows<float> out,
                     E&& executor) noexcept(is_nothrow_executor<E>) {
  const detail::AttendedLayer<Policy> layer = cache.attended();
  if (const Status status = detail::check_attend_prompt(layer.heads, q, out); !status) return status;
  if (q.tokens > 0) detail::attend_tokens<Policy>(layer, q, out, executor);
  return {};
}
/// The same on the calling thread.
template <class Policy, StorageScalar Key, StorageScalar Value>
Status attend_prompt(PagedKvCache<Policy, Key, Value>& cache, TokenRows<const float> q, TokenRows<float> out) noexcept {
  return attend_prompt(cache, q, out, SerialExecutor{});
}

}  // namespace kvsparse
