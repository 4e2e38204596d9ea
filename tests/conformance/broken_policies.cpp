// SPDX-License-Identifier: Apache-2.0
//
// A suite that cannot fail tests nothing: here are policies with one fault each, and which tests of PolicyConformance
// must find it, those and no others. A program of its own, because its tests are to fail.
#include <gtest/gtest.h>

#include <iostream>
#include <limits>
#include <map>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "kvsparse/testing/count_allocations.hpp"
#include "kvsparse/testing/policy_conformance.hpp"

namespace kvsparse_test {
namespace {

using namespace kvsparse;

enum class Fault {
  none,
  evicts_a_pin,
  names_no_page,
  is_misled_by_nan,
  trims_below_the_budget,
  reads_too_much,
  reads_nothing,
  weighs_by_nan,
  writes_in_select,
  allocates,
  throws,
  counts_in_a_global,
  counts_in_itself,
  knows_the_other_head,
  holds_a_pointer,
  names_an_option_twice,
  names_an_option_oddly,
  misspells_victim,
  misspells_select,
  misspells_beside_rows,
  misspells_beside_state,
};

/// Evicts the lowest mass, reads the newest pages, pins the first; and has a fault.
struct Broken {
  static constexpr std::string_view name = "broken";
  static constexpr EvidenceKind evidence = EvidenceKind::page_mass;
  static constexpr std::size_t period = 16;
  struct Options {
    Fault fault = Fault::none;
    bool pin = true;
    void visit(auto&& field) {
      field(fault == Fault::names_an_option_oddly ? "the pin" : "pin", pin);
      if (fault == Fault::names_an_option_twice) field("pin", pin);
    }
  } options;
  struct PageState {
    float mass = 0.0F;
    const void* self = nullptr;
  };
  struct HeadState {
    std::uint64_t selects = 0;
  };
  static inline std::uint64_t count_of_all = 0;
  mutable std::uint64_t own_count = 0;
  mutable Position latest{-1};

  bool has(Fault fault) const { return options.fault == fault; }

  std::size_t pinned_pages(const Geometry&) const { return options.pin ? 1 : 0; }
  void on_page_open(HeadView<Broken> head, PageIndex page) const {
    if (has(Fault::holds_a_pointer)) head.state(page).self = &head.state(page);
  }
  void observe(HeadView<Broken> head, const Evidence& step) const {
    if (has(Fault::throws)) throw std::runtime_error("no mass for me");
    if (has(Fault::allocates)) copy_.assign(head.size(), 0.0F), copy_.shrink_to_fit();
    for (const PageIndex page : head.pages()) {
      if (step.visited(page)) head.state(page).mass = step.group_mass(page);
      if (has(Fault::knows_the_other_head) && latest == step.position()) head.state(page).mass *= -1.0F;
    }
    latest = step.position();
  }
  PageIndex victim(HeadView<Broken> head) const {
    if (has(Fault::evicts_a_pin)) return PageIndex{0};
    if (has(Fault::names_no_page)) return PageIndex{static_cast<std::uint32_t>(head.size())};
    if (has(Fault::counts_in_a_global)) return nth(head, count_of_all++);
    if (has(Fault::counts_in_itself)) return nth(head, own_count++);
    if (has(Fault::is_misled_by_nan)) {
      PageIndex lowest{std::numeric_limits<std::uint32_t>::max()};
      float mass = std::numeric_limits<float>::max();
      for (const PageIndex page : head.evictable_pages()) {
        if (head.state(page).mass < mass) mass = head.state(lowest = page).mass;
      }
      return lowest;
    }
    return head.lowest_evictable([&](PageIndex page) { return head.state(page).mass; });
  }
  void trim(HeadView<Broken> head, PageList& pages) const {
    if (has(Fault::trims_below_the_budget) && head.evictable_count() > 0) pages.add(*head.evictable_pages().begin());
  }
  void select(HeadView<Broken> head, QueryGroup, Selection& selection) const {
    if (has(Fault::writes_in_select)) ++head.head_state().selects;
    if (has(Fault::reads_too_much)) selection.add_all();
    if (has(Fault::reads_nothing)) return;
    for (std::size_t i = 0; i < head.read_page_budget(); ++i) {
      const float weight = has(Fault::weighs_by_nan) ? std::numeric_limits<float>::quiet_NaN() : 0.0F;
      selection.add({PageIndex{static_cast<std::uint32_t>(head.size() - 1 - i)}, {}, weight, weight, 0});
    }
  }

