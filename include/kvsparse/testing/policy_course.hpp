// SPDX-License-Identifier: Apache-2.0
// What PolicyConformance puts a policy through: shapes, budgets that its options ask for, tokens that are the same
// whenever they are asked for again, and all that can be seen of a cache after each.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../cache/attend.hpp"
#include "watched_policy.hpp"

namespace kvsparse::conformance {

/// What a test's type parameter stands for: a policy as it is by default, over keys in f16 and values in int8; or a
/// type with a static function policy() and, if it likes, other types Key and Value.
template <class T>
struct Subject {
  using Policy = T;
  using Key = Half;
  using Value = Int8;
  static Policy policy() { return {}; }
};
template <class T>
requires requires { T::policy(); }
struct Subject<T> {
 private:
  template <class U>
  static auto key_of() {
    if constexpr (requires { typename U::Key; })
      return typename U::Key{};
    else
      return Half{};
  }
  template <class U>
  static auto value_of() {
    if constexpr (requires { typename U::Value; })
      return typename U::Value{};
    else
      return Int8{};
  }

 public:
  using Policy = decltype(T::policy());
  using Key = decltype(key_of<T>());
  using Value = decltype(value_of<T>());
  static Policy policy() { return T::policy(); }
};

struct Shape {
  std::size_t kv_heads, group, head_dim, page_size;
};
inline constexpr Shape shapes[] = {{2, 2, 8, 4}, {1, 3, 20, 1}, {2, 1, 32, 16}};

/// One token's rows: a function of a seed and a position. Of one query in some head something stands out.
struct Token {
  std::vector<float> k, v, q;

  Token(const Geometry& geometry, std::uint64_t seed, Position position)
      : state_(seed * 0x9E3779B97F4A7C15ULL + static_cast<std::uint64_t>(position.value) * 0xD1B54A32D192ED03ULL) {
    k = row(geometry.kv_heads * geometry.head_dim, 1.0F);
    v = row(geometry.kv_heads * geometry.dim_of_values(), 1.0F);
    q = row(geometry.query_heads * geometry.head_dim, 2.0F);
  }

  /// Replaces some elements, and some whole rows, by what is no number, or hardly one.
  void spoil() {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    constexpr float strange[] = {std::numeric_limits<float>::quiet_NaN(), infinity, -infinity, 3e38F, 1e-40F, 0.0F};
    for (std::vector<float>* rows : {&k, &v, &q}) {
      if (next() % 3 == 0) (*rows)[next() % rows->size()] = strange[next() % 6];
      if (next() % 8 == 0) std::fill(rows->begin(), rows->end(), strange[next() % 6]);
    }
  }

 private:
  std::uint64_t next() {  // splitmix64
    std::uint64_t z = state_ += 0x9E3779B97F4A7C15ULL;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    return z ^ (z >> 31);
  }
  /// Sums of four uniforms: mean 0, variance scale^2.
  std::vector<float> row(std::size_t size, float scale) {
    std::vector<float> row(size);
    for (float& x : row) {
      float sum = 0.0F;
      for (int i = 0; i < 4; ++i) sum += static_cast<float>(next() >> 40) * 0x1.0p-24F - 0.5F;
      x = scale * sum * 1.7320508F;
    }
    return row;
  }
  std::uint64_t state_;
};

/// All that can be seen of a cache after a step.
struct Sight {
  std::vector<std::uint32_t> answers;        // bits of outputs and log-sum-exps
  std::vector<std::int64_t> resident, read;  // positions of all heads, each head's behind its number, negative
  std::vector<std::size_t> counts;           // of stats()

  static std::vector<std::uint32_t> bits_of(const std::vector<float>& out, const std::vector<float>& lse) {
    std::vector<std::uint32_t> bits;
    for (const float x : out) bits.push_back(std::bit_cast<std::uint32_t>(x));
    for (const float x : lse) bits.push_back(std::bit_cast<std::uint32_t>(x));
    return bits;
  }

  bool is_finite() const {
    return std::all_of(answers.begin(), answers.end(),
                       [](std::uint32_t bits) { return std::isfinite(std::bit_cast<float>(bits)); });
  }

