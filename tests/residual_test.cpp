// SPDX-License-Identifier: Apache-2.0
//
// Evictors whose survivors, or whose sketch, stand for what is gone, against their formulas in double precision.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "kvsparse/cache/attend.hpp"
#include "kvsparse/interop/snapshot.hpp"
#include "kvsparse/policy/clustered.hpp"
#include "kvsparse/policy/dense.hpp"
#include "kvsparse/policy/streaming_sketch.hpp"
#include "support/rows.hpp"

namespace kvsparse_test {
namespace {

using namespace kvsparse;

CacheConfig config_of(std::size_t page_size, std::size_t budget_pages, std::size_t head_dim = 16) {
  CacheConfig config;
  config.query_heads = 4;
  config.kv_heads = 2;
  config.head_dim = head_dim;
  config.page_size = page_size;
  config.budget_tokens = budget_pages * page_size;
  config.max_tokens = 4096;
  return config;
}

struct Answer {
  std::vector<float> out, lse;
  bool operator==(const Answer&) const = default;
};

template <class Cache>
Answer ask(Cache& cache, const Rows& rows, std::size_t t) {
  Answer answer{std::vector<float>(rows.query_heads * rows.head_dim), std::vector<float>(rows.query_heads)};
  const Status status = attend(cache, rows.token_q(t), std::span<float>(answer.out), answer.lse);
  EXPECT_TRUE(status.ok()) << status.message();
  return answer;
}

template <class Cache>
void append(Cache& cache, const Rows& rows, std::size_t t, std::size_t prompt = 0) {
  const Status status = t < prompt ? cache.append_prompt(rows.token_k(t), rows.token_v(t))
                                   : cache.append(rows.token_k(t), rows.token_v(t));
  ASSERT_TRUE(status.ok()) << status.message();
}

double dot(std::span<const float> a, std::span<const float> b) {
  double sum = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sum;
}

/// A softmax whose terms weigh differently.
struct WeightedSoftmax {
  std::vector<double> logits, weights;
  std::vector<std::vector<double>> values;

  void add(double logit, double weight, std::span<const float> value) {
    logits.push_back(logit);
    weights.push_back(weight);
    values.emplace_back(value.begin(), value.end());
  }
  double max() const { return *std::max_element(logits.begin(), logits.end()); }
  double sum() const {
    const double largest = max();
    double total = 0.0;
    for (std::size_t i = 0; i < logits.size(); ++i) total += weights[i] * std::exp(logits[i] - largest);
    return total;
  }
  double log_sum_exp() const { return max() + std::log(sum()); }
  std::vector<double> mean() const {
    std::vector<double> result(values[0].size());
    const double largest = max(), total = sum();
    for (std::size_t i = 0; i < logits.size(); ++i) {
      const double share = weights[i] * std::exp(logits[i] - largest) / total;
      for (std::size_t c = 0; c < result.size(); ++c) result[c] += share * values[i][c];
    }
    return result;
  }
};

void expect_near(const Answer& answer, std::size_t head, std::size_t dim, const WeightedSoftmax& exact,
                 double tolerance) {
  const double lse = exact.log_sum_exp();
  const std::vector<double> mean = exact.mean();
  ASSERT_NEAR(static_cast<double>(answer.lse[head]), lse, tolerance * (1.0 + std::abs(lse)));
  for (std::size_t i = 0; i < dim; ++i) {
    ASSERT_NEAR(static_cast<double>(answer.out[head * dim + i]), mean[i], tolerance * 10.0);
  }
}

// ---- Clustered ------------------------------------------------------------------------------------------------------

/// One head, its pages oldest first.
struct NaiveClusters {
  struct Page {
    std::size_t first, tokens;
    double gone = 0.0;
    bool pinned = false;
    double weight() const { return static_cast<double>(tokens) + gone; }
  };
  const Rows* rows;
  std::size_t head, page_size, budget_pages, window_pages;
  std::vector<Page> pages = {};

