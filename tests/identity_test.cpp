// SPDX-License-Identifier: Apache-2.0
//
// Below its budget no policy may change a bit of what Dense computes.
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "kvsparse/interop/thread_team.hpp"
#include "support/random_trace.hpp"
#include "support/test_cache.hpp"

namespace kvsparse_test {
namespace {

using kvsparse::CacheConfig;
using kvsparse::ScalarType;

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

struct Shape {
  std::size_t query_heads, kv_heads, head_dim, page_size;
};

/// Replays `tokens` tokens, the first `prompt` as a prompt, with budgets that hold exactly the pages of all of them.
void expect_identical_to_dense(const std::string& policy, ScalarType scalar, const Shape& shape,
                               const Settings& settings = {}) {
  constexpr int tokens = 37;
  constexpr int prompt = 5;
  const std::size_t pages = (tokens + shape.page_size - 1) / shape.page_size;
  CacheConfig config;
  config.query_heads = shape.query_heads;
  config.kv_heads = shape.kv_heads;
  config.head_dim = shape.head_dim;
  config.page_size = shape.page_size;
  config.budget_tokens = config.read_budget_tokens = pages * shape.page_size;
  config.max_tokens = tokens;
  if (aims_below_budget(policy)) config.budget_tokens += config.geometry().pages_for(small_lag) * shape.page_size;
  TestCache cache(policy, scalar, config, settings);
  TestCache dense("dense", scalar, config);
  TestRng rng(shape.head_dim + shape.query_heads);
  std::vector<float> k(shape.kv_heads * shape.head_dim);
  std::vector<float> v(k.size());
  std::vector<float> q(shape.query_heads * shape.head_dim);
  std::vector<float> out(q.size());
  std::vector<float> dense_out(q.size());
  std::vector<float> lse(shape.query_heads);
  std::vector<float> dense_lse(shape.query_heads);
  for (int t = 0; t < tokens; ++t) {
    for (std::vector<float>* rows : {&k, &v, &q}) {
      for (float& element : *rows) element = static_cast<float>(1.5 * rng.gaussian());
    }
    for (TestCache* each : {&cache, &dense}) {
      const kvsparse::Status status = t < prompt ? each->append_prompt(k, v) : each->append(k, v);
      ASSERT_TRUE(status.ok()) << status.message();
    }
    ASSERT_TRUE(cache.attend(q, out, lse).ok());
    ASSERT_TRUE(dense.attend(q, dense_out, dense_lse).ok());
    ASSERT_TRUE(same_bits(out, dense_out) && same_bits(lse, dense_lse)) << "token " << t;
  }
}

class Identity : public testing::TestWithParam<std::string> {};

TEST_P(Identity, BelowTheBudgetEveryBitIsThatOfDense) {
  const Shape shapes[] = {{2, 2, 8, 3}, {3, 1, 40, 16}, {8, 2, 24, 1}, {8, 1, 64, 7}, {5, 1, 7, 16}};
  for (const ScalarType scalar : all_scalar_types) {
    for (const Shape& shape : shapes) {
      SCOPED_TRACE(std::string(name_of(scalar)) + ", group " + std::to_string(shape.query_heads / shape.kv_heads));
      expect_identical_to_dense(GetParam(), scalar, shape);
      if (HasFatalFailure()) return;
    }
  }
}

/// Heads so long that threads share them, one thread beside a team.
TEST_P(Identity, BelowTheBudgetALongHeadOnThreadsIsThatOfDenseOnOne) {
  constexpr std::size_t tokens = 2100;
  CacheConfig config{.query_heads = 3, .kv_heads = 1, .head_dim = 24, .page_size = 16, .max_tokens = tokens};
  config.budget_tokens = config.read_budget_tokens = config.geometry().pages_for(tokens) * config.page_size;
  if (aims_below_budget(GetParam())) config.budget_tokens += config.geometry().pages_for(small_lag) * config.page_size;
  TestCache cache(GetParam(), ScalarType::f16, config);
  TestCache dense("dense", ScalarType::f16, config);
  kvsparse::ThreadTeam team(2);
  TestRng rng(1);
  std::vector<float> k(24), q(72), out(72), dense_out(72), lse(3), dense_lse(3);
  for (std::size_t t = 0; t < tokens; ++t) {
    for (std::vector<float>* rows : {&k, &q}) {
      for (float& element : *rows) element = static_cast<float>(rng.gaussian());
    }
    ASSERT_TRUE(cache.append(k, k).ok() && dense.append(k, k).ok());
    if (t % 100 != 99) continue;
    ASSERT_TRUE(cache.attend(q, out, lse, team).ok());
    ASSERT_TRUE(dense.attend(q, dense_out, dense_lse).ok());
    ASSERT_TRUE(same_bits(out, dense_out) && same_bits(lse, dense_lse)) << "token " << t;
  }
}

std::string title_of(std::string name) {
  for (char& c : name) c = c == '+' ? '_' : c;
  return name;
}

/// All but those that read by a threshold or a proof, however few pages there are.
std::vector<std::string> policies_that_read_all_below_the_budget() {
  std::vector<std::string> names = policy_names();
  std::erase(names, "half_space");
  std::erase(names, "certified");
  return names;
}

INSTANTIATE_TEST_SUITE_P(Policies, Identity, testing::ValuesIn(policies_that_read_all_below_the_budget()),
                         [](const auto& instance) { return title_of(instance.param); });

TEST(IdentityOfOptions, QuestForEachQueryHeadBelowTheBudgetIsDenseToo) {
  for (const ScalarType scalar : all_scalar_types) {
    for (const Shape& shape : {Shape{3, 1, 40, 16}, Shape{8, 2, 24, 3}, Shape{8, 1, 64, 7}}) {
      expect_identical_to_dense("quest", scalar, shape, {{"pool", "query_head"}});
      expect_identical_to_dense("raas+quest", scalar, shape, {{"pool", "query_head"}, {"evidence", "quest_bound"}});
    }
  }
}

TEST(IdentityOfOptions, RaasOfThePapersBelowTheBudgetIsDenseToo) {
  for (const char* preset : {"paper_v1", "paper_v2"}) {
    for (const ScalarType scalar : all_scalar_types) {
      expect_identical_to_dense("raas", scalar, {8, 2, 24, 3}, {{"preset", preset}});
    }
  }
}

/// Pages are read in order of position wherever they lie in the pool, so what was evicted leaves no trace.
TEST(IdentityAfterEvictions, ACacheThatEvictedGivesTheBitsOfOneThatNeverHadTheRest) {
  CacheConfig config{.query_heads = 4, .kv_heads = 2, .head_dim = 24, .page_size = 4, .budget_tokens = 32};
  TestCache window("streaming_llm", ScalarType::f32, config, {{"sinks", "0"}});
  TestCache fresh("streaming_llm", ScalarType::f32, config, {{"sinks", "0"}});
  TestRng rng(1);
  std::vector<float> k(48), v(48), q(96), out(96), fresh_out(96);
  for (int t = 0; t < 64; ++t) {
    for (std::vector<float>* rows : {&k, &v, &q}) {
      for (float& element : *rows) element = static_cast<float>(rng.gaussian());
    }
    ASSERT_TRUE(window.append(k, v).ok());
    if (t >= 32) {
      ASSERT_TRUE(fresh.append(k, v).ok());
    }
  }
  ASSERT_TRUE(window.attend(q, out).ok());
  ASSERT_TRUE(fresh.attend(q, fresh_out).ok());
  EXPECT_TRUE(same_bits(out, fresh_out));
}

}  // namespace
}  // namespace kvsparse_test
