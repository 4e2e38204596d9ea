// SPDX-License-Identifier: Apache-2.0
//
// Caches whose values are not as wide as their keys, and MLA's latent, which is key and value at once: every verb,
// against sums written out in double precision.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "kvsparse/cache/any_cache.hpp"
#include "kvsparse/interop/snapshot.hpp"
#include "kvsparse/interop/thread_team.hpp"
#include "kvsparse/policy/dense.hpp"
#include "kvsparse/policy/kindred.hpp"
#include "kvsparse/policy/quest.hpp"
#include "kvsparse/policy/raas.hpp"
#include "kvsparse/policy/streaming_llm.hpp"
#include "kvsparse/policy/streaming_sketch.hpp"
#include "kvsparse/policy/value_aware.hpp"
#include "support/random_trace.hpp"
#include "support/refusal.hpp"

namespace kvsparse_test {
namespace {

using namespace kvsparse;

constexpr bool latent = true;

CacheConfig config_of(std::size_t query_heads, std::size_t kv_heads, std::size_t head_dim, std::size_t value_dim,
                      bool values_in_keys = false) {
  CacheConfig config;
  config.query_heads = query_heads;
  config.kv_heads = kv_heads;
  config.head_dim = head_dim;
  config.value_dim = value_dim;
  config.values_in_keys = values_in_keys;
  config.page_size = 4;
  config.max_tokens = 4096;
  config.budget_tokens = 16;
  return config;
}

std::string text_of(const CacheConfig& config) {
  return std::to_string(config.query_heads) + " query and " + std::to_string(config.kv_heads) + " kv heads, keys of " +
         std::to_string(config.head_dim) + ", values of " + std::to_string(config.value_dim) +
         (config.values_in_keys ? " in them" : " beside them");
}

/// Queries, keys and values of a sequence; of a latent, no values.
struct Sequence {
  CacheConfig config;
  std::size_t tokens;
  std::vector<float> q, k, v;

  Sequence(const CacheConfig& shape, std::size_t count, std::uint64_t seed) : config(shape), tokens(count) {
    TestRng rng(seed);
    const auto fill = [&](std::vector<float>& rows, std::size_t size, double scale) {
      for (std::size_t i = 0; i < size; ++i) rows.push_back(static_cast<float>(scale * rng.gaussian()));
    };
    fill(q, tokens * q_row(), 1.5);
    fill(k, tokens * k_row(), 1.0);
    fill(v, tokens * v_row(), 1.0);
  }

  std::size_t q_row() const { return config.query_heads * config.head_dim; }
  std::size_t k_row() const { return config.kv_heads * config.head_dim; }
  std::size_t v_row() const { return config.values_in_keys ? 0 : config.kv_heads * config.value_dim; }
  std::size_t out_row() const { return config.query_heads * config.value_dim; }

  std::span<const float> query(std::size_t token) const { return std::span(q).subspan(token * q_row(), q_row()); }
  std::span<const float> keys(std::size_t token, std::size_t count = 1) const {
    return std::span(k).subspan(token * k_row(), count * k_row());
  }
  std::span<const float> values(std::size_t token, std::size_t count = 1) const {
    return std::span(v).subspan(token * v_row(), count * v_row());
  }
  TokenRows<const float> key_rows(std::size_t token, std::size_t count) const {
    return {keys(token).data(), count, config.kv_heads, config.head_dim};
  }
  TokenRows<const float> value_rows(std::size_t token, std::size_t count) const {
    if (config.values_in_keys) return {};
    return {values(token).data(), count, config.kv_heads, config.value_dim};
  }

  /// What a storage type makes of rows; that is the business of stored_row_test.
  template <class Scalar>
  static void round(std::vector<float>& rows, std::size_t dim) {
    std::vector<Scalar> stored(stored_row_size<Scalar>(dim));
    for (std::size_t first = 0; first < rows.size(); first += dim) {
      const std::span<float> row = std::span(rows).subspan(first, dim);
      store_row(row.data(), dim, stored.data());
      load_row(stored.data(), row);
    }
  }
  template <class Key, class Value>
  Sequence stored_as() const {
    Sequence rounded = *this;
    round<Key>(rounded.k, config.head_dim);
    round<Value>(rounded.v, config.value_dim);
    return rounded;
  }

