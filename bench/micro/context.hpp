// SPDX-License-Identifier: Apache-2.0
// What every result of the timing benches says of where it comes from.
#pragma once

#include <algorithm>
#include <kvsparse/core/simd.hpp>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "build_info.hpp"
#include "cache_sizes.hpp"
#include "common/policy_settings.hpp"
#include "machine_limits.hpp"

namespace kvsparse_bench {

/// Median and range over the rounds.
struct Spread {
  double median, least, most;

  explicit Spread(const std::vector<double>& values)
      : median(kvsparse_bench::median(values)),
        least(*std::min_element(values.begin(), values.end())),
        most(*std::max_element(values.begin(), values.end())) {}
  nlohmann::ordered_json json() const { return {{"median", median}, {"min", least}, {"max", most}}; }
};

/// The command that a result came from; run it again for the same table.
inline std::string command_line(int argc, const char* const* argv) {
  std::string line;
  for (int i = 0; i < argc; ++i) {
    const std::string argument = argv[i];
    const bool plain = argument.find_first_of(" |()*?$'\"\\;&<>") == std::string::npos && !argument.empty();
    line += (i > 0 ? " " : "") + (plain ? argument : "'" + argument + "'");
  }
  return line;
}

/// Throws UsageError in a build whose times mean nothing.
inline void refuse_debug_build() {
#if !defined(NDEBUG) || !defined(__OPTIMIZE__)
  throw kvsparse_tools::UsageError("this is a debug build, whose times mean nothing; build with the preset 'release'");
#endif
}

inline nlohmann::ordered_json context_json() {
  const CacheSizes caches = cache_sizes();
  return {{"processor", processor_name()},
          {"hardware_threads", hardware_threads()},
          {"compiler", build_info::compiler},
          {"flags", build_info::flags},
          {"commit", build_info::commit},
          {"vector_lanes", kvsparse::simd::lanes},
          {"l2_bytes_per_core", caches.l2_per_core},
          {"l3_bytes", caches.l3},
          {"cache_sizes_from", caches.source}};
}

}  // namespace kvsparse_bench
