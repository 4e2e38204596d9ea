// SPDX-License-Identifier: Apache-2.0
// Rounds in which the machine's limits and the steps that are held against them take turns, so that whatever slows the
// machine down for a while meets all of them.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <kvsparse/interop/thread_team.hpp>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "micro/machine_limits.hpp"
#include "micro/rival_load.hpp"
#include "micro/workload.hpp"
#include "options.hpp"

namespace kvsparse_bench {

/// What one round found for one step.
struct StepSample {
  double seconds = 0.0;              // median of the round's steps
  double bytes = 0.0;                // keys and values read by a step
  double flops = 0.0;                // and computed with them
  double same_size_bandwidth = 0.0;  // a plain read of as many bytes, whatever level they are thought to be in
};

struct Round {
  std::vector<MachineLimits> limits;  // one per thread count
  std::vector<StepSample> steps;      // one per StepBench
};

/// A dense layer that decodes.
class StepBench {
 public:
  StepBench(std::string dtype, std::size_t tokens, std::size_t threads)
      : dtype_(std::move(dtype)), tokens_(tokens), threads_(threads) {}
  virtual ~StepBench() = default;
  const std::string& dtype() const { return dtype_; }
  std::size_t tokens() const { return tokens_; }
  std::size_t threads() const { return threads_; }
  virtual StepSample measure() = 0;

 private:
  std::string dtype_;
  std::size_t tokens_, threads_;
};

template <class Scalar>
class DenseSteps final : public StepBench {
 public:
  DenseSteps(const kvsparse::Geometry& shape, std::size_t tokens, std::size_t threads)
      : StepBench(std::string(kvsparse::scalar_name<Scalar>), tokens, threads),
        layer_(shape, tokens, 0),
        team_(threads) {}

  /// At least three steps and 20 ms of them, each an append and an attend.
  StepSample measure() override {
    std::vector<double> seconds, bytes, flops;
    bool is_warm = false;  // an untimed step fetches what others have driven out of the caches
    double total = 0.0;
    while (seconds.size() < 3 || total < 0.02) {
      if (drifted_ == layer_.drift(tokens())) {
        layer_.rewind();
        drifted_ = 0;
        is_warm = false;
      }
      if (!std::exchange(is_warm, true)) {
        step();
        continue;
      }
      const Clock::time_point start = Clock::now();
      step();
      seconds.push_back(seconds_since(start));
      bytes.push_back(layer_.kv_bytes_read());
      flops.push_back(layer_.flops());
      total += seconds.back();
    }
    return {median(seconds), median(bytes), median(flops), 0.0};
  }

 private:
  void step() {
    layer_.step(team_);
    ++drifted_;
  }

  Layer<kvsparse::Dense, Scalar> layer_;
  kvsparse::ThreadTeam team_;
  std::size_t drifted_ = 0;
};

class RooflineMeasurement {
 public:
  explicit RooflineMeasurement(const RooflineOptions& options)
      : caches_(cache_sizes()), thread_counts_(options.threads) {
    if (thread_counts_.front() != 1) thread_counts_.insert(thread_counts_.begin(), 1);
    refuse_what_does_not_fit(options);
    probe_ = std::make_unique<LimitProbe>(caches_, thread_counts_.back());
    for (const std::string& dtype : options.dtypes) {
      for (const std::size_t tokens : options.tokens) {
        if (dtype == "f32") add<float>(options.shape, tokens);
        if (dtype == "f16") add<kvsparse::Half>(options.shape, tokens);
        if (dtype == "bf16") add<kvsparse::Bfloat16>(options.shape, tokens);
        if (dtype == "int8") add<kvsparse::Int8>(options.shape, tokens);
      }
    }
  }

  /// Measures a round; true if nothing disturbed it.
  bool run_round() {
    rival_.begin_round();
    Round round;
    for (const std::size_t threads : thread_counts_) {
      MachineLimits limits{threads, {}, 0.0};
      for (const MemoryLevel level : memory_levels) {
        limits.bandwidth[static_cast<std::size_t>(level)] = probe_->read_bandwidth(level, threads);
      }
      limits.flops = probe_->fma_peak(threads);
      round.limits.push_back(limits);
    }
    for (const auto& step : steps_) {
      StepSample sample = step->measure();
      sample.same_size_bandwidth = probe_->read_bandwidth(static_cast<std::size_t>(sample.bytes), step->threads());
      round.steps.push_back(sample);
    }
    const bool disturbed = rival_.end_round();
    (disturbed ? disturbed_ : clean_).push_back(std::move(round));
    return !disturbed;
  }

  const CacheSizes& caches() const { return caches_; }
  const RivalLoad& rival() const { return rival_; }
  const std::vector<std::size_t>& thread_counts() const { return thread_counts_; }
  const std::vector<std::unique_ptr<StepBench>>& steps() const { return steps_; }
  std::size_t clean_rounds() const { return clean_.size(); }
  /// The undisturbed rounds if there are `wanted` of them, else all.
  std::vector<Round> rounds(std::size_t wanted) const {
    std::vector<Round> rounds = clean_;
    if (clean_.size() < wanted) rounds.insert(rounds.end(), disturbed_.begin(), disturbed_.end());
    return rounds;
  }

 private:
  template <class Scalar>
  void add(const kvsparse::Geometry& shape, std::size_t tokens) {
    for (const std::size_t threads : thread_counts_) {
      steps_.push_back(std::make_unique<DenseSteps<Scalar>>(shape, tokens, threads));
    }
  }

  static void refuse_what_does_not_fit(const RooflineOptions& options) {
    const std::map<std::string, double> bytes{{"f32", 4.0}, {"f16", 2.0}, {"bf16", 2.0}, {"int8", 1.0}};
    double wanted = 0.0;
    for (const std::string& dtype : options.dtypes) {
      for (const std::size_t tokens : options.tokens) {
        wanted += static_cast<double>(options.threads.size() * tokens * 2 * options.shape.kv_heads) *
                  static_cast<double>(options.shape.row_stride()) * bytes.at(dtype);
      }
    }
    const std::size_t available = available_memory();
    if (available == 0 || wanted < 0.8 * static_cast<double>(available)) return;
    throw kvsparse_tools::UsageError("--tokens, --dtype and the shape ask for caches of " +
                                     std::to_string(static_cast<std::size_t>(wanted) >> 20) + " MiB, " +
                                     std::to_string(available >> 20) + " MiB of memory are available");
  }

  CacheSizes caches_;
  std::vector<std::size_t> thread_counts_;
  RivalLoad rival_;
  std::unique_ptr<LimitProbe> probe_;
  std::vector<std::unique_ptr<StepBench>> steps_;
  std::vector<Round> clean_, disturbed_;
};

}  // namespace kvsparse_bench
