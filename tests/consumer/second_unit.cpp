// SPDX-License-Identifier: Apache-2.0
// Includes what decode_loop.cpp includes: a function that lacks its `inline` is then defined twice.
#include "second_unit.hpp"

#include "kvsparse_headers.hpp"

std::size_t bytes_in_second_unit() {
  const kvsparse::CacheConfig config{
      .query_heads = 4, .kv_heads = 2, .head_dim = 16, .page_size = 4, .budget_tokens = 32};
  return kvsparse::PagedKvCache<kvsparse::Raas, Eigen::half>::bytes_required(config);
}
