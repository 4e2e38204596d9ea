// SPDX-License-Identifier: Apache-2.0
// Policies decode side by side; at checkpoints they take turns being timed, so that noise meets all of them alike.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "common/file_error.hpp"
#include "common/interrupt.hpp"
#include "curve_layer.hpp"
#include "micro/cache_sizes.hpp"
#include "micro/rival_load.hpp"

namespace kvsparse_bench {

/// A policy at a checkpoint.
struct CurvePoint {
  std::string policy;
  double tokens = 0.0;  // decoded so far, in the middle of the timed steps
  double step_seconds = 0.0;
  double least_seconds = 0.0;
  PhaseTimes phases;
  std::size_t resident_tokens = 0;
  std::size_t resident_bytes = 0;
  std::size_t allocated_bytes = 0;
  double resident_growth = 0.0;
  std::size_t allocations = 0;
  bool disturbed = false;
};

/// Time per step late in the decode against early, both measured at the end in turns.
struct Flatness {
  std::string policy;
  std::size_t early_tokens = 0, late_tokens = 0;
  double early_seconds = 0.0, late_seconds = 0.0;
  bool disturbed = false;
};

class DecodeCurve {
 public:
  static constexpr std::size_t warm_steps = 2;   // untimed, after another policy has had the caches
  static constexpr std::size_t turn_steps = 16;  // a page of the usual size: one victim a turn
  static constexpr std::size_t phased_blocks = 5;

  explicit DecodeCurve(const CurveOptions& options) : options_(options) {
    for (std::size_t tokens = 1000; tokens < options.tokens; tokens *= 2) checkpoints_.push_back(tokens);
    checkpoints_.push_back(options.tokens);
    refuse_what_does_not_fit();
    for (const std::string& name : options.policies) {
      visit_policy(name, [&]<class Policy>() {
        if (!phases_agree<Policy, kvsparse::Half>()) {
          throw std::logic_error("a step of " + name + " taken apart computes something else than attend");
        }
        layers_.emplace_back([&] { return std::make_unique<PolicyLayer<Policy>>(options_, room()); });
      });
    }
  }

  const std::vector<std::size_t>& checkpoints() const { return checkpoints_; }
  const std::vector<CurvePoint>& points() const { return points_; }
  const std::vector<Flatness>& flatness() const { return flatness_; }
  const RivalLoad& rival() const { return rival_; }

  /// Brings every policy that goes so far to the checkpoint and measures it there. False if interrupted.
  template <class Progress>
  bool run_to(std::size_t checkpoint, Progress&& progress) {
    std::vector<MeasuredLayer*> running;
    for (MeasuredLayer& layer : layers_) {
      if (!layer.layer().evicts() && checkpoint > options_.dense_tokens) continue;
      if (!decode_to(layer, checkpoint - window() / 2, progress)) return false;
      running.push_back(&layer);
    }
    if (running.empty()) return true;
    std::vector<CurvePoint> points;
    for (std::size_t attempt = 0; attempt <= options_.retries; ++attempt) {
      rival_.begin_round();
      points = measure(running);
      const bool disturbed = rival_.end_round();
      for (CurvePoint& point : points) point.disturbed = disturbed;
      if (!disturbed) break;
    }
    points_.insert(points_.end(), points.begin(), points.end());
    // The first checkpoint at which every budget is full is what the end is held against.
    if (snapshots_.empty() && checkpoint >= 2000 && checkpoint >= options_.budget + window()) {
      for (MeasuredLayer* layer : running) {
        if (layer->layer().evicts()) snapshots_.push_back(layer->layer().clone());
      }
    }
    return true;
  }

  /// After the last checkpoint: the layers as they are now and as they were early on take turns.
  void measure_flatness() {
    for (const auto& early : snapshots_) {
      CurveLayer& late = named(early->name());
      Flatness flat{early->name(), early->tokens(), late.tokens(), 0.0, 0.0, false};
      for (std::size_t attempt = 0; attempt <= options_.retries; ++attempt) {
        std::vector<double> early_seconds, late_seconds;
        rival_.begin_round();
        for (std::size_t turn = 0; turn < 2 * options_.turns; ++turn) {
          timed_turn(*early, early_seconds);
          timed_turn(late, late_seconds);
        }
        flat.disturbed = rival_.end_round();
        flat.early_seconds = median(early_seconds);
        flat.late_seconds = median(late_seconds);
        if (!flat.disturbed) break;
      }
      flatness_.push_back(flat);
    }
  }

 private:
  /// Steps that a checkpoint takes.
  std::size_t window() const { return options_.turns * (warm_steps + turn_steps) + 1 + phased_blocks * block_steps(); }
  /// Steps taken apart together: whole pages, so that each block pays for as many victims as any other.
  std::size_t block_steps() const { return kvsparse::round_up(turn_steps, options_.shape.page_size); }
  std::size_t room() const { return options_.dense_tokens + window() * (options_.retries + 2); }

