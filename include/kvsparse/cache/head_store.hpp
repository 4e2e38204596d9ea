// SPDX-License-Identifier: Apache-2.0
// Everything the container keeps for one kv head: its page table, the policy's state, and the working memory of a
// query, so that heads can run in parallel without sharing a byte. All arrays have their final size from construction.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>
#include <vector>

#include "../attention/page_kernel.hpp"
#include "../core/saturating_size.hpp"
#include "../memory/page_table.hpp"
#include "../policy/policy.hpp"
#include "attend_scratch.hpp"
#include "cache_config.hpp"
#include "layer_image.hpp"

namespace kvsparse::detail {

/// For each array of a head: how many elements it has. Allocation and bytes_required both read it here.
struct HeadSizes {
  std::size_t pages, group, row, value_row, page_states, selected, trimmed;
  SaturatingSize masks, mass, tap, token_mass, token_weights, scratch, padded_queries, query_window;

  template <class Policy>
  HeadSizes(const CachePlan& plan, const Policy& policy) {
    const EvidenceKind kinds = traits::evidence(policy);
    const bool tokens = traits::granularity<Policy>() == PolicyGranularity::token;
    const bool bounds = traits::page_summary(policy) == PageSummary::min_max;
    const Geometry& geometry = plan.geometry;
    pages = plan.table_pages();
    group = geometry.group();
    row = round_up(geometry.head_dim, query_padding);
    value_row = round_up(geometry.dim_of_values(), query_padding);
    page_states = std::is_empty_v<PageState<Policy>> ? 0 : pages;
    selected = Selector<Policy> ? pages : 0;
    trimmed = Trimmer<Policy> ? pages : 0;
    constexpr SaturatingSize none;
    const SaturatingSize all_pages = pages;
    masks = tokens ? all_pages * divide_up(geometry.page_size, 64) : none;
    mass = kinds == EvidenceKind::none ? none : all_pages * group;
    tap = kinds == EvidenceKind::none ? none : all_pages * std::max(group, tile_queries) + query_padding;
    token_mass = asks_for(kinds, EvidenceKind::largest_token_mass) ? mass : none;
    token_weights = asks_for(kinds, EvidenceKind::token_weights) ? mass * geometry.page_size : none;
    const bool decides = Selector<Policy> || Observer<Policy> || Evictor<Policy>;
    const bool scores_tokens = tokens || Trimmer<Policy>;
    const std::size_t longer_row = std::max(geometry.head_dim, geometry.dim_of_values());
    const SaturatingSize token_scores = scores_tokens ? all_pages * geometry.page_size * std::size_t{2} : none;
    scratch = decides ? all_pages * (group + 3) + (2 * longer_row + group) + token_scores : none;
    const SaturatingSize queries = SaturatingSize(group) * row;
    padded_queries = bounds ? queries * std::size_t{2} : none;
    query_window = SaturatingSize(traits::query_window(policy)) * group * geometry.head_dim;
  }
};

template <class Policy>
struct HeadStore {
  static constexpr std::size_t page_state_bytes = std::is_empty_v<PageState<Policy>> ? 0 : sizeof(PageState<Policy>);

  HeadStore(const CachePlan& plan, const Policy& policy)
      : HeadStore(HeadSizes(plan, policy), plan.geometry.page_size) {}

  static SaturatingSize bytes_required(const CachePlan& plan, const Policy& policy) {
    const HeadSizes n(plan, policy);
    const bool tokens = n.masks > std::size_t{0};
    const SaturatingSize floats = n.mass + n.tap + n.tap + n.token_mass + n.token_weights + n.token_weights +
                                  n.scratch + n.padded_queries + n.query_window + n.group;
    return SaturatingSize(n.pages) * (sizeof(ResidentPage) + sizeof(PageRead) + 1) +
           SaturatingSize(n.page_states) * sizeof(PageState<Policy>) +
           Selection::bytes_required(n.selected, plan.geometry.page_size, tokens) + n.masks * sizeof(std::uint64_t) +
           SaturatingSize(n.trimmed) * sizeof(PageIndex) + floats * sizeof(float);
  }

