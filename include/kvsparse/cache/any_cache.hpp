// SPDX-License-Identifier: Apache-2.0
// A cache whose policy and storage type are chosen by name at run time: one virtual call for each layer and step,
// nothing per page. Not part of the umbrella header.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "../policy/name_table.hpp"
#include "attend.hpp"

namespace kvsparse {

/// The storage type of a name, "f32", "f16", "bf16" or "int8". Throws ConfigError.
inline ScalarType scalar_type(std::string_view name) {
  for (std::size_t i = 0; i < std::size(scalar_type_names); ++i) {
    if (scalar_type_names[i] == name) return static_cast<ScalarType>(i);
  }
  KVSPARSE_THROW(ConfigError("storage type " + std::string(name) + " is not one of f32, f16, bf16, int8"));
}

/// A pool for caches whose storage type is known at run time alone.
using AnyPagePool = std::variant<PagePool<float>, PagePool<Half>, PagePool<Bfloat16>, PagePool<Int8>>;

/// Of as many pages as fit `bytes`. Throws ConfigError as PagePool does.
inline AnyPagePool any_page_pool(ScalarType scalar, const Geometry& geometry, PageSummary kind, std::size_t bytes) {
  switch (scalar) {
    case ScalarType::f32: return PagePool<float>::of_bytes(geometry, kind, bytes);
    case ScalarType::f16: return PagePool<Half>::of_bytes(geometry, kind, bytes);
    case ScalarType::bf16: return PagePool<Bfloat16>::of_bytes(geometry, kind, bytes);
    case ScalarType::int8: return PagePool<Int8>::of_bytes(geometry, kind, bytes);
  }
  KVSPARSE_THROW(ConfigError("unknown storage type"));
}

/// A PagedKvCache whose policy and storage type are chosen by name. Value semantics; copying copies pages and policy
/// state. Verbs and errors are those of PagedKvCache and attend.
class AnyCache {
 public:
  /// Throws ConfigError: unknown policy or option (the known ones are listed), bad option value, bad configuration.
  /// A preset among the settings is applied before the other settings.
  ///
  /// Compiles every policy of the list for every storage type, which takes most of a minute: call it in one place. A
  /// template, so that the translation units that do not call it pay nothing.
  template <class List = NamedPolicies>
  AnyCache(std::string_view policy, ScalarType scalar, const CacheConfig& config,
           std::span<const OptionSetting> settings = {})
      : AnyCache(known<List>(policy, scalar, config, settings, nullptr)) {}
  /// The same over pages of a pool that other caches may use too; keys and values are stored as the pool stores them.
  template <class List = NamedPolicies>
  AnyCache(std::string_view policy, const CacheConfig& config, const AnyPagePool& pool,
           std::span<const OptionSetting> settings = {})
      : AnyCache(known<List>(policy, static_cast<ScalarType>(pool.index()), config, settings, &pool)) {}

  /// A cache of the policy of that name in a list, or nothing if none has it: for a name table of one's own, or for the
  /// known one in parts (PartOfPolicies). pool: one of that storage type, or null for pages of its own. Throws
  /// ConfigError as `of` does.
  template <class List, StorageScalar... Scalars>
  static std::optional<AnyCache> find(std::string_view policy, ScalarType scalar, const CacheConfig& config,
                                      std::span<const OptionSetting> settings = {}, const AnyPagePool* pool = nullptr) {
    std::optional<AnyCache> cache;
    detail::visit_policy<List>(policy, [&]<class Policy>() {
      cache = AnyCache(make<Policy, Scalars...>(Policy{}, scalar, config, pool, settings));
    });
    return cache;
  }

  /// What the cache that `find` makes with pages of its own allocates, the sum of bytes_allocated() and object_bytes(),
  /// or nothing if no policy of the list has that name. Allocates none of it. Throws ConfigError as `find` does.
  template <class List, StorageScalar... Scalars>
  static std::optional<std::size_t> bytes_required(std::string_view policy, ScalarType scalar,
                                                   const CacheConfig& config,
                                                   std::span<const OptionSetting> settings = {}) {
    std::optional<std::size_t> bytes;
    detail::visit_policy<List>(policy, [&]<class Policy>() {
      const Policy set = with_options(Policy{}, settings);
      with_scalar<Policy, Scalars...>(scalar, [&]<class Scalar>() {
        bytes = PagedKvCache<Policy, Scalar>::bytes_required(config, set) + sizeof(Model<Policy, Scalar>);
      });
    });
    return bytes;
  }

