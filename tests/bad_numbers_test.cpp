// SPDX-License-Identifier: Apache-2.0
//
// Keys, queries and values that are no numbers, or no reasonable ones, under every policy: whatever comes, the budget
// and the pins hold, nothing loops, and an answer is that of the softmax over what was read, NaN where that is NaN.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iostream>
#include <iterator>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/named_cache.hpp"
#include "support/policy_kinds.hpp"
#include "support/row_stock.hpp"
#include "support/rows.hpp"

namespace kvsparse_test {
namespace {

using namespace kvsparse;
using kvsparse_tools::named_cache;

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float nan = std::numeric_limits<float>::quiet_NaN();
constexpr std::size_t page_size = 4;
constexpr std::size_t prompt_tokens = 6;

/// Options that policies need for a small budget; and those that decide by other numbers, where there are any.
std::vector<OptionSetting> settings_of(std::string_view policy, bool by_other_numbers = false) {
  const std::vector<std::string> keys = policy_facts(policy).option_keys;
  std::vector<OptionSetting> settings = short_periods(keys, small_lag);
  for (const std::string& key : keys) {
    if (key == "used" && by_other_numbers) settings.push_back({key, "rank"});
    if (key == "evidence" && by_other_numbers) settings.push_back({key, "quest_bound"});
  }
  return settings;
}

struct Promises {
  bool evicts = false;
  bool shares_budget = false;
  bool pins_prompt = false;
  bool reads_single_tokens = false;
};
Promises promises_of(std::string_view policy) {
  Promises promises;
  detail::visit_policies(NamedPolicies{}, [&]<class Policy>() {
    if (Policy::name != policy) return;
    const PolicyFacts facts = policy_facts<Policy>();
    promises.evicts = facts.evicts;
    promises.shares_budget = facts.shares_budget;
    promises.pins_prompt = facts.evicts && traits::pin_prompt(Policy{});
    promises.reads_single_tokens = traits::granularity<Policy>() == PolicyGranularity::token;
  });
  return promises;
}

CacheConfig config_for(std::string_view policy) {
  CacheConfig config;
  config.kv_heads = 2;
  // The exact oracle reads other tokens for each query head; read_positions() are those of all.
  config.query_heads = policy.find("oracle") == std::string_view::npos ? 4 : 2;
  config.head_dim = 8;
  config.page_size = page_size;
  config.budget_tokens = 4 * page_size;
  config.read_budget_tokens = 2 * page_size;
  config.max_tokens = 64;
  return config;
}

/// NaN for NaN, an infinity for the same infinity, and numbers to float's precision beside the largest of them.
void expect_same(double expected, float got, double size, const std::string& what) {
  if (std::isnan(expected)) {
    EXPECT_TRUE(std::isnan(got)) << what << " is " << got << ", not NaN";
  } else if (std::isinf(expected)) {
    EXPECT_EQ(static_cast<double>(got), expected) << what;
  } else {
    EXPECT_NEAR(static_cast<double>(got), expected, 1e-4 * (1.0 + size)) << what;
  }
}

struct Trouble {
  std::string_view name;
  void (*spoil)(Rows& rows);
  /// Dot products fit a float, so that the answer is known. (Where they do not, only the promises are checked.)
  bool comparable = true;
  bool in_values = false;
};

void scale(std::vector<float>& rows, float factor) {
  for (float& element : rows) element *= factor;
}
/// Every seventh token, of the prompt and later; one of its heads, or one of its elements.
template <class Visit>
void visit_some_tokens(const Rows& rows, Visit&& visit) {
  for (std::size_t t = 2; t < rows.tokens; t += 7) visit(t, t % 2);
}
void spoil_keys(Rows& rows, float value) {
  visit_some_tokens(rows, [&](std::size_t t, std::size_t head) {
    rows.k[(t * rows.kv_heads + head) * rows.head_dim + t % rows.head_dim] = value;
  });
}
void spoil_values(Rows& rows, float value) {
  visit_some_tokens(rows, [&](std::size_t t, std::size_t head) {
    rows.v[(t * rows.kv_heads + head) * rows.head_dim + t % rows.head_dim] = value;
  });
}
void spoil_queries(Rows& rows, float value) {
  visit_some_tokens(rows, [&](std::size_t t, std::size_t head) {
    rows.q[(t * rows.query_heads + head) * rows.head_dim + t % rows.head_dim] = value;
  });
}

const Trouble troubles[] = {
    {"nothing", [](Rows&) {}},
    {"NaN in keys", [](Rows& rows) { spoil_keys(rows, nan); }},
    {"infinity in keys", [](Rows& rows) { spoil_keys(rows, infinity); }},
    {"-infinity in keys", [](Rows& rows) { spoil_keys(rows, -infinity); }},
    {"keys that are all NaN", [](Rows& rows) { std::fill(rows.k.begin(), rows.k.end(), nan); }},
    {"NaN in values", [](Rows& rows) { spoil_values(rows, nan); }, true, true},
    {"infinity in values", [](Rows& rows) { spoil_values(rows, infinity); }, true, true},
    {"-infinity in values", [](Rows& rows) { spoil_values(rows, -infinity); }, true, true},
    {"NaN in queries", [](Rows& rows) { spoil_queries(rows, nan); }},
    {"infinity in queries", [](Rows& rows) { spoil_queries(rows, infinity); }},
    {"queries that are all NaN", [](Rows& rows) { std::fill(rows.q.begin(), rows.q.end(), nan); }},
    {"queries that are all infinite", [](Rows& rows) { std::fill(rows.q.begin(), rows.q.end(), infinity); }},
    {"logits of minus infinity alone",
     [](Rows& rows) {
       std::fill(rows.q.begin(), rows.q.end(), 1.0F);
       std::fill(rows.k.begin(), rows.k.end(), -infinity);
     }},
    {"denormals",
     [](Rows& rows) {
       for (std::vector<float>* of : {&rows.q, &rows.k, &rows.v}) scale(*of, 1e-40F);
     }},
    {"huge keys", [](Rows& rows) { scale(rows.k, 1e15F); }},
    {"huge queries", [](Rows& rows) { scale(rows.q, 1e15F); }},
    {"huge values", [](Rows& rows) { scale(rows.v, 1e30F); }, true, true},
    {"products beyond a float",
     [](Rows& rows) {
       scale(rows.q, 1e30F);
       scale(rows.k, 1e30F);
     },
     false},
    {"zero keys", [](Rows& rows) { scale(rows.k, 0.0F); }},
    {"zero queries", [](Rows& rows) { scale(rows.q, 0.0F); }},
    {"zero values", [](Rows& rows) { scale(rows.v, 0.0F); }},
    {"keys that are all equal",
     [](Rows& rows) {
       const std::size_t row = rows.kv_heads * rows.head_dim;
       for (std::size_t i = row; i < rows.k.size(); ++i) rows.k[i] = rows.k[i - row];
     }},
    {"queries orthogonal to every key",
     [](Rows& rows) {
       for (std::size_t i = 0; i < rows.k.size(); i += 2) rows.k[i] = 0.0F;
       for (std::size_t i = 1; i < rows.q.size(); i += 2) rows.q[i] = 0.0F;
     }},
};

Rows stored(const Rows& rows, ScalarType scalar) {
  return with_scalar(scalar, [&]<class Scalar>() { return rows.stored_as<Scalar>(); });
}

constexpr ScalarType scalars[] = {ScalarType::f32, ScalarType::f16, ScalarType::bf16, ScalarType::int8};

std::size_t answers = 0;  // of query heads that were asked
struct CountAnswers : testing::Environment {
  void TearDown() override { std::cout << answers << " answers\n"; }
};
[[maybe_unused]] const auto* const count_answers = testing::AddGlobalTestEnvironment(new CountAnswers);

/// Appends and attends all tokens, the first ones a prompt, and holds the cache to its promises after each.
class Decode {
 public:
  Decode(std::string_view policy, ScalarType scalar, const CacheConfig& config, std::vector<OptionSetting> settings)
      : config_(config),
        scalar_(scalar),
        promises_(promises_of(policy)),
        answers_for_the_gone_(answers_for_the_gone(policy)),
        cache_(named_cache(policy, scalar, config, settings)) {}

