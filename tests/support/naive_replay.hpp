// SPDX-License-Identifier: Apache-2.0
//
// An independent oracle of bench/replay: the policies and the cache written down once more in the slowest, most obvious
// way, so that a test can compare decision for decision. It shares nothing with include/kvsparse: plain loops, double
// precision, a page is a vector of positions, an evicted page is erased from a vector.
//
// The order of one step at position t, for each kv head:
//   1. append: if t opens a page and P pages are resident, one victim goes; then t joins its page;
//   2. select: which resident pages this query reads;
//   3. attend: softmax over exactly those tokens;
//   4. observe: accumulated mass, last mass, and (decode steps only) RaaS stamps.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace kvsparse_test {

// One layer of one sequence; every array is [tokens, heads, head_dim].
struct NaiveTrace {
  int tokens = 0;
  int query_heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  int prompt_tokens = 0;
  std::vector<float> q, k, v;
  // What a narrower storage type made of k and v (see store_as). Empty: stored as given. The sparse path reads these,
  // page bounds included; the dense reference always reads k and v.
  std::vector<float> stored_k, stored_v;
};

struct NaiveSettings {
  // dense, streaming_llm, h2o, quest, raas, kindred, random, or EVICTOR+quest
  std::string policy;
  int page_size = 16;
  int budget = 0;                  // dense ignores it; quest reads it
  std::optional<int> read_budget;  // of quest, alone or composed; absent: the budget
  int sinks = 4;                   // streaming_llm
  std::optional<bool> pin_prompt;  // absent: on for raas, kindred and random, off for the others
  double alpha = 0.01;             // raas, kindred
  double r = 0.5;                  // raas under rank
  bool rank = false;               // raas: used = rank
  bool quest_bound = false;        // raas: evidence = quest_bound
  int window = 24;                 // kindred
  double patience = 16;            // kindred
  double caution = 0.5;            // kindred
  // random: (kv head, evictions of this head so far, number of candidates) -> index into the candidates, which stand
  // in order of position. The library's hash is its own affair, so the test supplies it.
  std::function<std::size_t(int, int, std::size_t)> random_choice;
};

// A float32 implementation may legitimately decide the other way when a step's margin is below this.
// The margin is a relative gap divided by (1 + largest sum |q_i k_i| / sqrt(d)), because the rounding error of a logit,
// hence the relative error of a softmax share, grows with that sum.
inline constexpr double naive_near_tie = 3e-6;

struct NaiveStep {
  // [kv_heads][tokens]: as it was when this token's query attended.
  std::vector<std::vector<char>> resident, read;
  std::vector<double> out;              // [query_heads * head_dim]
  std::vector<double> lse;              // [query_heads]: log-sum-exp of the scaled logits that were read
  std::vector<double> dense_out;        // [query_heads * head_dim]
  std::vector<double> dense_mass_read;  // [query_heads]: share of the dense softmax that was read
  std::vector<int> victims;             // [kv_heads]: first position of the page evicted by this append, -1 if none
  // Smallest margin by which this step decided anything; infinite if it decided nothing that can be close. Exact ties
  // go by position in any precision and do not count, with two exceptions that have margin 0, because there equality
  // is the luck of rounding: a value exactly at alpha, and equal accumulated masses (H2O) of pages of several tokens,
  // which are sums over different queries. (Example: reading only the open page, every page accumulates 1 a query, as
  // exactly as exp and log happen to round. A lone token's share is 1 in any arithmetic, so page size 1 is exempt.)
  double decision_margin = std::numeric_limits<double>::infinity();
  std::vector<double> head_margin;  // [kv_heads]: the same for each head (heads do not influence each other)
};

struct NaiveResult {
  std::vector<NaiveStep> steps;  // one per token, prompt included
  // Over decode steps and query heads, as replay prints them.
  double mean_share = 0;
  double mean_error = 0;
  double max_error = 0;
  // Over all steps: the largest head, the sum of the heads.
  int peak_tokens = 0;
  long evicted_tokens = 0;
};

