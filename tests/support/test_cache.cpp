// SPDX-License-Identifier: Apache-2.0
#include "test_cache.hpp"

#include "engine/named_cache.hpp"
#include "kvsparse/interop/snapshot.hpp"

namespace kvsparse_test {

using kvsparse::HeadRows;
using kvsparse::Status;
using kvsparse::TokenRows;

struct TestCache::Hidden {
  kvsparse::AnyCache cache;
};

namespace {
Settings with_small_periods(std::string_view policy, const Settings& settings) {
  Settings result;
  if (aims_below_budget(policy)) result = short_periods(kvsparse::policy_facts(policy).option_keys, small_lag);
  result.insert(result.end(), settings.begin(), settings.end());
  return result;
}
}  // namespace

TestCache::TestCache(std::string_view policy, kvsparse::ScalarType scalar, const kvsparse::CacheConfig& config,
                     const Settings& settings)
    : hidden_(new Hidden{kvsparse_tools::named_cache(policy, scalar, config, with_small_periods(policy, settings))}) {}
TestCache::TestCache(const TestCache& other) : hidden_(new Hidden{other.hidden_->cache}) {}
TestCache& TestCache::operator=(const TestCache& other) {
  hidden_->cache = other.hidden_->cache;
  return *this;
}
TestCache::TestCache(TestCache&&) noexcept = default;
TestCache& TestCache::operator=(TestCache&&) noexcept = default;
TestCache::~TestCache() = default;

Status TestCache::append(HeadRows<const float> k, HeadRows<const float> v) { return hidden_->cache.append(k, v); }
Status TestCache::append(std::span<const float> k, std::span<const float> v) { return hidden_->cache.append(k, v); }
Status TestCache::append_prompt(TokenRows<const float> k, TokenRows<const float> v) {
  return hidden_->cache.append_prompt(k, v);
}
Status TestCache::append_prompt(std::span<const float> k, std::span<const float> v) {
  return hidden_->cache.append_prompt(k, v);
}
void TestCache::end_prompt() { hidden_->cache.end_prompt(); }
void TestCache::clear() { hidden_->cache.clear(); }
Status TestCache::attend(HeadRows<const float> q, HeadRows<float> out, std::span<float> lse) {
  return hidden_->cache.attend(q, out, lse);
}
Status TestCache::attend(std::span<const float> q, std::span<float> out, std::span<float> lse) {
  return hidden_->cache.attend(q, out, lse);
}
Status TestCache::attend(std::span<const float> q, std::span<float> out, std::span<float> lse,
                         kvsparse::ExecutorRef executor) {
  return hidden_->cache.attend(q, out, lse, executor);
}
Status TestCache::attend_prompt(TokenRows<const float> q, TokenRows<float> out) {
  return hidden_->cache.attend_prompt(q, out);
}

void TestCache::save(std::ostream& out) const { kvsparse::save(hidden_->cache, out); }
void TestCache::load(std::istream& in) { kvsparse::load(hidden_->cache, in); }

const kvsparse::CacheConfig& TestCache::config() const { return hidden_->cache.config(); }
std::string_view TestCache::policy_name() const { return hidden_->cache.policy_name(); }
std::size_t TestCache::length() const { return static_cast<std::size_t>(hidden_->cache.next_position().value); }
kvsparse::CacheStats TestCache::stats() const { return hidden_->cache.stats(); }

namespace {
std::vector<int> numbers(const std::vector<kvsparse::Position>& positions) {
  std::vector<int> result;
  for (const kvsparse::Position position : positions) result.push_back(static_cast<int>(position.value));
  return result;
}
}  // namespace

std::vector<int> TestCache::resident(std::size_t kv_head) const {
  return numbers(hidden_->cache.resident_positions(kv_head));
}
std::vector<int> TestCache::read(std::size_t kv_head) const { return numbers(hidden_->cache.read_positions(kv_head)); }

std::vector<std::string> policy_names() { return kvsparse::policy_names(); }
bool policy_evicts(std::string_view name) { return kvsparse::policy_facts(name).evicts; }
bool policy_selects(std::string_view name) { return kvsparse::policy_facts(name).selects; }
kvsparse::ScalarType scalar_type(std::string_view name) { return kvsparse::scalar_type(name); }

}  // namespace kvsparse_test
