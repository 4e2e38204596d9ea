// SPDX-License-Identifier: Apache-2.0
// How a snapshot reaches a pool's pages without being a template of their storage types.
#pragma once

#include <cstddef>

#include "../memory/page_pool.hpp"
#include "layer_image.hpp"

namespace kvsparse::detail {

template <StorageScalar Key, StorageScalar Value>
PagesImage pages_image(PagePool<Key, Value>& pool) {
  using Pool = PagePool<Key, Value>;
  PagesImage image;
  image.store = &pool;
  image.pool = &pool.memory();
  image.key_row_bytes = PageRows<Key, Value>::key_row_bytes(pool.geometry());
  image.value_row_bytes = PageRows<Key, Value>::value_row_bytes(pool.geometry());
  image.keys = [](void* pages, PageId page) {
    return reinterpret_cast<std::byte*>(static_cast<Pool*>(pages)->memory().rows.key_row(page, Slot{0}));
  };
  image.values = [](void* pages, PageId page) {
    return reinterpret_cast<std::byte*>(static_cast<Pool*>(pages)->memory().rows.value_row(page, Slot{0}));
  };
  image.acquire = [](void* pages) { return static_cast<Pool*>(pages)->acquire(); };
  image.release = [](void* pages, PageId page) { static_cast<Pool*>(pages)->release(page); };
  image.free_pages = [](const void* pages) { return static_cast<const Pool*>(pages)->free_pages(); };
  image.is_shared = [](const void* pages, PageId page) { return static_cast<const Pool*>(pages)->is_shared(page); };
  image.summarize = [](void* pages, PageId page, std::size_t tokens) {
    auto& [rows, summaries] = static_cast<Pool*>(pages)->memory();
    for (std::uint32_t slot = 0; slot < tokens; ++slot) {
      summaries.add_key(page, rows.key_row(page, {slot}), slot == 0);
    }
  };
  return image;
}

}  // namespace kvsparse::detail