namespace naive {

constexpr double infinity = std::numeric_limits<double>::infinity();

struct Page {
  std::vector<int> positions;
  bool pinned = false;
  long stamp = 0;
  double last_mass = 0;         // group-summed mass at the latest query that read this page
  double accumulated_mass = 0;  // group-summed mass of all queries that read this page
  bool used_late = false;       // kindred: a milestone
};

struct Head {
  std::vector<Page> pages;  // in order of position; the last one is the open page
  int evictions = 0;
  // Kindred, all of it since the beginning: the sum of the milestones' looks times mass, and the cosines with it.
  std::vector<double> direction;
  std::vector<double> page_cosines, milestone_cosines;
  double noise = 0;          // largest sum |q_i k_i| / sqrt(d) that evidence was computed from so far
  double margin = infinity;  // of the current step
};

// The settings, checked and resolved.
struct Plan {
  std::string evictor;
  bool selects = false;
  int budget_pages = 0;
  int read_pages = 0;
  int sink_pages = 0;
  int prompt_pages = 0;  // pinned ones: 0 without pin_prompt
};

inline const float* row(const std::vector<float>& data, int heads, int dim, int token, int head) {
  const auto flat = (static_cast<long>(token) * heads + head) * dim;
  return data.data() + flat;
}

inline const std::vector<float>& stored_keys(const NaiveTrace& trace) {
  return trace.stored_k.empty() ? trace.k : trace.stored_k;
}

inline const std::vector<float>& stored_values(const NaiveTrace& trace) {
  return trace.stored_v.empty() ? trace.v : trace.stored_v;
}

inline int pages_for(int tokens, int page_size) { return (tokens + page_size - 1) / page_size; }

inline void require(bool fine, const char* sentence) {
  if (!fine) throw std::invalid_argument(sentence);
}

inline Plan make_plan(const NaiveTrace& trace, const NaiveSettings& settings) {
  require(trace.tokens > 0 && trace.head_dim > 0 && trace.kv_heads > 0 && trace.query_heads > 0, "empty trace");
  require(trace.query_heads % trace.kv_heads == 0, "kv_heads must divide query_heads");
  require(trace.prompt_tokens >= 0 && trace.prompt_tokens < trace.tokens, "prompt_tokens must be < tokens");
  const auto size = [&](int heads) {
    return static_cast<std::size_t>(trace.tokens) * static_cast<std::size_t>(heads) *
           static_cast<std::size_t>(trace.head_dim);
  };
  require(trace.q.size() == size(trace.query_heads), "q has the wrong size");
  require(trace.k.size() == size(trace.kv_heads) && trace.v.size() == trace.k.size(), "k or v has the wrong size");
  require(stored_keys(trace).size() == trace.k.size() && stored_values(trace).size() == trace.v.size(),
          "stored_k or stored_v has the wrong size");
  require(settings.page_size >= 1, "page_size must be at least 1");

  Plan plan;
  const std::size_t plus = settings.policy.find('+');
  if (plus != std::string::npos) {
    plan.evictor = settings.policy.substr(0, plus);
    require(settings.policy.substr(plus + 1) == "quest", "only quest selects");
    plan.selects = true;
  } else if (settings.policy == "quest") {
    plan.evictor = "dense";
    plan.selects = true;
  } else {
    plan.evictor = settings.policy;
  }
  const bool known = plan.evictor == "dense" || plan.evictor == "streaming_llm" || plan.evictor == "h2o" ||
                     plan.evictor == "raas" || plan.evictor == "kindred" || plan.evictor == "random";
  require(known, "unknown policy");
  require(plan.evictor != "random" || settings.random_choice != nullptr, "random needs random_choice");

  plan.budget_pages = settings.budget / settings.page_size;
  if (plan.selects) {
    plan.read_pages = settings.read_budget.value_or(settings.budget) / settings.page_size;
    require(plan.read_pages >= 1, "the read budget must hold the open page");
  }
  if (plan.evictor != "dense") {
    const bool pin_by_default = plan.evictor == "raas" || plan.evictor == "kindred" || plan.evictor == "random";
    if (settings.pin_prompt.value_or(pin_by_default)) {
      plan.prompt_pages = pages_for(trace.prompt_tokens, settings.page_size);
    }
    if (plan.evictor == "streaming_llm") plan.sink_pages = pages_for(settings.sinks, settings.page_size);
    // Sinks and prompt both start at position 0, so the larger covers the smaller.
    require(plan.budget_pages >= std::max(plan.sink_pages, plan.prompt_pages) + 1,
            "the budget is smaller than the pinned pages plus one");
  }
  return plan;
}

// ---- margins --------------------------------------------------------------------------------------------------------

// Relative distance of two masses. Below 1e-30 float32 can no longer tell masses apart, so nothing there counts as far.
inline double mass_gap(double a, double b) { return std::abs(a - b) / std::max({a, b, 1e-30}); }

// Two masses were ordered. Equal ones were ordered by position, which is not a close call.
inline void note_order(Head& head, double a, double b) {
  if (a != b) head.margin = std::min(head.margin, mass_gap(a, b) / (1 + head.noise));
}

inline void note_threshold(Head& head, double value, double alpha) {
  head.margin = std::min(head.margin, mass_gap(value, alpha) / (1 + head.noise));
}

// ---- kindred: what milestones look like -----------------------------------------------------------------------------

inline double length_of(const std::vector<double>& x) {
  double square = 0;
  for (const double element : x) square += element * element;
  return std::sqrt(square);
}

// Sum of the page's values, at most 256 channels of it, at length 1; zeros if it has no length.
inline std::vector<double> looks_of(const NaiveTrace& trace, const Page& page, int head_index) {
  std::vector<double> looks;
  for (int i = 0; i < std::min(trace.head_dim, 256); ++i) {
    double sum = 0;
    for (const int position : page.positions) {
      sum += static_cast<double>(row(stored_values(trace), trace.kv_heads, trace.head_dim, position, head_index)[i]);
    }
    looks.push_back(sum);
  }
  const double length = length_of(looks);
  for (double& x : looks) x = length > 0 ? x / length : 0;
  return looks;
}

inline double cosine(const std::vector<double>& direction, const std::vector<double>& looks) {
  double product = 0;
  for (std::size_t i = 0; i < looks.size(); ++i) product += direction[i] * looks[i];
  const double length = length_of(direction);
  return length > 0 ? product / length : 0;
}

// The newest cosine weighs 1, each older one 0.98 of the next.
struct Spread {
  double weight = 0;
  double mean = 0;
  double deviation = 0;
};

inline Spread spread_of(const std::vector<double>& cosines) {
  Spread spread;
  for (std::size_t i = 0; i < cosines.size(); ++i) {
    const double weight = std::pow(0.98, static_cast<double>(cosines.size() - 1 - i));
    spread.weight += weight;
    spread.mean += weight * cosines[i];
  }
  if (cosines.empty()) return spread;
  spread.mean /= spread.weight;
  for (std::size_t i = 0; i < cosines.size(); ++i) {
    const double weight = std::pow(0.98, static_cast<double>(cosines.size() - 1 - i));
    spread.deviation += weight * (cosines[i] - spread.mean) * (cosines[i] - spread.mean);
  }
  spread.deviation = std::sqrt(spread.deviation / spread.weight);
  return spread;
}

inline std::size_t kindred_victim(Head& head, int head_index, int t, const std::vector<std::size_t>& candidates,
                                  const NaiveTrace& trace, const NaiveSettings& settings) {
  const Spread pages = spread_of(head.page_cosines);
  const Spread milestones = spread_of(head.milestone_cosines);
  const double deviation = std::max(1e-6, pages.deviation);
  // By how much a score moves when every cosine is off by 1, to first order: what a near-tie is measured in.
  const double off = 1 / deviation;
  double gap = 0;
  double trust = 0;
  double trust_off = 0;
  if (head.page_cosines.size() >= 2 && !head.milestone_cosines.empty()) {
    gap = (milestones.mean - pages.mean) / deviation;
    const double sure = gap - settings.caution / std::sqrt(milestones.weight);
    trust = std::pow(std::clamp(sure, 0.0, 1.0), 2);
    trust_off = sure > 0 && sure < 1 ? 2 * sure * (2 + std::abs(gap)) * off : 0;
    head.margin = std::min(head.margin, std::abs(sure) / ((2 + std::abs(gap)) * off) / (1 + head.noise));
  }

  const double bonus = std::log(settings.patience);
  std::vector<double> scores, offs;
  for (const std::size_t i : candidates) {
    const Page& page = head.pages[i];
    double likeness = 0;
    double likeness_off = 0;
    if (trust > 0) {
      const double above = (cosine(head.direction, looks_of(trace, page, head_index)) - pages.mean) / deviation;
      likeness = std::clamp(2 * above / gap, 0.0, 1.0);
      if (likeness > 0 && likeness < 1) {
        likeness_off = 2 * (2 + std::abs(above)) * off / gap + likeness * (2 + gap) * off / gap;
      }
    }
    scores.push_back(bonus * trust * likeness - std::log(static_cast<double>(t) - static_cast<double>(page.stamp)));
    offs.push_back(bonus * (trust_off * likeness + trust * likeness_off));
  }
  std::size_t lowest = 0;
  for (std::size_t i = 1; i < scores.size(); ++i) {
    if (scores[i] < scores[lowest]) lowest = i;
  }
  for (std::size_t i = 0; i < scores.size(); ++i) {
    if (scores[i] == scores[lowest] || offs[i] + offs[lowest] == 0) continue;
    head.margin = std::min(head.margin, (scores[i] - scores[lowest]) / (offs[i] + offs[lowest]) / (1 + head.noise));
  }
  return candidates[lowest];
}

// ---- 1. append ------------------------------------------------------------------------------------------------------

// Index of the page that is given up. All resident pages are full here: the page about to open does not exist yet.
inline std::size_t choose_victim(Head& head, int head_index, int t, const NaiveTrace& trace, const Plan& plan,
                                 const NaiveSettings& settings) {
  std::vector<std::size_t> candidates;
  for (std::size_t i = 0; i < head.pages.size(); ++i) {
    if (!head.pages[i].pinned) candidates.push_back(i);
  }

  if (plan.evictor == "streaming_llm") return candidates.front();

  if (plan.evictor == "random") {
    const std::size_t pick = settings.random_choice(head_index, head.evictions, candidates.size());
    require(pick < candidates.size(), "random_choice returned an index out of range");
    return candidates[pick];
  }

  if (plan.evictor == "h2o") {
    const int pages = plan.budget_pages - plan.prompt_pages;
    const int protected_pages = std::max(1, pages / 2) - 1;
    for (int i = 0; i < protected_pages; ++i) candidates.pop_back();
    std::size_t victim = candidates.front();
    for (const std::size_t i : candidates) {
      if (head.pages[i].accumulated_mass < head.pages[victim].accumulated_mass) victim = i;
    }
    for (const std::size_t i : candidates) {
      if (i == victim) continue;
      const double mass = head.pages[i].accumulated_mass;
      const double lowest = head.pages[victim].accumulated_mass;
      if (mass == lowest && settings.page_size > 1) head.margin = 0;
      note_order(head, mass, lowest);
    }
    return victim;
  }

  if (plan.evictor == "kindred") return kindred_victim(head, head_index, t, candidates, trace, settings);

  // raas
  std::size_t victim = candidates.front();
  for (const std::size_t i : candidates) {
    const Page& page = head.pages[i];
    const Page& best = head.pages[victim];
    if (page.stamp < best.stamp || (page.stamp == best.stamp && page.last_mass < best.last_mass)) victim = i;
  }
  for (const std::size_t i : candidates) {
    if (head.pages[i].stamp == head.pages[victim].stamp) {
      note_order(head, head.pages[i].last_mass, head.pages[victim].last_mass);
    }
  }
  return victim;
}

// Returns the first position of the evicted page, or -1.
inline int append(Head& head, int head_index, int t, const NaiveTrace& trace, const Plan& plan,
                  const NaiveSettings& settings) {
  int evicted = -1;
  if (t % settings.page_size == 0) {
    if (plan.evictor != "dense" && static_cast<int>(head.pages.size()) == plan.budget_pages) {
      const std::size_t victim = choose_victim(head, head_index, t, trace, plan, settings);
      evicted = head.pages[victim].positions.front();
      head.pages.erase(head.pages.begin() + static_cast<std::ptrdiff_t>(victim));
      ++head.evictions;
    }
    Page page;
    const bool holds_prompt = t < trace.prompt_tokens;
    page.pinned = t / settings.page_size < plan.sink_pages || (plan.prompt_pages > 0 && holds_prompt);
    page.stamp = t;
    head.pages.push_back(page);
  }
  head.pages.back().positions.push_back(t);
  const bool full = static_cast<int>(head.pages.back().positions.size()) == settings.page_size;
  if (full && length_of(head.direction) > 0) {
    head.page_cosines.push_back(cosine(head.direction, looks_of(trace, head.pages.back(), head_index)));
  }
  return evicted;
}

// ---- 2. select ------------------------------------------------------------------------------------------------------

struct Bound {
  double value = 0;
  double magnitude = 0;  // the sum without cancellation: what a float32 sum's error is relative to
};

inline Bound bound_of(const NaiveTrace& trace, const Page& page, int t, int head_index, int query_head) {
  const float* q = row(trace.q, trace.query_heads, trace.head_dim, t, query_head);
  Bound bound;
  for (int i = 0; i < trace.head_dim; ++i) {
    double lowest = infinity;
    double highest = -infinity;
    for (const int position : page.positions) {
      const double key = row(stored_keys(trace), trace.kv_heads, trace.head_dim, position, head_index)[i];
      lowest = std::min(lowest, key);
      highest = std::max(highest, key);
    }
    const double query = q[i];
    bound.value += std::max(query * lowest, query * highest);
    bound.magnitude += std::max(std::abs(query * lowest), std::abs(query * highest));
  }
  return bound;
}

// For each resident page: does this query read it?
inline std::vector<char> select(Head& head, int head_index, int t, const NaiveTrace& trace, const Plan& plan) {
  const std::size_t pages = head.pages.size();
  std::vector<char> read(pages, 1);
  if (!plan.selects || static_cast<int>(pages) <= plan.read_pages) return read;

  const int group = trace.query_heads / trace.kv_heads;
  const std::size_t open = pages - 1;
  std::vector<Bound> bounds;
  for (std::size_t p = 0; p < open; ++p) {
    Bound best{-infinity, 0};
    for (int g = 0; g < group; ++g) {
      const Bound bound = bound_of(trace, head.pages[p], t, head_index, head_index * group + g);
      best.value = std::max(best.value, bound.value);
      best.magnitude = std::max(best.magnitude, bound.magnitude);
    }
    bounds.push_back(best);
  }

  std::fill(read.begin(), read.end(), char{0});
  read[open] = 1;
  for (int taken = 0; taken < plan.read_pages - 1; ++taken) {
    std::size_t best = open;  // none yet
    for (std::size_t p = 0; p < open; ++p) {
      if (!read[p] && (best == open || bounds[p].value > bounds[best].value)) best = p;
    }
    read[best] = 1;
  }

  for (std::size_t in = 0; in < open; ++in) {
    for (std::size_t left = 0; left < open; ++left) {
      if (!read[in] || read[left] || bounds[in].value == bounds[left].value) continue;
      const double magnitude = std::max(bounds[in].magnitude, bounds[left].magnitude);
      head.margin = std::min(head.margin, (bounds[in].value - bounds[left].value) / magnitude);
    }
  }
  return read;
}

// ---- 3. attend ------------------------------------------------------------------------------------------------------

struct Attention {
  std::vector<double> out;      // [head_dim]
  std::vector<double> weights;  // one per position
  double lse = 0;
  double noise = 0;  // largest sum |q_i k_i| / sqrt(d)
};

// Plain softmax attention of one query head at step t over the given positions.
inline Attention attention(const NaiveTrace& trace, const std::vector<float>& keys, const std::vector<float>& values,
                           int t, int head_index, int query_head, const std::vector<int>& positions) {
  const int dim = trace.head_dim;
  const double scale = 1 / std::sqrt(static_cast<double>(dim));
  const float* q = row(trace.q, trace.query_heads, dim, t, query_head);
  Attention result;
  std::vector<double> logits;
  for (const int position : positions) {
    const float* key = row(keys, trace.kv_heads, dim, position, head_index);
    double dot = 0;
    double magnitude = 0;
    for (int i = 0; i < dim; ++i) {
      dot += static_cast<double>(q[i]) * static_cast<double>(key[i]);
      magnitude += std::abs(static_cast<double>(q[i]) * static_cast<double>(key[i]));
    }
    logits.push_back(dot * scale);
    result.noise = std::max(result.noise, magnitude * scale);
  }
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const double logit : logits) sum += std::exp(logit - largest);
  result.lse = largest + std::log(sum);
  result.out.assign(static_cast<std::size_t>(dim), 0.0);
  for (std::size_t j = 0; j < positions.size(); ++j) {
    const double weight = std::exp(logits[j] - largest) / sum;
    result.weights.push_back(weight);
    const float* value = row(values, trace.kv_heads, dim, positions[j], head_index);
    for (int i = 0; i < dim; ++i) result.out[static_cast<std::size_t>(i)] += weight * static_cast<double>(value[i]);
  }
  return result;
}

