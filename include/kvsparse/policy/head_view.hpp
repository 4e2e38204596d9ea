// SPDX-License-Identifier: Apache-2.0
// What a policy may look at: the resident pages of one kv head (or of all heads of a layer), its own state of each
// page, stored rows as floats, page bounds. A policy never sees the pool, the table or the cache. Views are passed by
// value.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <iterator>
#include <limits>
#include <span>
#include <type_traits>

#include "../config.hpp"
#include "../core/geometry.hpp"
#include "../core/logit_options.hpp"
#include "../core/views.hpp"
#include "../memory/page_bounds.hpp"
#include "../memory/page_table.hpp"
#include "state.hpp"

namespace kvsparse {

/// How a view reaches stored rows without being a template of the storage type. An engine that keeps its keys and
/// values itself lends what its policy needs and leaves the others null. store: the engine's own.
struct RowAccess {
  /// row [head_dim]: the key of a slot, rotated as it is stored.
  void (*load_key)(const void* store, PageId page, Slot slot, std::span<float> row) = nullptr;
  /// row [value_dim]: the value of a slot.
  void (*load_value)(const void* store, PageId page, Slot slot, std::span<float> row) = nullptr;
  /// lowest, highest [head_dim]: channel by channel, of the page's keys.
  void (*load_bounds)(const void* store, PageId page, std::span<float> lowest, std::span<float> highest) = nullptr;
  /// sum [head_dim] of the page's keys.
  void (*load_key_sum)(const void* store, PageId page, std::span<float> sum) = nullptr;
  /// bounds [pages, group], or [pages], the largest of each: HeadPages::upper_bounds of the pages given.
  /// padded_queries: [2, group, round_up(head_dim, 16)] working memory.
  void (*upper_bounds)(const void* store, std::span<const ResidentPage> pages, const QueryGroup& queries,
                       BoundPooling pooling, std::span<float> padded_queries, std::span<float> bounds) = nullptr;
  /// magnitudes[page] for the pages given: no element of the page's keys is larger in magnitude.
  void (*largest_magnitudes)(const void* store, std::span<const ResidentPage> pages,
                             std::span<float> magnitudes) = nullptr;
};

/// What is the same for all heads of a layer.
struct LayerContext {
  Geometry geometry;                 ///< of the layer
  std::size_t layer = 0;             ///< CacheConfig::layer
  std::size_t page_budget = 0;       ///< resident pages a head may hold; the mean, where heads share their budget
  std::size_t page_floor = 0;        ///< pages that no head goes below, where they do
  std::size_t read_page_budget = 0;  ///< pages a selector may read
  RowAccess rows;                    ///< how stored rows are reached
  float softmax_scale = 1.0F;        ///< what dot products are multiplied by
};

/// The resident pages of one kv head, oldest first, as seen by the newest token or by a query inside the prompt.
class HeadPages {
 public:
  /// What the container fills in, or the test of a policy.
  struct Storage {
    const LayerContext* context = nullptr;     ///< the layer's
    const LogitOptions* logits = nullptr;      ///< the layer's
    const void* rows = nullptr;                ///< what the functions of RowAccess take first
    std::size_t kv_head = 0;                   ///< which head of the layer
    Position prompt_end;                       ///< one past the prompt's last token
    const PageTable* table = nullptr;          ///< the head's
    std::uint64_t evictions = 0;               ///< pages that the head has evicted
    std::span<float> scratch = {};             ///< see scratch()
    std::span<float> padded_queries = {};      ///< of RowAccess::upper_bounds
    std::span<const float> query_window = {};  ///< ring, [window, group, head_dim]
    std::size_t queries_seen = 0;              ///< since the head was emptied
  };

  /// Pages with positions below `end`; the last of them is the open page unless `has_open_page` is false.
  HeadPages(const Storage& storage, Position end, bool has_open_page)
      : storage_(storage), end_(end), has_open_page_(has_open_page), size_(storage.table->size()) {
    while (size_ > 0 && table()[{static_cast<std::uint32_t>(size_ - 1)}].first_position >= end) --size_;
  }

