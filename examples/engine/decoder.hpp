// SPDX-License-Identifier: Apache-2.0
// One sequence being decoded: a KV cache per layer and the scratch of a forward pass over a chunk of tokens.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <kvsparse/cache/any_cache.hpp>
#include <kvsparse/cache/layer_schedule.hpp>
#include <kvsparse/interop/snapshot.hpp>
#include <numeric>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../common/policy_settings.hpp"
#include "model.hpp"
#include "named_cache.hpp"
#include "tokenizer.hpp"

namespace kvsparse_tools {

/// Which cache every layer gets.
struct CacheChoice {
  std::string policy = "dense";
  kvsparse::ScalarType dtype = kvsparse::ScalarType::f32;
  std::size_t budget_tokens = 0;  // per kv head; dense ignores it
  std::size_t page_size = 16;
  std::size_t dense_layers = 0;  // the first layers keep everything, whatever the policy
  bool pyramid = false;          // the other layers' budgets sum to the same, but the lower ones have more: PyramidKv
  PolicySettings settings;

  /// budget_tokens of each layer; those of the dense ones say nothing. Throws kvsparse::ConfigError.
  std::vector<std::size_t> layer_budgets(std::size_t layers) const {
    std::vector<std::size_t> budgets(layers, budget_tokens);
    if (!pyramid || policy == "dense" || dense_layers >= layers) return budgets;
    const std::size_t sparse = layers - dense_layers;
    const std::vector<std::size_t> spread = kvsparse::pyramid_budgets(sparse, sparse * budget_tokens, page_size);
    std::copy(spread.begin(), spread.end(), budgets.end() - static_cast<std::ptrdiff_t>(sparse));
    return budgets;
  }
};

/// What the cache of each layer is made from, for sequences of up to `max_tokens` where its policy keeps everything.
/// Throws kvsparse::ConfigError as layer_budgets() does.
inline kvsparse::LayerSchedule layer_schedule(const ModelConfig& model, const CacheChoice& choice,
                                              std::size_t max_tokens) {
  kvsparse::LayerChoice layer{choice.policy, choice.settings.options, choice.dtype, choice.dtype, {}};
  layer.config.query_heads = model.query_heads;
  layer.config.kv_heads = model.kv_heads;
  layer.config.head_dim = model.head_dim;
  layer.config.page_size = choice.page_size;
  layer.config.read_budget_tokens = choice.settings.read_budget_tokens;
  layer.config.max_tokens = max_tokens;
  layer.config.rope = model.rope;
  kvsparse::LayerSchedule schedule = kvsparse::uniform_schedule(model.layers, layer);
  kvsparse::keep_first_layers_dense(schedule, choice.dense_layers);
  kvsparse::set_budgets(schedule, choice.layer_budgets(model.layers));
  return schedule;
}

/// As long as no more tokens came, the policy keeps and reads all of them in every layer, or in one.
inline std::size_t tokens_kept_and_read(const CacheChoice& choice, std::span<const std::size_t> budgets) {
  if (choice.policy == "dense") return SIZE_MAX;
  const std::size_t budget = *std::min_element(budgets.begin(), budgets.end());
  const std::size_t read_budget = choice.settings.read_budget_tokens;
  const std::size_t tokens = read_budget == 0 ? budget : std::min(budget, read_budget);
  return choice.page_size == 0 ? tokens : tokens - tokens % choice.page_size;
}

/// Sees each layer right after its attention, once per token. The spans are valid during the call only.
class LayerObserver {
 public:
  struct Step {
    std::size_t layer;
    std::size_t position;
    bool is_prompt;
    std::span<const float> q, k, v;  // [query_heads, head_dim] and [kv_heads, head_dim]; q and k after RoPE
    const kvsparse::AnyCache& cache;
  };
  virtual ~LayerObserver() = default;
  virtual void after_attention(const Step& step) = 0;
};

/// What the caches of all layers have held so far.
struct CacheTotals {
  std::size_t peak_resident_tokens = 0;   // of the fullest kv head of the fullest layer
  std::uint64_t peak_resident_bytes = 0;  // all layers and heads together
  std::uint64_t evicted_tokens = 0;       // all layers and heads together
  std::uint64_t shared_bytes = 0;         // resident bytes that a fork holds too
};

/// A cache refused a token or a query, e.g. a prompt too long to pin. what() names the policy and the layer.
class CacheRefusal : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Attention of one token that is not in the decoder's own caches: q, out [query_heads, head_dim] and k, v [kv_heads,
/// head_dim], q and k after RoPE. Layers come in order.
using LayerAttention = std::function<void(std::size_t layer, bool is_prompt, std::span<const float> q,
                                          std::span<const float> k, std::span<const float> v, std::span<float> out)>;

class Decoder {
 public:
  static constexpr std::size_t largest_chunk = 64;  // tokens; bounds the scratch

