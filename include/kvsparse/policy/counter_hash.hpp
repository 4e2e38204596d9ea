// SPDX-License-Identifier: Apache-2.0
// Random numbers without a state: a hash of a seed and of what the number is for, so that a run repeats exactly and a
// copy of a cache goes on as the original would.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace kvsparse {

/// 64 even bits. The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), once for the seed and once for each
/// counter.
constexpr std::uint64_t counter_hash(std::uint64_t seed, std::initializer_list<std::uint64_t> counters) {
  const auto mix = [](std::uint64_t x) {
    x += 0x9e3779b97f4a7c15U;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
    return x ^ (x >> 31);
  };
  std::uint64_t hash = mix(seed);
  for (const std::uint64_t counter : counters) hash = mix(hash ^ counter);
  return hash;
}

}  // namespace kvsparse
