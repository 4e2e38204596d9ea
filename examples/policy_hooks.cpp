// SPDX-License-Identifier: Apache-2.0
// Every hook of the policy contract in a policy of a few lines: copy the one that is nearest to yours. None of them is
// good; what each hook may do and when it is called stands in policy/policy.hpp. The program decodes 200 tokens under
// each, with budgets of 64 to keep and to read.
#include <kvsparse/kvsparse.hpp>

#include <algorithm>
#include <cmath>
#include <iomanip>
#include <iostream>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

using namespace kvsparse;

// --- evictors ---

// victim: the page to give up when another is due. All that an evictor needs.
struct OldestFirst {
  static constexpr std::string_view name = "oldest_first";
  PageIndex victim(HeadView<OldestFirst> head) const {
    return head.lowest_evictable([&](PageIndex page) { return head.first_position(page); });
  }
};

// pinned_pages: how many pages from the sequence's start are never victims.
struct KeepsTwoPages : OldestFirst {
  static constexpr std::string_view name = "keeps_two_pages";
  PageIndex victim(HeadView<KeepsTwoPages> head) const { return *head.evictable_pages().begin(); }
  std::size_t pinned_pages(const Geometry&) const { return 2; }
};

// pin_prompt, and problem(geometry): a sentence if the policy cannot work on this shape.
struct KeepsThePrompt {
  static constexpr std::string_view name = "keeps_the_prompt";
  static constexpr bool pin_prompt = true;
  std::string problem(const Geometry& geometry) const {
    return geometry.page_size > 64 ? "page_size = " + std::to_string(geometry.page_size) + " exceeds 64" : "";
  }
  PageIndex victim(HeadView<KeepsThePrompt> head) const { return *head.evictable_pages().begin(); }
};

// Options: named once in visit, they are what command lines set and snapshots store. Enums have names, presets too.
struct PartOfTheWay {
  static constexpr std::string_view name = "part_of_the_way";
  enum class From { oldest, newest };
  static constexpr std::string_view names_of(From) { return "oldest|newest"; }
  struct Options {
    From from = From::oldest;
    double share = 0.25;  // of the evictable pages are spared at that end
    void visit(auto&& field) {
      field("from", from);
      field("share", share);
    }
    std::string problem() const {
      return share >= 0.0 && share <= 1.0 ? "" : "share = " + std::to_string(share) + " is not in [0, 1]";
    }
    static constexpr std::string_view presets = "middle";
    bool preset(std::string_view preset) { return preset == "middle" && ((share = 0.5), true); }
  } options;
  PageIndex victim(HeadView<PartOfTheWay> head) const {
    const auto last = static_cast<double>(head.evictable_count() - 1);
    auto skip = static_cast<std::size_t>(last * (options.from == From::oldest ? options.share : 1.0 - options.share));
    return head.lowest_evictable([&](PageIndex) { return skip-- != 0; });
  }
};

// evidence, observe, PageState: what the kernel saw becomes what the policy remembers of a page. A page that no query
// has read yet is not one that nobody wants.
struct LowestMass {
  static constexpr std::string_view name = "lowest_mass";
  static constexpr EvidenceKind evidence = EvidenceKind::page_mass;
  struct PageState {
    float mass = std::numeric_limits<float>::infinity();
  };
  void observe(HeadView<LowestMass> head, const Evidence& step) const {
    for (const PageIndex page : head.pages()) {
      if (step.visited(page)) head.state(page).mass = step.group_mass(page);
    }
  }
  PageIndex victim(HeadView<LowestMass> head) const {
    return head.lowest_evictable([&](PageIndex page) { return head.state(page).mass; });
  }
};

