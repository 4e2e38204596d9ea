// SPDX-License-Identifier: Apache-2.0
// What a policy holds, or what it lets a query read, as the page lists that the kernels of GPU engines take: CSR
// (FlashInfer's kv_indptr, kv_indices, last_page_len) or padded block tables with sequence lengths (vLLM). A row of a
// list is one request to the kernel: a kv head of a sequence, since each may hold pages of its own, or all kv heads of
// one where they hold the same. Rows of many sequences go one after another into arrays of the caller's.
//
// Such a list says which pages, in which order, and how many tokens the last one has; every other page is read in full,
// at its tokens' own weight, by the query as it is. What a list cannot say is refused, and the lists stay as they were.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "../core/logit_options.hpp"
#include "../core/shape_check.hpp"
#include "../core/status.hpp"
#include "../core/views.hpp"
#include "../memory/page_table.hpp"
#include "../policy/policy.hpp"

namespace kvsparse {

/// FlashInfer's CSR page lists in arrays of the caller's, with room for as many rows and entries as these have.
class CsrPageLists {
 public:
  /// indptr: [most rows + 1], indices: [most entries of all rows together], last_page_len: [most rows].
  CsrPageLists(std::span<std::int32_t> indptr, std::span<std::int32_t> indices, std::span<std::int32_t> last_page_len)
      : indptr_(indptr), indices_(indices), last_page_len_(last_page_len) {
    clear();
  }

  void clear() { keep_rows(0); }              ///< no rows
  std::size_t rows() const { return rows_; }  ///< so far
  /// The pages of all rows.
  std::size_t entries() const { return entries_; }
  /// [rows + 1] the row's entries are kv_indices()[kv_indptr()[row] .. kv_indptr()[row + 1]).
  std::span<const std::int32_t> kv_indptr() const { return indptr_.first(std::min(rows_ + 1, indptr_.size())); }
  /// [entries] pages, row by row.
  std::span<const std::int32_t> kv_indices() const { return indices_.first(entries_); }
  /// [rows] tokens of each row's last page, 1 .. page_size; 0 where a row has no page.
  std::span<const std::int32_t> last_page_len() const { return last_page_len_.first(rows_); }

  // --- what fills them: room for a row, its entries, its end ---

  /// Whether one more row of so many pages has room; else lists_too_small.
  Status check_row(std::size_t pages) const {
    if (rows_ + 1 >= indptr_.size()) return {Status::Code::lists_too_small, rows_ + 2, indptr_.size()};
    if (rows_ >= last_page_len_.size()) return {Status::Code::lists_too_small, rows_ + 1, last_page_len_.size()};
    if (entries_ + pages > indices_.size()) return {Status::Code::lists_too_small, entries_ + pages, indices_.size()};
    return {};
  }
  /// [pages] entries of that row, to be written.
  std::span<std::int32_t> row(std::size_t pages) { return indices_.subspan(entries_, pages); }
  /// They are written; last_page_tokens: what the last of them holds.
  void end_row(std::size_t pages, std::size_t last_page_tokens, std::size_t) {
    entries_ += pages;
    last_page_len_[rows_] = static_cast<std::int32_t>(last_page_tokens);
    indptr_[++rows_] = static_cast<std::int32_t>(entries_);
  }
  /// Takes back the rows behind the first so many.
  void keep_rows(std::size_t rows) {
    rows_ = rows;
    if (rows == 0 && !indptr_.empty()) indptr_[0] = 0;
    entries_ = rows == 0 ? 0 : static_cast<std::size_t>(indptr_[rows]);
  }

 private:
  std::span<std::int32_t> indptr_, indices_, last_page_len_;
  std::size_t rows_ = 0;
  std::size_t entries_ = 0;
};

/// Block tables, [rows, most pages of a row], in arrays of the caller's; entries behind a row's last page are
/// `padding`.
class BlockTables {
 public:
  /// tables: [most rows * max_pages], sequence_lengths: [most rows].
  BlockTables(std::span<std::int32_t> tables, std::size_t max_pages, std::span<std::int32_t> sequence_lengths,
              std::int32_t padding = 0)
      : tables_(tables), sequence_lengths_(sequence_lengths), max_pages_(max_pages), padding_(padding) {}

  void clear() { rows_ = 0; }                 ///< no rows
  std::size_t rows() const { return rows_; }  ///< so far
  /// [rows, max_pages]
  std::span<const std::int32_t> block_tables() const { return tables_.first(rows_ * max_pages_); }
  /// [rows] tokens that a row's pages hold together: what the kernel reads, not the length of the sequence.
  std::span<const std::int32_t> sequence_lengths() const { return sequence_lengths_.first(rows_); }

