// SPDX-License-Identifier: Apache-2.0
// The attention of one rank. Ranks form a grid: its rows share the kv heads among them, the ranks of a row share each
// head's pages. What a head holds is decided by the same policy on every rank of the row, from the same page masses, so
// that nobody has to be told; a rank stores and reads its own pages alone.
#pragma once

#include <mpi.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <kvsparse/attention/page_kernel.hpp>
#include <kvsparse/interop/page_steering.hpp>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "state_merge.hpp"

namespace kvsparse_tools {

/// This rank's place: rank = row * columns + column.
class RankGrid {
 public:
  /// Throws when the ranks of MPI_COMM_WORLD do not divide into so many rows.
  explicit RankGrid(int rows) : rows_(rows) {
    int ranks = 1, rank = 0;
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    if (rows < 1 || ranks % rows != 0) {
      throw std::invalid_argument(std::to_string(rows) + " groups of heads do not divide " + std::to_string(ranks) +
                                  " ranks");
    }
    columns_ = ranks / rows;
    MPI_Comm_split(MPI_COMM_WORLD, rank / columns_, rank, &row_ranks_);
    MPI_Comm_split(MPI_COMM_WORLD, rank % columns_, rank, &column_ranks_);
    row_ = rank / columns_;
    column_ = rank % columns_;
  }
  RankGrid(const RankGrid&) = delete;
  RankGrid& operator=(const RankGrid&) = delete;
  ~RankGrid() {
    MPI_Comm_free(&row_ranks_);
    MPI_Comm_free(&column_ranks_);
  }

  std::size_t rows() const { return static_cast<std::size_t>(rows_); }
  std::size_t columns() const { return static_cast<std::size_t>(columns_); }
  std::size_t row() const { return static_cast<std::size_t>(row_); }
  std::size_t column() const { return static_cast<std::size_t>(column_); }
  MPI_Comm row_ranks() const { return row_ranks_; }        // those with the same heads
  MPI_Comm column_ranks() const { return column_ranks_; }  // one of each row

 private:
  int rows_, columns_ = 1, row_ = 0, column_ = 0;
  MPI_Comm row_ranks_, column_ranks_;
};

/// One kv head of one layer, its pages dealt out over the ranks of the row: page id i is page i / columns of the rank
/// in column i % columns. An evicted page's id is used again, so the pages of a full budget stay evenly dealt.
template <class Policy>
class SplitHead {
 public:
  /// config: of this one kv head.
  SplitHead(const kvsparse::CacheConfig& config, const RankGrid& grid, StateMerge::Way way)
      : grid_(grid),
        geometry_(config.geometry()),
        brain_(config, ids_),
        merge_states_(grid.row_ranks(), geometry_.query_heads, geometry_.head_dim, way),
        row_(kvsparse::round_up(geometry_.head_dim, kvsparse::query_padding)),
        padded_queries_(geometry_.query_heads * row_),
        accumulators_(padded_queries_.size()),
        states_(geometry_.query_heads),
        log_sum_exp_(states_.size()) {
    const std::size_t pages = brain_.page_budget();
    for (std::size_t id = pages; id > 0; --id) ids_.free.push_back({static_cast<std::uint32_t>(id - 1)});
    const std::size_t my_pages = kvsparse::divide_up(pages, grid.columns());
    keys_.resize(my_pages * geometry_.page_size * geometry_.row_stride());
    values_.resize(keys_.size());
    indptr_.resize(2);
    last_page_len_.resize(1);
    indices_.resize(pages);
    reads_.reserve(my_pages);
    page_max_.resize(my_pages * states_.size() + kvsparse::query_padding);
    page_sum_.resize(page_max_.size());
    page_mass_.resize(pages * states_.size());
  }

  /// key, value: [head_dim].
  void append(bool is_prompt, const float* key, const float* value) {
    const auto store = [&](std::size_t, kvsparse::PageId page, kvsparse::Slot slot) {
      if (!is_mine(page.value)) return;
      const std::size_t at = (my_page(page.value) * geometry_.page_size + slot.value) * geometry_.row_stride();
      std::copy_n(key, geometry_.head_dim, keys_.data() + at);
      std::copy_n(value, geometry_.head_dim, values_.data() + at);
    };
    if (is_prompt) {
      require(brain_.append_prompt(1, [&](std::size_t, auto... place) { store(place...); }));
    } else {
      require(brain_.append(store));
    }
  }

