// SPDX-License-Identifier: Apache-2.0
//
// How long tests are made longer: by environment variables.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <string>

namespace kvsparse_test {

inline std::string test_setting(const char* name) {
  const char* const text = std::getenv(name);
  return text == nullptr ? "" : text;
}
inline std::size_t test_setting(const char* name, std::size_t otherwise) {
  const std::string text = test_setting(name);
  return text.empty() ? otherwise : std::stoull(text);
}

}  // namespace kvsparse_test
