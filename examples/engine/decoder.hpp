// SPDX-License-Identifier: Apache-2.0
// One sequence being decoded: a KV cache per layer and the scratch of one token's forward pass.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <kvsparse/cache/any_cache.hpp>
#include <span>
#include <stdexcept>
#include <string>
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
  PolicySettings settings;
};

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
};

/// A cache refused a token or a query, e.g. a prompt too long to pin. what() names the policy.
class CacheRefusal : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Decoder {
 public:
  /// `model` must outlive the decoder. Throws kvsparse::ConfigError when the cache cannot be built.
  Decoder(const Model& model, const CacheChoice& choice, std::size_t max_tokens,
          const CacheFactory& make_cache = named_cache)
      : model_(model),
        query_(width(model.config().query_heads)),
        key_(width(model.config().kv_heads)),
        value_(width(model.config().kv_heads)),
        attended_(width(model.config().query_heads)),
        hidden_(index(model.config().hidden_size)),
        normed_(hidden_.size()),
        update_(hidden_.size()),
        gate_(index(model.config().intermediate_size)),
        up_(gate_.size()),
        logits_(index(model.config().vocab_size)),
        cosines_(model.rope().size()),
        sines_(model.rope().size()) {
    const ModelConfig& config = model.config();
    kvsparse::CacheConfig cache;
    cache.query_heads = config.query_heads;
    cache.kv_heads = config.kv_heads;
    cache.head_dim = config.head_dim;
    cache.page_size = choice.page_size;
    cache.budget_tokens = choice.budget_tokens;
    cache.read_budget_tokens = choice.settings.read_budget_tokens;
    cache.max_tokens = max_tokens;
    if (!config.rope_scaling) cache.rope_theta = config.rope_theta;
    caches_.reserve(config.layers);
    for (std::size_t layer = 0; layer < config.layers; ++layer) {
      cache.layer = layer;
      if (layer < choice.dense_layers) {
        caches_.push_back(make_cache("dense", choice.dtype, cache, {}));
      } else {
        caches_.push_back(make_cache(choice.policy, choice.dtype, cache, choice.settings.options));
      }
    }
  }

  void observe(LayerObserver* observer) { observers_.push_back(observer); }

  /// Attention runs on the threads of `executor`, which must outlive the decoder's use; by default on the caller's.
  /// What is decoded does not depend on it.
  void attend_on(kvsparse::ExecutorRef executor) { executor_ = executor; }

  /// Reads one token of the prompt. All of them come before the first feed().
  /// Throws CacheRefusal, as feed() does.
  void feed_prompt(TokenId token) { forward(token, true); }

  /// Reads one token of the answer.
  void feed(TokenId token) { forward(token, false); }

  /// Scores of every token as the successor of the last one read.
  const Vector& logits() {
    model_.final_norm().apply(hidden_, normed_);
    model_.head().apply(normed_, logits_);
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
    }
    return totals;
  }

 private:
  static Eigen::Index index(std::size_t value) { return static_cast<Eigen::Index>(value); }
  Eigen::Index width(std::size_t heads) const { return index(heads * model_.config().head_dim); }

  void forward(TokenId token, bool is_prompt) {
    if (token >= model_.config().vocab_size) throw std::out_of_range("token id is not in the vocabulary");
    hidden_ = model_.embedding(token);
    for (std::size_t i = 0; i < cosines_.size(); ++i) {
      // The angle in double: in float a long sequence's angle would be off by more than the rotation is worth.
      const double angle = static_cast<double>(position_) * model_.rope()[i];
      cosines_[i] = static_cast<float>(std::cos(angle));
      sines_[i] = static_cast<float>(std::sin(angle));
    }
    for (std::size_t layer = 0; layer < caches_.size(); ++layer) {
      const LayerWeights& weights = model_.layers()[layer];
      attention(weights, layer, is_prompt);
      mlp(weights);
    }
    ++position_;
  }

  void attention(const LayerWeights& weights, std::size_t layer, bool is_prompt) {
    weights.attention_norm.apply(hidden_, normed_);
    weights.query.apply(normed_, query_);
    weights.key.apply(normed_, key_);
    weights.value.apply(normed_, value_);
    rotate(query_);
    rotate(key_);
    cached_attention(caches_[layer], is_prompt);
    notify(layer, is_prompt);
    weights.output.apply(attended_, update_);
    hidden_ += update_;
  }

  /// The prompt goes token by token, like the answer: every policy then sees the same evidence as in a replay.
  void cached_attention(kvsparse::AnyCache& cache, bool is_prompt) {
    const ModelConfig& c = model_.config();
    if (is_prompt) {
      require(cache, cache.append_prompt(values(key_), values(value_)));
      require(cache, cache.attend_prompt(kvsparse::TokenRows<const float>(query_.data(), 1, c.query_heads, c.head_dim),
                                         kvsparse::TokenRows<float>(attended_.data(), 1, c.query_heads, c.head_dim),
                                         executor_));
    } else {
      require(cache, cache.append(values(key_), values(value_)));
      require(cache, cache.attend(values(query_), {attended_.data(), static_cast<std::size_t>(attended_.size())}, {},
                                  executor_));
    }
  }

  void mlp(const LayerWeights& weights) {
    weights.mlp_norm.apply(hidden_, normed_);
    weights.gate.apply(normed_, gate_);
    weights.up.apply(normed_, up_);
    gate_.array() *= up_.array() / (1.0F + (-gate_.array()).exp());  // SwiGLU: silu(gate) * up
    weights.down.apply(gate_, update_);
    hidden_ += update_;
  }

  /// RoPE in Hugging Face's layout: dimension i of a head pairs with dimension i + head_dim / 2.
  void rotate(Vector& heads) const {
    const std::size_t half = cosines_.size();
    for (float* head = heads.data(); head != heads.data() + heads.size(); head += 2 * half) {
      for (std::size_t i = 0; i < half; ++i) {
        const float a = head[i];
        const float b = head[i + half];
        head[i] = a * cosines_[i] - b * sines_[i];
        head[i + half] = b * cosines_[i] + a * sines_[i];
      }
    }
  }

  void notify(std::size_t layer, bool is_prompt) {
    if (observers_.empty()) return;
    const auto start = std::chrono::steady_clock::now();
    for (LayerObserver* observer : observers_) {
      observer->after_attention(
          {layer, position_, is_prompt, values(query_), values(key_), values(value_), caches_[layer]});
    }
    time_in_observers_ += std::chrono::steady_clock::now() - start;
  }

  static std::span<const float> values(const Vector& vector) {
    return {vector.data(), static_cast<std::size_t>(vector.size())};
  }

  static void require(const kvsparse::AnyCache& cache, kvsparse::Status status) {
    if (!status) throw CacheRefusal("policy " + std::string(cache.policy_name()) + ": " + status.message());
  }

  static constexpr kvsparse::SerialExecutor serial_{};

  const Model& model_;
  std::vector<kvsparse::AnyCache> caches_;
  kvsparse::ExecutorRef executor_{serial_};
  std::vector<LayerObserver*> observers_;
  std::chrono::duration<double> time_in_observers_{0.0};
  std::size_t position_ = 0;
  Vector query_, key_, value_, attended_;
  Vector hidden_, normed_, update_;
  Vector gate_, up_;
  Vector logits_;
  std::vector<float> cosines_, sines_;
};

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
