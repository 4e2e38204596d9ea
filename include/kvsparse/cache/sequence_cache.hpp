// SPDX-License-Identifier: Apache-2.0
// All layers of one sequence: one length that all of them agree on, and for each layer its own policy, budget and
// resident tokens.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "attend.hpp"
#include "layer_schedule.hpp"
#include "paged_kv_cache.hpp"
#include "pool_demand.hpp"

namespace kvsparse {

/// All layers of one sequence. Cache: a PagedKvCache, the same policy and storage types in every layer, or AnyCache,
/// which chooses them for each.
///
/// A step of the engine brings one token, or one chunk of them, to every layer, lowest layer first, each followed by
/// its attention. A layer left out, or given a token twice, is refused before anything changes: layers cannot drift
/// apart. Errors of a layer are those of its cache; it keeps the turn then, to be asked again once there is room.
/// Thread safety is that of PagedKvCache, layer by layer; append and append_prompt are exclusive for the whole
/// sequence.
template <class Cache>
class SequenceCache {
 public:
  /// The caches of the layers, lowest first, all of the same length. Throws ConfigError if there are none, or if they
  /// differ in length.
  explicit SequenceCache(std::vector<Cache> layers) : layers_(std::move(layers)) {
    if (layers_.empty()) detail::refuse("a sequence has 0 layers; it must have at least 1");
    for (const Cache& layer : layers_) {
      if (layer.next_position() != next_position()) {
        detail::refuse("one layer has " + detail::quoted(index(layer.next_position())) + " tokens and another " +
                       detail::quoted(index(next_position())));
      }
    }
  }
  /// A cache for each configuration, with pages of its own. Throws ConfigError.
  template <class Policy>
  requires std::constructible_from<Cache, const CacheConfig&, const Policy&> SequenceCache(
      std::span<const CacheConfig> layers, const Policy& policy)
      : SequenceCache(make_layers(layers, policy)) {}
  /// The same over pages of a pool.
  template <class Pool, class Policy>
  requires std::constructible_from<Cache, const CacheConfig&, const Pool&, const Policy&> SequenceCache(
      std::span<const CacheConfig> layers, const Pool& pool, const Policy& policy)
      : SequenceCache(make_layers(layers, pool, policy)) {}

  /// A cache for each layer of a schedule, as make(const LayerChoice&) makes it. Throws ConfigError.
  template <class Make>
  requires std::is_invocable_r_v<Cache, Make&, const LayerChoice&> SequenceCache(const LayerSchedule& schedule,
                                                                                 Make&& make)
      : SequenceCache(layers_of(schedule, make)) {}

  /// Bytes that construction without a pool allocates for the layers. Throws ConfigError.
  template <class Policy>
  static std::size_t bytes_required(std::span<const CacheConfig> layers, const Policy& policy) {
    SaturatingSize bytes = layers.size() * sizeof(Cache);
    for (const CacheConfig& layer : layers) bytes = bytes + Cache::bytes_required(layer, policy);
    if (bytes > most_bytes) {
      detail::refuse("the caches of " + detail::quoted(layers.size()) + " layers exceed the " + most_bytes_text +
                     " bytes that can be addressed");
    }
    return bytes;
  }

  std::size_t layers() const { return layers_.size(); }  ///< caches
  /// One layer's cache; layer < layers().
  const Cache& layer(std::size_t layer) const {
    KVSPARSE_ASSERT(layer < layers_.size());
    return layers_[layer];
  }
  /// For an engine with a kernel of its own: select, record, observe. Tokens come through append alone.
  Cache& layer(std::size_t layer) {
    KVSPARSE_ASSERT(layer < layers_.size());
    return layers_[layer];
  }

  /// The length of the sequence: tokens that every layer has. A step that has not reached the last layer does not
  /// count.
  Position next_position() const { return layers_.back().next_position(); }
  /// The layer whose turn it is; 0 between two steps.
  std::size_t turn() const { return turn_; }

  // --- growing ---

