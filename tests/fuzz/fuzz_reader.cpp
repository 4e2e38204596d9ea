// SPDX-License-Identifier: Apache-2.0
// A libFuzzer target for the reader that KVSPARSE_FUZZED_READER names.
#include <cstddef>
#include <cstdint>

#include "inputs.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  kvsparse_test::KVSPARSE_FUZZED_READER({reinterpret_cast<const char*>(data), size});
  return 0;
}