  /// q, out: [query_heads of this kv head, head_dim].
  void attend(const float* q, float* out) {
    const kvsparse::HeadRows<const float> queries(q, geometry_.query_heads, geometry_.head_dim);
    kvsparse::CsrPageLists lists(indptr_, indices_, last_page_len_);
    require(brain_.select(queries, lists));  // the same on every rank of the row
    read_my_pages(lists, q);
    merge_states_(states_);
    find_page_masses(lists.entries());
    for (std::size_t i = 0; i < states_.size(); ++i) {
      log_sum_exp_[i] = states_[i].log_sum_exp();
      kvsparse::normalise(states_[i], out + i * geometry_.head_dim, geometry_.head_dim);
    }
    const std::span<const float> masses(page_mass_.data(), lists.entries() * states_.size());
    require(brain_.observe(queries, masses, log_sum_exp_));
  }

  std::size_t evicted_tokens() const { return brain_.stats(0).evicted_tokens; }

 private:
  struct PageIds {
    std::vector<kvsparse::PageId> free;
    kvsparse::PageId acquire() {
      const kvsparse::PageId page = free.back();
      free.pop_back();
      return page;
    }
    void release(kvsparse::PageId page) { free.push_back(page); }
  };

  bool is_mine(std::size_t page) const { return page % grid_.columns() == grid_.column(); }
  std::uint32_t my_page(std::size_t page) const { return static_cast<std::uint32_t>(page / grid_.columns()); }

  /// The library's kernel over this rank's memory: states_ over its tokens, and what it saw of each of its pages.
  void read_my_pages(const kvsparse::CsrPageLists& lists, const float* q) {
    reads_.clear();
    for (std::size_t entry = 0; entry < lists.entries(); ++entry) {
      const auto page = static_cast<std::size_t>(lists.kv_indices()[entry]);
      if (!is_mine(page)) continue;
      const bool last = entry + 1 == lists.entries();
      kvsparse::PageRead read;
      read.page = {my_page(page)};
      read.index = {static_cast<std::uint32_t>(entry)};
      read.tokens = static_cast<std::uint32_t>(last ? lists.last_page_len()[0] : static_cast<int>(geometry_.page_size));
      reads_.push_back(read);
    }
    std::fill(accumulators_.begin(), accumulators_.end(), 0.0F);
    for (std::size_t i = 0; i < states_.size(); ++i) {
      states_[i] = kvsparse::SoftmaxState{};
      states_[i].accumulator = accumulators_.data() + i * row_;
      for (std::size_t d = 0; d < geometry_.head_dim; ++d) {
        padded_queries_[i * row_ + d] = q[i * geometry_.head_dim + d] * brain_.softmax_scale();
      }
    }
    kvsparse::PagedKv<float, float> pages;
    pages.keys = keys_.data();
    pages.values = values_.data();
    pages.key_row_stride = pages.value_row_stride = geometry_.row_stride();
    pages.key_page_stride = pages.value_page_stride = geometry_.page_size * geometry_.row_stride();
    pages.head_dim = geometry_.head_dim;
    const kvsparse::PageTap tap{page_max_.data(), page_sum_.data(), nullptr, states_.size(), geometry_.page_size};
    kvsparse::attend_pages(pages, reads_, padded_queries_.data(), row_, std::span<kvsparse::SoftmaxState>(states_),
                           tap);
  }

