// SPDX-License-Identifier: Apache-2.0
// Reads a cache's state from bytes that anybody may have written, and refuses, in a sentence, what this cache could not
// have got into itself. The policy's own state is taken as it is: only the policy knows what it means.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "cache_config.hpp"
#include "layer_image.hpp"

namespace kvsparse::detail {

[[noreturn]] inline void refuse_snapshot(const std::string& sentence) { KVSPARSE_THROW(SnapshotError(sentence)); }

/// Whether a page has to be pinned, must not be, or, when a long prompt loses pins from the middle, either.
inline void check_pin(const LayerImage& layer, const StagedLayer& state, const ResidentPage& page) {
  const bool is_sink = layer.geometry.page_number(page.first_position) < layer.sink_pages;
  const bool is_prompt = layer.pins_prompt && page.first_position < Position{0} + state.prompt_tokens;
  const bool may_be_pinned = is_sink || is_prompt;
  const bool must_be_pinned = is_sink || (is_prompt && !layer.unpins_middle);
  if (page.pinned ? may_be_pinned : !must_be_pinned) return;
  refuse_snapshot("the page at position " + fact_text(page.first_position.value) + " is " +
                  (page.pinned ? "pinned" : "not pinned") + ", which this cache would not have done");
}

/// The pages of one head, oldest first: whole pages, the last of them that of the newest token.
inline void check_pages(const LayerImage& layer, const StagedLayer& state, StagedHead& head, std::size_t state_bytes,
                        ByteReader& in) {
  const Geometry& geometry = layer.geometry;
  const auto length = static_cast<std::size_t>(state.next.value);
  const std::size_t opened = geometry.pages_for(length);
  const std::size_t count = in.size();
  if (count > state.page_budget && !layer.heads_share_budget) {
    refuse_snapshot(fact_text(count) + " resident pages exceed the budget of " + fact_text(state.page_budget));
  }
  const std::size_t most = most_pages_of_a_head(layer.heads.size(), state.page_budget, layer.page_floor);
  if (layer.heads_share_budget && count > most) {
    refuse_snapshot(fact_text(count) + " resident pages of a head are more than the " + fact_text(most) +
                    " that the others can leave it");
  }
  if (layer.heads_share_budget && count < std::min(layer.page_floor, opened)) {
    refuse_snapshot(fact_text(count) + " resident pages of a head are less than the " + fact_text(layer.page_floor) +
                    " that it is left with");
  }
  if (head.evictions != opened - count || count > opened) {
    refuse_snapshot(fact_text(count) + " resident and " + fact_text(head.evictions) + " evicted pages are not the " +
                    fact_text(opened) + " that " + fact_text(length) + " tokens need");
  }
  std::size_t pinned = 0;
  head.pages.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    StagedPage staged;
    staged.page.first_position.value = in.number<std::int64_t>();
    const auto pin = in.number<std::uint8_t>();
    const std::int64_t first = staged.page.first_position.value;
    const std::int64_t lowest = i == 0 ? 0 : head.pages.back().page.first_position.value + 1;
    if (first < lowest || first >= state.next.value || geometry.slot_of({first}).value != 0) {
      refuse_snapshot("page " + fact_text(i) + " of a head begins at position " + fact_text(first) +
                      "; it must begin a page of " + fact_text(geometry.page_size) + " tokens at " + fact_text(lowest) +
                      " or later, and below " + fact_text(length));
    }
    if (pin > 1) refuse_snapshot("the pin of a page is " + fact_text(int{pin}) + "; it is 0 or 1");
    staged.page.pinned = pin != 0;
    staged.page.tokens =
        static_cast<std::uint32_t>(std::min(geometry.page_size, length - static_cast<std::size_t>(first)));
    check_pin(layer, state, staged.page);
    pinned += staged.page.pinned ? 1 : 0;
    staged.state = in.take(state_bytes);
    staged.keys = in.take(staged.page.tokens * layer.pages.key_row_bytes);
    staged.values = in.take(staged.page.tokens * layer.pages.value_row_bytes);
    head.pages.push_back(staged);
  }
  const std::size_t of_prompt = layer.pins_prompt && !layer.unpins_middle ? geometry.pages_for(state.prompt_tokens) : 0;
  const std::size_t needed = std::min(opened, std::max(layer.sink_pages, of_prompt));
  const bool keeps_pinned =
      needed == 0 ||
      (count >= needed && geometry.page_number(head.pages[needed - 1].page.first_position) + 1 == needed);
  if (!keeps_pinned)
    refuse_snapshot("one of the first " + fact_text(needed) + " pages, which are never given up, is missing");
  if (opened > 0 && (count == 0 || geometry.page_number(head.pages.back().page.first_position) + 1 != opened)) {
    refuse_snapshot("the page of the newest token, " + fact_text(length - 1) + ", is missing");
  }
  if (!layer.keeps_all() && state.prompt_ended && pinned + layer.decode_pages > state.page_budget) {
    refuse_snapshot(fact_text(pinned) + " pinned pages leave no room to decode in a budget of " +
                    fact_text(state.page_budget) + " pages");
  }
}

inline bool same_pages(const StagedHead& a, const StagedHead& b) {
  return std::equal(
      a.pages.begin(), a.pages.end(), b.pages.begin(), b.pages.end(),
      [](const StagedPage& x, const StagedPage& y) { return x.page.first_position == y.page.first_position; });
}

