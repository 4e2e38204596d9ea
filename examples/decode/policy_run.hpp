// SPDX-License-Identifier: Apache-2.0
// Decodes all prompts under one policy. Several sequences take turns, step by step, over one pool of pages.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <kvsparse/interop/thread_team.hpp>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/interrupt.hpp"
#include "common/progress.hpp"
#include "engine/generate.hpp"
#include "engine/named_pool.hpp"
#include "options.hpp"
#include "report.hpp"

namespace kvsparse_tools {

class PolicyRun {
 public:
  /// What a caller may want to do with a sequence.
  struct Hooks {
    std::function<void(Decoder&)> on_start;
    std::function<void(const GreedyDecoding&)> on_step;
    std::function<void(const Decoder&, const GreedyDecoding&)> on_end;
    bool shows_text = false;  // on_step does, where a progress bar would be in its way
  };

  /// Prompts may be empty where on_start makes the decoder read something; text_before is that. All arguments must
  /// outlive the run. Throws kvsparse::ConfigError when the pool cannot be built, UsageError when it is too small.
  PolicyRun(const DecodeOptions& options, const CacheChoice& cache, const Model& model,
            const std::vector<std::vector<TokenId>>& prompts, std::size_t max_tokens,
            std::span<const TokenId> text_before = {})
      : options_(options),
        cache_(cache),
        model_(model),
        prompts_(prompts),
        max_tokens_(max_tokens),
        text_before_(text_before),
        team_(options.threads) {
    if (pool_is_shared() || options.draft_tokens > 0) make_pool();
  }

  /// Stops early, with what there is, when the user interrupts. Throws CacheRefusal.
  PolicyResult run(const Hooks& hooks) {
    PolicyResult result;
    result.policy = cache_.policy;
    std::size_t total = 0;
    for (const auto& prompt : prompts_) total += tokens_of(prompt) * options_.forks;
    ProgressBar progress(cache_.policy, total);
    std::size_t finished = 0;  // tokens of sequences that are done
    while (!interrupted() && (next_prompt_ < prompts_.size() || !active_.empty())) {
      admit(hooks);
      std::size_t read = finished;
      for (std::size_t i = 0; i < active_.size() && !interrupted(); ++i) {  // forks join the turn at its end
        const bool shows_text = hooks.shows_text && active_[i].decoding.prompt_is_read();
        if (shows_text) progress.clear();
        step(i, hooks);
        if (!shows_text) progress.update(read + active_[i].decoder->position());
        read += active_[i].decoder->position();
      }
      finished += take_finished(result, hooks);
    }
    while (!active_.empty()) take(active_.size() - 1, result, hooks);
    std::sort(result.sequences.begin(), result.sequences.end(),
              [](const auto& a, const auto& b) { return std::pair(a.prompt, a.fork) < std::pair(b.prompt, b.fork); });
    if (pool_is_shared()) result.pool = use_;
    return result;
  }

 private:
  struct Sequence {
    std::size_t prompt, fork;
    std::unique_ptr<Decoder> decoder;
    GreedyDecoding decoding;
    bool has_forked;
  };

  std::size_t tokens_of(const std::vector<TokenId>& prompt) const { return prompt.size() + options_.max_new; }
  std::size_t pages_of(const std::vector<TokenId>& prompt) const {
    const std::size_t tokens = text_before_.size() + tokens_of(prompt);
    const std::size_t for_guesses = (options_.draft_tokens + 1) * model_.config().layers * model_.config().kv_heads;
    return NamedPool::pages_for(model_.config(), cache_, tokens) + (options_.draft_tokens == 0 ? 0 : for_guesses);
  }
  bool pool_is_shared() const { return prompts_.size() * options_.forks > 1 || options_.pool_bytes != 0; }

  void make_pool() {
    std::size_t all = 0, most = 0;
    for (const auto& prompt : prompts_) {
      all += pages_of(prompt) * options_.forks;
      most = std::max(most, pages_of(prompt) * options_.forks);
    }
    const auto bytes_of = [&](std::size_t pages) { return NamedPool::bytes_of(model_.config(), cache_, pages); };
    pool_ = std::make_unique<NamedPool>(model_.config(), cache_,
                                        options_.pool_bytes != 0 ? options_.pool_bytes : bytes_of(all));
    if (most > pool_->pages()) {
      throw UsageError("--pool-bytes " + std::to_string(options_.pool_bytes) + " hold " +
                       std::to_string(pool_->pages()) + " pages under policy " + cache_.policy +
                       "; one prompt with its continuations may need " + std::to_string(most) + ", which take " +
                       std::to_string(bytes_of(most)));
    }
    use_.bytes = pool_->pages() * pool_->bytes_per_page();
  }