  /// `model` must outlive the decoder. Throws kvsparse::ConfigError when the cache cannot be built.
  Decoder(const Model& model, const CacheChoice& choice, std::size_t max_tokens,
          const CacheFactory& make_cache = named_cache)
      : model_(model), tokens_kept_(tokens_kept_and_read(choice, choice.layer_budgets(model.config().layers))) {
    resize(1);
    caches_.reserve(model.config().layers);
    for (const kvsparse::LayerChoice& layer : layer_schedule(model.config(), choice, max_tokens)) {
      caches_.push_back(make_cache(layer.policy, layer.keys, layer.config, layer.options));
    }
  }

  /// A decoder without caches, which reads one token at a time and leaves the attention to `attention`.
  Decoder(const Model& model, LayerAttention attention) : model_(model), attention_(std::move(attention)) { resize(1); }

  /// A decoder that goes on from here by itself and shares the pages until one of the two writes into them. Nobody
  /// observes it yet.
  Decoder fork() {
    std::vector<kvsparse::AnyCache> caches;
    caches.reserve(caches_.size());
    for (kvsparse::AnyCache& cache : caches_) caches.push_back(cache.fork());
    return Decoder(*this, std::move(caches));
  }

  /// Writes what load() needs to go on to the bit. Throws kvsparse::SnapshotError when the stream fails.
  void save(std::ostream& out) const {
    const Vector newest = hidden_.col(newest_);
    const std::uint64_t hash = fnv1a(newest);
    out.write(reinterpret_cast<const char*>(newest.data()), hidden_bytes());
    out.write(reinterpret_cast<const char*>(&hash), sizeof hash);
    for (const kvsparse::AnyCache& cache : caches_) kvsparse::save(cache, out);
  }

  /// Becomes the decoder that was saved, which had the same model and caches. Throws kvsparse::SnapshotError for other
  /// caches and for damage; then the decoder can only be destroyed.
  void load(std::istream& in) {
    resize(1);
    newest_ = 0;
    std::uint64_t hash = 0;
    in.read(reinterpret_cast<char*>(hidden_.data()), hidden_bytes());
    in.read(reinterpret_cast<char*>(&hash), sizeof hash);
    if (!in || hash != fnv1a(hidden_.col(0))) throw kvsparse::SnapshotError("the newest hidden state is damaged");
    for (kvsparse::AnyCache& cache : caches_) kvsparse::load(cache, in);
    position_ = static_cast<std::size_t>(caches_.front().next_position().value);
  }

  void observe(LayerObserver* observer) { observers_.push_back(observer); }

  /// Attention runs on the threads of `executor`, which must outlive the decoder's use; by default on the caller's.
  /// What is decoded does not depend on it.
  void attend_on(kvsparse::ExecutorRef executor) { executor_ = executor; }

  /// Lets a prompt be read in chunks of up to `tokens`, from 1 (the default) to largest_chunk: several times faster,
  /// and rounded otherwise.
  void read_prompt_by(std::size_t tokens) { prompt_chunk_ = std::clamp<std::size_t>(tokens, 1, largest_chunk); }