  std::vector<double> mean_key(const Page& page) const {
    std::vector<double> mean(rows->head_dim);
    for (std::size_t t = page.first; t < page.first + page.tokens; ++t) {
      for (std::size_t i = 0; i < mean.size(); ++i) {
        mean[i] += static_cast<double>(rows->key(t, head)[i]) / static_cast<double>(page.tokens);
      }
    }
    return mean;
  }
  double distance(const Page& a, const Page& b) const {
    const std::vector<double> x = mean_key(a), y = mean_key(b);
    double sum = 0.0;
    for (std::size_t i = 0; i < x.size(); ++i) sum += (x[i] - y[i]) * (x[i] - y[i]);
    return sum;
  }
  /// Of all pairs of pages before the window the nearest: its lighter page goes, the newer one if both weigh the same.
  std::size_t victim(std::size_t gathering) const {
    std::size_t result = 0;
    double smallest = std::numeric_limits<double>::infinity();
    for (std::size_t a = 0; a < gathering; ++a) {
      for (std::size_t b = a + 1; b < gathering; ++b) {
        if ((pages[a].pinned && pages[b].pinned) || distance(pages[a], pages[b]) >= smallest) continue;
        smallest = distance(pages[a], pages[b]);
        if (pages[a].pinned || pages[b].pinned) {
          result = pages[a].pinned ? b : a;
        } else {
          result = pages[a].weight() < pages[b].weight() ? a : b;
        }
      }
    }
    return result;
  }
  std::size_t gathering_pages() const {
    const std::size_t older = pages.size() > window_pages ? pages.size() - window_pages : 0;
    const bool any_may_go = std::any_of(pages.begin(), pages.begin() + static_cast<std::ptrdiff_t>(older),
                                        [](const Page& page) { return !page.pinned; });
    return older >= 2 && any_may_go ? older : pages.size();
  }
  void make_room() {
    const std::size_t gathering = gathering_pages();
    const std::size_t goes = victim(gathering);
    std::size_t nearest = goes == 0 ? 1 : 0;
    for (std::size_t p = 0; p < gathering; ++p) {
      if (p != goes && distance(pages[p], pages[goes]) < distance(pages[nearest], pages[goes])) nearest = p;
    }
    pages[nearest].gone += pages[goes].weight();
    pages.erase(pages.begin() + static_cast<std::ptrdiff_t>(goes));
  }
  void append(std::size_t t, bool pins) {
    if (t % page_size == 0) {
      if (pages.size() == budget_pages) make_room();
      pages.push_back({t, 0, 0.0, pins});
    }
    ++pages.back().tokens;
  }
  WeightedSoftmax softmax(std::size_t query_head, double scale) const {
    WeightedSoftmax result;
    for (const Page& page : pages) {
      for (std::size_t t = page.first; t < page.first + page.tokens; ++t) {
        const std::size_t now = pages.back().first + pages.back().tokens - 1;
        result.add(scale * dot(rows->query(now, query_head), rows->key(t, head)),
                   page.weight() / static_cast<double>(page.tokens), rows->value(t, head));
      }
    }
    return result;
  }
};

template <class Scalar>
void expect_clusters(std::size_t page_size, std::size_t budget_pages, std::size_t window, std::size_t prompt,
                     std::uint64_t seed) {
  SCOPED_TRACE("pages of " + std::to_string(page_size) + ", window " + std::to_string(window));
  const CacheConfig config = config_of(page_size, budget_pages);
  const Rows rows(12 * page_size + 90, config, seed);
  const Rows stored = rows.stored_as<Scalar>();
  Clustered policy;
  policy.options.window = window;
  policy.options.pin_prompt = prompt > 0;
  PagedKvCache<Clustered, Scalar> cache(config, policy);
  std::vector<NaiveClusters> naive;
  for (std::size_t h = 0; h < config.kv_heads; ++h) {
    naive.push_back({&stored, h, page_size, budget_pages, (window + page_size - 1) / page_size});
  }
  for (std::size_t t = 0; t < rows.tokens; ++t) {
    append(cache, rows, t, prompt);
    const Answer answer = ask(cache, rows, t);
    for (std::size_t h = 0; h < config.kv_heads; ++h) {
      naive[h].append(t, t < prompt);
      std::vector<std::size_t> resident;
      for (const auto& page : naive[h].pages) {
        for (std::size_t i = 0; i < page.tokens; ++i) resident.push_back(page.first + i);
      }
      std::vector<std::size_t> held;
      for (const Position position : cache.resident_positions(h)) {
        held.push_back(static_cast<std::size_t>(position.value));
      }
      ASSERT_EQ(held, resident) << "token " << t << ", kv head " << h;
      for (std::size_t g = 0; g < 2; ++g) {
        const double scale = static_cast<double>(cache.softmax_scale());
        expect_near(answer, 2 * h + g, rows.head_dim, naive[h].softmax(2 * h + g, scale), 1e-5);
        if (testing::Test::HasFatalFailure()) return;
      }
    }
  }
  EXPECT_GT(cache.stats().evicted_tokens, 100U);
}

TEST(ClusteredTest, DecidesAndWeighsAsItsFormulaSays) {
  expect_clusters<float>(1, 24, 8, 0, 1);
  expect_clusters<float>(4, 9, 12, 0, 2);
  expect_clusters<float>(4, 9, 12, 10, 3);
  expect_clusters<float>(3, 5, 64, 4, 4);  // a window larger than the budget
  expect_clusters<float>(4, 2, 4, 0, 5);
  expect_clusters<Half>(4, 9, 12, 6, 6);
  expect_clusters<Int8>(4, 9, 12, 0, 7);
}

// Where all keys are alike, pages that stand for others stand for them exactly: nothing of the denominator is lost.
TEST(ClusteredTest, LosesNoMassWhereKeysAreAlike) {
  const CacheConfig config = config_of(4, 6);
  Rows rows(200, config, 9);
  for (std::size_t i = 0; i < rows.k.size(); ++i) rows.k[i] = rows.k[i % rows.head_dim];
  PagedKvCache<Clustered> clustered(config);
  PagedKvCache<Dense> dense(config);
  for (std::size_t t = 0; t < rows.tokens; ++t) {
    append(clustered, rows, t);
    append(dense, rows, t);
    const Answer a = ask(clustered, rows, t);
    const Answer b = ask(dense, rows, t);
    for (std::size_t head = 0; head < 4; ++head) ASSERT_NEAR(a.lse[head], b.lse[head], 2e-5F) << "token " << t;
  }
}

// ---- StreamingSketch ------------------------------------------------------------------------------------------------

using SmallSketch = BasicStreamingSketch<16, 24>;

/// The library's published numbers: popcounts of a hash of seed, layer, head, feature and channel.
double feature_weight(std::uint64_t seed, std::uint64_t layer, std::uint64_t head, std::uint64_t feature,
                      std::uint64_t channel) {
  std::uint64_t hash = TestRng(seed).next();
  for (const std::uint64_t counter : {layer, head, feature, channel}) hash = TestRng(hash ^ counter).next();
  return (std::popcount(hash) - 32) / 4.0;
}

TEST(StreamingSketchTest, AnswersAsItsFormulaSays) {
  for (const auto& [page_size, scale, prompt] :
       std::vector<std::tuple<std::size_t, float, std::size_t>>{{1, 0.0F, 0}, {4, 0.0F, 9}, {4, -0.2F, 0}}) {
    SCOPED_TRACE("pages of " + std::to_string(page_size) + ", scale " + std::to_string(scale));
    CacheConfig config = config_of(page_size, 6, 20);
    config.softmax_scale = scale;
    config.layer = 3;
    SmallSketch policy;
    policy.options.seed = 5;
    policy.options.pin_prompt = prompt > 0;
    const Rows rows(90, config, 31 + page_size);
    PagedKvCache<SmallSketch> cache(config, policy);
    for (std::size_t t = 0; t < rows.tokens; ++t) {
      append(cache, rows, t, prompt);
      const Answer answer = ask(cache, rows, t);
      for (std::size_t head = 0; head < 4; ++head) {
        const std::size_t kv_head = head / 2;
        const auto s = static_cast<double>(cache.softmax_scale());
        std::vector<bool> resident(t + 1, false);
        for (const Position position : cache.resident_positions(kv_head)) {
          resident[static_cast<std::size_t>(position.value)] = true;
        }
        WeightedSoftmax exact;
        for (std::size_t j = 0; j <= t; ++j) {
          const auto q = rows.query(t, head), k = rows.key(j, kv_head);
          if (resident[j]) {
            exact.add(s * dot(q, k), 1.0, rows.value(j, kv_head));
            continue;
          }
          for (std::uint64_t f = 0; f < 16; ++f) {
            double exponent = -std::abs(s) * (dot(q, q) + dot(k, k)) / 2.0;
            for (std::size_t i = 0; i < rows.head_dim; ++i) {
              const double w = feature_weight(5, 3, kv_head, f, i) * std::sqrt(std::abs(s));
              exponent += w * ((s < 0 ? -1.0 : 1.0) * static_cast<double>(q[i]) + static_cast<double>(k[i]));
            }
            exact.add(exponent, 1.0 / 16.0, rows.value(j, kv_head));
          }
        }
        expect_near(answer, head, rows.head_dim, exact, 1e-4);
        if (testing::Test::HasFatalFailure()) return;
      }
      ASSERT_EQ(cache.resident_positions(0).back(), Position{static_cast<std::int64_t>(t)});
    }
    EXPECT_GT(cache.stats().evicted_tokens, 80U);
  }
}

// The mean over many draws of the features is the sum over what is gone.
TEST(StreamingSketchTest, IsRightOnAverage) {
  const CacheConfig config = config_of(4, 2, 6);
  Rows rows(40, config, 77, 0.6);
  for (float& element : rows.k) element *= 0.6F;  // far logits have long tails, and means of them settle late
  std::vector<double> ratio(4);
  constexpr int draws = 3000;
  for (int draw = 0; draw < draws; ++draw) {
    SmallSketch policy;
    policy.options.seed = static_cast<std::uint64_t>(draw);
    PagedKvCache<SmallSketch> cache(config, policy);
    for (std::size_t t = 0; t < rows.tokens; ++t) append(cache, rows, t);
    const Answer answer = ask(cache, rows, 39);
    for (std::size_t head = 0; head < 4; ++head) {
      const double exact = rows.exact(39, head, first_positions(40)).log_sum_exp;
      ratio[head] += std::exp(static_cast<double>(answer.lse[head]) - exact) / draws;
    }
  }
  for (std::size_t head = 0; head < 4; ++head) EXPECT_NEAR(ratio[head], 1.0, 0.03);
}

TEST(StreamingSketchTest, RefusesWhatItCannotHold) {
  EXPECT_THROW((PagedKvCache<SmallSketch>(config_of(4, 6, 32))), ConfigError);
  CacheConfig capped = config_of(4, 6);
  capped.logits.soft_cap = 20.0F;
  EXPECT_THROW((PagedKvCache<SmallSketch>(capped)), ConfigError);
  EXPECT_THROW((PagedKvCache<Clustered>(capped)), ConfigError);
}

// ---- both: state that survives what happens to a cache --------------------------------------------------------------

template <class Policy>
class Residual : public testing::Test {};
using Policies = testing::Types<Clustered, SmallSketch>;
TYPED_TEST_SUITE(Residual, Policies);

TYPED_TEST(Residual, IsDenseToTheBitWithinTheBudget) {
  const CacheConfig config = config_of(4, 12);
  const Rows rows(48, config, 1);
  PagedKvCache<TypeParam> cache(config);
  PagedKvCache<Dense> dense(config);
  for (std::size_t t = 0; t < rows.tokens; ++t) {
    append(cache, rows, t);
    append(dense, rows, t);
    ASSERT_EQ(ask(cache, rows, t), ask(dense, rows, t)) << "token " << t;
  }
}

TYPED_TEST(Residual, GoesOnThroughDraftsForksAndSnapshots) {
  CacheConfig config = config_of(4, 6);
  config.max_speculative = 6;
  const Rows rows(140, config, 8);
  PagedKvCache<TypeParam> plain(config);
  PagedKvCache<TypeParam> drafted(config);
  for (std::size_t t = 0; t + 10 < rows.tokens; ++t) {
    append(plain, rows, t);
    append(drafted, rows, t);
    const Position length = drafted.next_position();
    const auto one = [&](std::span<const float> row) {
      return TokenRows<const float>(row.data(), 1, config.kv_heads, config.head_dim);
    };
    for (std::size_t draft = 0; draft < 6; ++draft) {
      ASSERT_TRUE(drafted.append_draft(one(rows.token_k(t + draft + 3)), one(rows.token_v(t + draft + 3))).ok());
    }
    ask(drafted, rows, t + 5);
    ASSERT_TRUE(drafted.truncate(length).ok());
    if (t == 70) {
      std::stringstream saved;
      save(drafted, saved);
      PagedKvCache<TypeParam> loaded(config);
      load(loaded, saved);
      drafted = loaded.fork();
    }
    ASSERT_EQ(ask(drafted, rows, t), ask(plain, rows, t)) << "token " << t;
  }
}

TYPED_TEST(Residual, ForgetsWhatWasCleared) {
  const CacheConfig config = config_of(4, 6);
  const Rows rows(60, config, 8);
  PagedKvCache<TypeParam> used(config);
  for (std::size_t t = 0; t < rows.tokens; ++t) append(used, rows, t);
  used.clear();
  PagedKvCache<TypeParam> fresh(config);
  for (std::size_t t = 0; t < rows.tokens; ++t) {
    append(used, rows, t);
    append(fresh, rows, t);
    ASSERT_EQ(ask(used, rows, t), ask(fresh, rows, t)) << "token " << t;
  }
}

}  // namespace
}  // namespace kvsparse_test
