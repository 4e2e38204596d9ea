// SPDX-License-Identifier: Apache-2.0
//
// What few_named_caches.cpp compiles: each kind of policy state and of answer, and the two ways to store a row.
#pragma once

#include "kvsparse/core/scalar.hpp"
#include "kvsparse/policy/name_table.hpp"

namespace kvsparse_test {

/// An evictor by evidence, a selector, one of each, one that trims and looks at keys and recent queries, and one that
/// answers for what is gone.
using FewPolicies =
    kvsparse::PolicyList<kvsparse::Raas, kvsparse::Quest, kvsparse::Compose<kvsparse::H2o, kvsparse::Quest>,
                         kvsparse::RKv, kvsparse::StreamingSketch>;
inline constexpr kvsparse::ScalarType few_scalar_types[] = {kvsparse::ScalarType::f32, kvsparse::ScalarType::int8};

}  // namespace kvsparse_test