  /// How many of `wanted` prompt tokens the next feed_prompt() may bring, at least one. Beyond the tokens that the
  /// policy keeps and reads, and where somebody observes, they go one by one: what is evicted or selected while a chunk
  /// is appended would be so for the chunk's first queries too.
  std::size_t prompt_chunk(std::size_t wanted) const {
    const std::size_t room = tokens_kept_ - std::min(tokens_kept_, position_);
    return observers_.empty() ? std::max<std::size_t>(std::min({wanted, room, prompt_chunk_}), 1) : 1;
  }

  /// Reads the next tokens of the prompt, prompt_chunk() at most. All of them come before the first feed(). Throws
  /// CacheRefusal, as feed() does.
  void feed_prompt(std::span<const TokenId> tokens) { forward(tokens, Reading::prompt); }

  /// Reads tokens that may be taken back: the next one of the answer, and guesses at those after it. Weights are read
  /// once for all of them. Each cache sees them one by one and is forked before each guess, so that what is kept was
  /// decoded as without guesses, evictions included (AnyCache::append_draft evicts nothing on behalf of guesses, and
  /// the right ones see more than they would). That takes a page more for each guess, layer and kv head. Until
  /// keep_of_draft() nothing else may be read. Not for decoders without caches. Throws CacheRefusal.
  void feed_draft(std::span<const TokenId> tokens) {
    before_guess_.resize(caches_.size());
    forward(tokens, Reading::draft);
  }

  /// Scores of every token as the successor of the draft's token `index`, from 0.
  const Vector& logits_of_draft(std::size_t draft_index) {
    newest_ = index(draft_index);
    return logits();
  }

  /// Keeps the first `tokens` of the draft, at least one; it is as if the others had never come.
  void keep_of_draft(std::size_t tokens) {
    const auto read = static_cast<std::size_t>(hidden_.cols());
    for (std::size_t layer = 0; layer < caches_.size(); ++layer) {
      if (tokens < read) caches_[layer] = std::move(before_guess_[layer][tokens - 1]);
      before_guess_[layer].clear();
    }
    newest_ = index(tokens) - 1;
    position_ -= read - tokens;
  }

  /// Reads one token of the answer.
  void feed(TokenId token) { forward({&token, 1}, Reading::answer); }

  /// Scores of every token as the successor of the last one read.
  const Vector& logits() {
    logits_.resize(index(model_.config().vocab_size));
    model_.final_norm().apply(hidden_.col(newest_), normed_.col(newest_));
    model_.head().apply(normed_.col(newest_), logits_);
    return logits_;
  }

  const Model& model() const { return model_; }
  std::size_t position() const { return position_; }
  const std::vector<kvsparse::AnyCache>& caches() const { return caches_; }
  std::chrono::duration<double> time_in_observers() const { return time_in_observers_; }

  CacheTotals totals() const {
    CacheTotals totals;
    for (const kvsparse::AnyCache& cache : caches_) {
      const kvsparse::CacheStats stats = cache.stats();
      totals.peak_resident_tokens = std::max<std::size_t>(totals.peak_resident_tokens, stats.peak_resident_tokens);
      totals.peak_resident_bytes += stats.peak_resident_bytes;
      totals.evicted_tokens += stats.evicted_tokens;
      totals.shared_bytes += stats.shared_bytes;
    }
    return totals;
  }

 private:
  enum class Reading { prompt, answer, draft };

  Decoder(const Decoder& parent, std::vector<kvsparse::AnyCache> caches)
      : model_(parent.model_),
        caches_(std::move(caches)),
        executor_(parent.executor_),
        tokens_kept_(parent.tokens_kept_),
        prompt_chunk_(parent.prompt_chunk_),
        position_(parent.position_) {
    resize(1);
    hidden_ = parent.hidden_.col(parent.newest_);
  }