  double value(std::size_t token, std::size_t kv_head, std::size_t i) const {
    return static_cast<double>(config.values_in_keys ? keys(token)[kv_head * config.head_dim + i]
                                                     : values(token)[kv_head * config.value_dim + i]);
  }

  /// Output of a query head of `token` over `positions`, and behind it the log-sum-exp.
  template <class Positions>
  std::vector<double> attended(std::size_t token, std::size_t head, const Positions& positions) const {
    const std::size_t kv_head = head / (config.query_heads / config.kv_heads);
    const float* query_row = query(token).data() + head * config.head_dim;
    std::vector<double> logits;
    double largest = -std::numeric_limits<double>::infinity();
    for (const std::size_t position : positions) {
      double dot = 0.0;
      for (std::size_t i = 0; i < config.head_dim; ++i) {
        dot += static_cast<double>(query_row[i]) * static_cast<double>(keys(position)[kv_head * config.head_dim + i]);
      }
      logits.push_back(dot / std::sqrt(static_cast<double>(config.head_dim)));
      largest = std::max(largest, logits.back());
    }
    std::vector<double> result(config.value_dim + 1, 0.0);
    double sum = 0.0;
    for (std::size_t t = 0; t < positions.size(); ++t) {
      const double weight = std::exp(logits[t] - largest);
      sum += weight;
      for (std::size_t i = 0; i < config.value_dim; ++i) result[i] += weight * value(positions[t], kv_head, i);
    }
    for (std::size_t i = 0; i < config.value_dim; ++i) result[i] /= sum;
    result.back() = largest + std::log(sum);
    return result;
  }
};

std::vector<std::size_t> up_to(std::size_t last) {
  std::vector<std::size_t> positions(last + 1);
  for (std::size_t i = 0; i <= last; ++i) positions[i] = i;
  return positions;
}
std::vector<std::size_t> numbers(const std::vector<Position>& positions) {
  std::vector<std::size_t> result;
  for (const Position position : positions) result.push_back(static_cast<std::size_t>(position.value));
  return result;
}

/// out: [query_heads, value_dim] of `token`; positions_of(kv_head): what it read.
template <class PositionsOf>
void expect_attended(const Sequence& stored, std::size_t token, std::span<const float> out, std::span<const float> lse,
                     PositionsOf&& positions_of) {
  const CacheConfig& config = stored.config;
  for (std::size_t head = 0; head < config.query_heads; ++head) {
    const auto positions = positions_of(head / (config.query_heads / config.kv_heads));
    const std::vector<double> expected = stored.attended(token, head, positions);
    for (std::size_t i = 0; i < config.value_dim; ++i) {
      ASSERT_NEAR(static_cast<double>(out[head * config.value_dim + i]), expected[i], 2e-5)
          << "token " << token << ", query head " << head << ", element " << i;
    }
    if (!lse.empty()) {
      ASSERT_NEAR(static_cast<double>(lse[head]), expected.back(), 2e-5);
    }
  }
}

template <class Cache>
Status append_one(Cache& cache, const Sequence& sequence, std::size_t token) {
  return cache.append(sequence.keys(token), sequence.values(token));
}
template <class Cache>
std::vector<float> attend_one(Cache& cache, const Sequence& sequence, std::size_t token) {
  std::vector<float> out(sequence.out_row());
  EXPECT_TRUE(attend(cache, sequence.query(token), std::span<float>(out)).ok());
  return out;
}

template <class Policy, class Key, class Value = Key>
void decode(const CacheConfig& config, std::size_t tokens) {
  SCOPED_TRACE(std::string(Policy::name) + ", " + text_of(config));
  const Sequence sequence(config, tokens, config.head_dim + config.value_dim);
  const Sequence stored = sequence.stored_as<Key, Value>();
  PagedKvCache<Policy, Key, Value> cache(config);
  std::vector<float> out(sequence.out_row()), lse(config.query_heads);
  for (std::size_t token = 0; token < tokens; ++token) {
    ASSERT_TRUE(append_one(cache, sequence, token).ok());
    ASSERT_TRUE(attend(cache, sequence.query(token), std::span<float>(out), lse).ok());
    expect_attended(stored, token, out, lse, [&](std::size_t h) { return numbers(cache.read_positions(h)); });
    if (testing::Test::HasFatalFailure()) return;
    if (!Evictor<Policy>) {
      ASSERT_EQ(cache.stats().resident_tokens, token + 1);
    }
  }
}

TEST(ValueDimCache, DecodeIsExactWhateverTheWidths) {
  decode<Dense, float>(config_of(6, 2, 24, 7), 23);
  decode<Dense, float>(config_of(1, 1, 5, 50), 23);
  decode<Dense, Half, Int8>(config_of(4, 4, 7, 33), 23);
  decode<Dense, Int8>(config_of(12, 2, 19, 13), 23);
  decode<Dense, Half>(config_of(16, 16, 192, 128), 9);
}

TEST(ValueDimCache, ALatentIsStoredOnceAndReadTwice) {
  decode<Dense, float>(config_of(8, 2, 20, 13, latent), 23);
  decode<Dense, float>(config_of(3, 1, 9, 9, latent), 23);
  decode<Dense, Half>(config_of(128, 1, 576, 512, latent), 6);
  decode<Dense, Int8>(config_of(128, 1, 576, 512, latent), 6);
  decode<Dense, Int8>(config_of(10, 2, 30, 9, latent), 23);
}

TEST(ValueDimCache, PoliciesEvictAndSelectAsEver) {
  for (const CacheConfig& config :
       {config_of(4, 2, 10, 26), config_of(4, 2, 26, 10), config_of(4, 2, 26, 10, latent)}) {
    decode<Raas, Int8>(config, 60);
    decode<Quest, Half>(config, 60);
    decode<Kindred, float>(config, 60);
    if (testing::Test::HasFatalFailure()) return;
  }
}

/// ValueAware written from its formula: beyond the budget goes the page of the smallest mean norm, but never page 0.
template <class Scalar>
void expect_value_aware(const CacheConfig& config) {
  SCOPED_TRACE(text_of(config));
  const Sequence sequence(config, 80, 5);
  const Sequence stored = sequence.stored_as<Scalar, Scalar>();
  PagedKvCache<ValueAware, Scalar> cache(config);
  std::vector<std::vector<std::size_t>> pages(config.kv_heads);  // numbers of the resident pages
  for (std::size_t token = 0; token < sequence.tokens; ++token) {
    ASSERT_TRUE(append_one(cache, sequence, token).ok());
    for (std::size_t h = 0; h < config.kv_heads; ++h) {
      if (token % config.page_size == 0) {
        const auto norm = [&](std::size_t page) {
          double sum = 0.0;
          for (std::size_t t = page * config.page_size; t < (page + 1) * config.page_size; ++t) {
            for (std::size_t i = 0; i < config.value_dim; ++i) sum += std::abs(stored.value(t, h, i));
          }
          return sum;
        };
        if (pages[h].size() == config.budget_tokens / config.page_size) {
          pages[h].erase(std::min_element(pages[h].begin() + 1, pages[h].end(),
                                          [&](std::size_t a, std::size_t b) { return norm(a) < norm(b); }));
        }
        pages[h].push_back(token / config.page_size);
      }
      std::vector<std::size_t> expected;
      for (const std::size_t page : pages[h]) {
        for (std::size_t t = page * config.page_size; t < (page + 1) * config.page_size && t <= token; ++t) {
          expected.push_back(t);
        }
      }
      ASSERT_EQ(numbers(cache.resident_positions(h)), expected) << "token " << token << ", kv head " << h;
    }
  }
}

TEST(ValueDimCache, PoliciesSeeWholeValuesAndNothingElse) {
  expect_value_aware<float>(config_of(2, 2, 3, 21));
  expect_value_aware<float>(config_of(2, 2, 21, 3));
  expect_value_aware<Int8>(config_of(2, 2, 3, 21));
  expect_value_aware<Int8>(config_of(2, 2, 21, 3, latent));  // the scale stands behind the key
}

/// What a policy adds for tokens that are gone is linear in the values, so wide values are what their halves are.
TEST(ValueDimCache, AResidualIsAsWideAsTheValues) {
  const Sequence sequence(config_of(4, 2, 10, 20), 60, 25);
  const CacheConfig half = config_of(4, 2, 10, 10);
  PagedKvCache<StreamingSketch, float> whole(sequence.config);
  std::vector<PagedKvCache<StreamingSketch, float>> halves(2, PagedKvCache<StreamingSketch, float>(half));
  for (std::size_t token = 0; token < sequence.tokens; ++token) {
    ASSERT_TRUE(append_one(whole, sequence, token).ok());
    const std::vector<float> out = attend_one(whole, sequence, token);
    for (std::size_t side = 0; side < 2; ++side) {
      const HeadRows<const float> k(sequence.keys(token).data(), 2, 10);
      const HeadRows<const float> v(sequence.values(token).data() + side * 10, 2, 10, 20);
      ASSERT_TRUE(halves[side].append(k, v).ok());
      std::vector<float> expected(4 * 10);
      ASSERT_TRUE(attend(halves[side], sequence.query(token), std::span<float>(expected)).ok());
      for (std::size_t i = 0; i < expected.size(); ++i) {
        ASSERT_NEAR(out[i / 10 * 20 + side * 10 + i % 10], expected[i], 1e-5F) << "token " << token;
      }
    }
  }
  EXPECT_GT(whole.stats().evicted_tokens, 0U);
}

TEST(ValueDimCache, BelowTheBudgetEveryPolicyIsDenseToTheBit) {
  for (CacheConfig config : {config_of(8, 2, 12, 40), config_of(8, 2, 40, 12, latent)}) {
    SCOPED_TRACE(text_of(config));
    config.budget_tokens = 64;
    const Sequence sequence(config, 64, 9);
    PagedKvCache<Dense, Half> dense(config);
    PagedKvCache<Raas, Half> raas(config);
    PagedKvCache<Quest, Half> quest(config);
    for (std::size_t token = 0; token < sequence.tokens; ++token) {
      ASSERT_TRUE(append_one(dense, sequence, token).ok());
      ASSERT_TRUE(append_one(raas, sequence, token).ok());
      ASSERT_TRUE(append_one(quest, sequence, token).ok());
      const std::vector<float> expected = attend_one(dense, sequence, token);
      ASSERT_EQ(attend_one(raas, sequence, token), expected);
      ASSERT_EQ(attend_one(quest, sequence, token), expected);
    }
  }
}

TEST(ValueDimCache, ChunksOfAPromptAreExact) {
  const std::vector<CacheConfig> shapes{config_of(4, 2, 24, 7), config_of(2, 2, 7, 150),
                                        config_of(8, 1, 20, 13, latent), config_of(32, 1, 48, 40, latent)};
  for (const CacheConfig& config : shapes) {
    SCOPED_TRACE(text_of(config));
    const Sequence sequence(config, 50, 11);
    const Sequence stored = sequence.stored_as<Half, Half>();
    PagedKvCache<Dense, Half> cache(config);
    for (const auto& [first, count] : {std::pair<std::size_t, std::size_t>{0, 13}, {13, 1}, {14, 36}}) {
      if (first == 0) {
        ASSERT_TRUE(cache.append_prompt(sequence.keys(first, count), sequence.values(first, count)).ok());
      } else {
        ASSERT_TRUE(cache.append_prompt(sequence.key_rows(first, count), sequence.value_rows(first, count)).ok());
      }
      // Rows of the output lie apart, and what lies between them is the caller's.
      const std::size_t head_stride = config.value_dim + 3, token_stride = config.query_heads * head_stride + 5;
      std::vector<float> spread(count * token_stride, 77.0F);
      const TokenRows<const float> q(sequence.query(first).data(), count, config.query_heads, config.head_dim);
      const TokenRows<float> out(spread.data(), count, config.query_heads, config.value_dim, token_stride, head_stride);
      ASSERT_TRUE(attend_prompt(cache, q, out).ok());
      for (std::size_t t = 0; t < count; ++t) {
        std::vector<float> rows;
        for (std::size_t head = 0; head < config.query_heads; ++head) {
          float* row = out.token(t).row(head);
          for (std::size_t i = 0; i < config.value_dim; ++i) rows.push_back(std::exchange(row[i], 77.0F));
        }
        const std::vector<std::size_t> seen = up_to(first + t);
        expect_attended(stored, first + t, rows, {}, [&](std::size_t) { return seen; });
        if (HasFatalFailure()) return;
      }
      ASSERT_EQ(std::count(spread.begin(), spread.end(), 77.0F), static_cast<std::ptrdiff_t>(spread.size()));
    }
  }
}

TEST(ValueDimCache, ThreadsThatShareAHeadChangeNoBit) {
  ThreadTeam team(3);
  for (CacheConfig config : {config_of(3, 1, 12, 40), config_of(128, 1, 40, 24, latent)}) {
    SCOPED_TRACE(text_of(config));
    config.page_size = 16;
    config.logits.sink_logits.assign(config.query_heads, 0.25F);
    constexpr std::size_t tokens = 2500;  // three ranges
    const Sequence sequence(config, tokens, 13);
    PagedKvCache<Dense, float> cache(config);
    ASSERT_TRUE(cache.append_prompt(sequence.keys(0, tokens), sequence.values(0, tokens)).ok());
    std::vector<float> serial(sequence.out_row()), shared(sequence.out_row());
    std::vector<float> serial_lse(config.query_heads), shared_lse(config.query_heads);
    const std::span<const float> q = sequence.query(tokens - 1);
    ASSERT_TRUE(attend(cache, q, std::span<float>(serial), serial_lse).ok());
    ASSERT_TRUE(attend(cache, q, std::span<float>(shared), shared_lse, team).ok());
    EXPECT_EQ(serial, shared);
    EXPECT_EQ(serial_lse, shared_lse);
    for (const std::size_t head : {std::size_t{0}, config.query_heads - 1}) {
      std::vector<double> expected = sequence.attended(tokens - 1, head, up_to(tokens - 1));
      const double with_sink = std::log(std::exp(expected.back()) + std::exp(0.25));
      for (std::size_t i = 0; i < config.value_dim; ++i) {
        const double share = std::exp(expected.back() - with_sink);
        ASSERT_NEAR(static_cast<double>(serial[head * config.value_dim + i]), expected[i] * share, 2e-5);
      }
      ASSERT_NEAR(static_cast<double>(serial_lse[head]), with_sink, 2e-5);
    }
  }
}

/// Forks, rejected drafts and a snapshot in the middle leave the decode what it is without them.
template <class Policy, class Scalar>
void expect_detours_without_trace(CacheConfig config) {
  SCOPED_TRACE(text_of(config));
  config.max_speculative = 6;
  const Sequence sequence(config, 60, 17);
  const Sequence guesses(config, 60, 18);
  PagedKvCache<Policy, Scalar> plain(config), detoured(config);
  for (std::size_t token = 0; token < sequence.tokens; ++token) {
    if (token % 7 == 3) {
      ASSERT_TRUE(detoured.append_draft(guesses.key_rows(token, 5), guesses.value_rows(token, 5)).ok());
      std::vector<float> out(5 * sequence.out_row());
      const TokenRows<const float> q(guesses.query(token).data(), 5, config.query_heads, config.head_dim);
      ASSERT_TRUE(
          attend_prompt(detoured, q, TokenRows<float>(out.data(), 5, config.query_heads, config.value_dim)).ok());
      ASSERT_TRUE(detoured.truncate(Position{0} + token).ok());
    }
    if (token % 11 == 6) {
      auto fork = detoured.fork();
      ASSERT_TRUE(append_one(fork, guesses, token).ok());
      static_cast<void>(attend_one(fork, guesses, token));
    }
    if (token == 37) {
      std::stringstream saved;
      save(detoured, saved);
      PagedKvCache<Policy, Scalar> loaded(config);
      load(loaded, saved);
      detoured = std::move(loaded);
    }
    ASSERT_TRUE(append_one(plain, sequence, token).ok());
    ASSERT_TRUE(append_one(detoured, sequence, token).ok());
    ASSERT_EQ(attend_one(plain, sequence, token), attend_one(detoured, sequence, token)) << token;
  }
  for (std::size_t h = 0; h < config.kv_heads; ++h) {
    EXPECT_EQ(plain.resident_positions(h), detoured.resident_positions(h));
  }
}

TEST(ValueDimCache, ForksDraftsAndSnapshotsLeaveNoTrace) {
  expect_detours_without_trace<Raas, Int8>(config_of(4, 2, 10, 26));
  expect_detours_without_trace<Raas, Int8>(config_of(4, 2, 26, 10, latent));
  expect_detours_without_trace<Kindred, float>(config_of(4, 2, 26, 10));
  expect_detours_without_trace<Kindred, float>(config_of(4, 2, 26, 10, latent));
}

template <class Cache>
std::string load_refusal(const Cache& from, const CacheConfig& config) {
  std::stringstream saved;
  save(from, saved);
  Cache cache(config);
  try {
    load(cache, saved);
  } catch (const SnapshotError& error) {
    return error.what();
  }
  return "";
}

TEST(ValueDimCache, ASnapshotKnowsItsWidths) {
  const CacheConfig config = config_of(2, 1, 16, 8);
  PagedKvCache<Dense, float> cache(config);
  const Sequence sequence(config, 1, 1);
  ASSERT_TRUE(append_one(cache, sequence, 0).ok());
  EXPECT_EQ(load_refusal(cache, config_of(2, 1, 16, 9)), "value_dim is 8 in the snapshot and 9 here");
  EXPECT_EQ(load_refusal(cache, config_of(2, 1, 16, 8, latent)),
            "values_in_keys is false in the snapshot and true here");
  EXPECT_EQ(load_refusal(cache, config), "");
}

TEST(ValueDimCache, ValueDimOfHeadDimIsTheDefault) {
  CacheConfig named = config_of(4, 2, 20, 20);
  CacheConfig silent = named;
  silent.value_dim = 0;
  using Cache = PagedKvCache<Raas, Half>;
  EXPECT_EQ(Cache::bytes_required(named), Cache::bytes_required(silent));
  Cache cache(named);
  Cache other(silent);
  const Sequence sequence(named, 40, 3);
  for (std::size_t token = 0; token < sequence.tokens; ++token) {
    ASSERT_TRUE(append_one(cache, sequence, token).ok());
    ASSERT_TRUE(append_one(other, sequence, token).ok());
    ASSERT_EQ(attend_one(cache, sequence, token), attend_one(other, sequence, token));
  }
  EXPECT_EQ(load_refusal(cache, silent), "");
}

TEST(ValueDimCache, APageCostsWhatItHolds) {
  using Float = PagePool<float>;
  using Mixed = PagePool<Half, Int8>;
  using Quantised = PagePool<Int8>;
  constexpr PageSummary none = PageSummary::none;
  // Rows are padded to 8 elements; 8 bytes of an int8 row hold its scale.
  EXPECT_EQ(Float::bytes_per_page(config_of(1, 1, 20, 7).geometry(), none), 4 * (24 + 8) * 4U);
  EXPECT_EQ(Float::bytes_per_page(config_of(1, 1, 20, 7, latent).geometry(), none), 4 * 24 * 4U);
  EXPECT_EQ(Mixed::bytes_per_page(config_of(1, 1, 20, 33).geometry(), none), 4 * (24 * 2 + 40 + 8U));
  EXPECT_EQ(Quantised::bytes_per_page(config_of(1, 1, 576, 512, latent).geometry(), none), 4 * (576 + 8U));
  // Of a latent, the summary is as wide as the key.
  EXPECT_EQ(Float::bytes_per_page(config_of(1, 1, 20, 7, latent).geometry(), PageSummary::min_max),
            4 * 24 * 4U + 2 * 24 * sizeof(SummaryScalar<float>));
  const PagedKvCache<Dense, float> cache(config_of(2, 1, 20, 7, latent));
  EXPECT_EQ(cache.bytes_per_resident_page(), 4 * 24 * 4U);
}

TEST(ValueDimCache, RefusesWhatCannotBe) {
  const CacheConfig wide = config_of(2, 1, 8, 9, latent);
  const std::string too_wide = "value_dim = 9 exceeds head_dim = 8, and values_in_keys takes the values from the keys";
  EXPECT_EQ(refusal([&] { PagedKvCache<Dense, float> cache(wide); }), too_wide);
  EXPECT_EQ(refusal([&] { static_cast<void>(PagedKvCache<Dense, float>::bytes_required(wide)); }), too_wide);
  EXPECT_EQ(refusal([&] { PagePool<float> pool(wide.geometry(), PageSummary::none, 1); }), too_wide);
  const CacheConfig two_types = config_of(2, 1, 8, 8, latent);
  const std::string differ =
      "keys are stored as f16 and values as int8, but values_in_keys takes the values from the keys; store both in one "
      "type";
  using Mixed = PagedKvCache<Dense, Half, Int8>;
  EXPECT_EQ(refusal([&] { Mixed cache(two_types); }), differ);
  EXPECT_EQ(refusal([&] { static_cast<void>(Mixed::bytes_required(two_types)); }), differ);
  EXPECT_EQ(refusal([&] { PagePool<Half, Int8> pool(two_types.geometry(), PageSummary::none, 1); }), differ);
  CacheConfig huge = config_of(2, 1, 8, std::size_t{1} << 21);
  EXPECT_EQ(refusal([&] { PagedKvCache<Dense, float> cache(huge); }), "value_dim = 2097152 exceeds 2^20");
  CacheConfig turned = config_of(2, 1, 8, 4, latent);
  turned.rope.theta = 10000.0;
  StreamingLlm in_cache;
  in_cache.options.in_cache_positions = true;
  EXPECT_NE(refusal([&] { PagedKvCache<StreamingLlm, float> cache(turned, in_cache); }).find("values_in_keys"),
            std::string::npos);

  const PagePool<float> pool(config_of(2, 1, 8, 4).geometry(), PageSummary::none, 2000);
  using Cache = PagedKvCache<Dense, float>;
  EXPECT_EQ(refusal([&] { Cache cache(config_of(2, 1, 8, 5), pool); }),
            "the pool's value_dim is 4; this cache needs 5");
  EXPECT_EQ(refusal([&] { Cache cache(config_of(2, 1, 8, 4, latent), pool); }),
            "this cache has values_in_keys; the pool stores values beside the keys");
  EXPECT_EQ(refusal([&] { Cache cache(config_of(2, 1, 8, 4), pool); }), "not refused");
}

TEST(ValueDimCache, RefusesWrongRowsAndChangesNothing) {
  using Code = Status::Code;
  const std::vector<float> data(64, 1.0F);
  std::vector<float> out(64);
  const auto heads = [&](std::size_t count, std::size_t dim) { return HeadRows<const float>(data.data(), count, dim); };
  const auto chunk = [&](std::size_t tokens, std::size_t count, std::size_t dim) {
    return TokenRows<const float>(data.data(), tokens, count, dim);
  };
  const auto flat = [&](std::size_t size) { return std::span(data).first(size); };

  PagedKvCache<Dense, float> apart(config_of(4, 2, 5, 3));
  EXPECT_EQ(apart.append(heads(2, 5), heads(2, 5)).message(), "a row view has head_dim 5; this cache needs 3");
  EXPECT_EQ(apart.append(heads(2, 5), heads(0, 3)).code(), Code::wrong_heads);
  EXPECT_EQ(apart.append(flat(10), flat(10)).message(), "a flat span has 10 elements; this cache needs 6");
  EXPECT_EQ(apart.append(flat(10), {}).code(), Code::wrong_size);
  EXPECT_EQ(apart.append_prompt(flat(20), flat(20)).limit(), 12U);
  EXPECT_EQ(apart.append_prompt(chunk(2, 2, 5), chunk(1, 2, 3)).code(), Code::wrong_tokens);
  EXPECT_EQ(apart.next_position(), Position{0});
  ASSERT_TRUE(apart.append(flat(10), flat(6)).ok());
  EXPECT_EQ(attend(apart, flat(20), std::span(out).first(20)).limit(), 12U);
  EXPECT_EQ(attend(apart, heads(4, 5), HeadRows<float>(out.data(), 4, 5)).code(), Code::wrong_head_dim);
  EXPECT_EQ(attend_prompt(apart, chunk(1, 4, 5), TokenRows<float>(out.data(), 1, 4, 5)).code(), Code::wrong_head_dim);
  EXPECT_TRUE(attend(apart, flat(20), std::span(out).first(12)).ok());

  PagedKvCache<Dense, float> shared(config_of(4, 2, 5, 3, latent));
  EXPECT_EQ(shared.append(heads(2, 5), heads(2, 3)).message(), "a row view has 2 heads; this cache needs 0");
  EXPECT_EQ(shared.append(flat(10), flat(6)).message(), "a flat span has 6 elements; this cache needs 0");
  EXPECT_EQ(shared.append_prompt(flat(20), flat(12)).limit(), 0U);
  EXPECT_EQ(shared.append(chunk(2, 2, 5), chunk(2, 2, 3)).code(), Code::wrong_heads);
  EXPECT_EQ(shared.next_position(), Position{0});
  EXPECT_TRUE(shared.append_prompt(flat(20), {}).ok());
  EXPECT_TRUE(shared.append(heads(2, 5), {}).ok());
  EXPECT_TRUE(shared.append(chunk(3, 2, 5), {}).ok());
  EXPECT_TRUE(shared.append(flat(10), {}).ok());
  EXPECT_EQ(shared.next_position(), Position{7});
}

/// Through the handle that chooses by name, layer by layer, as an engine writes it.
TEST(ValueDimCache, LayersOfASequenceTakeALatentWithoutValues) {
  const CacheConfig config = config_of(16, 1, 36, 32, latent);
  const Sequence sequence(config, 30, 21);
  const Sequence stored = sequence.stored_as<Half, Half>();
  std::vector<AnyCache> layers;
  layers.push_back(AnyCache::of<Dense, Half>(ScalarType::f16, config));
  layers.push_back(AnyCache::of_pair<Raas, Half, Half>(config));
  SequenceCache<AnyCache> caches(std::move(layers));
  std::vector<float> out(sequence.out_row());
  for (std::size_t layer = 0; layer < 2; ++layer)
    ASSERT_TRUE(caches.append_prompt(layer, sequence.keys(0, 5), {}).ok());
  for (std::size_t token = 5; token < sequence.tokens; ++token) {
    for (std::size_t layer = 0; layer < 2; ++layer) {
      ASSERT_TRUE(caches.append(layer, sequence.keys(token), {}).ok());
      ASSERT_TRUE(caches.attend(layer, sequence.query(token), std::span<float>(out)).ok());
      const auto read = [&](std::size_t h) { return numbers(caches.layer(layer).read_positions(h)); };
      expect_attended(stored, token, out, {}, read);
      if (HasFatalFailure()) return;
    }
  }
  EXPECT_EQ(caches.layer(1).stats().resident_tokens, 14U);  // the prompt is pinned, the last page half full
}

}  // namespace
}  // namespace kvsparse_test