 private:
  static PageIndex nth(const HeadView<Broken>& head, std::uint64_t n) {
    n %= head.evictable_count();
    for (const PageIndex page : head.evictable_pages()) {
      if (n-- == 0) return page;
    }
    return {};
  }
  mutable std::vector<float> copy_;
};

/// A fault, and the tests that must find it.
template <Fault F>
struct With {
  static Broken policy() {
    Broken policy;
    policy.options.fault = F;
    return policy;
  }
};
const std::map<std::string, std::pair<Fault, std::string_view>> faults = {
    {"none", {Fault::none, ""}},
    {"evicts_a_pin",
     {Fault::evicts_a_pin,
      "TheBudgetAndThePinsHold ALongPromptIsRefusedOrKeepsTheBudget RowsThatHoldNoNumbersBreakNothing"}},
    {"names_no_page",
     {Fault::names_no_page,
      "TheBudgetAndThePinsHold ALongPromptIsRefusedOrKeepsTheBudget RowsThatHoldNoNumbersBreakNothing"}},
    {"is_misled_by_nan", {Fault::is_misled_by_nan, "RowsThatHoldNoNumbersBreakNothing"}},
    {"trims_below_the_budget", {Fault::trims_below_the_budget, "BelowTheBudgetEveryBitIsThatOfDense"}},
    {"reads_too_much", {Fault::reads_too_much, "ReadsWithinTheReadBudget RowsThatHoldNoNumbersBreakNothing"}},
    {"reads_nothing",
     {Fault::reads_nothing, "ReadsWithinTheReadBudget AnswersAreFinite RowsThatHoldNoNumbersBreakNothing"}},
    {"weighs_by_nan", {Fault::weighs_by_nan, "AnswersAreFinite"}},
    {"writes_in_select", {Fault::writes_in_select, "VerbsThatOnlyLookWriteNoState"}},
    {"allocates", {Fault::allocates, "VerbsAllocateNothing"}},
    {"throws", {Fault::throws, "VerbsThrowNothing RowsThatHoldNoNumbersBreakNothing"}},
    {"counts_in_a_global",
     {Fault::counts_in_a_global,
      "TheSameInputGivesTheSameDecisions AClearedCacheIsANewOne ACopyGoesOnByItself AForkGoesOnByItself "
      "RejectedDraftsLeaveNoTrace TokensTakenBackLeaveNoTrace ASnapshotGoesOnToTheBit "
      "ADamagedSnapshotIsRefusedAndNothingChanges RowsThatHoldNoNumbersBreakNothing"}},
    {"counts_in_itself",
     {Fault::counts_in_itself,
      "AClearedCacheIsANewOne ASnapshotGoesOnToTheBit ADamagedSnapshotIsRefusedAndNothingChanges "
      "RowsThatHoldNoNumbersBreakNothing"}},
    {"knows_the_other_head",
     {Fault::knows_the_other_head, "TheSameInputGivesTheSameDecisions RejectedDraftsLeaveNoTrace"}},
    {"holds_a_pointer", {Fault::holds_a_pointer, "TheSameInputGivesTheSameDecisions"}},
    {"names_an_option_twice", {Fault::names_an_option_twice, "HasANameAndOptionsThatReadBack"}},
    {"names_an_option_oddly", {Fault::names_an_option_oddly, "HasANameAndOptionsThatReadBack"}},
    {"misspells_victim", {Fault::misspells_victim, "DecidesIfItWatches"}},
    {"misspells_select", {Fault::misspells_select, "DecidesIfItWatches"}},
    {"misspells_beside_rows", {Fault::misspells_beside_rows, "DecidesIfItWatches"}},
    {"misspells_beside_state", {Fault::misspells_beside_state, "DecidesIfItWatches"}},
};

// These faults take types of their own: what they leave out is a verb.
template <Fault F>
struct OnlyFault {
  Fault fault = F;
  void visit(auto&&) {}
};
struct Misspelt {
  static constexpr std::string_view name = "misspelt";
  static constexpr EvidenceKind evidence = EvidenceKind::page_mass;
  OnlyFault<Fault::misspells_victim> options;
  struct PageState {
    float mass = 0.0F;
  };
  void observe(HeadView<Misspelt> head, const Evidence& step) const {
    for (const PageIndex page : head.pages()) head.state(page).mass = step.group_mass(page);
  }
  PageIndex victm(HeadView<Misspelt> head) const {
    return head.lowest_evictable([&](PageIndex page) { return head.state(page).mass; });
  }
};
/// A trait is all that shows of it.
struct MisspeltSelector {
  static constexpr std::string_view name = "misspelt_selector";
  static constexpr PageSummary page_summary = PageSummary::min_max;
  OnlyFault<Fault::misspells_select> options;
  void selekt(HeadView<MisspeltSelector> head, QueryGroup queries, Selection& selection) const {
    head.upper_bounds(queries, head.scratch().first(head.size() * queries.size));
    selection.add_all();
  }
};
struct MisspeltReader {
  static constexpr std::string_view name = "misspelt_reader";
  static constexpr bool reads_rows = true;
  OnlyFault<Fault::misspells_beside_rows> options;
};
struct MisspeltCounter {
  static constexpr std::string_view name = "misspelt_counter";
  OnlyFault<Fault::misspells_beside_state> options;
  struct HeadState {
    std::uint64_t tokens = 0;
  };
};
template <class Policy>
struct Of {
  static Policy policy() { return {}; }
};

struct NameOfFault {
  template <class T>
  static std::string GetName(int) {
    for (const auto& [name, fault] : faults) {
      if (fault.first == T::policy().options.fault) return name;
    }
    return "unnamed";
  }
};

}  // namespace

using Faults =
    testing::Types<With<Fault::none>, With<Fault::evicts_a_pin>, With<Fault::names_no_page>,
                   With<Fault::is_misled_by_nan>, With<Fault::trims_below_the_budget>, With<Fault::reads_too_much>,
                   With<Fault::reads_nothing>, With<Fault::weighs_by_nan>, With<Fault::writes_in_select>,
                   With<Fault::allocates>, With<Fault::throws>, With<Fault::counts_in_a_global>,
                   With<Fault::counts_in_itself>, With<Fault::knows_the_other_head>, With<Fault::holds_a_pointer>,
                   With<Fault::names_an_option_twice>, With<Fault::names_an_option_oddly>, Of<Misspelt>,
                   Of<MisspeltSelector>, Of<MisspeltReader>, Of<MisspeltCounter>>;
INSTANTIATE_TYPED_TEST_SUITE_P(Faults, PolicyConformance, Faults, NameOfFault);

namespace {

/// Notes which tests fail, and their first sentence.
class Failures : public testing::EmptyTestEventListener {
 public:
  /// {fault: {test: sentence}}
  std::map<std::string, std::map<std::string, std::string>> of;

