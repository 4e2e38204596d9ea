// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "kvsparse/core/status.hpp"

namespace kvsparse_test {

/// The sentence of the ConfigError with which act() is refused; "not refused" if it is not.
template <class Act>
std::string refusal(Act&& act) {
  try {
    act();
  } catch (const kvsparse::ConfigError& error) {
    return error.what();
  }
  return "not refused";
}

}  // namespace kvsparse_test