  /// Leaves the `pages` oldest, none of them open: for the container, which looks for a victim among them.
  void hide_newer_than(std::size_t pages) {
    if (size_ <= pages) return;
    size_ = pages;
    has_open_page_ = false;
  }

  // --- pages ---

  std::size_t size() const { return size_; }  ///< resident pages
  /// Whether a token is being appended or attends; while a victim is looked for no page is open.
  bool has_open_page() const { return has_open_page_ && size_ > 0; }
  /// The page of the newest token; there must be one. Always read, never a victim.
  PageIndex open_page() const {
    KVSPARSE_ASSERT(has_open_page());
    return {static_cast<std::uint32_t>(size_ - 1)};
  }
  /// Whether it is the open page.
  bool is_open(PageIndex page) const { return has_open_page() && page == open_page(); }
  /// Whether it is never a victim: a sink, or a page of a prompt that is pinned.
  bool is_pinned(PageIndex page) const { return table()[page].pinned; }
  /// Neither pinned nor open: a page that `victim` may name.
  bool is_evictable(PageIndex page) const { return !is_pinned(page) && !is_open(page); }
  /// How many of all pages are pinned.
  std::size_t pinned_pages() const { return table().pinned_pages(); }
  /// Whether the page holds a token of the prompt, pinned or not.
  bool is_of_prompt(PageIndex page) const { return first_position(page) < storage_.prompt_end; }
  /// Of the page's first token; the others follow it one by one.
  Position first_position(PageIndex page) const { return table()[page].first_position; }
  /// Visible tokens of the page: page_size(), or less in the newest one.
  std::size_t tokens(PageIndex page) const {
    const std::int64_t visible = end_ - first_position(page);
    const std::size_t stored = table()[page].tokens;
    return visible < static_cast<std::int64_t>(stored) ? static_cast<std::size_t>(visible) : stored;
  }
  /// Of those, the ones within the newest token's sliding window.
  std::size_t tokens_in_window(PageIndex page) const {
    const std::size_t window = logits().window;
    const std::int64_t unseen = end_.value - static_cast<std::int64_t>(window) - first_position(page).value;
    if (window == 0 || unseen <= 0) return tokens(page);
    return tokens(page) - std::min(tokens(page), static_cast<std::size_t>(unseen));
  }
  /// Visible tokens that came after the page's first and are gone.
  std::size_t evicted_after(PageIndex page) const {
    const PageIndex last{static_cast<std::uint32_t>(size_ - 1)};
    const std::size_t resident =
        (last.value - page.value) * page_size() + tokens(last);  // all pages before it are full
    return static_cast<std::size_t>(end_ - first_position(page)) - resident;
  }
  /// One past the newest visible token.
  Position end() const { return end_; }

  class Iterator {
   public:
    using value_type = PageIndex;
    using difference_type = std::ptrdiff_t;
    Iterator() = default;
    /// From `index` up to `end`; if a table is given, without the pages that are pinned in it and without `open`.
    Iterator(std::uint32_t index, std::uint32_t end, const PageTable* evictable_of, PageIndex open)
        : index_(index), end_(end), table_(evictable_of), open_(open) {
      skip();
    }
    PageIndex operator*() const { return {index_}; }
    Iterator& operator++() {
      ++index_;
      skip();
      return *this;
    }
    Iterator operator++(int) {
      Iterator before = *this;
      ++*this;
      return before;
    }
    friend bool operator==(const Iterator& a, const Iterator& b) { return a.index_ == b.index_; }

   private:
    void skip() {
      while (table_ != nullptr && index_ < end_ && ((*table_)[{index_}].pinned || index_ == open_.value)) ++index_;
    }
    std::uint32_t index_ = 0;
    std::uint32_t end_ = 0;
    const PageTable* table_ = nullptr;
    PageIndex open_;
  };
  struct Range {
    Iterator first;
    Iterator last;
    Iterator begin() const { return first; }
    Iterator end() const { return last; }
  };
  /// All resident pages as PageIndex, oldest first. The range outlives the view, not the verb.
  Range pages() const { return range(nullptr); }
  /// The evictable ones as PageIndex, oldest first. Likewise.
  Range evictable_pages() const { return range(&table()); }