// ---- 4. observe -----------------------------------------------------------------------------------------------------

// What one query, all heads of the group together, tells about one resident page.
struct Evidence {
  bool read = false;
  double group_mass = 0;    // summed over the group; meaningless unless read
  double largest_mass = 0;  // largest of the group; meaningless unless read
  double bound_share = 0;   // largest of the group: softmax over all resident pages of bound / sqrt(d)
};

inline void add_bound_shares(Head& head, std::vector<Evidence>& evidence, int head_index, int t,
                             const NaiveTrace& trace) {
  const int group = trace.query_heads / trace.kv_heads;
  const double scale = 1 / std::sqrt(static_cast<double>(trace.head_dim));
  for (int g = 0; g < group; ++g) {
    std::vector<double> logits;
    for (const Page& page : head.pages) {
      const Bound bound = bound_of(trace, page, t, head_index, head_index * group + g);
      logits.push_back(bound.value * scale);
      head.noise = std::max(head.noise, bound.magnitude * scale);
    }
    const double largest = *std::max_element(logits.begin(), logits.end());
    double sum = 0;
    for (const double logit : logits) sum += std::exp(logit - largest);
    for (std::size_t p = 0; p < logits.size(); ++p) {
      evidence[p].bound_share = std::max(evidence[p].bound_share, std::exp(logits[p] - largest) / sum);
    }
  }
}

