// SPDX-License-Identifier: Apache-2.0
//
// The replay that a policy's author looks at, on a layer small enough to do by hand.
#include "kvsparse/testing/policy_replay.hpp"

#include <gtest/gtest.h>

#include <limits>
#include <new>
#include <sstream>
#include <string>
#include <vector>

#include "kvsparse/policy/dense.hpp"

namespace kvsparse_test {
namespace {

using namespace kvsparse;

struct OldestFirst {
  static constexpr std::string_view name = "oldest_first";
  PageIndex victim(HeadView<OldestFirst>) const { return PageIndex{0}; }
};

/// Queries of zeros: every token weighs the same. Token t has the value t + 1.
LayerTrace four_equal_tokens() {
  LayerTrace layer{.tokens = 4, .head_dim = 1};
  layer.q.assign(4, 0.0F);
  layer.k.assign(4, 1.0F);
  layer.v = {1.0F, 2.0F, 3.0F, 4.0F};
  return layer;
}

TEST(PolicyReplay, SharesAndErrorsAreThoseComputedByHand) {
  const ReplayRow row = replay<OldestFirst>(four_equal_tokens(), 2, 1);
  EXPECT_EQ(row.refused, "");
  EXPECT_NEAR(row.share, (1.0 + 1.0 + 2.0 / 3.0 + 2.0 / 4.0) / 4.0, 1e-12);
  EXPECT_NEAR(row.mean_error, (0.0 + 0.0 + (2.5 - 2.0) / 2.0 + (3.5 - 2.5) / 2.5) / 4.0, 1e-6);
  EXPECT_EQ(row.evicted_tokens, 2U);
}

TEST(PolicyReplay, PromptQueriesDoNotCount) {
  LayerTrace layer = four_equal_tokens();
  layer.prompt_tokens = 3;
  EXPECT_NEAR(replay<OldestFirst>(layer, 2, 1).share, 2.0 / 4.0, 1e-12);
}

/// Means over no query would be no numbers.
TEST(PolicyReplay, ALayerWithoutDecodingIsRefused) {
  LayerTrace layer = four_equal_tokens();
  layer.prompt_tokens = 4;
  EXPECT_EQ(replay<OldestFirst>(layer, 2, 1).refused, "a prompt of 4 tokens leaves none of 4 to decode");
  EXPECT_THROW(static_cast<void>(milestone_layer(48)), ConfigError);
  EXPECT_THROW(static_cast<void>(milestone_layer(0)), ConfigError);
  EXPECT_EQ(replay<OldestFirst>(milestone_layer(49), 64, 4).refused, "");
}

TEST(PolicyReplay, DenseLosesNothingOfTheSyntheticLayer) {
  const LayerTrace layer = milestone_layer(200);
  const ReplayRow row = replay<Dense>(layer, 16, 4);
  EXPECT_NEAR(row.share, 1.0, 1e-9);
  EXPECT_LT(row.mean_error, 1e-5);
  EXPECT_EQ(row.evicted_tokens, 0U);
  EXPECT_EQ(layer.q, milestone_layer(200).q);
  EXPECT_NE(layer.q, milestone_layer(200, 2).q);
}

TEST(PolicyReplay, ARefusedBudgetLeavesAGapAndTheReason) {
  const std::vector<ReplayRow> rows = replay_each<OldestFirst, Dense>(four_equal_tokens(), {1, 2}, 2);
  ASSERT_EQ(rows.size(), 4U);
  EXPECT_EQ(rows[0].refused,
            "budget_tokens = 1 holds no page of 2 tokens; policy oldest_first needs at least one page");
  std::ostringstream table, csv;
  print_table(table, rows);
  EXPECT_NE(table.str().find(rows[0].refused), std::string::npos);
  write_csv(csv, rows);
  EXPECT_EQ(csv.str().substr(0, csv.str().find("oldest_first,2")),
            "policy,budget_tokens,share,mean_error,evicted_tokens\noldest_first,1,,,0\n");
}

/// The program's operator new is that of count_allocations.hpp.
TEST(CountAllocations, WhatIsTooLargeToBeAlignedIsRefused) {
  constexpr std::align_val_t cache_line{64};
  volatile std::size_t size = std::numeric_limits<std::size_t>::max() - 10;
  EXPECT_THROW(::operator delete(::operator new(size, cache_line), cache_line), std::bad_alloc);
}

}  // namespace
}  // namespace kvsparse_test
