// SPDX-License-Identifier: Apache-2.0
//
// Many caches over one pool: what they take, give back and share, and that nobody notices the others.
#include <gtest/gtest.h>

#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "kvsparse/interop/snapshot.hpp"
#include "kvsparse/kvsparse.hpp"
#include "support/random_trace.hpp"

namespace kvsparse_test {
namespace {

using namespace kvsparse;

CacheConfig config_of(std::size_t page_size, std::size_t budget_pages) {
  CacheConfig config;
  config.query_heads = 4;
  config.kv_heads = 2;
  config.head_dim = 12;
  config.page_size = page_size;
  config.budget_tokens = budget_pages * page_size;
  config.read_budget_tokens = 3 * page_size;
  config.max_tokens = 400;
  return config;
}

/// Rows of a sequence: those of a token depend on the seed and its position alone.
struct Rows {
  explicit Rows(std::uint64_t seed, std::size_t position) : k(24), v(24), q(48) {
    TestRng rng(seed * 1000003 + position);
    for (std::vector<float>* rows : {&k, &v, &q}) {
      for (float& x : *rows) x = static_cast<float>(rng.gaussian());
    }
  }
  std::vector<float> k, v, q;
};

template <class Cache>
Status append(Cache& cache, std::uint64_t seed) {
  const Rows rows(seed, static_cast<std::size_t>(cache.next_position().value));
  return cache.append(rows.k, rows.v);
}
template <class Cache>
std::vector<float> step(Cache& cache, std::uint64_t seed) {
  const Rows rows(seed, static_cast<std::size_t>(cache.next_position().value));
  EXPECT_TRUE(cache.append(rows.k, rows.v).ok());
  std::vector<float> out(48), lse(4);
  EXPECT_TRUE(attend(cache, rows.q, out, lse).ok());
  out.insert(out.end(), lse.begin(), lse.end());
  return out;
}
template <class Cache>
void feed_prompt(Cache& cache, std::uint64_t seed, std::size_t tokens) {
  for (std::size_t t = 0; t < tokens; ++t) {
    const Rows rows(seed, t);
    ASSERT_TRUE(cache.append_prompt(rows.k, rows.v).ok());
    std::vector<float> out(48);
    ASSERT_TRUE(attend(cache, rows.q, out).ok());
  }
}
template <class Cache>
void expect_the_same_state(const Cache& a, const Cache& b) {
  for (std::size_t h = 0; h < 2; ++h) {
    EXPECT_EQ(a.resident_positions(h), b.resident_positions(h));
    EXPECT_EQ(a.read_positions(h), b.read_positions(h));
  }
  EXPECT_EQ(a.stats().evicted_tokens, b.stats().evicted_tokens);
}

template <class Visit>
void for_policies(Visit&& visit) {
  const auto with = [&]<class Policy>() {
    SCOPED_TRACE(Policy::name);
    visit.template operator()<Policy>();
  };
  with.template operator()<Dense>();
  with.template operator()<StreamingLlm>();
  with.template operator()<H2o>();
  with.template operator()<Raas>();
  with.template operator()<Kindred>();
  with.template operator()<Random>();
  with.template operator()<Quest>();
  with.template operator()<Compose<Raas, Quest>>();
}

TEST(Pool, SequencesOverOnePoolDecodeAsIfAlone) {
  for_policies([]<class Policy>() {
    using Cache = PagedKvCache<Policy, Half>;
    const CacheConfig config = config_of(4, 8);
    PagePool<Half> pool(config.geometry(), PageSummary::min_max, 2 * 3 * 100);
    std::map<int, Cache> sequences, alone;
    for (const int id : {3, 1, 2}) {
      sequences.emplace(id, Cache(config, pool));
      alone.emplace(id, Cache(config));
    }
    TestRng rng(5);
    for (int i = 0; i < 300; ++i) {  // any order of sequences
      const int id = 1 + rng.below(3);
      const auto seed = static_cast<std::uint64_t>(id);
      ASSERT_EQ(step(sequences.at(id), seed), step(alone.at(id), seed)) << "sequence " << id << ", step " << i;
      if (rng.below(40) == 0) {
        sequences.at(id).clear();
        alone.at(id).clear();
      }
    }
    for (const int id : {1, 2, 3}) expect_the_same_state(sequences.at(id), alone.at(id));
    sequences.clear();
    EXPECT_EQ(pool.free_pages(), pool.page_count());
  });
}

TEST(Pool, AnExhaustedPoolRefusesAndChangesNothing) {
  using Cache = PagedKvCache<Dense>;
  const CacheConfig config = config_of(4, 8);
  PagePool<float> pool(config.geometry(), PageSummary::none, 6);
  Cache first(config, pool);
  Cache second(config, pool);
  for (int t = 0; t < 8; ++t) ASSERT_TRUE(append(first, 1).ok());
  for (int t = 0; t < 4; ++t) ASSERT_TRUE(append(second, 2).ok());
  EXPECT_FALSE(second.can_append(1));
  const Status status = append(second, 2);
  EXPECT_EQ(status.code(), Status::Code::pool_exhausted);
  EXPECT_EQ(status.value(), 2U);
  EXPECT_EQ(status.limit(), 0U);
  EXPECT_NE(status.message().find("2 pages"), std::string::npos) << status.message();
  EXPECT_EQ(second.next_position(), Position{4});
  EXPECT_TRUE(second.in_prompt() || second.prompt_tokens() == 0);
  EXPECT_EQ(first.bytes_reclaimable(), 4 * pool.bytes_per_page());
  first.clear();
  EXPECT_EQ(pool.free_pages(), 4U);
  EXPECT_TRUE(second.can_append(8));
  EXPECT_FALSE(second.can_append(9));
  for (int t = 0; t < 8; ++t) ASSERT_TRUE(append(second, 2).ok());
}

TEST(Pool, ARefusedPromptLeavesThePromptOpen) {
  const CacheConfig config = config_of(4, 8);
  PagePool<float> pool(config.geometry(), PageSummary::none, 4);
  PagedKvCache<Raas> cache(config, pool);
  const std::vector<float> rows(12 * 24);
  EXPECT_EQ(cache.append_prompt(rows, rows).code(), Status::Code::pool_exhausted);
  EXPECT_EQ(pool.free_pages(), 4U);
  const std::vector<float> fewer(8 * 24);
  EXPECT_TRUE(cache.append_prompt(fewer, fewer).ok());
  EXPECT_TRUE(cache.in_prompt());
}

TEST(Pool, CanAppendIsWhatAppendThenDoes) {
  for_policies([]<class Policy>() {
    const CacheConfig config = config_of(3, 5);
    for (std::uint64_t seed = 0; seed < 12; ++seed) {
      TestRng rng(seed);
      const auto pages = static_cast<std::size_t>(2 * (4 + rng.below(20)));
      PagePool<float> pool(config.geometry(), PageSummary::min_max, pages);
      std::vector<PagedKvCache<Policy>> caches;
      caches.emplace_back(config, pool);
      for (int i = 0; i < 250; ++i) {
        auto& cache = caches[static_cast<std::size_t>(rng.below(static_cast<int>(caches.size())))];
        if (caches.size() < 4 && rng.below(20) == 0) {
          caches.push_back(cache.fork());
          continue;
        }
        const auto tokens = static_cast<std::size_t>(1 + rng.below(7));
        const std::size_t free = pool.free_pages();
        const std::size_t length = static_cast<std::size_t>(cache.next_position().value);
        if (length + tokens > config.max_tokens) continue;
        if (cache.can_append(tokens)) {
          for (std::size_t t = 0; t < tokens; ++t) static_cast<void>(step(cache, seed));  // expects each to be taken
        } else if (!cache.can_append(1)) {
          EXPECT_EQ(append(cache, seed).code(), Status::Code::pool_exhausted);
          EXPECT_EQ(pool.free_pages(), free);
          EXPECT_EQ(cache.next_position(), Position{static_cast<std::int64_t>(length)});
          if (rng.below(3) == 0) cache.clear();
        }
      }
      caches.clear();
      EXPECT_EQ(pool.free_pages(), pool.page_count());
      EXPECT_EQ(pool.shared_pages(), 0U);
    }
  });
}

/// A verb and the question whether it would be taken, together, over caches that share pages: they agree.
template <class Policy>
void expect_verbs_to_do_what_was_promised(const CacheConfig& config, std::uint64_t seed) {
  using Cache = PagedKvCache<Policy>;
  TestRng rng(seed);
  const auto pages = static_cast<std::size_t>(2 * (4 + rng.below(16)));
  PagePool<float> pool(config.geometry(), PageSummary::min_max, pages);
  std::vector<Cache> caches;
  caches.emplace_back(config, pool);
  for (int i = 0; i < 200; ++i) {
    Cache& cache = caches[static_cast<std::size_t>(rng.below(static_cast<int>(caches.size())))];
    if (caches.size() < 4 && rng.below(12) == 0) {
      caches.push_back(cache.fork());
      continue;
    }
    if (rng.below(40) == 0) cache.clear();
    const auto tokens = static_cast<std::size_t>(1 + rng.below(rng.below(4) == 0 ? 30 : 6));
    const std::vector<float> rows(tokens * 24, 0.5F);
    const TokenRows<const float> chunk(rows.data(), tokens, 2, 12);
    const Position before = cache.next_position();
    const std::size_t free = pool.free_pages();
    const bool is_prompt = cache.in_prompt() && rng.below(6) != 0;
    const bool promised = is_prompt ? cache.can_append_prompt(tokens) : cache.can_append(tokens);
    const Status status = is_prompt ? cache.append_prompt(chunk, chunk) : cache.append(chunk, chunk);
    ASSERT_EQ(promised, status.ok()) << "step " << i << ", " << tokens << " tokens: " << status.message();
    if (status.ok()) continue;
    ASSERT_EQ(pool.free_pages(), free);
    ASSERT_EQ(cache.next_position(), before);
  }
  caches.clear();
  EXPECT_EQ(pool.free_pages(), pool.page_count());
  EXPECT_EQ(pool.shared_pages(), 0U);
}

TEST(Pool, WhatIsPromisedIsTakenAndWhatIsNotIsRefused) {
  for_policies([]<class Policy>() {
    for (std::uint64_t seed = 0; seed < 20; ++seed) {
      CacheConfig config = config_of(3, 5);
      config.max_tokens = 40;
      config.max_prompt_tokens = 24;
      for (const auto overflow : {PromptOverflow::error, PromptOverflow::grow, PromptOverflow::unpin_middle}) {
        config.prompt_overflow = overflow;
        SCOPED_TRACE("overflow " + std::to_string(static_cast<int>(overflow)) + ", seed " + std::to_string(seed));
        expect_verbs_to_do_what_was_promised<Policy>(config, seed);
      }
    }
  });
}

TEST(Pool, PinsThatGiveWayOnSharedPagesFreeNothing) {
  CacheConfig config = config_of(4, 4);
  config.prompt_overflow = PromptOverflow::unpin_middle;
  PagePool<float> pool(config.geometry(), PageSummary::none, 8);
  PagedKvCache<Raas> parent(config, pool);
  feed_prompt(parent, 1, 16);  // four pinned pages a head: the budget, and the whole pool
  PagedKvCache<Raas> child = parent.fork();
  EXPECT_FALSE(child.can_append(1)) << "the page that loses its pin is the parent's too";
  EXPECT_EQ(append(child, 2).code(), Status::Code::pool_exhausted);
  parent.clear();
  EXPECT_TRUE(append(child, 2).ok());
}

TEST(Pool, OfAnotherShapeIsRefusedWithASentence) {
  const CacheConfig config = config_of(4, 8);
  const auto refused = [&](const Geometry& geometry, PageSummary kind, const char* part) {
    const PagePool<float> pool(geometry, kind, 8);
    try {
      const PagedKvCache<Quest> cache(config, pool);
      ADD_FAILURE() << "taken";
    } catch (const ConfigError& error) {
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    }
    EXPECT_EQ(pool.free_pages(), 8U);
  };
  Geometry geometry = config.geometry();
  refused(geometry, PageSummary::none, "no page summaries; policy quest needs min_max");
  refused(geometry, PageSummary::mean, "mean page summaries; policy quest needs min_max");
  geometry.head_dim = 16;
  refused(geometry, PageSummary::min_max, "head_dim is 16; this cache needs 12");
  geometry = config.geometry();
  geometry.page_size = 8;
  refused(geometry, PageSummary::min_max, "page_size is 8; this cache needs 4");
  // Summaries that nobody asked for do no harm: layers of one engine differ in their policies.
  const PagePool<float> pool(config.geometry(), PageSummary::min_max, 8);
  const PagedKvCache<Dense> cache(config, pool);
  EXPECT_TRUE(cache.pool() == pool);
}

TEST(Pool, ASnapshotThatItHasNoPagesForIsRefused) {
  const CacheConfig config = config_of(4, 8);
  PagePool<float> pool(config.geometry(), PageSummary::none, 8);
  PagedKvCache<Raas> saved(config), loaded(config, pool), other(config, pool);
  for (int t = 0; t < 10; ++t) ASSERT_TRUE(append(saved, 1).ok());
  for (int t = 0; t < 8; ++t) ASSERT_TRUE(append(other, 2).ok());
  std::stringstream stream;
  save(saved, stream);
  EXPECT_THROW(load(loaded, stream), SnapshotError);
  EXPECT_EQ(loaded.next_position(), Position{0});
  other.clear();
  stream.clear();
  stream.seekg(0);
  load(loaded, stream);
  EXPECT_EQ(pool.free_pages(), 2U);
  for (int t = 0; t < 4; ++t) ASSERT_EQ(step(loaded, 1), step(saved, 1));
}

TEST(Pool, CachesMoveAndGiveTheirPagesBackOnce) {
  const CacheConfig config = config_of(4, 8);
  PagePool<float> pool(config.geometry(), PageSummary::none, 100);
  PagedKvCache<Raas> a(config, pool);
  PagedKvCache<Raas> b(config, pool);
  for (int t = 0; t < 9; ++t) {
    ASSERT_TRUE(append(a, 1).ok());
    if (t >= 5) continue;
    ASSERT_TRUE(append(b, 2).ok());
  }
  const auto held = a.resident_positions(0);
  b = std::move(a);
  EXPECT_EQ(pool.free_pages(), 94U);
  EXPECT_EQ(b.resident_positions(0), held);
  static_cast<void>(step(b, 1));
  PagedKvCache<Raas> c = std::move(b);
  EXPECT_EQ(c.next_position(), Position{10});
  c = PagedKvCache<Raas>(config);
  EXPECT_EQ(pool.free_pages(), 100U);
}

TEST(Fork, SixtyFourOfALongPromptCostTablesAndOpenPages) {
  for_policies([]<class Policy>() {
    using Cache = PagedKvCache<Policy, Half>;
    constexpr std::size_t prompt = 4096, forks = 64, page_size = 16, heads = 2;
    CacheConfig config = config_of(page_size, 300);
    config.max_tokens = 4200;
    config.read_budget_tokens = 512;
    const std::size_t prompt_pages = heads * prompt / page_size;
    const std::size_t own_pages = heads * 2;  // each fork decodes into two pages
    PagePool<Half> pool(config.geometry(), PageSummary::min_max, prompt_pages + forks * own_pages);
    Cache parent(config, pool);
    Cache unforked(config);
    std::vector<float> k, v, q;
    for (std::size_t t = 0; t < prompt; ++t) {
      const Rows rows(1, t);
      k.insert(k.end(), rows.k.begin(), rows.k.end());
      v.insert(v.end(), rows.v.begin(), rows.v.end());
    }
    for (Cache* cache : {&parent, &unforked}) {
      ASSERT_TRUE(cache->append_prompt(k, v).ok());
      static_cast<void>(step(*cache, 1));
    }
    EXPECT_EQ(pool.page_count() - pool.free_pages(), prompt_pages + heads);
    std::vector<Cache> children;
    for (std::size_t i = 0; i < forks - 1; ++i) children.push_back(parent.fork());
    EXPECT_EQ(pool.page_count() - pool.free_pages(), prompt_pages + heads) << "a fork takes no page";
    EXPECT_EQ(children[5].bytes_reclaimable(), 0U);
    EXPECT_EQ(children[5].stats().shared_bytes, (prompt_pages + heads) * pool.bytes_per_page());
    for (std::size_t i = 0; i < children.size(); i += 9) {
      Cache alone(unforked);  // has its pages for itself
      for (int t = 0; t < 20; ++t) ASSERT_EQ(step(children[i], 100 + i), step(alone, 100 + i)) << "fork " << i;
      expect_the_same_state(children[i], alone);
    }
    for (std::size_t i = 0; i < children.size(); ++i) {
      if (i % 9 == 0) continue;
      for (int t = 0; t < 20; ++t) ASSERT_TRUE(append(children[i], 100 + i).ok());
    }
    for (int t = 0; t < 20; ++t) ASSERT_EQ(step(parent, 1), step(unforked, 1)) << "the parent notices nothing";
    EXPECT_LE(pool.page_count() - pool.free_pages(), prompt_pages + forks * own_pages);
    children.clear();
    EXPECT_EQ(parent.stats().shared_bytes, 0U);
    parent.clear();
    EXPECT_EQ(pool.free_pages(), pool.page_count());
  });
}

TEST(Fork, TreesOfForksDecodeAsUnforkedCachesWhateverIsEvicted) {
  for_policies([]<class Policy>() {
    using Cache = PagedKvCache<Policy>;
    for (const std::size_t page_size : {1U, 3U, 8U}) {
      const CacheConfig config = config_of(page_size, 6);
      PagePool<float> pool(config.geometry(), PageSummary::min_max, 20000);
      struct Pair {
        Cache forked, alone;
      };
      std::vector<Pair> pairs;
      pairs.push_back({Cache(config, pool), Cache(config)});
      feed_prompt(pairs[0].forked, 7, page_size * 2);
      feed_prompt(pairs[0].alone, 7, page_size * 2);
      TestRng rng(page_size);
      std::size_t evicted_shared = 0;
      for (int i = 0; i < 400; ++i) {
        const auto at = static_cast<std::size_t>(rng.below(static_cast<int>(pairs.size())));
        const std::uint64_t seed = rng.next() % 1000;
        if (pairs[at].forked.next_position().value < 300) {
          ASSERT_EQ(step(pairs[at].forked, seed), step(pairs[at].alone, seed)) << "step " << i;
        }
        if (pairs.size() < 8 && rng.below(12) == 0) {
          Pair pair{pairs[at].forked.fork(), pairs[at].alone};
          pairs.push_back(std::move(pair));
        }
        if (pairs.size() > 1 && rng.below(30) == 0) {
          evicted_shared += pairs.back().forked.stats().evicted_shared_pages;
          pairs.pop_back();
        }
      }
      for (const Pair& pair : pairs) {
        expect_the_same_state(pair.forked, pair.alone);
        evicted_shared += pair.forked.stats().evicted_shared_pages;
        EXPECT_EQ(pair.alone.stats().evicted_shared_pages, 0U);
      }
      EXPECT_EQ(evicted_shared > 0, Evictor<Policy>);
      pairs.clear();
      EXPECT_EQ(pool.free_pages(), pool.page_count());
    }
  });
}

TEST(Fork, EvictingASharedPageFreesNothingAndIsCounted) {
  const CacheConfig config = config_of(4, 4);
  PagePool<float> pool(config.geometry(), PageSummary::none, 40);
  PagedKvCache<StreamingLlm> parent(config, pool);
  for (int t = 0; t < 16; ++t) ASSERT_TRUE(append(parent, 1).ok());
  PagedKvCache<StreamingLlm> child = parent.fork();
  const std::size_t before = pool.free_pages();
  ASSERT_TRUE(append(child, 2).ok());  // opens a page, evicts one that the parent holds
  EXPECT_EQ(pool.free_pages(), before - 2);
  EXPECT_EQ(child.stats().evicted_shared_pages, 2U);
  EXPECT_EQ(child.stats().evicted_tokens, 8U);
  EXPECT_EQ(parent.resident_tokens(0), 16U);
  EXPECT_EQ(parent.bytes_reclaimable(), 2 * pool.bytes_per_page()) << "the evicted ones are the parent's alone now";
}

TEST(Fork, CountsOnFromItsParentAndSoDoesACopy) {
  const CacheConfig config = config_of(4, 4);
  PagePool<float> pool(config.geometry(), PageSummary::none, 40);
  PagedKvCache<StreamingLlm> parent(config, pool);
  for (int t = 0; t < 16; ++t) ASSERT_TRUE(append(parent, 1).ok());
  PagedKvCache<StreamingLlm> child = parent.fork();
  ASSERT_TRUE(append(child, 2).ok());
  const PagedKvCache<StreamingLlm> grandchild = child.fork();
  const PagedKvCache<StreamingLlm> copy(child);
  for (const auto* cache : {&grandchild, &copy}) {
    EXPECT_EQ(cache->stats().evicted_shared_pages, 2U);
    EXPECT_EQ(cache->stats().evicted_tokens, 8U);
  }
}

TEST(Fork, NoTokensNeedNoPages) {
  const CacheConfig config = config_of(4, 4);
  PagePool<float> pool(config.geometry(), PageSummary::none, 2);
  PagedKvCache<Raas> parent(config, pool);
  const std::vector<float> row(24);
  ASSERT_TRUE(parent.append_prompt(row, row).ok());
  PagedKvCache<Raas> child = parent.fork();
  EXPECT_TRUE(child.can_append(0));
  EXPECT_TRUE(child.append_prompt(TokenRows<const float>(row.data(), 0, 2, 12), {row.data(), 0, 2, 12}).ok());
  EXPECT_FALSE(child.can_append(1)) << "the open pages are the parent's too, and none is free to copy them to";
  EXPECT_EQ(child.append_prompt(row, row).code(), Status::Code::pool_exhausted);
  parent.clear();
  EXPECT_TRUE(child.append_prompt(row, row).ok());
}

TEST(Fork, OfACacheWithItsOwnPoolSharesThatPool) {
  const CacheConfig config = config_of(4, 8);
  auto parent = std::make_unique<PagedKvCache<Dense>>(config);
  for (int t = 0; t < 6; ++t) ASSERT_TRUE(append(*parent, 1).ok());
  PagedKvCache<Dense> child = parent->fork();
  PagedKvCache<Dense> copy = *parent;
  EXPECT_TRUE(child.pool() == parent->pool());
  EXPECT_FALSE(copy.pool() == parent->pool());
  parent.reset();
  for (int t = 0; t < 50; ++t) ASSERT_EQ(step(child, 2), step(copy, 2));
}

}  // namespace
}  // namespace kvsparse_test