// RaaS after a decode step: who was used?
inline void stamp_pages(Head& head, std::vector<Evidence>& evidence, int head_index, int t, const NaiveTrace& trace,
                        const NaiveSettings& settings) {
  const std::size_t open = head.pages.size() - 1;
  head.pages[open].stamp = t;
  if (settings.quest_bound) add_bound_shares(head, evidence, head_index, t, trace);

  if (!settings.rank) {
    for (std::size_t p = 0; p < open; ++p) {
      if (!evidence[p].read) continue;
      const double value = settings.quest_bound ? evidence[p].bound_share : evidence[p].largest_mass;
      if (value > settings.alpha) head.pages[p].stamp = t;
      // A pinned page's stamp is never looked at, so how close it came does not matter.
      if (!head.pages[p].pinned) note_threshold(head, value, settings.alpha);
    }
    return;
  }

  int n = 0;
  std::vector<std::size_t> ranked;  // those that have evidence, best first
  for (std::size_t p = 0; p < open; ++p) {
    if (head.pages[p].pinned) continue;
    ++n;
    if (settings.quest_bound || evidence[p].read) ranked.push_back(p);
  }
  const auto value_of = [&](std::size_t p) {
    return settings.quest_bound ? evidence[p].bound_share : evidence[p].group_mass;
  };
  std::stable_sort(ranked.begin(), ranked.end(),
                   [&](std::size_t a, std::size_t b) { return value_of(a) > value_of(b); });
  const auto used = static_cast<std::size_t>(std::ceil(settings.r * n));
  for (std::size_t i = 0; i < ranked.size(); ++i) {
    if (i >= used) break;
    if (evidence[ranked[i]].read) head.pages[ranked[i]].stamp = t;
    for (std::size_t j = used; j < ranked.size(); ++j) note_order(head, value_of(ranked[i]), value_of(ranked[j]));
  }
}

