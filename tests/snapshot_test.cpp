// SPDX-License-Identifier: Apache-2.0
//
// Snapshots of one cache: what is refused, and that a refusal changes nothing. That every policy goes on from one to
// the bit is in conformance/ and model/.
#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <functional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "kvsparse/interop/snapshot.hpp"
#include "kvsparse/kvsparse.hpp"
#include "support/padding.hpp"
#include "support/rows.hpp"

namespace kvsparse_test {
namespace {

using namespace kvsparse;

CacheConfig small_config() {
  CacheConfig config;
  config.query_heads = 4;
  config.kv_heads = 2;
  config.head_dim = 5;
  config.page_size = 4;
  config.budget_tokens = 16;
  config.max_tokens = 400;
  return config;
}

template <class Cache>
std::string saved(const Cache& cache) {
  std::ostringstream out;
  save(cache, out);
  return out.str();
}

/// Policy states included, to the bit where that can be told.
template <class Cache>
bool same_state(const Cache& a, const Cache& b) {
  return padding_is_cleared ? saved(a) == saved(b) : saved(a).size() == saved(b).size();
}

/// The sentence of the refusal.
template <class Cache>
std::string refusal(Cache& cache, const std::string& snapshot) {
  std::istringstream in(snapshot);
  try {
    load(cache, in);
  } catch (const SnapshotError& error) {
    return error.what();
  }
  return "not refused";
}

/// Appends and attends tokens first .. end - 1, the first `prompt` of all a prompt; returns the outputs.
template <class Cache>
std::vector<float> decode(Cache& cache, const Rows& rows, std::size_t first, std::size_t end, std::size_t prompt) {
  std::vector<float> outputs, out(rows.query_heads * rows.head_dim);
  for (std::size_t t = first; t < end; ++t) {
    const auto k = rows.token_k(t), v = rows.token_v(t);
    EXPECT_TRUE((t < prompt ? cache.append_prompt(k, v) : cache.append(k, v)).ok());
    EXPECT_TRUE(attend(cache, rows.token_q(t), out).ok());
    outputs.insert(outputs.end(), out.begin(), out.end());
  }
  return outputs;
}

/// Uses all that a policy may ask for: states of every kind, a query window, mean summaries, one decision for all
/// heads.
struct EvictTogether {
  static constexpr std::string_view name = "evict_together";
  static constexpr PolicyScope scope = PolicyScope::layer;
  static constexpr EvidenceKind evidence = EvidenceKind::page_mass;
  static constexpr std::size_t query_window = 3;
  static constexpr PageSummary page_summary = PageSummary::mean;
  struct Options {
    std::size_t sinks = 1;
    void visit(auto&& field) { field("sinks", sinks); }
  } options;
  struct PageState {
    double likeness = 0.0;
  };
  struct HeadState {
    std::size_t seen = 0;
  };
  struct LayerState {
    std::size_t steps = 0;
  };
  std::size_t pinned_pages(const Geometry&) const { return options.sinks; }
  void observe(HeadView<EvictTogether> head, const Evidence& step) const {
    ++head.head_state().seen;
    const std::span<float> mean = head.scratch().first(head.head_dim());
    for (const PageIndex page : head.pages()) {
      head.load_mean_key(page, mean);
      for (std::size_t age = 0; age < head.recent_query_count(); ++age) {
        for (std::size_t i = 0; i < mean.size(); ++i) {
          head.state(page).likeness += static_cast<double>(mean[i] * head.recent_queries(age)[0][i]);
        }
      }
      if (step.visited(page)) head.state(page).likeness += static_cast<double>(step.group_mass(page));
    }
  }
  void on_step_end(LayerView<EvictTogether> layer) const { ++layer.layer_state().steps; }
  PageIndex victim(LayerView<EvictTogether> layer) const {
    return layer.head(0).lowest_evictable([&](PageIndex page) {
      double sum = static_cast<double>(layer.layer_state().steps % 7);
      for (std::size_t h = 0; h < layer.heads(); ++h) sum += layer.head(h).state(page).likeness;
      return sum;
    });
  }
};

template <class Cache>
Cache cache_after(std::size_t tokens, std::size_t prompt, const CacheConfig& config = small_config()) {
  Cache cache(config);
  decode(cache, Rows(tokens, config, 1), 0, tokens, prompt);
  return cache;
}

// --- what a snapshot is ---

TEST(Snapshot, ACacheGoesOnFromItToTheBit) {
  const CacheConfig config = small_config();
  const Rows rows(300, config, 1);
  const auto check = [&]<class Cache>(std::type_identity<Cache>) {
    for (const std::size_t at : {0U, 1U, 3U, 6U, 8U, 30U, 32U, 33U}) {
      Cache cache(config), loaded(config);
      decode(cache, rows, 0, at, 6);
      decode(loaded, Rows(50, config, 2), 0, 50, 3);  // whatever it held is gone
      std::istringstream in(saved(cache));
      load(loaded, in);
      EXPECT_TRUE(saved(loaded) == saved(cache));
      EXPECT_EQ(decode(loaded, rows, at, 300, 6), decode(cache, rows, at, 300, 6));
      EXPECT_EQ(loaded.resident_positions(1), cache.resident_positions(1));
      EXPECT_TRUE(same_state(loaded, cache));
    }
  };
  check(std::type_identity<PagedKvCache<EvictTogether>>{});
  check(std::type_identity<PagedKvCache<EvictTogether, Half, Int8>>{});
  check(std::type_identity<PagedKvCache<Compose<Raas, Quest>, Bfloat16, float>>{});
}

TEST(Snapshot, WhatThePolicyWouldSeeOfSummariesIsTheSame) {
  const CacheConfig config = small_config();
  const Rows rows(30, config, 1);
  PagedKvCache<Quest, Int8> cache(config);
  decode(cache, rows, 0, 30, 0);
  PagedKvCache<Quest, Int8> loaded(config);
  std::istringstream in(saved(cache));
  load(loaded, in);
  EXPECT_EQ(loaded.read_positions(0).size(), 0U);  // nobody has asked it anything
  EXPECT_EQ(loaded.stats().last_read_tokens, cache.stats().last_read_tokens);
  EXPECT_EQ(loaded.stats().peak_resident_bytes, cache.stats().peak_resident_bytes);
  std::vector<float> out(20);
  EXPECT_TRUE(attend(loaded, rows.token_q(3), out).ok());
  EXPECT_TRUE(attend(cache, rows.token_q(3), out).ok());
  EXPECT_EQ(loaded.read_positions(0), cache.read_positions(0));
  EXPECT_LT(loaded.read_positions(0).size(), 30U);
}

TEST(Snapshot, CostsWhatIsResident) {
  CacheConfig config = small_config();
  config.head_dim = 64;
  config.budget_tokens = 64;
  const std::size_t row = 2 * 64 * sizeof(float);  // a token's key and value
  const std::size_t header = saved(PagedKvCache<Raas>(config)).size();
  EXPECT_LT(header, 1500U);
  for (const std::size_t tokens : {10U, 64U, 200U}) {
    const auto cache = cache_after<PagedKvCache<Raas>>(tokens, 0, config);
    const std::size_t resident = 2 * cache.stats().resident_tokens;
    EXPECT_GE(saved(cache).size(), resident * row);
    EXPECT_LE(saved(cache).size(), header + resident * row * 11 / 10);
  }
}

TEST(Snapshot, SeveralInOneStream) {
  const auto first = cache_after<PagedKvCache<Raas>>(30, 5);
  const auto second = cache_after<PagedKvCache<Raas>>(21, 2);
  std::stringstream stream;
  save(first, stream);
  save(second, stream);
  PagedKvCache<Raas> cache(small_config());
  load(cache, stream);
  EXPECT_TRUE(saved(cache) == saved(first));
  load(cache, stream);
  EXPECT_TRUE(saved(cache) == saved(second));
}

TEST(Snapshot, ALongPromptKeepsTheBudgetItMade) {
  CacheConfig config = small_config();
  config.prompt_overflow = PromptOverflow::grow;
  config.max_prompt_tokens = 40;
  config.min_decode_tokens = 8;
  const auto cache = cache_after<PagedKvCache<Raas>>(90, 30, config);
  PagedKvCache<Raas> loaded(config);
  std::istringstream in(saved(cache));
  load(loaded, in);
  EXPECT_EQ(loaded.page_budget(), 10U);
  EXPECT_EQ(loaded.page_budget(), cache.page_budget());

  config.prompt_overflow = PromptOverflow::unpin_middle;
  const Rows rows(200, config, 1);
  PagedKvCache<Raas> original(config), copy(config);
  decode(original, rows, 0, 57, 60);  // in the middle of a prompt that is giving up pages
  std::istringstream again(saved(original));
  load(copy, again);
  EXPECT_EQ(decode(copy, rows, 57, 200, 60), decode(original, rows, 57, 200, 60));
}

// --- refusals ---

template <class Cache>
std::string refusal_of(const std::function<void(CacheConfig&)>& change) {
  CacheConfig config = small_config();
  change(config);
  Cache other(config);
  const std::string before = saved(other);
  const std::string sentence = refusal(other, saved(cache_after<PagedKvCache<Raas>>(20, 4)));
  EXPECT_EQ(saved(other) == before, sentence != "not refused");
  return sentence;
}

TEST(SnapshotRefusals, NameWhatDiffersAndBothValues) {
  const auto nothing = [](CacheConfig&) {};
  using Same = PagedKvCache<Raas>;
  EXPECT_EQ(refusal_of<Same>(nothing), "not refused");
  EXPECT_EQ(refusal_of<PagedKvCache<H2o>>(nothing), "policy is raas in the snapshot and h2o here");
  EXPECT_EQ((refusal_of<PagedKvCache<Raas, Half, float>>(nothing)), "keys is f32 in the snapshot and f16 here");
  EXPECT_EQ((refusal_of<PagedKvCache<Raas, float, Int8>>(nothing)), "values is f32 in the snapshot and int8 here");
  EXPECT_EQ(refusal_of<Same>([](CacheConfig& c) { c.query_heads = 8; }), "query_heads is 4 in the snapshot and 8 here");
  EXPECT_EQ(refusal_of<Same>([](CacheConfig& c) { c.kv_heads = 4; }), "kv_heads is 2 in the snapshot and 4 here");
  EXPECT_EQ(refusal_of<Same>([](CacheConfig& c) { c.head_dim = 6; }), "head_dim is 5 in the snapshot and 6 here");
  EXPECT_EQ(refusal_of<Same>([](CacheConfig& c) { c.page_size = 2; }), "page_size is 4 in the snapshot and 2 here");
  EXPECT_EQ(refusal_of<Same>([](CacheConfig& c) { c.budget_tokens = 20; }),
            "budget_tokens is 16 in the snapshot and 20 here");
  EXPECT_EQ(refusal_of<Same>([](CacheConfig& c) { c.read_budget_tokens = 8; }),
            "read_budget_tokens is 0 in the snapshot and 8 here");
  EXPECT_EQ(refusal_of<Same>([](CacheConfig& c) { c.max_tokens = 3; }), "max_tokens is 400 in the snapshot and 3 here");
  EXPECT_EQ(refusal_of<Same>([](CacheConfig& c) { c.prompt_overflow = PromptOverflow::unpin_middle; }),
            "prompt_overflow is error in the snapshot and unpin_middle here");
  EXPECT_EQ(refusal_of<Same>([](CacheConfig& c) { c.max_prompt_tokens = 1; }),
            "max_prompt_tokens is 0 in the snapshot and 1 here");
  EXPECT_EQ(refusal_of<Same>([](CacheConfig& c) { c.min_decode_tokens = 5; }),
            "min_decode_tokens is 0 in the snapshot and 5 here");
  EXPECT_EQ(refusal_of<Same>([](CacheConfig& c) { c.layer = 3; }), "layer is 0 in the snapshot and 3 here");
  EXPECT_EQ(refusal_of<Same>([](CacheConfig& c) { c.softmax_scale = 0.1F; }),
            "softmax_scale is 0 in the snapshot and 0.1 here");
  const auto turn_four = [](CacheConfig& c) {
    c.rope.theta = 10000.5;
    c.rope.rotary_dims = 4;
  };
  EXPECT_EQ(refusal_of<Same>(turn_four), "rope.theta is 0 in the snapshot and 10000.5 here");
  EXPECT_EQ(refusal_of<Same>([](CacheConfig& c) { c.logits.soft_cap = 30.0F; }),
            "soft_cap is 0 in the snapshot and 30 here");
  EXPECT_EQ(refusal_of<Same>([](CacheConfig& c) { c.logits.window = 9; }), "window is 0 in the snapshot and 9 here");
  EXPECT_EQ(refusal_of<Same>([](CacheConfig& c) {
              c.logits.sink_logits = {0.5F, 1.0F, 0.0F, -1.0F};
            }),
            "sink_logits is none in the snapshot and 0.5 1 0 -1 here");
}

TEST(SnapshotRefusals, NameEveryOption) {
  const std::string snapshot = saved(cache_after<PagedKvCache<Raas>>(20, 4));
  const auto with = [&](const char* key, const char* value) {
    Raas policy;
    EXPECT_TRUE(set_option(policy, {key, value}));
    PagedKvCache<Raas> cache(small_config(), policy);
    return refusal(cache, snapshot);
  };
  EXPECT_EQ(with("used", "rank"), "option used is alpha in the snapshot and rank here");
  EXPECT_EQ(with("alpha", "0.010000000000000002"),
            "option alpha is 0.01 in the snapshot and 0.010000000000000002 here");
  EXPECT_EQ(with("r", "0.25"), "option r is 0.5 in the snapshot and 0.25 here");
  EXPECT_EQ(with("evidence", "quest_bound"), "option evidence is exact_mass in the snapshot and quest_bound here");
  EXPECT_EQ(with("pin_prompt", "false"), "option pin_prompt is true in the snapshot and false here");
}

TEST(SnapshotRefusals, AStateOfAnotherSize) {
  struct Raas2 : Raas {  // as after a change of the policy's state that forgot the version
    struct HeadState {
      std::array<std::uint64_t, 9> more;
    };
    PageIndex victim(HeadView<Raas2>) const { return {}; }
    void observe(HeadView<Raas2>, const Evidence&) const {}
    void on_page_open(HeadView<Raas2>, PageIndex) const {}
    PagesUsed pages_used(HeadView<Raas2>) const { return {}; }
  };
  PagedKvCache<Raas2> cache(small_config());
  EXPECT_EQ(refusal(cache, saved(cache_after<PagedKvCache<Raas>>(20, 4))),
            "bytes of head state is 16 in the snapshot and 72 here");
}

/// Policies whose snapshots have everything in them, on as few bytes as possible.
CacheConfig tiny_config() {
  CacheConfig config;
  config.query_heads = 2;
  config.kv_heads = 2;
  config.head_dim = 1;
  config.page_size = 2;
  config.budget_tokens = 6;
  return config;
}

template <class Cache>
void expect_every_damage_refused() {
  const CacheConfig config = tiny_config();
  const std::string good = saved(cache_after<Cache>(11, 3, config));
  Cache cache = cache_after<Cache>(7, 2, config);
  const std::string before = saved(cache);
  std::istringstream first(good);
  Cache copy = cache;
  load(copy, first);  // it is good

  for (std::size_t length = 0; length < good.size(); ++length) {
    ASSERT_NE(refusal(cache, good.substr(0, length)), "not refused") << length;
    ASSERT_TRUE(length % 64 != 0 || saved(cache) == before) << length;
  }
  for (std::size_t at = 0; at < good.size(); ++at) {
    for (const int flip : {0x01, 0x80, 0xFF}) {
      std::string bad = good;
      bad[at] = static_cast<char>(bad[at] ^ flip);
      ASSERT_NE(refusal(cache, bad), "not refused") << "byte " << at << " of " << good.size();
    }
    ASSERT_TRUE(at % 64 != 0 || saved(cache) == before) << at;
  }
  EXPECT_TRUE(saved(cache) == before);
  const Rows rows(60, config, 1);
  Cache untouched = cache_after<Cache>(7, 2, config);
  EXPECT_EQ(decode(cache, rows, 7, 60, 2), decode(untouched, rows, 7, 60, 2));
}

TEST(SnapshotRefusals, EveryFlippedByteAndEveryShortStream) {
  expect_every_damage_refused<PagedKvCache<Raas>>();
  expect_every_damage_refused<PagedKvCache<Compose<Raas, Quest>, Half, Int8>>();
  expect_every_damage_refused<PagedKvCache<EvictTogether>>();
}

TEST(SnapshotRefusals, WhatIsNoSnapshot) {
  PagedKvCache<Raas> cache(small_config());
  EXPECT_NE(refusal(cache, "").find("ends, or fails, after 0 bytes"), std::string::npos);
  EXPECT_NE(refusal(cache, "GGUF0000000000000").find("no snapshot"), std::string::npos);
  std::string other = saved(cache);
  std::swap(other[8], other[11]);
  std::swap(other[9], other[10]);
  EXPECT_NE(refusal(cache, other).find("other byte order"), std::string::npos);
  std::string newer = saved(cache);
  newer[12] = 2;
  EXPECT_NE(refusal(cache, newer).find("format 2; this library reads format 1"), std::string::npos);
}

// --- crafted: the checksum is right, the state is not ---

/// The bytes of a snapshot, to change what is in its state and make the checksum right again.
class Crafted {
 public:
  explicit Crafted(std::string snapshot) : bytes_(std::move(snapshot)) {
    std::uint64_t facts;
    std::memcpy(&facts, bytes_.data() + 16, 8);
    state_ = 16 + 8 + facts + 8 + 8;
  }
  template <class T>
  Crafted& set(std::size_t at, T value) {
    std::memcpy(bytes_.data() + state_ + at, &value, sizeof value);
    return *this;
  }
  template <class T>
  T get(std::size_t at) const {
    T value;
    std::memcpy(&value, bytes_.data() + state_ + at, sizeof value);
    return value;
  }
  /// The state's length as stated.
  Crafted& state_bytes(std::uint64_t length) {
    std::memcpy(bytes_.data() + state_ - 8, &length, 8);
    return *this;
  }
  Crafted& append_to_state(std::size_t count) {
    std::uint64_t length;
    std::memcpy(&length, bytes_.data() + state_ - 8, 8);
    bytes_.insert(bytes_.size() - 8, std::string(count, '\0'));
    return state_bytes(length + count);
  }
  std::string done() const {
    Crc64 checksum;
    checksum.add(std::as_bytes(std::span(bytes_).first(bytes_.size() - 8)));
    const std::uint64_t value = checksum.value();
    std::string result = bytes_;
    std::memcpy(result.data() + result.size() - 8, &value, 8);
    return result;
  }