  // --- what fills them: room for a row, its entries, its end ---

  /// Whether one more row of so many pages has room; else lists_too_small.
  Status check_row(std::size_t pages) const {
    if (pages > max_pages_) return {Status::Code::lists_too_small, pages, max_pages_};
    const std::size_t most_rows =
        max_pages_ == 0 ? sequence_lengths_.size() : std::min(sequence_lengths_.size(), tables_.size() / max_pages_);
    if (rows_ >= most_rows) return {Status::Code::lists_too_small, rows_ + 1, most_rows};
    return {};
  }
  /// [pages] entries of that row, to be written.
  std::span<std::int32_t> row(std::size_t pages) { return tables_.subspan(rows_ * max_pages_, pages); }
  /// They are written; tokens: what they hold together.
  void end_row(std::size_t pages, std::size_t, std::size_t tokens) {
    const std::span<std::int32_t> behind = tables_.subspan(rows_ * max_pages_ + pages, max_pages_ - pages);
    std::fill(behind.begin(), behind.end(), padding_);
    sequence_lengths_[rows_++] = static_cast<std::int32_t>(tokens);
  }
  /// Takes back the rows behind the first so many.
  void keep_rows(std::size_t rows) { rows_ = rows; }

 private:
  std::span<std::int32_t> tables_, sequence_lengths_;
  std::size_t max_pages_;
  std::int32_t padding_;
  std::size_t rows_ = 0;
};

/// How the engine sees pages.
struct PageListOptions {
  /// Empty: an entry is the PageId, the page's place in the pool. Else the engine's own block table of the sequence:
  /// the entry of the page that holds the positions [j * page_size, (j + 1) * page_size) is block_table[j].
  std::span<const std::int32_t> block_table = {};
  /// The kernel takes a token's place in its list for its position: it rotates keys as it reads them, has ALiBi or a
  /// sliding window. Lists with a gap are then refused.
  bool kernel_counts_positions = false;
};

/// Rows that list_selection adds: one for each kv head, or for each query head where the policy selects for each.
template <class Layer>
std::size_t selection_rows(const Layer& layer) {
  const bool by_query = traits::selection(layer.policy()) == SelectionScope::query_head;
  return by_query ? layer.geometry().query_heads : layer.geometry().kv_heads;
}

namespace detail {

/// ALiBi and sliding windows are about positions, and a kernel of page lists has them from the list.
template <class Layer>
PageListOptions options_for(const Layer& layer, PageListOptions options) {
  const LogitOptions& logits = layer.config().logits;
  options.kernel_counts_positions |= logits.window != 0 || !logits.alibi_slopes.empty();
  return options;
}

/// What is held can be listed unless the policy counts positions in the cache: its pages meet rotated queries as soon
/// as something was evicted.
template <class Layer>
Status check_resident(const Layer& layer) {
  if (!traits::in_cache_positions(layer.policy())) return {};
  for (std::size_t h = 0; h < layer.geometry().kv_heads; ++h) {
    const bool evicted = Position{0} + layer.resident_tokens(h) != layer.next_position();
    if (evicted) return {Status::Code::query_rotated, 0, layer.table(h).size()};
  }
  return {};
}

/// The pages of one row: those of `table` that `reads` names, or all of them.
struct ListedPages {
  const PageTable& table;
  std::span<const PageRead> reads;
  bool all;