  AnyCache& cache() { return cache_; }

  /// comparable: the exact softmax over what was read is known.
  void run(const Rows& rows, std::size_t prompt, bool comparable) {
    const Rows as_stored = stored(rows, scalar_);
    std::vector<float> out(config_.query_heads * config_.head_dim), log_sum_exp(config_.query_heads);
    for (std::size_t t = 0; t < rows.tokens && !testing::Test::HasFailure(); ++t) {
      const auto k = rows.token_k(t), v = rows.token_v(t);
      const Status appended = t < prompt ? cache_.append_prompt(k, v) : cache_.append(k, v);
      ASSERT_TRUE(appended.ok()) << appended.message();
      expect_promises(t, std::min(prompt, t + 1));
      const Status attended = cache_.attend(rows.token_q(t), out, log_sum_exp);
      ASSERT_TRUE(attended.ok()) << attended.message();
      for (std::size_t head = 0; head < config_.query_heads; ++head) {
        ++answers;
        const std::size_t kv_head = head / (config_.query_heads / config_.kv_heads);
        std::vector<std::size_t> read;
        for (const Position position : cache_.read_positions(kv_head)) {
          read.push_back(static_cast<std::size_t>(position.value));
        }
        ASSERT_FALSE(read.empty());
        const bool is_softmax = !answers_for_the_gone_ || cache_.resident_positions(kv_head).size() == t + 1;
        if (!comparable || !is_softmax) continue;
        const ExactAttention answer = as_stored.exact(t, head, read);
        double size = 0.0;
        for (const std::size_t position : read) {
          for (const float element : as_stored.value(position, kv_head)) {
            if (std::isfinite(element)) size = std::max(size, std::fabs(static_cast<double>(element)));
          }
        }
        const std::string where = "of token " + std::to_string(t) + " and query head " + std::to_string(head);
        for (std::size_t i = 0; i < config_.head_dim; ++i) {
          expect_same(answer.out[i], out[head * config_.head_dim + i], size,
                      "element " + std::to_string(i) + " " + where);
        }
        expect_same(answer.log_sum_exp, log_sum_exp[head], std::fabs(answer.log_sum_exp), "log-sum-exp " + where);
      }
    }
  }

