// SPDX-License-Identifier: Apache-2.0
//
// The naive model of one cache: which token stands at which position, and what happened so far that still counts.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace kvsparse_test {

struct NaiveSequence {
  /// Something that was done to the cache when it held `length` tokens.
  struct Event {
    enum class Kind {
      prompt,      ///< `count` tokens of the prompt came
      end_prompt,  ///< it ended
      append,      ///< `count` tokens came
      draft,       ///< `count` tokens came that may be rejected
      query,       ///< the newest token's query, the stock's `row`-th
      queries,     ///< those of the `count` newest tokens
      settle,      ///< what drafts there were are accepted by truncate
    };
    Kind kind;
    std::size_t length;
    std::size_t count = 0;
    std::size_t row = 0;
  };

  std::vector<std::size_t> rows;  ///< of the stock, by position
  std::size_t prompt = 0;
  bool prompt_ended = false;
  std::size_t drafts = 0;
  std::size_t draft_queries = 0;  ///< since the first of them
  std::vector<Event> history;
  bool was_loaded = false;

  std::size_t length() const { return rows.size(); }

  void add_prompt(std::size_t count, std::size_t first_row) {
    happened(Event::Kind::prompt, count);
    add_rows(count, first_row);
    prompt += count;
  }
  void end_prompt() {
    if (!prompt_ended) happened(Event::Kind::end_prompt);
    prompt_ended = true;
  }
  void append(std::size_t count, std::size_t first_row) {
    end_prompt();
    happened(Event::Kind::append, count);
    add_rows(count, first_row);
    drafts = draft_queries = 0;
  }
  void append_draft(std::size_t count, std::size_t first_row) {
    end_prompt();
    happened(Event::Kind::draft, count);
    add_rows(count, first_row);
    drafts += count;
  }
  void ask(std::size_t row) {
    history.push_back({Event::Kind::query, length(), 1, row});
    draft_queries += drafts > 0 ? 1 : 0;
  }
  void ask_for_newest(std::size_t count, std::size_t first_row) {
    history.push_back({Event::Kind::queries, length(), count, first_row});
    draft_queries += drafts > 0 ? count : 0;
  }
  /// Everything from `position` on has never been, queries included.
  void truncate(std::size_t position) {
    std::vector<Event> kept;
    for (Event event : history) {
      const std::size_t room = position - std::min(position, event.length);
      switch (event.kind) {
        case Event::Kind::append:
          // That it accepted the drafts before it stands, if any are left.
          if (room == 0) event = {Event::Kind::settle, event.length, 1, 0};
          event.count = std::min(event.count, std::max<std::size_t>(room, 1));
          break;
        case Event::Kind::prompt:
        case Event::Kind::draft: event.count = std::min(event.count, room); break;
        case Event::Kind::queries: {
          const std::size_t gone = event.length - std::min(event.length, position);
          event.count -= std::min(event.count, gone);
          break;
        }
        case Event::Kind::query: event.count = event.length <= position ? 1 : 0; break;
        case Event::Kind::end_prompt: event.count = event.length <= position && position >= prompt ? 1 : 0; break;
        case Event::Kind::settle: break;
      }
      event.length = std::min(event.length, position);
      if (event.count > 0) kept.push_back(event);
    }
    history = kept;
    rows.resize(position);
    if (position < prompt) {
      prompt = position;
      prompt_ended = false;
    }
    drafts = draft_queries = 0;
    happened(Event::Kind::settle);
  }

 private:
  void happened(Event::Kind kind, std::size_t count = 1) { history.push_back({kind, length(), count, 0}); }
  void add_rows(std::size_t count, std::size_t first_row) {
    for (std::size_t i = 0; i < count; ++i) rows.push_back(first_row + i);
  }
};

}  // namespace kvsparse_test
