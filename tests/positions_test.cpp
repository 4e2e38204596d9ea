// SPDX-License-Identifier: Apache-2.0
//
// In-cache positions against a dense recomputation: keys kept unrotated, rotated in double at their place in the cache.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <string>
#include <vector>

#include "kvsparse/cache/attend.hpp"
#include "kvsparse/policy/compose.hpp"
#include "kvsparse/policy/dense.hpp"
#include "kvsparse/policy/quest.hpp"
#include "kvsparse/policy/streaming_llm.hpp"
#include "support/rows.hpp"

namespace kvsparse_test {
namespace {

using namespace kvsparse;

/// The row of a token that stands at `position`, by the definitions: pairs of dimensions are complex numbers.
std::vector<double> rotated(std::span<const float> row, const Rope& rope, double position) {
  std::vector<double> result(row.begin(), row.end());
  const std::size_t dims = rope.rotary_dims == 0 ? row.size() : rope.rotary_dims;
  for (std::size_t pair = 0; pair < dims / 2; ++pair) {
    double wavelength = 2.0 * std::numbers::pi * std::pow(rope.theta, double(2 * pair) / double(dims));
    if (rope.scaling == RopeScaling::linear) wavelength *= rope.factor;
    if (rope.scaling == RopeScaling::llama3) {
      const double longest_kept = rope.original_positions / rope.high_freq_factor;
      const double shortest_stretched = rope.original_positions / rope.low_freq_factor;
      if (wavelength > shortest_stretched) {
        wavelength *= rope.factor;
      } else if (wavelength >= longest_kept) {
        const double smooth = (rope.original_positions / wavelength - rope.low_freq_factor) /
                              (rope.high_freq_factor - rope.low_freq_factor);
        wavelength = 1.0 / ((1.0 - smooth) / (rope.factor * wavelength) + smooth / wavelength);
      }
    }
    const bool halves = rope.layout == RopeLayout::halves;
    const std::size_t a = halves ? pair : 2 * pair;
    const std::size_t b = halves ? pair + dims / 2 : 2 * pair + 1;
    const double angle = 2.0 * std::numbers::pi * position / wavelength;
    result[a] = static_cast<double>(row[a]) * std::cos(angle) - static_cast<double>(row[b]) * std::sin(angle);
    result[b] = static_cast<double>(row[b]) * std::cos(angle) + static_cast<double>(row[a]) * std::sin(angle);
  }
  return result;
}

std::vector<float> as_floats(const std::vector<double>& row) { return {row.begin(), row.end()}; }

/// All heads' rows of a token, rotated at its position, as an engine hands them over.
std::vector<float> rotated_heads(std::span<const float> rows, std::size_t head_dim, const Rope& rope, std::size_t t) {
  std::vector<float> result;
  for (std::size_t first = 0; first < rows.size(); first += head_dim) {
    for (const double x : rotated(rows.subspan(first, head_dim), rope, static_cast<double>(t))) {
      result.push_back(static_cast<float>(x));
    }
  }
  return result;
}

/// Query head `head` of token t over the tokens at `positions`, each at its place in that list, the query at the last.
ExactAttention exact_in_cache(const Rows& rows, const Rope& rope, std::size_t t, std::size_t head,
                              const std::vector<std::size_t>& positions) {
  const std::size_t kv_head = head / (rows.query_heads / rows.kv_heads);
  const std::vector<float> q = as_floats(rotated(rows.query(t, head), rope, static_cast<double>(positions.size() - 1)));
  return exact_attention(
      q, positions.size(),
      [&](std::size_t i) { return rotated(rows.key(positions[i], kv_head), rope, static_cast<double>(i)); },
      [&](std::size_t i) { return rows.value(positions[i], kv_head); }, rows.scale());
}

template <class Cache>
std::vector<std::size_t> resident_up_to(const Cache& cache, std::size_t kv_head, std::size_t t) {
  std::vector<std::size_t> positions;
  for (const Position position : cache.resident_positions(kv_head)) {
    if (static_cast<std::size_t>(position.value) <= t) positions.push_back(static_cast<std::size_t>(position.value));
  }
  return positions;
}

CacheConfig streaming_config(const Rope& rope) {
  CacheConfig config{.query_heads = 6, .kv_heads = 2, .head_dim = 12, .page_size = 4, .budget_tokens = 40};
  config.rope = rope;
  return config;
}

StreamingLlm in_cache(std::size_t sinks = 4) {
  StreamingLlm policy;
  policy.options.sinks = sinks;
  policy.options.in_cache_positions = true;
  return policy;
}

/// Every query of 150 tokens, the first `prompt` of them a prompt that comes in chunks of `chunk`.
void check(const CacheConfig& config, const StreamingLlm& policy, std::size_t prompt, std::size_t chunk) {
  constexpr std::size_t tokens = 150;
  const Rows rows(tokens, config, 11);
  const std::size_t q_row = config.query_heads * config.head_dim;
  PagedKvCache<StreamingLlm> cache(config, policy);
  std::vector<float> q, k, out(tokens * q_row);
  for (std::size_t t = 0; t < tokens; ++t) {
    const std::vector<float> q_of_token = rotated_heads(rows.token_q(t), config.head_dim, config.rope, t);
    const std::vector<float> k_of_token = rotated_heads(rows.token_k(t), config.head_dim, config.rope, t);
    q.insert(q.end(), q_of_token.begin(), q_of_token.end());
    k.insert(k.end(), k_of_token.begin(), k_of_token.end());
  }
  const std::size_t k_row = config.kv_heads * config.head_dim;
  for (std::size_t first = 0; first < tokens;) {
    const std::size_t count = first < prompt ? std::min(chunk, prompt - first) : 1;
    const auto keys = std::span<const float>(k).subspan(first * k_row, count * k_row);
    const auto values = std::span<const float>(rows.v).subspan(first * k_row, count * k_row);
    if (first < prompt) {
      ASSERT_TRUE(cache.append_prompt(keys, values).ok());
      ASSERT_TRUE(
          attend_prompt(cache,
                        TokenRows<const float>(q.data() + first * q_row, count, config.query_heads, config.head_dim),
                        TokenRows<float>(out.data() + first * q_row, count, config.query_heads, config.head_dim))
              .ok());
    } else {
      ASSERT_TRUE(cache.append(keys, values).ok());
      ASSERT_TRUE(attend(cache, std::span<const float>(q).subspan(first * q_row, q_row),
                         std::span<float>(out).subspan(first * q_row, q_row))
                      .ok());
    }
    for (std::size_t t = first; t < first + count; ++t) {
      for (std::size_t head = 0; head < config.query_heads; ++head) {
        const auto positions = resident_up_to(cache, head / (config.query_heads / config.kv_heads), t);
        ASSERT_EQ(positions.back(), t);
        const ExactAttention exact = exact_in_cache(rows, config.rope, t, head, positions);
        for (std::size_t i = 0; i < config.head_dim; ++i) {
          ASSERT_NEAR(static_cast<double>(out[t * q_row + head * config.head_dim + i]), exact.out[i], 3e-5)
              << "token " << t << ", query head " << head;
        }
      }
    }
    first += count;
  }
  EXPECT_LT(resident_up_to(cache, 0, tokens).size(), tokens / 2) << "nothing was evicted";
}

TEST(InCachePositions, AreThoseOfADenseRecomputationForEverySink) {
  for (const std::size_t sinks : {0U, 1U, 4U, 9U}) {
    SCOPED_TRACE(sinks);
    check(streaming_config({.theta = 10000.0}), in_cache(sinks), 0, 1);
  }
}

TEST(InCachePositions, ForEveryKindOfRotaryEmbedding) {
  const Rope linear{.theta = 10000.0, .scaling = RopeScaling::linear, .factor = 4.0};
  // With 200 positions in training and 12 dimensions, some pairs are kept, some stretched and one is blended.
  const Rope llama3{.theta = 500.0,
                    .scaling = RopeScaling::llama3,
                    .factor = 8.0,
                    .low_freq_factor = 1.0,
                    .high_freq_factor = 4.0,
                    .original_positions = 200.0};
  const Rope partial{.theta = 10000.0, .rotary_dims = 6};
  const Rope interleaved{.theta = 500000.0, .layout = RopeLayout::interleaved};
  const Rope both{.theta = 10000.0, .rotary_dims = 4, .layout = RopeLayout::interleaved};
  for (const Rope& rope : {linear, llama3, partial, interleaved, both}) {
    check(streaming_config(rope), in_cache(), 0, 1);
    if (testing::Test::HasFatalFailure()) return;
  }
}

TEST(InCachePositions, WithAPromptInChunksPinnedOrUnpinnedFromTheMiddle) {
  check(streaming_config({.theta = 10000.0}), in_cache(), 70, 6);
  StreamingLlm pinned = in_cache();
  pinned.options.pin_prompt = true;
  check(streaming_config({.theta = 10000.0}), pinned, 18, 6);
  CacheConfig config = streaming_config({.theta = 10000.0});
  config.prompt_overflow = PromptOverflow::unpin_middle;  // gaps between the prompt's pages too
  check(config, pinned, 60, 3);
}

TEST(InCachePositions, BelowTheBudgetAreTruePositionsToTheBit) {
  CacheConfig config = streaming_config({.theta = 10000.0});
  const Rows rows(40, config, 3);
  config.max_tokens = 40;
  PagedKvCache<StreamingLlm> streaming(config, in_cache());
  PagedKvCache<Dense> dense(config);
  std::vector<float> a(72), b(72);
  for (std::size_t t = 0; t < 40; ++t) {
    ASSERT_TRUE(streaming.append(rows.token_k(t), rows.token_v(t)).ok());
    ASSERT_TRUE(dense.append(rows.token_k(t), rows.token_v(t)).ok());
    ASSERT_TRUE(attend(streaming, rows.token_q(t), a).ok());
    ASSERT_TRUE(attend(dense, rows.token_q(t), b).ok());
    ASSERT_EQ(a, b);
  }
}

/// The outputs of the last 8 tokens of a stream that repeats itself every 8 tokens, half precision.
std::vector<float> end_of_stream(const StreamingLlm& policy, std::size_t tokens) {
  CacheConfig config{.query_heads = 2, .kv_heads = 1, .head_dim = 16, .page_size = 4, .budget_tokens = 64};
  config.rope.theta = 10000.0;
  const Rows rows(8, config, 5, 3.0);
  PagedKvCache<StreamingLlm, Half> cache(config, policy);
  std::vector<float> ends, out(32);
  for (std::size_t t = 0; t < tokens; ++t) {
    EXPECT_TRUE(cache.append(rotated_heads(rows.token_k(t % 8), 16, config.rope, t), rows.token_v(t % 8)).ok());
    EXPECT_TRUE(attend(cache, rotated_heads(rows.token_q(t % 8), 16, config.rope, t), out).ok());
    for (const float x : out) EXPECT_TRUE(std::isfinite(x));
    if (t + 8 >= tokens) ends.insert(ends.end(), out.begin(), out.end());
  }
  return ends;
}

float largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  float largest = 0.0F;
  for (std::size_t i = 0; i < a.size(); ++i) largest = std::max(largest, std::fabs(a[i] - b[i]));
  return largest;
}

TEST(InCachePositions, AHundredThousandTokensOnAStreamIsWhatItWasAtTheFirstThousand) {
  const std::vector<float> early = end_of_stream(in_cache(), 1000);
  EXPECT_LT(largest_difference(end_of_stream(in_cache(), 100000), early), 5e-3F);  // what half precision rounds
  StreamingLlm true_positions;
  EXPECT_GT(largest_difference(end_of_stream(true_positions, 100000), end_of_stream(true_positions, 1000)), 5e-2F)
      << "the test could not tell the difference";
}

// --------------------------------------------------------------------------------------------------- what is refused

template <class Policy>
std::string refusal(const CacheConfig& config, const Policy& policy) {
  try {
    const PagedKvCache<Policy> cache(config, policy);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "not refused";
}

TEST(InCachePositionsRefused, WhereTheyCannotBeHad) {
  CacheConfig config = streaming_config({});
  EXPECT_EQ(refusal(config, in_cache()),
            "policy streaming_llm counts positions within the cache and turns queries back: it needs the model's "
            "rope.theta, which is 0");
  config.rope.theta = 10000.0;
  EXPECT_EQ(refusal(config, in_cache()), "not refused");
  config.logits.alibi_slopes.assign(6, 1.0F);
  EXPECT_EQ(refusal(config, in_cache()),
            "policy streaming_llm counts positions within the cache, ALiBi slopes those in the sequence; set one of "
            "them");
  config.logits = {.window = 20};
  EXPECT_EQ(refusal(config, in_cache()),
            "policy streaming_llm counts positions within the cache, window = 20 in the sequence; set one of them");
  config.logits = {};
  EXPECT_EQ(refusal(config, Compose<StreamingLlm, Quest>{in_cache(), {}}),
            "policy streaming_llm+quest counts positions within the cache, but scores keys by queries at their "
            "positions in the sequence");
}

TEST(RopeRefused, ValuesOutOfRange) {
  const auto problem = [](const Rope& rope, std::size_t head_dim = 12) {
    CacheConfig config = streaming_config(rope);
    config.head_dim = head_dim;
    return refusal(config, StreamingLlm{});
  };
  EXPECT_EQ(problem({.theta = -1.0}), "rope.theta = -1.000000 must be positive and finite, or 0");
  EXPECT_EQ(problem({.theta = std::nan("")}), "rope.theta = nan must be positive and finite, or 0");
  EXPECT_EQ(problem({.theta = 1e4, .rotary_dims = 14}), "rope.rotary_dims = 14 exceeds head_dim = 12");
  EXPECT_EQ(problem({.theta = 1e4}, 7), "the rotary embedding turns pairs, and its 7 dimensions are odd");
  EXPECT_EQ(problem({.theta = 1e4, .scaling = RopeScaling::linear, .factor = 0.0}),
            "rope.factor = 0.000000 must be positive and finite");
  EXPECT_EQ(problem({.theta = 1e4, .scaling = RopeScaling::llama3, .factor = 8.0, .high_freq_factor = 1.0}),
            "rope.high_freq_factor = 1.000000 must be finite and above low_freq_factor = 1.000000");
  EXPECT_EQ(problem({.theta = 1e4, .scaling = RopeScaling::llama3, .factor = 8.0, .original_positions = 0.0}),
            "rope.original_positions = 0.000000 must be positive and finite");
}

}  // namespace
}  // namespace kvsparse_test