  /// A cache of a policy that need not be in the name table. Throws ConfigError: unknown option (the known ones are
  /// listed), bad option value, bad configuration. `Scalars` are the storage types to compile for, all four unless
  /// some are given: of<Mine, float>(ScalarType::f32, config) compiles one; another is then refused.
  template <class Policy, StorageScalar... Scalars>
  static AnyCache of(ScalarType scalar, const CacheConfig& config, std::span<const OptionSetting> settings = {}) {
    return of<Policy, Scalars...>(Policy{}, scalar, config, settings);
  }
  /// The same for a policy that its settings do not describe in full; they are set on a copy of it.
  template <class Policy, StorageScalar... Scalars>
  static AnyCache of(const Policy& policy, ScalarType scalar, const CacheConfig& config,
                     std::span<const OptionSetting> settings = {}) {
    return AnyCache(make<Policy, Scalars...>(policy, scalar, config, nullptr, settings));
  }
  /// Keys and values each in a type of its own, with pages of its own or over those of a pool: an engine compiles the
  /// pairs it wants, and chooses among them by name. Throws ConfigError as `of` does.
  template <class Policy, StorageScalar Key, StorageScalar Value>
  static AnyCache of_pair(const CacheConfig& config, std::span<const OptionSetting> settings = {}) {
    return AnyCache(std::make_unique<Model<Policy, Key, Value>>(config, with_options(Policy{}, settings)));
  }
  template <class Policy, StorageScalar Key, StorageScalar Value>
  static AnyCache of_pair(const CacheConfig& config, const PagePool<Key, Value>& pool,
                          std::span<const OptionSetting> settings = {}) {
    return AnyCache(std::make_unique<Model<Policy, Key, Value>>(config, pool, with_options(Policy{}, settings)));
  }

  AnyCache(const AnyCache& other) : cache_(other.cache_->clone()) {}
  AnyCache& operator=(const AnyCache& other) {
    cache_ = other.cache_->clone();
    return *this;
  }
  AnyCache(AnyCache&&) noexcept = default;
  AnyCache& operator=(AnyCache&&) noexcept = default;

  /// A cache that goes on from here by itself, over the same pages; see PagedKvCache::fork.
  [[nodiscard]] AnyCache fork() { return AnyCache(cache_->fork()); }

  /// Of the name table, or the policy's own.
  std::string_view policy_name() const { return cache_->policy_name(); }
  const CacheConfig& config() const { return cache_->config(); }
  Position next_position() const { return cache_->next_position(); }
  bool can_append(std::size_t tokens) const noexcept { return cache_->can_append(tokens); }
  bool can_append_prompt(std::size_t tokens) const noexcept { return cache_->can_append_prompt(tokens); }
  PoolDemand pool_demand(std::size_t tokens) const noexcept { return cache_->pool_demand(tokens); }
  std::size_t bytes_reclaimable() const { return cache_->bytes_reclaimable(); }

  Status append(HeadRows<const float> k, HeadRows<const float> v) noexcept { return cache_->append(k, v); }
  Status append(std::span<const float> k, std::span<const float> v) noexcept { return cache_->append_flat(k, v); }
  Status append(TokenRows<const float> k, TokenRows<const float> v) noexcept { return cache_->append_chunk(k, v); }
  Status append_draft(TokenRows<const float> k, TokenRows<const float> v) noexcept {
    return cache_->append_draft(k, v);
  }
  Status truncate(Position position) noexcept { return cache_->truncate(position); }
  std::size_t drafts() const { return cache_->drafts(); }
  PoolDemand truncate_demand(Position position) const noexcept { return cache_->truncate_demand(position); }
  std::size_t oldest_reachable() const { return cache_->oldest_reachable(); }
  Status append_prompt(TokenRows<const float> k, TokenRows<const float> v) noexcept {
    return cache_->append_prompt(k, v);
  }
  Status append_prompt(std::span<const float> k, std::span<const float> v) noexcept {
    return cache_->append_prompt_flat(k, v);
  }
  void end_prompt() noexcept { cache_->end_prompt(); }
  void clear() noexcept { cache_->clear(); }

  /// kvsparse::attend on the calling thread.
  Status attend(HeadRows<const float> q, HeadRows<float> out, std::span<float> log_sum_exp = {}) noexcept {
    return attend(q, out, log_sum_exp, SerialExecutor{});
  }
  /// The same over contiguous rows.
  Status attend(std::span<const float> q, std::span<float> out, std::span<float> log_sum_exp = {}) noexcept {
    return attend(q, out, log_sum_exp, SerialExecutor{});
  }
  /// kvsparse::attend_prompt on the calling thread.
  Status attend_prompt(TokenRows<const float> q, TokenRows<float> out) noexcept {
    return attend_prompt(q, out, SerialExecutor{});
  }
  template <Executor E>
  Status attend(HeadRows<const float> q, HeadRows<float> out, std::span<float> log_sum_exp,
                E&& executor) noexcept(is_nothrow_executor<E>) {
    return cache_->attend(q, out, log_sum_exp, executor);
  }
  template <Executor E>
  Status attend(std::span<const float> q, std::span<float> out, std::span<float> log_sum_exp,
                E&& executor) noexcept(is_nothrow_executor<E>) {
    return cache_->attend_flat(q, out, log_sum_exp, executor);
  }
  template <Executor E>
  Status attend_prompt(TokenRows<const float> q, TokenRows<float> out, E&& executor) noexcept(is_nothrow_executor<E>) {
    return cache_->attend_prompt(q, out, executor);
  }

