// SPDX-License-Identifier: Apache-2.0
// Errors. Configuration throws ConfigError; what can fail during decoding returns a Status, which costs no allocation
// until somebody asks for its sentence.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

namespace kvsparse {

/// Thrown by constructors; what() is a sentence that names the value and the limit.
class ConfigError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

/// Thrown when a snapshot cannot be saved or is not one that the cache can continue from; what() is a sentence that
/// names what differs, or where the stream failed.
class SnapshotError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The outcome of a verb of the decode step. On failure nothing has changed.
class [[nodiscard]] Status {
 public:
  /// What was refused.
  enum class Code {
    ok,                      ///< nothing: the verb did what it says
    wrong_heads,             ///< a row view has the wrong number of heads
    wrong_head_dim,          ///< a row view has the wrong head_dim
    wrong_tokens,            ///< key, value, query or output views disagree in tokens
    wrong_size,              ///< a flat span has the wrong number of elements
    prompt_ended,            ///< append_prompt after the first append or end_prompt
    prompt_exceeds_budget,   ///< pinned prompt pages plus one would not fit the budget
    max_tokens_reached,      ///< a policy that keeps everything is full
    pool_exhausted,          ///< the pool has fewer free pages than the tokens need
    too_many_drafts,         ///< more than max_speculative tokens may be rejected
    too_many_draft_queries,  ///< more queries attend while drafts are outstanding than there is a journal for
    unreachable_length,      ///< truncate to where the cache cannot go back, or beyond its end
    nothing_to_attend,       ///< attend before the first append
    layer_out_of_turn,       ///< a step of a sequence brings its token to every layer once, lowest first
    layer_drifted,           ///< a layer of a sequence holds another number of tokens than the sequence
    step_differs,            ///< prompt, drafts and decoded tokens for different layers in one step
    lists_too_small,         ///< a caller's array has no room for a page list
    page_read_in_part,       ///< a page list cannot leave out tokens of a page, unless it ends there
    page_weighted,           ///< a page list cannot weigh a page's tokens
    query_rotated,           ///< a page list cannot rotate the query for a page
    list_has_gap,            ///< a kernel that counts positions would misplace the tokens behind the gap
    no_such_block,           ///< the engine's block table is shorter than the sequence
    heads_differ,            ///< one page list for all kv heads, which hold different pages
    no_page_bounds,          ///< a certificate of a policy whose cache keeps no min/max summaries
    query_is_over,           ///< the latest query's reads are not known any more
  };

  constexpr Status() = default;  ///< ok
  /// The value that was refused, and the limit it met.
  constexpr Status(Code code, std::size_t value, std::size_t limit) : code_(code), value_(value), limit_(limit) {}

  constexpr bool ok() const { return code_ == Code::ok; }    ///< true: done; false: nothing has changed
  constexpr explicit operator bool() const { return ok(); }  ///< ok()
  constexpr Code code() const { return code_; }              ///< what was refused
  constexpr std::size_t value() const { return value_; }     ///< the value that was refused; 0 when ok
  constexpr std::size_t limit() const { return limit_; }     ///< the limit that it met; 0 when ok

  /// A sentence with the value and the limit in it. Allocates.
  std::string message() const {
    const std::string value = std::to_string(value_);
    const std::string limit = std::to_string(limit_);
    switch (code_) {
      case Code::ok: return "ok";
      case Code::wrong_heads: return "a row view has " + value + " heads; this cache needs " + limit;
      case Code::wrong_head_dim: return "a row view has head_dim " + value + "; this cache needs " + limit;
      case Code::wrong_tokens: return "a row view has " + value + " tokens; " + limit + " were expected";
      case Code::wrong_size: return "a flat span has " + value + " elements; this cache needs " + limit;
      case Code::prompt_ended: return "the prompt ended at position " + limit + "; append_prompt came at " + value;
      case Code::prompt_exceeds_budget:
        return "the prompt would pin " + value + " pages, but the budget of " + limit +
               " pages must leave one page for decoding; raise budget_tokens, unpin the prompt, or choose "
               "PromptOverflow::grow or unpin_middle";
      case Code::max_tokens_reached: return "token " + value + " would exceed max_tokens = " + limit;
      case Code::pool_exhausted:
        return "the tokens need " + value + " pages of the pool, of which " + limit +
               " are free; clear a sequence or build a larger pool";
      case Code::lists_too_small: return "a page list needs an array of " + value + " elements; it has " + limit;
      case Code::page_read_in_part:
        return "page " + value + " of the " + limit + " to list is read in part, which a page list cannot say";
      case Code::page_weighted:
        return "page " + value + " of the " + limit + " to list has a weight, which a page list cannot say";
      case Code::query_rotated:
        return "page " + value + " of the " + limit + " to list meets a rotated query, which a page list cannot say";
      case Code::list_has_gap:
        return "a page list for a kernel that counts positions lacks page " + value +
               " of a sequence that reaches page " + limit;
      case Code::no_such_block: return "page " + value + " is beyond the engine's block table of " + limit;
      case Code::heads_differ:
        return "kv head " + value + " has another page list than kv head 0, from entry " + limit +
               " on; list each head, or name pages by a block table if only their ids differ";
      case Code::no_page_bounds:
        return "the policy reads some of " + value +
               " resident tokens and keeps no bounds of the others' keys, so nothing can be proved of what they hold; "
               "choose one with page_summary = min_max, such as quest or certified";
      case Code::query_is_over:
        return "what the query at length " + value + " read is not known at length " + limit +
               ", or was read query head by query head; ask before the next append, or list a selection";
      case Code::too_many_drafts: return value + " drafts would be outstanding; max_speculative is " + limit;
      case Code::too_many_draft_queries:
        return value + " queries would attend while drafts are outstanding; the cache keeps the evidence of " + limit;
      case Code::unreachable_length:
        return value_ < limit_ ? "length " + value + " is gone; the oldest reachable is " + limit
                               : "length " + value + " is beyond the end of the sequence at " + limit;
      case Code::nothing_to_attend: return "a query came for " + value + " tokens, but " + limit + " are in the cache";
      case Code::layer_out_of_turn:
        return "layer " + value + " came where it is the turn of layer " + limit +
               "; each step goes through all layers once, lowest first";
      case Code::layer_drifted: return "a layer has " + value + " tokens; the sequence has " + limit;
      case Code::step_differs:
        return "layer " + value + " got tokens of another kind than the " + limit +
               " of this step: prompt, drafts and decoded tokens do not mix";
    }
    return "unknown status";
  }

 private:
  Code code_ = Code::ok;
  std::size_t value_ = 0;
  std::size_t limit_ = 0;
};

}  // namespace kvsparse