 private:
  std::string bytes_;
  std::size_t state_;
};

// Where things lie in the state of a layer without layer state, as layer_image.hpp writes it.
constexpr std::size_t length_at = 0, prompt_ended_at = 8, prompt_tokens_at = 9, peak_tokens_at = 17, peak_pages_at = 25,
                      head_at = 41;

/// Offsets in a head of Raas: 16 bytes of head state, then the pages, 16 bytes of state each.
struct HeadOfRaas {
  std::size_t evictions = head_at;
  std::size_t count = head_at + 5 * 8 + 16;
  std::size_t row_bytes;
  explicit HeadOfRaas(std::size_t row) : row_bytes(row) {}
  std::size_t page(std::size_t index) const { return count + 8 + index * (9 + 16 + 4 * row_bytes); }
};

TEST(SnapshotRefusals, StatesThatNoCacheGetsInto) {
  const auto original = cache_after<PagedKvCache<Raas>>(30, 6);  // 2 pinned pages, 2 others; 30 = 7 pages and a half
  const std::string good = saved(original);
  const HeadOfRaas head(2 * 8 * sizeof(float));
  ASSERT_EQ(Crafted(good).get<std::int64_t>(length_at), 30);
  ASSERT_EQ(Crafted(good).get<std::uint64_t>(head.count), 4U);
  ASSERT_EQ(Crafted(good).get<std::uint64_t>(head.evictions), 4U);
  ASSERT_EQ(Crafted(good).get<std::int64_t>(head.page(1)), 4);
  ASSERT_EQ(Crafted(good).get<std::int64_t>(head.page(3)), 28);
  const std::int64_t third = Crafted(good).get<std::int64_t>(head.page(2));

  PagedKvCache<Raas> cache(small_config());
  const std::string before = saved(cache);
  const auto expect_refusal = [&](const Crafted& crafted, std::string_view words) {
    const std::string sentence = refusal(cache, crafted.done());
    EXPECT_NE(sentence.find(words), std::string::npos) << sentence << "\nexpected: " << words;
    EXPECT_TRUE(saved(cache) == before);
  };
  EXPECT_EQ(refusal(cache, Crafted(good).done()), "not refused");
  cache.clear();

  expect_refusal(Crafted(good).set(length_at, std::int64_t{-1}), "a length of -1 is not in 0 .. 2^60");
  expect_refusal(Crafted(good).set(length_at, std::int64_t{1} << 61), "is not in 0 .. 2^60");
  expect_refusal(Crafted(good).set(length_at, std::int64_t{40}), "are not the 10 that 40 tokens need");
  expect_refusal(Crafted(good).set(length_at, std::int64_t{5}), "a prompt of 6 tokens, ended, does not fit 5");
  expect_refusal(Crafted(good).set(prompt_ended_at, std::uint8_t{2}), "does not fit 30");
  expect_refusal(Crafted(good).set(prompt_ended_at, std::uint8_t{0}), "6 tokens, not ended, does not fit 30 tokens");
  expect_refusal(Crafted(good).set(prompt_tokens_at, std::uint64_t{31}), "a prompt of 31 tokens");
  expect_refusal(Crafted(good).set(prompt_tokens_at, std::uint64_t{20}), "pins 5 pages exceeds the 4");
  expect_refusal(Crafted(good).set(prompt_tokens_at, std::uint64_t{3}), "position 4 is pinned");
  expect_refusal(Crafted(good).set(peak_tokens_at, std::uint64_t{13}), "a peak of 13 tokens");
  expect_refusal(Crafted(good).set(peak_tokens_at, std::uint64_t{17}), "a peak of 17 tokens");
  expect_refusal(Crafted(good).set(peak_pages_at, std::uint64_t{9}), "9 pages does not fit");
  expect_refusal(Crafted(good).set(head.evictions, std::uint64_t{3}), "4 resident and 3 evicted pages are not the 8");
  expect_refusal(Crafted(good).set(head.count, std::uint64_t{5}), "5 resident pages exceed the budget of 4");
  expect_refusal(Crafted(good).set(head.count, ~std::uint64_t{0}), "exceed the budget of 4");
  expect_refusal(Crafted(good).set(head.count, std::uint64_t{3}).set(head.evictions, std::uint64_t{5}), "is missing");
  expect_refusal(Crafted(good).set(head.page(2), std::int64_t{5}), "begins at position 5");
  expect_refusal(Crafted(good).set(head.page(2), std::int64_t{4}), "begins at position 4");    // twice the same
  expect_refusal(Crafted(good).set(head.page(2), std::int64_t{32}), "begins at position 32");  // beyond the end
  expect_refusal(Crafted(good).set(head.page(2), std::int64_t{-4}), "begins at position -4");
  expect_refusal(Crafted(good).set(head.page(3), third + 4), third + 4 == 28 ? "not refused" : "is missing");
  expect_refusal(Crafted(good).set(head.page(2) + 8, std::uint8_t{1}), "is pinned, which this cache");
  expect_refusal(Crafted(good).set(head.page(1) + 8, std::uint8_t{0}), "is not pinned, which this cache");
  expect_refusal(Crafted(good).set(head.page(1) + 8, std::uint8_t{3}), "the pin of a page is 3");
  expect_refusal(Crafted(good).append_to_state(1), "1 bytes are left after the last page");
  expect_refusal(Crafted(good).state_bytes(std::uint64_t{1} << 40), "bytes of state; here there can be at most");
  expect_refusal(Crafted(good).state_bytes(Crafted(good).get<std::uint64_t>(0)), "checksum");
}

TEST(SnapshotRefusals, APinnedPageThatIsMissing) {
  const std::string good = saved(cache_after<PagedKvCache<StreamingLlm>>(30, 0));
  Crafted crafted(good);
  const std::size_t first_page = head_at + 5 * 8 + 8;
  ASSERT_EQ(crafted.get<std::int64_t>(first_page), 0);
  ASSERT_EQ(crafted.get<std::uint8_t>(first_page + 8), 1);
  crafted.set(first_page, std::int64_t{4}).set(first_page + 8, std::uint8_t{0});
  PagedKvCache<StreamingLlm> cache(small_config());
  EXPECT_EQ(refusal(cache, crafted.done()), "one of the first 1 pages, which are never given up, is missing");
}

TEST(SnapshotRefusals, HeadsThatDisagreeUnderAPolicyThatEvictsThemTogether) {
  const std::string good = saved(cache_after<PagedKvCache<EvictTogether, float>>(30, 0));
  Crafted crafted(good);
  const std::size_t page_bytes = 9 + 8 + 4 * 2 * 8 * sizeof(float);
  const std::size_t first_page = head_at + 8 + 5 * 8 + 8 + 3 * 2 * 5 * sizeof(float) + 8;
  ASSERT_EQ(crafted.get<std::uint64_t>(first_page - 8), 4U);
  ASSERT_EQ(crafted.get<std::int64_t>(first_page), 0);
  const auto second = crafted.get<std::int64_t>(first_page + page_bytes);
  const auto third = crafted.get<std::int64_t>(first_page + 2 * page_bytes);
  const std::int64_t other = second > 4 ? 4 : second + 4 < third ? second + 4 : -1;
  ASSERT_NE(other, -1) << "choose another seed";
  crafted.set(first_page + page_bytes, other);
  PagedKvCache<EvictTogether> cache(small_config());
  EXPECT_EQ(refusal(cache, crafted.done()),
            "kv head 1 holds other positions than head 0; this policy evicts them together");
}

TEST(SnapshotRefusals, MoreTokensThanAKeeperOfAllHasRoomFor) {
  const std::string good = saved(cache_after<PagedKvCache<Dense>>(30, 0));
  PagedKvCache<Dense> cache(small_config());
  EXPECT_EQ(refusal(cache, Crafted(good).set(length_at, std::int64_t{401}).done()),
            "401 tokens exceed max_tokens = 400");
}

// --- all layers of a sequence ---

using Layers = SequenceCache<PagedKvCache<Raas>>;

Layers sequence_of(std::size_t layers) {
  std::vector<CacheConfig> configs(layers, tiny_config());
  for (std::size_t l = 0; l < layers; ++l) {
    configs[l].layer = l;
    configs[l].budget_tokens += 2 * l;
  }
  return Layers(configs, Raas{});
}

std::vector<float> decode(Layers& sequence, std::size_t first, std::size_t end, std::size_t prompt) {
  std::vector<float> outputs, out(2);
  for (std::size_t t = first; t < end; ++t) {
    for (std::size_t l = 0; l < sequence.layers(); ++l) {
      const Rows rows(end, tiny_config(), 30 + l);
      const auto k = rows.token_k(t), v = rows.token_v(t);
      EXPECT_TRUE((t < prompt ? sequence.append_prompt(l, k, v) : sequence.append(l, k, v)).ok());
      EXPECT_TRUE(sequence.attend(l, rows.token_q(t), std::span<float>(out)).ok());
      outputs.insert(outputs.end(), out.begin(), out.end());
    }
  }
  return outputs;
}

TEST(SequenceSnapshot, AllLayersGoOnToTheBit) {
  for (const std::size_t at : {0U, 2U, 9U, 20U}) {
    Layers sequence = sequence_of(3), loaded = sequence_of(3);
    decode(sequence, 0, at, 3);
    decode(loaded, 0, 5, 1);
    const Rows rows(1, tiny_config(), 1);
    ASSERT_TRUE(loaded.append(0, rows.token_k(0), rows.token_v(0)).ok());  // in the middle of a step that is lost
    std::istringstream in(saved(sequence));
    load(loaded, in);
    EXPECT_EQ(loaded.turn(), 0U);
    EXPECT_EQ(loaded.next_position(), sequence.next_position());
    EXPECT_EQ(decode(loaded, at, 60, 3), decode(sequence, at, 60, 3));
    EXPECT_TRUE(same_state(loaded, sequence));
  }
}

TEST(SequenceSnapshot, IsRefusedAsAWhole) {
  Layers sequence = sequence_of(3);
  decode(sequence, 0, 11, 3);
  const std::string good = saved(sequence);
  Layers other = sequence_of(3);
  decode(other, 0, 7, 2);
  const std::string before = saved(other);
  for (std::size_t at = 0; at < good.size(); at += 7) {
    std::string bad = good;
    bad[at] = static_cast<char>(bad[at] ^ 0x10);
    ASSERT_NE(refusal(other, bad), "not refused") << at;
    ASSERT_NE(refusal(other, good.substr(0, at)), "not refused") << at;
  }
  EXPECT_TRUE(saved(other) == before);

  Layers two = sequence_of(2);
  EXPECT_EQ(refusal(two, good), "layers is 3 in the snapshot and 2 here");
  PagedKvCache<Raas> one(tiny_config());
  EXPECT_NE(refusal(one, good), "not refused");
  EXPECT_NE(refusal(other, saved(one)), "not refused");
}

TEST(SequenceSnapshot, LayersMustBeEquallyFar) {
  Layers near = sequence_of(2), far = sequence_of(2);
  decode(near, 0, 5, 2);
  decode(far, 0, 6, 2);
  const std::string near_bytes = saved(near), far_bytes = saved(far);
  const std::string header = near_bytes.substr(0, near_bytes.find("KVSPARSE", 8));
  std::string mixed = header;
  mixed += saved(std::as_const(far).layer(0));
  mixed += saved(std::as_const(near).layer(1));
  Layers sequence = sequence_of(2);
  EXPECT_EQ(refusal(sequence, mixed), "layer 1 has 5 tokens, 2 of them prompt, and layer 0 has 6 and 2");
  EXPECT_EQ(sequence.next_position(), Position{0});
  EXPECT_EQ(sequence.layer(0).next_position(), Position{0});
}

TEST(SequenceSnapshot, ThePoolMustHaveThePagesOfAllLayers) {
  std::vector<CacheConfig> configs(3, small_config());
  for (std::size_t l = 0; l < 3; ++l) configs[l].layer = l;
  using Shared = SequenceCache<PagedKvCache<Raas>>;
  const auto fill = [&](Shared& sequence, std::size_t tokens) {
    const Rows rows(tokens, small_config(), 5);
    for (std::size_t t = 0; t < tokens; ++t) {
      for (std::size_t l = 0; l < 3; ++l) ASSERT_TRUE(sequence.append(l, rows.token_k(t), rows.token_v(t)).ok());
    }
  };
  PagePool<float> pool(configs[0].geometry(), PageSummary::none, 24 + 6);
  Shared full(configs, pool, Raas{});
  fill(full, 40);  // 4 pages of 2 heads in 3 layers
  const std::string good = saved(full);
  Shared other(configs, pool, Raas{});
  fill(other, 3);  // a page for each head: the rest
  EXPECT_EQ(pool.free_pages(), 0U);
  const std::string before = saved(other);
  EXPECT_EQ(refusal(other, good), "the snapshot holds 24 pages; the pool has 6 for them");
  EXPECT_TRUE(saved(other) == before);
  EXPECT_EQ(pool.free_pages(), 0U);

  std::istringstream again(good);
  load(full, again);  // its own pages make room, all layers' together
  EXPECT_TRUE(saved(full) == good);
  full.layer(2).clear();
  EXPECT_EQ(refusal(other, good), "the snapshot holds 24 pages; the pool has 14 for them");
  full.clear();
  std::istringstream in(good);
  load(other, in);
  EXPECT_TRUE(saved(other) == good);
  EXPECT_EQ(pool.free_pages(), 6U);
}

TEST(Snapshot, OfAForkHoldsItsSharedPagesAndTakesPagesOfItsOwn) {
  CacheConfig config = small_config();
  const Rows rows(60, config, 1);
  PagePool<float> pool(config.geometry(), PageSummary::none, 40);
  PagedKvCache<Raas> parent(config, pool);
  decode(parent, rows, 0, 14, 5);
  PagedKvCache<Raas> child = parent.fork();
  decode(child, rows, 14, 30, 5);  // gives up a page that the parent still holds
  EXPECT_GT(child.stats().evicted_shared_pages, 0U);
  PagedKvCache<Raas> loaded = parent.fork();
  std::istringstream in(saved(child));
  load(loaded, in);
  EXPECT_EQ(loaded.stats().evicted_shared_pages, child.stats().evicted_shared_pages);
  EXPECT_EQ(loaded.stats().shared_bytes, 0U);
  const std::string of_parent = saved(parent);
  EXPECT_EQ(decode(loaded, rows, 30, 60, 5), decode(child, rows, 30, 60, 5));
  for (const std::size_t head : {0U, 1U}) EXPECT_EQ(loaded.resident_positions(head), child.resident_positions(head));
  EXPECT_GE(child.stats().evicted_shared_pages, loaded.stats().evicted_shared_pages);  // the child alone still shares
  EXPECT_TRUE(saved(parent) == of_parent);
}

TEST(SequenceSnapshot, IsSavedBetweenSteps) {
  Layers sequence = sequence_of(2);
  const Rows rows(1, tiny_config(), 1);
  ASSERT_TRUE(sequence.append(0, rows.token_k(0), rows.token_v(0)).ok());
  std::ostringstream out;
  EXPECT_THROW(save(sequence, out), SnapshotError);
  EXPECT_TRUE(out.str().empty());
}

// --- streams that fail ---

/// Takes or gives so many bytes, then no more.
class ShortBuffer : public std::stringbuf {
 public:
  ShortBuffer(const std::string& content, std::streamsize most) : std::stringbuf(content), most_(most) {}

