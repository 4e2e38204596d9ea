// SPDX-License-Identifier: Apache-2.0
// How a snapshot reaches a store's pages without being a template of their storage types.
#pragma once

#include <cstddef>

#include "layer_image.hpp"
#include "page_store.hpp"

namespace kvsparse::detail {

template <StorageScalar Key, StorageScalar Value>
PagesImage pages_image(PageStore<Key, Value>& store, std::size_t head_dim) {
  using Store = PageStore<Key, Value>;
  PagesImage image;
  image.store = &store;
  image.key_row_bytes = stored_row_size<Key>(head_dim) * sizeof(Key);
  image.value_row_bytes = stored_row_size<Value>(head_dim) * sizeof(Value);
  image.keys = [](void* pages, PageId page) {
    return reinterpret_cast<std::byte*>(static_cast<Store*>(pages)->pool.key_row(page, Slot{0}));
  };
  image.values = [](void* pages, PageId page) {
    return reinterpret_cast<std::byte*>(static_cast<Store*>(pages)->pool.value_row(page, Slot{0}));
  };
  image.acquire = [](void* pages) { return static_cast<Store*>(pages)->pool.acquire(); };
  image.release = [](void* pages, PageId page) { static_cast<Store*>(pages)->pool.release(page); };
  image.summarize = [](void* pages, PageId page, std::size_t tokens) {
    auto& [pool, summaries] = *static_cast<Store*>(pages);
    for (std::uint32_t slot = 0; slot < tokens; ++slot) {
      summaries.add_key(page, pool.key_row(page, {slot}), slot == 0);
    }
  };
  return image;
}

}  // namespace kvsparse::detail
