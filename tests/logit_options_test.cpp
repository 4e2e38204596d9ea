// SPDX-License-Identifier: Apache-2.0
//
// Soft cap, sliding window, ALiBi and sink logits, alone and together, against attention in double precision: query by
// query, a prompt's chunk in tiles, and on threads.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "kvsparse/cache/attend.hpp"
#include "kvsparse/policy/compose.hpp"
#include "kvsparse/policy/dense.hpp"
#include "kvsparse/policy/h2o.hpp"
#include "kvsparse/policy/oracle.hpp"
#include "kvsparse/policy/quest.hpp"
#include "kvsparse/policy/raas.hpp"
#include "kvsparse/policy/streaming_llm.hpp"
#include "support/rows.hpp"

namespace kvsparse_test {
namespace {

using namespace kvsparse;

/// A page's share of the softmax of each query head, or -1 if it was not read: [query][kv head][page][query head].
using Masses = std::vector<std::vector<std::vector<std::vector<float>>>>;

/// Reads everything and writes the page masses down.
struct Witness {
  static constexpr std::string_view name = "witness";
  static constexpr EvidenceKind evidence = EvidenceKind::page_mass;
  Masses* masses = nullptr;
  void observe(HeadView<Witness> head, const Evidence& step) const {
    auto& of_query = masses->at(static_cast<std::size_t>(step.position().value)).at(head.kv_head());
    for (const PageIndex page : head.pages()) {
      of_query.emplace_back();
      for (std::size_t q = 0; q < step.group(); ++q) {
        of_query.back().push_back(step.visited(page, q) ? step.mass(page, q) : -1.0F);
      }
    }
  }
};

enum Option : unsigned { soft_cap = 1, window = 2, alibi = 4, sinks = 8 };

LogitOptions some_options(unsigned which, std::size_t query_heads, std::size_t tokens) {
  LogitOptions logits;
  if ((which & soft_cap) != 0) logits.soft_cap = 1.25F;
  if ((which & window) != 0) logits.window = tokens / 2 + 1;
  for (std::size_t head = 0; head < query_heads; ++head) {
    const auto h = static_cast<float>(head);
    if ((which & alibi) != 0) logits.alibi_slopes.push_back(0.3F / (1.0F + h));
    if ((which & sinks) != 0) {
      logits.sink_logits.push_back(head % 3 == 2 ? -std::numeric_limits<float>::infinity() : 1.5F - h);
    }
  }
  return logits;
}

/// Query head `head` of token t over the tokens up to t.
ExactAttention exact_of(const Rows& rows, const CacheConfig& config, std::size_t t, std::size_t head) {
  const LogitOptions& options = config.logits;
  ExactLogits logits;
  logits.scale = rows.scale();
  logits.soft_cap = static_cast<double>(options.soft_cap);
  logits.window = static_cast<std::int64_t>(options.window);
  if (!options.alibi_slopes.empty()) logits.alibi_slope = static_cast<double>(options.alibi_slopes[head]);
  if (!options.sink_logits.empty()) logits.sink = static_cast<double>(options.sink_logits[head]);
  logits.query_position = static_cast<std::int64_t>(t);
  const std::size_t kv_head = head / (rows.query_heads / rows.kv_heads);
  return exact_attention(
      rows.query(t, head), t + 1, [&](std::size_t i) { return rows.key(i, kv_head); },
      [&](std::size_t i) { return rows.value(i, kv_head); }, [](std::size_t i) { return i; }, logits, rows.head_dim);
}

void expect_masses(const CacheConfig& config, std::size_t t, std::size_t head, const ExactAttention& exact,
                   const Masses& masses) {
  const std::size_t group = config.query_heads / config.kv_heads;
  const auto& pages = masses[t][head / group];
  ASSERT_EQ(pages.size(), t / config.page_size + 1);
  for (std::size_t page = 0; page < pages.size(); ++page) {
    double mass = 0.0;
    const std::size_t end = std::min(t + 1, (page + 1) * config.page_size);
    for (std::size_t i = page * config.page_size; i < end; ++i) mass += exact.weights[i];
    const bool is_outside = config.logits.window != 0 && end + config.logits.window <= t + 1;
    const double expected = is_outside ? -1.0 : mass;
    ASSERT_NEAR(static_cast<double>(pages[page][head % group]), expected, 2e-5) << "page " << page;
  }
}

template <class Stored>
class LogitOptionsAs : public testing::Test {
 protected:
  /// Every query of `tokens` tokens: the first two thirds in one chunk of a prompt, the others one by one.
  static void check(unsigned which, std::size_t group, std::size_t kv_heads, std::size_t head_dim,
                    std::size_t page_size, std::size_t tokens) {
    SCOPED_TRACE("options " + std::to_string(which) + ", group " + std::to_string(group) + ", head_dim " +
                 std::to_string(head_dim) + ", page size " + std::to_string(page_size) + ", tokens " +
                 std::to_string(tokens));
    const std::size_t query_heads = group * kv_heads;
    CacheConfig config{.query_heads = query_heads,
                       .kv_heads = kv_heads,
                       .head_dim = head_dim,
                       .page_size = page_size,
                       .max_tokens = tokens};
    config.logits = some_options(which, query_heads, tokens);
    const Rows given(tokens, config, 7 * tokens + which);
    const Rows rows = given.template stored_as<typename Stored::Key, typename Stored::Value>();
    Masses masses(tokens, std::vector<std::vector<std::vector<float>>>(kv_heads));
    PagedKvCache<Witness, typename Stored::Key, typename Stored::Value> cache(config, Witness{&masses});

    const std::size_t prompt = 2 * tokens / 3;
    const std::size_t q_row = query_heads * head_dim;
    const std::size_t kv_row = kv_heads * head_dim;
    std::vector<float> out(tokens * q_row), lse(tokens * query_heads, 0.0F);
    ASSERT_TRUE(cache
                    .append_prompt(std::span<const float>(given.k).first(prompt * kv_row),
                                   std::span<const float>(given.v).first(prompt * kv_row))
                    .ok());
    ASSERT_TRUE(attend_prompt(cache, TokenRows<const float>(rows.q.data(), prompt, query_heads, head_dim),
                              TokenRows<float>(out.data(), prompt, query_heads, head_dim))
                    .ok());
    for (std::size_t t = prompt; t < tokens; ++t) {
      ASSERT_TRUE(cache.append(given.token_k(t), given.token_v(t)).ok());
      ASSERT_TRUE(attend(cache, rows.token_q(t), std::span(out).subspan(t * q_row, q_row),
                         std::span(lse).subspan(t * query_heads, query_heads))
                      .ok());
    }
    for (std::size_t t = 0; t < tokens; ++t) {
      SCOPED_TRACE("token " + std::to_string(t));
      for (std::size_t head = 0; head < query_heads; ++head) {
        const ExactAttention exact = exact_of(rows, config, t, head);
        for (std::size_t i = 0; i < head_dim; ++i) {
          ASSERT_NEAR(static_cast<double>(out[t * q_row + head * head_dim + i]), exact.out[i], 2e-5) << i;
        }
        if (t >= prompt) {
          ASSERT_NEAR(static_cast<double>(lse[t * query_heads + head]), exact.log_sum_exp, 2e-5);
        }
        expect_masses(config, t, head, exact, masses);
        if (testing::Test::HasFatalFailure()) return;
      }
    }

    const std::size_t seen = config.logits.window == 0 ? tokens : std::min(tokens, config.logits.window);
    EXPECT_EQ(cache.stats().last_read_tokens, seen * kv_heads);
    EXPECT_EQ(cache.stats().last_skipped_tokens, (tokens - seen) * kv_heads);
    const std::vector<Position> read = cache.read_positions(0);
    ASSERT_EQ(read.size(), seen);
    EXPECT_EQ(read.front().value, static_cast<std::int64_t>(tokens - seen));
  }
};

template <class KeyType, class ValueType = KeyType>
struct StoredTypes {
  using Key = KeyType;
  using Value = ValueType;
};
using KeysAndValues = testing::Types<StoredTypes<float>, StoredTypes<Half>, StoredTypes<Bfloat16>, StoredTypes<Int8>,
                                     StoredTypes<Int8, Half>>;
TYPED_TEST_SUITE(LogitOptionsAs, KeysAndValues);

TYPED_TEST(LogitOptionsAs, EachAloneAndAllTogetherAgreeWithTheExactOracle) {
  for (unsigned which = 0; which < 16; ++which) {
    TestFixture::check(which, 3, 2, 20, 4, 61);
    if (testing::Test::HasFatalFailure()) return;
  }
}

TYPED_TEST(LogitOptionsAs, AgreeForEveryGroupHeadDimAndPageSize) {
  for (const std::size_t group : {1U, 2U, 3U, 4U, 5U, 6U, 7U, 8U}) {
    TestFixture::check(soft_cap | window | alibi | sinks, group, 1, 17 + 8 * group, 16, 70);
    if (testing::Test::HasFatalFailure()) return;
  }
  for (const std::size_t page_size : {1U, 3U, 7U, 64U}) {
    for (const std::size_t tokens : {3U, 50U}) {
      TestFixture::check(soft_cap | window | alibi | sinks, 2, 2, 13, page_size, tokens);
      if (testing::Test::HasFatalFailure()) return;
    }
  }
}

TEST(Window, EveryWidthSeesItsOwnPositionsInTilesToo) {
  // Narrower than a tile's queries are apart, as wide as a page, wider than the sequence.
  for (const std::size_t width : {1U, 2U, 4U, 5U, 8U, 15U, 40U, 100U}) {
    SCOPED_TRACE(width);
    CacheConfig config{.query_heads = 2, .kv_heads = 1, .head_dim = 8, .page_size = 4, .max_tokens = 45};
    config.logits.window = width;
    const Rows rows(45, config, width);
    PagedKvCache<Dense> cache(config);
    ASSERT_TRUE(cache.append_prompt(rows.k, rows.v).ok());
    std::vector<float> out(45 * 16);
    ASSERT_TRUE(
        attend_prompt(cache, TokenRows<const float>(rows.q.data(), 45, 2, 8), TokenRows<float>(out.data(), 45, 2, 8))
            .ok());
    for (std::size_t t = 0; t < 45; ++t) {
      for (std::size_t head = 0; head < 2; ++head) {
        std::vector<std::size_t> seen;
        for (std::size_t i = t + 1 < width ? 0 : t + 1 - width; i <= t; ++i) seen.push_back(i);
        const ExactAttention exact = rows.exact(t, head, seen);
        for (std::size_t i = 0; i < 8; ++i) {
          ASSERT_NEAR(static_cast<double>(out[(t * 2 + head) * 8 + i]), exact.out[i], 1e-5) << t;
        }
      }
    }
  }
}

TEST(Window, AnEvictorGivesUpFirstWhatNoQueryWillSee) {
  // H2O would keep the pages with the most mass, which the early tokens had most time to gather.
  CacheConfig config{.query_heads = 2, .kv_heads = 1, .head_dim = 8, .page_size = 4, .budget_tokens = 24};
  config.logits.window = 18;
  const Rows rows(200, config, 1);
  PagedKvCache<H2o> cache(config);
  std::vector<float> out(16);
  for (std::size_t t = 0; t < 200; ++t) {
    ASSERT_TRUE(cache.append(rows.token_k(t), rows.token_v(t)).ok());
    ASSERT_TRUE(attend(cache, rows.token_q(t), out).ok());
    std::vector<std::size_t> seen;
    for (std::size_t i = t < 18 ? 0 : t - 17; i <= t; ++i) seen.push_back(i);
    for (std::size_t head = 0; head < 2; ++head) {
      const ExactAttention exact = rows.exact(t, head, seen);
      for (std::size_t i = 0; i < 8; ++i) ASSERT_NEAR(static_cast<double>(out[head * 8 + i]), exact.out[i], 1e-5) << t;
    }
  }
}

TEST(Window, ALayerThatGivesItsPagesBackReadsWhatDenseReads) {
  // The recipe for a sliding-window layer: no sinks, a budget of the window and one page, and memory stays at that.
  CacheConfig config{.query_heads = 4, .kv_heads = 2, .head_dim = 12, .page_size = 8, .max_tokens = 300};
  config.logits.window = 50;
  config.budget_tokens = 64;  // 50 positions touch at most 8 pages of 8
  const Rows rows(300, config, 2);
  StreamingLlm recent;
  recent.options.sinks = 0;
  PagedKvCache<StreamingLlm> sliding(config, recent);
  PagedKvCache<Dense> dense(config);
  std::vector<float> a(48), b(48);
  for (std::size_t t = 0; t < 300; ++t) {
    ASSERT_TRUE(sliding.append(rows.token_k(t), rows.token_v(t)).ok());
    ASSERT_TRUE(dense.append(rows.token_k(t), rows.token_v(t)).ok());
    ASSERT_TRUE(attend(sliding, rows.token_q(t), a).ok());
    ASSERT_TRUE(attend(dense, rows.token_q(t), b).ok());
    ASSERT_EQ(a, b) << t;
  }
  EXPECT_EQ(sliding.stats().peak_resident_tokens, 64U);
}

TEST(SoftCap, IsThatOfTheFormulaFromTinyToHugeLogits) {
  // One key in one dimension: log-sum-exp is the logit.
  for (const float cap : {0.5F, 30.0F, 50.0F, 1000.0F}) {
    CacheConfig config{.query_heads = 1, .kv_heads = 1, .head_dim = 1, .page_size = 4, .max_tokens = 1};
    config.softmax_scale = 1.0F;
    config.logits.soft_cap = cap;
    PagedKvCache<Dense> cache(config);
    const std::vector<float> one{1.0F};
    ASSERT_TRUE(cache.append(one, one).ok());
    for (double x = 1e-6; x < 1e6; x *= 1.07) {
      for (const double sign : {1.0, -1.0}) {
        const std::vector<float> q{static_cast<float>(sign * x)};
        std::vector<float> out(1), lse(1);
        ASSERT_TRUE(attend(cache, q, out, lse).ok());
        const double exact = static_cast<double>(cap) * std::tanh(static_cast<double>(q[0]) / static_cast<double>(cap));
        ASSERT_NEAR(static_cast<double>(lse[0]), exact, 2e-7 * static_cast<double>(cap)) << q[0] << ", cap " << cap;
        ASSERT_EQ(out[0], 1.0F);
      }
    }
    for (const float q : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
      std::vector<float> out(1), lse(1);
      ASSERT_TRUE(attend(cache, std::vector<float>{q}, out, lse).ok());
      if (std::isnan(q)) {
        EXPECT_TRUE(std::isnan(out[0])) << "a NaN must not vanish";
      } else {
        EXPECT_NEAR(lse[0], cap, 1e-5F * cap);
      }
    }
  }
}

TEST(SinkLogit, FarAboveAllTokensItTakesAllTheWeight) {
  CacheConfig config{.query_heads = 2, .kv_heads = 1, .head_dim = 4, .page_size = 4, .max_tokens = 9};
  config.logits.sink_logits = {300.0F, -300.0F};
  const Rows rows(9, config, 3);
  PagedKvCache<Dense> cache(config);
  for (std::size_t t = 0; t < 9; ++t) ASSERT_TRUE(cache.append(rows.token_k(t), rows.token_v(t)).ok());
  std::vector<float> out(8), lse(2);
  ASSERT_TRUE(attend(cache, rows.token_q(8), out, lse).ok());
  EXPECT_EQ(lse[0], 300.0F);
  for (std::size_t i = 0; i < 4; ++i) EXPECT_EQ(out[i], 0.0F);
  const ExactAttention plain = rows.exact(8, 1, first_positions(9));
  for (std::size_t i = 0; i < 4; ++i) EXPECT_NEAR(static_cast<double>(out[4 + i]), plain.out[i], 1e-5);
}

/// Runs the bodies on threads, the last first.
struct ReversedThreads {
  void operator()(std::size_t count, RangeBody body) const {
    std::vector<std::thread> threads;
    for (std::size_t i = count; i > 0; --i) threads.emplace_back([=] { body(i - 1); });
    for (std::thread& thread : threads) thread.join();
  }
  static constexpr std::size_t concurrency() { return 4; }
};

TEST(LogitOptionsOnThreads, EveryBitIsThatOfOneThread) {
  CacheConfig config{.query_heads = 4, .kv_heads = 1, .head_dim = 8, .page_size = 16, .max_tokens = 3000};
  config.logits = some_options(soft_cap | window | alibi | sinks, 4, 2 * 2500);
  const Rows rows(3000, config, 4);
  PagedKvCache<Dense, Half> cache(config);
  ASSERT_TRUE(cache.append_prompt(rows.k, rows.v).ok());
  std::vector<float> serial(32), threaded(32), serial_lse(4), threaded_lse(4);
  ReversedThreads threads;
  ASSERT_TRUE(attend(cache, rows.token_q(2999), serial, serial_lse).ok());
  ASSERT_TRUE(attend(cache, rows.token_q(2999), threaded, threaded_lse, threads).ok());
  EXPECT_EQ(serial, threaded);
  EXPECT_EQ(serial_lse, threaded_lse);
  const Rows stored = rows.stored_as<Half>();
  for (std::size_t head = 0; head < 4; ++head) {
    const ExactAttention exact = exact_of(stored, config, 2999, head);
    EXPECT_NEAR(static_cast<double>(serial_lse[head]), exact.log_sum_exp, 2e-5);
  }
}

// --------------------------------------------------------------------------------------------------- what is refused

template <class Policy>
std::string refusal(const CacheConfig& config, const Policy& policy = {}) {
  try {
    const PagedKvCache<Policy> cache(config, policy);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "not refused";
}

CacheConfig config_with(const LogitOptions& logits) {
  CacheConfig config{
      .query_heads = 4, .kv_heads = 2, .head_dim = 8, .page_size = 4, .budget_tokens = 32, .max_tokens = 100};
  config.logits = logits;
  return config;
}

TEST(LogitOptionsRefused, ValuesOutOfRange) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(refusal<Dense>(config_with({.soft_cap = -1.0F})),
            "soft_cap = -1.000000 must be positive and finite, or 0 for none");
  EXPECT_EQ(refusal<Dense>(config_with({.soft_cap = infinity})),
            "soft_cap = inf must be positive and finite, or 0 for none");
  EXPECT_EQ(refusal<Dense>(config_with({.soft_cap = std::nanf("")})),
            "soft_cap = nan must be positive and finite, or 0 for none");
  EXPECT_EQ(refusal<Dense>(config_with({.window = std::size_t{1} << 41})), "window = 2199023255552 exceeds 2^40");
  EXPECT_EQ(refusal<Dense>(config_with({.alibi_slopes = {1, 2}})), "alibi_slopes has 2 slopes for 4 query heads");
  EXPECT_EQ(refusal<Dense>(config_with({.alibi_slopes = {1, 2, infinity, 4}})),
            "alibi_slopes has a slope of inf; it must be finite");
  EXPECT_EQ(refusal<Dense>(config_with({.sink_logits = {1, 2, 3}})), "sink_logits has 3 logits for 4 query heads");
  EXPECT_EQ(refusal<Dense>(config_with({.sink_logits = {1, 2, 3, infinity}})),
            "sink_logits has a logit of inf; it must be below infinity");
  EXPECT_EQ(refusal<Dense>(config_with({.sink_logits = {1, 2, 3, -infinity}})), "not refused");
}

TEST(LogitOptionsRefused, WhereThePolicyScoresKeysByItself) {
  const CacheConfig windowed = config_with({.window = 10});
  const CacheConfig sloped = config_with({.alibi_slopes = {1, 2, 3, 4}});
  const CacheConfig capped = config_with({.soft_cap = 30.0F});
  const CacheConfig sunk = config_with({.sink_logits = {1, 2, 3, 4}});
  EXPECT_EQ(refusal<Quest>(windowed),
            "policy quest scores keys by their dot products alone and would count on pages outside the window = 10; "
            "use one that does not, such as dense or streaming_llm, in a sliding-window layer");
  EXPECT_EQ(refusal<Quest>(sloped),
            "policy quest scores keys by their dot products alone, which rank otherwise than logits with ALiBi slopes");
  EXPECT_EQ(refusal<Quest>(capped), "not refused") << "the cap keeps their order";
  EXPECT_EQ(refusal<Quest>(sunk), "not refused");
  EXPECT_NE(refusal<Oracle>(windowed), "not refused");
  Raas by_bound;
  by_bound.options.evidence = Raas::Evidenced::quest_bound;
  EXPECT_NE(refusal(sloped, by_bound), "not refused");
  EXPECT_EQ(refusal(capped, by_bound),
            "policy raas scores keys by their dot products alone and compares them with numbers that soft_cap = "
            "30.000000 changes");
  EXPECT_NE(refusal(capped, Compose<Raas, Quest>{by_bound, {}}), "not refused");
  EXPECT_EQ(refusal<Raas>(capped), "not refused");
  EXPECT_EQ(refusal<Raas>(windowed), "not refused");
  EXPECT_EQ(refusal<Raas>(sloped), "not refused");
  EXPECT_NE((refusal<Compose<Raas, Quest>>(windowed)), "not refused");
  EXPECT_EQ((refusal<Compose<Raas, Quest>>(capped)), "not refused");
}

TEST(LogitOptionsRefused, QuestSelectsTheSamePagesUnderACap) {
  CacheConfig config = config_with({});
  const Rows rows(100, config, 5);
  PagedKvCache<Quest> plain(config);
  config.logits.soft_cap = 2.0F;
  PagedKvCache<Quest> capped(config);
  ASSERT_TRUE(plain.append_prompt(rows.k, rows.v).ok());
  ASSERT_TRUE(capped.append_prompt(rows.k, rows.v).ok());
  std::vector<float> out(32);
  ASSERT_TRUE(attend(plain, rows.token_q(99), out).ok());
  ASSERT_TRUE(attend(capped, rows.token_q(99), out).ok());
  EXPECT_EQ(plain.read_positions(0), capped.read_positions(0));
  EXPECT_LT(plain.read_positions(0).size(), 100U);
}

}  // namespace
}  // namespace kvsparse_test