  /// The page with the lowest score(page) among the `oldest` oldest evictable ones (default: all); ties go to the
  /// oldest. Page 0 when none is evictable. O(size()) calls.
  template <class Score>
  PageIndex lowest_evictable(Score&& score, std::size_t oldest = std::numeric_limits<std::size_t>::max()) const {
    PageIndex lowest{};
    bool found = false;
    std::invoke_result_t<Score&, PageIndex> lowest_score{};
    for (const PageIndex page : evictable_pages()) {
      if (oldest-- == 0) break;
      const auto candidate = score(page);
      if (!found || candidate < lowest_score) {
        lowest = page;
        lowest_score = candidate;
        found = true;
      }
    }
    return lowest;
  }

  /// How many pages are evictable. O(1); O(size()) of a view that hides pages.
  std::size_t evictable_count() const {
    if (size_ == table().size()) {
      return size_ - pinned_pages() - (has_open_page() && !is_pinned(open_page()) ? 1 : 0);
    }
    std::size_t count = 0;
    for ([[maybe_unused]] const PageIndex page : evictable_pages()) ++count;
    return count;
  }

  /// Calls visit(page) for the `count` evictable pages with the highest scores[page], oldest first; ties go to the
  /// oldest, NaN counts as lowest. scores: [size()], and no part of the last size() floats of scratch(), which it
  /// overwrites. O(size()).
  template <class Visit>
  void visit_highest_evictable(std::span<const float> scores, std::size_t count, Visit&& visit) const {
    constexpr float lowest = std::numeric_limits<float>::lowest();
    const auto score = [&](PageIndex page) { return scores[page.value] >= lowest ? scores[page.value] : lowest; };
    const std::span<float> ranking = scratch().last(size());
    std::size_t evictable = 0;
    for (const PageIndex page : evictable_pages()) ranking[evictable++] = score(page);
    count = count < evictable ? count : evictable;
    if (count == 0) return;
    float* const last = ranking.data() + count - 1;
    std::nth_element(ranking.data(), last, ranking.data() + evictable, std::greater<>());
    std::size_t ties = count - static_cast<std::size_t>(
                                   std::count_if(ranking.data(), last, [&](float value) { return value > *last; }));
    for (const PageIndex page : evictable_pages()) {
      if (score(page) > *last || (score(page) == *last && ties > 0 && ties-- > 0)) visit(page);
    }
  }

  // --- identity and limits ---

  const Geometry& geometry() const { return storage_.context->geometry; }  ///< of the layer
  std::size_t page_size() const { return geometry().page_size; }           ///< tokens of a page
  std::size_t head_dim() const { return geometry().head_dim; }             ///< elements of a key
  std::size_t value_dim() const { return geometry().dim_of_values(); }     ///< elements of a value
  std::size_t kv_head() const { return storage_.kv_head; }                 ///< which head of the layer
  std::size_t layer() const { return storage_.context->layer; }            ///< CacheConfig::layer
  /// Pages the head may hold: those of budget_tokens, or of max_tokens where the policy evicts nothing. Where heads
  /// share their budget, the mean over them.
  std::size_t page_budget() const { return storage_.context->page_budget; }
  /// Where heads share their budget: pages that each is left with, whatever the others need.
  std::size_t page_floor() const { return storage_.context->page_floor; }
  /// Pages a query of the head may read: those of read_budget_tokens.
  std::size_t read_page_budget() const { return storage_.context->read_page_budget; }
  /// Pages this head has evicted so far: the counter of counter-based random numbers.
  std::uint64_t evictions() const { return storage_.evictions; }
  /// What dot products are multiplied by.
  float softmax_scale() const { return storage_.context->softmax_scale; }
  /// What the kernel makes of scaled dot products. A policy that goes by it has the trait knows_logits.
  const LogitOptions& logits() const { return *storage_.logits; }

  // --- stored data, as floats ---