  /// Starts the sequences that the pool has room for even if all of them, forks included, grow to their ends.
  void admit(const Hooks& hooks) {
    for (; next_prompt_ < prompts_.size(); ++next_prompt_) {
      const std::vector<TokenId>& prompt = prompts_[next_prompt_];
      const std::size_t pages = pages_of(prompt) * options_.forks;
      if (pool_ && promised_pages_ + pages > pool_->pages()) return;
      promised_pages_ += pages;
      auto decoder =
          std::make_unique<Decoder>(model_, cache_, max_tokens_, pool_ ? pool_->factory() : CacheFactory(named_cache));
      decoder->attend_on(team_);
      decoder->read_prompt_by(options_.prompt_chunk);
      if (hooks.on_start) hooks.on_start(*decoder);
      GreedyDecoding decoding(*decoder, {prompt, options_.max_new, {}, options_.draft_tokens, text_before_});
      active_.push_back({next_prompt_, 0, std::move(decoder), std::move(decoding), false});
    }
  }

  void step(std::size_t i, const Hooks& hooks) {
    if (options_.forks > 1 && !active_[i].has_forked && active_[i].decoding.prompt_is_read()) fork(i);
    active_[i].decoding.step();
    if (hooks.on_step) hooks.on_step(active_[i].decoding);
    if (!pool_) return;
    use_.peak_bytes = std::max<std::uint64_t>(use_.peak_bytes, pool_->pages_in_use() * pool_->bytes_per_page());
    use_.most_sequences = std::max(use_.most_sequences, active_.size());
  }

  /// The continuations of a prompt begin with its most likely first tokens, so that they differ.
  void fork(std::size_t parent) {
    const std::vector<TokenId> first = most_likely(active_[parent].decoder->logits(), options_.forks);
    for (std::size_t n = 1; n < options_.forks; ++n) {
      auto decoder = std::make_unique<Decoder>(active_[parent].decoder->fork());
      GreedyDecoding decoding = active_[parent].decoding.fork(*decoder);
      decoding.force(first[n]);
      active_.push_back({active_[parent].prompt, n, std::move(decoder), std::move(decoding), true});
    }
    active_[parent].has_forked = true;
    use_.saved_when_forked += saved_bytes();
  }

  /// What the sequences would hold beside, if no page were shared.
  std::uint64_t saved_bytes() const {
    std::uint64_t held = 0;
    for (const Sequence& sequence : active_) held += sequence.decoder->totals().shared_bytes;
    return held - pool_->shared_pages() * pool_->bytes_per_page();
  }

  /// Takes out the sequences that are done; their pages go back to the pool. Returns how many tokens they had read.
  std::size_t take_finished(PolicyResult& result, const Hooks& hooks) {
    std::size_t read = 0;
    const auto is_done = [](const Sequence& sequence) { return sequence.decoding.done(); };
    const bool first_ends = result.sequences.empty() && std::any_of(active_.begin(), active_.end(), is_done);
    if (first_ends && options_.forks > 1) use_.saved_when_first_ended = saved_bytes();
    for (std::size_t i = active_.size(); i-- > 0;) {
      if (!is_done(active_[i])) continue;
      read += active_[i].decoder->position();
      take(i, result, hooks);
    }
    return read;
  }

  void take(std::size_t i, PolicyResult& result, const Hooks& hooks) {
    const Sequence& sequence = active_[i];
    if (hooks.on_end) hooks.on_end(*sequence.decoder, sequence.decoding);
    result.sequences.push_back({sequence.prompt, sequence.fork, sequence.decoding.result(), "", ""});
    promised_pages_ -= pages_of(prompts_[sequence.prompt]);
    active_.erase(active_.begin() + static_cast<std::ptrdiff_t>(i));
  }

  const DecodeOptions& options_;
  const CacheChoice& cache_;
  const Model& model_;
  const std::vector<std::vector<TokenId>>& prompts_;
  std::size_t max_tokens_;
  std::span<const TokenId> text_before_;
  kvsparse::ThreadTeam team_;
  std::unique_ptr<NamedPool> pool_;  // null where a sequence has pages of its own
  PoolUse use_;
  std::vector<Sequence> active_;
  std::size_t next_prompt_ = 0;
  std::size_t promised_pages_ = 0;  // that the active sequences may come to hold
};

}  // namespace kvsparse_tools
