// SPDX-License-Identifier: Apache-2.0
// What each layer of a model gets: its policy, storage types, budget and window. Layers need not be alike.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "../core/scalar.hpp"
#include "../policy/options.hpp"
#include "cache_config.hpp"

namespace kvsparse {

/// One layer, by names. Which pairs of keys and values there are caches for is the affair of who makes them.
struct LayerChoice {
  std::string policy = "dense";             ///< a name of the name table
  std::vector<OptionSetting> options = {};  ///< of that policy; the others have their defaults
  ScalarType keys = ScalarType::f32;        ///< what keys are stored in
  ScalarType values = ScalarType::f32;      ///< what values are stored in
  CacheConfig config;                       ///< shape and budget
};

/// The layers of a model, lowest first; element l has config.layer = l.
using LayerSchedule = std::vector<LayerChoice>;

/// Every layer the same.
inline LayerSchedule uniform_schedule(std::size_t layers, const LayerChoice& layer) {
  LayerSchedule schedule(layers, layer);
  for (std::size_t l = 0; l < layers; ++l) schedule[l].config.layer = l;
  return schedule;
}

/// The first `layers` layers keep everything, whatever the others do: their config.max_tokens must be set.
inline void keep_first_layers_dense(LayerSchedule& schedule, std::size_t layers) {
  for (LayerChoice& layer : std::span(schedule).first(std::min(layers, schedule.size()))) {
    layer.policy = "dense";
    layer.options.clear();
  }
}

/// budgets[i] becomes the budget_tokens of the i-th of these layers. Throws ConfigError if there are not as many.
inline void set_budgets(std::span<LayerChoice> layers, std::span<const std::size_t> budgets) {
  if (budgets.size() != layers.size()) {
    detail::refuse(detail::quoted(budgets.size()) + " budgets came for " + detail::quoted(layers.size()) + " layers");
  }
  for (std::size_t i = 0; i < layers.size(); ++i) layers[i].config.budget_tokens = budgets[i];
}

namespace detail {

/// Whole pages in proportion to the weights, that sum to `pages`; a layer is less than a page off its share. Rounded by
/// largest remainders, so that a layer of larger weight never gets less; ties go to the lower layer.
inline std::vector<std::size_t> share_pages(std::span<const double> weights, std::size_t pages) {
  const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
  std::vector<std::size_t> shares(weights.size());
  std::vector<double> remainders(weights.size());
  std::size_t left = pages;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const double exact = static_cast<double>(pages) * weights[i] / sum;
    shares[i] = std::min(left, static_cast<std::size_t>(exact));
    remainders[i] = exact - static_cast<double>(shares[i]);
    left -= shares[i];
  }
  std::vector<std::size_t> order(weights.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return remainders[a] > remainders[b]; });
  for (std::size_t i = 0; i < left; ++i) ++shares[order[i]];
  return shares;
}

}  // namespace detail

/// How PyramidKV (2406.02069) spreads a budget: linearly less from the lowest layer to the highest.
struct Pyramid {
  double beta = 20.0;             ///< the highest layer gets 1 / beta of the average; 1 gives every layer the same
  std::size_t window_tokens = 0;  ///< that every layer gets beside its share, in whole pages; at least one page
};

/// Budgets of `layers` layers in tokens, whole pages, that sum to total_tokens rounded down to a page. Throws
/// ConfigError when the total does not hold a window for each layer, or beta < 1.
inline std::vector<std::size_t> pyramid_budgets(std::size_t layers, std::size_t total_tokens, std::size_t page_size,
                                                const Pyramid& pyramid = {}) {
  using detail::quoted;
  if (layers == 0 || page_size == 0) {
    detail::refuse("a budget for " + quoted(layers) + " layers in pages of " + quoted(page_size) +
                   " tokens has no sense");
  }
  if (!(pyramid.beta >= 1.0)) detail::refuse("beta = " + std::to_string(pyramid.beta) + " is less than 1");
  const std::size_t window_pages = std::max<std::size_t>(1, divide_up(pyramid.window_tokens, page_size));
  const std::size_t pages = total_tokens / page_size;
  if (pages / layers < window_pages) {
    detail::refuse("total_tokens = " + quoted(total_tokens) + " is less than " + quoted(window_pages) + " pages of " +
                   quoted(page_size) + " tokens for each of " + quoted(layers) + " layers");
  }
  std::vector<double> weights(layers, 1.0);
  const double lowest = 1.0 / pyramid.beta;
  const double highest = 2.0 - lowest;
  for (std::size_t l = 0; layers > 1 && l < layers; ++l) {
    weights[l] = highest - static_cast<double>(l) * (highest - lowest) / static_cast<double>(layers - 1);
  }
  std::vector<std::size_t> budgets = detail::share_pages(weights, pages - layers * window_pages);
  for (std::size_t& budget : budgets) budget = (budget + window_pages) * page_size;
  return budgets;
}

/// The same for every layer, as nearly as whole pages allow; the lower layers get what is left over.
inline std::vector<std::size_t> uniform_budgets(std::size_t layers, std::size_t total_tokens, std::size_t page_size) {
  return pyramid_budgets(layers, total_tokens, page_size, {.beta = 1.0, .window_tokens = 0});
}

}  // namespace kvsparse