  std::size_t size() const { return all ? table.size() : reads.size(); }
  PageRead operator[](std::size_t i) const {
    if (!all) return reads[i];
    const PageIndex index{static_cast<std::uint32_t>(i)};
    return {table[index].page, index, table[index].tokens, nullptr, 0.0F, 0.0F, 0, table[index].first_position};
  }
  Position first_position(std::size_t i) const { return table[(*this)[i].index].first_position; }
};

inline bool reads_every_token(const PageRead& read) {
  if (read.token_mask == nullptr) return true;
  for (std::uint32_t slot = 0; slot < read.tokens; ++slot) {
    if ((read.token_mask[slot / 64] >> (slot % 64) & 1) == 0) return false;
  }
  return true;
}

/// Whether a list can say it; partial: the entry of the page that is not full, size() if there is none.
inline Status check_listed(const ListedPages& pages, const Geometry& geometry, const PageListOptions& options,
                           std::size_t& partial) {
  using Code = Status::Code;
  partial = pages.size();
  for (std::size_t i = 0; i < pages.size(); ++i) {
    const PageRead read = pages[i];
    if (!reads_every_token(read)) return {Code::page_read_in_part, i, pages.size()};
    if (read.log_weight != 0.0F || read.value_log_weight != 0.0F) return {Code::page_weighted, i, pages.size()};
    if (read.rotate_back != 0) return {Code::query_rotated, i, pages.size()};
    if (read.tokens < geometry.page_size) {
      if (partial != pages.size()) return {Code::page_read_in_part, i, pages.size()};
      partial = i;
    }
    const std::size_t page_number = geometry.page_number(pages.first_position(i));
    if (!options.block_table.empty() && page_number >= options.block_table.size()) {
      return {Code::no_such_block, page_number, options.block_table.size()};
    }
    if (options.kernel_counts_positions && page_number != i) {
      return {Code::list_has_gap, i, geometry.page_number(pages.table.back().first_position)};
    }
  }
  if (options.kernel_counts_positions && pages.table.size() > 0) {
    const std::size_t newest = geometry.page_number(pages.table.back().first_position);
    if (pages.size() != newest + 1) return {Code::list_has_gap, pages.size(), newest};
  }
  return {};
}

inline std::int32_t entry_of(const ListedPages& pages, std::size_t i, const Geometry& geometry,
                             const PageListOptions& options) {
  if (options.block_table.empty()) return static_cast<std::int32_t>(pages[i].page.value);
  return options.block_table[geometry.page_number(pages.first_position(i))];
}

/// One row. The page that is not full, which is the sequence's open page, comes last.
template <class Lists>
Status add_row(const ListedPages& pages, const Geometry& geometry, const PageListOptions& options, Lists& lists) {
  const std::size_t count = pages.size();
  std::size_t partial = 0;
  if (const Status status = check_listed(pages, geometry, options, partial); !status) return status;
  if (const Status status = lists.check_row(count); !status) return status;
  const std::span<std::int32_t> row = lists.row(count);
  std::size_t at = 0;
  for (std::size_t i = 0; i < count; ++i) {
    if (i != partial) row[at++] = entry_of(pages, i, geometry, options);
  }
  std::size_t last = count == 0 ? 0 : geometry.page_size;
  if (partial < count) {
    row[at] = entry_of(pages, partial, geometry, options);
    last = pages[partial].tokens;
  }
  lists.end_row(count, last, count == 0 ? 0 : (count - 1) * geometry.page_size + last);
  return {};
}

/// A row for each kv head, or none at all. pages_of(kv_head) -> ListedPages.
template <class Lists, class PagesOf>
Status add_heads(const Geometry& geometry, const PageListOptions& options, Lists& lists, PagesOf&& pages_of) {
  const std::size_t before = lists.rows();
  for (std::size_t h = 0; h < geometry.kv_heads; ++h) {
    if (const Status status = add_row(pages_of(h), geometry, options, lists); !status) {
      lists.keep_rows(before);
      return status;
    }
  }
  return {};
}

/// One row for all kv heads, if they hold the same pages under the same names.
template <class Lists, class PagesOf>
Status add_shared(const Geometry& geometry, const PageListOptions& options, Lists& lists, PagesOf&& pages_of) {
  const ListedPages first = pages_of(0);
  std::size_t partial = 0;
  if (const Status status = check_listed(first, geometry, options, partial); !status) return status;
  for (std::size_t h = 1; h < geometry.kv_heads; ++h) {
    const ListedPages pages = pages_of(h);
    if (const Status status = check_listed(pages, geometry, options, partial); !status) return status;
    const std::size_t common = std::min(first.size(), pages.size());
    std::size_t i = 0;
    while (i < common && pages[i].tokens == first[i].tokens &&
           entry_of(pages, i, geometry, options) == entry_of(first, i, geometry, options)) {
      ++i;
    }
    if (i < common || first.size() != pages.size()) return {Status::Code::heads_differ, h, i};
  }
  return add_row(first, geometry, options, lists);
}

/// The rows of list_selection; after_row(row, pages) for each of them, counted from 0.
template <class Layer, class Lists, class AfterRow>
Status add_selection(Layer& layer, HeadRows<const float> q, const PageListOptions& options, Lists& lists,
                     AfterRow&& after_row) {
  const Geometry& geometry = layer.geometry();
  if (layer.next_position() == Position{0}) return {Status::Code::nothing_to_attend, 1, 0};
  if (const Status status = check_rows(q, geometry.query_heads, geometry.head_dim); !status) return status;
  const std::size_t before = lists.rows();
  const std::size_t rows = selection_rows(layer);
  const std::size_t queries = geometry.query_heads / rows;
  for (std::size_t row = 0; row < rows; ++row) {
    const std::size_t first = row * queries;
    const std::size_t h = first / geometry.group();
    if (first % geometry.group() == 0) layer.begin_query(h, layer.next_position());
    const QueryGroup group{q.row(first), queries, geometry.head_dim, q.head_stride, layer.softmax_scale()};
    const ListedPages pages{layer.table(h), layer.select(h, group), false};
    if (const Status status = add_row(pages, geometry, options_for(layer, options), lists); !status) {
      lists.keep_rows(before);
      return status;
    }
    after_row(row, pages.size());
  }
  return {};
}

}  // namespace detail

// `Layer` below is a PagedKvCache, or the LayerPages of an engine that keeps its keys and values itself. Every verb
// adds its rows behind those already there, all or none of them; none allocates, and each is O(pages listed). A Status
// says what did not fit or what a list cannot say.

/// What each kv head holds: a row for each.
template <class Layer, class Lists>
Status list_resident(const Layer& layer, Lists& lists, const PageListOptions& options = {}) noexcept {
  if (const Status status = detail::check_resident(layer); !status) return status;
  return detail::add_heads(layer.geometry(), detail::options_for(layer, options), lists, [&](std::size_t h) {
    return detail::ListedPages{layer.table(h), {}, true};
  });
}
/// What all kv heads hold, in one row. Refused unless they hold the same pages under the same names: policies of scope
/// layer and those that decide by position alone (Dense, StreamingLlm) do, named by a block table or by the ids of an
/// engine whose pages hold all kv heads (PagedKvCache has pages of its own for each head).
template <class Layer, class Lists>
Status list_resident_shared(const Layer& layer, Lists& lists, const PageListOptions& options = {}) noexcept {
  if (const Status status = detail::check_resident(layer); !status) return status;
  return detail::add_shared(layer.geometry(), detail::options_for(layer, options), lists, [&](std::size_t h) {
    return detail::ListedPages{layer.table(h), {}, true};
  });
}

/// What the latest query read: a row for each kv head. Refused when a token came since, or when the policy selects for
/// each query head, whose lists are gone by then (list_selection makes them).
template <class Layer, class Lists>
Status list_read(const Layer& layer, Lists& lists, const PageListOptions& options = {}) noexcept {
  for (std::size_t h = 0; h < layer.geometry().kv_heads; ++h) {
    if (const Status status = layer.check_latest_reads(h); !status) return status;
  }
  return detail::add_heads(layer.geometry(), detail::options_for(layer, options), lists, [&](std::size_t h) {
    return detail::ListedPages{layer.table(h), layer.latest_reads(h), false};
  });
}

/// Starts the query q, [query_heads, head_dim], of the newest token and lists what it reads: a row for each kv head, or
/// for each query head (selection_rows). The first selection alone: what select_more adds depends on the softmax over
/// it.
template <class Layer, class Lists>
Status list_selection(Layer& layer, HeadRows<const float> q, Lists& lists,
                      const PageListOptions& options = {}) noexcept {
  return detail::add_selection(layer, q, options, lists, [](std::size_t, std::size_t) {});
}

/// Where the keys and values of the tokens from `first` on lie, one number for each: entry * page_size + slot, or -1
/// for a token that was given up (vLLM's slot mapping, where -1 is not written). slots: [tokens]. O(tokens * log
/// pages).
template <class Layer>
Status map_slots(const Layer& layer, std::size_t kv_head, Position first, std::span<std::int64_t> slots,
                 const PageListOptions& options = {}) noexcept {
  const Geometry& geometry = layer.geometry();
  const PageTable& table = layer.table(kv_head);
  const detail::ListedPages pages{table, {}, true};
  if (!options.block_table.empty() && table.size() > 0) {
    const std::size_t newest = geometry.page_number(table.back().first_position);
    if (newest >= options.block_table.size()) return {Status::Code::no_such_block, newest, options.block_table.size()};
  }
  for (std::size_t token = 0; token < slots.size(); ++token) {
    const Position position = first + token;
    std::size_t page = 0;  // pages that begin at the token or before it
    for (std::size_t above = table.size(); page < above;) {
      const std::size_t middle = (page + above) / 2;
      if (pages.first_position(middle) <= position) {
        page = middle + 1;
      } else {
        above = middle;
      }
    }
    slots[token] = -1;
    if (page == 0) continue;
    const std::int64_t slot = position - pages.first_position(page - 1);
    if (slot >= static_cast<std::int64_t>(pages[page - 1].tokens)) continue;
    const std::int64_t entry = detail::entry_of(pages, page - 1, geometry, options);
    slots[token] = entry * static_cast<std::int64_t>(geometry.page_size) + slot;
  }
  return {};
}

}  // namespace kvsparse
