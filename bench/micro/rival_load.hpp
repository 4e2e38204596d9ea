// SPDX-License-Identifier: Apache-2.0
// Notices that something else wanted the processor while we measured: a fixed piece of work on every core, timed before
// and after, and the kernel's own account of who ran.
#pragma once

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <fstream>
#include <limits>
#include <string>
#include <vector>

#include "machine_limits.hpp"

namespace kvsparse_bench {

class RivalLoad {
 public:
  static constexpr double tolerated_slowdown = 1.10;  ///< of the fixed work, against the fastest ever seen
  static constexpr double tolerated_share = 0.05;     ///< of the machine's processor time, taken by others

  RivalLoad() { calibrate(); }

  void begin_round() {
    before_ = calibrate();
    usage_ = usage_now();
    started_ = Clock::now();
  }
  /// Whether the round that ends here was disturbed.
  bool end_round() {
    const double elapsed = seconds_since(started_);
    const Usage now = usage_now();
    const double cores = static_cast<double>(hardware_threads());
    const double others = now.machine - usage_.machine - (now.own - usage_.own);
    share_ = now.machine > usage_.machine && elapsed > 0.0 ? others / (elapsed * cores) : 0.0;
    const double slowest = std::max(before_, calibrate());
    slowdown_ = slowest / best_;
    ++rounds_;
    const bool disturbed = slowdown_ > tolerated_slowdown || share_ > tolerated_share;
    if (disturbed) ++disturbed_;
    return disturbed;
  }

  std::size_t rounds() const { return rounds_; }
  std::size_t disturbed_rounds() const { return disturbed_; }
  double slowdown() const { return slowdown_; }  ///< of the latest round
  double share() const { return share_; }        ///< likewise; what others took of the machine's processor time
  /// "the machine was busy: 3 of 9 rounds disturbed".
  std::string sentence() const {
    return "the machine was busy: " + std::to_string(disturbed_) + " of " + std::to_string(rounds_) +
           " rounds disturbed";
  }

 private:
  struct Usage {
    double machine = 0.0;  // processor seconds of all, stolen ones included; 0 where the system does not tell
    double own = 0.0;
  };

  static Usage usage_now() {
    Usage usage;
    std::string name;
    double user = 0, nice = 0, system = 0, idle = 0, iowait = 0, irq = 0, softirq = 0, steal = 0;
    if (std::ifstream("/proc/stat") >> name >> user >> nice >> system >> idle >> iowait >> irq >> softirq >> steal) {
      const auto ticks = static_cast<double>(::sysconf(_SC_CLK_TCK));
      usage.machine = (user + nice + system + irq + softirq + steal) / ticks;
    }
    rusage self{};
    ::getrusage(RUSAGE_SELF, &self);
    const auto seconds = [](const timeval& t) {
      return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
    };
    usage.own = seconds(self.ru_utime) + seconds(self.ru_stime);
    return usage;
  }

  /// A chain of multiplications, which no other core, cache or compiler can shorten: about a millisecond.
  [[gnu::noinline]] static std::uint64_t spin() {
    std::uint64_t state = 1;
    for (int i = 0; i < 1'000'000; ++i) {
      state = state * 6364136223846793005U + 1442695040888963407U;
      asm volatile("" : "+r"(state));  // or the compiler folds several links of the chain into one
    }
    return state;
  }

  /// Seconds of one spin on the slowest core, as a mean over more than a scheduler's slice.
  double calibrate() {
    constexpr std::size_t spins = 10;
    const std::size_t threads = hardware_threads();
    std::vector<double> fastest(threads, std::numeric_limits<double>::infinity()), mean(threads);
    team_seconds(threads, [&](std::size_t thread) {
      const Clock::time_point begin = Clock::now();
      for (std::size_t i = 0; i < spins; ++i) {
        const Clock::time_point start = Clock::now();
        [[maybe_unused]] volatile std::uint64_t sink = spin();
        fastest[thread] = std::min(fastest[thread], seconds_since(start));
      }
      mean[thread] = seconds_since(begin) / spins;
    });
    best_ = std::min(best_, *std::min_element(fastest.begin(), fastest.end()));
    return *std::max_element(mean.begin(), mean.end());
  }

  double best_ = std::numeric_limits<double>::infinity();
  double before_ = 0.0;
  double slowdown_ = 1.0;
  double share_ = 0.0;
  Usage usage_;
  Clock::time_point started_;
  std::size_t rounds_ = 0;
  std::size_t disturbed_ = 0;
};

}  // namespace kvsparse_bench
