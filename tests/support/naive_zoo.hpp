// SPDX-License-Identifier: Apache-2.0
//
// An independent oracle for the policies beyond those of naive_replay.hpp. It keeps no state but what happened: which
// pages each head held, and what each query gave to each page. A policy is a function of that history, computed anew
// from its formula at every decision, in double.
#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "naive_replay.hpp"

namespace kvsparse_test::zoo {

struct Page {
  int first = 0;  // position; names the page
  int tokens = 0;
  bool pinned = false;
  int end() const { return first + tokens; }
};

/// What one query gave to a page: a share of the softmax for each query head of the group.
struct Seen {
  int position = 0;
  bool is_prompt = false;
  std::map<int, std::vector<double>> mass;  // of the pages read, by first position
  std::vector<double> lse;                  // for each query head of the group
  int open_page = 0;

  double sum(int page) const {
    double total = 0;
    for (const double share : mass.at(page)) total += share;
    return total;
  }
  double peak(int page) const { return *std::max_element(mass.at(page).begin(), mass.at(page).end()); }
};

struct Head {
  std::vector<Page> pages;
  std::vector<Seen> history;
  std::map<int, double> votes;  // by page, of a policy that votes now and then
  int evictions = 0;
  double noise = 0;
  bool near_tie = false;  // a decision was closer than floats can tell
};

struct Run {
  const NaiveTrace* trace = nullptr;
  int page_size = 4;
  int budget_pages = 8;
  int read_pages = 8;
  int t = 0;  // tokens appended so far
  std::vector<Head> heads;

