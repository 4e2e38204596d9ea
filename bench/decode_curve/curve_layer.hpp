// SPDX-License-Identifier: Apache-2.0
// One policy's layer on its way through the decode, and what it took from the system.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <cstddef>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "common/allocation_counter.hpp"
#include "options.hpp"
#include "phased_step.hpp"

namespace kvsparse_bench {

/// Resident memory of this process in bytes, without allocating any.
inline std::size_t resident_memory() {
  char text[128] = {};
  const int file = ::open("/proc/self/statm", O_RDONLY);
  if (file < 0) return 0;
  const auto length = ::read(file, text, sizeof text - 1);
  ::close(file);
  std::size_t pages_all = 0, pages_resident = 0;
  if (length <= 0 || std::sscanf(text, "%zu %zu", &pages_all, &pages_resident) != 2) return 0;
  return pages_resident * static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
}

class CurveLayer {
 public:
  virtual ~CurveLayer() = default;
  virtual std::string name() const = 0;
  virtual bool evicts() const = 0;
  virtual std::size_t tokens() const = 0;
  virtual std::size_t resident_tokens() const = 0;
  virtual std::size_t resident_bytes() const = 0;  // by the cache's own accounting
  virtual std::unique_ptr<CurveLayer> clone() const = 0;

  virtual void append() = 0;
  virtual double timed_step() = 0;  // seconds of an append and an attend
  virtual void phased_step(PhaseTimes& times) = 0;
};

template <class Policy>
class PolicyLayer final : public CurveLayer {
 public:
  using Scalar = kvsparse::Half;

  explicit PolicyLayer(const CurveOptions& options, std::size_t max_tokens)
      : cache_({.query_heads = options.shape.query_heads,
                .kv_heads = options.shape.kv_heads,
                .head_dim = options.shape.head_dim,
                .page_size = options.shape.page_size,
                .budget_tokens = options.budget,
                .max_tokens = max_tokens}),
        k_(options.shape.kv_heads * options.shape.head_dim),
        v_(k_.size()),
        q_(options.shape.query_heads * options.shape.head_dim),
        out_(q_.size()) {}

  std::string name() const override { return std::string(Policy::name); }
  bool evicts() const override { return kvsparse::Evictor<Policy>; }
  std::size_t tokens() const override { return static_cast<std::size_t>(cache_.next_position().value); }
  std::size_t resident_tokens() const override { return cache_.stats().resident_tokens; }
  std::size_t resident_bytes() const override { return cache_.stats().resident_bytes; }
  std::unique_ptr<CurveLayer> clone() const override { return std::make_unique<PolicyLayer>(*this); }

  void append() override {
    fill();
    require(cache_.append(k_, v_));
  }
  double timed_step() override {
    fill();
    const Clock::time_point start = Clock::now();
    require(cache_.append(k_, v_));
    require(kvsparse::attend(cache_, std::span<const float>(q_), std::span<float>(out_)));
    return seconds_since(start);
  }
  void phased_step(PhaseTimes& times) override {
    fill();
    kvsparse_bench::phased_step(cache_, k_, v_, q_, out_, times);
  }

 private:
  /// Queries of four times the usual length: attention is then uneven enough for policies to find some pages better
  /// than others, and not so uneven that a page's weight vanishes.
  void fill() {
    rows_.fill(k_);
    rows_.fill(v_);
    rows_.fill(q_);
    for (float& value : q_) value *= 4.0F;
  }
  static void require(kvsparse::Status status) {
    if (!status) throw std::runtime_error(status.message());
  }

  kvsparse::PagedKvCache<Policy, Scalar> cache_;
  RandomRows rows_{1};
  std::vector<float> k_, v_, q_, out_;
};

/// A layer and what building and decoding it took from the allocator and from the system: nothing else runs in its
/// turns, so whatever changes during them is its doing.
class MeasuredLayer {
 public:
  template <class Build>
  explicit MeasuredLayer(Build&& build) {
    in_turn([&] { layer_ = build(); });
    allocations_ = 0;  // the one allocation at the start is allowed
  }

  template <class Work>
  void in_turn(Work&& work) {
    const std::size_t resident = resident_memory();
    const kvsparse_tools::AllocationCount before = kvsparse_tools::allocations_of_this_thread();
    work();
    const kvsparse_tools::AllocationCount after = kvsparse_tools::allocations_of_this_thread();
    resident_growth_ += static_cast<double>(resident_memory()) - static_cast<double>(resident);
    live_bytes_ += after.live_bytes - before.live_bytes;
    allocations_ += after.allocations - before.allocations;
  }

  CurveLayer& layer() { return *layer_; }
  const CurveLayer& layer() const { return *layer_; }
  std::size_t allocated_bytes() const { return live_bytes_; }  // by the allocator's count
  double resident_growth() const { return resident_growth_; }  // of the process, by the kernel's count
  std::size_t allocations() const { return allocations_; }     // since it was built

 private:
  std::unique_ptr<CurveLayer> layer_;
  std::size_t live_bytes_ = 0;
  std::size_t allocations_ = 0;
  double resident_growth_ = 0.0;
};

/// Those that there are curves of.
using CurvePolicies =
    kvsparse::PolicyList<kvsparse::Dense, kvsparse::Quest, kvsparse::StreamingLlm, kvsparse::H2o, kvsparse::Raas,
                         kvsparse::Kindred, kvsparse::Random, kvsparse::Compose<kvsparse::Raas, kvsparse::Quest>>;

/// Calls visit.template operator()<Policy>() for the one of that name.
template <class Visit>
void visit_policy(const std::string& name, Visit&& visit) {
  kvsparse::detail::visit_policy<CurvePolicies>(name, visit);
}

}  // namespace kvsparse_bench