 protected:
  std::streamsize xsputn(const char*, std::streamsize count) override {
    const std::streamsize taken = std::min(count, most_);
    most_ -= taken;
    return taken;
  }
  std::streamsize xsgetn(char* to, std::streamsize count) override {
    const std::streamsize given = std::stringbuf::xsgetn(to, std::min(count, most_));
    most_ -= given;
    return given;
  }

 private:
  std::streamsize most_;
};

TEST(SnapshotStreams, AFullDiskIsNoticed) {
  const auto cache = cache_after<PagedKvCache<Raas>>(11, 3, tiny_config());
  const auto length = static_cast<std::streamsize>(saved(cache).size());
  for (std::streamsize most = 0; most < length; ++most) {
    ShortBuffer buffer("", most);
    std::ostream out(&buffer);
    EXPECT_THROW(save(cache, out), SnapshotError) << most;
    ShortBuffer again("", most);
    std::ostream throwing(&again);
    throwing.exceptions(std::ios::badbit);
    EXPECT_THROW(save(cache, throwing), std::ios::failure) << most;
  }
  ShortBuffer buffer("", length);
  std::ostream out(&buffer);
  save(cache, out);
}

TEST(SnapshotStreams, AFailingReadChangesNothing) {
  const std::string good = saved(cache_after<PagedKvCache<Raas>>(11, 3, tiny_config()));
  auto cache = cache_after<PagedKvCache<Raas>>(5, 1, tiny_config());
  const std::string before = saved(cache);
  for (std::size_t most = 0; most < good.size(); ++most) {
    ShortBuffer buffer(good, static_cast<std::streamsize>(most));
    std::istream in(&buffer);
    EXPECT_THROW(load(cache, in), SnapshotError) << most;
    ShortBuffer again(good, static_cast<std::streamsize>(most));
    std::istream throwing(&again);
    throwing.exceptions(std::ios::badbit | std::ios::failbit | std::ios::eofbit);
    EXPECT_THROW(load(cache, throwing), std::ios::failure) << most;
  }
  EXPECT_TRUE(saved(cache) == before);
  std::istringstream empty;
  empty.setstate(std::ios::badbit);
  EXPECT_THROW(load(cache, empty), SnapshotError);
}

TEST(SnapshotFacts, AreShownInPrintableCharactersAndNotAtAnyLength) {
  using Facts = detail::CacheFacts;
  const Facts here{{"policy", "raas"}};
  const std::string strange = std::string("\x1b[2J\n\0\xff", 7) + std::string(100'000, 'x');
  for (const Facts& facts : {Facts{{"policy", strange}}, Facts{{strange, std::string(100'000, '\t')}}}) {
    const std::string sentence = detail::difference(facts, here);
    EXPECT_LT(sentence.size(), 1000U);
    EXPECT_NE(sentence.find("raas"), std::string::npos) << "what is expected is told";
    for (const char c : sentence) EXPECT_TRUE(c >= ' ' && c <= '~') << static_cast<int>(c);
  }
}

}  // namespace
}  // namespace kvsparse_test
