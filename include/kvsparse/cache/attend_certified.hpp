// SPDX-License-Identifier: Apache-2.0
// attend, with a proof of how little it left out.
#pragma once

#include <cstddef>
#include <span>

#include "attend.hpp"

namespace kvsparse {

/// attend(), and for each query head an upper bound of the share of the full softmax that lies in the tokens which the
/// policy did not read; 0 where it read all. The output is then off by at most lost_mass_bound times the largest
/// distance between the output over what was read and a value that was not. Exact arithmetic over the stored keys
/// stands behind the word "full": the kernel's rounding is accounted for (policy/mass_bounds.hpp), soft caps, windows,
/// ALiBi and sinks too. lost_mass_bound: [query_heads]; log_sum_exp: [query_heads] or empty. O(resident pages * group *
/// head_dim) per selection beside attend(), by the same thread.
///
/// Any selector with min/max summaries, and any policy that reads everything, can be certified; a selector without them
/// is refused. A policy that evicts does not compile: bounds of what is resident say nothing about what is gone.
template <class Policy, StorageScalar Key, StorageScalar Value, Executor E>
Status attend_certified(PagedKvCache<Policy, Key, Value>& cache, HeadRows<const float> q, HeadRows<float> out,
                        std::span<float> log_sum_exp, std::span<float> lost_mass_bound,
                        E&& executor) noexcept(is_nothrow_executor<E>) {
  static_assert(
      !Evictor<Policy> && !ResidualProvider<Policy>,
      "kvsparse: attend_certified bounds what a query leaves unread of the tokens that are there. This policy "
      "evicts, and of what is gone nothing can be proved: use attend, or a policy that keeps everything, such "
      "as Certified.");
  const std::size_t query_heads = cache.geometry().query_heads;
  const detail::AttendedLayer<Policy> layer = cache.attended();
  if (const Status status = detail::check_attend(layer.heads, q, out, log_sum_exp); !status) return status;
  if (lost_mass_bound.size() != query_heads) return {Status::Code::wrong_size, lost_mass_bound.size(), query_heads};
  if (Selector<Policy> && traits::page_summary(cache.policy()) != PageSummary::min_max) {
    return {Status::Code::no_page_bounds, cache.resident_tokens(0), 0};
  }
  float* lse = log_sum_exp.empty() ? nullptr : log_sum_exp.data();
  detail::AttendStep<Policy>(layer, q, out, lse, cache.next_position(), lost_mass_bound.data()).run(executor);
  return {};
}
/// The same over contiguous rows.
template <class Policy, StorageScalar Key, StorageScalar Value, Executor E>
Status attend_certified(PagedKvCache<Policy, Key, Value>& cache, std::span<const float> q, std::span<float> out,
                        std::span<float> log_sum_exp, std::span<float> lost_mass_bound,
                        E&& executor) noexcept(is_nothrow_executor<E>) {
  const Geometry& geometry = cache.geometry();
  if (const Status status = check_size(q.size(), geometry.query_heads, geometry.head_dim); !status) return status;
  if (const Status status = check_size(out.size(), geometry.query_heads, geometry.dim_of_values()); !status)
    return status;
  return attend_certified(cache, HeadRows<const float>(q.data(), geometry.query_heads, geometry.head_dim),
                          HeadRows<float>(out.data(), geometry.query_heads, geometry.dim_of_values()), log_sum_exp,
                          lost_mass_bound, executor);
}
/// The same on the calling thread.
template <class Policy, StorageScalar Key, StorageScalar Value>
Status attend_certified(PagedKvCache<Policy, Key, Value>& cache, HeadRows<const float> q, HeadRows<float> out,
                        std::span<float> log_sum_exp, std::span<float> lost_mass_bound) noexcept {
  return attend_certified(cache, q, out, log_sum_exp, lost_mass_bound, SerialExecutor{});
}
template <class Policy, StorageScalar Key, StorageScalar Value>
Status attend_certified(PagedKvCache<Policy, Key, Value>& cache, std::span<const float> q, std::span<float> out,
                        std::span<float> log_sum_exp, std::span<float> lost_mass_bound) noexcept {
  return attend_certified(cache, q, out, log_sum_exp, lost_mass_bound, SerialExecutor{});
}

}  // namespace kvsparse