  /// What differs first, in words; empty if nothing does.
  std::string difference(const Sight& other) const {
    if (resident != other.resident) return "other tokens are resident" + first_other(resident, other.resident);
    if (read != other.read) return "other tokens were read" + first_other(read, other.read);
    if (answers != other.answers) return "an answer differs in its bits" + first_other(answers, other.answers);
    if (counts != other.counts) return "stats() differ" + first_other(counts, other.counts);
    return {};
  }

 private:
  template <class T>
  static std::string first_other(const std::vector<T>& a, const std::vector<T>& b) {
    const std::size_t both = std::min(a.size(), b.size());
    const auto at = static_cast<std::size_t>(
        std::mismatch(a.begin(), a.begin() + static_cast<std::ptrdiff_t>(both), b.begin()).first - a.begin());
    if (at == both) return ", " + std::to_string(a.size()) + " numbers and " + std::to_string(b.size());
    return ", " + std::to_string(a[at]) + " and " + std::to_string(b[at]) + " in place " + std::to_string(at);
  }
};

/// Whether the compiler clears what lies between a state's members, so that equal states are equal bytes.
constexpr bool equal_states_are_equal_bytes() {
#if defined(__has_builtin)
#if __has_builtin(__builtin_clear_padding)
  return true;
#endif
#endif
  return false;
}

/// Calls bodies from the last one down: no verb may depend on which head comes first.
struct BackwardsExecutor {
  void operator()(std::size_t count, RangeBody body) const noexcept {
    while (count-- > 0) body(count);
  }
};

/// Caches of one policy in one shape. Subjects of the same policy share what is compiled of it.
template <class P, StorageScalar K, StorageScalar V>
class Course {
 public:
  using Policy = P;
  using Key = K;
  using Value = V;
  using Cache = PagedKvCache<Watched<Policy>, Key, Value>;
  static constexpr bool evicts = Evictor<Policy>;

  Course(const Policy& as_made, const Shape& shape) : policy(as_made) {
    config.kv_heads = shape.kv_heads;
    config.query_heads = shape.kv_heads * shape.group;
    config.head_dim = shape.head_dim;
    config.page_size = shape.page_size;
    config.rope.theta = 10000.0F;
    config.layer = 3;
    const Geometry geometry = config.geometry();
    prompt_tokens = 2 * shape.page_size + shape.page_size / 2 + 1;
    pinned_pages = traits::pinned_pages(policy, geometry);
    const std::size_t kept_back = traits::slack_tokens(policy) + traits::query_window(policy);
    budget_pages = 6 + std::max(pinned_pages, pins_prompt() ? geometry.pages_for(prompt_tokens) : 0) +
                   geometry.pages_for(kept_back);
    config.budget_tokens = budget_pages * shape.page_size;
    config.read_budget_tokens = budget_pages / 3 * shape.page_size;
    tokens = prompt_tokens + 2 * config.budget_tokens + 2 * traits::period(policy) + 40;
    config.max_tokens = tokens;
  }
  Course(const Course&) = delete;  // its caches report to it
  Course& operator=(const Course&) = delete;

  /// Why the policy cannot work on this shape; empty if it can.
  std::string problem() const { return traits::geometry_problem(policy, config.geometry()); }
  bool pins_prompt() const { return traits::pin_prompt(policy); }

  Cache make() { return Cache(config, Watched<Policy>(policy, findings)); }
  Cache make(const PagePool<Key, Value>& pool) { return Cache(config, pool, Watched<Policy>(policy, findings)); }
  PagePool<Key, Value> make_pool(std::size_t caches) const {
    const std::size_t pages = evicts ? budget_pages : config.geometry().pages_for(config.max_tokens);
    return {config.geometry(), traits::page_summary(policy), caches * pages * config.kv_heads};
  }

  Token token(std::uint64_t seed, Position position) const { return {config.geometry(), seed, position}; }

