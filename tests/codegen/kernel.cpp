// SPDX-License-Identifier: Apache-2.0
// The decode kernel and nothing else, for check_kernel.py, which reads the instructions.
#include <kvsparse/attention/page_kernel.hpp>

using Stored = STORED;

#ifndef NAIVE
void kernel(const kvsparse::PagedKv<Stored, Stored>& kv, std::span<const kvsparse::PageRead> reads,
            const float* queries, std::size_t query_stride, std::span<kvsparse::SoftmaxState> states,
            kvsparse::PageTap tap) {
  kvsparse::attend_pages(kv, reads, queries, query_stride, states, tap);
}
#else
// What the check has to find: a dot product that a compiler does not vectorise.
float dot(const Stored* row, const float* query, std::size_t size) {
  float sum = 0.0F;
  for (std::size_t i = 0; i < size; ++i) sum += static_cast<float>(row[i]) * query[i];
  return sum;
}
#endif