  // --- pages ---

  /// of_layer: what the layer knows; the head adds its own.
  HeadView<Policy> view(HeadPages::Storage of_layer, Position end, bool has_open_page) {
    of_layer.table = &table;
    of_layer.evictions = evictions;
    of_layer.scratch = scratch_;
    of_layer.padded_queries = padded_queries_;
    of_layer.query_window = query_window_;
    of_layer.queries_seen = queries_seen_;
    const HeadPages pages(of_layer, end, has_open_page);
    return {pages, page_states.data(), sizeof(PageState<Policy>), &state};
  }
  void open_page(const ResidentPage& page) {
    if (!page_states.empty()) page_states[table.size()] = {};
    table.push_back(page);
  }
  void erase_page(PageIndex page) {
    if (!page_states.empty()) {
      std::copy(page_states.begin() + page.value + 1, page_states.begin() + static_cast<std::ptrdiff_t>(table.size()),
                page_states.begin() + page.value);
    }
    ++evictions;
    evicted_tokens += table[page].tokens;
    table.erase(page);
  }
  PageIndex oldest_unpinned() const {
    PageIndex page{};
    while (page.value + 1 < table.size() && table[page].pinned) ++page.value;
    return page;
  }
  /// Pages that are such and unpinned, or behind the first `kept` if their pins may be taken.
  template <class IsSuch>
  std::size_t count_evictable(IsSuch&& is_such, bool pins_give_way, std::size_t kept) const {
    std::size_t count = 0;
    for (std::uint32_t page = 0; page < table.size(); ++page) {
      const bool may_go = !table[{page}].pinned || (pins_give_way && page >= kept);
      count += may_go && is_such(table[{page}].page) ? 1 : 0;
    }
    return count;
  }
  /// Takes pins from prompt pages, the middle one first and the sequence's first page last, until at most `limit`
  /// remain.
  void unpin_middle(std::size_t limit, std::size_t sink_pages) {
    while (table.pinned_pages() > limit && table.pinned_pages() > sink_pages) {
      std::size_t skip = sink_pages + (table.pinned_pages() - sink_pages) / 2;
      PageIndex page{};
      while (!table[page].pinned || skip-- > 0) ++page.value;
      table.unpin(page);
    }
  }
  void clear() {
    table.clear();
    state = {};
    query_end = {};
    // Else a snapshot would tell what the sequence before asked.
    std::fill(query_window_.begin(), query_window_.end(), 0.0F);
    evictions = 0;
    evicted_tokens = read_count = read_tokens = skipped_tokens = queries_seen_ = 0;
  }

  HeadImage image() {
    return {&table,
            StatesImage::of(std::span(page_states)),
            StatesImage::of(std::span(&state, 1)),
            std::as_writable_bytes(std::span(query_window_)),
            &evictions,
            {&evicted_tokens, &read_tokens, &skipped_tokens, &queries_seen_},
            &query_end};
  }

  // --- one query ---

  /// first_seen: what comes before lies outside the query's window.
  void begin_query(Position end, Position first_seen, std::size_t group) {
    query_end = end;
    query_first_seen = first_seen;
    read_count = read_tokens = 0;
    skipped_tokens = table.resident_tokens();  // less the pages that record() sees, so that nothing walks all pages
    std::fill(was_read_.begin(), was_read_.end(), std::uint8_t{0});
    if (!mass_.empty()) std::fill_n(mass_.begin(), table.size() * group, -1.0F);
    if (!read_masks_.empty()) std::fill(read_masks_.begin(), read_masks_.end(), std::uint64_t{0});
  }

