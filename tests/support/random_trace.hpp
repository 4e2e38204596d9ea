// SPDX-License-Identifier: Apache-2.0
//
// Deterministic traces for tests. No libm call on the way to a float except sqrt, which IEEE 754 defines exactly.
// (Where the compiler may contract to FMA, planted directions can still differ in a last bit.)
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "naive_replay.hpp"
#include "test_rng.hpp"

namespace kvsparse_test {

struct TraceShape {
  int tokens = 0;
  int query_heads = 1;
  int kv_heads = 1;
  int head_dim = 8;
  int prompt_tokens = 0;
};

namespace random_trace {

inline std::size_t flat(int heads, int dim, int token, int head) {
  return (static_cast<std::size_t>(token) * static_cast<std::size_t>(heads) + static_cast<std::size_t>(head)) *
         static_cast<std::size_t>(dim);
}

inline std::vector<float> gaussians(TestRng& rng, int tokens, int heads, int dim, double scale) {
  std::vector<float> data(flat(heads, dim, tokens, 0));
  for (float& x : data) x = static_cast<float>(scale * rng.gaussian());
  return data;
}

inline std::vector<double> direction(TestRng& rng, int dim) {
  std::vector<double> u(static_cast<std::size_t>(dim));
  double norm = 0;
  for (double& x : u) {
    x = rng.gaussian();
    norm += x * x;
  }
  for (double& x : u) x /= std::sqrt(norm);
  return u;
}

inline void add(float* x, const std::vector<double>& u, double scale) {
  for (std::size_t i = 0; i < u.size(); ++i) x[i] = static_cast<float>(static_cast<double>(x[i]) + scale * u[i]);
}

}  // namespace random_trace

// Independent Gaussian q, k, v; the logits have standard deviation query_scale. At 1 attention is nearly flat, at 2.5
// about as peaked as a trained head, at 5 a handful of tokens hold everything.
inline NaiveTrace gaussian_trace(const TraceShape& shape, std::uint64_t seed, double query_scale = 2.5) {
  TestRng rng(seed);
  NaiveTrace trace;
  trace.tokens = shape.tokens;
  trace.query_heads = shape.query_heads;
  trace.kv_heads = shape.kv_heads;
  trace.head_dim = shape.head_dim;
  trace.prompt_tokens = shape.prompt_tokens;
  trace.q = random_trace::gaussians(rng, shape.tokens, shape.query_heads, shape.head_dim, query_scale);
  trace.k = random_trace::gaussians(rng, shape.tokens, shape.kv_heads, shape.head_dim, 1);
  trace.v = random_trace::gaussians(rng, shape.tokens, shape.kv_heads, shape.head_dim, 1);
  return trace;
}

// What RaaS is about. In each kv head some decoded tokens are milestones: strongly attended for a stretch of queries
// right after they appear, then ever less, then never again. One prompt token (position 0 without a prompt) is a
// phoenix: silent for long, wanted by short bursts of queries late in the sequence. Only some heads of a group ask.
inline NaiveTrace milestone_trace(const TraceShape& shape, std::uint64_t seed, double boost = 8) {
  NaiveTrace trace = gaussian_trace(shape, seed, 1);
  TestRng rng(seed ^ 0x6D696C6573746F6EULL);
  const int group = shape.query_heads / shape.kv_heads;
  const int decode_tokens = shape.tokens - shape.prompt_tokens;
  // |key| |query| / sqrt(d) = boost, shared evenly.
  const double strength = std::sqrt(boost * std::sqrt(static_cast<double>(shape.head_dim)));

  const auto plant_key = [&](int head, int token, const std::vector<double>& u) {
    random_trace::add(&trace.k[random_trace::flat(shape.kv_heads, shape.head_dim, token, head)], u, strength);
  };
  const auto plant_query = [&](int query_head, int token, const std::vector<double>& u, double share) {
    random_trace::add(&trace.q[random_trace::flat(shape.query_heads, shape.head_dim, token, query_head)], u,
                      share * strength);
  };

  for (int h = 0; h < shape.kv_heads; ++h) {
    for (int at = shape.prompt_tokens + rng.below(8); at < shape.tokens; at += 10 + rng.below(20)) {
      const std::vector<double> u = random_trace::direction(rng, shape.head_dim);
      plant_key(h, at, u);
      const int stretch = 8 + rng.below(decode_tokens / 2 + 1);
      const int asks = rng.below(group);
      for (int t = at + 1; t < shape.tokens && t <= at + stretch; ++t) {
        const double fade = 1 - 0.6 * (t - at) / stretch;
        plant_query(h * group + asks, t, u, fade);
        if (group > 1 && t % 3 == 0) plant_query(h * group + (asks + 1) % group, t, u, 0.5 * fade);
      }
    }
    const std::vector<double> u = random_trace::direction(rng, shape.head_dim);
    const int phoenix = shape.prompt_tokens > 0 ? rng.below(shape.prompt_tokens) : 0;
    plant_key(h, phoenix, u);
    for (int t = shape.prompt_tokens + decode_tokens / 2; t < shape.tokens; ++t) {
      if (t % 13 < 2) plant_query(h * group + rng.below(group), t, u, 1);
    }
  }
  return trace;
}

// A milestone_trace whose milestones look alike: what Kindred is about. In each kv head the values of tokens with a
// planted key, which are the long ones, lean in one direction.
inline NaiveTrace look_alike_trace(const TraceShape& shape, std::uint64_t seed, double strength = 6) {
  NaiveTrace trace = milestone_trace(shape, seed);
  TestRng rng(seed ^ 0x6B696E64ULL);
  for (int h = 0; h < shape.kv_heads; ++h) {
    const std::vector<double> u = random_trace::direction(rng, shape.head_dim);
    for (int t = 0; t < shape.tokens; ++t) {
      const std::size_t first = random_trace::flat(shape.kv_heads, shape.head_dim, t, h);
      double square = 0;
      for (std::size_t i = first; i < first + u.size(); ++i) square += std::pow(static_cast<double>(trace.k[i]), 2);
      if (square > 1.5 * shape.head_dim) random_trace::add(&trace.v[first], u, strength);
    }
  }
  return trace;
}

struct TieOptions {
  // key[t] = key[t - key_period]. A multiple of the page size makes whole pages equal. 0: all keys differ.
  int key_period = 0;
  bool zero_keys = false;
  bool constant_queries = false;  // every token of a head asks the same
};

// Ties that are exact in any arithmetic, because the very same numbers meet. Values differ, so a wrong decision shows
// in the output as well.
inline NaiveTrace tie_trace(const TraceShape& shape, std::uint64_t seed, const TieOptions& options) {
  NaiveTrace trace = gaussian_trace(shape, seed, 1);
  const std::size_t key_row = random_trace::flat(shape.kv_heads, shape.head_dim, 1, 0);
  const std::size_t query_row = random_trace::flat(shape.query_heads, shape.head_dim, 1, 0);
  if (options.key_period > 0) {
    const std::size_t distance = key_row * static_cast<std::size_t>(options.key_period);
    for (std::size_t i = distance; i < trace.k.size(); ++i) trace.k[i] = trace.k[i - distance];
  }
  if (options.zero_keys) {
    for (float& x : trace.k) x = 0;
  }
  if (options.constant_queries) {
    for (std::size_t i = query_row; i < trace.q.size(); ++i) trace.q[i] = trace.q[i - query_row];
  }
  return trace;
}

// Logits in the thousands: a softmax without its running maximum overflows, most masses underflow, and min/max bounds
// are huge. Some keys are tiny, so that both extremes meet in one page.
inline NaiveTrace huge_norm_trace(const TraceShape& shape, std::uint64_t seed, double key_scale = 1000) {
  NaiveTrace trace = gaussian_trace(shape, seed, 2.5);
  TestRng rng(seed ^ 0x68756765ULL);
  const std::size_t dim = static_cast<std::size_t>(shape.head_dim);
  for (std::size_t first = 0; first < trace.k.size(); first += dim) {
    const double scale = rng.below(4) == 0 ? 1e-3 : key_scale;
    for (std::size_t i = first; i < first + dim; ++i) {
      trace.k[i] = static_cast<float>(scale * static_cast<double>(trace.k[i]));
    }
  }
  return trace;
}

}  // namespace kvsparse_test
