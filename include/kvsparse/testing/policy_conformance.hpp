// SPDX-License-Identifier: Apache-2.0
// A GoogleTest suite for any policy: what the contract in policy/policy.hpp asks of it, and what a cache promises under
// it. Needs GoogleTest; the umbrella header does not include it.
//
//   #include <kvsparse/testing/count_allocations.hpp>  // in one file of the program: counts what verbs allocate
//   #include <kvsparse/testing/policy_conformance.hpp>
//   #include "my_policy.hpp"
//   using namespace kvsparse;
//   using Mine = testing::Types<MyPolicy>;             // or a type with static policy(): see conformance::Subject
//   INSTANTIATE_TYPED_TEST_SUITE_P(Mine, PolicyConformance, Mine);
//
// Budgets follow from the policy's traits, so that slack, windows and pins have their room.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <set>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "../interop/snapshot.hpp"
#include "../policy/contract_check.hpp"
#include "../policy/dense.hpp"
#include "policy_course.hpp"

namespace kvsparse {

/// The suite's fixture. T: a policy, or a type with a static policy() that makes one. Each test is a promise by name,
/// kept in every shape of heads, pages and budgets that the policy does not refuse.
template <class T>
class PolicyConformance : public ::testing::Test {
 protected:
  using Subject = conformance::Subject<T>;
  using Policy = typename Subject::Policy;
  static constexpr detail::ContractCheck<Policy> contract{};  // its sentences before all other errors
  using Course = conformance::Course<Policy, typename Subject::Key, typename Subject::Value>;
  using Cache = typename Course::Cache;
  using Rule = conformance::Rule;
  using Sight = conformance::Sight;

  /// Calls visit(course) in every shape that the policy takes, until something fails.
  template <class Visit>
  static void in_every_shape(Visit&& visit) {
    std::string refusals;
    bool taken = false;
    for (const conformance::Shape& shape : conformance::shapes) {
      if (HasFailure()) return;
      Course course(Subject::policy(), shape);
      if (const std::string problem = course.problem(); !problem.empty()) {
        refusals += "\n" + problem;
        continue;
      }
      taken = true;
      SCOPED_TRACE("policy " + std::string(Policy::name) + ", pages of " + std::to_string(shape.page_size) +
                   ", budget " + std::to_string(course.config.budget_tokens));
      visit(course);
    }
    EXPECT_TRUE(taken) << "problem(geometry) refuses every shape:" << refusals;
  }

  /// In a whole sequence.
  static void expect_kept(Rule rule) {
    in_every_shape([&](Course& course) {
      Cache cache = course.make();
      course.advance(cache, 1, course.tokens);
      EXPECT_EQ(course.findings.of(rule), "");
    });
  }

  /// Both go on alike to the end of the course.
  static void expect_alike(const Course& course, Cache& a, Cache& b, std::uint64_t seed = 1) {
    while (a.next_position() < Position{0} + course.tokens) {
      const Position position = a.next_position();
      ASSERT_EQ(course.step(a, seed).difference(course.step(b, seed)), "") << "at token " << position.value;
    }
  }
  /// The same with a twin's tokens beside another's, so that what one leaves behind would show in the other.
  static void expect_apart(const Course& course, Cache& a, Cache& twin_of_a, Cache& b, Cache& twin_of_b) {
    while (a.next_position() < Position{0} + course.tokens) {
      const Position position = a.next_position();
      ASSERT_EQ(course.step(a, 2).difference(course.step(twin_of_a, 2)), "") << "the new one at " << position.value;
      ASSERT_EQ(course.step(b, 1).difference(course.step(twin_of_b, 1)), "") << "the old one at " << position.value;
    }
  }

