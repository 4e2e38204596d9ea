// SPDX-License-Identifier: Apache-2.0
// Runs queries over a cache: per kv head select, read, record, observe.
#pragma once

#include <cmath>
#include <cstddef>
#include <span>

#include "../attention/page_kernel.hpp"
#include "../core/shape_check.hpp"
#include "paged_kv_cache.hpp"

namespace kvsparse {

namespace detail {

/// Rotates a query back by `positions`: rotary embedding with halves split (dimension i pairs with i + head_dim / 2).
inline void rotate_back(float* query, std::size_t head_dim, std::int64_t positions, double theta) {
  const std::size_t half = head_dim / 2;
  for (std::size_t i = 0; i < half; ++i) {
    const double angle = -static_cast<double>(positions) *
                         std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim));
    const auto cosine = static_cast<float>(std::cos(angle));
    const auto sine = static_cast<float>(std::sin(angle));
    const float a = query[i];
    const float b = query[i + half];
    query[i] = a * cosine - b * sine;
    query[i + half] = b * cosine + a * sine;
  }
}

/// Writes the queries scaled and padded: [group.size, row].
inline void pad_queries(QueryGroup group, std::int64_t rotated_back, double theta, float* padded, std::size_t row) {
  for (std::size_t q = 0; q < group.size; ++q) {
    float* query = padded + q * row;
    for (std::size_t i = 0; i < group.head_dim; ++i) query[i] = group[q][i] * group.scale;
    for (std::size_t i = group.head_dim; i < row; ++i) query[i] = 0.0F;
    if (rotated_back != 0 && theta > 0.0) rotate_back(query, group.head_dim, rotated_back, theta);
  }
}

/// Reads pages in runs that meet the query under the same rotation.
template <class Cache>
void read_pages(const Cache& cache, QueryGroup queries, std::span<const PageRead> reads, std::span<SoftmaxState> states,
                PageTap tap, float* padded, std::size_t row) {
  std::int64_t rotation = 0;
  for (std::size_t first = 0; first < reads.size();) {
    std::size_t last = first + 1;
    while (last < reads.size() && reads[last].rotate_back == reads[first].rotate_back) ++last;
    if (reads[first].rotate_back != rotation) {
      rotation = reads[first].rotate_back;
      pad_queries(queries, rotation, cache.config().rope_theta, padded, row);
    }
    attend_pages(cache.pages(), reads.subspan(first, last - first), padded, row, states, tap);
    tap.advance(last - first, queries.size);
    first = last;
  }
  if (rotation != 0) pad_queries(queries, 0, cache.config().rope_theta, padded, row);
}

/// The query group of one kv head over the tokens before `end`; out: its rows of the output.
template <class Cache>
void attend_head(Cache& cache, std::size_t kv_head, QueryGroup group, Position end, HeadRows<float> out, float* lse) {
  AttendScratch& scratch = cache.scratch(kv_head);
  const std::size_t row = round_up(group.head_dim, query_padding);
  cache.begin_query(kv_head, end);
  const std::size_t block = cache.queries_per_selection(kv_head);
  pad_queries(group, 0, 0.0, scratch.queries.data(), row);
  std::fill(scratch.accumulators.begin(), scratch.accumulators.end(), 0.0F);
  for (std::size_t q = 0; q < group.size; ++q) {
    scratch.states[q] = SoftmaxState{};
    scratch.states[q].accumulator = scratch.accumulators.data() + q * row;
  }
  for (std::size_t first = 0; first < group.size; first += block) {
    QueryGroup queries = group;
    queries.data = group[first].data();
    queries.size = block;
    const std::span<SoftmaxState> states(scratch.states.data() + first, block);
    float* padded = scratch.queries.data() + first * row;
    std::size_t seen = 0;
    for (auto reads = cache.select(kv_head, queries); !reads.empty();
         reads = cache.select_more(kv_head, queries, states)) {
      read_pages(cache, queries, reads, states, cache.tap(kv_head, seen), padded, row);
      seen += reads.size();
    }
    cache.add_residual(kv_head, queries, states);
    cache.record(kv_head, first, states);
  }
  for (std::size_t q = 0; q < group.size; ++q) {
    normalise(scratch.states[q], out.row(q), group.head_dim);
    if (lse != nullptr) lse[q] = scratch.states[q].log_sum_exp();
  }
  cache.observe(kv_head, group);
}

