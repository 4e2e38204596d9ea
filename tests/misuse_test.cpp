// SPDX-License-Identifier: Apache-2.0
//
// Mistakes. Those of a policy's, a container's or an engine's author meet KVSPARSE_ASSERT, here one of our own, which
// names the condition; those of callers, such as rows of a wrong size, are a Status in every build and change nothing.
#include <stdexcept>

[[noreturn]] inline void tell_of_mistake(const char* condition) { throw std::logic_error(condition); }
#define KVSPARSE_ASSERT(condition) ((condition) ? void() : tell_of_mistake(#condition))

#include <gtest/gtest.h>

#include <functional>
#include <iostream>
#include <iterator>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "kvsparse/cache/attend_certified.hpp"
#include "kvsparse/interop/page_steering.hpp"
#include "kvsparse/interop/snapshot.hpp"
#include "kvsparse/kvsparse.hpp"
#include "kvsparse/policy/hash_attention.hpp"
#include "support/refusal.hpp"
#include "support/rows.hpp"

namespace kvsparse_test {
namespace {

using namespace kvsparse;
using Code = Status::Code;

std::size_t mistakes = 0;  // that were made
struct CountMistakes : testing::Environment {
  void TearDown() override { std::cout << mistakes << " mistakes\n"; }
};
[[maybe_unused]] const auto* const count_mistakes = testing::AddGlobalTestEnvironment(new CountMistakes);

/// The condition that was not kept.
template <class Mistake>
std::string broken_by(Mistake&& mistake) {
  ++mistakes;
  try {
    mistake();
  } catch (const std::logic_error& error) {
    return error.what();
  }
  return "nothing";
}

// --- containers -----------------------------------------------------------------------------------------------------

/// The act is refused in words that hold these.
template <class Act>
void expect_refusal(Act&& act, std::string_view words) {
  const std::string sentence = refusal(act);
  EXPECT_NE(sentence.find(words), std::string::npos) << sentence;
}

/// Keeps as many queries as there may be.
struct LongMemory {
  static constexpr std::string_view name = "long_memory";
  static constexpr std::size_t query_window = largest_size;
  PageIndex victim(HeadView<LongMemory> head) const { return *head.evictable_pages().begin(); }
};

/// Asks for more than any budget has, so that a sum with it wraps.
struct Insatiable {
  static constexpr std::string_view name = "insatiable";
  struct Options {
    bool pins = true;
    void visit(auto&& field) { field("pins", pins); }
  } options;
  std::size_t pinned_pages(const Geometry&) const { return options.pins ? ~std::size_t{0} : 0; }
  std::size_t slack_tokens() const { return options.pins ? 0 : ~std::size_t{0}; }
  PageIndex victim(HeadView<Insatiable> head) const { return *head.evictable_pages().begin(); }
  void trim(HeadView<Insatiable>, PageList&) const {}
};

TEST(Misuse, OfTraitsThatNoBudgetHolds) {
  CacheConfig config;
  config.head_dim = 8;
  config.budget_tokens = 64;
  Insatiable policy;
  for (const std::string_view sentence : {"pages that policy insatiable pins", "which leaves no page"}) {
    expect_refusal([&] { const PagedKvCache<Insatiable> cache(config, policy); }, sentence);
    policy.options.pins = false;
  }
}

template <class Layer>
void expect_to_be_too_large(const CacheConfig& config) {
  constexpr std::string_view sentence = "that can be addressed";
  expect_refusal([&] { const Layer layer(config); }, sentence);
  expect_refusal([&] { static_cast<void>(Layer::bytes_required(config)); }, sentence);
}

TEST(Misuse, OfMoreMemoryThanCanBeAddressed) {
  CacheConfig config;
  config.query_heads = config.head_dim = most_channels;
  config.page_size = 16;
  config.budget_tokens = 64;
  expect_to_be_too_large<LayerPages<LongMemory>>(config);  // products that a policy's trait makes too large
  expect_to_be_too_large<PagedKvCache<LongMemory>>(config);
  config.max_speculative = largest_size >> 10;  // and those that drafts do
  expect_to_be_too_large<LayerDrafts<Raas>>(config);
  expect_to_be_too_large<PagedKvCache<Raas, Half, Int8>>(config);
  expect_to_be_too_large<PagedKvCache<Compose<H2o, Quest>>>(config);
}

TEST(Misuse, OfAPageLedger) {
  EXPECT_EQ(broken_by([] { PageLedger(3, 2); }), "pages % heads == 0");
  PageLedger ledger(2);
  const PageId page = ledger.acquire();
  ledger.release(page);
  EXPECT_EQ(broken_by([&] { ledger.release(page); }), "references(page) > 0");
  EXPECT_EQ(broken_by([&] { ledger.retain(page); }), "references(page) > 0");
  EXPECT_EQ(broken_by([&] { (void)ledger.references({2}); }), "page.value < references_.size()");
  EXPECT_EQ(broken_by([&] { ledger.release({2}); }), "page.value < references_.size()");
  (void)ledger.acquire();
  (void)ledger.acquire();
  EXPECT_EQ(broken_by([&] { (void)ledger.acquire(); }), "!free_.empty()");
  EXPECT_EQ(ledger.free_pages(), 0U) << "mistakes change nothing";
}

TEST(Misuse, OfAPageTable) {
  PageTable table(2);
  EXPECT_EQ(broken_by([&] { table.add_token(); }), "!pages_.empty()");
  EXPECT_EQ(broken_by([&] { (void)table.back(); }), "!pages_.empty()");
  EXPECT_EQ(broken_by([&] { table.cut(1, 1); }), "pages <= pages_.size()");
  table.push_back({Position{0}, PageId{0}, 1, false});
  EXPECT_EQ(broken_by([&] { table.unpin({0}); }), "pages_[index.value].pinned");
  for (const std::function<void()>& mistake : std::vector<std::function<void()>>{
           [&] { (void)table[{1}]; },
           [&] { table.unpin({1}); },
           [&] { table.erase({1}); },
           [&] { table.move_to({1}, PageId{0}); },
       }) {
    EXPECT_EQ(broken_by(mistake), "index.value < pages_.size()");
  }
  table.push_back({Position{4}, PageId{1}, 1, false});
  const ResidentPage third{Position{8}, PageId{2}, 1, false};
  EXPECT_EQ(broken_by([&] { table.push_back(third); }), "pages_.size() < pages_.capacity()");
  EXPECT_EQ(table.size(), 2U);
  EXPECT_EQ(table.resident_tokens(), 2U);
}

TEST(Misuse, OfASelection) {
  Selection selection(4, 16, false);
  selection.begin(3);
  EXPECT_EQ(broken_by([&] { selection.add(PageIndex{3}); }), "selected.page.value < selected_.size()");
  EXPECT_EQ(broken_by([&] { (void)selection.contains({3}); }), "page.value < selected_.size()");
  const std::vector<float> too_few(2);
  EXPECT_EQ(broken_by([&] { selection.add_highest(too_few, 1); }), "scores.size() >= selected_.size()");
  const std::string no_mask = "mask_words_ > 0 && page.value < selected_.size()";
  EXPECT_EQ(broken_by([&] { (void)selection.token_mask({0}); }), no_mask);
  EXPECT_TRUE(selection.pages().empty());
  Selection of_tokens(4, 16, true);
  of_tokens.begin(3);
  EXPECT_EQ(broken_by([&] { (void)of_tokens.token_mask({3}); }), no_mask);
  PageList list(1);
  list.add({0});
  EXPECT_EQ(broken_by([&] { list.add({1}); }), "pages_.size() < pages_.capacity()");
}

TEST(Misuse, OfEvidence) {
  const float mass[] = {0.5F, -1.0F};  // two pages under one query; the second was not visited
  Evidence::Storage storage;
  storage.queries.size = 1;
  storage.resident_pages = 2;
  storage.mass = mass;
  const Evidence evidence(storage);
  EXPECT_EQ(evidence.mass({0}, 0), 0.5F);
  const std::string out_of_range = "page.value < storage_.resident_pages && query < group()";
  EXPECT_EQ(broken_by([&] { (void)evidence.mass({1}, 0); }), "visited(page, query)");
  EXPECT_EQ(broken_by([&] { (void)evidence.mass({2}, 0); }), out_of_range);
  EXPECT_EQ(broken_by([&] { (void)evidence.mass({0}, 1); }), out_of_range);
  EXPECT_EQ(broken_by([&] { (void)evidence.largest_token_mass({0}, 0); }), "storage_.largest_token != nullptr");
  EXPECT_EQ(broken_by([&] { (void)evidence.token_weights({0}, 0); }), "storage_.token_weights != nullptr");
  EXPECT_EQ(broken_by([&] { (void)evidence.log_sum_exp(1); }), "query < group()");
}

TEST(Misuse, OfLearnedHyperplanes) {
  const std::vector<float> weights(32 * 4), row(5);
  EXPECT_EQ(broken_by([&] { (void)LearnedHyperplanes{weights}.signature(row); }), "weights.size() == 32 * row.size()");
}

// --- policies -------------------------------------------------------------------------------------------------------

CacheConfig config_of_mistakes() {
  CacheConfig config;
  config.query_heads = 4;
  config.kv_heads = 2;
  config.head_dim = 3;
  config.page_size = 2;
  config.budget_tokens = 6;
  config.read_budget_tokens = 2;
  config.max_tokens = 64;
  config.max_speculative = 4;
  return config;
}

/// A policy that asks its view for what the view cannot tell, while the page it looks for is looked for.
struct Curious {
  static constexpr std::string_view name = "curious";
  static constexpr bool reads_rows = true;
  std::function<void(const HeadView<Curious>&)>* look;
  PageIndex victim(HeadView<Curious> head) const {
    (*look)(head);
    return {};
  }
};

TEST(Misuse, OfAPolicysView) {
  const CacheConfig config = config_of_mistakes();
  const Rows rows(8, config, 1);
  std::vector<float> row(3), wrong(4), pages(3);
  const QueryGroup queries{row.data(), 1, 3, 3, 1.0F};
  std::vector<std::string> broken;
  std::function<void(const HeadView<Curious>&)> look = [&](const HeadView<Curious>& head) {
    const auto tell = [&](const auto& mistake) { broken.push_back(broken_by(mistake)); };
    tell([&] { head.load_key({0}, Slot{0}, wrong); });
    tell([&] { head.load_key({0}, Slot{2}, row); });
    tell([&] { head.load_key({3}, Slot{0}, row); });
    tell([&] { head.load_value({0}, Slot{0}, wrong); });
    tell([&] { head.load_bounds({0}, row, row); });  // this policy asked for no summaries
    tell([&] { head.load_mean_key({0}, row); });
    tell([&] { head.upper_bounds(queries, pages); });
    tell([&] { head.pooled_upper_bounds(queries, pages); });
    tell([&] { head.largest_magnitudes(pages); });
    tell([&] { (void)head.open_page(); });  // none is, while a victim is looked for
    tell([&] { (void)head.first_position({3}); });
  };
  PagedKvCache<Curious> cache(config, Curious{&look});
  for (std::size_t t = 0; t < 7; ++t) ASSERT_TRUE(cache.append(rows.token_k(t), rows.token_v(t)).ok());
  const std::string_view expected[] = {
      "rows().load_key != nullptr && slot.value < page_size() && row.size() == head_dim()",
      "rows().load_key != nullptr && slot.value < page_size() && row.size() == head_dim()",
      "index.value < pages_.size()",
      "rows().load_value != nullptr && slot.value < page_size() && row.size() == value_dim()",
      "rows().load_bounds != nullptr && lowest.size() == head_dim() && highest.size() == head_dim()",
      "rows().load_key_sum != nullptr && mean.size() == head_dim()",
      "rows().upper_bounds != nullptr && bounds.size() >= size() * queries.size",
      "rows().upper_bounds != nullptr && bounds.size() >= size()",
      "rows().largest_magnitudes != nullptr && magnitudes.size() >= size()",
      "has_open_page()",
      "index.value < pages_.size()",
  };
  ASSERT_EQ(broken.size(), 2 * std::size(expected)) << "once for each kv head";
  for (std::size_t i = 0; i < broken.size(); ++i) EXPECT_EQ(broken[i], expected[i % std::size(expected)]) << i;
}

/// Names a page that it may not.
struct BlindEvictor {
  static constexpr std::string_view name = "blind_evictor";
  static constexpr bool pin_prompt = true;
  PageIndex named;
  PageIndex victim(HeadView<BlindEvictor>) const { return named; }
};

// The verbs of the decode step are noexcept: what is told there ends the program, with its sentence.
TEST(MisuseDeathTest, ByAPolicyThatNamesAPageWhichMayNotGo) {
  const CacheConfig config = config_of_mistakes();
  const Rows rows(8, config, 1);
  const auto decode = [&](PageIndex named) {
    PagedKvCache<BlindEvictor> cache(config, BlindEvictor{named});
    (void)cache.append_prompt(rows.token_k(0), rows.token_v(0));
    for (std::size_t t = 1; t < 7; ++t) (void)cache.append(rows.token_k(t), rows.token_v(t));
  };
  const std::string sentence = "victim must name a resident page that is not pinned";
  EXPECT_DEATH(decode({0}), sentence);  // pinned
  EXPECT_DEATH(decode({3}), sentence);  // not there
}

TEST(MisuseDeathTest, OfAQueryOfAnotherHeadOrTime) {
  const CacheConfig config = config_of_mistakes();
  const Rows rows(2, config, 1);
  PagedKvCache<Dense> cache(config);
  ASSERT_TRUE(cache.append(rows.token_k(0), rows.token_v(0)).ok());
  const std::string sentence = "kv_head < heads_.size\\(\\) && end > Position\\{0\\} && end <= next_";
  EXPECT_DEATH(cache.begin_query(2, Position{1}), sentence);
  EXPECT_DEATH(cache.begin_query(0, Position{2}), sentence);
  EXPECT_DEATH(cache.begin_query(0, Position{0}), sentence);
}

// --- engines --------------------------------------------------------------------------------------------------------

TEST(Misuse, OfHeadsAndLayersThatAreNotThere) {
  const CacheConfig config = config_of_mistakes();
  PagedKvCache<Dense> cache(config);
  for (const std::function<void()>& mistake : std::vector<std::function<void()>>{
           [&] { (void)cache.table(2); },
           [&] { (void)cache.resident_tokens(2); },
           [&] { (void)cache.resident_positions(2); },
           [&] { (void)cache.read_positions(2); },
       }) {
    EXPECT_EQ(broken_by(mistake), "kv_head < heads_.size()");
  }
  const std::vector<CacheConfig> configs(3, config);
  SequenceCache<PagedKvCache<Dense>> sequence(std::span<const CacheConfig>(configs), Dense{});
  EXPECT_EQ(broken_by([&] { (void)sequence.layer(3); }), "layer < layers_.size()");
  EXPECT_EQ(broken_by([&] { (void)std::as_const(sequence).layer(3); }), "layer < layers_.size()");
}

TEST(Misuse, OfAnAllocatorSharedByAllHeads) {
  struct Blocks {
    PageId acquire() { return {next++}; }
    void release(PageId) {}
    std::uint32_t next = 0;
  } blocks;
  PagesOfAllHeads<Blocks> pages(blocks, 2, 1);
  EXPECT_EQ(pages.acquire(), PageId{0});
  EXPECT_EQ(pages.acquire(), PageId{0});
  EXPECT_EQ(broken_by([&] { (void)pages.acquire(); }), "page_.value < heads_holding_.size()");
  pages.release({0});
  pages.release({0});
  const std::string not_held = "page.value < heads_holding_.size() && heads_holding_[page.value] > 0";
  EXPECT_EQ(broken_by([&] { pages.release({0}); }), not_held);
  EXPECT_EQ(broken_by([&] { pages.release({1}); }), not_held);
}

// --- callers --------------------------------------------------------------------------------------------------------

/// Everything that a cache saves.
template <class Cache>
std::string state_of(const Cache& cache) {
  std::ostringstream out;
  save(cache, out);
  return out.str();
}

// Each public function that takes rows, each of its spans, one element or row too few and one too many.
TEST(WrongSizes, AreRefusedAtEveryEntranceAndChangeNothing) {
  const CacheConfig config = config_of_mistakes();  // 4 query heads over 2, head_dim 3
  const Rows rows(4, config, 1);
  PagedKvCache<Quest> cache(config);
  for (std::size_t t = 0; t < 3; ++t) ASSERT_TRUE(cache.append_prompt(rows.token_k(t), rows.token_v(t)).ok());
  const std::string before = state_of(cache);

  std::vector<float> out(100);
  const auto in = [&](std::size_t size) { return std::span<const float>(rows.q).first(size); };
  const auto to = [&](std::size_t size) { return std::span<float>(out).first(size); };
  const auto head = [&](std::size_t heads, std::size_t dim) {
    return HeadRows<const float>(rows.q.data(), heads, dim);
  };
  const auto to_head = [&](std::size_t heads, std::size_t dim) { return HeadRows<float>(out.data(), heads, dim); };
  const auto chunk = [&](std::size_t tokens, std::size_t heads, std::size_t dim) {
    return TokenRows<const float>(rows.q.data(), tokens, heads, dim);
  };
  const auto to_chunk = [&](std::size_t tokens, std::size_t heads, std::size_t dim) {
    return TokenRows<float>(out.data(), tokens, heads, dim);
  };
  const auto refused = [&](const Status& status, Code code, const char* what) {
    ++mistakes;
    EXPECT_EQ(status.code(), code) << what << ": " << status.message();
    EXPECT_TRUE(state_of(cache) == before) << what;
  };

  constexpr std::size_t kv = 6, q = 12;
  for (const std::size_t wrong : {kv - 1, kv + 1, std::size_t{0}}) {
    refused(cache.append(in(wrong), in(kv)), Code::wrong_size, "append, keys");
    refused(cache.append(in(kv), in(wrong)), Code::wrong_size, "append, values");
    if (wrong != 0) refused(cache.append_prompt(in(wrong), in(kv)), Code::wrong_size, "append_prompt, keys");
    refused(cache.append_prompt(in(kv), in(wrong)), Code::wrong_size, "append_prompt, values");
  }
  for (const std::size_t wrong : {q - 1, q + 1, std::size_t{0}}) {
    refused(attend(cache, in(wrong), to(q)), Code::wrong_size, "attend, queries");
    refused(attend(cache, in(q), to(wrong)), Code::wrong_size, "attend, out");
    refused(attend_certified(cache, in(wrong), to(q), {}, to(4)), Code::wrong_size, "attend_certified, queries");
    refused(attend_certified(cache, in(q), to(wrong), {}, to(4)), Code::wrong_size, "attend_certified, out");
  }
  for (const std::size_t wrong : {3U, 5U}) {
    refused(attend(cache, in(q), to(q), to(wrong)), Code::wrong_size, "attend, log_sum_exp");
    refused(attend_certified(cache, in(q), to(q), to(wrong), to(4)), Code::wrong_size, "certified, log_sum_exp");
    refused(attend_certified(cache, in(q), to(q), {}, to(wrong)), Code::wrong_size, "certified, lost_mass_bound");
  }
  for (const std::size_t heads : {1U, 3U}) {
    refused(cache.append(head(heads, 3), head(2, 3)), Code::wrong_heads, "append");
    refused(cache.append(head(2, 3), head(heads, 3)), Code::wrong_heads, "append");
    refused(cache.append(chunk(2, heads, 3), chunk(2, 2, 3)), Code::wrong_heads, "append, a chunk");
    refused(cache.append_prompt(chunk(2, 2, 3), chunk(2, heads, 3)), Code::wrong_heads, "append_prompt");
    refused(cache.append_draft(chunk(1, heads, 3), chunk(1, 2, 3)), Code::wrong_heads, "append_draft");
    refused(attend(cache, head(heads, 3), to_head(4, 3)), Code::wrong_heads, "attend");
    refused(attend(cache, head(4, 3), to_head(heads, 3)), Code::wrong_heads, "attend");
    refused(attend_certified(cache, head(heads, 3), to_head(4, 3), {}, to(4)), Code::wrong_heads, "attend_certified");
    refused(attend_prompt(cache, chunk(2, heads, 3), to_chunk(2, 4, 3)), Code::wrong_heads, "attend_prompt");
    refused(attend_prompt(cache, chunk(2, 4, 3), to_chunk(2, heads, 3)), Code::wrong_heads, "attend_prompt");
  }
  for (const std::size_t dim : {2U, 4U}) {
    refused(cache.append(head(2, dim), head(2, 3)), Code::wrong_head_dim, "append");
    refused(cache.append(head(2, 3), head(2, dim)), Code::wrong_head_dim, "append");
    refused(cache.append_prompt(chunk(2, 2, dim), chunk(2, 2, 3)), Code::wrong_head_dim, "append_prompt");
    refused(cache.append_draft(chunk(1, 2, 3), chunk(1, 2, dim)), Code::wrong_head_dim, "append_draft");
    refused(attend(cache, head(4, dim), to_head(4, 3)), Code::wrong_head_dim, "attend");
    refused(attend(cache, head(4, 3), to_head(4, dim)), Code::wrong_head_dim, "attend");
    refused(attend_prompt(cache, chunk(2, 4, dim), to_chunk(2, 4, 3)), Code::wrong_head_dim, "attend_prompt");
    refused(attend_prompt(cache, chunk(2, 4, 3), to_chunk(2, 4, dim)), Code::wrong_head_dim, "attend_prompt");
  }
  for (const std::size_t tokens : {0U, 1U, 3U}) {
    refused(cache.append(chunk(2, 2, 3), chunk(tokens, 2, 3)), Code::wrong_tokens, "append, a chunk");
    refused(cache.append_prompt(chunk(2, 2, 3), chunk(tokens, 2, 3)), Code::wrong_tokens, "append_prompt");
    refused(cache.append_draft(chunk(2, 2, 3), chunk(tokens, 2, 3)), Code::wrong_tokens, "append_draft");
    refused(attend_prompt(cache, chunk(2, 4, 3), to_chunk(tokens, 4, 3)), Code::wrong_tokens, "attend_prompt");
  }
  refused(attend_prompt(cache, chunk(4, 4, 3), to_chunk(4, 4, 3)), Code::nothing_to_attend, "more queries than tokens");

  EXPECT_TRUE(cache.append(in(kv), in(kv)).ok());
  EXPECT_TRUE(attend(cache, in(q), to(q), to(4)).ok());
}

}  // namespace
}  // namespace kvsparse_test