  /// The cache's next token, and what is seen then. Throws std::runtime_error if the cache refuses it.
  Sight step(Cache& cache, std::uint64_t seed) const { return step(cache, token(seed, cache.next_position())); }
  Sight step(Cache& cache, const Token& token) const {
    append(cache, token);
    return attend(cache, token, SerialExecutor{});
  }
  void append(Cache& cache, const Token& token) const {
    const bool is_prompt = cache.next_position() < Position{0} + prompt_tokens;
    require(is_prompt ? cache.append_prompt(token.k, token.v) : cache.append(token.k, token.v));
  }
  template <class E>
  Sight attend(Cache& cache, const Token& token, E&& executor) const {
    std::vector<float> out(config.query_heads * config.geometry().dim_of_values()), lse(config.query_heads);
    require(kvsparse::attend(cache, std::span<const float>(token.q), out, lse, executor));
    return sight(cache, out, lse);
  }
  /// The next token as a draft; attended to if `ask`.
  Sight draft(Cache& cache, std::uint64_t seed, bool ask) const {
    const Geometry geometry = config.geometry();
    const Token rows = token(seed, cache.next_position());
    require(cache.append_draft(TokenRows<const float>(rows.k.data(), 1, geometry.kv_heads, geometry.head_dim),
                               TokenRows<const float>(rows.v.data(), 1, geometry.kv_heads, geometry.head_dim)));
    return ask ? attend(cache, rows, SerialExecutor{}) : Sight{};
  }
  /// A whole prompt of so many tokens in one chunk.
  Status append_prompt(Cache& cache, std::uint64_t seed, std::size_t count) const {
    std::vector<float> k, v;
    for (std::size_t t = 0; t < count; ++t) {
      const Token rows = token(seed, cache.next_position() + t);
      k.insert(k.end(), rows.k.begin(), rows.k.end());
      v.insert(v.end(), rows.v.begin(), rows.v.end());
    }
    return cache.append_prompt(std::span<const float>(k), std::span<const float>(v));
  }
  /// Steps until the sequence has so many tokens.
  void advance(Cache& cache, std::uint64_t seed, std::size_t length) const {
    while (cache.next_position() < Position{0} + length) step(cache, seed);
  }

  /// After an attend that returned these.
  Sight sight(const Cache& cache, const std::vector<float>& out, const std::vector<float>& lse) const {
    Sight sight;
    sight.answers = Sight::bits_of(out, lse);
    for (std::size_t h = 0; h < config.kv_heads; ++h) {
      const auto add = [&](std::vector<std::int64_t>& to, const std::vector<Position>& positions) {
        to.push_back(-static_cast<std::int64_t>(h) - 1);
        for (const Position position : positions) to.push_back(position.value);
      };
      add(sight.resident, cache.resident_positions(h));
      add(sight.read, cache.read_positions(h));
    }
    const CacheStats stats = cache.stats();
    sight.counts = {stats.tokens,
                    stats.resident_tokens,
                    stats.evicted_tokens,
                    stats.last_read_tokens,
                    stats.last_skipped_tokens,
                    static_cast<std::size_t>(std::bit_cast<std::uint64_t>(stats.used_page_share))};
    return sight;
  }

  /// Whether every head, or all together where they share it, hold no more than the budget, and the newest token.
  bool holds_its_budget(const Cache& cache) const {
    std::size_t pages = 0, most = 0;
    for (std::size_t h = 0; h < config.kv_heads; ++h) {
      pages += cache.table(h).size();
      most = std::max(most, cache.table(h).size());
      if (cache.resident_positions(h).back() + 1 != cache.next_position()) return false;
    }
    const bool shared = SharedBudgetEvictor<Policy>;
    return shared ? pages <= config.kv_heads * cache.page_budget() : most <= cache.page_budget();
  }

  static void require(const Status& status) {
    if (!status) throw std::runtime_error("the cache refused a step: " + status.message());
  }

  Policy policy;
  CacheConfig config;
  std::size_t prompt_tokens = 0, pinned_pages = 0, budget_pages = 0;
  std::size_t tokens = 0;  // until everything has happened
  Findings findings;
};

}  // namespace kvsparse::conformance