  static Eigen::Index index(std::size_t value) { return static_cast<Eigen::Index>(value); }

  std::streamsize hidden_bytes() const {
    return static_cast<std::streamsize>(model_.config().hidden_size * sizeof(float));
  }

  /// Makes room for the columns of a chunk; decoding, where all are of one token, allocates nothing.
  void resize(std::size_t tokens) {
    if (hidden_.cols() == index(tokens)) return;
    const ModelConfig& c = model_.config();
    for (Eigen::MatrixXf* matrix : {&query_, &attended_})
      matrix->resize(index(c.query_heads * c.head_dim), index(tokens));
    for (Eigen::MatrixXf* matrix : {&key_, &value_}) matrix->resize(index(c.kv_heads * c.head_dim), index(tokens));
    for (Eigen::MatrixXf* matrix : {&hidden_, &normed_, &update_}) matrix->resize(index(c.hidden_size), index(tokens));
    for (Eigen::MatrixXf* matrix : {&gate_, &up_}) matrix->resize(index(c.intermediate_size), index(tokens));
  }

  void forward(std::span<const TokenId> tokens, Reading reading) {
    for (const TokenId token : tokens) {
      if (token >= model_.config().vocab_size) throw std::out_of_range("token id is not in the vocabulary");
    }
    resize(tokens.size());
    newest_ = index(tokens.size()) - 1;
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      hidden_.col(index(i)) = model_.embedding(tokens[i]);
    }
    for (std::size_t layer = 0; layer < model_.layers().size(); ++layer) {
      const LayerWeights& weights = model_.layers()[layer];
      attention(weights, layer, reading);
      mlp(weights);
    }
    position_ += tokens.size();
  }

  void attention(const LayerWeights& weights, std::size_t layer, Reading reading) {
    weights.attention_norm.apply(hidden_, normed_);
    weights.query.apply(normed_, query_);
    weights.key.apply(normed_, key_);
    weights.value.apply(normed_, value_);
    rotate(query_);
    rotate(key_);
    if (attention_) {
      attention_(layer, reading == Reading::prompt, values(query_), values(key_), values(value_),
                 {attended_.data(), static_cast<std::size_t>(attended_.size())});
    } else {
      cached_attention(layer, reading);
      notify(layer, reading == Reading::prompt);
    }
    weights.output.apply(attended_, update_);
    hidden_ += update_;
  }

  void cached_attention(std::size_t layer, Reading reading) {
    kvsparse::AnyCache& cache = caches_[layer];
    if (reading == Reading::answer) return append_and_attend(cache, 0);
    if (reading == Reading::draft) {
      for (Eigen::Index token = 0; token < query_.cols(); ++token) {
        if (token > 0) before_guess_[layer].push_back(cache.fork());
        append_and_attend(cache, token);
      }
      return;
    }
    const ModelConfig& c = model_.config();
    const auto tokens = static_cast<std::size_t>(query_.cols());
    require(cache, cache.append_prompt(values(key_), values(value_)));
    require(cache, cache.attend_prompt(
                       kvsparse::TokenRows<const float>(query_.data(), tokens, c.query_heads, c.head_dim),
                       kvsparse::TokenRows<float>(attended_.data(), tokens, c.query_heads, c.head_dim), executor_));
  }

  void append_and_attend(kvsparse::AnyCache& cache, Eigen::Index token) {
    const auto column = [&](auto& matrix) {
      return std::span(matrix.col(token).data(), static_cast<std::size_t>(matrix.rows()));
    };
    require(cache, cache.append(column(std::as_const(key_)), column(std::as_const(value_))));
    require(cache, cache.attend(column(std::as_const(query_)), column(attended_), {}, executor_));
  }