// on_page_open, on_append, on_page_full, reads_rows: look at keys and values as they come.
struct ShortestKeys {
  static constexpr std::string_view name = "shortest_keys";
  static constexpr bool reads_rows = true;
  struct PageState {
    float longest, mean;
  };
  void on_page_open(HeadView<ShortestKeys> head, PageIndex page) const { head.state(page) = {0.0F, 0.0F}; }
  void on_append(HeadView<ShortestKeys> head, PageIndex page, Slot slot) const {
    const std::span<float> key = head.scratch().first(head.head_dim());
    head.load_key(page, slot, key);
    float square = 0.0F;
    for (const float x : key) square += x * x;
    head.state(page).longest = std::max(head.state(page).longest, square);
  }
  void on_page_full(HeadView<ShortestKeys> head, PageIndex page) const {
    head.state(page).mean = head.state(page).longest / static_cast<float>(head.page_size());
  }
  PageIndex victim(HeadView<ShortestKeys> head) const {
    return head.lowest_evictable([&](PageIndex page) { return head.state(page).mean; });
  }
};

// period, trim, slack_tokens: many victims at once, every 32 decode steps; victim keeps the budget in between.
struct HalvesTheCache {
  static constexpr std::string_view name = "halves_the_cache";
  static constexpr std::size_t period = 32;
  static constexpr std::size_t slack_tokens = 32;
  void trim(HeadView<HalvesTheCache> head, PageList& victims) const {
    for (const PageIndex page : head.evictable_pages()) {
      if (head.size() - victims.pages().size() > head.page_budget() / 2) victims.add(page);
    }
  }
  PageIndex victim(HeadView<HalvesTheCache> head) const { return *head.evictable_pages().begin(); }
};

// query_window, on_prompt_end: recent queries judge the prompt once, before the first decode token.
struct JudgedOnce {
  static constexpr std::string_view name = "judged_once";
  static constexpr bool reads_rows = true;
  static constexpr std::size_t query_window = 4;
  struct PageState {
    float score;
  };
  void on_prompt_end(HeadView<JudgedOnce> head) const {
    const std::span<float> key = head.scratch().first(head.head_dim());
    for (const PageIndex page : head.pages()) {
      head.load_key(page, Slot{0}, key);
      for (std::size_t age = 0; age < head.recent_query_count(); ++age) {
        const std::span<const float> query = head.recent_queries(age)[0];
        for (std::size_t i = 0; i < key.size(); ++i) head.state(page).score += key[i] * query[i];
      }
    }
  }
  PageIndex victim(HeadView<JudgedOnce> head) const {
    return head.lowest_evictable([&](PageIndex page) { return head.state(page).score; });
  }
};

// scope layer, LayerState, on_step_end: all heads of a layer give up the same positions, here those of the least mass
// over all heads. Head 0 stands for all where one page index names the same positions in each.
struct AllHeadsTogether {
  static constexpr std::string_view name = "all_heads_together";
  static constexpr PolicyScope scope = PolicyScope::layer;
  static constexpr EvidenceKind evidence = EvidenceKind::page_mass;
  struct PageState {
    float mass = std::numeric_limits<float>::infinity();
  };
  struct LayerState {
    std::uint64_t steps;
  };
  void observe(HeadView<AllHeadsTogether> head, const Evidence& step) const {
    for (const PageIndex page : head.pages()) {
      if (step.visited(page)) head.state(page).mass = step.group_mass(page);
    }
  }
  void on_step_end(LayerView<AllHeadsTogether> layer) const { ++layer.layer_state().steps; }
  PageIndex victim(LayerView<AllHeadsTogether> layer) const {
    return layer.head(0).lowest_evictable([&](PageIndex page) {
      float mass = 0.0F;
      for (std::size_t h = 0; h < layer.heads(); ++h) mass += layer.head(h).state(page).mass;
      return mass;
    });
  }
};

// scope shared_budget, budget_floor: heads hold what they need of one budget. HeadPage names the head that gives.
struct SharesByNeed {
  static constexpr std::string_view name = "shares_by_need";
  static constexpr PolicyScope scope = PolicyScope::shared_budget;
  static constexpr double budget_floor = 0.25;
  static constexpr EvidenceKind evidence = EvidenceKind::page_mass;
  struct PageState {
    float mass = std::numeric_limits<float>::infinity();
  };
  void observe(HeadView<SharesByNeed> head, const Evidence& step) const {
    for (const PageIndex page : head.pages()) {
      if (step.visited(page)) head.state(page).mass = step.group_mass(page);
    }
  }
  HeadPage victim(LayerView<SharesByNeed> layer) const {
    return layer.lowest_evictable([](const auto& head, PageIndex page) { return head.state(page).mass; });
  }
};

