// SPDX-License-Identifier: Apache-2.0
// Saves a cache, or all layers of a sequence, to a stream and goes on from there later, to the bit: resident pages,
// tables, the policy's state, its random counter, the queries it remembers, counters and prompt. Only resident tokens
// are saved, so a snapshot costs what the budget costs.
//
// A snapshot is loaded into a cache made with the same configuration, storage types, policy, options and version of the
// library; into any other it is refused. What is read is checked whole, length by length and against its checksum,
// before the cache changes: after a refusal the cache is what it was. A checksum finds damage, not malice: what a
// crafted snapshot says of pages, positions and pins is held to the cache's own rules, but a policy's state is bytes
// that only the policy understands.
#pragma once

#include <cstddef>
#include <istream>
#include <ostream>
#include <vector>

#include "../cache/sequence_cache.hpp"
#include "snapshot_stream.hpp"

namespace kvsparse {

namespace detail {

/// What stands before the snapshots of a sequence's layers.
inline CacheFacts sequence_facts(std::size_t layers) {
  return {{"kvsparse", version_text()}, {"layers", fact_text(layers)}};
}

/// Layers of one sequence are equally far.
inline void check_together(const StagedLayer& first, const StagedLayer& layer, std::size_t index) {
  if (layer.next == first.next && layer.prompt_tokens == first.prompt_tokens &&
      layer.prompt_ended == first.prompt_ended) {
    return;
  }
  refuse_snapshot("layer " + fact_text(index) + " has " + fact_text(layer.next.value) + " tokens, " +
                  fact_text(layer.prompt_tokens) + " of them prompt, and layer 0 has " + fact_text(first.next.value) +
                  " and " + fact_text(first.prompt_tokens));
}

}  // namespace detail

/// Saves a PagedKvCache or an AnyCache. Open the stream as binary. O(resident tokens). Throws SnapshotError when the
/// stream fails.
template <class Cache>
requires detail::HasImage<Cache>
void save(const Cache& cache, std::ostream& out) {
  // An image serves reading and writing; this one is only read.
  detail::write_snapshot(out, detail::ImageAccess::of(const_cast<Cache&>(cache)));
}

/// The cache becomes the one that was saved; the stream stands behind the snapshot. Needs as much memory again as the
/// snapshot is long until it returns. read_positions() is empty until the next attend. O(resident tokens). Throws
/// SnapshotError, with a sentence that names what differs or is wrong, and leaves the cache as it was.
template <class Cache>
requires detail::HasImage<Cache>
void load(Cache& cache, std::istream& in) {
  const std::vector<detail::LayerImage> images(1, detail::ImageAccess::of(cache));
  const std::vector<std::byte> bytes = detail::read_snapshot(in, images[0]);
  const std::vector<detail::StagedLayer> states(1, detail::check_state(images[0], bytes));
  detail::check_room(images, states);
  detail::adopt_states(images, states);
}

/// Saves all layers of a sequence. Throws SnapshotError when the stream fails, and between the layers of a step.
template <class Cache>
void save(const SequenceCache<Cache>& sequence, std::ostream& out) {
  if (sequence.turn() != 0) {
    detail::refuse_snapshot("it is the turn of layer " + detail::fact_text(sequence.turn()) +
                            "; a sequence is saved between two steps");
  }
  detail::SnapshotWriter header(out);
  detail::write_header(header, detail::sequence_facts(sequence.layers()));
  for (std::size_t l = 0; l < sequence.layers(); ++l) save(sequence.layer(l), out);
}

/// All layers become those that were saved, or none does. Needs as much memory again as the snapshot is long until it
/// returns. Throws SnapshotError as for one cache.
template <class Cache>
void load(SequenceCache<Cache>& sequence, std::istream& in) {
  detail::SnapshotReader header(in);
  detail::expect_header(header, detail::sequence_facts(sequence.layers()));
  std::vector<detail::LayerImage> images;
  std::vector<std::vector<std::byte>> bytes;  // the staged layers point into it
  std::vector<detail::StagedLayer> staged;
  for (std::size_t l = 0; l < sequence.layers(); ++l) {
    images.push_back(detail::ImageAccess::of(sequence.layer(l)));
    bytes.push_back(detail::read_snapshot(in, images.back()));
    staged.push_back(detail::check_state(images.back(), bytes.back()));
    detail::check_together(staged.front(), staged.back(), l);
  }
  detail::check_room(images, staged);
  detail::adopt_states(images, staged);
  detail::ImageAccess::begin_step(sequence);
}

}  // namespace kvsparse