template <class Cache>
void attend_all_heads(Cache& cache, HeadRows<const float> q, HeadRows<float> out, float* lse, Position end) {
  const Geometry& geometry = cache.geometry();
  const std::size_t group = geometry.group();
  for (std::size_t h = 0; h < geometry.kv_heads; ++h) {
    const QueryGroup queries{q.row(h * group), group, geometry.head_dim, q.head_stride, cache.softmax_scale()};
    const HeadRows<float> rows{out.row(h * group), group, geometry.head_dim, out.head_stride};
    attend_head(cache, h, queries, end, rows, lse == nullptr ? nullptr : lse + h * group);
  }
  cache.end_step();
}

}  // namespace detail

/// Attends with the newest token's queries, q [query_heads, head_dim], to what the policy reads of what is resident,
/// that token included, and shows the policy the evidence. out: [query_heads, head_dim]; log_sum_exp: [query_heads] or
/// empty. O(tokens read * head_dim * group) per kv head, plus the policy's selection. Refuses wrong shapes and an empty
/// cache.
template <class Policy, StorageScalar Scalar>
Status attend(PagedKvCache<Policy, Scalar>& cache, HeadRows<const float> q, HeadRows<float> out,
              std::span<float> log_sum_exp = {}) noexcept {
  const std::size_t query_heads = cache.geometry().query_heads;
  if (cache.next_position() == Position{0}) return {Status::Code::nothing_to_attend, 1, 0};
  if (const Status status = check_rows(q, query_heads, cache.geometry()); !status) return status;
  if (const Status status = check_rows(out, query_heads, cache.geometry()); !status) return status;
  if (!log_sum_exp.empty() && log_sum_exp.size() != query_heads) {
    return {Status::Code::wrong_size, log_sum_exp.size(), query_heads};
  }
  detail::attend_all_heads(cache, q, out, log_sum_exp.empty() ? nullptr : log_sum_exp.data(), cache.next_position());
  return {};
}
/// The same over contiguous rows.
template <class Policy, StorageScalar Scalar>
Status attend(PagedKvCache<Policy, Scalar>& cache, std::span<const float> q, std::span<float> out,
              std::span<float> log_sum_exp = {}) noexcept {
  const Geometry& geometry = cache.geometry();
  if (const Status status = check_size(q.size(), geometry.query_heads, geometry); !status) return status;
  if (const Status status = check_size(out.size(), geometry.query_heads, geometry); !status) return status;
  return attend(cache, HeadRows<const float>(q.data(), geometry.query_heads, geometry.head_dim),
                HeadRows<float>(out.data(), geometry.query_heads, geometry.head_dim), log_sum_exp);
}

/// Attends causally, in order, with the queries of the newest q.tokens tokens: query i sees the tokens up to its own.
/// q, out: [tokens, query_heads, head_dim]. Tokens that were evicted while the chunk was appended are gone for its
/// early queries too; an evicting policy that must see a long prompt token by token is fed chunks of one token.
template <class Policy, StorageScalar Scalar>
Status attend_prompt(PagedKvCache<Policy, Scalar>& cache, TokenRows<const float> q, TokenRows<float> out) noexcept {
  const auto length = static_cast<std::size_t>(cache.next_position().value);
  if (q.tokens > length) return {Status::Code::nothing_to_attend, q.tokens, length};
  if (out.tokens != q.tokens) return {Status::Code::wrong_tokens, out.tokens, q.tokens};
  if (q.tokens == 0) return {};
  if (const Status status = check_rows(q, cache.geometry().query_heads, cache.geometry()); !status) return status;
  if (const Status status = check_rows(out, cache.geometry().query_heads, cache.geometry()); !status) return status;
  for (std::size_t token = 0; token < q.tokens; ++token) {
    const Position end = Position{0} + (length - q.tokens + token + 1);
    detail::attend_all_heads(cache, q.token(token), out.token(token), nullptr, end);
  }
  return {};
}

}  // namespace kvsparse