// on_evict, HeadState, residual: what goes leaves something behind, which later queries are given.
struct RemembersTheMeanValue {
  static constexpr std::string_view name = "remembers_the_mean_value";
  static constexpr bool reads_rows = true;
  struct HeadState {
    float tokens, sum[64];
  };
  void on_evict(HeadView<RemembersTheMeanValue> head, PageIndex page) const {
    const std::span<float> value = head.scratch().first(head.value_dim());
    for (std::uint32_t slot = 0; slot < head.tokens(page); ++slot) {
      head.load_value(page, Slot{slot}, value);
      for (std::size_t i = 0; i < std::min<std::size_t>(64, value.size()); ++i) head.head_state().sum[i] += value[i];
      head.head_state().tokens += 1.0F;
    }
  }
  void residual(HeadView<RemembersTheMeanValue> head, QueryGroup, std::span<SoftmaxState> states) const {
    for (SoftmaxState& state : states) {  // as one token of logit 0 with the mean value
      if (head.head_state().tokens == 0.0F) return;
      const std::span<float> mean = head.scratch().first(head.value_dim());
      for (std::size_t i = 0; i < mean.size(); ++i) mean[i] = head.head_state().sum[i % 64] / head.head_state().tokens;
      merge(state, {mean.data(), 0.0F, 1.0F}, mean.size());
    }
  }
  PageIndex victim(HeadView<RemembersTheMeanValue> head) const { return *head.evictable_pages().begin(); }
};

// pages_used: what stats() tells of how much was found used; on_clear: the head was emptied.
struct Counts : OldestFirst {
  static constexpr std::string_view name = "counts";
  struct HeadState {
    PagesUsed pages;
    std::uint64_t times_emptied;
  };
  void on_page_open(HeadView<Counts> head, PageIndex) const { ++head.head_state().pages.judged; }
  void on_page_full(HeadView<Counts> head, PageIndex) const { ++head.head_state().pages.used; }
  void on_clear(HeadView<Counts> head) const { ++head.head_state().times_emptied; }
  PagesUsed pages_used(HeadView<Counts> head) const { return head.head_state().pages; }
  PageIndex victim(HeadView<Counts> head) const { return *head.evictable_pages().begin(); }
};

// in_cache_positions: distances count what is resident alone, as in StreamingLLM.
struct CountsResidentsAlone {
  static constexpr std::string_view name = "counts_residents_alone";
  static constexpr bool in_cache_positions = true;
  PageIndex victim(HeadView<CountsResidentsAlone> head) const { return *head.evictable_pages().begin(); }
};

// --- selectors ---

// select: which pages a query reads, when not all may be read.
struct NewestPages {
  static constexpr std::string_view name = "newest_pages";
  void select(HeadView<NewestPages> head, QueryGroup, Selection& selection) const {
    for (std::size_t i = 0; i < head.read_page_budget(); ++i) {
      selection.add(PageIndex{static_cast<std::uint32_t>(head.size() - 1 - i)});
    }
  }
};

// page_summary min_max, selection query_head: bounds on each page's dot products, and a choice for each query head.
struct HighestBound {
  static constexpr std::string_view name = "highest_bound";
  static constexpr PageSummary page_summary = PageSummary::min_max;
  static constexpr SelectionScope selection = SelectionScope::query_head;
  void select(HeadView<HighestBound> head, QueryGroup queries, Selection& pages) const {
    const std::span<float> bounds = head.scratch().first(head.size());
    head.pooled_upper_bounds(queries, bounds);
    pages.add_highest(bounds, head.read_page_budget());
  }
};