// Kindred after a decode step: who was used, and who for the first time late?
inline void learn_milestones(Head& head, const std::vector<Evidence>& evidence, int head_index, int t,
                             const NaiveTrace& trace, const NaiveSettings& settings) {
  for (std::size_t p = 0; p < head.pages.size(); ++p) {
    Page& page = head.pages[p];
    if (page.pinned || !evidence[p].read) continue;
    note_threshold(head, evidence[p].largest_mass, settings.alpha);
    if (!(evidence[p].largest_mass > settings.alpha)) continue;
    page.stamp = t;
    if (page.used_late || t - page.positions.front() < settings.window) continue;
    page.used_late = true;
    const std::vector<double> looks = looks_of(trace, page, head_index);
    if (length_of(head.direction) > 0) head.milestone_cosines.push_back(cosine(head.direction, looks));
    head.direction.resize(looks.size());
    for (std::size_t i = 0; i < looks.size(); ++i) head.direction[i] += evidence[p].largest_mass * looks[i];
  }
}

inline void observe(Head& head, std::vector<Evidence>& evidence, int head_index, int t, const NaiveTrace& trace,
                    const Plan& plan, const NaiveSettings& settings) {
  for (std::size_t p = 0; p < head.pages.size(); ++p) {
    if (!evidence[p].read) continue;
    head.pages[p].last_mass = evidence[p].group_mass;
    head.pages[p].accumulated_mass += evidence[p].group_mass;
  }
  if (plan.evictor == "raas" && t >= trace.prompt_tokens) {
    stamp_pages(head, evidence, head_index, t, trace, settings);
  }
  if (plan.evictor == "kindred" && t >= trace.prompt_tokens) {
    learn_milestones(head, evidence, head_index, t, trace, settings);
  }
}

