// SPDX-License-Identifier: Apache-2.0
//
// A cache chosen by name, as tests want it: with positions that are plain numbers.
#pragma once

#include <iosfwd>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvsparse/cache/cache_config.hpp"
#include "kvsparse/core/executor.hpp"
#include "kvsparse/core/scalar.hpp"
#include "kvsparse/core/views.hpp"
#include "kvsparse/policy/options.hpp"
#include "policy_kinds.hpp"

namespace kvsparse_test {

using Settings = std::vector<kvsparse::OptionSetting>;

/// A cache under the policy's own options, but for the periods of those that aim below their budget: the published ones
/// are longer than the budgets of tests.
class TestCache {
 public:
  TestCache(std::string_view policy, kvsparse::ScalarType scalar, const kvsparse::CacheConfig& config,
            const Settings& settings = {});
  TestCache(const TestCache& other);
  TestCache& operator=(const TestCache& other);
  TestCache(TestCache&&) noexcept;
  TestCache& operator=(TestCache&&) noexcept;
  ~TestCache();

  kvsparse::Status append(kvsparse::HeadRows<const float> k, kvsparse::HeadRows<const float> v);
  kvsparse::Status append(std::span<const float> k, std::span<const float> v);
  kvsparse::Status append_prompt(kvsparse::TokenRows<const float> k, kvsparse::TokenRows<const float> v);
  kvsparse::Status append_prompt(std::span<const float> k, std::span<const float> v);
  void end_prompt();
  void clear();
  kvsparse::Status attend(kvsparse::HeadRows<const float> q, kvsparse::HeadRows<float> out, std::span<float> lse = {});
  kvsparse::Status attend(std::span<const float> q, std::span<float> out, std::span<float> lse = {});
  kvsparse::Status attend_prompt(kvsparse::TokenRows<const float> q, kvsparse::TokenRows<float> out);
  kvsparse::Status attend(std::span<const float> q, std::span<float> out, std::span<float> lse,
                          kvsparse::ExecutorRef executor);

  void save(std::ostream& out) const;
  void load(std::istream& in);

  const kvsparse::CacheConfig& config() const;
  std::string_view policy_name() const;
  std::size_t length() const;
  kvsparse::CacheStats stats() const;
  std::vector<int> resident(std::size_t kv_head) const;
  std::vector<int> read(std::size_t kv_head) const;

 private:
  struct Hidden;
  std::unique_ptr<Hidden> hidden_;
};

std::vector<std::string> policy_names();
bool policy_evicts(std::string_view name);
bool policy_selects(std::string_view name);
kvsparse::ScalarType scalar_type(std::string_view name);

inline constexpr kvsparse::ScalarType scalar_types[] = {kvsparse::ScalarType::f32, kvsparse::ScalarType::f16,
                                                        kvsparse::ScalarType::bf16};
/// With those whose rounding the naive replay does not know.
inline constexpr kvsparse::ScalarType all_scalar_types[] = {kvsparse::ScalarType::f32, kvsparse::ScalarType::f16,
                                                            kvsparse::ScalarType::bf16, kvsparse::ScalarType::int8};
inline std::string_view name_of(kvsparse::ScalarType scalar) {
  return kvsparse::scalar_type_names[static_cast<std::size_t>(scalar)];
}

}  // namespace kvsparse_test