  static std::string saved(const Cache& cache) {
    std::ostringstream out;
    save(cache, out);
    return out.str();
  }
  static bool is_plain(std::string_view text) {
    constexpr std::string_view characters = "abcdefghijklmnopqrstuvwxyz0123456789_+";
    return !text.empty() && text.find_first_not_of(characters) == std::string_view::npos;
  }
  /// The names in "a|b|c".
  static std::vector<std::string> split(std::string_view names) {
    std::vector<std::string> texts;
    const auto count = std::count(names.begin(), names.end(), '|') + (names.empty() ? 0 : 1);
    for (std::size_t i = 0; i < static_cast<std::size_t>(count); ++i) texts.emplace_back(detail::name_at(names, i));
    return texts;
  }
  /// Sets an option and expects to read the same text.
  static void expect_to_read_back(Policy& policy, const std::string& key, const std::string& text) {
    EXPECT_TRUE(set_option(policy, {key, text}));
    detail::visit_options(policy, [&](std::string_view name, const auto& value, std::string_view names) {
      EXPECT_TRUE(name != key || detail::fact_text(value, names) == text) << "option " << key << " = " << text;
    });
  }
};

TYPED_TEST_SUITE_P(PolicyConformance);

TYPED_TEST_P(PolicyConformance, HasANameAndOptionsThatReadBack) {
  auto policy = conformance::Subject<TypeParam>::policy();
  EXPECT_TRUE(this->is_plain(policy.name)) << "a name has small letters, digits and _, not " << policy.name;
  EXPECT_EQ(traits::options_problem(policy), "");
  std::set<std::string, std::less<>> keys;
  auto other = policy;
  detail::visit_options(policy, [&]<class Value>(std::string_view name, const Value& value, std::string_view names) {
    const std::string key(name);
    EXPECT_TRUE(this->is_plain(key)) << "option " << key;
    EXPECT_TRUE(keys.insert(key).second) << "option " << key << " is named twice";
    EXPECT_THROW(static_cast<void>(set_option(other, {key, "no such value"})), ConfigError);
    for (const std::string& text : this->split(names)) this->expect_to_read_back(other, key, text);
    for (const char* text : {"true", "false"}) {
      if (std::is_same_v<Value, bool>) this->expect_to_read_back(other, key, text);
    }
    this->expect_to_read_back(other, key, detail::fact_text(value, names));  // as it was
  });
  EXPECT_FALSE(set_option(other, {"no_such_option", "1"}));
  std::string presets;
  detail::set_preset(other, "", presets);
  for (const std::string& preset : this->split(presets)) {
    EXPECT_TRUE(set_option(other, {"preset", preset}));
    EXPECT_EQ(traits::options_problem(other), "") << "preset " << preset;
  }
}

/// A verb under a name that nobody calls is no error, and under it everything is kept and read.
TYPED_TEST_P(PolicyConformance, DecidesIfItWatches) {
  using P = typename conformance::Subject<TypeParam>::Policy;
  const auto policy = conformance::Subject<TypeParam>::policy();
  constexpr bool decides = Evictor<P> || Selector<P>;
  constexpr bool listens = Observer<P> || AppendListener<P> || PageOpenListener<P> || PageFullListener<P> ||
                           PromptEndListener<P> || ClearListener<P> || EvictListener<P>;
  constexpr bool remembers =
      !std::is_empty_v<PageState<P>> || !std::is_empty_v<HeadState<P>> || !std::is_empty_v<LayerState<P>>;
  constexpr bool says_how = Pinner<P> || ResidualProvider<P> || UseCounter<P> || traits::select_always<P>() ||
                            traits::granularity<P>() == PolicyGranularity::token;
  const bool asks = traits::reads_rows<P>() || traits::knows_logits<P>() || traits::in_cache_positions(policy) ||
                    traits::page_summary(policy) != PageSummary::none || traits::query_window(policy) > 0;
  EXPECT_TRUE(decides || !(listens || remembers || says_how || asks))
      << "policy " << P::name << " has neither victim nor select, so all is kept and read as under Dense: is the name "
      << "of a verb misspelt?";
}

TYPED_TEST_P(PolicyConformance, TheBudgetAndThePinsHold) {
  this->in_every_shape([](auto& course) {
    auto cache = course.make();
    const Geometry& geometry = cache.geometry();
    for (std::size_t t = 0; t < course.tokens; ++t) {
      course.step(cache, 1);
      ASSERT_TRUE(course.holds_its_budget(cache)) << "at token " << t;
      const std::size_t prompt = course.pins_prompt() ? geometry.pages_for(std::min(t + 1, course.prompt_tokens)) : 0;
      for (std::size_t h = 0; h < geometry.kv_heads; ++h) {
        const PageTable& table = cache.table(h);
        ASSERT_TRUE(course.evicts || cache.resident_tokens(h) == t + 1);
        for (std::uint32_t page = 0; page < table.size(); ++page) {
          const Position first = table[{page}].first_position;
          ASSERT_EQ(geometry.slot_of(first).value, 0U);
          ASSERT_TRUE(page >= std::max(course.pinned_pages, prompt) || geometry.page_number(first) == page)
              << "pinned page " << page << " is gone at token " << t;
        }
      }
    }
    EXPECT_EQ(course.findings.of(conformance::Rule::victim), "");
  });
}

/// A prompt in one chunk, far beyond the budget: refused, or taken as the configuration says.
TYPED_TEST_P(PolicyConformance, ALongPromptIsRefusedOrKeepsTheBudget) {
  this->in_every_shape([](auto& course) {
    if (!course.evicts) return;
    const std::size_t budget = course.config.budget_tokens;
    course.config.max_prompt_tokens = course.prompt_tokens = 2 * budget + 1;
    for (const PromptOverflow overflow : {PromptOverflow::error, PromptOverflow::unpin_middle, PromptOverflow::grow}) {
      course.config.prompt_overflow = overflow;
      auto cache = course.make();
      const Status status = course.append_prompt(cache, 1, course.prompt_tokens);
      if (course.pins_prompt() && overflow == PromptOverflow::error) {
        EXPECT_EQ(status.code(), Status::Code::prompt_exceeds_budget);
        EXPECT_EQ(cache.next_position().value, 0) << "a refusal must change nothing";
        continue;
      }
      ASSERT_TRUE(status.ok()) << status.message();
      for (std::size_t t = 0; t < budget / 2 + 1; ++t) {
        course.step(cache, 1);
        const bool grows = course.pins_prompt() && overflow == PromptOverflow::grow;
        ASSERT_LE(cache.stats().resident_tokens, grows ? course.prompt_tokens + 2 * course.config.page_size : budget);
      }
    }
    EXPECT_EQ(course.findings.of(conformance::Rule::victim), "");
  });
}

TYPED_TEST_P(PolicyConformance, ReadsWithinTheReadBudget) {
  if (!Selector<typename TestFixture::Policy>) GTEST_SKIP() << "it has no verb select";
  this->expect_kept(conformance::Rule::reading);
}

TYPED_TEST_P(PolicyConformance, VerbsThatOnlyLookWriteNoState) { this->expect_kept(conformance::Rule::writing); }

TYPED_TEST_P(PolicyConformance, VerbsThrowNothing) { this->expect_kept(conformance::Rule::throwing); }

TYPED_TEST_P(PolicyConformance, VerbsAllocateNothing) {
  if (conformance::allocations_of_this_thread == nullptr) {
    GTEST_SKIP() << "nobody counts; include kvsparse/testing/count_allocations.hpp in one file of this program";
  }
  this->expect_kept(conformance::Rule::allocating);
}

/// Nothing but its own tokens decides: not what other caches saw, nor which head comes first.
TYPED_TEST_P(PolicyConformance, TheSameInputGivesTheSameDecisions) {
  this->in_every_shape([this](auto& course) {
    auto alone = course.make();
    std::vector<conformance::Sight> sights;
    for (std::size_t t = 0; t < course.tokens; ++t) sights.push_back(course.step(alone, 1));
    auto again = course.make(), backwards = course.make(), other = course.make();
    for (std::size_t t = 0; t < course.tokens; ++t) {
      course.step(other, 2);
      ASSERT_EQ(sights[t].difference(course.step(again, 1)), "") << "at token " << t << ", decoded again";
      const conformance::Token token = course.token(1, backwards.next_position());
      course.append(backwards, token);
      ASSERT_EQ(sights[t].difference(course.attend(backwards, token, conformance::BackwardsExecutor{})), "")
          << "at token " << t << ", the heads in another order";
    }
    EXPECT_TRUE(!conformance::equal_states_are_equal_bytes() || this->saved(alone) == this->saved(again))
        << "the same tokens left different bytes in the policy's state; does it hold a pointer?";
  });
}

TYPED_TEST_P(PolicyConformance, AClearedCacheIsANewOne) {
  this->in_every_shape([this](auto& course) {
    auto cleared = course.make(), fresh = course.make();
    course.advance(cleared, 2, course.tokens);
    cleared.clear();
    this->expect_alike(course, cleared, fresh);
  });
}

TYPED_TEST_P(PolicyConformance, ACopyGoesOnByItself) {
  this->in_every_shape([this](auto& course) {
    auto cache = course.make(), twin = course.make(), other = course.make();
    for (auto* each : {&cache, &twin, &other}) course.advance(*each, 1, course.tokens / 2);
    auto copy = cache;
    this->expect_apart(course, copy, other, cache, twin);
  });
}

TYPED_TEST_P(PolicyConformance, AForkGoesOnByItself) {
  this->in_every_shape([this](auto& course) {
    const auto pool = course.make_pool(2);
    for (const std::size_t at : {course.prompt_tokens - 1, course.tokens / 2}) {
      SCOPED_TRACE("forked at token " + std::to_string(at));
      auto parent = course.make(pool);
      auto twin = course.make(), other = course.make();
      for (auto* each : {&parent, &twin, &other}) course.advance(*each, 1, at);
      auto child = parent.fork();
      this->expect_apart(course, child, other, parent, twin);
    }
  });
}

/// A cache that took drafts back is the one that never had them.
TYPED_TEST_P(PolicyConformance, RejectedDraftsLeaveNoTrace) {
  this->in_every_shape([](auto& course) {
    constexpr std::size_t most = 5;
    course.config.max_speculative = most;
    auto cache = course.make(), twin = course.make();
    for (auto* each : {&cache, &twin}) course.advance(*each, 1, course.prompt_tokens);
    for (std::uint64_t round = 0; cache.next_position() < Position{0} + (course.tokens - 2 * most); ++round) {
      const std::size_t drafts = 1 + round % most, kept = round * 7 % (drafts + 1);
      const bool ask = round % 4 != 3;
      const Position before = cache.next_position();
      SCOPED_TRACE(std::to_string(kept) + " kept of " + std::to_string(drafts) + " drafts from position " +
                   std::to_string(before.value));
      for (std::size_t i = 0; i < drafts; ++i) {
        const conformance::Sight seen = course.draft(cache, round, ask);
        if (i >= kept) continue;
        ASSERT_EQ(seen.difference(course.draft(twin, round, ask)), "");
      }
      for (auto* each : {&cache, &twin}) course.require(each->truncate(before + kept));
      for (std::uint64_t i = 0; i <= round % 3; ++i) {
        ASSERT_EQ(course.step(cache, 1).difference(course.step(twin, 1)), "");
      }
    }
  });
}

/// As far back as the cache says it can go.
TYPED_TEST_P(PolicyConformance, TokensTakenBackLeaveNoTrace) {
  this->in_every_shape([this](auto& course) {
    auto cache = course.make(), twin = course.make();
    course.advance(cache, 1, course.prompt_tokens + course.config.page_size + 3);
    const std::size_t back = std::max(cache.oldest_reachable(), course.prompt_tokens + 1);
    course.require(cache.truncate(Position{0} + back));
    course.advance(twin, 1, back);
    this->expect_alike(course, cache, twin, 2);
  });
}

TYPED_TEST_P(PolicyConformance, ASnapshotGoesOnToTheBit) {
  this->in_every_shape([this](auto& course) {
    for (const std::size_t at :
         {std::size_t{0}, course.prompt_tokens - 1, course.prompt_tokens, course.tokens * 3 / 4}) {
      SCOPED_TRACE("saved at token " + std::to_string(at));
      auto cache = course.make(), loaded = course.make();
      course.advance(cache, 1, at);
      course.advance(loaded, 2, course.tokens / 2);
      std::istringstream in(this->saved(cache));
      load(loaded, in);
      ASSERT_TRUE(this->saved(loaded) == this->saved(cache));
      this->expect_alike(course, cache, loaded);
    }
  });
}

TYPED_TEST_P(PolicyConformance, ADamagedSnapshotIsRefusedAndNothingChanges) {
  this->in_every_shape([this](auto& course) {
    auto cache = course.make(), twin = course.make();
    course.advance(cache, 2, course.tokens / 2);
    const std::string whole = this->saved(cache);
    cache.clear();
    for (auto* each : {&cache, &twin}) course.advance(*each, 1, course.tokens / 2);
    for (std::size_t i = 0; i < 16; ++i) {
      std::string damaged = whole;
      const std::size_t at = (whole.size() - 1) * i / 15;
      damaged[at] = static_cast<char>(damaged[at] ^ 0x10);
      if (i % 4 == 3) damaged.resize(at);
      std::istringstream in(damaged);
      EXPECT_THROW(load(cache, in), SnapshotError) << "byte " << at << " of " << whole.size();
    }
    this->expect_alike(course, cache, twin);
  });
}

TYPED_TEST_P(PolicyConformance, BelowTheBudgetEveryBitIsThatOfDense) {
  using OfDense = PagedKvCache<Dense, typename TestFixture::Course::Key, typename TestFixture::Course::Value>;
  if (traits::select_always<typename TestFixture::Policy>()) GTEST_SKIP() << "select_always: it may read less";
  this->in_every_shape([](auto& course) {
    course.config.budget_tokens += course.tokens + course.config.page_size;
    course.config.read_budget_tokens = course.config.budget_tokens;
    auto cache = course.make();
    OfDense dense(course.config);
    std::vector<float> out(course.config.query_heads * course.config.head_dim), lse(course.config.query_heads);
    for (std::size_t t = 0; t < course.tokens; ++t) {
      const conformance::Token token = course.token(1, dense.next_position());
      const conformance::Sight seen = course.step(cache, token);
      course.require(t < course.prompt_tokens ? dense.append_prompt(token.k, token.v) : dense.append(token.k, token.v));
      course.require(attend(dense, std::span<const float>(token.q), out, lse));
      ASSERT_TRUE(seen.answers == conformance::Sight::bits_of(out, lse)) << "at token " << t;
    }
  });
}

/// Of ordinary rows: a selection holds something, weights and residuals are finite.
TYPED_TEST_P(PolicyConformance, AnswersAreFinite) {
  this->in_every_shape([](auto& course) {
    auto cache = course.make();
    for (std::size_t t = 0; t < course.tokens; ++t) ASSERT_TRUE(course.step(cache, 1).is_finite()) << "at token " << t;
  });
}

/// Whatever a policy makes of such rows, the budget, the pins and the newest token stay.
TYPED_TEST_P(PolicyConformance, RowsThatHoldNoNumbersBreakNothing) {
  this->in_every_shape([this](auto& course) {
    auto cache = course.make(), fresh = course.make();
    for (std::size_t t = 0; t < course.tokens; ++t) {
      conformance::Token token = course.token(3, cache.next_position());
      token.spoil();
      course.step(cache, token);
      ASSERT_TRUE(course.holds_its_budget(cache)) << "at token " << t;
    }
    EXPECT_EQ(course.findings.of(conformance::Rule::victim), "");
    EXPECT_EQ(course.findings.of(conformance::Rule::reading), "");
    EXPECT_EQ(course.findings.of(conformance::Rule::throwing), "");
    cache.clear();
    this->expect_alike(course, cache, fresh);
  });
}

REGISTER_TYPED_TEST_SUITE_P(PolicyConformance, HasANameAndOptionsThatReadBack, DecidesIfItWatches,
                            TheBudgetAndThePinsHold, ALongPromptIsRefusedOrKeepsTheBudget, ReadsWithinTheReadBudget,
                            VerbsThatOnlyLookWriteNoState, VerbsThrowNothing, VerbsAllocateNothing,
                            TheSameInputGivesTheSameDecisions, AClearedCacheIsANewOne, ACopyGoesOnByItself,
                            AForkGoesOnByItself, RejectedDraftsLeaveNoTrace, TokensTakenBackLeaveNoTrace,
                            ASnapshotGoesOnToTheBit, ADamagedSnapshotIsRefusedAndNothingChanges,
                            BelowTheBudgetEveryBitIsThatOfDense, AnswersAreFinite, RowsThatHoldNoNumbersBreakNothing);

}  // namespace kvsparse
