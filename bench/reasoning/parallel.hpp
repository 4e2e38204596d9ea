// SPDX-License-Identifier: Apache-2.0
// Independent tasks over threads.
#pragma once

#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace kvsparse_tools {

/// Calls work(task) for task = 0, 1, ..., begun in this order, until one returns false or throws. What the first one
/// threw is thrown again when all threads have come to rest.
template <class Work>
void run_in_parallel(std::size_t tasks, std::size_t threads, Work&& work) {
  std::atomic<std::size_t> next{0};
  std::atomic<bool> stop{false};
  std::mutex mutex;
  std::exception_ptr thrown;
  const auto loop = [&] {
    while (!stop) {
      const std::size_t task = next++;
      if (task >= tasks) return;
      try {
        if (!work(task)) stop = true;
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (thrown == nullptr) thrown = std::current_exception();
        stop = true;
      }
    }
  };
  std::vector<std::thread> helpers;
  for (std::size_t i = 1; i < threads && i < tasks; ++i) helpers.emplace_back(loop);
  loop();
  for (std::thread& helper : helpers) helper.join();
  if (thrown != nullptr) std::rethrow_exception(thrown);
}

}  // namespace kvsparse_tools
