// SPDX-License-Identifier: Apache-2.0
// One decode step taken apart: what append, selection, reading and evidence cost. It calls the verbs of PagedKvCache in
// the order in which attend() does; phases_agree() checks that both compute the same.
#pragma once

#include <algorithm>
#include <cstddef>
#include <kvsparse/kvsparse.hpp>
#include <span>
#include <vector>

#include "micro/machine_limits.hpp"
#include "micro/workload.hpp"

namespace kvsparse_bench {

/// Seconds, summed over the steps that were added.
struct PhaseTimes {
  double append = 0.0;   // storing the token, and the policy's victim where a page is opened
  double select = 0.0;   // which pages are read
  double read = 0.0;     // the kernel
  double observe = 0.0;  // evidence, and what the policy makes of it
  double total() const { return append + select + read + observe; }
};

template <class Policy, class Scalar>
void phased_step(kvsparse::PagedKvCache<Policy, Scalar>& cache, const std::vector<float>& k,
                 const std::vector<float>& v, const std::vector<float>& q, std::vector<float>& out, PhaseTimes& times) {
  using namespace kvsparse;
  Clock::time_point last = Clock::now();
  const auto lap = [&last](double& phase) {
    const Clock::time_point now = Clock::now();
    phase += std::chrono::duration<double>(now - last).count();
    last = now;
  };
  if (const Status status = cache.append(k, v); !status) throw std::runtime_error(status.message());
  lap(times.append);
  const kvsparse::detail::AttendedLayer<Policy> layer = cache.attended();
  const Geometry& shape = cache.geometry();
  const std::size_t row = round_up(shape.head_dim, query_padding);
  for (std::size_t h = 0; h < shape.kv_heads; ++h) {
    const std::size_t offset = h * shape.group() * shape.head_dim;
    const QueryGroup group{q.data() + offset, shape.group(), shape.head_dim, shape.head_dim, cache.softmax_scale()};
    kvsparse::detail::AttendScratch& scratch = layer.scratch[h];
    cache.begin_query(h, cache.next_position());
    lap(times.select);
    kvsparse::detail::pad_queries(group, scratch.queries.data(), row);
    scratch.start(0, 0, group.size);
    const std::size_t block = cache.queries_per_selection(h);
    for (std::size_t first = 0; first < group.size; first += block) {
      kvsparse::detail::QueryBlock of_selection{h, first, group};
      QueryGroup& queries = of_selection.queries;
      queries.data = group[first].data();
      queries.size = block;
      const std::span<SoftmaxState> states = scratch.states(0, first, block);
      std::size_t seen = 0;
      lap(times.read);
      for (auto reads = cache.select(h, queries); !reads.empty(); reads = cache.select_more(h, queries, states)) {
        lap(times.select);
        for (std::size_t range = 0; range < scratch.ranges(reads.size()); ++range) {
          kvsparse::detail::read_range(layer, of_selection, reads, seen, range);
          if (range == 0) continue;
          const std::span<const SoftmaxState> part = scratch.states(range, first, block);
          for (std::size_t i = 0; i < block; ++i) merge(states[i], part[i], shape.head_dim);
        }
        seen += reads.size();
        lap(times.read);
      }
      cache.add_residual(h, queries, states);
      lap(times.read);
      cache.record(h, first, states);
      lap(times.observe);
    }
    for (std::size_t i = 0; i < group.size; ++i) {
      normalise(scratch.states(0, i, 1)[0], out.data() + offset + i * shape.head_dim, shape.head_dim);
    }
    lap(times.read);
    cache.observe(h, group);
    lap(times.observe);
  }
  cache.end_step();
  lap(times.observe);
}

/// Whether a step taken apart leaves the same bits as append and attend, over enough steps for pages to be evicted.
template <class Policy, class Scalar>
bool phases_agree() {
  const kvsparse::CacheConfig config{
      .query_heads = 4, .kv_heads = 2, .head_dim = 32, .page_size = 16, .budget_tokens = 128, .max_tokens = 400};
  kvsparse::PagedKvCache<Policy, Scalar> whole(config), apart(config);
  RandomRows rows(7);
  std::vector<float> k(2 * 32), v(2 * 32), q(4 * 32), whole_out(4 * 32), apart_out(4 * 32);
  PhaseTimes unused;
  for (int step = 0; step < 400; ++step) {
    for (auto* row : {&k, &v, &q}) rows.fill(*row);
    if (!whole.append(k, v) || !kvsparse::attend(whole, std::span<const float>(q), std::span<float>(whole_out))) {
      return false;
    }
    phased_step(apart, k, v, q, apart_out, unused);
    if (whole_out != apart_out) return false;
  }
  return true;
}

}  // namespace kvsparse_bench