// knows_logits: scores keys as the kernel does, by logits(); so a layer with ALiBi or a soft cap takes the policy.
// Pages behind a window need no care: they are not read.
struct HighestLogit {
  static constexpr std::string_view name = "highest_logit";
  static constexpr PageSummary page_summary = PageSummary::min_max;
  static constexpr bool knows_logits = true;
  void select(HeadView<HighestLogit> head, QueryGroup queries, Selection& pages) const {
    const LogitOptions& options = head.logits();
    const std::span<float> best = head.scratch().first(head.size());
    const std::span<float> bounds =
        head.scratch().subspan(head.size(), head.size() * queries.size);  // [pages, queries]
    head.upper_bounds(queries, bounds);
    for (const PageIndex page : head.pages()) {
      const std::int64_t distance = head.first_position(head.open_page()) - head.first_position(page);
      best[page.value] = -std::numeric_limits<float>::infinity();
      for (std::size_t q = 0; q < queries.size; ++q) {
        float logit = bounds[page.value * queries.size + q] * head.softmax_scale();
        if (options.soft_cap > 0.0F) logit = options.soft_cap * std::tanh(logit / options.soft_cap);
        const std::size_t query_head = head.kv_head() * queries.size + q;
        if (!options.alibi_slopes.empty()) logit -= options.alibi_slopes[query_head] * static_cast<float>(distance);
        best[page.value] = std::max(best[page.value], logit);
      }
    }
    pages.add_highest(best, head.read_page_budget());
  }
};

// granularity token: part of a page; select_always: asked even while everything could be read.
struct EveryOtherToken {
  static constexpr std::string_view name = "every_other_token";
  static constexpr PolicyGranularity granularity = PolicyGranularity::token;
  static constexpr bool select_always = true;
  void select(HeadView<EveryOtherToken> head, QueryGroup, Selection& selection) const {
    for (const PageIndex page : head.pages()) {
      const std::span<std::uint64_t> mask = selection.token_mask(page);
      std::fill(mask.begin(), mask.end(), 0x5555555555555555U);
      selection.add({page, mask, 0.0F, 0.0F, 0});
    }
  }
};

// select_more: further pages, given the softmax so far, until nothing is added.
struct UntilItMatters {
  static constexpr std::string_view name = "until_it_matters";
  void select(HeadView<UntilItMatters> head, QueryGroup, Selection& selection) const {
    selection.add(head.open_page());
  }
  void select_more(HeadView<UntilItMatters> head, QueryGroup, std::span<const SoftmaxState> states,
                   Selection& selection) const {
    const std::size_t read = selection.pages().size();
    if (read == head.size() || states[0].log_sum_exp() > 3.0F) return;
    selection.add(PageIndex{static_cast<std::uint32_t>(head.size() - 1 - read)});
  }
};

template <class Policy>
void decode(const Policy& policy = {}) {
  CacheConfig config{.query_heads = 4, .kv_heads = 2, .head_dim = 32, .page_size = 8, .budget_tokens = 64};
  config.max_tokens = 200;
  config.rope.theta = 10000.0F;  // of the model; in_cache_positions needs it
  PagedKvCache<Policy, Half> cache(config, policy);
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> k(2 * 32), v(2 * 32), q(4 * 32), out(4 * 32);
  const auto check = [](const Status& status) {
    if (!status) throw std::runtime_error(status.message());
  };
  for (int token = 0; token < 200; ++token) {
    for (std::vector<float>* row : {&k, &v, &q})
      std::generate(row->begin(), row->end(), [&] { return normal(random); });
    check(token < 20 ? cache.append_prompt(k, v) : cache.append(k, v));
    check(attend(cache, q, out));
  }
  const CacheStats stats = cache.stats();
  std::cout << std::left << std::setw(26) << Policy::name << std::right << std::setw(6) << stats.resident_tokens
            << std::setw(8) << stats.last_read_tokens / 2 << "\n";
}

int main() {
  std::cout << "policy                     keeps   reads   of 200 tokens\n";
  decode<OldestFirst>();
  decode<KeepsTwoPages>();
  decode<KeepsThePrompt>();
  decode<PartOfTheWay>();
  decode<LowestMass>();
  decode<ShortestKeys>();
  decode<HalvesTheCache>();
  decode<JudgedOnce>();
  decode<AllHeadsTogether>();
  decode<SharesByNeed>();
  decode<RemembersTheMeanValue>();
  decode<Counts>();
  decode<CountsResidentsAlone>();
  decode<NewestPages>();
  decode<HighestBound>();
  decode<HighestLogit>();
  decode<EveryOtherToken>();
  decode<UntilItMatters>();
}