  /// Each page's share of the whole softmax, from the rank that has it: the others add zeros, so the sum is exact.
  void find_page_masses(std::size_t pages) {
    const std::size_t queries = states_.size();
    std::fill_n(page_mass_.begin(), pages * queries, 0.0F);
    for (std::size_t r = 0; r < reads_.size(); ++r) {
      for (std::size_t i = 0; i < queries; ++i) {
        const std::size_t at = r * queries + i;
        page_mass_[reads_[r].index.value * queries + i] =
            page_sum_[at] * std::exp(page_max_[at] - states_[i].max) / states_[i].sum;
      }
    }
    if (grid_.columns() == 1) return;
    MPI_Allreduce(MPI_IN_PLACE, page_mass_.data(), static_cast<int>(pages * queries), MPI_FLOAT, MPI_SUM,
                  grid_.row_ranks());
  }

  static void require(kvsparse::Status status) {
    if (!status) throw std::runtime_error(status.message());
  }

  const RankGrid& grid_;
  kvsparse::Geometry geometry_;
  PageIds ids_;
  kvsparse::PageSteering<Policy, PageIds> brain_;
  StateMerge merge_states_;
  std::size_t row_;                   // floats of a padded query
  std::vector<float> keys_, values_;  // [this rank's pages, page_size, row_stride]
  std::vector<std::int32_t> indptr_, indices_, last_page_len_;
  std::vector<kvsparse::PageRead> reads_;  // this rank's part of the list; index: the entry of the list
  std::vector<float> padded_queries_, accumulators_;
  std::vector<kvsparse::SoftmaxState> states_;
  std::vector<float> log_sum_exp_, page_max_, page_sum_, page_mass_;
};

/// All layers, the heads of this rank's row.
template <class Policy>
class SplitAttention {
 public:
  /// config: of a whole layer. Throws when the grid's rows do not divide the kv heads, or the policy needs more than
  /// page lists and page masses.
  SplitAttention(kvsparse::CacheConfig config, std::size_t layers, const RankGrid& grid, StateMerge::Way way)
      : grid_(grid), geometry_(config.geometry()) {
    if (config.kv_heads % grid.rows() != 0) {
      throw std::invalid_argument(std::to_string(grid.rows()) + " groups of heads do not divide " +
                                  std::to_string(config.kv_heads) + " kv heads");
    }
    heads_per_row_ = config.kv_heads / grid.rows();
    config.query_heads /= config.kv_heads;
    config.kv_heads = 1;
    for (std::size_t layer = 0; layer < layers; ++layer) {
      config.layer = layer;
      for (std::size_t h = 0; h < heads_per_row_; ++h) {
        heads_.push_back(std::make_unique<SplitHead<Policy>>(config, grid, way));
      }
    }
    attended_.resize(heads_per_row_ * geometry_.group() * geometry_.head_dim);
  }

  /// One token. q, out: [query_heads, head_dim]; k, v: [kv_heads, head_dim]: all of them, on every rank.
  void operator()(std::size_t layer, bool is_prompt, std::span<const float> q, std::span<const float> k,
                  std::span<const float> v, std::span<float> out) {
    const std::size_t group_row = geometry_.group() * geometry_.head_dim;
    for (std::size_t i = 0; i < heads_per_row_; ++i) {
      const std::size_t h = grid_.row() * heads_per_row_ + i;
      SplitHead<Policy>& head = *heads_[layer * heads_per_row_ + i];
      head.append(is_prompt, &k[h * geometry_.head_dim], &v[h * geometry_.head_dim]);
      head.attend(&q[h * group_row], &attended_[i * group_row]);
    }
    // Every rank has its heads whole; the rows bring theirs together, head after head.
    const auto count = static_cast<int>(attended_.size());
    MPI_Allgather(attended_.data(), count, MPI_FLOAT, out.data(), count, MPI_FLOAT, grid_.column_ranks());
  }

  /// By this rank's heads, each of which its row has once.
  std::size_t evicted_tokens() const {
    std::size_t tokens = 0;
    for (const auto& head : heads_) tokens += head->evicted_tokens();
    return tokens;
  }

 private:
  const RankGrid& grid_;
  kvsparse::Geometry geometry_;
  std::size_t heads_per_row_ = 1;
  std::vector<std::unique_ptr<SplitHead<Policy>>> heads_;  // [layers, heads of the row]
  std::vector<float> attended_;
};

}  // namespace kvsparse_tools
