// SPDX-License-Identifier: Apache-2.0
// One pool of pages for all layers of many sequences.
#pragma once

#include <cstddef>
#include <cstdint>
#include <kvsparse/cache/any_cache.hpp>
#include <optional>
#include <span>
#include <string_view>
#include <variant>

#include "decoder.hpp"
#include "named_cache.hpp"

namespace kvsparse_tools {

class NamedPool {
 public:
  /// Of `bytes`, for layers of this model with this cache. Throws kvsparse::ConfigError when that is too little.
  NamedPool(const ModelConfig& model, const CacheChoice& choice, std::uint64_t bytes);

  /// Pages that one sequence of up to `tokens` holds at most, all layers and kv heads. Throws kvsparse::ConfigError for
  /// an unknown policy.
  static std::size_t pages_for(const ModelConfig& model, const CacheChoice& choice, std::size_t tokens);

  /// Bytes of a pool that has this many pages.
  static std::uint64_t bytes_of(const ModelConfig& model, const CacheChoice& choice, std::size_t pages);

  /// Makes caches over this pool. The factory must not outlive it.
  CacheFactory factory() const {
    return [this](std::string_view policy, kvsparse::ScalarType /*the pool's*/, const kvsparse::CacheConfig& config,
                  std::span<const kvsparse::OptionSetting> settings) {
      return named_cache_over(pool_, policy, config, settings);
    };
  }

  std::size_t pages() const {
    return std::visit([](const auto& pool) { return pool.page_count(); }, pool_);
  }
  std::size_t pages_in_use() const {
    return std::visit([](const auto& pool) { return pool.page_count() - pool.free_pages(); }, pool_);
  }
  std::size_t shared_pages() const {
    return std::visit([](const auto& pool) { return pool.shared_pages(); }, pool_);
  }
  std::size_t bytes_per_page() const {
    return std::visit([](const auto& pool) { return pool.bytes_per_page(); }, pool_);
  }

 private:
  kvsparse::AnyPagePool pool_;
};

}  // namespace kvsparse_tools