  CacheStats stats() const { return cache_->stats(); }
  /// What construction allocated for pages (unless they are a shared pool's), policy state and scratch: bytes_required
  /// of the configuration, or bytes_required_beside_pool.
  std::size_t bytes_allocated() const { return cache_->bytes_allocated(); }
  /// What it allocated beside that: the cache object that this handle points to.
  std::size_t object_bytes() const noexcept { return cache_->object_bytes(); }
  std::vector<Position> resident_positions(std::size_t kv_head) const { return cache_->resident_positions(kv_head); }
  std::vector<Position> read_positions(std::size_t kv_head) const { return cache_->read_positions(kv_head); }

 private:
  friend struct detail::ImageAccess;
  detail::LayerImage image() { return cache_->image(); }

  struct Interface {
    virtual ~Interface() = default;
    virtual std::unique_ptr<Interface> clone() const = 0;
    virtual std::unique_ptr<Interface> fork() = 0;
    virtual bool can_append(std::size_t tokens) const noexcept = 0;
    virtual bool can_append_prompt(std::size_t tokens) const noexcept = 0;
    virtual PoolDemand pool_demand(std::size_t tokens) const noexcept = 0;
    virtual std::size_t bytes_reclaimable() const = 0;
    virtual std::string_view policy_name() const = 0;
    virtual const CacheConfig& config() const = 0;
    virtual Position next_position() const = 0;
    virtual Status append(HeadRows<const float> k, HeadRows<const float> v) noexcept = 0;
    virtual Status append_flat(std::span<const float> k, std::span<const float> v) noexcept = 0;
    virtual Status append_chunk(TokenRows<const float> k, TokenRows<const float> v) noexcept = 0;
    virtual Status append_draft(TokenRows<const float> k, TokenRows<const float> v) noexcept = 0;
    virtual Status truncate(Position position) noexcept = 0;
    virtual std::size_t drafts() const = 0;
    virtual PoolDemand truncate_demand(Position position) const noexcept = 0;
    virtual std::size_t oldest_reachable() const = 0;
    virtual Status append_prompt(TokenRows<const float> k, TokenRows<const float> v) noexcept = 0;
    virtual Status append_prompt_flat(std::span<const float> k, std::span<const float> v) noexcept = 0;
    virtual void end_prompt() noexcept = 0;
    virtual void clear() noexcept = 0;
    virtual Status attend(HeadRows<const float> q, HeadRows<float> out, std::span<float> log_sum_exp,
                          ExecutorRef executor) = 0;
    virtual Status attend_flat(std::span<const float> q, std::span<float> out, std::span<float> log_sum_exp,
                               ExecutorRef executor) = 0;
    virtual Status attend_prompt(TokenRows<const float> q, TokenRows<float> out, ExecutorRef executor) = 0;
    virtual CacheStats stats() const = 0;
    virtual std::size_t bytes_allocated() const = 0;
    virtual std::size_t object_bytes() const noexcept = 0;
    virtual std::vector<Position> resident_positions(std::size_t kv_head) const = 0;
    virtual std::vector<Position> read_positions(std::size_t kv_head) const = 0;
    virtual detail::LayerImage image() = 0;
  };

