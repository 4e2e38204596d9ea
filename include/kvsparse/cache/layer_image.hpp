// SPDX-License-Identifier: Apache-2.0
// A cache laid open for a snapshot: where everything lies that later steps depend on, and the rules it must obey. The
// state is written from here, and read back in two steps: check_state (layer_check.hpp), which may refuse and changes
// nothing, and adopt_states, which cannot fail. No templates: compiled once, whatever the policies and storage types.
#pragma once

#include <algorithm>
#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "../core/bytes.hpp"
#include "../memory/page_table.hpp"
#include "cache_facts.hpp"

namespace kvsparse::detail {

/// A pool's pages, whatever their storage type.
struct PagesImage {
  void* store = nullptr;
  const void* pool = nullptr;  // the same for all caches of a pool
  std::size_t key_row_bytes = 0;
  std::size_t value_row_bytes = 0;
  std::byte* (*keys)(void* store, PageId page) = nullptr;    // [page_size * key_row_bytes]
  std::byte* (*values)(void* store, PageId page) = nullptr;  // [page_size * value_row_bytes]
  PageId (*acquire)(void* store) = nullptr;
  void (*release)(void* store, PageId page) = nullptr;
  std::size_t (*free_pages)(const void* store) = nullptr;
  bool (*is_shared)(const void* store, PageId page) = nullptr;
  /// Computes the page's summary anew from its first `tokens` keys.
  void (*summarize)(void* store, PageId page, std::size_t tokens) = nullptr;
};

/// A policy's states of one kind, one behind the other.
struct StatesImage {
  std::span<std::byte> bytes;
  std::size_t size = 0;  // of one; 0 if the policy has none
  void (*clear_padding)(void* state) = nullptr;

  template <class State>
  static StatesImage of(std::span<State> states) {
    if constexpr (std::is_empty_v<State>) return {};
    return {std::as_writable_bytes(states), sizeof(State),
            [](void* state) { KVSPARSE_CLEAR_PADDING(static_cast<State*>(state)); }};
  }
  std::span<std::byte> at(std::size_t index) const { return bytes.subspan(index * size, size); }
};

struct HeadImage {
  PageTable* table = nullptr;
  StatesImage page_states;  // [pages of the table's capacity]
  StatesImage state;
  std::span<std::byte> query_window;
  std::uint64_t* evictions = nullptr;
  std::array<std::size_t*, 4> counters{};  // evicted, read and skipped tokens, queries seen
  Position* query_end = nullptr;           // of the latest query, whose evidence is not kept
};

struct LayerImage {
  CacheFacts facts;
  // Rules.
  Geometry geometry;
  std::size_t max_tokens = 0;   // of a policy that keeps everything; else 0
  std::size_t page_budget = 0;  // as configured
  std::size_t page_capacity = 0;
  std::size_t page_floor = 0;  // of a head, where heads share a budget
  std::size_t sink_pages = 0;
  std::size_t decode_pages = 0;
  bool pins_prompt = false;
  bool unpins_middle = false;
  bool heads_agree = false;         // all heads hold the same positions
  bool heads_share_budget = false;  // page_budget is the mean over the heads
  // State.
  Position* next = nullptr;
  bool* prompt_ended = nullptr;
  std::size_t* prompt_tokens = nullptr;
  std::size_t* running_page_budget = nullptr;      // more than page_budget after a long prompt
  std::size_t* drafts = nullptr;                   // outstanding
  std::size_t* length_at_last_eviction = nullptr;  // truncate does not go back behind it
  std::size_t* peak_resident_tokens = nullptr;
  std::size_t* peak_resident_pages = nullptr;
  std::size_t* evicted_shared_pages = nullptr;
  StatesImage layer_state;
  std::vector<HeadImage> heads;
  PagesImage pages;

