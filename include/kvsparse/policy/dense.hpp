// SPDX-License-Identifier: Apache-2.0
// Dense: keeps every token and reads every token. The reference that everything else is compared with.
// Source: Vaswani et al. 2017 (1706.03762).  Needs: nothing.  Per step: O(N d).  Memory: O(N), up to max_tokens.
#pragma once

#include "policy.hpp"

namespace kvsparse {

struct Dense {
  static constexpr std::string_view name = "dense";
};

}  // namespace kvsparse
