// SPDX-License-Identifier: Apache-2.0
// A libFuzzer target for verbs: four bytes choose the world of model/model_world.hpp, each further five are a verb.
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <span>
#include <string>
#include <vector>

#include "model/model_world.hpp"
#include "support/few_named_caches.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace kvsparse_test;
  constexpr std::size_t of_world = 4, of_verb = 5;
  if (size < of_world) return 0;
  static const std::vector<std::string> policies = kvsparse::policy_names<FewPolicies>();
  constexpr std::size_t page_sizes[] = {1, 2, 5, 16};
  ModelWorld world(policies[data[0] % policies.size()], few_scalar_types[data[1] % std::size(few_scalar_types)],
                   page_sizes[data[2] % 4], data[3]);
  constexpr std::size_t kinds = static_cast<std::size_t>(Verb::Kind::compare_with_twin) + 1;
  for (std::span<const std::uint8_t> rest(data + of_world, size - of_world); rest.size() >= of_verb;
       rest = rest.subspan(of_verb)) {
    const std::uint32_t seed = rest[3] + std::uint32_t{256} * rest[4];
    world.run({static_cast<Verb::Kind>(rest[0] % kinds), rest[1], rest[2], seed});
  }
  world.finish();
  return 0;
}
