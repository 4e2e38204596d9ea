// SPDX-License-Identifier: Apache-2.0
//
// Tokens that may be rejected, and tokens taken back.
#include <gtest/gtest.h>

#include <sstream>
#include <string>
#include <vector>

#include "kvsparse/interop/snapshot.hpp"
#include "kvsparse/kvsparse.hpp"
#include "support/random_trace.hpp"
#include "support/rejected_drafts.hpp"

namespace kvsparse_test {
namespace {

using namespace kvsparse;

using namespace drafts;

/// Listens to everything, and keeps in its state an order-dependent hash of it.
struct Nosy {
  static constexpr std::string_view name = "nosy";
  static constexpr PolicyScope scope = PolicyScope::layer;
  static constexpr PolicyGranularity granularity = PolicyGranularity::token;
  static constexpr EvidenceKind evidence =
      EvidenceKind::page_mass | EvidenceKind::largest_token_mass | EvidenceKind::token_weights;
  static constexpr PageSummary page_summary = PageSummary::mean;
  static constexpr std::size_t query_window = 3;
  struct PageState {
    double hash = 1.0;
  };
  struct HeadState {
    double hash = 1.0;
  };
  struct LayerState {
    double hash = 1.0;
  };
  static void mix(double& hash, double x) { hash = std::fmod(hash * 1.37 + x * 3.1 + 0.77, 1000.0); }

