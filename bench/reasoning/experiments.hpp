// SPDX-License-Identifier: Apache-2.0
// The experiments of `reasoning` as data. A sweep is every combination of its lists; an experiment is several sweeps,
// and what they have in common is measured once. The settings were frozen before the tables were made.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "lemma_chain.hpp"

namespace kvsparse_tools {

struct Sweep {
  std::vector<std::string> models;  // by name; empty: all that are given
  LineFormat format = LineFormat::plain;
  std::vector<std::string> sets;
  std::vector<std::string> policies;  // as parse_variant reads them
  std::vector<std::size_t> page_sizes;
  std::vector<std::size_t> budgets;
  std::size_t lines = 48;
};

struct Experiment {
  std::string name;  // empty: put together on the command line
  std::size_t problems = 128;
  std::vector<Sweep> sweeps;
  bool has_checks = false;  // see gate.hpp
};

namespace experiments {

using Texts = std::vector<std::string>;

/// The ones that every picture shows.
inline const Texts main_policies{
    "dense", "streaming_llm", "streaming_llm:pin_prompt=true",       "h2o", "h2o:pin_prompt=true", "random", "quest",
    "raas",  "kindred",       "raas:evidence=quest_bound:alpha=0.01"};

/// The main ones, RaaS by the letter of its two papers, Random without the pin, the ceiling, and a composition
/// that reads half of what it keeps.
inline Texts all_policies() {
  Texts texts = main_policies;
  texts.insert(texts.end(), {"raas:preset=paper_v1", "raas:preset=paper_v2", "raas:used=rank", "raas:pin_prompt=false",
                             "random:pin_prompt=false", "oracle", "raas+quest:read_share=0.5"});
  return texts;
}

inline Experiment quick() {
  const Sweep sweep{{"main", "plain"}, LineFormat::plain, {"fall", "uniform"}, main_policies, {4}, {192, 256, 384}};
  return {"quick", 32, {sweep}, false};
}

inline Experiment full() {
  const LineFormat plain = LineFormat::plain;
  const Texts other_sets{"mile", "lru", "age", "uniform", "fall:gmax=4", "fall:gmax=12"};
  const std::vector<std::size_t> two{256, 384};
  Texts alphas, ranks;
  for (const char* alpha : {"1e-4", "1e-3", "0.003", "0.01", "0.03", "0.1", "0.2"}) {
    alphas.push_back(std::string("raas:alpha=") + alpha);
    alphas.push_back(std::string("raas:evidence=quest_bound:alpha=") + alpha);
  }
  for (const char* r : {"0.05", "0.1", "0.25", "0.5", "0.75"}) {
    ranks.push_back(std::string("raas:used=rank:r=") + r);
    ranks.push_back(std::string("raas:preset=paper_v2:r=") + r);
  }
  return {"full",
          128,
          {{{"main"}, plain, {"fall"}, all_policies(), {4, 16}, {96, 128, 160, 192, 224, 256, 320, 384, 512}},
           {{"main"}, plain, other_sets, all_policies(), {4}, two},
           {{"main"}, plain, {"fall"}, alphas, {4}, {256}},
           {{"main"}, plain, {"fall"}, ranks, {4}, {256}},
           // What of it is the training's luck: the same recipe from other random numbers.
           {{"main_seed2", "main_seed3"}, plain, {"fall", "uniform"}, main_policies, {4}, {192, 256, 384}},
           // By token: the evictors at their finest, and H2O as its paper has it.
           {{"main"}, plain, {"fall", "uniform"}, {"raas", "h2o", "h2o:pin_prompt=true"}, {1}, {192, 256, 384}},
           {{"plain"}, plain, {"fall", "uniform"}, all_policies(), {4}, two},
           {{"plain"}, plain, {"fall"}, alphas, {4}, {256}},
           {{"varied"}, LineFormat::varied, {"fall", "uniform"}, all_policies(), {4}, {192, 256, 384, 512}}},
          false};
}

/// One chain of 4200 tokens after a prompt of 23: budgets from 1/40 to 1/5 of the sequence.
inline Experiment long_chains() {
  const std::size_t lines = 350;
  const Texts policies{"dense", "streaming_llm:pin_prompt=true", "h2o:pin_prompt=true", "random", "quest", "raas"};
  return {"long",
          32,
          {{{"long"}, LineFormat::long_labels, {"fall", "uniform"}, policies, {4}, {104, 212, 424, 848}, lines},
           {{"long"}, LineFormat::long_labels, {"mile", "lru", "age"}, {"dense"}, {4}, {0}, lines}},
          false};
}

/// Rules that might do better than RaaS where gaps are long. `names` are those of bench/reasoning/ideas.
inline Experiment ideas(const Texts& names) {
  Texts policies{"dense", "quest", "raas", "kindred", "h2o:pin_prompt=true", "random"};
  policies.insert(policies.end(), names.begin(), names.end());
  const Texts pages_compared{"raas", "kindred"};
  return {"ideas",
          128,
          {{{"main"}, LineFormat::plain, {"mile", "fall", "lru", "age", "uniform"}, policies, {4}, {256, 384}},
           {{"main"}, LineFormat::plain, {"mile", "fall"}, pages_compared, {1, 2, 5, 8, 16}, {256}},
           {{"plain"}, LineFormat::plain, {"mile", "fall"}, pages_compared, {4}, {256, 384}},
           {{"varied"}, LineFormat::varied, {"mile", "fall"}, pages_compared, {4}, {256, 384}}},
          false};
}

/// What must hold of the gate's first sweep: shares of right answers.
struct GateBound {
  const char* policy;
  double share;
  bool at_least;  // else at most
};
inline constexpr GateBound gate_bounds[] = {
    {"dense", 0.95, true}, {"raas", 0.90, true}, {"quest", 0.90, true}, {"streaming_llm", 0.40, false}};
/// No budget at all for these problems of at most 688 tokens: every policy then decodes what dense decodes.
inline constexpr std::size_t unlimited_budget = 1024;

inline Experiment gate(const Texts& every_policy) {
  Texts bounded;
  for (const GateBound& bound : gate_bounds) bounded.emplace_back(bound.policy);
  return {"gate",
          32,
          {{{"main"}, LineFormat::plain, {"fall"}, bounded, {4}, {256}},
           {{"main"}, LineFormat::plain, {"fall"}, every_policy, {4}, {unlimited_budget}}},
          true};
}

}  // namespace experiments

}  // namespace kvsparse_tools