  /// Pages that the running query may see.
  std::size_t visible_pages() const {
    std::size_t pages = table.size();
    while (pages > 0 && table[{static_cast<std::uint32_t>(pages - 1)}].first_position >= query_end) --pages;
    return pages;
  }

  /// Whether the running query's window begins after the page.
  bool is_outside_window(PageIndex page) const { return tokens_outside_window(page) >= table[page].tokens; }
  /// Of the page, how many lie before the window.
  std::size_t tokens_outside_window(PageIndex page) const {
    const std::int64_t tokens = query_first_seen - first_position_at(page);
    return tokens <= 0 ? 0 : std::min(static_cast<std::size_t>(tokens), std::size_t{table[page].tokens});
  }

  /// Of the tokens that the running query sees of the page, the share that the read leaves out.
  float share_left_out(const PageRead& read) const {
    if (read.token_mask == nullptr) return 0.0F;
    const std::size_t first = tokens_outside_window(read.index);
    std::size_t left_out = 0;
    for (std::size_t t = first; t < read.tokens; ++t)
      left_out += (read.token_mask[t / 64] >> (t % 64) & 1) == 0 ? 1 : 0;
    return left_out == 0 ? 0.0F : static_cast<float>(left_out) / static_cast<float>(read.tokens - first);
  }

  void add_read(const HeadView<Policy>& pages, const SelectedPage& selected) {
    const ResidentPage& page = table[selected.page];
    reads[read_count++] = {page.page,
                           selected.page,
                           static_cast<std::uint32_t>(pages.tokens(selected.page)),
                           selected.tokens.empty() ? nullptr : selected.tokens.data(),
                           selected.log_weight,
                           selected.value_log_weight,
                           selected.rotate_back,
                           page.first_position};
  }

  PageTap tap(std::size_t queries, std::size_t page_size) {
    if (mass_.empty()) return {};
    return {page_max_.data(), page_sum_.data(), token_logits_.empty() ? nullptr : token_logits_.data(), queries,
            page_size};
  }

  /// Once all reads of a query, or of a tile's queries, are in the tap: page_max becomes exp(page_max - max). A page's
  /// share is that times its sum, divided by the whole sum.
  void weigh_pages(std::span<const SoftmaxState> states, std::size_t pages) {
    if (mass_.empty()) return;
    const std::size_t queries = states.size();
    const std::size_t count = pages * queries;
    for (std::size_t q = 0; q < queries; ++q) {
      for (std::size_t i = q; i < count; i += queries) page_max_[i] -= states[q].max;
    }
    for (std::size_t i = 0; i < count; i += simd::lanes) {
      simd::store(page_max_.data() + i, simd::exp_nonpositive(simd::load(page_max_.data() + i)));
    }
  }

  /// Evidence of the selected reads, whose pages are weighed; tap: of the first of these queries.
  void record(std::size_t first_query, std::span<const SoftmaxState> states, std::size_t group, const PageTap& tap) {
    mark_read();
    if (mass_.empty()) return;
    for (std::size_t q = 0; q < states.size(); ++q) {
      log_sum_exp_[first_query + q] = states[q].log_sum_exp();
      const float inverse = 1.0F / states[q].sum;
      for (std::size_t r = 0; r < read_count; ++r) {
        const std::size_t of_tap = r * tap.queries + q;
        mass_[reads[r].index.value * group + first_query + q] = tap.page_max[of_tap] * tap.page_sum[of_tap] * inverse;
      }
      if (!largest_token_.empty() || !token_weights_.empty()) record_tokens(q, first_query + q, states[q], group, tap);
    }
  }

  /// Evidence of the selected reads from their masses, [reads, queries].
  void record_masses(std::size_t first_query, std::span<const float> masses, std::span<const float> lse,
                     std::size_t group) {
    mark_read();
    if (mass_.empty()) return;
    std::copy(lse.begin(), lse.end(), log_sum_exp_.begin() + static_cast<std::ptrdiff_t>(first_query));
    for (std::size_t r = 0; r < read_count; ++r) {
      std::copy_n(masses.data() + r * lse.size(), lse.size(),
                  mass_.data() + reads[r].index.value * group + first_query);
    }
  }