  void mlp(const LayerWeights& weights) {
    weights.mlp_norm.apply(hidden_, normed_);
    weights.gate.apply(normed_, gate_);
    weights.up.apply(normed_, up_);
    gate_.array() *= up_.array() / (1.0F + (-gate_.array()).exp());  // SwiGLU: silu(gate) * up
    weights.down.apply(gate_, update_);
    hidden_ += update_;
  }

  /// Every head of every token, by the token's position.
  void rotate(Eigen::MatrixXf& heads) const {
    const std::size_t head_dim = model_.config().head_dim;
    const std::size_t count = static_cast<std::size_t>(heads.rows()) / head_dim;
    for (Eigen::Index token = 0; token < heads.cols(); ++token) {
      model_.rope().turn(heads.col(token).data(), count, head_dim, static_cast<std::int64_t>(position_) + token);
    }
  }

  /// Observers see single tokens only: see prompt_chunk().
  void notify(std::size_t layer, bool is_prompt) {
    if (observers_.empty()) return;
    const auto start = std::chrono::steady_clock::now();
    for (LayerObserver* observer : observers_) {
      observer->after_attention(
          {layer, position_, is_prompt, values(query_), values(key_), values(value_), caches_[layer]});
    }
    time_in_observers_ += std::chrono::steady_clock::now() - start;
  }

  static std::span<const float> values(const Eigen::MatrixXf& matrix) {
    return {matrix.data(), static_cast<std::size_t>(matrix.size())};
  }

  static void require(const kvsparse::AnyCache& cache, kvsparse::Status status) {
    if (status) return;
    throw CacheRefusal("policy " + std::string(cache.policy_name()) + " in layer " +
                       std::to_string(cache.config().layer) + ": " + status.message());
  }

  static constexpr kvsparse::SerialExecutor serial_{};

  const Model& model_;
  std::vector<kvsparse::AnyCache> caches_;
  LayerAttention attention_;                                   // instead of them, if there is one
  std::vector<std::vector<kvsparse::AnyCache>> before_guess_;  // per layer, of the draft under way
  kvsparse::ExecutorRef executor_{serial_};
  std::vector<LayerObserver*> observers_;
  std::chrono::duration<double> time_in_observers_{0.0};
  std::size_t tokens_kept_ = SIZE_MAX;  // see tokens_kept_and_read()
  std::size_t prompt_chunk_ = 1;
  std::size_t position_ = 0;
  Eigen::Index newest_ = 0;  // the column of the newest token
  // Of the latest chunk, one column per token.
  Eigen::MatrixXf query_, key_, value_, attended_;
  Eigen::MatrixXf hidden_, normed_, update_;
  Eigen::MatrixXf gate_, up_;
  Vector logits_;
};

/// The `count` most likely tokens, the likeliest first, the lowest id among equals; all if there are fewer.
inline std::vector<TokenId> most_likely(const Vector& logits, std::size_t count) {
  std::vector<TokenId> tokens(static_cast<std::size_t>(logits.size()));
  std::iota(tokens.begin(), tokens.end(), TokenId{0});
  const auto end = tokens.begin() + static_cast<std::ptrdiff_t>(std::min(count, tokens.size()));
  std::partial_sort(tokens.begin(), end, tokens.end(), [&](TokenId a, TokenId b) {
    const float of_a = logits[static_cast<Eigen::Index>(a)], of_b = logits[static_cast<Eigen::Index>(b)];
    return of_a > of_b || (of_a == of_b && a < b);
  });
  tokens.erase(end, tokens.end());
  return tokens;
}

/// The most likely token, the lowest id among equals. Throws when the model computes no numbers.
inline TokenId greedy_choice(const Vector& logits) {
  Eigen::Index best = 0;
  for (Eigen::Index i = 1; i < logits.size(); ++i) {
    if (logits[i] > logits[best]) best = i;
  }
  if (!std::isfinite(logits[best])) throw std::runtime_error("the model's logits are not finite numbers");
  return static_cast<TokenId>(best);
}

}  // namespace kvsparse_tools
