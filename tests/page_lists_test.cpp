// SPDX-License-Identifier: Apache-2.0
//
// Page lists, checked by whom they are for: an attention that knows nothing but the lists and the pages' memory,
// written from what FlashInfer and vLLM document of theirs.
#include "kvsparse/interop/page_lists.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kvsparse/kvsparse.hpp"
#include "kvsparse/policy/snap_kv.hpp"
#include "support/rows.hpp"

namespace kvsparse_test {
namespace {

using namespace kvsparse;
using Code = Status::Code;

using Ints = std::vector<std::int32_t>;

/// Row r of a CSR list as its pages and its length: every page is full but the last, which holds last_page_len tokens.
struct Request {
  std::span<const std::int32_t> pages;
  std::size_t tokens;
};
Request csr_request(const CsrPageLists& lists, std::size_t row, std::size_t page_size) {
  const auto begin = static_cast<std::size_t>(lists.kv_indptr()[row]);
  const auto end = static_cast<std::size_t>(lists.kv_indptr()[row + 1]);
  const auto last = static_cast<std::size_t>(lists.last_page_len()[row]);
  return {lists.kv_indices().subspan(begin, end - begin), begin == end ? 0 : (end - begin - 1) * page_size + last};
}
/// Row r of a block table: the first ceil(length / page_size) blocks.
Request table_request(const BlockTables& lists, std::size_t row, std::size_t max_pages, std::size_t page_size) {
  const auto tokens = static_cast<std::size_t>(lists.sequence_lengths()[row]);
  return {lists.block_tables().subspan(row * max_pages, (tokens + page_size - 1) / page_size), tokens};
}

/// Softmax attention of one query over a request's tokens, in double: token t is slot t % page_size of page
/// pages[t / page_size]. row(page, slot) finds keys and values wherever the engine keeps them.
using RowOf = std::function<const float*(std::int32_t page, std::size_t slot)>;
struct Attended {
  std::vector<double> out;
  double log_sum_exp = 0.0;
};
Attended attend_request(const Request& request, std::span<const float> q, double scale, std::size_t page_size,
                        const RowOf& key, const RowOf& value) {
  std::vector<double> logits(request.tokens);
  double max = -1e300;
  for (std::size_t t = 0; t < request.tokens; ++t) {
    const float* row = key(request.pages[t / page_size], t % page_size);
    for (std::size_t i = 0; i < q.size(); ++i) logits[t] += static_cast<double>(q[i]) * static_cast<double>(row[i]);
    logits[t] *= scale;
    max = std::max(max, logits[t]);
  }
  Attended result{std::vector<double>(q.size()), 0.0};
  double sum = 0.0;
  for (std::size_t t = 0; t < request.tokens; ++t) {
    const double weight = std::exp(logits[t] - max);
    const float* row = value(request.pages[t / page_size], t % page_size);
    for (std::size_t i = 0; i < q.size(); ++i) result.out[i] += weight * static_cast<double>(row[i]);
    sum += weight;
  }
  for (double& x : result.out) x /= sum;
  result.log_sum_exp = max + std::log(sum);
  return result;
}

void expect_equal(const Attended& naive, std::span<const float> out, float log_sum_exp) {
  for (std::size_t i = 0; i < out.size(); ++i) ASSERT_NEAR(naive.out[i], static_cast<double>(out[i]), 2e-5);
  ASSERT_NEAR(naive.log_sum_exp, static_cast<double>(log_sum_exp), 2e-5);
}

CacheConfig small_config(std::size_t page_size) {
  CacheConfig config;
  config.query_heads = 6;
  config.kv_heads = 2;
  config.head_dim = 12;
  config.page_size = page_size;
  config.budget_tokens = 8 * page_size;
  config.read_budget_tokens = 3 * page_size;
  config.max_tokens = 400;
  return config;
}

struct Arrays {
  Ints indptr = Ints(100, -7), indices = Ints(4000, -7), last = Ints(99, -7), tables = Ints(99 * 200, -7),
       lengths = Ints(99, -7);
  CsrPageLists csr{indptr, indices, last};
  BlockTables blocks{tables, 200, lengths, -1};
};

/// Every step of a sequence: what the policy selects, listed in both conventions, attended by the naive kernel over the
/// cache's own memory, is what attend() computes; and so is what list_read and, without a selector, list_resident list.
template <class Policy>
void lists_mean_what_attend_reads(std::size_t page_size, const Policy& policy = {}) {
  SCOPED_TRACE(std::string(Policy::name) + ", pages of " + std::to_string(page_size));
  const CacheConfig config = small_config(page_size);
  const std::size_t tokens = 14 * page_size + 3;
  const Rows rows(tokens, config, 11 + page_size);
  PagedKvCache<Policy> cache(config, policy);
  const PagedKv<float, float> memory = cache.pages();
  const auto row_of = [&](const float* first, std::size_t page_stride, std::size_t row_stride) -> RowOf {
    return [=](std::int32_t page, std::size_t slot) {
      return first + static_cast<std::size_t>(page) * page_stride + slot * row_stride;
    };
  };
  const RowOf key = row_of(memory.keys, memory.key_page_stride, memory.key_row_stride);
  const RowOf value = row_of(memory.values, memory.value_page_stride, memory.value_row_stride);
  const std::size_t prompt = page_size + 2;
  std::vector<float> out(config.query_heads * config.head_dim), lse(config.query_heads);
  Arrays arrays;
  const bool reads_by_query = traits::selection(policy) == SelectionScope::query_head;
  for (std::size_t t = 0; t < tokens; ++t) {
    if (t < prompt) {
      ASSERT_TRUE(cache.append_prompt(rows.token_k(t), rows.token_v(t)).ok());
    } else {
      ASSERT_TRUE(cache.append(rows.token_k(t), rows.token_v(t)).ok());
    }
    EXPECT_EQ(list_read(cache, arrays.csr).code(), Code::query_is_over);
    const HeadRows<const float> q(rows.token_q(t).data(), config.query_heads, config.head_dim);
    arrays.csr.clear();
    arrays.blocks.clear();
    ASSERT_TRUE(list_selection(cache, q, arrays.csr).ok());
    ASSERT_TRUE(list_selection(cache, q, arrays.blocks).ok());
    ASSERT_EQ(arrays.csr.rows(), selection_rows(cache));
    ASSERT_TRUE(attend(cache, rows.token_q(t), out, lse).ok());
    const std::size_t per_row = config.query_heads / selection_rows(cache);
    const auto compare = [&](std::size_t head, const Request& request) {
      const auto q_row = rows.query(t, head);
      expect_equal(attend_request(request, q_row, rows.scale(), page_size, key, value),
                   std::span<const float>(out).subspan(head * config.head_dim, config.head_dim), lse[head]);
    };
    for (std::size_t head = 0; head < config.query_heads; ++head) {
      compare(head, csr_request(arrays.csr, head / per_row, page_size));
      compare(head, table_request(arrays.blocks, head / per_row, 200, page_size));
    }
    // After attend, from what it read; and again everything that is held, where that is what is read.
    const std::size_t group = config.query_heads / config.kv_heads;
    arrays.csr.clear();
    if (const Status status = list_read(cache, arrays.csr); status.ok()) {
      for (std::size_t head = 0; head < config.query_heads; ++head) {
        compare(head, csr_request(arrays.csr, head / group, page_size));
      }
    } else {
      EXPECT_TRUE(reads_by_query && !cache.reads_all(0)) << status.message();
      EXPECT_EQ(arrays.csr.rows(), 0U);
    }
    arrays.csr.clear();
    ASSERT_TRUE(list_resident(cache, arrays.csr).ok());
    for (std::size_t h = 0; h < config.kv_heads; ++h) {
      ASSERT_EQ(csr_request(arrays.csr, h, page_size).tokens, cache.resident_tokens(h));
      if (cache.reads_all(h)) compare(h * group, csr_request(arrays.csr, h, page_size));
    }
  }
  EXPECT_TRUE(!Evictor<Policy> || cache.stats().evicted_tokens > 0) << "the test must see evictions";
}

TEST(PageLists, AnAttentionOverTheListsIsAttend) {
  Quest each_query_head;
  each_query_head.options.pool = Quest::Pool::query_head;
  for (const std::size_t page_size : {1U, 3U, 16U}) {
    lists_mean_what_attend_reads<Dense>(page_size);
    lists_mean_what_attend_reads<StreamingLlm>(page_size);
    lists_mean_what_attend_reads<H2o>(page_size);
    lists_mean_what_attend_reads<Raas>(page_size);
    lists_mean_what_attend_reads<Random>(page_size);
    lists_mean_what_attend_reads<Quest>(page_size);
    lists_mean_what_attend_reads<Quest>(page_size, each_query_head);
    lists_mean_what_attend_reads<Compose<Raas, Quest>>(page_size);
  }
}

/// All heads give up the page with the least mass over all heads.
struct LeastOfLayer {
  static constexpr std::string_view name = "least_of_layer";
  static constexpr PolicyScope scope = PolicyScope::layer;
  static constexpr EvidenceKind evidence = EvidenceKind::page_mass;
  struct PageState {
    float mass = 0.0F;
  };
  void observe(HeadView<LeastOfLayer> head, const Evidence& step) const {
    for (const PageIndex page : head.pages()) head.state(page).mass = step.group_mass(page);
  }
  PageIndex victim(LayerView<LeastOfLayer> layer) const {
    return layer.head(0).lowest_evictable([&](PageIndex page) {
      float sum = 0.0F;
      for (std::size_t h = 0; h < layer.heads(); ++h) sum += layer.head(h).state(page).mass;
      return sum;
    });
  }
};

/// A batch of sequences of an engine whose blocks hold all kv heads, [block, slot, kv_heads, head_dim], found through a
/// block table of the whole sequence: one row for all heads of a sequence.
template <class Policy>
void shared_lists_steer_an_engine() {
  SCOPED_TRACE(Policy::name);
  constexpr std::size_t page_size = 4, sequences = 3, blocks = 90;
  const CacheConfig config = small_config(page_size);
  const std::size_t row = config.kv_heads * config.head_dim;
  std::vector<float> keys(blocks * page_size * row), values(keys.size());
  Ints free_blocks(blocks);
  for (std::size_t i = 0; i < blocks; ++i) free_blocks[i] = static_cast<std::int32_t>(i * 37 % blocks);
  std::vector<Ints> tables(sequences);
  std::vector<PagedKvCache<Policy>> caches(sequences, PagedKvCache<Policy>(config));
  std::vector<Rows> rows;
  std::vector<std::vector<float>> outs(sequences, std::vector<float>(config.query_heads * config.head_dim)), lses;
  for (std::size_t s = 0; s < sequences; ++s) {
    rows.emplace_back(70, config, 100 + s);
    lses.emplace_back(config.query_heads);
  }
  Arrays arrays;
  for (std::size_t step = 0; step < 70; ++step) {
    arrays.csr.clear();
    arrays.blocks.clear();
    std::vector<std::size_t> listed;
    for (std::size_t s = 0; s < sequences; ++s) {
      if (step < 9 * s) continue;  // ragged lengths
      const std::size_t t = step - 9 * s;
      if (t % page_size == 0) {
        tables[s].push_back(free_blocks.back());
        free_blocks.pop_back();
      }
      const std::size_t at = (static_cast<std::size_t>(tables[s].back()) * page_size + t % page_size) * row;
      std::copy_n(rows[s].token_k(t).data(), row, keys.data() + at);
      std::copy_n(rows[s].token_v(t).data(), row, values.data() + at);
      ASSERT_TRUE(caches[s].append(rows[s].token_k(t), rows[s].token_v(t)).ok());
      ASSERT_TRUE(attend(caches[s], rows[s].token_q(t), outs[s], lses[s]).ok());
      const PageListOptions options{.block_table = tables[s], .kernel_counts_positions = false};
      if (const Status status = list_resident_shared(caches[s], arrays.csr, options); !status)
        FAIL() << status.message();
      ASSERT_TRUE(list_resident_shared(caches[s], arrays.blocks, options).ok());
      listed.push_back(s);
    }
    for (std::size_t r = 0; r < listed.size(); ++r) {
      const std::size_t s = listed[r];
      for (std::size_t head = 0; head < config.query_heads; ++head) {
        const std::size_t offset = head / (config.query_heads / config.kv_heads) * config.head_dim;
        const auto row_of = [&](const std::vector<float>& pages) -> RowOf {
          return [&pages, row, offset](std::int32_t block, std::size_t slot) {
            return pages.data() + (static_cast<std::size_t>(block) * page_size + slot) * row + offset;
          };
        };
        const RowOf key = row_of(keys), value = row_of(values);
        const auto out = std::span<const float>(outs[s]).subspan(head * config.head_dim, config.head_dim);
        for (const Request& request :
             {csr_request(arrays.csr, r, page_size), table_request(arrays.blocks, r, 200, page_size)}) {
          expect_equal(
              attend_request(request, rows[s].query(step - 9 * s, head), rows[s].scale(), page_size, key, value), out,
              lses[s][head]);
        }
      }
    }
  }
}

TEST(PageLists, OneListForAllHeadsWhereTheyHoldTheSame) {
  shared_lists_steer_an_engine<Dense>();
  shared_lists_steer_an_engine<StreamingLlm>();
  shared_lists_steer_an_engine<LeastOfLayer>();
}

template <class Policy>
PagedKvCache<Policy> filled(const CacheConfig& config, std::size_t tokens, const Policy& policy = {}) {
  PagedKvCache<Policy> cache(config, policy);
  const Rows rows(tokens, config, 5, 4.0);
  std::vector<float> out(config.query_heads * config.head_dim);
  for (std::size_t t = 0; t < tokens; ++t) {
    EXPECT_TRUE(cache.append(rows.token_k(t), rows.token_v(t)).ok());
    EXPECT_TRUE(attend(cache, rows.token_q(t), out).ok());
  }
  return cache;
}

TEST(PageLists, OneListForHeadsThatDifferIsRefused) {
  const CacheConfig config = small_config(4);
  Arrays arrays;
  Ints table(100);
  const PageListOptions named{.block_table = table, .kernel_counts_positions = false};
  for (std::size_t page = 0; page < table.size(); ++page) table[page] = static_cast<std::int32_t>(page);
  const Status status = list_resident_shared(filled<Raas>(config, 120), arrays.csr, named);
  EXPECT_EQ(status.code(), Code::heads_differ);
  EXPECT_EQ(status.value(), 1U);
  // The same positions, but in pages of their own.
  EXPECT_EQ(list_resident_shared(filled<Dense>(config, 9), arrays.csr).code(), Code::heads_differ);
  EXPECT_TRUE(list_resident_shared(filled<Dense>(config, 9), arrays.csr, named).ok());
  CacheConfig one_head = config;
  one_head.kv_heads = 1;
  EXPECT_TRUE(list_resident_shared(filled<Dense>(one_head, 9), arrays.csr).ok());
}

/// Takes its pages in full, but says so by masks of its own.
struct MasksEveryToken {
  static constexpr std::string_view name = "masks_every_token";
  static constexpr bool select_always = true;
  static constexpr PolicyGranularity granularity = PolicyGranularity::token;
  void select(HeadView<MasksEveryToken> head, QueryGroup, Selection& selection) const {
    for (const PageIndex page : head.pages()) {
      const std::span<std::uint64_t> mask = selection.token_mask(page);
      mask[0] = ~std::uint64_t{0};
      selection.add({page, mask, 0.0F, 0.0F, 0});
    }
  }
};

TEST(PageLists, WhatAnotherCacheReadIsNotListed) {
  const CacheConfig config = small_config(4);
  Arrays arrays;
  auto original = std::make_unique<PagedKvCache<MasksEveryToken>>(filled<MasksEveryToken>(config, 30));
  ASSERT_TRUE(list_read(*original, arrays.csr).ok());
  PagedKvCache<MasksEveryToken> fork = original->fork(), copy = *original;
  original.reset();  // and its masks with it
  for (PagedKvCache<MasksEveryToken>* cache : {&fork, &copy}) {
    EXPECT_EQ(list_read(*cache, arrays.csr).code(), Code::query_is_over);
    EXPECT_TRUE(cache->read_positions(0).empty());
    const std::vector<float> q(config.query_heads * config.head_dim, 1.0F);
    std::vector<float> out(q.size());
    ASSERT_TRUE(attend(*cache, q, out).ok());
    EXPECT_TRUE(list_read(*cache, arrays.csr).ok());
  }
}

TEST(PageLists, APageThatWentSinceItWasReadIsNotListed) {
  const CacheConfig config = small_config(4);
  SnapKv votes;
  votes.options.window = 4;
  votes.options.period = 8;  // gives up pages at the end of the prompt, without any token
  PagedKvCache<SnapKv> cache(config, votes);
  const Rows rows(32, config, 3);
  const TokenRows<const float> k(rows.k.data(), 32, 2, 12), v(rows.v.data(), 32, 2, 12);
  ASSERT_TRUE(cache.append_prompt(k, v).ok());
  std::vector<float> out(config.query_heads * config.head_dim);
  ASSERT_TRUE(attend(cache, rows.token_q(31), out).ok());
  Arrays arrays;
  ASSERT_TRUE(list_read(cache, arrays.csr).ok());
  cache.end_prompt();
  ASSERT_GT(cache.stats().evicted_tokens, 0U);
  EXPECT_EQ(list_read(cache, arrays.csr).code(), Code::query_is_over);
  EXPECT_TRUE(cache.read_positions(0).empty());
}

struct Rotating {
  static constexpr std::string_view name = "rotating";
  static constexpr bool select_always = true;
  void select(HeadView<Rotating> head, QueryGroup, Selection& reads) const {
    for (const PageIndex page : head.pages()) reads.add(SelectedPage{page, {}, 0.0F, 0.0F, page.value == 0 ? 1 : 0});
  }
};

struct Merged {
  static constexpr std::string_view name = "merged";
  static constexpr bool select_always = true;
  void select(HeadView<Merged> head, QueryGroup, Selection& reads) const {
    for (const PageIndex page : head.pages()) reads.add(SelectedPage{page, {}, 0.5F, 0.5F, 0});
  }
};

struct OldestPage {  // selects no open page, and so a list without a gap that still ends too early
  static constexpr std::string_view name = "oldest_page";
  static constexpr bool select_always = true;
  void select(HeadView<OldestPage>, QueryGroup, Selection& reads) const { reads.add(PageIndex{0}); }
};

struct OpenFirst {  // select reads the open page alone, select_more then the rest
  static constexpr std::string_view name = "open_first";
  static constexpr bool select_always = true;
  void select(HeadView<OpenFirst> head, QueryGroup, Selection& reads) const { reads.add(head.open_page()); }
  void select_more(HeadView<OpenFirst>, QueryGroup, std::span<const SoftmaxState>, Selection& reads) const {
    reads.add_all();
  }
};

TEST(PageLists, WhatAListCannotSayIsRefused) {
  const CacheConfig config = small_config(4);
  const Rows rows(40, config, 3);
  const HeadRows<const float> q(rows.token_q(39).data(), config.query_heads, config.head_dim);
  Arrays arrays;
  const auto listed = [&](auto cache) {
    const Status status = list_selection(cache, q, arrays.csr);
    EXPECT_EQ(arrays.csr.rows(), 0U) << "nothing is listed of what is refused";
    EXPECT_EQ(arrays.csr.entries(), 0U);
    return status.code();
  };
  EXPECT_EQ(listed(filled<Oracle>(config, 40)), Code::page_read_in_part);

  EXPECT_EQ(listed(filled<Rotating>(config, 40)), Code::query_rotated);
  EXPECT_EQ(listed(filled<Merged>(config, 40)), Code::page_weighted);

  // A kernel that takes a token's place in the list for its position needs the whole sequence.
  const PageListOptions counts{.block_table = {}, .kernel_counts_positions = true};
  EXPECT_TRUE(list_resident(filled<StreamingLlm>(config, 32), arrays.csr, counts).ok());
  const Status gap = list_resident(filled<StreamingLlm>(config, 33), arrays.csr, counts);
  EXPECT_EQ(gap.code(), Code::list_has_gap);
  EXPECT_EQ(gap.value(), 1U) << "the page behind the sinks";
  EXPECT_EQ(gap.limit(), 8U);
  PagedKvCache<OldestPage> oldest = filled<OldestPage>(config, 40);
  EXPECT_EQ(list_selection(oldest, q, arrays.csr, counts).code(), Code::list_has_gap);
  EXPECT_TRUE(list_selection(oldest, q, arrays.csr).ok());
}

TEST(PageLists, WhereDistancesMatterAListWithAGapIsRefused) {
  const CacheConfig config = small_config(4);
  Arrays arrays;
  CacheConfig alibi = config;
  alibi.logits.alibi_slopes.assign(config.query_heads, 0.25F);
  CacheConfig window = config;
  window.logits.window = 10;
  for (const CacheConfig& positional : {alibi, window}) {
    EXPECT_TRUE(list_resident(filled<StreamingLlm>(positional, 32), arrays.csr).ok());
    EXPECT_EQ(list_resident(filled<StreamingLlm>(positional, 33), arrays.csr).code(), Code::list_has_gap);
    EXPECT_TRUE(list_resident(filled<Dense>(positional, 33), arrays.csr).ok());
  }
  EXPECT_TRUE(list_read(filled<Dense>(window, 10), arrays.csr).ok());
  EXPECT_EQ(list_read(filled<Dense>(window, 33), arrays.csr).code(), Code::list_has_gap)
      << "the old pages are not read";
  CacheConfig soft = config;
  soft.logits.soft_cap = 5.0F;
  EXPECT_TRUE(list_resident(filled<StreamingLlm>(soft, 33), arrays.csr).ok()) << "a cap knows no positions";

  CacheConfig rotary = config;
  rotary.rope.theta = 10000.0;
  StreamingLlm in_cache;
  in_cache.options.in_cache_positions = true;
  EXPECT_TRUE(list_resident(filled<StreamingLlm>(rotary, 32, in_cache), arrays.csr).ok()) << "nothing is evicted yet";
  EXPECT_EQ(list_resident(filled<StreamingLlm>(rotary, 33, in_cache), arrays.csr).code(), Code::query_rotated);
  EXPECT_EQ(list_read(filled<StreamingLlm>(rotary, 33, in_cache), arrays.csr).code(), Code::query_rotated);
}

TEST(PageLists, TheOpenPageComesLastWhateverTheOrderOfReading) {
  const CacheConfig config = small_config(4);
  const PagedKvCache<OpenFirst> cache = filled<OpenFirst>(config, 14);
  ASSERT_EQ(cache.latest_reads(0)[0].tokens, 2U);
  Arrays arrays;
  ASSERT_TRUE(list_read(cache, arrays.csr).ok());
  for (std::size_t h = 0; h < config.kv_heads; ++h) {
    const Request request = csr_request(arrays.csr, h, 4);
    EXPECT_EQ(request.tokens, 14U);
    for (std::uint32_t page = 0; page < 4; ++page) {
      EXPECT_EQ(request.pages[page], static_cast<std::int32_t>(cache.table(h)[{page}].page.value));
    }
  }
}

TEST(PageLists, ArraysThatAreTooSmallAreNamedAndLeftAlone) {
  const CacheConfig config = small_config(4);
  const PagedKvCache<Dense> cache = filled<Dense>(config, 10);  // 3 pages in each of 2 heads
  const auto csr = [&](std::size_t indptr, std::size_t indices, std::size_t rows) {
    Ints a(indptr), b(indices), c(rows);
    CsrPageLists lists(a, b, c);
    const Status status = list_resident(cache, lists);
    EXPECT_EQ(lists.rows(), status.ok() ? 2U : 0U);
    EXPECT_EQ(lists.entries(), status.ok() ? 6U : 0U);
    return status;
  };
  EXPECT_TRUE(csr(3, 6, 2).ok());
  for (const Status& status : {csr(2, 6, 2), csr(3, 5, 2), csr(3, 6, 1), csr(0, 0, 0)}) {
    EXPECT_EQ(status.code(), Code::lists_too_small);
  }
  EXPECT_EQ(csr(3, 5, 2).value(), 6U);
  EXPECT_EQ(csr(3, 5, 2).limit(), 5U);
  const auto blocks = [&](std::size_t tables, std::size_t max_pages, std::size_t rows) {
    Ints a(tables), b(rows);
    BlockTables lists(a, max_pages, b);
    const Status status = list_resident(cache, lists);
    EXPECT_EQ(lists.rows(), status.ok() ? 2U : 0U);
    return status.code();
  };
  EXPECT_EQ(blocks(6, 3, 2), Code::ok);
  EXPECT_EQ(blocks(6, 2, 2), Code::lists_too_small);
  EXPECT_EQ(blocks(5, 3, 2), Code::lists_too_small);
  EXPECT_EQ(blocks(6, 3, 1), Code::lists_too_small);
  EXPECT_EQ(blocks(0, 0, 2), Code::lists_too_small);

  Arrays arrays;
  const Ints table(2);
  EXPECT_EQ(list_resident(cache, arrays.csr, {.block_table = table, .kernel_counts_positions = false}).code(),
            Code::no_such_block);
}

TEST(PageLists, AnEmptySequenceIsAnEmptyRow) {
  const CacheConfig config = small_config(4);
  PagedKvCache<Dense> cache(config);
  Arrays arrays;
  ASSERT_TRUE(list_resident(cache, arrays.csr).ok());
  ASSERT_TRUE(list_resident(cache, arrays.blocks).ok());
  EXPECT_EQ(arrays.csr.rows(), 2U);
  EXPECT_EQ(arrays.csr.kv_indptr()[2], 0);
  EXPECT_EQ(arrays.csr.last_page_len()[1], 0);
  EXPECT_EQ(arrays.blocks.sequence_lengths()[1], 0);
  EXPECT_EQ(arrays.blocks.block_tables()[0], -1) << "padding";
  const std::vector<float> q(config.query_heads * config.head_dim);
  EXPECT_EQ(list_selection(cache, HeadRows<const float>(q.data(), 6, 12), arrays.csr).code(), Code::nothing_to_attend);
  EXPECT_EQ(list_selection(cache, HeadRows<const float>(q.data(), 5, 12), arrays.csr).code(), Code::nothing_to_attend);
  cache = filled<Dense>(config, 1);
  EXPECT_EQ(list_selection(cache, HeadRows<const float>(q.data(), 5, 12), arrays.csr).code(), Code::wrong_heads);
  cache.clear();
  EXPECT_EQ(list_read(cache, arrays.csr).code(), Code::query_is_over);
}

TEST(PageLists, SlotsOfTokensAreFoundOrGivenUp) {
  const CacheConfig config = small_config(4);
  const PagedKvCache<StreamingLlm> cache = filled<StreamingLlm>(config, 50);
  std::vector<std::int64_t> slots(54);
  for (std::size_t h = 0; h < config.kv_heads; ++h) {
    ASSERT_TRUE(map_slots(cache, h, Position{0}, slots).ok());
    const std::vector<Position> resident = cache.resident_positions(h);
    for (std::size_t t = 0; t < slots.size(); ++t) {
      const Position position{static_cast<std::int64_t>(t)};
      const bool held = std::find(resident.begin(), resident.end(), position) != resident.end();
      ASSERT_EQ(slots[t] >= 0, held) << "token " << t;
      if (!held) continue;
      const PageId page{static_cast<std::uint32_t>(slots[t] / 4)};
      const PagedKv<float, float> memory = cache.pages();
      const float* key = memory.keys + page.value * memory.key_page_stride +
                         static_cast<std::size_t>(slots[t] % 4) * memory.key_row_stride;
      const Rows rows(50, config, 5, 4.0);
      EXPECT_EQ(key[0], rows.key(t, h)[0]);
    }
  }
  std::vector<std::int64_t> newest(1);
  Ints table(13, 77);
  ASSERT_TRUE(map_slots(cache, 1, Position{49}, newest, {.block_table = table, .kernel_counts_positions = false}).ok());
  EXPECT_EQ(newest[0], 77 * 4 + 1);
  EXPECT_EQ(map_slots(cache, 1, Position{49}, newest,
                      {.block_table = std::span(table).first(12), .kernel_counts_positions = false})
                .code(),
            Code::no_such_block);
}

}  // namespace
}  // namespace kvsparse_test