  template <class Policy, class Key, class Value = Key>
  struct Model final : Interface {
    using Cache = PagedKvCache<Policy, Key, Value>;
    Model(const CacheConfig& config, const Policy& policy) : cache(config, policy) {}
    Model(const CacheConfig& config, const PagePool<Key, Value>& pool, const Policy& policy)
        : cache(config, pool, policy), is_over_pool(true) {}
    Model(Cache&& made, bool over_pool) : cache(std::move(made)), is_over_pool(over_pool) {}
    std::unique_ptr<Interface> clone() const override { return std::make_unique<Model>(Cache(cache), false); }
    std::unique_ptr<Interface> fork() override { return std::make_unique<Model>(cache.fork(), true); }
    bool can_append(std::size_t tokens) const noexcept override { return cache.can_append(tokens); }
    bool can_append_prompt(std::size_t tokens) const noexcept override { return cache.can_append_prompt(tokens); }
    PoolDemand pool_demand(std::size_t tokens) const noexcept override { return cache.pool_demand(tokens); }
    std::size_t bytes_reclaimable() const override { return cache.bytes_reclaimable(); }
    std::string_view policy_name() const override { return Policy::name; }
    const CacheConfig& config() const override { return cache.config(); }
    Position next_position() const override { return cache.next_position(); }
    Status append(HeadRows<const float> k, HeadRows<const float> v) noexcept override { return cache.append(k, v); }
    Status append_flat(std::span<const float> k, std::span<const float> v) noexcept override {
      return cache.append(k, v);
    }
    Status append_chunk(TokenRows<const float> k, TokenRows<const float> v) noexcept override {
      return cache.append(k, v);
    }
    Status append_draft(TokenRows<const float> k, TokenRows<const float> v) noexcept override {
      return cache.append_draft(k, v);
    }
    Status truncate(Position position) noexcept override { return cache.truncate(position); }
    std::size_t drafts() const override { return cache.drafts(); }
    PoolDemand truncate_demand(Position position) const noexcept override { return cache.truncate_demand(position); }
    std::size_t oldest_reachable() const override { return cache.oldest_reachable(); }
    Status append_prompt(TokenRows<const float> k, TokenRows<const float> v) noexcept override {
      return cache.append_prompt(k, v);
    }
    Status append_prompt_flat(std::span<const float> k, std::span<const float> v) noexcept override {
      return cache.append_prompt(k, v);
    }
    void end_prompt() noexcept override { cache.end_prompt(); }
    void clear() noexcept override { cache.clear(); }
    Status attend(HeadRows<const float> q, HeadRows<float> out, std::span<float> log_sum_exp,
                  ExecutorRef executor) override {
      return kvsparse::attend(cache, q, out, log_sum_exp, executor);
    }
    Status attend_flat(std::span<const float> q, std::span<float> out, std::span<float> log_sum_exp,
                       ExecutorRef executor) override {
      return kvsparse::attend(cache, q, out, log_sum_exp, executor);
    }
    Status attend_prompt(TokenRows<const float> q, TokenRows<float> out, ExecutorRef executor) override {
      return kvsparse::attend_prompt(cache, q, out, executor);
    }
    CacheStats stats() const override { return cache.stats(); }
    std::size_t bytes_allocated() const override {
      return is_over_pool ? Cache::bytes_required_beside_pool(config(), cache.policy())
                          : Cache::bytes_required(config(), cache.policy());
    }
    std::size_t object_bytes() const noexcept override { return sizeof(Model); }
    std::vector<Position> resident_positions(std::size_t kv_head) const override {
      return cache.resident_positions(kv_head);
    }
    std::vector<Position> read_positions(std::size_t kv_head) const override { return cache.read_positions(kv_head); }
    detail::LayerImage image() override { return detail::ImageAccess::of(cache); }
    Cache cache;
    bool is_over_pool = false;
  };

  explicit AnyCache(std::unique_ptr<Interface> cache) : cache_(std::move(cache)) {}

  template <class List>
  static AnyCache known(std::string_view policy, ScalarType scalar, const CacheConfig& config,
                        std::span<const OptionSetting> settings, const AnyPagePool* pool) {
    std::optional<AnyCache> cache = find<List>(policy, scalar, config, settings, pool);
    if (!cache) KVSPARSE_THROW(unknown_policy(policy));
    return std::move(*cache);
  }

  /// pool: null for one of its own.
  template <class Policy, StorageScalar... Scalars>
  static std::unique_ptr<Interface> make(const Policy& unset, ScalarType scalar, const CacheConfig& config,
                                         const AnyPagePool* pool, std::span<const OptionSetting> settings) {
    const Policy policy = with_options(unset, settings);
    std::unique_ptr<Interface> cache;
    with_scalar<Policy, Scalars...>(scalar, [&]<class Scalar>() {
      cache = pool == nullptr
                  ? std::make_unique<Model<Policy, Scalar>>(config, policy)
                  : std::make_unique<Model<Policy, Scalar>>(config, std::get<PagePool<Scalar>>(*pool), policy);
    });
    return cache;
  }

  /// Calls visit<Scalar>() for the one of Scalars, or of all four where none is given, that has the name.
  template <class Policy, StorageScalar... Scalars, class Visit>
  static void with_scalar(ScalarType scalar, Visit&& visit) {
    if constexpr (sizeof...(Scalars) == 0) {
      with_scalar<Policy, float, Half, Bfloat16, Int8>(scalar, visit);
    } else {
      const std::string_view wanted = scalar_type_names[static_cast<std::size_t>(scalar)];
      const auto try_type = [&]<class Scalar>() {
        if (scalar_name<Scalar> != wanted) return false;
        visit.template operator()<Scalar>();
        return true;
      };
      if (!(try_type.template operator()<Scalars>() || ...)) {
        KVSPARSE_THROW(ConfigError("policy " + std::string(Policy::name) + " is not compiled for storage type " +
                                   std::string(wanted)));
      }
    }
  }

  std::unique_ptr<Interface> cache_;
};

}  // namespace kvsparse
