// SPDX-License-Identifier: Apache-2.0
// The caches and the memory of this machine, as the kernel tells them.
#pragma once

#include <unistd.h>

#include <array>
#include <cstddef>
#include <fstream>
#include <string>

namespace kvsparse_bench {

enum class MemoryLevel { l2, l3, dram };
inline constexpr std::array<MemoryLevel, 3> memory_levels{MemoryLevel::l2, MemoryLevel::l3, MemoryLevel::dram};
inline constexpr const char* level_names[] = {"L2", "L3", "DRAM"};
inline const char* name_of(MemoryLevel level) { return level_names[static_cast<std::size_t>(level)]; }

struct CacheSizes {
  std::size_t l2_per_core = 0;
  std::size_t l3 = 0;  ///< the one that the first core uses; 0 where there is none
  std::string source;

  /// The smallest level that holds `bytes` which `threads` cores share evenly.
  MemoryLevel level_of(double bytes, std::size_t threads) const {
    if (bytes <= static_cast<double>(l2_per_core * threads)) return MemoryLevel::l2;
    return bytes <= static_cast<double>(l3) ? MemoryLevel::l3 : MemoryLevel::dram;
  }
};

namespace detail {

/// The size of the first core's data or unified cache of `level`; 0 if sysfs does not tell.
inline std::size_t sysfs_cache_bytes(int level) {
  for (int index = 0; index < 8; ++index) {
    const std::string directory = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
    int found = 0;
    std::string type;
    if (!(std::ifstream(directory + "level") >> found) || !(std::ifstream(directory + "type") >> type)) continue;
    if (found != level || type == "Instruction") continue;
    std::size_t size = 0;
    char unit = 'B';
    std::ifstream(directory + "size") >> size >> unit;
    return unit == 'K' ? size << 10 : unit == 'M' ? size << 20 : size;
  }
  return 0;
}

}  // namespace detail

inline CacheSizes cache_sizes() {
  CacheSizes sizes{detail::sysfs_cache_bytes(2), detail::sysfs_cache_bytes(3), "sysfs"};
  if (sizes.l2_per_core != 0) return sizes;
#if defined(_SC_LEVEL2_CACHE_SIZE) && defined(_SC_LEVEL3_CACHE_SIZE)
  const long l2 = ::sysconf(_SC_LEVEL2_CACHE_SIZE), l3 = ::sysconf(_SC_LEVEL3_CACHE_SIZE);
  if (l2 > 0) return {static_cast<std::size_t>(l2), l3 > 0 ? static_cast<std::size_t>(l3) : 0, "sysconf"};
#endif
  return {std::size_t{512} << 10, std::size_t{16} << 20, "assumed, this system does not tell"};
}

/// Memory that a program may still take without swapping; 0 if the system does not tell.
inline std::size_t available_memory() {
  std::ifstream info("/proc/meminfo");
  std::string name, unit;
  for (std::size_t kib = 0; info >> name >> kib; std::getline(info, unit)) {
    if (name == "MemAvailable:") return kib << 10;
  }
  return 0;
}

inline std::string processor_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

}  // namespace kvsparse_bench
