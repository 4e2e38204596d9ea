// SPDX-License-Identifier: Apache-2.0
//
// The kernel and attend() against attention in double precision, and every way in which a policy may steer a read:
// token masks, weights, rotations, further selections, residuals.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "kvsparse/cache/attend.hpp"
#include "kvsparse/policy/dense.hpp"
#include "kvsparse/policy/streaming_llm.hpp"
#include "support/rows.hpp"

namespace kvsparse_test {
namespace {

using namespace kvsparse;

/// What a query told its policy, for one kv head.
struct Told {
  Position position;
  bool is_prompt = false;
  std::vector<std::size_t> tokens;                    // of each page
  std::vector<std::vector<bool>> visited;             // [page][query head of the group]
  std::vector<std::vector<float>> mass, largest;      // [page][query]
  std::vector<std::vector<std::vector<float>>> each;  // [page][query][token]
  std::vector<float> lse;                             // [query]
};

template <class Policy>
Told told_by(const HeadView<Policy>& head, const Evidence& step) {
  Told told{step.position(), step.is_prompt(), {}, {}, {}, {}, {}, {}};
  for (const PageIndex page : head.pages()) {
    told.tokens.push_back(head.tokens(page));
    told.visited.emplace_back();
    told.mass.emplace_back();
    told.largest.emplace_back();
    told.each.emplace_back();
    for (std::size_t q = 0; q < step.group(); ++q) {
      const bool visited = step.visited(page, q);
      told.visited.back().push_back(visited);
      told.mass.back().push_back(visited ? step.mass(page, q) : -1.0F);
      told.largest.back().push_back(visited ? step.largest_token_mass(page, q) : -1.0F);
      if (!asks_for(Policy::evidence, EvidenceKind::token_weights)) continue;
      const auto weights = step.token_weights(page, q).first(head.tokens(page));
      told.each.back().emplace_back(weights.begin(), weights.end());
    }
  }
  for (std::size_t q = 0; q < step.group(); ++q) told.lse.push_back(step.log_sum_exp(q));
  return told;
}

constexpr EvidenceKind of_pages = EvidenceKind::page_mass | EvidenceKind::largest_token_mass;
constexpr EvidenceKind every_kind = of_pages | EvidenceKind::token_weights;

/// Reads everything and writes down the evidence, by kv head.
template <EvidenceKind Kinds>
struct ProbeOf {
  static constexpr std::string_view name = "probe";
  static constexpr EvidenceKind evidence = Kinds;
  std::map<std::size_t, std::vector<Told>>* told = nullptr;
  void observe(HeadView<ProbeOf> head, const Evidence& step) const {
    if (told != nullptr) (*told)[head.kv_head()].push_back(told_by(head, step));
  }
};
using Probe = ProbeOf<every_kind>;

template <class Policy, class Key, class Value>
void append_all(PagedKvCache<Policy, Key, Value>& cache, const Rows& rows, std::size_t first, std::size_t last) {
  for (std::size_t t = first; t < last; ++t) ASSERT_TRUE(cache.append(rows.token_k(t), rows.token_v(t)).ok());
}

void expect_near(std::span<const float> out, const std::vector<double>& expected, double tolerance) {
  ASSERT_EQ(out.size(), expected.size());
  for (std::size_t i = 0; i < out.size(); ++i) ASSERT_NEAR(static_cast<double>(out[i]), expected[i], tolerance) << i;
}

std::span<const float> row_of(const std::vector<float>& data, std::size_t row, std::size_t size) {
  return std::span<const float>(data).subspan(row * size, size);
}

// ------------------------------------------------------------------------------------------------ the kernel's shapes

template <class Stored>
class AttendAs : public testing::Test {
 protected:
  /// The last query over `tokens` tokens: output, log-sum-exp, and all evidence.
  static void check(std::size_t query_heads, std::size_t kv_heads, std::size_t head_dim, std::size_t page_size,
                    std::size_t tokens) {
    SCOPED_TRACE("group " + std::to_string(query_heads / kv_heads) + ", head_dim " + std::to_string(head_dim) +
                 ", page size " + std::to_string(page_size) + ", tokens " + std::to_string(tokens));
    const CacheConfig config{.query_heads = query_heads,
                             .kv_heads = kv_heads,
                             .head_dim = head_dim,
                             .page_size = page_size,
                             .max_tokens = tokens};
    const Rows given(tokens, config, head_dim + tokens);
    const Rows rows = given.template stored_as<typename Stored::Key, typename Stored::Value>();
    std::map<std::size_t, std::vector<Told>> told;
    PagedKvCache<Probe, typename Stored::Key, typename Stored::Value> cache(config, Probe{&told});
    append_all(cache, given, 0, tokens);
    std::vector<float> out(query_heads * head_dim);
    std::vector<float> lse(query_heads);
    ASSERT_TRUE(attend(cache, rows.token_q(tokens - 1), out, lse).ok());
    const std::size_t group = query_heads / kv_heads;
    for (std::size_t head = 0; head < query_heads; ++head) {
      const ExactAttention exact = rows.exact(tokens - 1, head, first_positions(tokens));
      expect_near(row_of(out, head, head_dim), exact.out, 1e-5);
      ASSERT_NEAR(static_cast<double>(lse[head]), exact.log_sum_exp, 1e-5);
      const Told& evidence = told[head / group].front();
      const std::size_t q = head % group;
      ASSERT_EQ(evidence.lse[q], lse[head]);
      double whole = 0.0;
      for (std::size_t page = 0; page < evidence.mass.size(); ++page) {
        double mass = 0.0;
        double largest = 0.0;
        for (std::size_t slot = 0; slot < evidence.tokens[page]; ++slot) {
          const double weight = exact.weights[page * page_size + slot];
          mass += weight;
          largest = std::max(largest, weight);
          ASSERT_NEAR(static_cast<double>(evidence.each[page][q][slot]), weight, 1e-5 * weight + 1e-9);
        }
        ASSERT_NEAR(static_cast<double>(evidence.mass[page][q]), mass, 1e-5 * mass + 1e-9) << "page " << page;
        ASSERT_NEAR(static_cast<double>(evidence.largest[page][q]), largest, 1e-5 * largest + 1e-9);
        whole += static_cast<double>(evidence.mass[page][q]);
      }
      ASSERT_NEAR(whole, 1.0, 1e-5);
    }
  }
};

template <class KeyType, class ValueType = KeyType>
struct StoredTypes {
  using Key = KeyType;
  using Value = ValueType;
};
using KeysAndValues = testing::Types<StoredTypes<float>, StoredTypes<Half>, StoredTypes<Bfloat16>, StoredTypes<Int8>,
                                     StoredTypes<Half, Int8>, StoredTypes<Int8, Bfloat16>, StoredTypes<float, Half>>;
class StoredTypesName {
 public:
  template <class Stored>
  static std::string GetName(int) {
    return std::string(scalar_name<typename Stored::Key>) + "_" + std::string(scalar_name<typename Stored::Value>);
  }
};
TYPED_TEST_SUITE(AttendAs, KeysAndValues, StoredTypesName);

TYPED_TEST(AttendAs, AgreesWithTheExactOracleForEveryGroupAndHeadDim) {
  for (const std::size_t group : {1U, 2U, 3U, 4U, 5U, 7U, 8U}) {
    for (const std::size_t head_dim : {1U, 7U, 8U, 40U, 64U, 80U, 96U, 128U, 130U}) {
      const std::size_t kv_heads = group < 4 ? 2 : 1;
      TestFixture::check(group * kv_heads, kv_heads, head_dim, 16, 43);
      if (testing::Test::HasFatalFailure()) return;
    }
  }
}

TYPED_TEST(AttendAs, AgreesWithTheExactOracleForEveryPageSizeAndPartialPage) {
  for (const std::size_t page_size : {1U, 3U, 7U, 16U, 64U, 256U}) {
    // One token, a page less one, a page, a page and one, and two pages and a bit.
    for (const std::size_t tokens : {std::size_t{1}, page_size - 1, page_size, page_size + 1, 2 * page_size + 5}) {
      if (tokens == 0) continue;
      for (const std::size_t group : {1U, 3U, 4U}) {
        TestFixture::check(group, 1, 40, page_size, tokens);
        if (testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

template <class Scalar>
void expect_rows_in_the_storage_type_are_taken() {
  const CacheConfig config{.query_heads = 2, .kv_heads = 2, .head_dim = 24, .page_size = 4, .max_tokens = 10};
  const Rows rows(10, config, 3);
  PagedKvCache<Dense, Scalar> from_floats(config);
  PagedKvCache<Dense, Scalar> from_stored(config);
  std::vector<Scalar> k(48), v(48);
  for (std::size_t t = 0; t < 10; ++t) {
    for (std::size_t i = 0; i < 48; ++i) {
      k[i] = static_cast<Scalar>(rows.token_k(t)[i]);
      v[i] = static_cast<Scalar>(rows.token_v(t)[i]);
    }
    ASSERT_TRUE(from_floats.append(rows.token_k(t), rows.token_v(t)).ok());
    ASSERT_TRUE(
        from_stored.append(HeadRows<const Scalar>(k.data(), 2, 24), HeadRows<const Scalar>(v.data(), 2, 24)).ok());
  }
  std::vector<float> a(48), b(48);
  ASSERT_TRUE(attend(from_floats, rows.token_q(9), a).ok());
  ASSERT_TRUE(attend(from_stored, rows.token_q(9), b).ok());
  EXPECT_EQ(a, b);
}

TEST(Attend, TakesRowsInTheStorageType) {
  expect_rows_in_the_storage_type_are_taken<float>();
  expect_rows_in_the_storage_type_are_taken<Half>();
  expect_rows_in_the_storage_type_are_taken<Bfloat16>();
}

TEST(Attend, TheEvidenceAPolicyAsksForDoesNotChangeTheResult) {
  const CacheConfig config{.query_heads = 6, .kv_heads = 2, .head_dim = 40, .page_size = 7, .max_tokens = 50};
  const Rows rows(50, config, 4);
  PagedKvCache<Probe> probe(config);
  PagedKvCache<Dense> dense(config);
  append_all(probe, rows, 0, 50);
  append_all(dense, rows, 0, 50);
  std::vector<float> a(240), b(240);
  ASSERT_TRUE(attend(probe, rows.token_q(49), a).ok());
  ASSERT_TRUE(attend(dense, rows.token_q(49), b).ok());
  EXPECT_EQ(a, b);
}

TEST(Attend, TheSoftmaxScaleIsTheConfiguredOne) {
  CacheConfig config{.query_heads = 1, .kv_heads = 1, .head_dim = 8, .page_size = 4, .max_tokens = 9};
  config.softmax_scale = 0.05F;
  const Rows rows(9, config, 5);
  PagedKvCache<Dense> cache(config);
  append_all(cache, rows, 0, 9);
  std::vector<float> out(8);
  ASSERT_TRUE(attend(cache, rows.token_q(8), out).ok());
  const ExactAttention exact = exact_attention(
      rows.query(8, 0), 9, [&](std::size_t t) { return rows.key(t, 0); },
      [&](std::size_t t) { return rows.value(t, 0); }, static_cast<double>(0.05F));
  expect_near(out, exact.out, 1e-5);
}

TEST(Attend, StridedViewsReadAndWriteWhereTheySay) {
  const CacheConfig config{.query_heads = 4, .kv_heads = 2, .head_dim = 10, .page_size = 4, .max_tokens = 30};
  const Rows rows(12, config, 6);
  PagedKvCache<Dense> contiguous(config);
  PagedKvCache<Dense> strided(config);
  // One fused buffer a token, as a projection leaves it: [q heads | k heads | v heads], each row 13 long.
  constexpr std::size_t row = 13;
  constexpr std::size_t token = 8 * row + 3;
  std::vector<float> fused(12 * token, std::numeric_limits<float>::quiet_NaN());
  for (std::size_t t = 0; t < 12; ++t) {
    for (std::size_t h = 0; h < 4; ++h) {
      std::copy_n(rows.query(t, h).data(), 10, fused.data() + t * token + h * row);
    }
    for (std::size_t h = 0; h < 2; ++h) {
      std::copy_n(rows.key(t, h).data(), 10, fused.data() + t * token + (4 + h) * row);
      std::copy_n(rows.value(t, h).data(), 10, fused.data() + t * token + (6 + h) * row);
    }
  }
  const auto heads = [&](std::size_t t, std::size_t first, std::size_t count) {
    return HeadRows<const float>(fused.data() + t * token + first * row, count, 10, row);
  };
  const auto chunk = [&](std::size_t first, std::size_t count) {
    return TokenRows<const float>(fused.data() + first * row, 8, count, 10, token, row);
  };
  ASSERT_TRUE(strided.append_prompt(chunk(4, 2), chunk(6, 2)).ok());
  ASSERT_TRUE(
      contiguous.append_prompt(std::span<const float>(rows.k).first(8 * 20), std::span<const float>(rows.v).first(160))
          .ok());
  std::vector<float> out(40), lse(4), wide(4 * 17, -7.0F), strided_lse(4);
  for (std::size_t t = 8; t < 12; ++t) {
    ASSERT_TRUE(strided.append(heads(t, 4, 2), heads(t, 6, 2)).ok());
    ASSERT_TRUE(contiguous.append(rows.token_k(t), rows.token_v(t)).ok());
    ASSERT_TRUE(attend(contiguous, rows.token_q(t), out, lse).ok());
    ASSERT_TRUE(attend(strided, heads(t, 0, 4), HeadRows<float>(wide.data(), 4, 10, 17), strided_lse).ok());
    EXPECT_EQ(lse, strided_lse);
    for (std::size_t h = 0; h < 4; ++h) {
      for (std::size_t i = 0; i < 10; ++i) EXPECT_EQ(wide[h * 17 + i], out[h * 10 + i]);
      for (std::size_t i = 10; i < 17; ++i) EXPECT_EQ(wide[h * 17 + i], -7.0F) << "written beside the row";
    }
  }
  // attend_prompt over the strided prompt, into strided rows.
  std::vector<float> prompt_out(12 * 40), prompt_wide(12 * 100, -7.0F);
  ASSERT_TRUE(attend_prompt(contiguous, TokenRows<const float>(rows.q.data(), 12, 4, 10),
                            TokenRows<float>(prompt_out.data(), 12, 4, 10))
                  .ok());
  ASSERT_TRUE(attend_prompt(strided, TokenRows<const float>(fused.data(), 12, 4, 10, token, row),
                            TokenRows<float>(prompt_wide.data(), 12, 4, 10, 100, 17))
                  .ok());
  for (std::size_t t = 0; t < 12; ++t) {
    for (std::size_t h = 0; h < 4; ++h) {
      for (std::size_t i = 0; i < 10; ++i) {
        EXPECT_EQ(prompt_wide[t * 100 + h * 17 + i], prompt_out[(t * 4 + h) * 10 + i]);
      }
    }
  }
}

/// A prompt in chunks that start and end anywhere in a page; every query, and its evidence, against the exact oracle.
template <EvidenceKind Kinds, class Scalar>
void expect_causal_prompt(std::size_t group, std::size_t head_dim, std::size_t page_size) {
  SCOPED_TRACE("group " + std::to_string(group) + ", head_dim " + std::to_string(head_dim) + ", page size " +
               std::to_string(page_size));
  const CacheConfig config{
      .query_heads = 2 * group, .kv_heads = 2, .head_dim = head_dim, .page_size = page_size, .max_tokens = 150};
  const std::size_t row = 2 * group * head_dim;
  const Rows given(150, config, 7);
  const Rows rows = given.template stored_as<Scalar, Scalar>();
  std::map<std::size_t, std::vector<Told>> told;
  PagedKvCache<ProbeOf<Kinds>, Scalar> cache(config, ProbeOf<Kinds>{&told});
  std::vector<float> out(150 * row);
  std::size_t first = 0;
  for (const std::size_t count : {5U, 1U, 0U, 10U, 34U, 100U}) {
    const auto part = [&](const std::vector<float>& data, std::size_t heads) {
      return TokenRows<const float>(data.data() + first * heads * head_dim, count, heads, head_dim);
    };
    ASSERT_TRUE(cache.append_prompt(part(given.k, 2), part(given.v, 2)).ok());
    const TokenRows<float> of_chunk(out.data() + first * row, count, 2 * group, head_dim);
    ASSERT_TRUE(attend_prompt(cache, part(rows.q, 2 * group), of_chunk).ok());
    first += count;
  }
  for (std::size_t t = 0; t < 150; ++t) {
    for (std::size_t head = 0; head < 2 * group; ++head) {
      ASSERT_EQ(told[head / group].size(), 150U);
      const Told& evidence = told[head / group][t];
      ASSERT_EQ(evidence.position, (Position{static_cast<std::int64_t>(t)}));
      ASSERT_TRUE(evidence.is_prompt);
      ASSERT_EQ(evidence.mass.size(), t / page_size + 1) << "pages of later tokens are not there yet";
      ASSERT_EQ(evidence.tokens.back(), t % page_size + 1);
      const ExactAttention exact = rows.exact(t, head, first_positions(t + 1));
      expect_near(row_of(out, t * 2 * group + head, head_dim), exact.out, 1e-5);
      ASSERT_NEAR(static_cast<double>(evidence.lse[head % group]), exact.log_sum_exp, 1e-5);
      for (std::size_t page = 0; page < evidence.mass.size(); ++page) {
        const auto begin = exact.weights.begin() + static_cast<std::ptrdiff_t>(page * page_size);
        const auto end = begin + static_cast<std::ptrdiff_t>(evidence.tokens[page]);
        const double mass = std::accumulate(begin, end, 0.0);
        const double largest = *std::max_element(begin, end);
        ASSERT_NEAR(static_cast<double>(evidence.mass[page][head % group]), mass, 1e-5 * mass + 1e-9) << page;
        ASSERT_NEAR(static_cast<double>(evidence.largest[page][head % group]), largest, 1e-5 * largest + 1e-9);
      }
    }
  }
}

TEST(AttendPrompt, EveryQueryOfTheChunkSeesTheTokensUpToItsOwn) {
  for (const std::size_t group : {1U, 2U, 3U, 4U, 5U, 8U, 9U, 16U}) {
    for (const std::size_t page_size : {1U, 4U, 7U, 64U}) {
      expect_causal_prompt<of_pages, float>(group, 24, page_size);
      if (testing::Test::HasFatalFailure()) return;
    }
  }
  // Rows so long that a tile holds fewer of them, or none.
  for (const std::size_t head_dim : {128U, 130U, 512U, 1030U, 2100U}) {
    expect_causal_prompt<of_pages, float>(1, head_dim, 16);
    expect_causal_prompt<of_pages, Half>(2, head_dim, 16);
    if (testing::Test::HasFatalFailure()) return;
  }
  expect_causal_prompt<of_pages, Int8>(4, 40, 16);
  expect_causal_prompt<every_kind, float>(3, 24, 4);
}

TEST(AttendPrompt, ATokenThatWasEvictedMeanwhileIsGoneForEarlyQueriesToo) {
  const CacheConfig config{
      .query_heads = 4, .kv_heads = 2, .head_dim = 24, .page_size = 4, .budget_tokens = 16, .max_tokens = 40};
  const Rows rows(40, config, 11);
  for (const std::size_t sinks : {0U, 4U}) {
    PagedKvCache<StreamingLlm> cache(config, StreamingLlm{{.sinks = sinks}});
    ASSERT_TRUE(cache.append_prompt(rows.k, rows.v).ok());
    std::vector<float> out(40 * 96, -7.0F);
    ASSERT_TRUE(
        attend_prompt(cache, TokenRows<const float>(rows.q.data(), 40, 4, 24), TokenRows<float>(out.data(), 40, 4, 24))
            .ok());
    for (std::size_t t = 0; t < 40; ++t) {
      for (std::size_t head = 0; head < 4; ++head) {
        std::vector<std::size_t> seen;
        for (const Position position : cache.resident_positions(head / 2)) {
          if (position.value <= static_cast<std::int64_t>(t)) seen.push_back(static_cast<std::size_t>(position.value));
        }
        const std::vector<double> expected =
            seen.empty() ? std::vector<double>(24, 0.0) : rows.exact(t, head, seen).out;
        expect_near(row_of(out, t * 4 + head, 24), expected, 1e-5);
      }
    }
  }
}

TEST(AttendPrompt, AQueryAfterThePromptIsNoPromptQuery) {
  const CacheConfig config{.query_heads = 1, .kv_heads = 1, .head_dim = 8, .page_size = 4, .max_tokens = 30};
  const Rows rows(3, config, 8);
  std::map<std::size_t, std::vector<Told>> told;
  PagedKvCache<Probe> cache(config, Probe{&told});
  std::vector<float> out(8);
  ASSERT_TRUE(cache.append_prompt(rows.token_k(0), rows.token_v(0)).ok());
  ASSERT_TRUE(attend(cache, rows.token_q(0), out).ok());
  ASSERT_TRUE(cache.append(rows.token_k(1), rows.token_v(1)).ok());
  ASSERT_TRUE(attend(cache, rows.token_q(1), out).ok());
  EXPECT_TRUE(told[0][0].is_prompt);
  EXPECT_FALSE(told[0][1].is_prompt);
}

// --------------------------------------------------------------------------------------------- what a selection may
// say

/// Reads, of every page, the tokens whose position is no multiple of three.
struct TwoOfThree {
  static constexpr std::string_view name = "two_of_three";
  static constexpr PolicyGranularity granularity = PolicyGranularity::token;
  static constexpr EvidenceKind evidence = every_kind;
  std::map<std::size_t, std::vector<Told>>* told = nullptr;
  void select(HeadView<TwoOfThree> head, QueryGroup, Selection& selection) const {
    for (const PageIndex page : head.pages()) {
      const auto mask = selection.token_mask(page);
      for (std::uint32_t slot = 0; slot < head.tokens(page); ++slot) {
        if ((head.first_position(page) + slot).value % 3 != 0) mask[slot / 64] |= std::uint64_t{1} << (slot % 64);
      }
      selection.add({page, mask, 0.0F, 0.0F, 0});
    }
  }
  void observe(HeadView<TwoOfThree> head, const Evidence& step) const {
    (*told)[head.kv_head()].push_back(told_by(head, step));
  }
};

TEST(TokenMasks, OnlyTheTokensOfTheMaskAreRead) {
  // Page size 1: some pages are masked whole. Page size 70: masks of two words.
  for (const std::size_t page_size : {1U, 4U, 16U, 70U}) {
    for (const std::size_t group : {1U, 3U, 6U}) {
      SCOPED_TRACE("page size " + std::to_string(page_size) + ", group " + std::to_string(group));
      const std::size_t tokens = 2 * page_size + 20;
      const CacheConfig config{.query_heads = group,
                               .kv_heads = 1,
                               .head_dim = 24,
                               .page_size = page_size,
                               .read_budget_tokens = page_size,
                               .max_tokens = tokens};
      const Rows rows(tokens, config, page_size);
      std::map<std::size_t, std::vector<Told>> told;
      PagedKvCache<TwoOfThree> cache(config, TwoOfThree{&told});
      append_all(cache, rows, 0, tokens);
      std::vector<float> out(group * 24), lse(group);
      ASSERT_TRUE(attend(cache, rows.token_q(tokens - 1), out, lse).ok());
      std::vector<std::size_t> read;
      for (std::size_t t = 0; t < tokens; ++t) {
        if (t % 3 != 0) read.push_back(t);
      }
      for (std::size_t head = 0; head < group; ++head) {
        const ExactAttention exact = rows.exact(tokens - 1, head, read);
        expect_near(row_of(out, head, 24), exact.out, 1e-5);
        EXPECT_NEAR(static_cast<double>(lse[head]), exact.log_sum_exp, 1e-5);
        const Told& evidence = told[0].front();
        for (std::size_t i = 0; i < read.size(); ++i) {
          const std::size_t page = read[i] / page_size;
          EXPECT_NEAR(static_cast<double>(evidence.each[page][head][read[i] % page_size]), exact.weights[i], 1e-5);
        }
        for (std::size_t t = 0; t < tokens; t += 3) {
          EXPECT_EQ(evidence.each[t / page_size][head][t % page_size], 0.0F) << "a masked token has no weight";
        }
        double whole = 0.0;
        for (const auto& mass : evidence.mass) whole += static_cast<double>(mass[head]);
        EXPECT_NEAR(whole, 1.0, 1e-5);
      }
      std::vector<std::size_t> reported;
      for (const Position position : cache.read_positions(0)) {
        reported.push_back(static_cast<std::size_t>(position.value));
      }
      EXPECT_EQ(reported, read);
      EXPECT_EQ(cache.stats().last_read_tokens, read.size());
      EXPECT_EQ(cache.stats().last_skipped_tokens, tokens - read.size());
    }
  }
}

/// Selects pages but masks every token of them, or selects nothing at all.
struct Blind {
  static constexpr std::string_view name = "blind";
  static constexpr PolicyGranularity granularity = PolicyGranularity::token;
  bool masks = false;
  void select(HeadView<Blind> head, QueryGroup, Selection& selection) const {
    if (!masks) return;
    for (const PageIndex page : head.pages()) selection.add({page, selection.token_mask(page), 0.0F, 0.0F, 0});
  }
};

TEST(TokenMasks, ReadingNothingGivesZerosAndMinusInfinity) {
  for (const bool masks : {false, true}) {
    const CacheConfig config{
        .query_heads = 3, .kv_heads = 1, .head_dim = 8, .page_size = 4, .read_budget_tokens = 4, .max_tokens = 10};
    const Rows rows(10, config, 1);
    PagedKvCache<Blind> cache(config, Blind{masks});
    append_all(cache, rows, 0, 10);
    std::vector<float> out(24, 7.0F), lse(3);
    ASSERT_TRUE(attend(cache, rows.token_q(9), out, lse).ok());
    EXPECT_EQ(out, std::vector<float>(24, 0.0F));
    EXPECT_EQ(lse, std::vector<float>(3, -std::numeric_limits<float>::infinity()));
    EXPECT_TRUE(cache.read_positions(0).empty());
  }
}

float denominator_weight(std::size_t page) { return static_cast<float>(page) + 0.5F; }
float numerator_weight(std::size_t page) { return page % 2 == 0 ? denominator_weight(page) : 3.0F; }

/// Every page's tokens stand for several tokens, differently in the denominator and in the numerator.
struct Weighted {
  static constexpr std::string_view name = "weighted";
  void select(HeadView<Weighted> head, QueryGroup, Selection& selection) const {
    for (const PageIndex page : head.pages()) {
      selection.add({page, {}, std::log(denominator_weight(page.value)), std::log(numerator_weight(page.value)), 0});
    }
  }
};

TEST(LogWeights, CountInTheNumeratorAndInTheDenominator) {
  for (const std::size_t group : {1U, 2U, 7U}) {
    const CacheConfig config{
        .query_heads = group, .kv_heads = 1, .head_dim = 24, .page_size = 4, .read_budget_tokens = 4, .max_tokens = 18};
    const Rows rows(18, config, group);
    PagedKvCache<Weighted> cache(config);
    append_all(cache, rows, 0, 18);
    std::vector<float> out(group * 24), lse(group);
    ASSERT_TRUE(attend(cache, rows.token_q(17), out, lse).ok());
    for (std::size_t head = 0; head < group; ++head) {
      const ExactAttention exact = rows.exact(17, head, first_positions(18));
      double denominator = 0.0;
      std::vector<double> numerator(24, 0.0);
      for (std::size_t t = 0; t < 18; ++t) {
        denominator += exact.weights[t] * static_cast<double>(denominator_weight(t / 4));
        for (std::size_t i = 0; i < 24; ++i) {
          numerator[i] += exact.weights[t] * static_cast<double>(numerator_weight(t / 4) * rows.value(t, 0)[i]);
        }
      }
      for (double& element : numerator) element /= denominator;
      expect_near(row_of(out, head, 24), numerator, 1e-5);
      EXPECT_NEAR(static_cast<double>(lse[head]), exact.log_sum_exp + std::log(denominator), 1e-5);
    }
  }
}

std::int64_t rotation_of(std::size_t page) { return page < 2 ? 100 : page == 3 ? -7 : 0; }

struct Rotated {
  static constexpr std::string_view name = "rotated";
  // The rotated pages first, the others in a second selection: its query must be the plain one again.
  void select(HeadView<Rotated> head, QueryGroup, Selection& selection) const {
    for (const PageIndex page : head.pages()) {
      if (rotation_of(page.value) != 0) selection.add({page, {}, 0.0F, 0.0F, rotation_of(page.value)});
    }
  }
  void select_more(HeadView<Rotated>, QueryGroup, std::span<const SoftmaxState>, Selection& selection) const {
    selection.add_all();
  }
};

TEST(RotateBack, PagesMeetTheQueryRotatedBackByTheirPositions) {
  for (const std::size_t group : {1U, 3U}) {
    CacheConfig config{.query_heads = 2 * group,
                       .kv_heads = 2,
                       .head_dim = 10,
                       .page_size = 4,
                       .read_budget_tokens = 4,
                       .max_tokens = 22};
    config.rope.theta = 10000.0;
    const Rows rows(22, config, group);
    PagedKvCache<Rotated> cache(config);
    append_all(cache, rows, 0, 22);
    std::vector<float> out(2 * group * 10), lse(2 * group);
    for (int repeat = 0; repeat < 2; ++repeat) {  // nothing of the rotation may stay behind
      ASSERT_TRUE(attend(cache, rows.token_q(21), out, lse).ok());
      for (std::size_t head = 0; head < 2 * group; ++head) {
        // Instead of the query at angle p - n, rotate the keys of the page forward by n: the same dot products.
        const auto turned_key = [&](std::size_t t) {
          const auto key = rows.key(t, head / group);
          std::vector<float> turned(10);
          for (std::size_t i = 0; i < 5; ++i) {
            const double angle = static_cast<double>(rotation_of(t / 4)) * std::pow(10000.0, -2.0 * double(i) / 10.0);
            const double a = static_cast<double>(key[i]);
            const double b = static_cast<double>(key[i + 5]);
            turned[i] = static_cast<float>(a * std::cos(angle) - b * std::sin(angle));
            turned[i + 5] = static_cast<float>(b * std::cos(angle) + a * std::sin(angle));
          }
          return turned;
        };
        const ExactAttention exact = exact_attention(
            rows.query(21, head), 22, turned_key, [&](std::size_t t) { return rows.value(t, head / group); },
            rows.scale());
        expect_near(row_of(out, head, 10), exact.out, 2e-5);
        EXPECT_NEAR(static_cast<double>(lse[head]), exact.log_sum_exp, 2e-5);
      }
    }
  }
}

/// Each query head reads another page and the open one.
struct OnePageEach {
  static constexpr std::string_view name = "one_page_each";
  static constexpr SelectionScope selection = SelectionScope::query_head;
  static constexpr EvidenceKind evidence = every_kind;
  std::map<std::size_t, std::vector<Told>>* told = nullptr;
  void select(HeadView<OnePageEach> head, QueryGroup queries, Selection& reads) const {
    ASSERT_EQ(queries.size, 1U);
    reads.add(head.open_page());
    // The first element of each query names its page.
    reads.add(PageIndex{static_cast<std::uint32_t>(queries[0][0])});
  }
  void observe(HeadView<OnePageEach> head, const Evidence& step) const {
    (*told)[head.kv_head()].push_back(told_by(head, step));
  }
};

TEST(QueryHeadSelection, EachQueryHeadReadsItsOwnPagesAndTheEvidenceSaysWhich) {
  const CacheConfig config{
      .query_heads = 6, .kv_heads = 2, .head_dim = 8, .page_size = 4, .read_budget_tokens = 8, .max_tokens = 22};
  Rows rows(22, config, 2);
  const std::size_t chosen[] = {3, 0, 1, 4, 4, 2};
  for (std::size_t head = 0; head < 6; ++head) rows.q[(21 * 6 + head) * 8] = static_cast<float>(chosen[head]);
  std::map<std::size_t, std::vector<Told>> told;
  PagedKvCache<OnePageEach> cache(config, OnePageEach{&told});
  append_all(cache, rows, 0, 22);
  std::vector<float> out(48), lse(6);
  ASSERT_TRUE(attend(cache, rows.token_q(21), out, lse).ok());
  for (std::size_t head = 0; head < 6; ++head) {
    std::vector<std::size_t> read;
    for (std::size_t t = 4 * chosen[head]; t < 4 * chosen[head] + 4; ++t) read.push_back(t);
    read.push_back(20);
    read.push_back(21);
    const ExactAttention exact = rows.exact(21, head, read);
    expect_near(row_of(out, head, 8), exact.out, 1e-5);
    const Told& evidence = told[head / 3].front();
    for (std::size_t page = 0; page < 6; ++page) {
      EXPECT_EQ(evidence.visited[page][head % 3], page == chosen[head] || page == 5) << head << ' ' << page;
    }
    EXPECT_NEAR(static_cast<double>(evidence.mass[5][head % 3]), exact.weights[4] + exact.weights[5], 1e-5);
    EXPECT_EQ(evidence.lse[head % 3], lse[head]);
  }
  EXPECT_EQ(cache.read_positions(0).size(), 3U * 4U + 2U);
  EXPECT_EQ(cache.read_positions(1).size(), 2U * 4U + 2U);
  EXPECT_EQ(cache.stats().last_skipped_tokens, 2U * 22U - 14U - 10U);
}

/// Starts with the open page and goes on, newest first, until `pages` pages are read or the softmax has what it wants.
struct OneMore {
  static constexpr std::string_view name = "one_more";
  static constexpr EvidenceKind evidence = every_kind;
  std::size_t pages = 0;
  std::vector<float>* sums = nullptr;  // the first state's log-sum-exp at each call
  std::map<std::size_t, std::vector<Told>>* told = nullptr;
  void select(HeadView<OneMore> head, QueryGroup, Selection& selection) const { selection.add(head.open_page()); }
  void select_more(HeadView<OneMore> head, QueryGroup queries, std::span<const SoftmaxState> states,
                   Selection& selection) const {
    ASSERT_EQ(states.size(), queries.size);
    sums->push_back(states[0].log_sum_exp());
    const std::size_t read = selection.pages().size();
    if (read < pages) selection.add(PageIndex{static_cast<std::uint32_t>(head.size() - 1 - read)});
  }
  void observe(HeadView<OneMore> head, const Evidence& step) const {
    (*told)[head.kv_head()].push_back(told_by(head, step));
  }
};

TEST(SelectMore, GoesOnUntilItAddsNothing) {
  const CacheConfig config{
      .query_heads = 3, .kv_heads = 1, .head_dim = 24, .page_size = 4, .read_budget_tokens = 4, .max_tokens = 26};
  const Rows rows(26, config, 3);
  std::vector<float> sums;
  std::map<std::size_t, std::vector<Told>> told;
  PagedKvCache<OneMore> cache(config, OneMore{3, &sums, &told});
  append_all(cache, rows, 0, 26);
  std::vector<float> out(72), lse(3);
  ASSERT_TRUE(attend(cache, rows.token_q(25), out, lse).ok());
  std::vector<std::size_t> read;
  for (std::size_t t = 16; t < 26; ++t) read.push_back(t);
  for (std::size_t head = 0; head < 3; ++head) {
    const ExactAttention exact = rows.exact(25, head, read);
    expect_near(row_of(out, head, 24), exact.out, 1e-5);
    const Told& evidence = told[0].front();
    double whole = 0.0;
    for (std::size_t page = 0; page < 7; ++page) {
      EXPECT_EQ(evidence.visited[page][head], page >= 4);
      if (page < 4) continue;
      double mass = 0.0;
      for (std::size_t slot = 0; slot < evidence.tokens[page]; ++slot) mass += exact.weights[(page - 4) * 4 + slot];
      EXPECT_NEAR(static_cast<double>(evidence.mass[page][head]), mass, 1e-5) << "page " << page;
      whole += static_cast<double>(evidence.mass[page][head]);
    }
    EXPECT_NEAR(whole, 1.0, 1e-5);
  }
  ASSERT_EQ(sums.size(), 3U) << "two calls that added a page, one that did not";
  const ExactAttention open_only = rows.exact(25, 0, {24, 25});
  EXPECT_NEAR(static_cast<double>(sums[0]), open_only.log_sum_exp, 1e-5);
  EXPECT_EQ(sums[2], lse[0]);
}

/// A window that forgets nothing: rows of evicted pages are kept and merged again. What SubGen and sketches
/// approximate.
struct Remembering {
  static constexpr std::string_view name = "remembering";
  static constexpr EvidenceKind evidence = every_kind;
  struct HeadState {
    std::size_t count = 0;
    float keys[64][8];
    float values[64][8];
  };
  std::map<std::size_t, std::vector<Told>>* told = nullptr;
  PageIndex victim(HeadView<Remembering> head) const {
    return head.lowest_evictable([&](PageIndex page) { return head.first_position(page); });
  }
  void on_evict(HeadView<Remembering> head, PageIndex page) const {
    HeadState& state = head.head_state();
    for (std::uint32_t slot = 0; slot < head.tokens(page); ++slot) {
      head.load_key(page, Slot{slot}, state.keys[state.count]);
      head.load_value(page, Slot{slot}, state.values[state.count]);
      ++state.count;
    }
  }
  void residual(HeadView<Remembering> head, QueryGroup queries, std::span<SoftmaxState> states) const {
    HeadState& state = head.head_state();
    for (std::size_t q = 0; q < states.size(); ++q) {
      for (std::size_t i = 0; i < state.count; ++i) {
        float logit = 0.0F;
        for (std::size_t d = 0; d < 8; ++d) logit += queries[q][d] * state.keys[i][d];
        merge(states[q], SoftmaxState{state.values[i], logit * queries.scale, 1.0F}, 8);
      }
    }
  }
  void observe(HeadView<Remembering> head, const Evidence& step) const {
    (*told)[head.kv_head()].push_back(told_by(head, step));
  }
};

TEST(Residual, MergedSummariesOfEvictedTokensCompleteTheSoftmax) {
  const CacheConfig config{.query_heads = 6, .kv_heads = 2, .head_dim = 8, .page_size = 4, .budget_tokens = 12};
  const Rows rows(50, config, 4);
  std::map<std::size_t, std::vector<Told>> told;
  PagedKvCache<Remembering> cache(config, Remembering{&told});
  append_all(cache, rows, 0, 50);
  ASSERT_LE(cache.resident_tokens(0), 12U);
  std::vector<float> out(48), lse(6);
  ASSERT_TRUE(attend(cache, rows.token_q(49), out, lse).ok());
  for (std::size_t head = 0; head < 6; ++head) {
    const ExactAttention exact = rows.exact(49, head, first_positions(50));
    expect_near(row_of(out, head, 8), exact.out, 1e-5);
    EXPECT_NEAR(static_cast<double>(lse[head]), exact.log_sum_exp, 1e-5);
    // The resident pages' masses are shares of the whole, residual included.
    const Told& evidence = told[head / 3].front();
    double resident = 0.0;
    double expected = 0.0;
    for (const auto& mass : evidence.mass) resident += static_cast<double>(mass[head % 3]);
    for (std::size_t t = 40; t < 50; ++t) expected += exact.weights[t];
    EXPECT_NEAR(resident, expected, 1e-5);
  }
}

// --------------------------------------------------------------------------------------------------- the kernel by
// itself

TEST(AttendPages, RunsOverAnEnginesOwnMemoryWithItsOwnStrides) {
  constexpr std::size_t dim = 20;        // padded to 24
  constexpr std::size_t key_row = 32;    // an engine's rows may lie wider than ours
  constexpr std::size_t value_row = 24;  // and differently for values
  constexpr std::size_t page_tokens = 5;
  TestRng rng(9);
  std::vector<float> keys(4 * page_tokens * key_row, 0.0F), values(4 * page_tokens * value_row, 0.0F);
  for (std::size_t row = 0; row < 4 * page_tokens; ++row) {
    for (std::size_t i = 0; i < dim; ++i) {
      keys[row * key_row + i] = static_cast<float>(rng.gaussian());
      values[row * value_row + i] = static_cast<float>(rng.gaussian());
    }
  }
  PagedKv<float, float> kv{
      keys.data(), values.data(), page_tokens * key_row, page_tokens * value_row, key_row, value_row, dim};
  const PageRead reads[] = {{PageId{3}, PageIndex{0}, 5}, {PageId{0}, PageIndex{1}, 5}, {PageId{2}, PageIndex{2}, 2}};
  const std::size_t rows[] = {15, 16, 17, 18, 19, 0, 1, 2, 3, 4, 10, 11};
  constexpr std::size_t padded = 32;
  std::vector<float> queries(5 * padded, 0.0F), accumulators(5 * padded, 0.0F);
  std::vector<SoftmaxState> states(5);
  for (std::size_t q = 0; q < 5; ++q) {
    for (std::size_t i = 0; i < dim; ++i) queries[q * padded + i] = static_cast<float>(0.5 * rng.gaussian());
    states[q].accumulator = accumulators.data() + q * padded;
  }
  // In two calls: states that were started are continued.
  attend_pages(kv, std::span<const PageRead>(reads).first(1), queries.data(), padded, states);
  attend_pages(kv, std::span<const PageRead>(reads).subspan(1), queries.data(), padded, states);
  for (std::size_t q = 0; q < 5; ++q) {
    const ExactAttention exact = exact_attention(
        std::span<const float>(queries).subspan(q * padded, dim), 12,
        [&](std::size_t t) { return keys.data() + rows[t] * key_row; },
        [&](std::size_t t) { return values.data() + rows[t] * value_row; }, 1.0);
    std::vector<float> out(dim);
    normalise(states[q], out.data(), dim);
    expect_near(out, exact.out, 1e-5);
    EXPECT_NEAR(static_cast<double>(states[q].log_sum_exp()), exact.log_sum_exp, 1e-5);
  }
}

TEST(AttendPages, AStateSplitOverTwoCachesMergesIntoTheWhole) {
  const CacheConfig config{.query_heads = 1, .kv_heads = 1, .head_dim = 16, .page_size = 4, .max_tokens = 40};
  const Rows rows(30, config, 10);
  PagedKvCache<Dense> first(config), second(config);
  append_all(first, rows, 0, 13);
  append_all(second, rows, 13, 30);
  std::vector<float> out_a(16), out_b(16), lse_a(1), lse_b(1);
  ASSERT_TRUE(attend(first, rows.token_q(29), out_a, lse_a).ok());
  ASSERT_TRUE(attend(second, rows.token_q(29), out_b, lse_b).ok());
  SoftmaxState a{out_a.data(), lse_a[0], 1.0F};  // an output and its log-sum-exp are a state of sum 1
  merge(a, SoftmaxState{out_b.data(), lse_b[0], 1.0F}, 16);
  std::vector<float> out(16);
  normalise(a, out.data(), 16);
  const ExactAttention exact = rows.exact(29, 0, first_positions(30));
  expect_near(out, exact.out, 1e-5);
  EXPECT_NEAR(static_cast<double>(a.log_sum_exp()), exact.log_sum_exp, 1e-5);
}

TEST(ExactAttentionOracle, OfNoTokensIsZeroWithMinusInfinity) {
  const std::vector<float> q(4, 1.0F);
  const auto none = [](std::size_t) { return std::span<const float>(); };
  const ExactAttention exact = exact_attention(std::span<const float>(q), 0, none, none, 1.0);
  EXPECT_EQ(exact.out, std::vector<double>(4, 0.0));
  EXPECT_EQ(exact.log_sum_exp, -std::numeric_limits<double>::infinity());
}

TEST(ExactAttentionOracle, OfLogitsThatAreNoNumbersIsNone) {
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> q(1, 1.0F), value(1, 1.0F);
  for (const std::vector<float>& keys : {std::vector{nan}, std::vector{nan, nan}, std::vector{nan, -infinity},
                                         std::vector{-infinity, nan}, std::vector{1.0F, nan}, std::vector{infinity}}) {
    const ExactAttention exact = exact_attention(
        std::span<const float>(q), keys.size(), [&](std::size_t t) { return std::span<const float>(&keys[t], 1); },
        [&](std::size_t) { return std::span<const float>(value); }, 1.0);
    EXPECT_TRUE(std::isnan(exact.out[0])) << keys.size() << " keys, the first " << keys[0];
    EXPECT_TRUE(std::isnan(exact.log_sum_exp));
  }
}

}  // namespace
}  // namespace kvsparse_test