  void on_page_open(HeadView<Nosy> head, PageIndex page) const {
    mix(head.head_state().hash, static_cast<double>(head.first_position(page).value));
    mix(head.state(page).hash, static_cast<double>(head.size()));
  }
  void on_append(HeadView<Nosy> head, PageIndex page, Slot slot) const {
    std::vector<float> row(head.head_dim());
    head.load_mean_key(page, row);
    mix(head.state(page).hash, static_cast<double>(row[1]) + static_cast<double>(slot.value));
    mix(head.head_state().hash, static_cast<double>(head.tokens(page)) + head.state(page).hash);
  }
  void on_page_full(HeadView<Nosy> head, PageIndex page) const { mix(head.head_state().hash, head.state(page).hash); }
  void observe(HeadView<Nosy> head, const Evidence& step) const {
    for (const PageIndex page : head.pages()) {
      for (std::size_t q = 0; q < step.group(); ++q) {
        if (!step.visited(page, q)) continue;
        double& hash = head.state(page).hash;
        mix(hash, static_cast<double>(step.mass(page, q)));
        mix(hash, static_cast<double>(step.largest_token_mass(page, q)));
        for (std::size_t t = 0; t < head.tokens(page); ++t) {
          mix(hash, static_cast<double>(step.token_weights(page, q)[t]));
        }
      }
    }
    for (std::size_t age = 0; age < head.recent_query_count(); ++age) {
      mix(head.head_state().hash, static_cast<double>(head.recent_queries(age)[1][2]));
    }
    mix(head.head_state().hash, static_cast<double>(step.log_sum_exp(0)) + static_cast<double>(step.position().value));
  }
  void on_step_end(LayerView<Nosy> layer) const {
    for (std::size_t h = 0; h < layer.heads(); ++h) mix(layer.layer_state().hash, layer.head(h).head_state().hash);
    for (std::size_t h = 0; h < layer.heads(); ++h) mix(layer.head(h).head_state().hash, layer.layer_state().hash);
  }
  PageIndex victim(LayerView<Nosy> layer) const {
    return layer.head(0).lowest_evictable([&](PageIndex page) {
      return std::fmod(layer.head(0).state(page).hash + layer.head(1).state(page).hash + layer.layer_state().hash, 7.0);
    });
  }
};

TEST(Drafts, RejectedOnesLeaveNoTraceInAPolicyThatListensToEverything) { expect_no_trace_in_any_shape<Nosy>(); }

/// Gives up the older half of what it may, now and then.
struct Halving {
  static constexpr std::string_view name = "halving";
  static constexpr std::size_t period = 5;
  void trim(HeadView<Halving> head, PageList& pages) const {
    std::size_t left = head.evictable_count() / 2;
    for (const PageIndex page : head.evictable_pages()) {
      if (left-- == 0) break;
      pages.add(page);
    }
  }
  PageIndex victim(HeadView<Halving> head) const {
    return head.lowest_evictable([&](PageIndex page) { return head.first_position(page); });
  }
};

TEST(Drafts, RejectedOnesLeaveNoTraceInAPolicyThatTrims) { expect_no_trace_in_any_shape<Halving>(); }

/// Accepted drafts are what appended tokens are, to the bit, as long as nothing is evicted.
template <class Policy>
void expect_drafts_to_equal_tokens() {
  SCOPED_TRACE(Policy::name);
  CacheConfig config = config_of(4);
  config.budget_tokens = 600;
  config.read_budget_tokens = 600;
  if (!Evictor<Policy>) config.read_budget_tokens = 12;
  PagedKvCache<Policy, Half> drafted(config), plain(config);
  TestRng rng(3);
  for (int round = 0; round < 40; ++round) {
    const auto drafts = static_cast<std::size_t>(1 + rng.below(most_drafts));
    const auto kept = static_cast<std::size_t>(rng.below(static_cast<int>(drafts) + 1));
    const Chunk chunk(rng.next(), drafts);
    const Position before = plain.next_position();
    const std::vector<float> out = draft(drafted, chunk, drafts, drafts);
    ASSERT_TRUE(drafted.truncate(before + kept).ok());
    for (std::size_t t = 0; t < kept; ++t) {
      const std::size_t kv = kv_heads * head_dim, row = query_heads * head_dim;
      ASSERT_TRUE(plain.append(std::span(chunk.k).subspan(t * kv, kv), std::span(chunk.v).subspan(t * kv, kv)).ok());
      std::vector<float> one(row);
      ASSERT_TRUE(attend(plain, std::span(chunk.q).subspan(t * row, row), one).ok());
      ASSERT_TRUE(std::equal(one.begin(), one.end(), out.begin() + static_cast<std::ptrdiff_t>(t * row)))
          << "round " << round;
    }
  }
  EXPECT_EQ(drafted.next_position(), plain.next_position());
}

TEST(Drafts, AreVerifiedToTheBitOfDecodingTokenByToken) {
  expect_drafts_to_equal_tokens<Dense>();
  expect_drafts_to_equal_tokens<Quest>();
  expect_drafts_to_equal_tokens<Raas>();
  expect_drafts_to_equal_tokens<H2o>();
  expect_drafts_to_equal_tokens<Oracle>();
}

TEST(Drafts, NothingIsEvictedOnTheirBehalfAndMemoryIsAnnounced) {
  CacheConfig config = config_of(4);
  config.budget_tokens = 24;
  PagedKvCache<StreamingLlm> cache(config);
  for (int t = 0; t < 24; ++t) static_cast<void>(step(cache, Chunk(static_cast<std::uint64_t>(t), 1)));
  const Chunk chunk(99, 7);
  ASSERT_TRUE(cache.append_draft(chunk.keys(7), chunk.values(7)).ok());
  EXPECT_EQ(cache.resident_tokens(0), 31U);
  EXPECT_EQ(cache.stats().evicted_tokens, 0U);
  ASSERT_TRUE(cache.truncate(Position{24}).ok());
  EXPECT_EQ(cache.resident_tokens(0), 24U);
  EXPECT_EQ(cache.stats().evicted_tokens, 0U);
  ASSERT_TRUE(cache.append_draft(chunk.keys(7), chunk.values(7)).ok());
  static_cast<void>(step(cache, Chunk(1, 1)));  // accepts all seven
  EXPECT_EQ(cache.next_position(), Position{32});
  EXPECT_EQ(cache.resident_tokens(0), 24U);
}

TEST(Drafts, AreRefusedWithTheLimit) {
  PagedKvCache<Raas> cache(config_of(4, 3));
  const Chunk chunk(1, 4);
  const Status many = cache.append_draft(chunk.keys(4), chunk.values(4));
  EXPECT_EQ(many.code(), Status::Code::too_many_drafts);
  EXPECT_EQ(many.message(), "4 drafts would be outstanding; max_speculative is 3");
  EXPECT_TRUE(cache.in_prompt()) << "nothing changed";
  ASSERT_TRUE(cache.append_draft(chunk.keys(2), chunk.values(2)).ok());
  EXPECT_EQ(cache.append_draft(chunk.keys(2), chunk.values(2)).code(), Status::Code::too_many_drafts);
  ASSERT_TRUE(cache.append_draft(chunk.keys(1), chunk.values(1)).ok());
  std::vector<float> out(4 * query_heads * head_dim);
  const auto outs = [&](std::size_t n) { return TokenRows<float>(out.data(), n, query_heads, head_dim); };
  ASSERT_TRUE(attend_prompt(cache, chunk.queries(3), outs(3)).ok());
  ASSERT_TRUE(attend_prompt(cache, chunk.queries(1), outs(1)).ok());
  EXPECT_EQ(attend_prompt(cache, chunk.queries(1), outs(1)).code(), Status::Code::too_many_draft_queries);
  EXPECT_EQ(cache.truncate(Position{4}).code(), Status::Code::unreachable_length);
  ASSERT_TRUE(cache.truncate(Position{1}).ok());
  const Status gone = cache.truncate(Position{0});
  EXPECT_EQ(gone.code(), Status::Code::unreachable_length);
  EXPECT_EQ(gone.message(), "length 0 is gone; the oldest reachable is 1");
  ASSERT_TRUE(attend_prompt(cache, chunk.queries(1), outs(1)).ok());
}

/// Without drafts too, where the policy remembers nothing and nothing was given up.
template <class Policy>
void expect_exact_cuts(std::size_t page_size) {
  SCOPED_TRACE(Policy::name);
  const CacheConfig config = config_of(page_size, 0);
  PagedKvCache<Policy> cut(config);
  TestRng rng(page_size);
  std::vector<std::uint64_t> seeds;
  for (int round = 0; round < 60; ++round) {
    for (int t = rng.below(12); t >= 0; --t) {
      seeds.push_back(rng.next());
      static_cast<void>(step(cut, Chunk(seeds.back(), 1)));
    }
    const std::size_t oldest = cut.oldest_reachable();
    if (oldest > 0) {
      EXPECT_EQ(cut.truncate(Position{static_cast<std::int64_t>(oldest) - 1}).limit(), oldest);
      EXPECT_EQ(cut.next_position(), Position{static_cast<std::int64_t>(seeds.size())});
    }
    const std::size_t length =
        oldest + static_cast<std::size_t>(rng.below(static_cast<int>(seeds.size() - oldest) + 1));
    ASSERT_TRUE(cut.truncate(Position{static_cast<std::int64_t>(length)}).ok());
    seeds.resize(length);
    PagedKvCache<Policy> fresh(config);
    for (const std::uint64_t seed : seeds) static_cast<void>(step(fresh, Chunk(seed, 1)));
    const std::uint64_t next = rng.next();
    ASSERT_EQ(step(cut, Chunk(next, 1)), step(fresh, Chunk(next, 1))) << "round " << round;
    ASSERT_EQ(state_of(cut), state_of(fresh));
    seeds.push_back(next);
  }
}

TEST(Truncate, GoesBackBehindDraftsWhereNothingRemembersThem) {
  for (const std::size_t page_size : {1U, 4U, 7U}) {
    expect_exact_cuts<Dense>(page_size);
    expect_exact_cuts<Quest>(page_size);
    expect_exact_cuts<StreamingLlm>(page_size);
    expect_exact_cuts<Random>(page_size);
    expect_exact_cuts<Compose<StreamingLlm, Quest>>(page_size);
  }
}

TEST(Truncate, InsideThePromptOpensItAgain) {
  PagedKvCache<Dense> cache(config_of(4, 0));
  const Chunk chunk(1, 10);
  ASSERT_TRUE(cache.append_prompt(chunk.keys(10), chunk.values(10)).ok());
  static_cast<void>(step(cache, chunk));
  ASSERT_TRUE(cache.truncate(Position{6}).ok());
  EXPECT_EQ(cache.prompt_tokens(), 6U);
  EXPECT_TRUE(cache.append_prompt(chunk.keys(3), chunk.values(3)).ok());
  EXPECT_EQ(cache.next_position(), Position{9});
}

TEST(Truncate, AForkKeepsWhatTheOtherTakesBack) {
  const CacheConfig config = config_of(4);
  PagePool<float> pool(config.geometry(), PageSummary::min_max, 200);
  PagedKvCache<Quest> cache(config, pool);
  for (std::uint64_t t = 0; t < 18; ++t) static_cast<void>(step(cache, Chunk(t, 1)));
  const Chunk chunk(77, 6);
  static_cast<void>(draft(cache, chunk, 6, 6));
  PagedKvCache<Quest> fork = cache.fork();
  PagedKvCache<Quest> kept(cache), rejected(cache);
  ASSERT_TRUE(cache.truncate(Position{19}).ok());
  EXPECT_EQ(cache.stats().evicted_shared_pages, 0U) << "what was taken back was not evicted";
  ASSERT_TRUE(rejected.truncate(Position{19}).ok());
  for (std::uint64_t t = 0; t < 30; ++t) {
    const Chunk token(1000 + t, 1);
    ASSERT_EQ(step(fork, token), step(kept, token));
    ASSERT_EQ(step(cache, token), step(rejected, token));
  }
  fork.clear();
  cache.clear();
  EXPECT_EQ(pool.free_pages(), pool.page_count());
}

TEST(Drafts, AreNotForASnapshot) {
  PagedKvCache<Raas> cache(config_of(4));
  const Chunk chunk(1, 2);
  ASSERT_TRUE(cache.append_draft(chunk.keys(2), chunk.values(2)).ok());
  std::stringstream stream;
  EXPECT_THROW(save(cache, stream), SnapshotError);
  ASSERT_TRUE(cache.truncate(Position{1}).ok());
  save(cache, stream);
  PagedKvCache<Raas> loaded(config_of(4));
  load(loaded, stream);
  ASSERT_EQ(step(loaded, chunk), step(cache, chunk));
}

TEST(Append, OfAChunkIsAppendTokenByToken) {
  PagedKvCache<Raas> chunked(config_of(4)), single(config_of(4));
  for (std::uint64_t round = 0; round < 30; ++round) {
    const Chunk chunk(round, 1 + round % 9);
    ASSERT_TRUE(chunked.append(chunk.keys(chunk.count), chunk.values(chunk.count)).ok());
    for (std::size_t t = 0; t < chunk.count; ++t) {
      ASSERT_TRUE(single.append(chunk.keys(chunk.count).token(t), chunk.values(chunk.count).token(t)).ok());
    }
    ASSERT_EQ(state_of(chunked), state_of(single));
  }
}

}  // namespace
}  // namespace kvsparse_test