  void finish_query(QueryGroup group) {
    if (!read_masks_.empty()) count_skipped_tokens();
    remember_query(group);
  }
  void remember_query(const QueryGroup& group) {
    if (query_window_.empty()) return;
    const std::size_t row = group.size * group.head_dim;
    float* at = query_window_.data() + (queries_seen_ % (query_window_.size() / row)) * row;
    for (std::size_t q = 0; q < group.size; ++q) at = std::copy(group[q].begin(), group[q].end(), at);
    ++queries_seen_;
  }

  /// Which tokens the latest query read is not known any more, only how many.
  void forget_reads() {
    query_end = {};
    read_count = 0;
  }
  /// Nothing is known any more of what the latest query read.
  void forget_query() {
    forget_reads();
    read_tokens = skipped_tokens = 0;
  }

  /// For a journal: mass, largest token, token weights, log-sum-exp, each at the place it has when all pages are there.
  void copy_evidence(std::span<float> to) const {
    const std::size_t group = log_sum_exp_.size();
    for (const std::vector<float>* array : {&mass_, &largest_token_, &token_weights_}) {
      const std::size_t of_page = array->size() / std::max<std::size_t>(1, was_read_.size());
      std::copy_n(array->begin(), table.size() * of_page, to.begin());
      to = to.subspan(array->size());
    }
    std::copy_n(log_sum_exp_.begin(), group, to.begin());
  }
  std::size_t copy_query_window(std::vector<float>& to) const {
    std::copy(query_window_.begin(), query_window_.end(), to.begin());
    return queries_seen_;
  }
  void set_query_window(const std::vector<float>& from, std::size_t seen) {
    std::copy(from.begin(), from.end(), query_window_.begin());
    queries_seen_ = seen;
  }

  Evidence evidence(QueryGroup group, bool is_prompt, std::size_t page_size) const {
    return Evidence({{query_end.value - 1},
                     is_prompt,
                     group,
                     visible_pages(),
                     page_size,
                     mass_.data(),
                     largest_token_.empty() ? nullptr : largest_token_.data(),
                     token_weights_.empty() ? nullptr : token_weights_.data(),
                     log_sum_exp_.data()});
  }

  bool was_read(PageIndex page, Slot slot) const {
    if (page.value >= was_read_.size() || was_read_[page.value] == 0) return false;
    if (first_position_at(page) + slot.value >= query_end) return false;
    if (first_position_at(page) + slot.value < query_first_seen) return false;
    if (read_masks_.empty()) return true;
    const std::size_t words = read_masks_.size() / was_read_.size();
    return (read_masks_[page.value * words + slot.value / 64] >> (slot.value % 64) & 1) != 0;
  }

  /// The positions of the resident tokens for which keep(page, slot) is true, ascending. Allocates.
  template <class Keep>
  std::vector<Position> positions(Keep&& keep) const {
    std::vector<Position> result;
    for (std::uint32_t page = 0; page < table.size(); ++page) {
      for (std::uint32_t slot = 0; slot < table[{page}].tokens; ++slot) {
        if (keep(PageIndex{page}, Slot{slot})) result.push_back(table[{page}].first_position + slot);
      }
    }
    return result;
  }

  PageTable table;
  std::vector<PageState<Policy>> page_states;
  HeadState<Policy> state{};
  std::uint64_t evictions = 0;
  std::size_t evicted_tokens = 0;
  PageList trimmed;

  Selection selection;
  std::vector<PageRead> reads;
  std::size_t read_count = 0;
  std::size_t read_tokens = 0;
  std::size_t skipped_tokens = 0;
  Position query_end;
  Position query_first_seen;

