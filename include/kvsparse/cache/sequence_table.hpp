// SPDX-License-Identifier: Apache-2.0
// The sequences that an engine is decoding, by the engine's own name for each. A batch's rows come and go and change
// places; a sequence and its policies' state stay under its id.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sequence_cache.hpp"

namespace kvsparse {

/// Which sequence, whatever row of a batch it is in.
struct SequenceId {
  std::uint64_t value = 0;  ///< the engine's own number
  friend constexpr auto operator<=>(SequenceId, SequenceId) = default;
};

/// Sequences under their ids; each lookup is O(log sequences). References to a sequence stay valid until it is removed.
/// Thread safety: add, fork, remove and clear are exclusive; different sequences may be used at the same time as far as
/// their pools allow.
template <class Cache>
class SequenceTable {
 public:
  using Sequence = SequenceCache<Cache>;  ///< all layers of one

  std::size_t size() const { return sequences_.size(); }                  ///< sequences
  bool contains(SequenceId id) const { return sequences_.contains(id); }  ///< whether there is one
  /// Null if there is none.
  Sequence* find(SequenceId id) {
    const auto found = sequences_.find(id);
    return found == sequences_.end() ? nullptr : &found->second;
  }
  const Sequence* find(SequenceId id) const { return const_cast<SequenceTable*>(this)->find(id); }
  /// Throws ConfigError if there is none.
  Sequence& at(SequenceId id) {
    Sequence* const found = find(id);
    if (found == nullptr) {
      detail::refuse("there is no sequence " + std::to_string(id.value) + " among the " +
                     detail::quoted(sequences_.size()));
    }
    return *found;
  }
  const Sequence& at(SequenceId id) const { return const_cast<SequenceTable*>(this)->at(id); }
  /// Ascending. Allocates.
  std::vector<SequenceId> ids() const {
    std::vector<SequenceId> ids;
    for (const auto& [id, sequence] : sequences_) ids.push_back(id);
    return ids;
  }

  /// Throws ConfigError if the id is taken; nothing has changed then.
  Sequence& add(SequenceId id, Sequence sequence) {
    check_free(id);
    return sequences_.emplace(id, std::move(sequence)).first->second;
  }
  /// A sequence that goes on from where another is. Throws ConfigError if that is not there, or the id is taken.
  Sequence& fork(SequenceId from, SequenceId id) {
    Sequence& original = at(from);
    check_free(id);
    return sequences_.emplace(id, original.fork()).first->second;
  }
  /// Whether every layer of all these sequences would take so many more tokens, and the pools have the pages for all of
  /// them together: to be asked before a batch is computed. Throws ConfigError if one is not there.
  bool can_append(std::span<const SequenceId> batch, std::size_t tokens) const {
    PoolDemands demands;
    bool all_take = true;
    for (const SequenceId id : batch) {
      const Sequence& sequence = at(id);
      all_take = all_take && sequence.can_append(tokens);
      sequence.add_demands(tokens, demands);
    }
    return all_take && demands.fit();
  }
  /// Gives the sequence's pages back. False if there is none.
  bool remove(SequenceId id) { return sequences_.erase(id) > 0; }
  void clear() { sequences_.clear(); }  ///< gives all pages back

 private:
  void check_free(SequenceId id) const {
    if (contains(id)) detail::refuse("sequence " + std::to_string(id.value) + " is already there");
  }

  std::map<SequenceId, Sequence> sequences_;
};

}  // namespace kvsparse