  /// Appends this step's token, or chunk of tokens, to one layer; every layer gets as many. k, v as
  /// PagedKvCache::append takes them.
  template <class Rows>
  Status append(std::size_t layer, const Rows& k, const Rows& v) noexcept {
    std::size_t tokens = 1;
    if constexpr (requires { k.tokens; }) tokens = k.tokens;
    if (const Status status = check_turn(layer, tokens, Step::decode); !status) return status;
    return take(layer, tokens, Step::decode, layers_[layer].append(k, v));
  }
  /// Appends a chunk of the prompt to one layer; every layer gets as many tokens. k, v as PagedKvCache::append_prompt
  /// takes them.
  template <class Rows>
  Status append_prompt(std::size_t layer, const Rows& k, const Rows& v) noexcept {
    const std::size_t tokens = tokens_of(layer, k);
    if (const Status status = check_turn(layer, tokens, Step::prompt); !status) return status;
    return take(layer, tokens, Step::prompt, layers_[layer].append_prompt(k, v));
  }
  /// Appends tokens that may be rejected to one layer; every layer gets as many. k, v as PagedKvCache::append_draft
  /// takes them.
  template <class Rows>
  Status append_draft(std::size_t layer, const Rows& k, const Rows& v) noexcept {
    const std::size_t tokens = tokens_of(layer, k);
    if (const Status status = check_turn(layer, tokens, Step::draft); !status) return status;
    return take(layer, tokens, Step::draft, layers_[layer].append_draft(k, v));
  }
  /// Takes back the tokens from `position` on in every layer, or, where one of them cannot, in none; see
  /// PagedKvCache::truncate. What a step has brought to some layers alone goes in any case: truncate(next_position())
  /// gives up a step of drafts half way.
  Status truncate(Position position) noexcept {
    using Code = Status::Code;
    if (position > next_position()) return {Code::unreachable_length, index(position), index(next_position())};
    const std::size_t oldest = oldest_reachable();
    if (position < Position{0} + oldest) {
      return {Code::unreachable_length, static_cast<std::size_t>(std::max<std::int64_t>(position.value, 0)), oldest};
    }
    for (const Cache& layer : layers_) {
      const PoolDemand demand = layer.truncate_demand(position);
      std::size_t pages = 0;
      for (std::size_t l = 0; demand.pages > 0 && l < layers_.size(); ++l) {
        const PoolDemand other = layers_[l].truncate_demand(position);
        pages += other.pool == demand.pool ? other.pages : 0;
      }
      if (pages > demand.free_pages) return {Code::pool_exhausted, pages, demand.free_pages};
    }
    Status status;
    for (Cache& layer : layers_) {
      if (const Status cut = layer.truncate(position); !cut) status = cut;
    }
    KVSPARSE_ASSERT(status.ok());
    turn_ = 0;
    return status;
  }
  /// The shortest length that truncate() can go back to, in all layers.
  std::size_t oldest_reachable() const {
    std::size_t oldest = 0;
    for (const Cache& layer : layers_) oldest = std::max(oldest, layer.oldest_reachable());
    return oldest;
  }
  /// No more prompt will come. Refuses between the layers of a step.
  Status end_prompt() noexcept {
    if (turn_ != 0) return {Status::Code::layer_out_of_turn, 0, turn_};
    for (Cache& layer : layers_) layer.end_prompt();
    return {};
  }
  /// Empties every layer.
  void clear() noexcept {
    for (Cache& layer : layers_) layer.clear();
    turn_ = 0;
  }

  /// A sequence that goes on from here by itself; pages are shared until one of the two writes into them, see
  /// PagedKvCache::fork.
  [[nodiscard]] SequenceCache fork() {
    std::vector<Cache> layers;
    layers.reserve(layers_.size());
    for (Cache& layer : layers_) layers.push_back(layer.fork());
    return SequenceCache(std::move(layers), *this);
  }

  // --- admission ---

  /// Whether every layer would take so many more tokens, beginning with the layer whose turn it is, and the pools have
  /// the pages for all of them together. A true answer holds until other sequences take pages.
  bool can_append(std::size_t tokens) const {
    const auto takes = [tokens](const Cache& layer) { return layer.can_append(tokens); };
    return all_of_turn(takes) && pools_have(tokens);
  }
  /// The same of append_prompt().
  bool can_append_prompt(std::size_t tokens) const {
    const auto takes = [tokens](const Cache& layer) { return layer.can_append_prompt(tokens); };
    return all_of_turn(takes) && pools_have(tokens);
  }
  /// Adds what can_append asks of the pools, to be summed over the sequences of a batch.
  void add_demands(std::size_t tokens, PoolDemands& demands) const {
    for (std::size_t l = turn_; l < layers_.size(); ++l) demands.add(layers_[l].pool_demand(tokens));
  }
  /// What the pools would have back if the sequence were cleared: what no fork holds.
  std::size_t bytes_reclaimable() const {
    std::size_t bytes = 0;
    for (const Cache& layer : layers_) bytes += layer.bytes_reclaimable();
    return bytes;
  }

  // --- looking ---

  /// Attends in one layer, once it has this step's token; arguments as attend() takes them.
  template <class... Arguments>
  Status attend(std::size_t layer, Arguments&&... arguments) {
    if (const Status status = check_attended(layer); !status) return status;
    if constexpr (requires { layers_[layer].attend(arguments...); }) {
      return layers_[layer].attend(std::forward<Arguments>(arguments)...);
    } else {
      return kvsparse::attend(layers_[layer], std::forward<Arguments>(arguments)...);
    }
  }
  /// The same of attend_prompt().
  template <class... Arguments>
  Status attend_prompt(std::size_t layer, Arguments&&... arguments) {
    if (const Status status = check_attended(layer); !status) return status;
    if constexpr (requires { layers_[layer].attend_prompt(arguments...); }) {
      return layers_[layer].attend_prompt(std::forward<Arguments>(arguments)...);
    } else {
      return kvsparse::attend_prompt(layers_[layer], std::forward<Arguments>(arguments)...);
    }
  }