 private:
  void OnTestStart(const testing::TestInfo& test) override { running_ = &test; }
  void OnTestPartResult(const testing::TestPartResult& result) override {
    if (!result.failed()) return;
    const std::string suite = running_->test_suite_name();
    of[suite.substr(suite.rfind('/') + 1)].emplace(running_->name(), result.message());
  }
  const testing::TestInfo* running_ = nullptr;
};

int report(const Failures& failures) {
  int wrong = 0;
  for (const auto& [fault, expected] : faults) {
    std::set<std::string> missed;
    std::istringstream words{std::string(expected.second)};
    for (std::string word; words >> word;) missed.insert(word);
    if (expected.first == Fault::holds_a_pointer && !conformance::equal_states_are_equal_bytes()) missed.clear();
    const auto found = failures.of.find(fault);
    if (found != failures.of.end()) {
      for (const auto& [test, sentence] : found->second) {
        if (missed.erase(test) == 0)
          std::cout << ++wrong << ". " << fault << " fails " << test << ": " << sentence << "\n";
      }
    }
    for (const std::string& test : missed) std::cout << ++wrong << ". " << fault << " passes " << test << "\n";
  }
  std::cout << faults.size() << " faults, " << wrong << " wrong verdicts\n";
  return wrong == 0 ? 0 : 1;
}

}  // namespace
}  // namespace kvsparse_test

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  testing::TestEventListeners& listeners = testing::UnitTest::GetInstance()->listeners();
  auto* failures = new kvsparse_test::Failures;  // GoogleTest deletes it
  delete listeners.Release(listeners.default_result_printer());
  listeners.Append(failures);
  [[maybe_unused]] const int most_fail = RUN_ALL_TESTS();
  return kvsparse_test::report(*failures);
}
