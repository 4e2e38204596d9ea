// SPDX-License-Identifier: Apache-2.0
//
// The policies of the literature beyond RaaS, H2O, Quest and StreamingLLM, and compositions of an evictor that ignores
// what was not read with a selector that leaves much unread, against oracles that compute each decision
// from the whole history by its formula (support/naive_zoo.hpp).
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "support/naive_zoo.hpp"
#include "support/random_trace.hpp"
#include "support/rows.hpp"
#include "support/zoo_cache.hpp"

namespace kvsparse_test {
namespace {

using kvsparse::CacheConfig;
using kvsparse::ScalarType;
using Settings = std::vector<kvsparse::OptionSetting>;
using zoo::Head;
using zoo::Page;
using zoo::Policy;
using zoo::Reads;
using zoo::Run;
using zoo::Seen;

struct ZooCase {
  std::string title;
  std::string policy;
  Settings settings;
  std::function<Policy(const Run&)> oracle;
  bool evicts = true;
};

void PrintTo(const ZooCase& zoo_case, std::ostream* out) { *out << zoo_case.title; }

// ---- the formulas ---------------------------------------------------------------------------------------------------

double length_of(const Run& run, const float* row) { return std::sqrt(run.dot(row, row)); }

double mean_over_tokens(const Page& page, const std::function<double(int)>& of_position) {
  double sum = 0;
  for (int position = page.first; position < page.end(); ++position) sum += of_position(position);
  return sum / page.tokens;
}

Policy key_norm(const Run&) {
  Policy policy;
  policy.score = [](const Run& run, int h, const Page& page) {
    return -mean_over_tokens(page, [&](int position) { return length_of(run, run.key(h, position)); });
  };
  return policy;
}

Policy value_aware(const Run&) {
  Policy policy;
  policy.pinned_pages = 1;
  policy.score = [](const Run& run, int h, const Page& page) {
    return mean_over_tokens(page, [&](int position) {
      double sum = 0;
      for (int i = 0; i < run.trace->head_dim; ++i) sum += std::abs(static_cast<double>(run.value(h, position)[i]));
      return sum;
    });
  };
  return policy;
}

Policy key_diff(const Run&) {
  Policy policy;
  policy.score = [](const Run& run, int h, const Page& page) {
    const auto dim = static_cast<std::size_t>(run.trace->head_dim);
    std::vector<double> anchor(dim);
    for (const Page& other : run.heads[static_cast<std::size_t>(h)].pages) {
      for (int position = other.first; position < other.end(); ++position) {
        const double length = length_of(run, run.key(h, position));
        for (std::size_t i = 0; i < dim && length > 0; ++i) {
          anchor[i] += static_cast<double>(run.key(h, position)[i]) / length;
        }
      }
    }
    return -mean_over_tokens(page, [&](int position) {
      const double length = length_of(run, run.key(h, position));
      double product = 0;
      for (std::size_t i = 0; i < dim; ++i) product += anchor[i] * static_cast<double>(run.key(h, position)[i]);
      return length > 0 ? product / length : 0;
    });
  };
  return policy;
}

bool used(Head& head, const Seen& seen, int page, double alpha) {
  if (!seen.mass.contains(page)) return false;
  if (std::abs(seen.peak(page) - alpha) < 1e-5 * alpha * (1 + head.noise)) head.near_tie = true;
  return seen.peak(page) > alpha;
}

Policy lrfu(const Run&, double alpha, double decay, bool pin_prompt) {
  Policy policy;
  policy.pin_prompt = pin_prompt;
  policy.score = [=](const Run& run, int h, const Page& page) {
    Head& head = const_cast<Head&>(run.heads[static_cast<std::size_t>(h)]);
    std::vector<bool> uses{true};  // it opens with one
    for (const Seen& seen : head.history) {
      if (seen.is_prompt || seen.position < page.first) continue;
      uses.push_back(seen.open_page == page.first || used(head, seen, page.first, alpha));
    }
    double value = 0;
    for (std::size_t i = 0; i < uses.size(); ++i) {
      if (uses[i]) value += std::pow(decay, static_cast<double>(uses.size() - 1 - i));
    }
    return value;
  };
  return policy;
}

Policy tova(const Run&) {
  Policy policy;
  policy.layer_scope = true;
  policy.score = [](const Run& run, int h, const Page& page) {
    const Head& head = run.heads[static_cast<std::size_t>(h)];
    for (auto seen = head.history.rbegin(); seen != head.history.rend(); ++seen) {
      if (seen->mass.contains(page.first)) return seen->sum(page.first);
    }
    return 0.0;
  };
  return policy;
}

/// The mean mass of the page over the first `window` queries that read it, of which each later one replaces a share.
double mean_mass(const Run& run, const Head& head, const Page& page, int window) {
  std::vector<double> masses;
  for (const Seen& seen : head.history) {
    if (seen.mass.contains(page.first)) masses.push_back(seen.sum(page.first) / run.group());
  }
  const double share = 1.0 / window;
  const auto queries = static_cast<int>(masses.size());
  double mean = 0;
  for (int i = 0; i < queries; ++i) {
    const int later = queries - std::max(i + 1, window);
    const double weight = queries <= window ? 1.0 / queries : share * std::pow(1 - share, later);
    mean += weight * masses[static_cast<std::size_t>(i)];
  }
  return mean;
}

Policy ada_kv(const Run& run, int window, double safeguard, bool pin_prompt) {
  Policy policy;
  policy.pin_prompt = pin_prompt;
  policy.floor_pages = std::max(1, static_cast<int>(safeguard * run.budget_pages));
  policy.score = [=](const Run& at, int h, const Page& page) {
    const Head& head = at.heads[static_cast<std::size_t>(h)];
    const bool holds_a_newest_token = at.t - page.end() < window;
    return holds_a_newest_token ? std::numeric_limits<double>::infinity() : mean_mass(at, head, page, window);
  };
  return policy;
}

Policy lazy_eviction(const Run& run, double alpha, int window) {
  Policy policy;
  policy.pin_prompt = true;
  policy.period = window;
  policy.trim_to_pages = run.budget_pages - naive::pages_for(window, run.page_size);
  policy.score = [=](const Run& at, int h, const Page& page) {
    Head& head = const_cast<Head&>(at.heads[static_cast<std::size_t>(h)]);
    if (at.t - page.end() < window) return 3.0;
    int last_use = page.first;
    int gap = 0;
    for (const Seen& seen : head.history) {
      if (seen.is_prompt || !used(head, seen, page.first, alpha)) continue;
      gap = std::max(gap, seen.position - last_use);
      last_use = seen.position;
    }
    if (gap == 0) return 0.0;
    const double silence = at.t - last_use;
    const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
    return 2 * sigmoid(-silence / gap) + 2 * sigmoid(-static_cast<double>(gap) / window);
  };
  return policy;
}

/// Positions before the window, and their votes.
struct Votes {
  std::vector<int> positions;
  std::vector<double> shares;
};

Votes votes_of(Run& run, int h, int window, bool largest_logit_of_group) {
  Head& head = run.heads[static_cast<std::size_t>(h)];
  Votes votes;
  for (const Page& page : head.pages) {
    for (int position = page.first; position < page.end(); ++position) {
      if (position < run.t - window) votes.positions.push_back(position);
    }
  }
  votes.shares.assign(votes.positions.size(), 0.0);
  const int queries = std::min<int>(window, static_cast<int>(head.history.size()));
  for (int age = 0; age < queries; ++age) {
    const int at = head.history[head.history.size() - 1 - static_cast<std::size_t>(age)].position;
    std::vector<std::vector<double>> logits;  // of each softmax
    for (int g = 0; g < run.group(); ++g) {
      std::vector<double> of_query;
      for (const int position : votes.positions) {
        of_query.push_back(run.dot(run.query(h, at, g), run.key(h, position)) * run.scale());
      }
      logits.push_back(of_query);
    }
    if (largest_logit_of_group) {
      for (std::size_t i = 0; i < votes.positions.size(); ++i) {
        for (const auto& of_query : logits) logits[0][i] = std::max(logits[0][i], of_query[i]);
      }
      logits.resize(1);
    }
    for (const auto& of_softmax : logits) {
      double sum = 0;
      for (const double logit : of_softmax) sum += std::exp(logit);
      for (std::size_t i = 0; i < of_softmax.size(); ++i) {
        votes.shares[i] += std::exp(of_softmax[i]) / sum / static_cast<double>(logits.size()) / queries;
      }
    }
  }
  return votes;
}

std::vector<double> max_pooled(const std::vector<double>& shares, int kernel) {
  std::vector<double> pooled;
  const auto size = static_cast<int>(shares.size());
  for (int i = 0; i < size; ++i) {
    double largest = 0;
    for (int j = std::max(0, i - kernel / 2); j <= std::min(size - 1, i + kernel / 2); ++j) {
      largest = std::max(largest, shares[static_cast<std::size_t>(j)]);
    }
    pooled.push_back(largest);
  }
  return pooled;
}

/// Gives each page whose tokens all stand before the window the sum of its tokens' scores.
void vote(Head& head, const Votes& votes, const std::vector<double>& scores) {
  for (const Page& page : head.pages) {
    double sum = 0;
    int tokens = 0;
    for (std::size_t i = 0; i < votes.positions.size(); ++i) {
      if (votes.positions[i] < page.first || votes.positions[i] >= page.end()) continue;
      sum += scores[i];
      ++tokens;
    }
    if (tokens == page.tokens) head.votes[page.first] = sum;
  }
}

double last_vote(const Run& run, int h, const Page& page) {
  const auto& votes = run.heads[static_cast<std::size_t>(h)].votes;
  return votes.contains(page.first) ? votes.at(page.first) : std::numeric_limits<double>::max();
}

Policy snap_kv(const Run& run, int window, int kernel, int period) {
  Policy policy;
  policy.score = last_vote;
  policy.period = period;
  policy.trim_to_pages = run.budget_pages - naive::pages_for(period, run.page_size);
  policy.before_trim = [=](Run& at, int h) {
    Head& head = at.heads[static_cast<std::size_t>(h)];
    if (head.history.empty()) return;
    const Votes votes = votes_of(at, h, window, false);
    vote(head, votes, max_pooled(votes.shares, kernel));
  };
  return policy;
}

/// [tokens] mean over all keys of their cosine with each, every key exempting the latest that is too similar to it.
std::vector<double> likeness_of(Run& run, int h, double similarity) {
  Head& head = run.heads[static_cast<std::size_t>(h)];
  std::vector<int> positions;
  for (const Page& page : head.pages) {
    for (int position = page.first; position < page.end(); ++position) positions.push_back(position);
  }
  const std::size_t n = positions.size();
  std::vector<double> likeness(n);
  for (std::size_t i = 0; i < n; ++i) {
    std::vector<double> cosines(n);
    std::size_t exempted = n;
    for (std::size_t j = 0; j < n; ++j) {
      const float* a = run.key(h, positions[i]);
      const float* b = run.key(h, positions[j]);
      const double lengths = length_of(run, a) * length_of(run, b);
      cosines[j] = i == j || lengths == 0 ? 0 : run.dot(a, b) / lengths;
      if (i != j && std::abs(cosines[j] - similarity) < 1e-6) head.near_tie = true;
      if (i != j && cosines[j] > similarity) exempted = j;
    }
    for (std::size_t j = 0; j < n; ++j) likeness[j] += j == exempted ? 0 : cosines[j] / static_cast<double>(n);
  }
  return likeness;
}

Policy r_kv(const Run& run, double lambda, double similarity, int window, int kernel, int period) {
  Policy policy;
  policy.score = last_vote;
  policy.period = period;
  policy.trim_to_pages = run.budget_pages - naive::pages_for(period, run.page_size);
  policy.before_trim = [=](Run& at, int h) {
    Head& head = at.heads[static_cast<std::size_t>(h)];
    if (head.history.empty()) return;
    const int target = at.budget_pages - naive::pages_for(period, at.page_size);
    if (static_cast<int>(head.pages.size()) <= target) return;
    const Votes votes = votes_of(at, h, window, true);
    const std::vector<double> importance = max_pooled(votes.shares, kernel);
    const std::vector<double> likeness = likeness_of(at, h, similarity);
    double sum = 0;
    for (const double x : likeness) sum += std::exp(x);
    std::vector<double> scores;
    for (std::size_t i = 0; i < importance.size(); ++i) {
      scores.push_back(lambda * importance[i] - (1 - lambda) * std::exp(likeness[i]) / sum);
    }
    vote(head, votes, scores);
  };
  return policy;
}

std::uint32_t signature_of(Head& head, const float* row, int dim, std::uint64_t seed) {
  std::uint32_t bits = 0;
  for (int b = 0; b < 32; ++b) {
    double side = 0;
    double magnitude = 0;
    for (int i = 0; i < dim; ++i) {
      // The library's published numbers: a hash of the seed and the channel.
      const std::uint64_t seeded = TestRng(seed).next() ^ static_cast<std::uint64_t>(i);
      const bool plus = (TestRng(seeded).next() >> b & 1) != 0;
      side += (plus ? 1 : -1) * static_cast<double>(row[i]);
      magnitude += std::abs(static_cast<double>(row[i]));
    }
    if (std::abs(side) < 1e-6 * magnitude) head.near_tie = true;
    if (side > 0) bits |= std::uint32_t{1} << b;
  }
  return bits;
}

Policy hash_attention(const Run&, std::uint64_t seed) {
  Policy policy;
  policy.select = [=](Run& run, int h) {
    Head& head = run.heads[static_cast<std::size_t>(h)];
    const Page open = head.pages.back();
    Reads reads;
    if (static_cast<int>(head.pages.size()) > run.read_pages) {
      std::vector<std::pair<int, int>> far;  // distance, position
      for (const Page& page : head.pages) {
        for (int position = page.first; position < page.end() && page.first != open.first; ++position) {
          int nearest = 32;
          for (int g = 0; g < run.group(); ++g) {
            const std::uint32_t key = signature_of(head, run.key(h, position), run.trace->head_dim, seed);
            const std::uint32_t query = signature_of(head, run.query(h, run.t - 1, g), run.trace->head_dim, seed);
            nearest = std::min(nearest, std::popcount(key ^ query));
          }
          far.emplace_back(nearest, position);
        }
      }
      std::sort(far.begin(), far.end());
      far.resize(static_cast<std::size_t>(run.read_pages * run.page_size - open.tokens));
      for (const auto& [distance, position] : far) reads.push_back(position);
    } else {
      for (const Page& page : head.pages) {
        for (int position = page.first; position < page.end() && page.first != open.first; ++position) {
          reads.push_back(position);
        }
      }
    }
    for (int position = open.first; position < open.end(); ++position) reads.push_back(position);
    std::sort(reads.begin(), reads.end());
    return reads;
  };
  return policy;
}

Reads positions_of(const std::vector<Page>& pages, const std::vector<bool>& read) {
  Reads reads;
  for (std::size_t p = 0; p < pages.size(); ++p) {
    for (int position = pages[p].first; position < pages[p].end() && read[p]; ++position) reads.push_back(position);
  }
  return reads;
}

Policy hierarchical_top_k(const Run&) {
  Policy policy;
  policy.select = [](Run& run, int h) {
    Head& head = run.heads[static_cast<std::size_t>(h)];
    const auto size = static_cast<int>(head.pages.size());
    if (size <= run.read_pages) return positions_of(head.pages, std::vector<bool>(head.pages.size(), true));
    const int pages = size - 1;
    const int kept = run.read_pages - 1;
    std::vector<bool> read(head.pages.size(), false);
    read.back() = true;
    int width = 1;
    while (kept > 0 && width * 2 * kept < pages) width *= 2;
    std::vector<int> stretches;
    for (int first = 0; first < pages && kept > 0; first += width) stretches.push_back(first);
    while (!stretches.empty()) {
      std::vector<std::pair<double, int>> scored;  // minus the score, so that ties go to the oldest
      for (const int first : stretches) {
        const Page& middle = head.pages[static_cast<std::size_t>(first + std::min(width, pages - first) / 2)];
        double best = -std::numeric_limits<double>::infinity();
        for (int g = 0; g < run.group(); ++g) {
          best = std::max(best, run.dot(run.query(h, run.t - 1, g), run.key(h, middle.first + middle.tokens / 2)));
        }
        scored.emplace_back(-best, first);
      }
      std::sort(scored.begin(), scored.end());
      for (std::size_t i = 0; i < scored.size(); ++i) {
        for (std::size_t j = static_cast<std::size_t>(kept); i < static_cast<std::size_t>(kept) && j < scored.size();
             ++j) {
          zoo::note_order(head, scored[i].first, scored[j].first);
        }
      }
      scored.resize(std::min(scored.size(), static_cast<std::size_t>(kept)));
      stretches.clear();
      if (width == 1) {
        for (const auto& [score, page] : scored) read[static_cast<std::size_t>(page)] = true;
        break;
      }
      width /= 2;
      for (const auto& [score, first] : scored) {
        stretches.push_back(first);
        if (first + width < pages) stretches.push_back(first + width);
      }
    }
    return positions_of(head.pages, read);
  };
  return policy;
}

Policy half_space(const Run&, double epsilon) {
  Policy policy;
  policy.select = [=](Run& run, int h) {
    Head& head = run.heads[static_cast<std::size_t>(h)];
    std::vector<bool> read(head.pages.size(), true);
    if (head.history.empty()) return positions_of(head.pages, read);
    const auto& lse = head.history.back().lse;
    const double limit = *std::min_element(lse.begin(), lse.end()) + std::log(epsilon / run.page_size);
    for (std::size_t p = 0; p + 1 < head.pages.size(); ++p) {
      double bound = -std::numeric_limits<double>::infinity();
      naive::Page page;
      for (int position = head.pages[p].first; position < head.pages[p].end(); ++position) {
        page.positions.push_back(position);
      }
      for (int g = 0; g < run.group(); ++g) {
        bound =
            std::max(bound, naive::bound_of(*run.trace, page, run.t - 1, h, h * run.group() + g).value * run.scale());
      }
      read[p] = bound >= limit;
      if (std::abs(bound - limit) < 1e-5 * (1 + head.noise)) head.near_tie = true;
    }
    return positions_of(head.pages, read);
  };
  return policy;
}

/// Selects what one policy says and evicts as another does.
Policy composed(Policy evictor, const Policy& selector) {
  evictor.select = selector.select;
  return evictor;
}

/// The last decode step that used the page, ties by the mass of the last query that read it.
Policy raas(const Run&, double alpha) {
  Policy policy;
  policy.pin_prompt = true;
  policy.score = [=](const Run& run, int h, const Page& page) {
    Head& head = const_cast<Head&>(run.heads[static_cast<std::size_t>(h)]);
    int stamp = page.first;
    double last_mass = 0;
    for (const Seen& seen : head.history) {
      if (seen.mass.contains(page.first)) last_mass = seen.sum(page.first);
      if (seen.is_prompt) continue;
      if (seen.open_page == page.first || used(head, seen, page.first, alpha)) stamp = std::max(stamp, seen.position);
    }
    return stamp + last_mass / (1 + run.group());
  };
  return policy;
}

/// The best pages by Quest's bound; only_prompt: beside all pages without a prompt token, if these leave room.
Policy quest(const Run&, bool only_prompt) {
  Policy policy;
  policy.select = [=](Run& run, int h) {
    Head& head = run.heads[static_cast<std::size_t>(h)];
    const std::size_t size = head.pages.size();
    std::vector<bool> read(size, static_cast<int>(size) <= run.read_pages);
    read.back() = true;
    if (static_cast<int>(size) <= run.read_pages) return positions_of(head.pages, read);
    const auto of_prompt = [&](std::size_t p) { return head.pages[p].first < run.trace->prompt_tokens; };
    int decoded = 0;
    for (std::size_t p = 0; p < size; ++p) decoded += of_prompt(p) ? 0 : 1;
    const bool all_decoded = only_prompt && decoded < run.read_pages;
    for (std::size_t p = 0; p < size; ++p) read[p] = read[p] || (all_decoded && !of_prompt(p));
    std::vector<std::pair<double, std::size_t>> scored;  // minus the bound, so that ties go to the oldest
    for (std::size_t p = 0; p < size; ++p) {
      if (read[p]) continue;
      naive::Page page;
      for (int position = head.pages[p].first; position < head.pages[p].end(); ++position) {
        page.positions.push_back(position);
      }
      double bound = -std::numeric_limits<double>::infinity();
      for (int g = 0; g < run.group(); ++g) {
        bound = std::max(bound, naive::bound_of(*run.trace, page, run.t - 1, h, h * run.group() + g).value);
      }
      scored.emplace_back(-bound, p);
    }
    std::sort(scored.begin(), scored.end());
    const auto left = static_cast<std::size_t>(run.read_pages - std::count(read.begin(), read.end(), true));
    for (std::size_t i = 0; i < left; ++i) {
      read[scored[i].second] = true;
      for (std::size_t j = left; j < scored.size(); ++j) zoo::note_order(head, scored[i].first, scored[j].first);
    }
    return positions_of(head.pages, read);
  };
  return policy;
}

std::vector<ZooCase> zoo_cases() {
  return {
      {"KeyNorm", "key_norm", {}, key_norm},
      {"ValueAware", "value_aware", {}, value_aware},
      {"KeyDiff", "key_diff", {}, key_diff},
      {"Lrfu", "lrfu", {}, [](const Run& run) { return lrfu(run, 0.01, 0.995, true); }},
      {"LrfuThatForgetsFast",
       "lrfu",
       {{"decay", "0.7"}, {"alpha", "0.2"}, {"pin_prompt", "false"}},
       [](const Run& run) { return lrfu(run, 0.2, 0.7, false); }},
      {"Tova", "tova", {}, tova},
      {"AdaKv", "ada_kv", {{"window", "5"}}, [](const Run& run) { return ada_kv(run, 5, 0.2, false); }},
      {"AdaKvWithNoSafeguard",
       "ada_kv",
       {{"window", "2"}, {"safeguard", "0"}},
       [](const Run& run) { return ada_kv(run, 2, 0, false); }},
      {"AdaKvOfAPinnedPromptHeldBack",
       "ada_kv",
       {{"window", "9"}, {"safeguard", "0.8"}, {"pin_prompt", "true"}},
       [](const Run& run) { return ada_kv(run, 9, 0.8, true); }},
      {"AdaKvWithQuest",
       "ada_kv+quest",
       {{"window", "4"}},
       [](const Run& run) { return composed(ada_kv(run, 4, 0.2, false), quest(run, false)); }},
      {"LazyEviction", "lazy_eviction", {{"window", "9"}}, [](const Run& run) { return lazy_eviction(run, 0.01, 9); }},
      {"LazyEvictionOfRareUses",
       "lazy_eviction",
       {{"window", "6"}, {"alpha", "0.3"}},
       [](const Run& run) { return lazy_eviction(run, 0.3, 6); }},
      {"SnapKv", "snap_kv", {{"window", "5"}}, [](const Run& run) { return snap_kv(run, 5, 7, 0); }},
      {"SnapKvWhileDecoding",
       "snap_kv",
       {{"window", "7"}, {"kernel", "3"}, {"period", "8"}},
       [](const Run& run) { return snap_kv(run, 7, 3, 8); }},
      {"RKv", "r_kv", {{"period", "8"}, {"window", "4"}}, [](const Run& run) { return r_kv(run, 0.1, 0.5, 4, 7, 8); }},
      {"RKvOfImportance",
       "r_kv",
       {{"period", "5"}, {"window", "6"}, {"lambda", "0.9"}, {"similarity", "0.1"}, {"kernel", "1"}},
       [](const Run& run) { return r_kv(run, 0.9, 0.1, 6, 1, 5); }},
      {"HashAttention", "hash_attention", {}, [](const Run& run) { return hash_attention(run, 0); }, false},
      {"HashAttentionOfSeedSeven",
       "hash_attention",
       {{"seed", "7"}},
       [](const Run& run) { return hash_attention(run, 7); },
       false},
      {"HierarchicalTopK", "hierarchical_top_k", {}, hierarchical_top_k, false},
      {"HalfSpace", "half_space", {{"epsilon", "0.5"}}, [](const Run& run) { return half_space(run, 0.5); }, false},
      {"HalfSpaceThatSkipsMuch",
       "half_space",
       {{"epsilon", "0.9"}},
       [](const Run& run) { return half_space(run, 0.9); },
       false},
      {"RaasOverWhatIsDecodedQuestOverThePrompt",
       "raas+quest",
       {{"over", "prompt"}},
       [](const Run& run) { return composed(raas(run, 0.01), quest(run, true)); }},
      {"RaasOfRareUsesWithQuest",
       "raas+quest",
       {{"alpha", "0.15"}},
       [](const Run& run) { return composed(raas(run, 0.15), quest(run, false)); }},
      {"LrfuWithQuestOverThePrompt",
       "lrfu+quest",
       {{"over", "prompt"}, {"alpha", "0.1"}},
       [](const Run& run) { return composed(lrfu(run, 0.1, 0.995, true), quest(run, true)); }},
      {"TovaWithHierarchicalTopK",
       "tova+hierarchical_top_k",
       {},
       [](const Run& run) { return composed(tova(run), hierarchical_top_k(run)); }},
      {"LazyEvictionWithHalfSpace",
       "lazy_eviction+half_space",
       {{"window", "6"}, {"epsilon", "0.95"}},
       [](const Run& run) { return composed(lazy_eviction(run, 0.01, 6), half_space(run, 0.95)); }},
  };
}

// ---- the comparison -------------------------------------------------------------------------------------------------

struct Tally {
  long compared = 0;
  long excused = 0;
  long gone = 0;     // resident tokens fewer than the sequence
  long skipped = 0;  // read tokens fewer than resident
};

Reads positions_of(const std::vector<kvsparse::Position>& positions) {
  Reads reads;
  for (const kvsparse::Position position : positions) reads.push_back(static_cast<int>(position.value));
  return reads;
}

class ZooOracle : public testing::TestWithParam<ZooCase> {
 protected:
  void compare(const NaiveTrace& trace, int page_size, int budget_pages, int read_pages, ScalarType scalar,
               Tally& tally) const {
    const ZooCase& zoo_case = GetParam();
    NaiveTrace stored = trace;
    if (scalar == ScalarType::f16) stored = store_as<kvsparse::Half>(trace);
    zoo::Run run;
    run.trace = &stored;
    run.page_size = page_size;
    run.budget_pages = budget_pages;
    run.read_pages = read_pages;
    run.heads.resize(static_cast<std::size_t>(trace.kv_heads));
    const Policy oracle = zoo_case.oracle(run);

    CacheConfig config;
    config.query_heads = static_cast<std::size_t>(trace.query_heads);
    config.kv_heads = static_cast<std::size_t>(trace.kv_heads);
    config.head_dim = static_cast<std::size_t>(trace.head_dim);
    config.page_size = static_cast<std::size_t>(page_size);
    config.budget_tokens = static_cast<std::size_t>(budget_pages * page_size);
    config.read_budget_tokens = static_cast<std::size_t>(read_pages * page_size);
    config.max_tokens = static_cast<std::size_t>(trace.tokens);
    kvsparse::AnyCache cache = zoo_cache(zoo_case.policy, scalar, config, zoo_case.settings);

    const bool shares = oracle.floor_pages > 0;
    const std::size_t most = zoo_case.evicts ? config.budget_tokens : config.max_tokens;
    const auto group = static_cast<std::size_t>(run.group());
    const auto dim = config.head_dim;
    std::vector<float> out(config.query_heads * dim);
    std::vector<float> lse(config.query_heads);
    std::vector<bool> excused(config.kv_heads, false);
    const auto token = [&](const std::vector<float>& data, int t) {
      const std::size_t row = data.size() / static_cast<std::size_t>(trace.tokens);
      return std::span<const float>(data).subspan(static_cast<std::size_t>(t) * row, row);
    };
    for (int t = 0; t < trace.tokens; ++t) {
      const bool is_prompt = t < trace.prompt_tokens;
      const kvsparse::Status appended = is_prompt ? cache.append_prompt(token(trace.k, t), token(trace.v, t))
                                                  : cache.append(token(trace.k, t), token(trace.v, t));
      ASSERT_TRUE(appended.ok()) << appended.message();
      zoo::append(run, oracle);
      ASSERT_TRUE(cache.attend(token(trace.q, t), out, lse).ok());
      std::size_t held = 0;
      for (std::size_t h = 0; h < config.kv_heads; ++h) {
        Head& head = run.heads[h];
        const zoo::Answer answer = zoo::attend(run, static_cast<int>(h), oracle);
        const Reads resident = positions_of(cache.resident_positions(h));
        const Reads read = positions_of(cache.read_positions(h));
        held += resident.size();
        ASSERT_LE(resident.size(), shares ? config.kv_heads * most : most);
        const bool same = resident == answer.resident && read == answer.read;
        if (!same && head.near_tie) excused[h] = true;
        if (excused[h]) {
          ++tally.excused;
          continue;
        }
        ASSERT_EQ(resident, answer.resident) << "resident at token " << t << ", kv head " << h;
        ASSERT_EQ(read, answer.read) << "read at token " << t << ", kv head " << h;
        ++tally.compared;
        tally.gone += answer.resident.size() < static_cast<std::size_t>(t + 1) ? 1 : 0;
        tally.skipped += answer.read.size() < answer.resident.size() ? 1 : 0;
        for (std::size_t q = 0; q < group; ++q) {
          ASSERT_NEAR(static_cast<double>(lse[h * group + q]), answer.lse[q], 1e-4 * (1.0 + std::abs(answer.lse[q])));
          for (std::size_t i = 0; i < dim; ++i) {
            ASSERT_NEAR(static_cast<double>(out[(h * group + q) * dim + i]), answer.out[q * dim + i], 1e-4);
          }
        }
      }
      ASSERT_LE(held, config.kv_heads * most);
      // A layer's heads decide together, so they are excused together.
      if ((oracle.layer_scope || shares) && std::find(excused.begin(), excused.end(), true) != excused.end()) {
        excused.assign(excused.size(), true);
      }
    }
  }

