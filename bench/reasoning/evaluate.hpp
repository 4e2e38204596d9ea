// SPDX-License-Identifier: Apache-2.0
// One problem decoded greedily with one cache configuration, and how far it came.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common/allocation_counter.hpp"
#include "common/interrupt.hpp"
#include "engine/chain_answer.hpp"
#include "engine/generate.hpp"
#include "idea_cache.hpp"
#include "problem_set.hpp"

namespace kvsparse_tools {

struct Outcome {
  std::string refusal;  // why the policy cannot run with this configuration; the rest is then empty
  std::string answer;   // as answer_of_chain has it; empty: none
  bool answer_right = false;
  bool chain_right = false;
  std::size_t lines_right = 0;            // before the first error
  std::size_t token_count = 0;            // generated
  std::vector<TokenId> tokens;            // only when somebody asks for them
  std::size_t peak_resident_tokens = 0;   // of the fullest kv head of the fullest layer
  std::uint64_t peak_resident_bytes = 0;  // all layers and heads, here and below
  double mean_resident_bytes = 0.0;       // over the decode steps
  std::size_t allocated_bytes = 0;
  double stamped_share = std::numeric_limits<double>::quiet_NaN();  // mean over the layers that judge pages
};

/// The allocator has handed out other bytes than a cache's accounting says: every memory figure would be wrong.
class AccountingError : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

/// A CacheFactory that believes no accounting: what this thread took from operator new must be, to the byte, what the
/// cache says it allocated plus the one object behind the AnyCache handle.
inline kvsparse::AnyCache audited_cache(std::string_view policy, kvsparse::ScalarType dtype,
                                        const kvsparse::CacheConfig& config,
                                        std::span<const kvsparse::OptionSetting> settings) {
  const std::size_t before = allocations_of_this_thread().live_bytes;
  kvsparse::AnyCache cache = idea_or_named_cache(policy, dtype, config, settings);
  const std::size_t taken = allocations_of_this_thread().live_bytes - before;
  const std::size_t accounted = cache.bytes_allocated() + cache.object_bytes();
  if (taken != accounted) {
    throw AccountingError("policy " + std::string(policy) + " took " + std::to_string(taken) +
                          " bytes from the allocator, its accounting says " + std::to_string(accounted));
  }
  return cache;
}

/// The last number before the last ";" of a finished text. One that the model ended before the chain's length has no
/// answer; with lines of varying length it is the model that says when it is finished, or it has no answer either.
inline std::optional<std::string> answer_of_chain(const std::string& text, const Generation& generation,
                                                  LineFormat format, std::size_t chain_tokens) {
  const bool ended = generation.stopped == StopReason::end_of_text;
  const bool finished = format == LineFormat::varied ? ended : generation.tokens.size() == chain_tokens;
  return finished ? chain_answer(text) : std::nullopt;
}

inline std::size_t lines_before_first_error(const Problem& problem, const std::vector<TokenId>& tokens) {
  const auto both = std::min(tokens.size(), problem.chain.size());
  const auto wrong =
      std::mismatch(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(both), problem.chain.begin());
  const auto right_until = problem.prompt.size() + static_cast<std::size_t>(wrong.first - tokens.begin());
  std::size_t lines = 0;
  while (lines < problem.text.lines.size() && problem.text.lines[lines].end <= right_until) ++lines;
  return lines;
}

/// Nothing when interrupted.
inline std::optional<Outcome> evaluate(const Model& model, const Tokenizer& tokenizer, const CacheChoice& choice,
                                       LineFormat format, const Problem& problem, bool keep_tokens) {
  // Where the model says when it is finished, twice the length is enough to see that it does not.
  const std::size_t max_new = problem.chain.size() * (format == LineFormat::varied ? 2 : 1);
  Outcome outcome;
  try {
    Decoder decoder(model, choice, problem.prompt.size() + max_new, audited_cache);
    double byte_steps = 0.0;
    Generation generation = generate(
        decoder, problem.prompt, max_new,
        [&](std::size_t read) {
          for (const kvsparse::AnyCache& cache : decoder.caches()) {
            if (read > problem.prompt.size()) byte_steps += static_cast<double>(cache.stats().resident_bytes);
          }
          return !interrupted();
        },
        problem.fed);
    if (generation.stopped == StopReason::interrupted) return std::nullopt;

    const auto answer = answer_of_chain(tokenizer.decode(generation.tokens), generation, format, problem.chain.size());
    outcome.answer = answer.value_or("");
    outcome.answer_right = answer == problem.text.answer;
    outcome.chain_right = generation.tokens == problem.chain;
    outcome.lines_right = lines_before_first_error(problem, generation.tokens);
    outcome.peak_resident_tokens = generation.cache.peak_resident_tokens;
    outcome.peak_resident_bytes = generation.cache.peak_resident_bytes;
    outcome.mean_resident_bytes = byte_steps / static_cast<double>(generation.tokens.size());
    // Every layer that judges judges as many pages as any other, so their shares weigh the same.
    double shares = 0.0;
    std::size_t judges = 0;
    for (const kvsparse::AnyCache& cache : decoder.caches()) {
      outcome.allocated_bytes += cache.bytes_allocated();
      const double share = cache.stats().used_page_share;
      if (std::isnan(share)) continue;
      shares += share;
      ++judges;
    }
    if (judges > 0) outcome.stamped_share = shares / static_cast<double>(judges);
    outcome.token_count = generation.tokens.size();
    if (keep_tokens) outcome.tokens = std::move(generation.tokens);
  } catch (const kvsparse::ConfigError& error) {
    outcome.refusal = error.what();
  } catch (const CacheRefusal& error) {
    outcome.refusal = error.what();
  }
  return outcome;
}

}  // namespace kvsparse_tools
