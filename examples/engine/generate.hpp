// SPDX-License-Identifier: Apache-2.0
// Greedy decoding of one prompt.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <functional>
#include <span>
#include <string_view>
#include <vector>

#include "decoder.hpp"

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
  StopReason stopped = StopReason::max_new;
  CacheTotals cache;
  double seconds = 0.0;  // choosing and reading those tokens, the time of observers taken off

  double tokens_per_second() const { return seconds > 0.0 ? static_cast<double>(tokens.size()) / seconds : 0.0; }
};

/// A token that is given instead of decoded, as a user's or a tool's turn would be.
struct FedToken {
  std::size_t index;  // of the answer's tokens, from 0
  TokenId token;
};

/// Decodes up to `max_new` tokens after `prompt`, except for those that `fed`, in the order of their indices, gives;
/// they count as part of the answer. The last one is read too, so that the caches end up with the whole
/// sequence. `proceed` is called with the number of tokens read so far and stops the decoding by returning false.
inline Generation generate(Decoder& decoder, const std::vector<TokenId>& prompt, std::size_t max_new,
                           const std::function<bool(std::size_t)>& proceed, std::span<const FedToken> fed = {}) {
  using Clock = std::chrono::steady_clock;
  const std::vector<std::uint64_t>& eos = decoder.model().config().eos_tokens;
  Generation result;
  bool go_on = true;
  for (std::span<const TokenId> left = prompt; !left.empty() && go_on;) {
    const std::size_t chunk = decoder.prompt_chunk(left.size());
    decoder.feed_prompt(left.first(chunk));
    left = left.subspan(chunk);
    go_on = proceed(decoder.position());
  }
  const auto start = Clock::now();
  const auto observed_before = decoder.time_in_observers();
  bool at_end = false;
  while (go_on && !at_end && result.tokens.size() < max_new) {
    const Vector& logits = decoder.logits();
    const bool is_fed = !fed.empty() && fed.front().index == result.tokens.size();
    const TokenId token = is_fed ? fed.front().token : greedy_choice(logits);
    if (is_fed) fed = fed.subspan(1);
    result.tokens.push_back(token);
    result.logits.push_back(logits[static_cast<Eigen::Index>(token)]);
    at_end = std::find(eos.begin(), eos.end(), token) != eos.end();
    decoder.feed(token);
    go_on = proceed(decoder.position());
  }
  if (at_end) {
    result.stopped = StopReason::end_of_text;
  } else if (result.tokens.size() < max_new) {
    result.stopped = StopReason::interrupted;
  }
  const std::chrono::duration<double> elapsed = Clock::now() - start;
  result.seconds = (elapsed - (decoder.time_in_observers() - observed_before)).count();
  result.cache = decoder.totals();
  return result;
}

}  // namespace kvsparse_tools
