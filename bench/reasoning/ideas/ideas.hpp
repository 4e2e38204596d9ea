// SPDX-License-Identifier: Apache-2.0
// Ideas for a policy that keeps what RaaS forgets during long silences. `Ideas` is their name table.
#pragma once

#include <kvsparse/cache/any_cache.hpp>

#include "decayed_mass.hpp"
#include "late_mass.hpp"
#include "late_use.hpp"
#include "odd_key.hpp"
#include "recurrence.hpp"
#include "segmented_lru.hpp"
#include "sharpest_token.hpp"
#include "value_weighted.hpp"

namespace kvsparse_tools::ideas {

using Ideas = kvsparse::PolicyList<DecayedMass, Recurrence, SegmentedLru, LateUse, LateMass, SharpestToken,
                                   ValueWeighted, OddKey>;

}  // namespace kvsparse_tools::ideas
