// SPDX-License-Identifier: Apache-2.0
#include "kvsparse/core/softmax_state.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "../support/random_trace.hpp"

namespace kvsparse {
namespace {

constexpr std::size_t dim = 5;
constexpr float infinity = std::numeric_limits<float>::infinity();

struct Token {
  float logit;
  std::vector<float> value;
};

/// A state that owns its accumulator.
struct OwnedState {
  std::vector<float> accumulator = std::vector<float>(dim, 0.0F);
  SoftmaxState state;

  OwnedState() { state.accumulator = accumulator.data(); }
  explicit OwnedState(std::span<const Token> tokens) : OwnedState() {
    for (const Token& token : tokens) state.max = std::max(state.max, token.logit);
    for (const Token& token : tokens) {
      const float weight = std::exp(token.logit - state.max);
      state.sum += weight;
      for (std::size_t i = 0; i < dim; ++i) accumulator[i] += weight * token.value[i];
    }
  }
  OwnedState(const OwnedState& other) : accumulator(other.accumulator), state(other.state) {
    state.accumulator = accumulator.data();
  }

  std::vector<float> mean() const {
    std::vector<float> out(dim, -1.0F);
    normalise(state, out.data(), dim);
    return out;
  }
};

OwnedState merged(const OwnedState& a, const OwnedState& b) {
  OwnedState result(a);
  merge(result.state, b.state, dim);
  return result;
}

void expect_close(const OwnedState& a, const OwnedState& b) {
  EXPECT_NEAR(a.state.log_sum_exp(), b.state.log_sum_exp(), 1e-5F);
  for (std::size_t i = 0; i < dim; ++i) EXPECT_NEAR(a.mean()[i], b.mean()[i], 1e-5F);
}

std::vector<Token> random_tokens(std::size_t count, std::uint64_t seed, double spread) {
  kvsparse_test::TestRng rng(seed);
  std::vector<Token> tokens(count);
  for (Token& token : tokens) {
    token.logit = static_cast<float>(spread * rng.gaussian());
    for (std::size_t i = 0; i < dim; ++i) token.value.push_back(static_cast<float>(rng.gaussian()));
  }
  return tokens;
}

TEST(SoftmaxState, MergingPartsInAnyGroupingGivesTheWhole) {
  for (const double spread : {1.0, 30.0}) {
    const std::vector<Token> tokens = random_tokens(30, 7, spread);
    const std::span<const Token> all(tokens);
    const OwnedState whole(all);
    const OwnedState a(all.first(3));
    const OwnedState b(all.subspan(3, 20));
    const OwnedState c(all.subspan(23));
    expect_close(merged(merged(a, b), c), whole);
    expect_close(merged(a, merged(b, c)), whole);
    expect_close(merged(c, merged(b, a)), whole);
  }
}

TEST(SoftmaxState, MergingAnEmptyStateChangesNoBit) {
  const std::vector<Token> tokens = random_tokens(9, 8, 2.0);
  const OwnedState state(tokens);
  const OwnedState after = merged(state, OwnedState{});
  EXPECT_EQ(after.state.max, state.state.max);
  EXPECT_EQ(after.state.sum, state.state.sum);
  EXPECT_EQ(after.accumulator, state.accumulator);
}

TEST(SoftmaxState, MergingIntoAnEmptyStateCopiesTheOther) {
  const std::vector<Token> tokens = random_tokens(9, 9, 2.0);
  const OwnedState state(tokens);
  const OwnedState after = merged(OwnedState{}, state);
  EXPECT_EQ(after.state.max, state.state.max);
  EXPECT_EQ(after.state.sum, state.state.sum);
  EXPECT_EQ(after.accumulator, state.accumulator);
}

TEST(SoftmaxState, TwoEmptyStatesStayEmpty) {
  const OwnedState empty = merged(OwnedState{}, OwnedState{});
  EXPECT_EQ(empty.state.sum, 0.0F);
  EXPECT_EQ(empty.state.log_sum_exp(), -infinity);
  EXPECT_EQ(empty.mean(), std::vector<float>(dim, 0.0F));
}

TEST(SoftmaxState, AStateFarBelowTheOtherVanishesWithoutNan) {
  const std::vector<Token> high = {{1000.0F, {1, 2, 3, 4, 5}}};
  const std::vector<Token> low = {{-1000.0F, {9, 9, 9, 9, 9}}};
  for (const OwnedState& state :
       {merged(OwnedState(high), OwnedState(low)), merged(OwnedState(low), OwnedState(high))}) {
    EXPECT_EQ(state.mean(), high[0].value);
    EXPECT_EQ(state.state.log_sum_exp(), 1000.0F);
  }
}

}  // namespace
}  // namespace kvsparse