  /// row: [head_dim]. O(head_dim).
  void load_key(PageIndex page, Slot slot, std::span<float> row) const {
    KVSPARSE_ASSERT(rows().load_key != nullptr && slot.value < page_size() && row.size() == head_dim());
    rows().load_key(storage_.rows, table()[page].page, slot, row);
  }
  /// row: [value_dim]. O(value_dim).
  void load_value(PageIndex page, Slot slot, std::span<float> row) const {
    KVSPARSE_ASSERT(rows().load_value != nullptr && slot.value < page_size() && row.size() == value_dim());
    rows().load_value(storage_.rows, table()[page].page, slot, row);
  }
  /// lowest, highest: [head_dim], channel-wise over the page's keys. Needs page_summary = min_max. O(head_dim).
  void load_bounds(PageIndex page, std::span<float> lowest, std::span<float> highest) const {
    KVSPARSE_ASSERT(rows().load_bounds != nullptr && lowest.size() == head_dim() && highest.size() == head_dim());
    rows().load_bounds(storage_.rows, table()[page].page, lowest, highest);
  }
  /// mean: [head_dim] mean of the page's keys. Needs page_summary = mean. O(head_dim).
  void load_mean_key(PageIndex page, std::span<float> mean) const {
    KVSPARSE_ASSERT(rows().load_key_sum != nullptr && mean.size() == head_dim());
    rows().load_key_sum(storage_.rows, table()[page].page, mean);
    for (float& element : mean) element /= static_cast<float>(table()[page].tokens);
  }
  /// bounds [size(), group]: no key of the page has a larger dot product (unscaled) with the query. Needs page_summary
  /// = min_max. O(size() * group * head_dim), at the bandwidth of the summaries.
  void upper_bounds(const QueryGroup& queries, std::span<float> bounds) const {
    KVSPARSE_ASSERT(rows().upper_bounds != nullptr && bounds.size() >= size() * queries.size);
    rows().upper_bounds(storage_.rows, table_pages(), queries, BoundPooling::none, storage_.padded_queries, bounds);
  }
  /// bounds [size()]: the largest over the query group of upper_bounds, at no more than its cost.
  void pooled_upper_bounds(const QueryGroup& queries, std::span<float> bounds) const {
    KVSPARSE_ASSERT(rows().upper_bounds != nullptr && bounds.size() >= size());
    rows().upper_bounds(storage_.rows, table_pages(), queries, BoundPooling::max, storage_.padded_queries, bounds);
  }
  /// magnitudes [size()]: no element of the page's keys is larger in magnitude. Needs page_summary = min_max.
  /// O(size() * head_dim).
  void largest_magnitudes(std::span<float> magnitudes) const {
    KVSPARSE_ASSERT(rows().largest_magnitudes != nullptr && magnitudes.size() >= size());
    rows().largest_magnitudes(storage_.rows, table_pages(), magnitudes);
  }
  /// The query group seen `age` attend calls ago (0: the one before the running one); needs the query_window trait.
  QueryGroup recent_queries(std::size_t age) const {
    const std::size_t row = geometry().group() * head_dim();
    const std::size_t window = storage_.query_window.size() / row;
    KVSPARSE_ASSERT(age < window && age < storage_.queries_seen);
    const std::size_t at = (storage_.queries_seen - 1 - age) % window;
    return {storage_.query_window.data() + at * row, geometry().group(), head_dim(), head_dim(),
            storage_.context->softmax_scale};
  }
  /// How many of them there are: up to the query_window trait's number.
  std::size_t recent_query_count() const {
    const std::size_t window = storage_.query_window.size() / (geometry().group() * head_dim());
    return storage_.queries_seen < window ? storage_.queries_seen : window;
  }

  /// Working memory of a verb, overwritten by the next verb, except that select_more finds what select left: for each
  /// resident page group() + 3 floats, two rows of head_dim or value_dim, whichever is more, group() floats, and, when
  /// the policy's granularity is token or it has the verb trim, two floats for each token.
  std::span<float> scratch() const { return storage_.scratch; }

 private:
  const PageTable& table() const { return *storage_.table; }
  const RowAccess& rows() const { return storage_.context->rows; }
  std::span<const ResidentPage> table_pages() const {
    if (size_ == 0) return {};
    return {&table()[{0}], size_};
  }
  Range range(const PageTable* evictable_of) const {
    const auto end = static_cast<std::uint32_t>(size_);
    const PageIndex open = has_open_page() ? open_page() : PageIndex{end};
    return {{0, end, evictable_of, open}, {end, end, evictable_of, open}};
  }