  void refuse_what_does_not_fit() const {
    double wanted = 0.0;
    for (const std::string& name : options_.policies) {
      visit_policy(name, [&]<class Policy>() {
        using Cache = kvsparse::PagedKvCache<Policy, kvsparse::Half>;
        wanted += static_cast<double>(Cache::bytes_required({.query_heads = options_.shape.query_heads,
                                                             .kv_heads = options_.shape.kv_heads,
                                                             .head_dim = options_.shape.head_dim,
                                                             .page_size = options_.shape.page_size,
                                                             .budget_tokens = options_.budget,
                                                             .max_tokens = room()}));
      });
    }
    const std::size_t available = available_memory();
    if (available == 0 || wanted < 0.8 * static_cast<double>(available)) return;
    throw kvsparse_tools::UsageError("the caches need " + std::to_string(static_cast<std::size_t>(wanted) >> 20) +
                                     " MiB, " + std::to_string(available >> 20) +
                                     " MiB of memory are available; lower --dense-tokens or --budget");
  }

  template <class Progress>
  bool decode_to(MeasuredLayer& layer, std::size_t tokens, Progress& progress) {
    constexpr std::size_t between_looks = 512;
    while (layer.layer().tokens() < tokens) {
      if (kvsparse_tools::interrupted()) return false;
      const std::size_t steps = std::min(between_looks, tokens - layer.layer().tokens());
      layer.in_turn([&] {
        for (std::size_t i = 0; i < steps; ++i) {
          if (layer.layer().evicts()) {
            layer.layer().timed_step();
          } else {
            layer.layer().append();
          }
        }
      });
      progress(layer.layer().evicts() ? steps : 0);
    }
    return true;
  }

  static void timed_turn(CurveLayer& layer, std::vector<double>& seconds) {
    for (std::size_t i = 0; i < warm_steps; ++i) layer.timed_step();
    for (std::size_t i = 0; i < turn_steps; ++i) seconds.push_back(layer.timed_step());
  }

  std::vector<CurvePoint> measure(const std::vector<MeasuredLayer*>& running) {
    std::vector<CurvePoint> points(running.size());
    std::vector<std::vector<double>> seconds(running.size());
    for (std::size_t i = 0; i < running.size(); ++i) {
      seconds[i].reserve(options_.turns * turn_steps);  // so that a turn's allocations are the layer's
      points[i].tokens =
          static_cast<double>(running[i]->layer().tokens() + options_.turns * (warm_steps + turn_steps) / 2);
    }
    for (std::size_t turn = 0; turn < options_.turns; ++turn) {
      for (std::size_t i = 0; i < running.size(); ++i) {
        running[i]->in_turn([&] { timed_turn(running[i]->layer(), seconds[i]); });
      }
    }
    for (std::size_t i = 0; i < running.size(); ++i) {
      CurvePoint& point = points[i];
      running[i]->in_turn([&] {
        running[i]->layer().timed_step();
        point.phases = median_block(running[i]->layer());
      });
      point.policy = running[i]->layer().name();
      point.step_seconds = median(seconds[i]);
      point.least_seconds = *std::min_element(seconds[i].begin(), seconds[i].end());
      point.resident_tokens = running[i]->layer().resident_tokens();
      point.resident_bytes = running[i]->layer().resident_bytes();
      point.allocated_bytes = running[i]->allocated_bytes();
      point.resident_growth = running[i]->resident_growth();
      point.allocations = running[i]->allocations();
    }
    return points;
  }

  /// Of the blocks, the one whose total is the median: a scheduler's slice that falls into a phase spoils one block.
  PhaseTimes median_block(CurveLayer& layer) const {
    std::array<PhaseTimes, phased_blocks> blocks;
    for (PhaseTimes& block : blocks) {
      for (std::size_t step = 0; step < block_steps(); ++step) layer.phased_step(block);
    }
    const auto middle = blocks.begin() + phased_blocks / 2;
    std::nth_element(blocks.begin(), middle, blocks.end(),
                     [](const PhaseTimes& a, const PhaseTimes& b) { return a.total() < b.total(); });
    return *middle;
  }

  CurveLayer& named(const std::string& name) {
    return std::find_if(layers_.begin(), layers_.end(), [&](MeasuredLayer& l) { return l.layer().name() == name; })
        ->layer();
  }

  const CurveOptions& options_;
  std::vector<std::size_t> checkpoints_;
  std::deque<MeasuredLayer> layers_;
  std::vector<std::unique_ptr<CurveLayer>> snapshots_;
  std::vector<CurvePoint> points_;
  std::vector<Flatness> flatness_;
  RivalLoad rival_;
};

}  // namespace kvsparse_bench