// ---- all of it ------------------------------------------------------------------------------------------------------

inline void run_head(Head& head, int head_index, int t, const NaiveTrace& trace, const Plan& plan,
                     const NaiveSettings& settings, NaiveStep& step) {
  head.margin = infinity;
  step.victims.push_back(append(head, head_index, t, trace, plan, settings));
  const std::vector<char> read = select(head, head_index, t, trace, plan);

  std::vector<char> resident_tokens(static_cast<std::size_t>(trace.tokens), 0);
  std::vector<char> read_tokens(static_cast<std::size_t>(trace.tokens), 0);
  std::vector<int> read_positions;
  for (std::size_t p = 0; p < head.pages.size(); ++p) {
    for (const int position : head.pages[p].positions) {
      resident_tokens[static_cast<std::size_t>(position)] = 1;
      if (!read[p]) continue;
      read_tokens[static_cast<std::size_t>(position)] = 1;
      read_positions.push_back(position);
    }
  }

  std::vector<Evidence> evidence(head.pages.size());
  const int group = trace.query_heads / trace.kv_heads;
  for (int g = 0; g < group; ++g) {
    const int query_head = head_index * group + g;
    const Attention sparse =
        attention(trace, stored_keys(trace), stored_values(trace), t, head_index, query_head, read_positions);
    head.noise = std::max(head.noise, sparse.noise);
    step.out.insert(step.out.end(), sparse.out.begin(), sparse.out.end());
    step.lse.push_back(sparse.lse);
    std::size_t next = 0;  // into read_positions, which follow the pages
    for (std::size_t p = 0; p < head.pages.size(); ++p) {
      if (!read[p]) continue;
      double mass = 0;
      for (std::size_t j = 0; j < head.pages[p].positions.size(); ++j) mass += sparse.weights[next++];
      evidence[p].read = true;
      evidence[p].group_mass += mass;
      evidence[p].largest_mass = std::max(evidence[p].largest_mass, mass);
    }

    std::vector<int> everything;
    for (int position = 0; position <= t; ++position) everything.push_back(position);
    const Attention dense = attention(trace, trace.k, trace.v, t, head_index, query_head, everything);
    step.dense_out.insert(step.dense_out.end(), dense.out.begin(), dense.out.end());
    double share = 0;
    for (const int position : read_positions) share += dense.weights[static_cast<std::size_t>(position)];
    step.dense_mass_read.push_back(share);
  }

  observe(head, evidence, head_index, t, trace, plan, settings);
  step.resident.push_back(resident_tokens);
  step.read.push_back(read_tokens);
  step.head_margin.push_back(head.margin);
  step.decision_margin = std::min(step.decision_margin, head.margin);
}