  static void expect_meaningful(const Tally& tally) {
    EXPECT_LE(tally.excused, (tally.compared + tally.excused) / 20) << "near-ties hid too much";
    const bool selects = !GetParam().evicts || GetParam().policy.find('+') != std::string::npos;
    EXPECT_GT(GetParam().evicts ? tally.gone : tally.compared, tally.compared / 20) << "nothing was given up";
    EXPECT_GT(selects ? tally.skipped : tally.compared, tally.compared / 50) << "nothing was left unread";
  }
};

TEST_P(ZooOracle, DecidesAsItsFormulaSays) {
  Tally tally;
  int round = 0;
  for (const int page_size : {1, 3, 4, 16}) {
    for (const ScalarType scalar : {ScalarType::f32, ScalarType::f16}) {
      const int group = 1 << (round % 3);
      // Prompt: none, part of a page, whole pages; the budget holds it and the slack of the periodic ones.
      const int prompts[] = {0, page_size + 1, 2 * page_size, 23};
      TraceShape shape{60 + 6 * page_size, 2 * group, 2, round % 2 == 0 ? 24 : 40, prompts[round % 4]};
      const int budget_pages = naive::pages_for(shape.prompt_tokens + 12, page_size) + 2;
      shape.tokens = std::max(shape.tokens, (budget_pages + 3) * page_size);
      SCOPED_TRACE("page size " + std::to_string(page_size) + ", round " + std::to_string(round));
      const auto seed = static_cast<std::uint64_t>(100 + round);
      const NaiveTrace trace = round % 2 == 0 ? gaussian_trace(shape, seed, 2.0) : milestone_trace(shape, seed);
      compare(trace, page_size, budget_pages, 2 + round % 4, scalar, tally);
      if (HasFatalFailure()) return;
      ++round;
    }
  }
  expect_meaningful(tally);
}

TEST_P(ZooOracle, FollowsItsFormulaThroughManyEvictions) {
  Tally tally;
  compare(milestone_trace({400, 4, 2, 32, 21}, 5), 4, 14, 5, ScalarType::f32, tally);
  if (HasFatalFailure()) return;
  expect_meaningful(tally);
}

/// A chunk of a prompt that evicts for itself before its queries attend: none of its pages may count as unwanted.
TEST(UnseenPages, OfALongPromptOutlastWhatQueriesHaveSeen) {
  CacheConfig config;
  config.query_heads = 4;
  config.kv_heads = 2;
  config.head_dim = 8;
  config.page_size = 2;
  config.budget_tokens = 16;
  constexpr std::size_t seen = 14, chunk = 21;
  const Rows rows(seen + chunk, config, 3);
  for (const std::string policy : {"tova", "ada_kv"}) {
    Settings settings;
    if (policy == "ada_kv") settings.push_back({"window", "1"});  // no other page stays for being new
    kvsparse::AnyCache cache = kvsparse_test::zoo_cache(policy, ScalarType::f32, config, settings);
    std::vector<float> out(4 * 8);
    for (std::size_t t = 0; t < seen; ++t) {
      ASSERT_TRUE(cache.append_prompt(rows.token_k(t), rows.token_v(t)).ok());
      ASSERT_TRUE(cache.attend(rows.token_q(t), out).ok());
    }
    const auto of_chunk = [&](const std::vector<float>& all) { return std::span(all).subspan(seen * 2 * 8); };
    ASSERT_TRUE(cache.append_prompt(of_chunk(rows.k), of_chunk(rows.v)).ok());
    for (std::size_t h = 0; h < config.kv_heads; ++h) {
      const auto kept = cache.resident_positions(h);
      ASSERT_FALSE(kept.empty());
      for (const auto position : kept) EXPECT_GE(position.value, static_cast<std::int64_t>(seen)) << policy;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, ZooOracle, testing::ValuesIn(zoo_cases()),
                         [](const auto& instance) { return instance.param.title; });

}  // namespace
}  // namespace kvsparse_test