 private:
  HeadStore(const HeadSizes& n, std::size_t page_size)
      : table(n.pages),
        page_states(n.page_states),
        trimmed(n.trimmed),
        selection(n.selected, page_size, n.masks > 0),
        reads(n.pages),
        was_read_(n.pages),
        read_masks_(n.masks),
        mass_(n.mass),
        page_max_(n.tap),
        page_sum_(n.tap),
        largest_token_(n.token_mass),
        token_logits_(n.token_weights),
        token_weights_(n.token_weights),
        log_sum_exp_(n.group),
        scratch_(n.scratch),
        padded_queries_(n.padded_queries),
        query_window_(n.query_window) {}

  void record_tokens(std::size_t q, std::size_t query_head, const SoftmaxState& softmax, std::size_t group,
                     const PageTap& tap) {
    for (std::size_t r = 0; r < read_count; ++r) {
      const std::size_t of_tap = r * tap.queries + q;
      const std::size_t at = reads[r].index.value * group + query_head;
      if (!largest_token_.empty()) largest_token_[at] = tap.page_max[of_tap] / softmax.sum;
      if (token_weights_.empty()) continue;
      const float* logits = tap.token_logits + of_tap * tap.page_size;
      for (std::size_t t = 0; t < reads[r].tokens; ++t) {
        token_weights_[at * tap.page_size + t] = std::exp(logits[t] - softmax.max) / softmax.sum;
      }
    }
  }
  Position first_position_at(PageIndex page) const { return table[page].first_position; }

  /// The bits of a mask's word-th word that stand for slots before `slot`.
  static std::uint64_t slots_below(std::size_t slot, std::size_t word) {
    if (slot >= 64 * (word + 1)) return ~std::uint64_t{0};
    return slot <= 64 * word ? 0 : (std::uint64_t{1} << (slot - 64 * word)) - 1;
  }
  void mark_read() {
    const std::size_t words = read_masks_.empty() ? 0 : read_masks_.size() / was_read_.size();
    for (std::size_t r = 0; r < read_count; ++r) {
      const PageRead& read = reads[r];
      const std::size_t unseen = tokens_outside_window(read.index);
      if (was_read_[read.index.value] == 0) skipped_tokens -= table[read.index].tokens - unseen;
      was_read_[read.index.value] = 1;
      std::size_t tokens = 0;
      for (std::size_t w = 0; w < words; ++w) {
        const std::uint64_t mask = read.token_mask == nullptr ? ~std::uint64_t{0} : read.token_mask[w];
        read_masks_[read.index.value * words + w] |= mask;
        tokens += static_cast<std::size_t>(std::popcount(mask & slots_below(read.tokens, w) & ~slots_below(unseen, w)));
      }
      read_tokens += read.token_mask == nullptr ? read.tokens - unseen : tokens;
    }
  }

  /// Token by token, where a page may be read in part.
  void count_skipped_tokens() {
    skipped_tokens = 0;
    for (std::uint32_t page = 0; page < table.size(); ++page) {
      for (std::uint32_t slot = 0; slot < table[{page}].tokens; ++slot) {
        skipped_tokens += was_read({page}, {slot}) ? 0 : 1;
      }
    }
  }

  std::vector<std::uint8_t> was_read_;     // [pages]
  std::vector<std::uint64_t> read_masks_;  // [pages, words], only for token granularity
  std::vector<float> mass_;                // [pages, group]; negative: not visited
  std::vector<float> page_max_;            // [reads, queries], padded to whole vectors
  std::vector<float> page_sum_;
  std::vector<float> largest_token_;  // [pages, group]
  std::vector<float> token_logits_;   // [reads, queries, page_size]
  std::vector<float> token_weights_;  // [pages, group, page_size]
  std::vector<float> log_sum_exp_;    // [group]
  std::vector<float> scratch_;
  std::vector<float> padded_queries_;
  std::vector<float> query_window_;
  std::size_t queries_seen_ = 0;
};

}  // namespace kvsparse::detail
