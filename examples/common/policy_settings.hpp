// SPDX-License-Identifier: Apache-2.0
// What the --set options of a command line mean for each of the policies it lists.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <kvsparse/cache/any_cache.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "file_error.hpp"

namespace kvsparse_tools {

/// The command line asks for something that cannot be done. what() is one sentence.
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct PolicySettings {
  std::vector<kvsparse::OptionSetting> options;
  std::size_t read_budget_tokens = 0;  // 0: as the budget
};

namespace detail {

/// A --set: `policy` is empty, or the policy (or part of a composition) that it is restricted to.
struct ScopedSetting {
  std::string policy, key, value;
};

inline ScopedSetting parse_setting(const std::string& text) {
  const auto equals = text.find('=');
  if (equals == std::string::npos || equals == 0) {
    throw UsageError("--set takes key=value or policy.key=value, not " + in_quotes(text));
  }
  const std::string key = text.substr(0, equals);
  const auto dot = key.find('.');
  if (dot == std::string::npos) return {"", key, text.substr(equals + 1)};
  return {key.substr(0, dot), key.substr(dot + 1), text.substr(equals + 1)};
}

/// "raas" covers raas and raas+quest; "raas+quest" covers only that composition.
inline bool covers(const std::string& scope, const std::string& policy) {
  if (scope.empty() || scope == policy) return true;
  const auto plus = policy.find('+');
  return plus != std::string::npos && (policy.substr(0, plus) == scope || policy.substr(plus + 1) == scope);
}

/// Keys that --set knows for a policy: its own, and the read budget of those that select.
template <class List>
std::vector<std::string> setting_keys(const std::string& policy) {
  const std::optional<kvsparse::PolicyFacts> facts = kvsparse::find_policy_facts<List>(policy);
  if (!facts) throw kvsparse::unknown_policy(policy);
  std::vector<std::string> keys = facts->option_keys;
  if (facts->selects) keys.emplace_back("read_budget");
  return keys;
}

inline std::size_t parse_read_budget(const std::string& text) {
  std::size_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || value == 0) {
    throw UsageError("read_budget is " + in_quotes(text) + ", a whole number of at least 1 was expected");
  }
  return value;
}

template <class List>
void refuse_setting(const std::string& text, const std::vector<std::string>& policies) {
  std::string known;
  for (const std::string& policy : policies) {
    known += "; " + policy + " has ";
    const std::vector<std::string> keys = setting_keys<List>(policy);
    for (const std::string& key : keys) known += (key == keys.front() ? "" : ", ") + key;
    if (keys.empty()) known += "none";
  }
  std::vector<std::string> all;
  for (const std::string& policy : kvsparse::policy_names<List>()) {
    for (const std::string& key : setting_keys<List>(policy)) {
      if (std::find(all.begin(), all.end(), key) == all.end()) all.push_back(key);
    }
  }
  known += "; all keys are ";
  for (const std::string& key : all) known += (key == all.front() ? "" : ", ") + key;
  throw UsageError("--set " + in_quotes(text) + " fits none of the listed policies" + known);
}

}  // namespace detail

/// One entry per policy of `policies`, which are of the list. A key applies to every listed policy that has it,
/// "raas.key" only where raas is. Throws UsageError for a text that applies to none, kvsparse::ConfigError for an
/// unknown policy.
template <class List = kvsparse::NamedPolicies>
std::vector<PolicySettings> settings_per_policy(const std::vector<std::string>& policies,
                                                const std::vector<std::string>& texts) {
  std::vector<std::vector<std::string>> keys;
  for (const std::string& policy : policies) keys.push_back(detail::setting_keys<List>(policy));
  std::vector<PolicySettings> result(policies.size());
  for (const std::string& text : texts) {
    const detail::ScopedSetting setting = detail::parse_setting(text);
    bool applied = false;
    for (std::size_t i = 0; i < policies.size(); ++i) {
      const bool has_key = std::find(keys[i].begin(), keys[i].end(), setting.key) != keys[i].end();
      if (!has_key || !detail::covers(setting.policy, policies[i])) continue;
      applied = true;
      if (setting.key == "read_budget") {
        result[i].read_budget_tokens = detail::parse_read_budget(setting.value);
      } else {
        result[i].options.push_back({setting.key, setting.value});
      }
    }
    if (!applied) detail::refuse_setting<List>(text, policies);
  }
  return result;
}

}  // namespace kvsparse_tools