  int group() const { return trace->query_heads / trace->kv_heads; }
  double scale() const { return 1 / std::sqrt(static_cast<double>(trace->head_dim)); }
  const float* key(int head, int position) const {
    return naive::row(naive::stored_keys(*trace), trace->kv_heads, trace->head_dim, position, head);
  }
  const float* value(int head, int position) const {
    return naive::row(naive::stored_values(*trace), trace->kv_heads, trace->head_dim, position, head);
  }
  const float* query(int head, int position, int of_group) const {
    return naive::row(trace->q, trace->query_heads, trace->head_dim, position, head * group() + of_group);
  }
  double dot(const float* a, const float* b) const {
    double sum = 0;
    for (int i = 0; i < trace->head_dim; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
    return sum;
  }
};

/// Reads of one query: positions.
using Reads = std::vector<int>;

struct Policy {
  bool pin_prompt = false;
  int pinned_pages = 0;
  bool layer_scope = false;
  int floor_pages = 0;  // of a head, where heads share their budget; 0: each has its own
  /// The evictable page with the lowest goes; ties: the oldest.
  std::function<double(const Run&, int head, const Page&)> score;
  /// Called before a trim, at the end of the prompt and every `period` decode steps (0: at the end of the prompt only).
  std::function<void(Run&, int head)> before_trim;
  int period = 0;
  int trim_to_pages = 0;  // 0: no trims
  std::function<Reads(Run&, int head)> select;
};

/// a and b were ordered.
inline void note_order(Head& head, double a, double b) {
  if (a == b) return;
  const double gap = std::abs(a - b) / std::max({std::abs(a), std::abs(b), 1e-30});
  if (gap < 2e-5 * (1 + head.noise)) head.near_tie = true;
}

/// Indices of the `count` evictable pages with the lowest scores, oldest first among equals.
inline std::vector<std::size_t> lowest(Run& run, int h, const Policy& policy, std::size_t count, bool has_open_page) {
  Head& head = run.heads[static_cast<std::size_t>(h)];
  std::vector<std::size_t> candidates;
  for (std::size_t i = 0; i < head.pages.size(); ++i) {
    const bool is_open = has_open_page && i + 1 == head.pages.size();
    if (!head.pages[i].pinned && !is_open) candidates.push_back(i);
  }
  const auto score = [&](std::size_t i) {
    if (!policy.layer_scope) return policy.score(run, h, head.pages[i]);
    double sum = 0;
    for (int other = 0; other < run.trace->kv_heads; ++other) sum += policy.score(run, other, head.pages[i]);
    return sum;
  };
  std::vector<double> scores;
  for (const std::size_t i : candidates) scores.push_back(score(i));
  std::vector<std::size_t> order(candidates.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return scores[a] < scores[b]; });
  count = std::min(count, order.size());
  std::vector<std::size_t> result;
  for (std::size_t i = 0; i < count; ++i) {
    result.push_back(candidates[order[i]]);
    for (std::size_t j = count; j < order.size(); ++j) note_order(head, scores[order[i]], scores[order[j]]);
  }
  return result;
}

inline void evict(Run& run, int h, std::vector<std::size_t> victims) {
  std::sort(victims.rbegin(), victims.rend());
  Head& head = run.heads[static_cast<std::size_t>(h)];
  for (const std::size_t victim : victims) {
    head.votes.erase(head.pages[victim].first);
    head.pages.erase(head.pages.begin() + static_cast<std::ptrdiff_t>(victim));
    ++head.evictions;
  }
}

inline void trim(Run& run, const Policy& policy, bool has_open_page) {
  if (policy.trim_to_pages == 0) return;
  for (int h = 0; h < run.trace->kv_heads; ++h) {
    if (policy.before_trim) policy.before_trim(run, h);
    const auto size = static_cast<int>(run.heads[static_cast<std::size_t>(h)].pages.size());
    const int excess = std::max(0, size - policy.trim_to_pages);
    evict(run, h, lowest(run, h, policy, static_cast<std::size_t>(excess), has_open_page));
  }
}

/// The page with the lowest score of all heads that hold as many as the floor; ties: the oldest page, the lowest head.
inline void evict_lowest_of_layer(Run& run, const Policy& policy) {
  struct Candidate {
    double score;
    int first;
    int head;
    std::size_t index;
    bool operator<(const Candidate& other) const {
      return std::tie(score, first, head) < std::tie(other.score, other.first, other.head);
    }
  };
  std::vector<Candidate> candidates;
  for (int h = 0; h < run.trace->kv_heads; ++h) {
    const std::vector<Page>& pages = run.heads[static_cast<std::size_t>(h)].pages;
    if (static_cast<int>(pages.size()) < policy.floor_pages) continue;
    for (std::size_t i = 0; i < pages.size(); ++i) {
      if (!pages[i].pinned) candidates.push_back({policy.score(run, h, pages[i]), pages[i].first, h, i});
    }
  }
  const Candidate lowest = *std::min_element(candidates.begin(), candidates.end());
  for (const Candidate& other : candidates) {
    for (Head& head : run.heads) note_order(head, lowest.score, other.score);
  }
  evict(run, lowest.head, {lowest.index});
}

inline void append(Run& run, const Policy& policy) {
  const NaiveTrace& trace = *run.trace;
  const bool opens = run.t % run.page_size == 0;
  const int decoded = run.t - trace.prompt_tokens;
  if (decoded == 0 && trace.prompt_tokens > 0) trim(run, policy, true);
  if (policy.period > 0 && decoded > 0 && decoded % policy.period == 0) trim(run, policy, !opens);
  if (opens && policy.floor_pages > 0) {
    int held = trace.kv_heads;  // with the pages that open now
    for (const Head& head : run.heads) held += static_cast<int>(head.pages.size());
    for (; held > trace.kv_heads * run.budget_pages; --held) evict_lowest_of_layer(run, policy);
  } else if (opens && policy.score) {
    std::vector<std::vector<std::size_t>> victims;
    for (int h = 0; h < trace.kv_heads; ++h) {
      const bool full = static_cast<int>(run.heads[static_cast<std::size_t>(h)].pages.size()) == run.budget_pages;
      victims.push_back(full ? lowest(run, h, policy, 1, false) : std::vector<std::size_t>{});
    }
    for (int h = 0; h < trace.kv_heads; ++h) evict(run, h, victims[static_cast<std::size_t>(h)]);
  }
  for (Head& head : run.heads) {
    if (opens) {
      const bool of_prompt = policy.pin_prompt && run.t < trace.prompt_tokens;
      head.pages.push_back({run.t, 0, of_prompt || run.t / run.page_size < policy.pinned_pages});
    }
    ++head.pages.back().tokens;
  }
  ++run.t;
}

/// What one head read and gave out at the newest query.
struct Answer {
  Reads resident, read;
  std::vector<double> out, lse;  // [group * head_dim], [group]
};

inline Answer attend(Run& run, int h, const Policy& policy) {
  Head& head = run.heads[static_cast<std::size_t>(h)];
  Answer answer;
  for (const Page& page : head.pages) {
    for (int position = page.first; position < page.end(); ++position) answer.resident.push_back(position);
  }
  answer.read = policy.select ? policy.select(run, h) : answer.resident;
  Seen seen;
  seen.position = run.t - 1;
  seen.is_prompt = seen.position < run.trace->prompt_tokens;
  seen.open_page = head.pages.back().first;
  for (int g = 0; g < run.group(); ++g) {
    const naive::Attention one =
        naive::attention(*run.trace, naive::stored_keys(*run.trace), naive::stored_values(*run.trace), run.t - 1, h,
                         h * run.group() + g, answer.read);
    head.noise = std::max(head.noise, one.noise);
    answer.out.insert(answer.out.end(), one.out.begin(), one.out.end());
    answer.lse.push_back(one.lse);
    seen.lse.push_back(one.lse);
    for (std::size_t i = 0; i < answer.read.size(); ++i) {
      for (const Page& page : head.pages) {
        if (answer.read[i] < page.first || answer.read[i] >= page.end()) continue;
        auto& shares = seen.mass[page.first];
        shares.resize(static_cast<std::size_t>(run.group()));
        shares[static_cast<std::size_t>(g)] += one.weights[i];
      }
    }
  }
  head.history.push_back(seen);
  return answer;
}

}  // namespace kvsparse_test::zoo
