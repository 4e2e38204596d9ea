// SPDX-License-Identifier: Apache-2.0
// What attend() sees of a cache: decisions, working memory, and pages of whatever type they are. Thus a policy's decode
// step is compiled once, and the kernel once for each pair of storage types.
#pragma once

#include <cstddef>
#include <span>

#include "../attention/page_kernel.hpp"
#include "../memory/page_pool.hpp"
#include "attend_scratch.hpp"
#include "layer_drafts.hpp"

namespace kvsparse::detail {

/// attend_pages() over pages whose storage types the caller does not know. As cheap to copy as two pointers.
class PageReader {
 public:
  template <class Key, class Value>
  explicit PageReader(const PageMemory<Key, Value>& memory)
      : memory_(&memory),
        read_([](const void* pages, std::span<const PageRead> reads, const float* queries, std::size_t row,
                 std::span<SoftmaxState> states, const PageTap& tap, const LogitMap& map) {
          attend_pages(static_cast<const PageMemory<Key, Value>*>(pages)->rows.view(), reads, queries, row, states, tap,
                       map);
        }) {}

  /// As attend_pages().
  void operator()(std::span<const PageRead> reads, const float* queries, std::size_t row,
                  std::span<SoftmaxState> states, const PageTap& tap, const LogitMap& map) const {
    read_(memory_, reads, queries, row, states, tap, map);
  }

 private:
  using Read = void(const void* pages, std::span<const PageRead> reads, const float* queries, std::size_t row,
                    std::span<SoftmaxState> states, const PageTap& tap, const LogitMap& map);
  const void* memory_;
  Read* read_;
};

template <class Policy>
struct AttendedLayer {
  LayerDrafts<Policy>& heads;
  std::span<AttendScratch> scratch;  // of each kv head
  PageReader read_pages;
};

}  // namespace kvsparse::detail
