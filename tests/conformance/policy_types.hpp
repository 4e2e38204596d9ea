// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "kvsparse/policy/name_table.hpp"

namespace kvsparse_test {

/// A list of policies as GoogleTest wants it.
template <class List>
struct TypesOf;
template <class... Policies>
struct TypesOf<kvsparse::PolicyList<Policies...>> {
  using Types = testing::Types<Policies...>;
};

/// Calls a test by its policy's name.
struct NameOfPolicy {
  template <class Policy>
  static std::string GetName(int) {
    return std::string(Policy::name);
  }
};

}  // namespace kvsparse_test
