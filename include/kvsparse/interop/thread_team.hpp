// SPDX-License-Identifier: Apache-2.0
// Threads that wait for work, as an executor. Not part of the umbrella header.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <thread>
#include <vector>

#include "../core/executor.hpp"

namespace kvsparse {

namespace detail {

/// One step of a busy wait: lets the other hardware thread of the core run.
inline void spin_pause() noexcept {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// Where threads wait for atomics to change: spinning for a while, which is answered within a microsecond, then asleep,
/// which leaves the processor to others.
class WaitingRoom {
 public:
  /// Returns once done() holds. done reads atomics alone, and by sequentially consistent loads.
  template <class Done>
  void wait(std::chrono::nanoseconds spin, Done&& done) {
    using Clock = std::chrono::steady_clock;
    if (done()) return;
    if (spin.count() > 0) {
      const auto give_up = Clock::now() + spin;
      do {
        for (int i = 0; i < 32; ++i) {
          spin_pause();
          if (done()) return;
        }
      } while (Clock::now() < give_up);
    }
    std::unique_lock lock(mutex_);
    sleepers_.fetch_add(1);
    changed_.wait(lock, done);
    sleepers_.fetch_sub(1);
  }

  /// To be called after a sequentially consistent write that may have made a done() hold. Of this write and the look at
  /// sleepers_, and of a waiter's entry there and its look at done(), the later sees the earlier: no wake-up is lost.
  void wake_all() {
    if (sleepers_.load() == 0) return;
    { const std::lock_guard lock(mutex_); }  // a waiter between its look and its sleep holds it
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::atomic<std::size_t> sleepers_{0};
};

}  // namespace detail

/// A team of threads, the calling one among them, that share the indices of a range one by one. Made once, and kept: a
/// run starts no thread and allocates nothing. Threads wait for the next run by spinning for `spin`, then asleep, and
/// the caller waits in the same way for those still at work; only to fall asleep and to wake sleepers is a mutex taken.
/// A run that finds its helpers asleep costs some 10 us more than one that finds them spinning, so `spin` should exceed
/// the pause between two runs where the processors are free. Who does not wake in time is not waited for.
///
/// Runs of one team exclude one another: one that is started while another is under way, by a body or by another
/// thread, is done by its caller alone. Destruction joins the threads; no run may be under way then.
// NOLINTNEXTLINE(clang-analyzer-optin.performance.Padding): the padding is what keeps waiting threads apart.
class ThreadTeam {
 public:
  /// `threads` counts the caller: ThreadTeam(1) is serial. 0: as many as the machine has processors. Throws
  /// std::system_error if a thread cannot be started. A team of more threads than processors never spins.
  explicit ThreadTeam(std::size_t threads = 0, std::chrono::nanoseconds spin = std::chrono::microseconds(50))
      : ThreadTeam(threads_or_processors(threads), spin, Empty{}) {
    // The delegated constructor has made this a whole object, so an exception here joins the threads already started.
    const std::size_t size = threads_or_processors(threads);
    helpers_.reserve(size - 1);
    while (helpers_.size() + 1 < size) helpers_.emplace_back([this] { help(); });
  }
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;
  ~ThreadTeam() {
    ended_.store(true);
    start_.wake_all();
    for (std::thread& helper : helpers_) helper.join();
  }

  std::size_t concurrency() const noexcept { return helpers_.size() + 1; }  ///< threads, the calling one included

  /// Runs body(i) for each i in [0, count); returns when all have returned.
  void operator()(std::size_t count, RangeBody body) noexcept {
    if (count < 2 || helpers_.empty() || running_.exchange(true)) return SerialExecutor{}(count, body);
    body_ = &body;
    count_ = count;
    finished_.store(0);
    unclaimed_.store(count);
    start_.wake_all();
    work();
    finish_.wait(spin_, [&] { return finished_.load() == count; });
    running_.store(false);
  }

 private:
  struct Empty {};
  ThreadTeam(std::size_t threads, std::chrono::nanoseconds spin, Empty)
      : spin_(threads > threads_or_processors(0) ? std::chrono::nanoseconds(0) : spin) {}

  static std::size_t threads_or_processors(std::size_t threads) {
    return threads != 0 ? threads : std::max<std::size_t>(1, std::thread::hardware_concurrency());
  }

  void help() noexcept {
    while (true) {
      start_.wait(spin_, [this] { return unclaimed_.load() != 0 || ended_.load(); });
      if (ended_.load()) return;
      work();
    }
  }

  // Whoever takes an index of a run takes part in it: body_ and count_ then stay as they are until that index is
  // counted as finished. Before, they must not be looked at: a late thread may find the next run being prepared.
  void work() noexcept {
    std::size_t unclaimed = unclaimed_.load();
    while (unclaimed != 0) {
      if (!unclaimed_.compare_exchange_weak(unclaimed, unclaimed - 1)) continue;
      const std::size_t count = count_;
      (*body_)(count - unclaimed);
      if (finished_.fetch_add(1) + 1 == count) finish_.wake_all();
      unclaimed = unclaimed_.load();
    }
  }

  const std::chrono::nanoseconds spin_;
  const RangeBody* body_ = nullptr;
  std::size_t count_ = 0;
  std::atomic<bool> running_{false};
  std::atomic<bool> ended_{false};
  // On lines of their own: one is looked at by waiting helpers, the other by a waiting caller.
  alignas(64) std::atomic<std::size_t> unclaimed_{0};
  alignas(64) std::atomic<std::size_t> finished_{0};
  alignas(64) detail::WaitingRoom start_;
  detail::WaitingRoom finish_;
  std::vector<std::thread> helpers_;  // last, so that they start when all else is there
};

}  // namespace kvsparse
