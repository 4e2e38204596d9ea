// SPDX-License-Identifier: Apache-2.0
// A progress bar for people: drawn on stderr, only when stderr is a terminal, at most ten times a second.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <string>
#include <utility>

namespace kvsparse_tools {

class ProgressBar {
 public:
  ProgressBar(std::string label, std::size_t total)
      : label_(std::move(label)), total_(std::max<std::size_t>(total, 1)), visible_(::isatty(STDERR_FILENO) == 1) {}
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;
  ~ProgressBar() { clear(); }

  /// `done` of the total is finished. Cheap enough to call every step.
  void update(std::size_t done) {
    if (!visible_) return;
    const auto now = Clock::now();
    if (now - drawn_at_ < std::chrono::milliseconds(100)) return;
    drawn_at_ = now;
    draw(std::min(done, total_), std::chrono::duration<double>(now - started_at_).count());
  }

  /// Wipes the bar, so that what is printed next starts on a clean line.
  void clear() {
    if (std::exchange(drawn_, false)) std::fputs("\r\033[K", stderr);
  }

 private:
  using Clock = std::chrono::steady_clock;

  void draw(std::size_t done, double seconds) {
    constexpr std::size_t width = 30;
    const double share = static_cast<double>(done) / static_cast<double>(total_);
    const auto filled = static_cast<std::size_t>(share * static_cast<double>(width));
    const std::string bar = std::string(filled, '#') + std::string(width - filled, '.');
    std::string left = "--:--";
    if (done > 0 && seconds > 0.5) {
      const double remaining = std::min(seconds * (1.0 - share) / share, 359999.0);
      left = clock_text(static_cast<long>(remaining + 0.5));
    }
    std::fprintf(stderr, "\r\033[K%s [%s] %3.0f %%  %s left", label_.c_str(), bar.c_str(), share * 100.0, left.c_str());
    std::fflush(stderr);
    drawn_ = true;
  }

  static std::string clock_text(long seconds) {
    const auto two_digits = [](long value) { return (value < 10 ? "0" : "") + std::to_string(value); };
    const std::string tail = two_digits(seconds / 60 % 60) + ":" + two_digits(seconds % 60);
    return seconds < 3600 ? tail : std::to_string(seconds / 3600) + ":" + tail;
  }

  std::string label_;
  std::size_t total_;
  bool visible_;
  bool drawn_ = false;
  Clock::time_point started_at_ = Clock::now();
  Clock::time_point drawn_at_ = started_at_;
};

}  // namespace kvsparse_tools
