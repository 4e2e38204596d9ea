// SPDX-License-Identifier: Apache-2.0
// Typed access to a JSON object that somebody else wrote; what does not fit is one sentence that names file and key.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>

#include "../common/file_error.hpp"

namespace kvsparse_tools {

/// Typed access to a JSON object of a named file. A key that is null counts as absent, as in the files' own tools.
class JsonFields {
 public:
  JsonFields(const nlohmann::json& object, std::filesystem::path file, std::string where = "")
      : object_(object), file_(std::move(file)), where_(std::move(where)) {
    if (!object_.is_object()) throw FileError(file_, (where_.empty() ? "" : where_ + " ") + "is not a JSON object");
  }

  const nlohmann::json* find(const std::string& key) const {
    const auto found = object_.find(key);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }

  std::optional<std::size_t> size(const std::string& key) const {
    constexpr std::uint64_t limit = std::uint64_t{1} << 24;  // far beyond any model; keeps products within 64 bits
    const nlohmann::json* value = find(key);
    if (value == nullptr) return std::nullopt;
    if (!value->is_number_unsigned() || value->get<std::uint64_t>() == 0 || value->get<std::uint64_t>() > limit) {
      refuse(key, *value, "an integer from 1 to " + std::to_string(limit) + " was expected");
    }
    return static_cast<std::size_t>(value->get<std::uint64_t>());
  }

  std::size_t required_size(const std::string& key) const {
    const auto value = size(key);
    if (!value) fail("has no " + key);
    return *value;
  }

  std::optional<double> positive_number(const std::string& key) const {
    const nlohmann::json* value = find(key);
    if (value == nullptr) return std::nullopt;
    if (!value->is_number() || !(value->get<double>() > 0.0)) refuse(key, *value, "a positive number was expected");
    return value->get<double>();
  }

  double required_number(const std::string& key) const {
    const auto value = positive_number(key);
    if (!value) fail("has no " + key);
    return *value;
  }

  const nlohmann::json& required(const std::string& key) const {
    const nlohmann::json* value = find(key);
    if (value == nullptr) fail("has no " + key);
    return *value;
  }

  const nlohmann::json& required_object(const std::string& key) const {
    const nlohmann::json& value = required(key);
    if (!value.is_object()) fail(key + " is not a JSON object");
    return value;
  }

  /// Empty when absent.
  const nlohmann::json& array(const std::string& key) const {
    static const nlohmann::json none = nlohmann::json::array();
    const nlohmann::json* value = find(key);
    if (value == nullptr) return none;
    if (!value->is_array()) fail(key + " is not an array");
    return *value;
  }

  bool flag(const std::string& key, bool otherwise) const {
    const nlohmann::json* value = find(key);
    if (value == nullptr) return otherwise;
    if (!value->is_boolean()) refuse(key, *value, "true or false was expected");
    return value->get<bool>();
  }

  std::string text(const std::string& key, const std::string& otherwise) const {
    const nlohmann::json* value = find(key);
    if (value == nullptr) return otherwise;
    if (!value->is_string()) refuse(key, *value, "a string was expected");
    return value->get<std::string>();
  }

  std::string required_text(const std::string& key) const {
    (void)required(key);
    return text(key, "");
  }

  [[noreturn]] void refuse(const std::string& key, const nlohmann::json& value, const std::string& reason) const {
    fail(key + " is " + in_quotes(value.dump()) + ", " + reason);
  }
  [[noreturn]] void fail(const std::string& problem) const {
    throw FileError(file_, (where_.empty() ? "" : where_ + " ") + problem);
  }

 private:
  const nlohmann::json& object_;
  std::filesystem::path file_;
  std::string where_;
};

}  // namespace kvsparse_tools