  bool keeps_all() const { return max_tokens != 0; }
};

/// The only way to a cache's image.
struct ImageAccess {
  template <class Cache>
  static auto of(Cache& cache) -> decltype(cache.image()) {
    return cache.image();
  }
  /// All layers of a sequence have been replaced: none has a token of a running step.
  static void begin_step(auto& sequence) noexcept { sequence.begin_step(); }
};
template <class Cache>
concept HasImage = requires(Cache& cache) {
  { ImageAccess::of(cache) } -> std::same_as<LayerImage>;
};

/// A checked state, which still lies in the bytes it was read from.
struct StagedPage {
  ResidentPage page;
  std::span<const std::byte> state, keys, values;
};
struct StagedHead {
  std::uint64_t evictions = 0;
  std::array<std::size_t, 4> counters{};
  std::span<const std::byte> state, query_window;
  std::vector<StagedPage> pages;
};
struct StagedLayer {
  Position next;
  bool prompt_ended = false;
  std::size_t prompt_tokens = 0;
  std::size_t page_budget = 0;
  std::size_t peak_resident_tokens = 0;
  std::size_t peak_resident_pages = 0;
  std::size_t evicted_shared_pages = 0;
  std::span<const std::byte> layer_state;
  std::vector<StagedHead> heads;
};

/// The index-th state, if the policy has any.
inline void write_state(const StatesImage& states, std::size_t index, std::vector<std::byte>& copy, ByteWriter& out) {
  if (states.size == 0) return;
  const std::span<std::byte> state = states.at(index);
  copy.assign(state.begin(), state.end());
  states.clear_padding(copy.data());
  out.write(copy);
}

/// Of each page the tokens it holds, of the pool what is resident.
inline void write_state(const LayerImage& layer, ByteWriter& out) {
  out.put(layer.next->value);
  out.put(std::uint8_t{*layer.prompt_ended});
  out.put(std::uint64_t{*layer.prompt_tokens});
  out.put(std::uint64_t{*layer.peak_resident_tokens});
  out.put(std::uint64_t{*layer.peak_resident_pages});
  out.put(std::uint64_t{*layer.evicted_shared_pages});
  std::vector<std::byte> copy;
  write_state(layer.layer_state, 0, copy, out);
  for (const HeadImage& head : layer.heads) {
    out.put(std::uint64_t{*head.evictions});
    for (const std::size_t* counter : head.counters) out.put(std::uint64_t{*counter});
    write_state(head.state, 0, copy, out);
    out.write(head.query_window);
    out.put(std::uint64_t{head.table->size()});
    for (std::uint32_t i = 0; i < head.table->size(); ++i) {
      const ResidentPage& page = (*head.table)[{i}];
      out.put(page.first_position.value);
      out.put(std::uint8_t{page.pinned});
      write_state(head.page_states, i, copy, out);
      const PagesImage& pages = layer.pages;
      out.write({pages.keys(pages.store, page.page), page.tokens * pages.key_row_bytes});
      out.write({pages.values(pages.store, page.page), page.tokens * pages.value_row_bytes});
    }
  }
}

/// No state of this cache is larger.
inline std::uint64_t largest_state(const LayerImage& layer) {
  constexpr std::uint64_t numbers = 16 * sizeof(std::uint64_t);  // more than a layer, a head or a page has
  std::uint64_t bytes = numbers + layer.layer_state.size;
  for (const HeadImage& head : layer.heads) {
    const std::uint64_t rows = layer.geometry.page_size * (layer.pages.key_row_bytes + layer.pages.value_row_bytes);
    bytes += numbers + head.state.size + head.query_window.size() +
             layer.page_capacity * (numbers + head.page_states.size + rows);
  }
  return bytes;
}

inline void copy_bytes(std::span<const std::byte> from, std::span<std::byte> to) {
  if (!from.empty()) std::memcpy(to.data(), from.data(), from.size());
}

/// An empty cache becomes what was checked. Pages come from the pool in the order in which appends would have taken
/// them, so that what is read together lies together.
inline void adopt_state(const LayerImage& layer, const StagedLayer& state) noexcept {
  const PagesImage& pages = layer.pages;
  std::size_t most_pages = 0;
  for (std::size_t h = 0; h < layer.heads.size(); ++h) {
    const HeadImage& head = layer.heads[h];
    const StagedHead& staged = state.heads[h];
    *head.evictions = staged.evictions;
    for (std::size_t i = 0; i < staged.counters.size(); ++i) *head.counters[i] = staged.counters[i];
    *head.query_end = {};
    copy_bytes(staged.state, head.state.bytes);
    copy_bytes(staged.query_window, head.query_window);
    most_pages = std::max(most_pages, staged.pages.size());
  }
  for (std::size_t i = 0; i < most_pages; ++i) {
    for (std::size_t h = 0; h < layer.heads.size(); ++h) {
      if (i >= state.heads[h].pages.size()) continue;
      const HeadImage& head = layer.heads[h];
      const StagedPage& staged = state.heads[h].pages[i];
      ResidentPage page = staged.page;
      page.page = pages.acquire(pages.store);
      copy_bytes(staged.keys, {pages.keys(pages.store, page.page), staged.keys.size()});
      copy_bytes(staged.values, {pages.values(pages.store, page.page), staged.values.size()});
      pages.summarize(pages.store, page.page, page.tokens);
      copy_bytes(staged.state, head.page_states.at(i));
      head.table->push_back(page);
    }
  }
  copy_bytes(state.layer_state, layer.layer_state.bytes);
  *layer.next = state.next;
  *layer.drafts = 0;
  *layer.length_at_last_eviction = static_cast<std::size_t>(state.next.value);  // when it was is not saved
  *layer.prompt_ended = state.prompt_ended;
  *layer.prompt_tokens = state.prompt_tokens;
  *layer.running_page_budget = state.page_budget;
  *layer.peak_resident_tokens = state.peak_resident_tokens;
  *layer.peak_resident_pages = state.peak_resident_pages;
  *layer.evicted_shared_pages = state.evicted_shared_pages;
}

/// The caches become what was checked. All pages are given back first: the layers may share a pool.
inline void adopt_states(std::span<const LayerImage> layers, std::span<const StagedLayer> states) noexcept {
  for (const LayerImage& layer : layers) {
    for (const HeadImage& head : layer.heads) {
      for (std::uint32_t i = 0; i < head.table->size(); ++i) {
        layer.pages.release(layer.pages.store, (*head.table)[{i}].page);
      }
      head.table->clear();
    }
  }
  for (std::size_t l = 0; l < layers.size(); ++l) adopt_state(layers[l], states[l]);
}

}  // namespace kvsparse::detail