  Storage storage_;
  Position end_;
  bool has_open_page_;
  std::size_t size_;
};

/// HeadPages plus the policy's own state of that head and of each of its pages.
template <class Policy>
class HeadView : public HeadPages {
 public:
  /// page_states: that of page 0, the others state_stride bytes apart; head_state: a HeadState<Policy>.
  HeadView(const HeadPages& pages, void* page_states, std::size_t state_stride, void* head_state)
      : HeadPages(pages),
        page_states_(static_cast<std::byte*>(page_states)),
        state_stride_(state_stride),
        head_state_(head_state) {}

  /// What the policy keeps of the page; it may write there in verbs that may write state.
  PageState<Policy>& state(PageIndex page) const {
    return *reinterpret_cast<PageState<Policy>*>(page_states_ + page.value * state_stride_);
  }
  /// What the policy keeps of the head; it may write there as in state().
  HeadState<Policy>& head_state() const { return *static_cast<HeadState<Policy>*>(head_state_); }

  /// The same pages for a policy whose states are members of this one's (compositions).
  template <class Part, class PageMember, class HeadMember>
  HeadView<Part> part(PageMember page_member, HeadMember head_member) const {
    void* first = size() == 0 && page_states_ == nullptr
                      ? nullptr
                      : static_cast<void*>(&(reinterpret_cast<PageState<Policy>*>(page_states_)->*page_member));
    return {*this, first, state_stride_, &(head_state().*head_member)};
  }

 private:
  std::byte* page_states_;
  std::size_t state_stride_;
  void* head_state_;
};

/// A page of one of a layer's heads.
struct HeadPage {
  std::size_t kv_head = 0;  ///< which head
  PageIndex page;           ///< which of its resident pages
};

/// All heads of a layer. Under scope layer they hold the same positions and evict them together; under scope
/// shared_budget each holds its own, and not as many as the others.
template <class Policy>
class LayerView {
 public:
  using HeadOf = HeadView<Policy> (*)(void* owner, std::size_t kv_head);  ///< the owner's view of a head
  /// The container's; state: the layer's.
  LayerView(void* owner, HeadOf head_of, std::size_t heads, LayerState<Policy>& state)
      : owner_(owner), head_of_(head_of), heads_(heads), state_(&state) {}

  std::size_t heads() const { return heads_; }  ///< kv heads
  /// One of them; kv_head < heads().
  HeadView<Policy> head(std::size_t kv_head) const { return head_of_(owner_, kv_head); }
  /// What the policy keeps of the layer; it may write there as in HeadView::state().
  LayerState<Policy>& layer_state() const { return *state_; }

  /// Scope shared_budget: whether `victim` may name a page of the head, which has one to give and will hold no fewer
  /// than its floor once the page that is due is open.
  static bool may_give(const HeadPages& head) { return head.size() >= head.page_floor() && head.evictable_count() > 0; }
  /// Scope shared_budget: the page with the lowest score(HeadView, PageIndex) that some head may give; ties go to the
  /// oldest page, then to the lowest head.
  template <class Score>
  HeadPage lowest_evictable(Score&& score) const {
    HeadPage lowest;
    bool found = false;
    Position oldest;
    std::invoke_result_t<Score&, const HeadView<Policy>&, PageIndex> lowest_score{};
    for (std::size_t h = 0; h < heads_; ++h) {
      const HeadView<Policy> candidates = head(h);
      if (!may_give(candidates)) continue;
      for (const PageIndex page : candidates.evictable_pages()) {
        const auto candidate = score(candidates, page);
        const Position position = candidates.first_position(page);
        const bool is_tie = found && !(candidate < lowest_score) && !(lowest_score < candidate);
        if (found && !(candidate < lowest_score) && !(is_tie && position < oldest)) continue;
        lowest = {h, page};
        lowest_score = candidate;
        oldest = position;
        found = true;
      }
    }
    return lowest;
  }

 private:
  void* owner_;
  HeadOf head_of_;
  std::size_t heads_;
  LayerState<Policy>* state_;
};

}  // namespace kvsparse