  /// Over all layers: tokens are the sequence's; resident and peak tokens those of the fullest kv head of the fullest
  /// layer; used_page_share is the mean over the layers that judge pages; the others are sums. A sum of peaks is what
  /// was needed at most.
  CacheStats stats() const {
    CacheStats total;
    double used_share = 0.0;
    std::size_t judging = 0;
    for (const Cache& cache : layers_) {
      const CacheStats layer = cache.stats();
      total.resident_tokens = std::max(total.resident_tokens, layer.resident_tokens);
      total.peak_resident_tokens = std::max(total.peak_resident_tokens, layer.peak_resident_tokens);
      total.resident_bytes += layer.resident_bytes;
      total.peak_resident_bytes += layer.peak_resident_bytes;
      total.shared_bytes += layer.shared_bytes;
      total.evicted_tokens += layer.evicted_tokens;
      total.evicted_shared_pages += layer.evicted_shared_pages;
      total.last_read_tokens += layer.last_read_tokens;
      total.last_skipped_tokens += layer.last_skipped_tokens;
      if (std::isnan(layer.used_page_share)) continue;
      used_share += layer.used_page_share;
      ++judging;
    }
    total.tokens = index(next_position());
    if (judging > 0) total.used_page_share = used_share / static_cast<double>(judging);
    return total;
  }

 private:
  friend struct detail::ImageAccess;
  enum class Step { decode, prompt, draft };
  SequenceCache(std::vector<Cache> layers, const SequenceCache& original)
      : layers_(std::move(layers)), turn_(original.turn_), step_tokens_(original.step_tokens_), step_(original.step_) {}
  void begin_step() { turn_ = 0; }

  static std::size_t index(Position position) { return static_cast<std::size_t>(position.value); }

  template <class... Arguments>
  static std::vector<Cache> make_layers(std::span<const CacheConfig> configs, const Arguments&... arguments) {
    std::vector<Cache> layers;
    layers.reserve(configs.size());
    for (const CacheConfig& config : configs) layers.emplace_back(config, arguments...);
    return layers;
  }

  template <class Make>
  static std::vector<Cache> layers_of(const LayerSchedule& schedule, Make& make) {
    std::vector<Cache> layers;
    layers.reserve(schedule.size());
    for (const LayerChoice& layer : schedule) layers.push_back(make(layer));
    return layers;
  }

  template <class Row>
  std::size_t tokens_of(std::size_t, const TokenRows<Row>& rows) const {
    return rows.tokens;
  }
  /// Of a flat chunk; what is no whole number of rows the layer refuses, as it does what comes for no layer.
  std::size_t tokens_of(std::size_t layer, std::span<const float> rows) const {
    const CacheConfig& config = layers_[std::min(layer, layers_.size() - 1)].config();
    return rows.size() / (config.kv_heads * config.head_dim);
  }

  template <class Takes>
  bool all_of_turn(Takes&& takes) const {
    return std::all_of(layers_.begin() + static_cast<std::ptrdiff_t>(turn_), layers_.end(), takes);
  }
  bool pools_have(std::size_t tokens) const {
    PoolDemands demands;
    add_demands(tokens, demands);
    return demands.fit();
  }

  Status check_turn(std::size_t layer, std::size_t tokens, Step step) const {
    using Code = Status::Code;
    if (layer != turn_) return {Code::layer_out_of_turn, layer, turn_};
    const Position length = next_position();
    if (layers_[layer].next_position() != length) {
      return {Code::layer_drifted, index(layers_[layer].next_position()), index(length)};
    }
    if (turn_ == 0) return {};
    if (step != step_) return {Code::step_differs, layer, step_tokens_};
    if (tokens != step_tokens_) return {Code::wrong_tokens, tokens, step_tokens_};
    return {};
  }
  Status take(std::size_t layer, std::size_t tokens, Step step, Status appended) {
    if (!appended) return appended;
    step_tokens_ = tokens;
    step_ = step;
    turn_ = layer + 1 == layers_.size() ? 0 : layer + 1;
    return appended;
  }
  /// A layer attends what this step brought it.
  Status check_attended(std::size_t layer) const {
    const bool has_token = turn_ == 0 ? layer < layers_.size() : layer < turn_;
    return has_token ? Status{} : Status{Status::Code::layer_out_of_turn, layer, turn_};
  }

  std::vector<Cache> layers_;  // the last one has the sequence's length: a step reaches it last
  std::size_t turn_ = 0;
  std::size_t step_tokens_ = 0;  // what the running step brings each layer
  Step step_ = Step::decode;
};

}  // namespace kvsparse
