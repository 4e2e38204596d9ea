// SPDX-License-Identifier: Apache-2.0
//
// The certificate of attend_certified() against the lost mass itself, computed in double precision from the keys as
// stored, on data made to break it; and Certified, which reads until the certificate holds.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "kvsparse/attention/exact.hpp"
#include "kvsparse/cache/attend_certified.hpp"
#include "kvsparse/policy/certified.hpp"
#include "kvsparse/policy/dense.hpp"
#include "kvsparse/policy/hierarchical_top_k.hpp"
#include "kvsparse/policy/quest.hpp"
#include "support/rows.hpp"

namespace kvsparse_test {
namespace {

using namespace kvsparse;

CacheConfig config_of(std::size_t page_size, std::size_t read_pages, std::size_t head_dim = 24) {
  CacheConfig config;
  config.query_heads = 4;
  config.kv_heads = 2;
  config.head_dim = head_dim;
  config.page_size = page_size;
  config.read_budget_tokens = read_pages * page_size;
  config.max_tokens = 4096;
  return config;
}

// ---- data -----------------------------------------------------------------------------------------------------------

struct Data {
  const char* name;
  std::function<void(Rows&)> make;
};

void for_each_element(std::vector<float>& rows, std::size_t dim,
                      const std::function<float(std::size_t row, std::size_t channel, float)>& change) {
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = change(i / dim, i % dim, rows[i]);
}

std::vector<Data> adversaries() {
  return {
      {"Gaussian", [](Rows&) {}},
      {"AllKeysEqual",
       [](Rows& rows) {
         for_each_element(rows.k, rows.head_dim, [&](std::size_t, std::size_t i, float) { return rows.k[i]; });
       }},
      {"Orthogonal",
       [](Rows& rows) {
         const auto one_hot = [&](std::size_t row, std::size_t i, float) {
           return row % rows.head_dim == i ? 20.0F : 0.0F;
         };
         for_each_element(rows.k, rows.head_dim, one_hot);
         for_each_element(rows.q, rows.head_dim, one_hot);
       }},
      {"HugeKeys",
       [](Rows& rows) {
         for_each_element(rows.k, rows.head_dim, [](std::size_t, std::size_t, float x) { return x * 8000.0F; });
       }},
      {"OneHugeKey",
       [](Rows& rows) {
         for_each_element(rows.k, rows.head_dim,
                          [](std::size_t row, std::size_t, float x) { return row == 14 ? x * 10000.0F : x; });
       }},
      {"KeysThatFloatsCannotSquare",
       [](Rows& rows) {
         for_each_element(rows.k, rows.head_dim, [](std::size_t, std::size_t, float x) { return x * 1e30F; });
         for_each_element(rows.q, rows.head_dim, [](std::size_t, std::size_t, float x) { return x * 1e10F; });
       }},
      {"VanishingKeys",
       [](Rows& rows) {
         for_each_element(rows.k, rows.head_dim, [](std::size_t, std::size_t, float x) { return x * 1e-41F; });
       }},
      {"VanishingQueries",
       [](Rows& rows) {
         for_each_element(rows.q, rows.head_dim, [](std::size_t, std::size_t, float x) { return x * 1e-42F; });
       }},
      {"Zeros", [](Rows& rows) { std::fill(rows.k.begin(), rows.k.end(), 0.0F); }},
      {"ProductsThatCancel",  // every product is near 1e5 and their sum near 0: what remains is rounding
       [](Rows& rows) {
         for_each_element(rows.q, rows.head_dim,
                          [](std::size_t, std::size_t i, float x) { return (i % 2 == 0 ? 300.0F : -300.0F) + x; });
         for_each_element(rows.k, rows.head_dim, [](std::size_t, std::size_t, float x) { return 300.0F + 0.01F * x; });
       }},
      {"PeakedQueries",
       [](Rows& rows) {
         for_each_element(rows.q, rows.head_dim, [](std::size_t, std::size_t, float x) { return x * 6.0F; });
       }},
      {"KeysTheQueryWants",  // the mass hides in one token of a page that is poor otherwise
       [](Rows& rows) {
         for (std::size_t t = 0; t < rows.tokens; t += 7) {
           const std::size_t of_query = (rows.tokens - 1) * rows.query_heads * rows.head_dim;
           for (std::size_t i = 0; i < rows.head_dim; ++i) {
             rows.k[t * rows.kv_heads * rows.head_dim + i] = 1.5F * rows.q[of_query + i];
           }
         }
       }},
  };
}

/// The share of the softmax of query head `head` of token t that lies outside `read`.
double true_lost_mass(const Rows& stored, const CacheConfig& config, float scale, std::size_t t, std::size_t head,
                      const std::vector<Position>& read) {
  const std::size_t kv_head = head / (config.query_heads / config.kv_heads);
  ExactLogits logits;
  logits.scale = static_cast<double>(scale);
  logits.soft_cap = static_cast<double>(config.logits.soft_cap);
  logits.window = static_cast<std::int64_t>(config.logits.window);
  if (!config.logits.alibi_slopes.empty()) logits.alibi_slope = static_cast<double>(config.logits.alibi_slopes[head]);
  if (!config.logits.sink_logits.empty()) logits.sink = static_cast<double>(config.logits.sink_logits[head]);
  logits.query_position = static_cast<std::int64_t>(t);
  const ExactAttention exact = exact_attention(
      stored.query(t, head), t + 1, [&](std::size_t i) { return stored.key(i, kv_head); },
      [&](std::size_t i) { return stored.value(i, kv_head); }, [](std::size_t i) { return i; }, logits,
      stored.head_dim);
  std::vector<bool> was_read(t + 1, false);
  for (const Position position : read) was_read[static_cast<std::size_t>(position.value)] = true;
  double lost = 0.0;
  for (std::size_t i = 0; i <= t; ++i) lost += was_read[i] ? 0.0 : exact.weights[i];
  return lost;
}

struct Answer {
  std::vector<float> out, lse, lost;
};

template <class Cache>
Answer attend_last(Cache& cache, const Rows& rows, std::size_t t) {
  Answer answer{std::vector<float>(rows.query_heads * rows.head_dim), std::vector<float>(rows.query_heads),
                std::vector<float>(rows.query_heads, -1.0F)};
  const Status status = attend_certified(cache, rows.token_q(t), std::span<float>(answer.out), answer.lse, answer.lost);
  EXPECT_TRUE(status.ok()) << status.message();
  return answer;
}

struct Tally {
  int certificates = 0;
  int below_one = 0;
  std::size_t read = 0;
  std::size_t resident = 0;
};

/// Decodes `rows`, asking every few tokens, and compares each certificate. check(answer) may look at more.
template <class Policy, class Scalar>
void expect_proofs(const Policy& policy, const CacheConfig& config, const Rows& rows, Tally& tally,
                   const std::function<void(const Answer&)>& check = {}) {
  PagedKvCache<Policy, Scalar> cache(config, policy);
  const Rows stored = rows.stored_as<Scalar>();
  for (std::size_t t = 0; t < rows.tokens; ++t) {
    ASSERT_TRUE(cache.append(rows.token_k(t), rows.token_v(t)).ok());
    if (t % 5 != 0 && t + 1 != rows.tokens) continue;
    const Answer answer = attend_last(cache, rows, t);
    if (check) check(answer);
    for (std::size_t head = 0; head < config.query_heads; ++head) {
      const std::vector<Position> read = cache.read_positions(head / (config.query_heads / config.kv_heads));
      const double lost = true_lost_mass(stored, config, cache.softmax_scale(), t, head, read);
      if (!std::isfinite(lost)) continue;  // the data left the doubles too
      ASSERT_LE(lost, static_cast<double>(answer.lost[head])) << "token " << t << ", query head " << head;
      ASSERT_LE(answer.lost[head], 1.0F);
      ++tally.certificates;
      tally.below_one += answer.lost[head] < 1.0F ? 1 : 0;
    }
    tally.read += cache.stats().last_read_tokens;
    tally.resident += config.kv_heads * (t + 1);
  }
}

// ---- the certificate ------------------------------------------------------------------------------------------------

template <class Scalar>
class Certificate : public testing::Test {};
using AllScalars = testing::Types<float, Half, Bfloat16, Int8>;
TYPED_TEST_SUITE(Certificate, AllScalars);

TYPED_TEST(Certificate, IsNeverBelowWhatQuestLost) {
  for (const Data& data : adversaries()) {
    SCOPED_TRACE(data.name);
    Tally tally;
    for (const std::size_t page_size : {1UL, 4UL, 16UL}) {
      const CacheConfig config = config_of(page_size, 3);
      Rows rows(90, config, 7 + page_size);
      data.make(rows);
      expect_proofs<Quest, TypeParam>(Quest{}, config, rows, tally);
      if (this->HasFatalFailure()) return;
    }
    EXPECT_LT(tally.read, tally.resident);
    if (std::string(data.name) == "Gaussian") {
      EXPECT_GT(tally.below_one, tally.certificates / 2);
    }
  }
}

TYPED_TEST(Certificate, IsWhatCertifiedWasAskedFor) {
  for (const Data& data : adversaries()) {
    SCOPED_TRACE(data.name);
    for (const double epsilon : {0.5, 0.05, 1e-4}) {
      SCOPED_TRACE(epsilon);
      Certified policy;
      policy.options.epsilon = epsilon;
      Tally tally;
      const CacheConfig config = config_of(4, 3);
      Rows rows(90, config, 3);
      data.make(rows);
      expect_proofs<Certified, TypeParam>(policy, config, rows, tally, [&](const Answer& answer) {
        for (const float lost : answer.lost) EXPECT_LE(static_cast<double>(lost), epsilon * 1.000001);
      });
      if (this->HasFatalFailure()) return;
    }
  }
}

TEST(CertificateTest, HoldsUnderEveryLogitOption) {
  const std::vector<std::pair<const char*, std::function<void(CacheConfig&)>>> options = {
      {"SoftCap", [](CacheConfig& c) { c.logits.soft_cap = 4.0F; }},
      {"Window", [](CacheConfig& c) { c.logits.window = 37; }},
      {"Sinks",
       [](CacheConfig& c) {
         c.logits.sink_logits = {3.0F, -1.0F, 40.0F, -INFINITY};
       }},
      {"Alibi",
       [](CacheConfig& c) {
         c.logits.alibi_slopes = {0.5F, 0.01F, 0.0F, -0.2F};
       }},
      {"Scale", [](CacheConfig& c) { c.softmax_scale = 1.75F; }},
      {"NegativeScale", [](CacheConfig& c) { c.softmax_scale = -0.3F; }},
      {"AllOfThem",
       [](CacheConfig& c) {
         c.logits = {20.0F, 50, {0.05F, -0.1F, 0.0F, 0.3F}, {0.5F, 0.5F, 0.5F, 0.5F}};
         c.softmax_scale = 0.7F;
       }},
  };
  for (const auto& [name, set] : options) {
    for (const Data& data : adversaries()) {
      for (const std::size_t page_size : {1UL, 8UL}) {
        SCOPED_TRACE(std::string(name) + ", " + data.name + ", pages of " + std::to_string(page_size));
        CacheConfig config = config_of(page_size, 2);
        set(config);
        Rows rows(110, config, 11);
        data.make(rows);
        Certified policy;
        policy.options.epsilon = 0.1;
        Tally tally;
        expect_proofs<Certified, float>(policy, config, rows, tally, [&](const Answer& answer) {
          for (const float lost : answer.lost) EXPECT_LE(static_cast<double>(lost), 0.1000001);
        });
        if (HasFatalFailure()) return;
      }
    }
  }
}

// Where each query head reads for itself, what it read shows in its log-sum-exp alone.
TEST(CertificateTest, IsOfEachQueryHeadWhereEachReadsForItself) {
  const CacheConfig config = config_of(4, 3);
  const Rows rows(90, config, 5);
  Quest policy;
  policy.options.pool = Quest::Pool::query_head;
  PagedKvCache<Quest> cache(config, policy);
  int lost_some = 0;
  for (std::size_t t = 0; t < rows.tokens; ++t) {
    ASSERT_TRUE(cache.append(rows.token_k(t), rows.token_v(t)).ok());
    const Answer answer = attend_last(cache, rows, t);
    for (std::size_t head = 0; head < config.query_heads; ++head) {
      const ExactAttention exact = rows.exact(t, head, first_positions(t + 1));
      const double lost = 1.0 - std::exp(static_cast<double>(answer.lse[head]) - exact.log_sum_exp);
      ASSERT_LE(lost, static_cast<double>(answer.lost[head]) + 1e-5);
      lost_some += lost > 1e-3 ? 1 : 0;
    }
  }
  EXPECT_GT(lost_some, 100);
}

// A page of one token is its own bound, so nothing but rounding stands between the certificate and the truth.
TEST(CertificateTest, IsTheLostMassItselfForPagesOfOneToken) {
  const CacheConfig config = config_of(1, 12);
  const Rows rows(200, config, 21);
  PagedKvCache<Quest> cache(config);
  for (std::size_t t = 0; t < rows.tokens; ++t) {
    ASSERT_TRUE(cache.append(rows.token_k(t), rows.token_v(t)).ok());
    const Answer answer = attend_last(cache, rows, t);
    for (std::size_t head = 0; head < config.query_heads; ++head) {
      const double lost = true_lost_mass(rows, config, cache.softmax_scale(), t, head, cache.read_positions(head / 2));
      ASSERT_NEAR(static_cast<double>(answer.lost[head]), lost, 1e-3 * lost) << "token " << t;
    }
  }
}

TEST(CertificateTest, BoundsTheErrorOfTheOutput) {
  const CacheConfig config = config_of(4, 3);
  const Rows rows(90, config, 13, 4.0);
  PagedKvCache<Quest> cache(config);
  for (std::size_t t = 0; t < rows.tokens; ++t) ASSERT_TRUE(cache.append(rows.token_k(t), rows.token_v(t)).ok());
  const std::size_t last = rows.tokens - 1;
  const Answer answer = attend_last(cache, rows, last);
  for (std::size_t head = 0; head < config.query_heads; ++head) {
    const ExactAttention exact = rows.exact(last, head, first_positions(rows.tokens));
    const auto distance = [&](auto&& a, auto&& b) {
      double sum = 0.0;
      for (std::size_t i = 0; i < rows.head_dim; ++i) {
        const double difference = static_cast<double>(a[i]) - static_cast<double>(b[i]);
        sum += difference * difference;
      }
      return std::sqrt(sum);
    };
    const std::span<const float> out = std::span<const float>(answer.out).subspan(head * rows.head_dim, rows.head_dim);
    double farthest = 0.0;
    for (std::size_t i = 0; i < rows.tokens; ++i) farthest = std::max(farthest, distance(out, rows.value(i, head / 2)));
    EXPECT_LE(distance(out, exact.out), static_cast<double>(answer.lost[head]) * farthest + 1e-5);
    EXPECT_GT(distance(out, exact.out), 1e-4);
  }
}

TEST(CertificateTest, IsZeroWhereEverythingIsRead) {
  const CacheConfig config = config_of(4, 100);
  const Rows rows(50, config, 2);
  PagedKvCache<Dense> dense(config);
  PagedKvCache<Quest> quest(config);
  for (std::size_t t = 0; t < rows.tokens; ++t) {
    ASSERT_TRUE(dense.append(rows.token_k(t), rows.token_v(t)).ok());
    ASSERT_TRUE(quest.append(rows.token_k(t), rows.token_v(t)).ok());
  }
  EXPECT_EQ(attend_last(dense, rows, 49).lost, std::vector<float>(4, 0.0F));
  EXPECT_EQ(attend_last(quest, rows, 49).lost, std::vector<float>(4, 0.0F));
}

/// Reads half of every page.
struct HalfOfEachPage {
  static constexpr std::string_view name = "half_of_each_page";
  static constexpr PolicyGranularity granularity = PolicyGranularity::token;
  static constexpr PageSummary page_summary = PageSummary::min_max;
  static constexpr bool select_always = true;
  float log_weight = 0.0F;
  void select(HeadView<HalfOfEachPage> head, QueryGroup, Selection& selection) const {
    for (const PageIndex page : head.pages()) {
      const std::span<std::uint64_t> mask = selection.token_mask(page);
      mask[0] = 0x55;
      selection.add({page, mask, log_weight, log_weight, 0});
    }
  }
};

TEST(CertificateTest, CountsTheTokensThatAMaskLeavesOut) {
  const CacheConfig config = config_of(8, 3);
  Tally tally;
  expect_proofs<HalfOfEachPage, float>(HalfOfEachPage{}, config, Rows(90, config, 4, 0.3), tally);
  EXPECT_LT(tally.read, tally.resident);
  EXPECT_GT(tally.below_one, 0);
}

TEST(CertificateTest, SaysNothingWhereTokensAreWeighted) {
  const CacheConfig config = config_of(8, 3);
  const Rows rows(20, config, 4, 0.3);
  PagedKvCache<HalfOfEachPage> cache(config, HalfOfEachPage{2.0F});
  for (std::size_t t = 0; t < rows.tokens; ++t) ASSERT_TRUE(cache.append(rows.token_k(t), rows.token_v(t)).ok());
  EXPECT_EQ(attend_last(cache, rows, 19).lost, std::vector<float>(4, 1.0F));
}

TEST(CertificateTest, RefusesWhatItCannotBound) {
  const CacheConfig config = config_of(4, 3);
  const Rows rows(40, config, 2);
  PagedKvCache<HierarchicalTopK> cache(config);
  std::vector<float> out(4 * config.head_dim), lost(4);
  EXPECT_EQ(attend_certified(cache, rows.token_q(0), std::span<float>(out), {}, lost).code(),
            Status::Code::nothing_to_attend);
  for (std::size_t t = 0; t < rows.tokens; ++t) ASSERT_TRUE(cache.append(rows.token_k(t), rows.token_v(t)).ok());
  const Status status = attend_certified(cache, rows.token_q(39), std::span<float>(out), {}, lost);
  EXPECT_EQ(status.code(), Status::Code::no_page_bounds);
  EXPECT_NE(status.message().find("40 resident tokens"), std::string::npos) << status.message();

  PagedKvCache<Quest> quest(config);
  ASSERT_TRUE(quest.append(rows.token_k(0), rows.token_v(0)).ok());
  lost.resize(3);
  EXPECT_EQ(attend_certified(quest, rows.token_q(0), std::span<float>(out), {}, lost).code(), Status::Code::wrong_size);
  Certified nothing_lost;
  nothing_lost.options.epsilon = 0.0;
  EXPECT_THROW((PagedKvCache<Certified>(config, nothing_lost)), ConfigError);
}

// ---- Certified ------------------------------------------------------------------------------------------------------

// With pages of one token bounds are exact, so the fewest tokens that leave no more than epsilon are known.
TEST(CertifiedTest, ReadsLittleMoreThanItMust) {
  CacheConfig config = config_of(1, 1);
  config.query_heads = config.kv_heads = 2;
  const Rows rows(400, config, 17, 3.0);
  for (const double epsilon : {0.3, 0.03, 0.003}) {
    Certified policy;
    policy.options.epsilon = epsilon;
    PagedKvCache<Certified> cache(config, policy);
    std::size_t must = 0;
    std::size_t does = 0;
    for (std::size_t t = 0; t < rows.tokens; ++t) {
      ASSERT_TRUE(cache.append(rows.token_k(t), rows.token_v(t)).ok());
      attend_last(cache, rows, t);
      for (std::size_t head = 0; head < 2; ++head) {
        std::vector<double> weights = rows.exact(t, head, first_positions(t + 1)).weights;
        std::sort(weights.begin(), weights.end());
        double left = 0.0;
        std::size_t unread = 0;
        while (unread < weights.size() && left + weights[unread] <= epsilon) left += weights[unread++];
        must += weights.size() - unread;
        does += cache.read_positions(head).size();
      }
    }
    EXPECT_GE(does, must);
    EXPECT_LE(does, must + must / 10 + 2 * rows.tokens) << "epsilon " << epsilon;  // the open page is always read
    EXPECT_LT(does, 400 * 401 * 3 / 4) << "epsilon " << epsilon;
  }
}

// Threads may share a head's pages; certificates, like outputs, keep every bit.
TEST(CertifiedTest, HasTheSameBitsOnManyThreads) {
  const CacheConfig config = config_of(16, 4);
  const Rows rows(3000, config, 23);
  const auto decoded = [&](auto&& executor) {
    PagedKvCache<Certified> cache(config);
    for (std::size_t t = 0; t < rows.tokens; ++t) EXPECT_TRUE(cache.append(rows.token_k(t), rows.token_v(t)).ok());
    Answer answer{std::vector<float>(4 * config.head_dim), std::vector<float>(4), std::vector<float>(4)};
    EXPECT_TRUE(
        attend_certified(cache, rows.token_q(2999), std::span<float>(answer.out), answer.lse, answer.lost, executor)
            .ok());
    return answer;
  };
  struct Backwards {
    void operator()(std::size_t count, RangeBody body) const noexcept {
      while (count > 0) body(--count);
    }
    std::size_t concurrency() const { return 7; }
  };
  const Answer serial = decoded(SerialExecutor{});
  const Answer shared = decoded(Backwards{});
  EXPECT_EQ(serial.out, shared.out);
  EXPECT_EQ(serial.lse, shared.lse);
  EXPECT_EQ(serial.lost, shared.lost);
}

// It has no state, so what drafts read leaves no trace, and pages that were taken back are not counted on.
TEST(CertifiedTest, ForgetsRejectedDrafts) {
  CacheConfig config = config_of(4, 3);
  config.max_speculative = 6;
  const Rows rows(80, config, 29);
  PagedKvCache<Certified> drafted(config);
  PagedKvCache<Certified> plain(config);
  for (std::size_t t = 0; t + 10 < rows.tokens; ++t) {
    for (auto* cache : {&drafted, &plain}) ASSERT_TRUE(cache->append(rows.token_k(t), rows.token_v(t)).ok());
    const Position length = drafted.next_position();
    for (std::size_t draft = 0; draft < 6; ++draft) {
      const std::size_t source = t + 4 + draft;
      const auto one = [&](std::span<const float> row) { return TokenRows<const float>(row.data(), 1, 2, 24); };
      ASSERT_TRUE(drafted.append_draft(one(rows.token_k(source)), one(rows.token_v(source))).ok());
    }
    attend_last(drafted, rows, t + 7);
    ASSERT_TRUE(drafted.truncate(length).ok());
    const Answer after = attend_last(drafted, rows, t);
    const Answer never = attend_last(plain, rows, t);
    ASSERT_EQ(after.out, never.out);
    ASSERT_EQ(after.lost, never.lost);
  }
}

}  // namespace
}  // namespace kvsparse_test
