// SPDX-License-Identifier: Apache-2.0
// Decodes a recorded trace of one attention layer with Certified at several epsilons: which part of the resident pages
// a proof of "at most epsilon of the softmax is unread" takes, beside what the truth would take and what was lost.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <iostream>
#include <kvsparse/attention/exact.hpp>
#include <kvsparse/cache/attend_certified.hpp>
#include <kvsparse/policy/certified.hpp>
#include <span>
#include <string>
#include <vector>

#include "common/file_error.hpp"
#include "common/option_lists.hpp"
#include "common/program.hpp"
#include "common/text_table.hpp"
#include "common/trace.hpp"

namespace {

using namespace kvsparse_tools;
using kvsparse::Position;

struct Options {
  std::string trace_file;
  std::vector<double> epsilons{0.3, 0.1, 0.03, 0.01, 0.001};
  std::size_t page_size = 16;
};

/// Over all decode queries: pages by kv head, shares of the softmax by query head.
struct Outcome {
  double pages_resident = 0.0, pages_read = 0.0, pages_of_oracle = 0.0;
  double proved = 0.0, lost = 0.0, largest_lost = 0.0;
  std::size_t queries = 0;
};

/// [pages, group] each page's exact share of the softmax of the newest token's query heads.
std::vector<double> page_masses(const Trace& trace, std::size_t token, std::size_t kv_head, std::size_t page_size,
                                double scale) {
  const std::size_t group = trace.query_heads / trace.kv_heads;
  std::vector<double> masses((token / page_size + 1) * group);
  for (std::size_t g = 0; g < group; ++g) {
    const auto row = [&](auto&& rows, std::size_t t) {
      return rows(t).subspan(kv_head * trace.head_dim, trace.head_dim);
    };
    const auto exact = kvsparse::exact_attention(
        trace.query(token).subspan((kv_head * group + g) * trace.head_dim, trace.head_dim), token + 1,
        [&](std::size_t t) { return row([&](std::size_t i) { return trace.key(i); }, t); },
        [&](std::size_t t) { return row([&](std::size_t i) { return trace.value(i); }, t); }, scale);
    for (std::size_t t = 0; t <= token; ++t) masses[t / page_size * group + g] += exact.weights[t];
  }
  return masses;
}

/// The fewest pages, by their largest mass, that leave no query head of the group more than epsilon.
std::size_t fewest_pages(const std::vector<double>& masses, std::size_t group, double epsilon) {
  const std::size_t pages = masses.size() / group;
  std::vector<std::size_t> order(pages);
  for (std::size_t page = 0; page < pages; ++page) order[page] = page;
  const auto peak = [&](std::size_t page) {
    const auto first = masses.begin() + static_cast<std::ptrdiff_t>(page * group);
    return *std::max_element(first, first + static_cast<std::ptrdiff_t>(group));
  };
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return peak(a) < peak(b); });
  std::vector<double> left(group);
  for (std::size_t i = 0; i < pages; ++i) {
    for (std::size_t g = 0; g < group; ++g) {
      left[g] += masses[order[i] * group + g];
      if (left[g] > epsilon) return pages - i;
    }
  }
  return 0;
}

Outcome decode(const Trace& trace, std::size_t page_size, double epsilon) {
  kvsparse::CacheConfig config;
  config.query_heads = trace.query_heads;
  config.kv_heads = trace.kv_heads;
  config.head_dim = trace.head_dim;
  config.page_size = page_size;
  config.read_budget_tokens = page_size;
  config.max_tokens = trace.tokens;
  kvsparse::Certified policy;
  policy.options.epsilon = epsilon;
  kvsparse::PagedKvCache<kvsparse::Certified> cache(config, policy);
  const auto require = [](kvsparse::Status status) {
    if (!status) throw std::runtime_error(status.message());
  };
  const std::size_t group = trace.query_heads / trace.kv_heads;
  std::vector<float> out(trace.query_heads * trace.head_dim), proved(trace.query_heads);
  Outcome outcome;
  for (std::size_t t = 0; t < trace.tokens; ++t) {
    if (t < trace.prompt_tokens) {
      require(cache.append_prompt(trace.key(t), trace.value(t)));
      continue;
    }
    require(cache.append(trace.key(t), trace.value(t)));
    require(kvsparse::attend_certified(cache, trace.query(t), std::span<float>(out), {}, proved));
    for (std::size_t h = 0; h < trace.kv_heads; ++h) {
      const std::vector<double> masses =
          page_masses(trace, t, h, page_size, static_cast<double>(cache.softmax_scale()));
      std::vector<bool> was_read(masses.size() / group, false);
      for (const Position position : cache.read_positions(h)) {
        was_read[static_cast<std::size_t>(position.value) / page_size] = true;
      }
      outcome.pages_resident += static_cast<double>(was_read.size());
      outcome.pages_read += static_cast<double>(std::count(was_read.begin(), was_read.end(), true));
      outcome.pages_of_oracle += static_cast<double>(fewest_pages(masses, group, epsilon));
      for (std::size_t g = 0; g < group; ++g) {
        double lost = 0.0;
        for (std::size_t page = 0; page < was_read.size(); ++page)
          lost += was_read[page] ? 0.0 : masses[page * group + g];
        outcome.lost += lost;
        outcome.largest_lost = std::max(outcome.largest_lost, lost);
        outcome.proved += static_cast<double>(proved[h * group + g]);
        ++outcome.queries;
      }
    }
  }
  return outcome;
}

int run(CLI::App& app, int argc, char** argv) {
  Options options;
  app.add_option("--trace", options.trace_file, "safetensors file of one layer, as decode --record-trace writes it")
      ->required();
  app.add_option("--epsilon", options.epsilons, "shares of the softmax that may stay unread, separated by commas")
      ->delimiter(',')
      ->check(CLI::Range(1e-9, 1.0 - 1e-9));
  app.add_option("--page-size", options.page_size, "tokens per page [16]")->check(CLI::Range(1, 256));
  app.parse(argc, argv);
  const Trace trace = load_trace(options.trace_file);
  std::cout << trace.tokens << " tokens, " << trace.prompt_tokens << " of them prompt, pages of " << options.page_size
            << "; pages in % of the resident ones, shares of the softmax per query head\n";
  TextTable table({"epsilon", "pages read", "oracle", "proved, mean", "lost, mean", "lost, largest"});
  for (const double epsilon : options.epsilons) {
    const Outcome outcome = decode(trace, options.page_size, epsilon);
    const auto queries = static_cast<double>(outcome.queries);
    table.add_row({fixed_text(epsilon, 4), fixed_text(100.0 * outcome.pages_read / outcome.pages_resident, 1),
                   fixed_text(100.0 * outcome.pages_of_oracle / outcome.pages_resident, 1),
                   fixed_text(outcome.proved / queries, 6), fixed_text(outcome.lost / queries, 6),
                   fixed_text(outcome.largest_lost, 6)});
  }
  table.print(std::cout);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Counts the pages that a proof of little lost mass takes.", "certificate");
  return run_program(app, "the trace does not fit into memory", [&] { return run(app, argc, argv); });
}
