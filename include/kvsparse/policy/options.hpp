// SPDX-License-Identifier: Apache-2.0
// Sets a policy's options by name, from the one list that its Options::visit gives.
#pragma once

#include <charconv>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "../core/status.hpp"
#include "compose.hpp"

namespace kvsparse {

/// One --set key=value.
struct OptionSetting {
  std::string key;    ///< of option_keys, such as "alpha"
  std::string value;  ///< a number, true or false, or a name of an enum's
};

namespace detail {

/// "a|b|c" for an enum, whose policy knows its names; else empty.
template <class Policy, class Value>
std::string_view names_of(Value value) {
  if constexpr (std::is_enum_v<Value>) {
    return Policy::names_of(value);
  } else {
    return {};
  }
}

/// Calls visit(name, value&, names) for each option; names is "a|b|c" for an enum, else empty.
template <class Policy, class Visit>
void visit_options(Policy& policy, Visit&& visit) {
  if constexpr (requires { typename Policy::EvictPart; }) {
    visit_options(policy.evict, visit);
    visit_options(policy.select_part, visit);
  } else if constexpr (HasOptions<Policy>) {
    policy.options.visit([&](std::string_view name, auto& value) { visit(name, value, names_of<Policy>(value)); });
  }
}

/// Parses text into a bool, number or enum; false if it is none.
template <class Value>
bool parse_option(std::string_view text, std::string_view names, Value& value) {
  if constexpr (std::is_same_v<Value, bool>) {
    const bool yes = text == "true" || text == "1" || text == "on" || text == "yes";
    const bool no = text == "false" || text == "0" || text == "off" || text == "no";
    if (yes || no) value = yes;
    return yes || no;
  } else if constexpr (std::is_enum_v<Value>) {
    for (int index = 0; !names.empty(); ++index) {
      const std::size_t end = names.find('|');
      if (names.substr(0, end) == text) {
        value = static_cast<Value>(index);
        return true;
      }
      names = end == std::string_view::npos ? std::string_view{} : names.substr(end + 1);
    }
    return false;
  } else {
    Value parsed{};
    const auto [last, error] = std::from_chars(text.data(), text.data() + text.size(), parsed);
    if (error != std::errc{} || last != text.data() + text.size()) return false;
    value = parsed;
    return true;
  }
}

template <class Value>
std::string expected_option(std::string_view names) {
  if constexpr (std::is_same_v<Value, bool>) return "true or false";
  if constexpr (std::is_enum_v<Value>) return "one of " + std::string(names);
  if constexpr (std::is_floating_point_v<Value>) return "a number";
  return "a whole number >= 0";
}

template <class Policy>
bool set_preset(Policy& policy, std::string_view preset, std::string& known) {
  if constexpr (requires { typename Policy::EvictPart; }) {
    const bool in_evict = set_preset(policy.evict, preset, known);
    const bool in_select = set_preset(policy.select_part, preset, known);
    return in_evict || in_select;
  } else if constexpr (requires { policy.options.preset(preset); }) {
    known += std::string(known.empty() ? "" : "|") + std::string(decltype(policy.options)::presets);
    return policy.options.preset(preset);
  } else {
    return false;
  }
}

}  // namespace detail

/// The keys that set_option knows for a policy, "preset" among them if it has presets.
template <class Policy>
std::vector<std::string> option_keys(Policy policy = {}) {
  std::vector<std::string> keys;
  detail::visit_options(policy, [&](std::string_view name, auto&, std::string_view) { keys.emplace_back(name); });
  std::string presets;
  detail::set_preset(policy, "", presets);
  if (!presets.empty()) keys.emplace_back("preset");
  return keys;
}

/// Sets one option; false if the policy has no such key. Throws ConfigError if the value is none that the key takes.
template <class Policy>
bool set_option(Policy& policy, const OptionSetting& setting) {
  if (setting.key == "preset") {
    std::string known;
    if (detail::set_preset(policy, setting.value, known) || known.empty()) return !known.empty();
    KVSPARSE_THROW(
        ConfigError("preset = " + setting.value + ": policy " + std::string(Policy::name) + " has " + known));
  }
  bool known = false;
  detail::visit_options(policy, [&]<class Value>(std::string_view name, Value& value, std::string_view names) {
    if (name != setting.key) return;
    known = true;
    if (!detail::parse_option(setting.value, names, value)) {
      KVSPARSE_THROW(
          ConfigError(setting.key + " = " + setting.value + " is not " + detail::expected_option<Value>(names)));
    }
  });
  return known;
}

/// The policy with all of these set, a preset before the others, whatever their order. Throws ConfigError for a value
/// as set_option does, and for a key that the policy does not have, with those that it has.
template <class Policy>
Policy with_options(Policy policy, std::span<const OptionSetting> settings) {
  for (const bool presets : {true, false}) {
    for (const OptionSetting& setting : settings) {
      if ((setting.key == "preset") != presets || set_option(policy, setting)) continue;
      std::string known;
      for (const std::string& key : option_keys<Policy>()) known += (known.empty() ? "" : ", ") + key;
      KVSPARSE_THROW(ConfigError("policy " + std::string(Policy::name) + " has no option " + setting.key + "; it has " +
                                 (known.empty() ? "none" : known)));
    }
  }
  return policy;
}

}  // namespace kvsparse