/// What adopt_states would make of these bytes. Throws SnapshotError when the cache could not have got into that state.
inline StagedLayer check_state(const LayerImage& layer, std::span<const std::byte> bytes) {
  const Geometry& geometry = layer.geometry;
  ByteReader in(bytes);
  StagedLayer state;
  state.next.value = in.number<std::int64_t>();
  constexpr std::int64_t longest = std::int64_t{1} << 60;
  if (state.next.value < 0 || state.next.value > longest) {
    refuse_snapshot("a length of " + fact_text(state.next.value) + " is not in 0 .. 2^60");
  }
  const auto length = static_cast<std::size_t>(state.next.value);
  if (layer.keeps_all() && length > layer.max_tokens) {
    refuse_snapshot(fact_text(length) + " tokens exceed max_tokens = " + fact_text(layer.max_tokens));
  }
  const auto ended = in.number<std::uint8_t>();
  state.prompt_ended = ended != 0;
  state.prompt_tokens = in.size();
  if (ended > 1 || state.prompt_tokens > length || (!state.prompt_ended && state.prompt_tokens != length)) {
    refuse_snapshot("a prompt of " + fact_text(state.prompt_tokens) + " tokens, " +
                    (state.prompt_ended ? "ended" : "not ended") + ", does not fit " + fact_text(length) + " tokens");
  }
  state.page_budget = layer.page_budget;
  if (!layer.keeps_all() && layer.pins_prompt && !layer.unpins_middle && state.prompt_tokens > 0) {
    const std::size_t pinned = std::max(layer.sink_pages, geometry.pages_for(state.prompt_tokens));
    if (pinned + layer.decode_pages > layer.page_capacity) {
      refuse_snapshot("a prompt that pins " + fact_text(pinned) + " pages exceeds the " +
                      fact_text(layer.page_capacity) + " there is memory for");
    }
    state.page_budget = std::max(state.page_budget, pinned + layer.decode_pages);
  }
  state.peak_resident_tokens = in.size();
  state.peak_resident_pages = in.size();
  state.evicted_shared_pages = in.size();
  state.layer_state = in.take(layer.layer_state.size);

  std::size_t pages = 0;
  std::size_t tokens = 0;
  for (const HeadImage& image : layer.heads) {
    StagedHead& head = state.heads.emplace_back();
    head.evictions = in.number<std::uint64_t>();
    for (std::size_t& counter : head.counters) counter = in.size();
    head.state = in.take(image.state.size);
    head.query_window = in.take(image.query_window.size());
    check_pages(layer, state, head, image.page_states.size, in);
    if (layer.heads_agree && !same_pages(head, state.heads.front())) {
      refuse_snapshot("kv head " + fact_text(state.heads.size() - 1) +
                      " holds other positions than head 0; this policy evicts them together");
    }
    std::size_t of_head = 0;
    for (const StagedPage& page : head.pages) of_head += page.page.tokens;
    tokens = layer.heads_share_budget ? tokens + of_head : std::max(tokens, of_head);
    pages += head.pages.size();
  }
  const std::size_t heads = layer.heads.size();
  if (layer.heads_share_budget) {
    tokens = divide_up(tokens, heads);
    if (pages > heads * state.page_budget) {
      refuse_snapshot(fact_text(pages) + " resident pages exceed the budget of " +
                      fact_text(heads * state.page_budget) + " that the heads share");
    }
  }
  if (in.left() != 0) refuse_snapshot(fact_text(in.left()) + " bytes are left after the last page");
  const std::size_t most = layer.heads.front().table->capacity();  // drafts too
  if (state.peak_resident_tokens < tokens || state.peak_resident_tokens > most * geometry.page_size ||
      state.peak_resident_pages < pages || state.peak_resident_pages > most * geometry.kv_heads) {
    refuse_snapshot("a peak of " + fact_text(state.peak_resident_tokens) + " tokens and " +
                    fact_text(state.peak_resident_pages) + " pages does not fit the " + fact_text(tokens) +
                    " tokens and " + fact_text(pages) + " pages that are resident");
  }
  return state;
}

/// Whether the pools have the pages of all these layers, once what the layers hold now is given back.
inline void check_room(std::span<const LayerImage> layers, std::span<const StagedLayer> states) {
  for (std::size_t first = 0; first < layers.size(); ++first) {
    const PagesImage& pool = layers[first].pages;
    const auto is_of_pool = [&](const LayerImage& layer) { return layer.pages.pool == pool.pool; };
    if (std::any_of(layers.begin(), layers.begin() + static_cast<std::ptrdiff_t>(first), is_of_pool)) continue;
    std::size_t wanted = 0;
    std::size_t available = pool.free_pages(pool.store);
    for (std::size_t l = first; l < layers.size(); ++l) {
      if (!is_of_pool(layers[l])) continue;
      for (const StagedHead& head : states[l].heads) wanted += head.pages.size();
      for (const HeadImage& head : layers[l].heads) {
        for (std::uint32_t i = 0; i < head.table->size(); ++i) {
          available += pool.is_shared(pool.store, (*head.table)[{i}].page) ? 0 : 1;
        }
      }
    }
    if (wanted > available) {
      refuse_snapshot("the snapshot holds " + fact_text(wanted) + " pages; the pool has " + fact_text(available) +
                      " for them");
    }
  }
}

}  // namespace kvsparse::detail
