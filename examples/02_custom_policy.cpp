// SPDX-License-Identifier: Apache-2.0
// A policy from an empty file: written, put through the conformance suite, and replayed beside published ones.
//
//   02_custom_policy mine.csv && python3 bench/plot.py sweep --csv mine.csv --output .    # sweep.png: the plot
#include <kvsparse/kvsparse.hpp>
#include <kvsparse/testing/count_allocations.hpp>
#include <kvsparse/testing/policy_conformance.hpp>
#include <kvsparse/testing/policy_replay.hpp>

#include <fstream>
#include <iostream>

using namespace kvsparse;

/// Gives up the page with the least attention mass, where what was long ago counts ever less.
struct FadingMass {
  static constexpr std::string_view name = "fading_mass";
  static constexpr EvidenceKind evidence = EvidenceKind::page_mass;  // the kernel tells observe each page's share

  struct Options {
    double decay = 0.95;  ///< of a page's mass, from one query to the next
    void visit(auto&& field) { field("decay", decay); }
    std::string problem() const {
      return decay >= 0.0 && decay <= 1.0 ? "" : "decay = " + std::to_string(decay) + " is not in [0, 1]";
    }
  } options;

  struct PageState {  // the cache holds one for each resident page; it forks, rolls back and is saved with it
    float mass = 0.0F;
  };

  void observe(HeadView<FadingMass> head, const Evidence& step) const {
    for (const PageIndex page : head.pages()) {
      float& mass = head.state(page).mass;
      mass *= static_cast<float>(options.decay);
      if (step.visited(page)) mass += step.group_mass(page);  // of a page that was not read nothing is known
    }
  }
  PageIndex victim(HeadView<FadingMass> head) const {
    return head.lowest_evictable([&](PageIndex page) { return head.state(page).mass; });
  }
};

using Mine = testing::Types<FadingMass>;
INSTANTIATE_TYPED_TEST_SUITE_P(Mine, PolicyConformance, Mine);

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  if (RUN_ALL_TESTS() != 0) return 1;

  const std::vector<ReplayRow> rows = replay_each<FadingMass, Raas, H2o, StreamingLlm, Random, Quest, Oracle>(
      milestone_layer(), {64, 128, 256, 512}, /*page_size=*/4);
  print_table(std::cout, rows);
  if (argc < 2) return 0;
  std::ofstream csv(argv[1]);
  write_csv(csv, rows);
  return csv.good() ? 0 : 1;
}
