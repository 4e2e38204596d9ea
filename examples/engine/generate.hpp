// SPDX-License-Identifier: Apache-2.0
// Greedy decoding of one prompt, step by step or at once.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <functional>
#include <optional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "decoder.hpp"
#include "prompt_lookup.hpp"

namespace kvsparse_tools {

enum class StopReason { max_new, end_of_text, interrupted };

inline std::string_view stop_reason_name(StopReason reason) {
  switch (reason) {
    case StopReason::max_new: return "max_new";
    case StopReason::end_of_text: return "end_of_text";
    case StopReason::interrupted: return "interrupted";
  }
  return "unknown";
}

struct Generation {
  std::vector<TokenId> tokens;  // the end-of-text token included when it came
  std::vector<float> logits;    // the logit of each token, which is the largest unless the token was fed
  StopReason stopped = StopReason::interrupted;
  CacheTotals cache;
  double seconds = 0.0;             // choosing and reading those tokens, the time of observers taken off
  std::size_t drafted_tokens = 0;   // guessed, read and judged
  std::size_t accepted_drafts = 0;  // of those, the ones that decoding would have chosen

  double tokens_per_second() const { return seconds > 0.0 ? static_cast<double>(tokens.size()) / seconds : 0.0; }
};

/// A token that is given instead of decoded, as a user's or a tool's turn would be.
struct FedToken {
  std::size_t index;  // of the answer's tokens, from 0
  TokenId token;
};

/// What is to be decoded. The spans must outlive the decoding.
struct DecodingTask {
  std::span<const TokenId> prompt;  // what the decoder has not read yet
  std::size_t max_new = 0;
  std::span<const FedToken> fed;              // in the order of their indices; they count as part of the answer
  std::size_t draft_tokens = 0;               // most tokens guessed ahead by PromptLookup; 0: none
  std::span<const TokenId> text_before = {};  // what the decoder has read already, for PromptLookup
};

/// One sequence's decoding, a step at a time, so that many can take turns.
class GreedyDecoding {
 public:
  /// The decoder must outlive this.
  GreedyDecoding(Decoder& decoder, const DecodingTask& task) : decoder_(&decoder), task_(task) {
    for (const TokenId token : task.text_before) remember(token);
  }

  /// Goes on from the same text with another decoder, a fork of this one's.
  GreedyDecoding fork(Decoder& decoder) const {
    GreedyDecoding copy = *this;
    copy.decoder_ = &decoder;
    return copy;
  }

  bool prompt_is_read() const { return task_.prompt.empty(); }
  bool done() const { return prompt_is_read() && (at_end_ || result_.tokens.size() >= task_.max_new); }

  /// Reads a chunk of the prompt, or chooses and reads the next token and the guesses that it confirms. The last token
  /// is read too, so that the caches end up with the whole sequence. Throws CacheRefusal.
  void step() {
    if (!prompt_is_read()) return read_prompt();
    const auto start = std::chrono::steady_clock::now();
    const auto observed_before = decoder_->time_in_observers();
    choose_and_read();
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    result_.seconds += (elapsed - (decoder_->time_in_observers() - observed_before)).count();
  }

  /// The next token is this one, however likely.
  void force(TokenId token) { forced_ = token; }

  /// Chosen so far.
  const std::vector<TokenId>& tokens() const { return result_.tokens; }

  /// What there is so far.
  Generation result() const {
    Generation result = result_;
    result.cache = decoder_->totals();
    if (at_end_) {
      result.stopped = StopReason::end_of_text;
    } else if (done()) {
      result.stopped = StopReason::max_new;
    }
    return result;
  }

 private:
  void read_prompt() {
    const std::span<const TokenId> chunk = task_.prompt.first(decoder_->prompt_chunk(task_.prompt.size()));
    decoder_->feed_prompt(chunk);
    for (const TokenId token : chunk) remember(token);
    task_.prompt = task_.prompt.subspan(chunk.size());
  }

  void choose_and_read() {
    const Vector& logits = decoder_->logits();
    const TokenId token = next_token(logits);
    take(token, logits);
    const std::vector<TokenId> guesses = at_end_ ? std::vector<TokenId>{} : guess();
    if (guesses.empty()) return decoder_->feed(token);

    std::vector<TokenId> draft{token};
    draft.insert(draft.end(), guesses.begin(), guesses.end());
    decoder_->feed_draft(draft);
    std::size_t accepted = 0;
    for (; accepted < guesses.size() && !at_end_; ++accepted) {
      const Vector& after = decoder_->logits_of_draft(accepted);
      if (greedy_choice(after) != guesses[accepted]) break;
      take(guesses[accepted], after);
    }
    decoder_->keep_of_draft(1 + accepted);
    result_.drafted_tokens += guesses.size();
    result_.accepted_drafts += accepted;
  }

  TokenId next_token(const Vector& logits) {
    if (forced_) return *std::exchange(forced_, std::nullopt);
    if (!task_.fed.empty() && task_.fed.front().index == result_.tokens.size()) {
      const TokenId token = task_.fed.front().token;
      task_.fed = task_.fed.subspan(1);
      return token;
    }
    return greedy_choice(logits);
  }

  /// Guesses end where a token is fed, and where the answer must end.
  std::vector<TokenId> guess() const {
    if (task_.draft_tokens == 0) return {};
    std::size_t room = task_.max_new - result_.tokens.size();
    if (!task_.fed.empty()) room = std::min(room, task_.fed.front().index - result_.tokens.size());
    return lookup_.guess(std::min(room, task_.draft_tokens));
  }

  void take(TokenId token, const Vector& logits) {
    const std::vector<std::uint64_t>& eos = decoder_->model().config().eos_tokens;
    result_.tokens.push_back(token);
    result_.logits.push_back(logits[static_cast<Eigen::Index>(token)]);
    at_end_ = std::find(eos.begin(), eos.end(), token) != eos.end();
    remember(token);
  }

  void remember(TokenId token) {
    if (task_.draft_tokens != 0) lookup_.add(token);
  }

  Decoder* decoder_;
  DecodingTask task_;
  Generation result_;
  PromptLookup lookup_;
  std::optional<TokenId> forced_;
  bool at_end_ = false;
};

/// Decodes up to `max_new` tokens after `prompt`, except for those that `fed` gives. `proceed` is called with the
/// number of tokens read so far and stops the decoding by returning false.
inline Generation generate(Decoder& decoder, const std::vector<TokenId>& prompt, std::size_t max_new,
                           const std::function<bool(std::size_t)>& proceed, std::span<const FedToken> fed = {}) {
  GreedyDecoding decoding(decoder, {prompt, max_new, fed, 0, {}});
  while (!decoding.done()) {
    decoding.step();
    if (!proceed(decoder.position())) break;
  }
  return decoding.result();
}

}  // namespace kvsparse_tools