inline double relative_error(const std::vector<double>& out, const std::vector<double>& dense, std::size_t first,
                             std::size_t size) {
  double distance = 0;
  double norm = 0;
  for (std::size_t i = first; i < first + size; ++i) {
    distance += (out[i] - dense[i]) * (out[i] - dense[i]);
    norm += dense[i] * dense[i];
  }
  return distance == 0 ? 0 : std::sqrt(distance / norm);
}

}  // namespace naive

// Throws std::invalid_argument for what replay refuses with exit code 2.
inline NaiveResult naive_replay(const NaiveTrace& trace, const NaiveSettings& settings) {
  const naive::Plan plan = naive::make_plan(trace, settings);
  NaiveResult result;
  std::vector<naive::Head> heads(static_cast<std::size_t>(trace.kv_heads));
  for (int t = 0; t < trace.tokens; ++t) {
    NaiveStep step;
    for (int h = 0; h < trace.kv_heads; ++h) {
      naive::run_head(heads[static_cast<std::size_t>(h)], h, t, trace, plan, settings, step);
      if (step.victims.back() >= 0) result.evicted_tokens += settings.page_size;
      const auto& resident = step.resident.back();
      result.peak_tokens =
          std::max(result.peak_tokens, static_cast<int>(std::count(resident.begin(), resident.end(), char{1})));
    }
    result.steps.push_back(step);
  }

  double count = 0;
  const auto dim = static_cast<std::size_t>(trace.head_dim);
  for (int t = trace.prompt_tokens; t < trace.tokens; ++t) {
    const NaiveStep& step = result.steps[static_cast<std::size_t>(t)];
    for (std::size_t i = 0; i < static_cast<std::size_t>(trace.query_heads); ++i) {
      const double error = naive::relative_error(step.out, step.dense_out, i * dim, dim);
      result.mean_share += step.dense_mass_read[i];
      result.mean_error += error;
      result.max_error = std::max(result.max_error, error);
      ++count;
    }
  }
  result.mean_share /= count;
  result.mean_error /= count;
  return result;
}

// Rounds k and v to a storage type and back, as a cache of that type would (Eigen::half, Eigen::bfloat16).
template <typename Scalar>
NaiveTrace store_as(NaiveTrace trace) {
  const auto rounded = [](const std::vector<float>& data) {
    std::vector<float> result;
    for (const float x : data) result.push_back(static_cast<float>(static_cast<Scalar>(x)));
    return result;
  };
  trace.stored_k = rounded(trace.k);
  trace.stored_v = rounded(trace.v);
  return trace;
}

}  // namespace kvsparse_test
