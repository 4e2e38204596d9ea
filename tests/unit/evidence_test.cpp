// SPDX-License-Identifier: Apache-2.0
#include "kvsparse/policy/evidence.hpp"

#include <gtest/gtest.h>

#include <vector>

namespace kvsparse {
namespace {

// Three pages, two query heads; page 1 was read by the second head alone, page 2 by nobody.
const std::vector<float> mass = {0.75F, 0.5F, -1.0F, 0.25F, -1.0F, -1.0F};
const std::vector<float> largest = {0.5F, 0.25F, 0.0F, 0.125F, 0.0F, 0.0F};
const std::vector<float> weights = {0.5F, 0.25F, 0.25F, 0.25F, 0.0F, 0.0F, 0.125F, 0.125F, 0.0F, 0.0F, 0.0F, 0.0F};
const std::vector<float> log_sums = {1.0F, 2.0F};

Evidence evidence() {
  return Evidence({Position{41}, true, QueryGroup{nullptr, 2, 8, 8, 1.0F}, 3, 2, mass.data(), largest.data(),
                   weights.data(), log_sums.data()});
}

TEST(Evidence, APageThatWasNotVisitedIsUnknownNotZero) {
  const Evidence step = evidence();
  EXPECT_TRUE(step.visited(PageIndex{0}, 0));
  EXPECT_FALSE(step.visited(PageIndex{1}, 0));
  EXPECT_TRUE(step.visited(PageIndex{1}, 1));
  EXPECT_TRUE(step.visited(PageIndex{1}));
  EXPECT_FALSE(step.visited(PageIndex{2}));
}

TEST(Evidence, GroupAndPeakMassGoOverTheHeadsThatVisited) {
  const Evidence step = evidence();
  EXPECT_EQ(step.group(), 2U);
  EXPECT_EQ(step.group_mass(PageIndex{0}), 1.25F);
  EXPECT_EQ(step.peak_mass(PageIndex{0}), 0.75F);
  EXPECT_EQ(step.group_mass(PageIndex{1}), 0.25F);
  EXPECT_EQ(step.peak_mass(PageIndex{1}), 0.25F);
  EXPECT_EQ(step.group_mass(PageIndex{2}), 0.0F);
}

TEST(Evidence, TokenNumbersAreFoundByPageAndQuery) {
  const Evidence step = evidence();
  EXPECT_EQ(step.position(), Position{41});
  EXPECT_TRUE(step.is_prompt());
  EXPECT_EQ(step.largest_token_mass(PageIndex{1}, 1), 0.125F);
  EXPECT_EQ(step.token_weights(PageIndex{0}, 1)[0], 0.25F);
  EXPECT_EQ(step.token_weights(PageIndex{1}, 1).size(), 2U);
  EXPECT_EQ(step.token_weights(PageIndex{1}, 1)[1], 0.125F);
  EXPECT_EQ(step.log_sum_exp(1), 2.0F);
}

TEST(Evidence, KindsCombineAndAreAskedForOneByOne) {
  constexpr EvidenceKind both = EvidenceKind::page_mass | EvidenceKind::token_weights;
  static_assert(asks_for(both, EvidenceKind::page_mass) && asks_for(both, EvidenceKind::token_weights));
  static_assert(!asks_for(both, EvidenceKind::largest_token_mass));
  static_assert(!asks_for(EvidenceKind::none, EvidenceKind::page_mass));
}

}  // namespace
}  // namespace kvsparse
