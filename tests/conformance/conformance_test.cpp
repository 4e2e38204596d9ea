// SPDX-License-Identifier: Apache-2.0
//
// Compositions, and policies under other options, in the suite that those of the name table go through part by part.
#include <vector>

#include "kvsparse/policy/ada_kv.hpp"
#include "kvsparse/policy/hash_attention.hpp"
#include "kvsparse/policy/hierarchical_top_k.hpp"
#include "kvsparse/policy/oracle.hpp"
#include "kvsparse/policy/quest.hpp"
#include "kvsparse/policy/raas.hpp"
#include "kvsparse/policy/snap_kv.hpp"
#include "kvsparse/policy/streaming_llm.hpp"
#include "kvsparse/policy/tova.hpp"
#include "kvsparse/testing/count_allocations.hpp"
#include "kvsparse/testing/policy_conformance.hpp"

namespace kvsparse {

using Composed = testing::Types<Compose<Raas, Quest>, Compose<Tova, HierarchicalTopK>>;
INSTANTIATE_TYPED_TEST_SUITE_P(Composed, PolicyConformance, Composed);

struct RaasByBounds {
  static Raas policy() {
    Raas policy;
    policy.options.evidence = Raas::Evidenced::quest_bound;
    policy.options.pin_prompt = false;
    return policy;
  }
};
struct QuestOfEachQueryHead {
  using Key = float;
  static Quest policy() {
    Quest policy;
    policy.options.pool = Quest::Pool::query_head;
    return policy;
  }
};
struct StreamingInCache {
  using Value = Bfloat16;
  static StreamingLlm policy() {
    StreamingLlm policy;
    policy.options.in_cache_positions = true;
    return policy;
  }
};
struct VotingAgain {
  static SnapKv policy() {
    SnapKv policy;
    policy.options.window = 3;
    policy.options.period = 5;
    return policy;
  }
};
struct UnevenHeads {
  static AdaKv policy() {
    AdaKv policy;
    policy.options.window = 4;
    policy.options.safeguard = 0.0;
    return policy;
  }
};
using UnderOptions = testing::Types<RaasByBounds, QuestOfEachQueryHead, StreamingInCache, VotingAgain, UnevenHeads>;
INSTANTIATE_TYPED_TEST_SUITE_P(UnderOptions, PolicyConformance, UnderOptions);

/// Whose weights belong to a model, so that no shape of the suite suits it.
TEST(HashAttention, LearnedHyperplanesOfAnotherSizeAreRefused) {
  BasicHashAttention<LearnedHyperplanes> policy;
  const Geometry geometry{.query_heads = 4, .kv_heads = 2, .head_dim = 8, .page_size = 4};
  EXPECT_EQ(traits::geometry_problem(policy, geometry), "its 0 weights are not 32 rows of head_dim = 8");
  const std::vector<float> weights(32 * 8, 0.5F);
  policy.options.weights = weights;
  EXPECT_EQ(traits::geometry_problem(policy, geometry), "");
  policy.options.weights = std::span(weights).first(31 * 8);
  EXPECT_NE(traits::geometry_problem(policy, geometry), "");
}

}  // namespace kvsparse
