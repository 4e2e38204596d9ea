// SPDX-License-Identifier: Apache-2.0
//
// The kernel over keys and values of different widths, and over a latent that is both, as MLA has it.
#include <gtest/gtest.h>

#include <cmath>
#include <concepts>
#include <string>
#include <vector>

#include "kvsparse/attention/exact.hpp"
#include "kvsparse/attention/page_kernel.hpp"
#include "support/random_trace.hpp"

namespace kvsparse_test {
namespace {

using namespace kvsparse;

template <class Scalar>
class StoredRows {
 public:
  StoredRows(std::size_t count, std::size_t dim, std::uint64_t seed) : dim_(dim), stored_(count * stride()) {
    TestRng rng(seed);
    std::vector<float> row(dim);
    for (std::size_t i = 0; i < count; ++i) {
      for (float& x : row) x = static_cast<float>(rng.gaussian());
      store_row(row.data(), dim, stored_.data() + i * stride());
    }
  }
  std::size_t stride() const { return stored_row_size<Scalar>(dim_); }
  const Scalar* data() const { return stored_.data(); }
  std::vector<float> row(std::size_t index) const {
    std::vector<float> row(dim_);
    load_row(stored_.data() + index * stride(), std::span<float>(row));
    return row;
  }

 private:
  std::size_t dim_;
  std::vector<Scalar> stored_;
};

/// Three pages, the last not full; latent: values are the first value_dim elements of the keys.
template <class Key, class Value>
void check(std::size_t head_dim, std::size_t value_dim, std::size_t queries, bool latent) {
  SCOPED_TRACE("keys of " + std::to_string(head_dim) + ", values of " + std::to_string(value_dim) + ", queries " +
               std::to_string(queries) + (latent ? ", latent" : ""));
  constexpr std::size_t page_size = 16, tokens = 41;
  const StoredRows<Key> keys(3 * page_size, head_dim, head_dim);
  const StoredRows<Value> values(latent ? 0 : 3 * page_size, value_dim, value_dim + 1);
  PagedKv<Key, Value> kv;
  kv.keys = keys.data();
  kv.key_row_stride = keys.stride();
  kv.key_page_stride = page_size * keys.stride();
  kv.values = values.data();
  kv.value_row_stride = values.stride();
  kv.value_page_stride = page_size * values.stride();
  if constexpr (std::same_as<Key, Value>) {
    if (latent) {
      kv.values = keys.data();
      kv.value_row_stride = kv.key_row_stride;
      kv.value_page_stride = kv.key_page_stride;
    }
  }
  kv.head_dim = head_dim;
  kv.value_dim = value_dim;

  const std::size_t q_row = round_up(head_dim, query_padding);
  const std::size_t out_row = round_up(value_dim, query_padding);
  const float scale = 1.0F / std::sqrt(static_cast<float>(head_dim));
  TestRng rng(3);
  std::vector<float> q(queries * q_row, 0.0F), accumulators(queries * out_row, 0.0F);
  std::vector<SoftmaxState> states(queries);
  for (std::size_t i = 0; i < queries; ++i) {
    for (std::size_t d = 0; d < head_dim; ++d) q[i * q_row + d] = static_cast<float>(1.5 * rng.gaussian()) * scale;
    states[i].accumulator = accumulators.data() + i * out_row;
  }
  std::vector<PageRead> reads(3);
  for (std::uint32_t page = 0; page < 3; ++page) {
    reads[page].page = PageId{page};
    reads[page].tokens = page < 2 ? page_size : tokens - 2 * page_size;
  }
  attend_pages(kv, std::span<const PageRead>(reads), q.data(), q_row, states);
  for (std::size_t i = 0; i < queries; ++i) {
    const ExactAttention exact = exact_attention(
        std::span<const float>(q).subspan(i * q_row, head_dim), tokens, [&](std::size_t t) { return keys.row(t); },
        [&](std::size_t t) { return latent ? keys.row(t) : values.row(t); }, [](std::size_t t) { return t; }, {},
        value_dim);
    std::vector<float> out(value_dim);
    normalise(states[i], out.data(), value_dim);
    for (std::size_t d = 0; d < value_dim; ++d) ASSERT_NEAR(static_cast<double>(out[d]), exact.out[d], 1e-5) << d;
    ASSERT_NEAR(static_cast<double>(states[i].log_sum_exp()), exact.log_sum_exp, 1e-5);
  }
}

TEST(ValueDim, NarrowerAndWiderThanKeys) {
  for (const std::size_t queries : {1U, 3U, 4U, 7U, 8U}) {
    check<float, float>(24, 7, queries, false);
    check<Half, Half>(7, 33, queries, false);
    check<Half, Int8>(40, 24, queries, false);
    check<Int8, Bfloat16>(16, 130, queries, false);
    check<Int8, Int8>(192, 128, queries, false);
    if (testing::Test::HasFatalFailure()) return;
  }
}

TEST(ValueDim, ALatentIsKeysAndValuesAtOnce) {
  for (const std::size_t queries : {1U, 2U, 5U, 16U}) {
    check<float, float>(20, 13, queries, true);
    check<Half, Half>(576, 512, queries, true);
    check<Bfloat16, Bfloat16>(576, 512, queries, true);
    check<Int8, Int8>(576, 512, queries, true);  // the key's scale is the value's
    check<Int8, Int8>(30, 9, queries, true);
    if (testing::Test::HasFatalFailure()) return;
  }
}

}  // namespace
}  // namespace kvsparse_test
