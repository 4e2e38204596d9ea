// SPDX-License-Identifier: Apache-2.0
//
// Several caches over one pool, and beside each a naive model that remembers every token. Any verb may come at any
// time; after each one everything that the library promises is computed again by brute force.
//
// Which tokens stay resident, and which of them a query reads, is the policy's affair: the model looks at what the
// cache says and checks that it is legal. Everything else it knows by itself. What truncate, save, load and fork leave
// behind must be, to the bit, what a cache of its own comes to that only ever had the tokens and queries that still
// count.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cache_kind.hpp"
#include "naive_sequence.hpp"
#include "promise.hpp"
#include "support/row_stock.hpp"

namespace kvsparse_test {

/// One thing to do, complete in itself: what it needs beside, it draws from the numbers.
struct Verb {
  enum class Kind {
    append,
    append_chunk,
    append_prompt,
    end_prompt,
    append_draft,
    truncate,
    query,
    queries,
    clear,
    fork,
    release,
    make,
    save,
    load,
    load_damaged,
    copy,
    wrong_shape,
    compare_with_twin,
  };
  Kind kind = Kind::append;
  std::uint32_t cache = 0;   ///< which, modulo how many there are
  std::uint32_t amount = 0;  ///< tokens, most often
  std::uint32_t seed = 0;

  static Verb random(TestRng& rng);
  std::string describe() const;
};

/// What a test that draws its verbs at random has to see, or it would test less than it says.
struct Sights {
  std::map<kvsparse::Status::Code, std::size_t> outcomes;
  std::size_t evicted_pages = 0;
  std::size_t shared_pages = 0;  ///< after each verb
  std::size_t forks = 0;
  std::size_t loads = 0;
  std::size_t refused_loads = 0;
  std::size_t drafts_taken_back = 0;
  std::size_t settled_tokens_taken_back = 0;

  void add(const Sights& other);
};

class ModelWorld {
 public:
  /// The same seed gives the same kinds of cache, pool and stock.
  ModelWorld(std::string_view policy, kvsparse::ScalarType scalar, std::size_t page_size, std::uint64_t seed);

  /// Throws Broken.
  void run(const Verb& verb);
  /// Lets everything go. Throws Broken if the pool is not whole again.
  void finish();

  std::string describe() const;
  const Sights& sights() const { return sights_; }

 private:
  struct Drawn;
  ModelWorld(kvsparse::ScalarType scalar, const Drawn& drawn);

  using Bytes = std::vector<std::byte>;
  using Status = kvsparse::Status;

  /// Everything that later steps of a cache depend on, and what it says of itself beside.
  struct Footprint {
    Bytes state;                        ///< as in a snapshot, but for the peaks
    std::vector<std::uint64_t> beside;  ///< peaks, and which pages of the pool
    friend bool operator==(const Footprint&, const Footprint&) = default;
  };
  struct Entry {
    Entry(const CacheKind& of_kind, kvsparse::AnyCache&& made, NaiveSequence naive);
    void forget_pages() {
      for (std::vector<std::int64_t>& of_head : pages) of_head.clear();
      page_end = 0;
    }
    const CacheKind* kind;
    kvsparse::AnyCache cache;
    kvsparse::detail::LayerImage image;
    NaiveSequence model;
    Footprint footprint;
    std::vector<std::vector<std::int64_t>> pages;  ///< [kv_heads]: first positions, after the verb before
    std::uint64_t evictions_before = 0;
    std::size_t page_end = 0;  ///< first position behind all pages, then
  };
  struct Saved {
    kvsparse::detail::CacheFacts facts;
    std::string bytes;
    NaiveSequence model;
    Bytes state;
    std::size_t pages;
  };

  static void clear(Entry& entry);
  void append(Entry& entry, std::size_t count, std::uint32_t seed, bool one_by_one);
  void append_prompt(Entry& entry, std::size_t count, std::uint32_t seed);
  void append_draft(Entry& entry, std::size_t count, std::uint32_t seed);
  void truncate(Entry& entry, std::uint32_t amount);
  void query(Entry& entry, std::uint32_t seed);
  void queries(Entry& entry, std::size_t count, std::uint32_t seed);
  void fork(std::size_t entry);
  void make(std::uint32_t seed);
  void save(const Entry& entry, std::uint32_t seed);
  void load(Entry& entry, std::uint32_t seed);
  void load_damaged(Entry& entry, std::uint32_t seed);
  void copy(const Entry& entry);
  void wrong_shape(Entry& entry, std::uint32_t seed);
  void compare_with_twin(Entry& entry, std::optional<std::uint32_t> query_seed);

  kvsparse::AnyCache twin_of(const Entry& entry) const;
  /// What of two states differs, if they do.
  static std::string difference(const kvsparse::detail::LayerImage& a, const kvsparse::detail::LayerImage& b);
  static Footprint footprint_of(const kvsparse::detail::LayerImage& image);

  static std::size_t index_of(kvsparse::Position position) { return static_cast<std::size_t>(position.value); }

  void expect(Entry& entry, Status status, Status::Code code);
  void expect_unchanged(const Entry& entry, const char* after) const;
  void check_entry(Entry& entry) const;
  void check_pages(const Entry& entry, std::size_t head) const;
  void check_rows(const Entry& entry, std::size_t head) const;
  void check_stats(const Entry& entry) const;
  void check_pool() const;
  void check_reads(const Entry& entry) const;
  void check_output(const Entry& entry, std::size_t row, std::size_t end, const std::vector<std::int64_t>& read,
                    std::size_t head, std::span<const float> out, const float* lse) const;
  /// Of the positions from the page of `position` to `end`, how many are gone.
  std::size_t missing_behind(const Entry& entry, std::size_t head, std::int64_t position, std::size_t end) const;
  void check_mass(const Entry& entry, std::size_t row) const;

  std::vector<float> keys(std::size_t first_row, std::size_t count) const;
  std::vector<float> values(std::size_t first_row, std::size_t count) const;
  std::vector<float> queries_of(std::size_t first_row, std::size_t count) const;
  kvsparse::TokenRows<const float> key_chunk(const std::vector<float>& rows, std::size_t count) const;
  kvsparse::TokenRows<const float> value_chunk(const std::vector<float>& rows, std::size_t count) const;
  /// Elements of one token's output.
  std::size_t output_row() const { return geometry().query_heads * geometry().dim_of_values(); }

  const kvsparse::Geometry& geometry() const { return stock_.geometry(); }
  std::size_t free_pages() const;

  std::vector<CacheKind> kinds_;
  RowStock stock_;
  kvsparse::AnyPagePool pool_;
  std::vector<Entry> entries_;
  std::map<std::uint32_t, Saved> saved_;
  Sights sights_;
};

}  // namespace kvsparse_test
