// SPDX-License-Identifier: Apache-2.0
// The smallest use: one layer, 10,000 tokens, of which RaaS keeps 1024. The rows are noise where an engine has its own.
//
//     g++ -std=c++20 -O3 -march=native -Iinclude -I/usr/include/eigen3 examples/01_first_step.cpp -o first && ./first
#include <cstdio>
#include <kvsparse/kvsparse.hpp>
#include <random>
#include <vector>

int main() {
  const kvsparse::CacheConfig config{.query_heads = 32, .kv_heads = 8, .head_dim = 128, .budget_tokens = 1024};
  kvsparse::PagedKvCache<kvsparse::Raas, Eigen::half> cache(config);  // allocates here, and never again

  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> k(8 * 128), v(k.size()), q(32 * 128), out(q.size());
  for (int token = 0; token < 10000; ++token) {
    for (auto* rows : {&k, &v, &q}) {
      for (float& x : *rows) x = normal(random);
    }
    const kvsparse::Status appended = cache.append(k, v);  // keys rotated already, at their true positions
    const kvsparse::Status attended = appended ? kvsparse::attend(cache, q, out) : appended;
    if (!attended) return std::puts(attended.message().c_str()), 1;
  }
  const kvsparse::CacheStats stats = cache.stats();
  std::printf("%zu tokens seen, %zu kept, at most %zu; %zu KiB of keys and values\n", stats.tokens,
              stats.resident_tokens, stats.peak_resident_tokens, stats.peak_resident_bytes / 1024);
  return 0;
}