 private:
  void expect_promises(std::size_t token, std::size_t prompt) const {
    std::size_t of_layer = 0;
    for (std::size_t h = 0; h < config_.kv_heads; ++h) {
      const std::vector<Position> resident = cache_.resident_positions(h);
      of_layer += resident.size();
      if (!promises_.evicts) {
        ASSERT_EQ(resident.size(), token + 1);
      } else if (!promises_.shares_budget) {
        ASSERT_LE(resident.size(), config_.budget_tokens);
      }
      ASSERT_TRUE(std::is_sorted(resident.begin(), resident.end()));
      ASSERT_EQ(resident.back().value, static_cast<std::int64_t>(token));
      for (std::size_t p = 0; promises_.pins_prompt && p < prompt; ++p) {
        ASSERT_TRUE(std::binary_search(resident.begin(), resident.end(), Position{static_cast<std::int64_t>(p)}))
            << "token " << p << " of the prompt is gone";
      }
    }
    if (promises_.evicts) {
      ASSERT_LE(of_layer, config_.kv_heads * config_.budget_tokens);
    }
  }

  CacheConfig config_;
  ScalarType scalar_;
  Promises promises_;
  bool answers_for_the_gone_;
  AnyCache cache_;
};

TEST(BadNumbers, LeaveEveryPolicysPromisesAndTheSoftmaxAsTheyAre) {
  for (const std::string& policy : policy_names()) {
    // Compositions are made of parts that are tried in every storage type.
    const std::size_t types = policy.find('+') == std::string::npos ? std::size(scalars) : 1;
    for (const ScalarType scalar : std::span(scalars).first(types)) {
      const CacheConfig config = config_for(policy);
      const Rows good(30, config, 3);
      // Half of the storage types under each choice of options.
      const bool by_other_numbers = scalar == ScalarType::bf16 || scalar == ScalarType::int8;
      Decode decode(policy, scalar, config, settings_of(policy, by_other_numbers));
      for (const Trouble& trouble : troubles) {
        SCOPED_TRACE(policy + ", " + std::string(scalar_type_names[static_cast<std::size_t>(scalar)]) + ", " +
                     std::string(trouble.name));
        Rows rows = good;
        trouble.spoil(rows);
        // In a page read in part, a value left out is multiplied by zero, which is NaN if it is none.
        const bool comparable = trouble.comparable && !(trouble.in_values && promises_of(policy).reads_single_tokens);
        decode.run(rows, prompt_tokens, comparable);
        if (HasFailure()) return;
        // Nothing of them stays in the pages: the same cache answers good numbers.
        decode.cache().clear();
        decode.run(good, prompt_tokens, true);
        if (HasFailure()) return;
        decode.cache().clear();
      }
    }
  }
}

struct Shape {
  std::size_t query_heads, kv_heads, head_dim, page_size, budget_pages;
};

// Refused are only budgets of one page, where a policy says that it needs another, and pages larger than it can judge.
TEST(ExtremeShapes, OfEveryPolicyAnswerExactly) {
  for (const std::string& policy : policy_names()) {
    std::size_t accepted = 0;
    for (const Shape& shape :
         {Shape{1, 1, 1, 1, 1}, Shape{1, 1, 1, 1, 8}, Shape{1, 1, 8, 256, 1}, Shape{1, 1, 1, 256, 2},
          Shape{128, 128, 2, 4, 4}, Shape{128, 1, 4, 4, 4}, Shape{1, 1, 8, 4, 1}}) {
      // Each query head of the exact oracle reads other tokens.
      if (policy.find("oracle") != std::string::npos && shape.query_heads != shape.kv_heads) continue;
      CacheConfig config;
      config.query_heads = shape.query_heads;
      config.kv_heads = shape.kv_heads;
      config.head_dim = shape.head_dim;
      config.page_size = shape.page_size;
      config.budget_tokens = config.read_budget_tokens = shape.budget_pages * shape.page_size;
      const std::size_t tokens = shape.budget_pages * shape.page_size + 20;
      config.max_tokens = tokens;
      SCOPED_TRACE(policy + ", " + std::to_string(shape.query_heads) + " query heads over " +
                   std::to_string(shape.kv_heads) + ", head_dim " + std::to_string(shape.head_dim) + ", pages of " +
                   std::to_string(shape.page_size) + ", budget " + std::to_string(config.budget_tokens));
      std::vector<OptionSetting> settings = settings_of(policy);
      for (const std::string& key : policy_facts(policy).option_keys) {
        if (key == "sinks" && shape.budget_pages == 1) settings.push_back({key, "0"});
      }
      std::optional<Decode> decode;
      try {
        decode.emplace(policy, ScalarType::f32, config, settings);
      } catch (const ConfigError& error) {
        const std::string sentence = error.what();
        const bool lacks_a_page = shape.budget_pages == 1 && sentence.find("budget of ") != std::string::npos;
        const bool has_large_pages = sentence.find("page_size = 256 exceeds") != std::string::npos;
        EXPECT_TRUE(lacks_a_page || has_large_pages) << sentence;
        continue;
      }
      ++accepted;
      decode->run(Rows(tokens, config, 5), 0, true);
      if (HasFailure()) return;
    }
    EXPECT_GE(accepted, 3U);
  }
}

}  // namespace
}  // namespace kvsparse_test
