// SPDX-License-Identifier: Apache-2.0
//
// Every evictor with every selector: the composition keeps the budget, answers with what it read, and takes a page that
// a query did not read for unknown, not for unwanted.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "kvsparse/cache/attend.hpp"
#include "kvsparse/interop/snapshot.hpp"
#include "kvsparse/policy/name_table.hpp"
#include "support/policy_kinds.hpp"
#include "support/rows.hpp"

namespace kvsparse_test {
namespace {

using namespace kvsparse;

constexpr std::size_t kv_heads = 2, page_size = 4, prompt = 9, tokens = 64;

CacheConfig config_of() {
  return {.query_heads = kv_heads,  // a group of one: what a kv head read is what its query read
          .kv_heads = kv_heads,
          .head_dim = 8,
          .page_size = page_size,
          .budget_tokens = 7 * page_size,
          .read_budget_tokens = 3 * page_size};
}

struct Tally {
  std::size_t evicted = 0;
  std::size_t pages_unread = 0;
};

/// What the evictor knows of a page, by the page's first position; no bytes if it remembers nothing.
struct Knowledge {
  Position page;
  std::vector<std::byte> state;
};

template <class Policy>
std::vector<Knowledge> knowledge(const detail::HeadImage& head) {
  using State = PageState<typename Policy::EvictPart>;
  std::vector<Knowledge> pages;
  for (std::uint32_t i = 0; i < head.table->size(); ++i) {
    Knowledge known{(*head.table)[{i}].first_position, {}};
    if constexpr (!std::is_empty_v<State>) {
      const auto& state = *reinterpret_cast<const PageState<Policy>*>(head.page_states.at(i).data());
      known.state.resize(sizeof(State));
      std::memcpy(known.state.data(), &state.evict, sizeof(State));
    }
    pages.push_back(std::move(known));
  }
  return pages;
}

template <class Policy>
class Composition {
  using Evict = typename Policy::EvictPart;

 public:
  Composition() : cache_(config_of(), policy()), image_(detail::ImageAccess::of(cache_)) {}

  Tally run() {
    for (std::size_t t = 0; t < tokens && !testing::Test::HasFatalFailure(); ++t) step(t);
    tally_.evicted = cache_.stats().evicted_tokens;
    return tally_;
  }

 private:
  static Policy policy() {
    Policy result;
    for (const OptionSetting& setting : short_periods(option_keys<Policy>(), 5)) set_option(result, setting);
    set_option(result, {"epsilon", "0.5"});  // of those that know it: so that they leave something unread
    return result;
  }

  void step(std::size_t t) {
    const Status status = t < prompt ? cache_.append_prompt(rows_.token_k(t), rows_.token_v(t))
                                     : cache_.append(rows_.token_k(t), rows_.token_v(t));
    ASSERT_TRUE(status.ok()) << status.message();
    std::vector<std::vector<Knowledge>> before;
    for (const detail::HeadImage& head : image_.heads) before.push_back(knowledge<Policy>(head));
    ASSERT_TRUE(attend(cache_, rows_.token_q(t), out_).ok());
    ASSERT_LE(cache_.stats().resident_tokens, config_of().budget_tokens);
    for (std::size_t h = 0; h < kv_heads; ++h) {
      const std::vector<Position> read = cache_.read_positions(h);
      if (!ResidualProvider<Policy>) expect_the_exact_answer(t, h, read);
      expect_nothing_learnt_of_unread_pages(t, h, read, before[h]);
    }
  }
  void expect_the_exact_answer(std::size_t t, std::size_t head, const std::vector<Position>& read) const {
    std::vector<std::size_t> positions;
    for (const Position position : read) positions.push_back(static_cast<std::size_t>(position.value));
    const ExactAttention exact = rows_.exact(t, head, positions);
    for (std::size_t d = 0; d < rows_.head_dim; ++d) {
      ASSERT_NEAR(static_cast<double>(out_[head * rows_.head_dim + d]), exact.out[d], 1e-5) << "token " << t;
    }
  }
  void expect_nothing_learnt_of_unread_pages(std::size_t t, std::size_t head, const std::vector<Position>& read,
                                             const std::vector<Knowledge>& before) {
    const auto after = knowledge<Policy>(image_.heads[head]);
    for (std::size_t page = 0; page + 1 < after.size(); ++page) {  // the open one is in use, read or not
      const Position first = after[page].page;
      const auto lies_there = [&](Position p) { return p >= first && p < first + page_size; };
      if (std::any_of(read.begin(), read.end(), lies_there)) continue;
      ++tally_.pages_unread;
      if (std::is_same_v<Evict, Lrfu>) continue;  // its decays go on
      ASSERT_EQ(after[page].state, before[page].state) << "token " << t << ", the page at " << first.value;
    }
  }

  Rows rows_{tokens, config_of(), 3};
  PagedKvCache<Policy> cache_;
  detail::LayerImage image_;
  std::vector<float> out_ = std::vector<float>(kv_heads * 8);
  Tally tally_;
};

template <class Select>
void expect_every_evictor_to_compose() {
  std::size_t evictors = 0;
  std::size_t pages_unread = 0;
  detail::visit_policies(KnownPolicies{}, [&]<class Evict>() {
    if constexpr (Evictor<Evict> && !Selector<Evict>) {
      using Policy = Compose<Evict, Select>;
      SCOPED_TRACE(Policy::name);
      const Tally tally = Composition<Policy>().run();
      EXPECT_GT(tally.evicted, 0U);
      pages_unread += tally.pages_unread;
      ++evictors;
    }
  });
  EXPECT_EQ(evictors, 15U);
  EXPECT_GT(pages_unread, 100U);
}

TEST(ComposeEveryEvictor, WithQuest) { expect_every_evictor_to_compose<Quest>(); }
TEST(ComposeEveryEvictor, WithHashAttention) { expect_every_evictor_to_compose<HashAttention>(); }
TEST(ComposeEveryEvictor, WithHierarchicalTopK) { expect_every_evictor_to_compose<HierarchicalTopK>(); }
TEST(ComposeEveryEvictor, WithHalfSpace) { expect_every_evictor_to_compose<HalfSpace>(); }
TEST(ComposeEveryEvictor, WithCertified) { expect_every_evictor_to_compose<Certified>(); }
TEST(ComposeEveryEvictor, WithOracle) { expect_every_evictor_to_compose<Oracle>(); }

}  // namespace
}  // namespace kvsparse_test
