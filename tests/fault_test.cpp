// SPDX-License-Identifier: Apache-2.0
//
// What happens when memory, a stream, a pool or an executor fails: the caller is told, nothing has changed, nothing is
// lost. Each allocation of a verb fails once, each byte of a snapshot is once the last that the stream takes or gives.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <functional>
#include <iostream>
#include <istream>
#include <limits>
#include <ostream>
#include <span>
#include <sstream>
#include <streambuf>
#include <string>
#include <string_view>
#include <vector>

#include "common/allocation_counter.hpp"
#include "engine/named_cache.hpp"
#include "kvsparse/cache/sequence_table.hpp"
#include "kvsparse/interop/snapshot.hpp"
#include "kvsparse/interop/thread_team.hpp"
#include "support/padding.hpp"
#include "support/policy_kinds.hpp"
#include "support/rows.hpp"

namespace kvsparse_test {
namespace {

using namespace kvsparse;
using kvsparse_tools::named_cache;
using kvsparse_tools::named_cache_over;

constexpr std::size_t page_size = 4;

std::size_t faults = 0;  // that were tried
struct CountFaults : testing::Environment {
  void TearDown() override { std::cout << faults << " faults\n"; }
};
[[maybe_unused]] const auto* const count_faults = testing::AddGlobalTestEnvironment(new CountFaults);

CacheConfig config_of(std::size_t layer = 0) {
  CacheConfig config;
  config.query_heads = 2;
  config.kv_heads = 2;
  config.head_dim = 8;
  config.page_size = page_size;
  config.budget_tokens = 4 * page_size;
  config.read_budget_tokens = 2 * page_size;
  config.max_tokens = 8 * page_size;
  config.max_speculative = 3;
  config.layer = layer;
  return config;
}
const Rows& rows() {
  static const Rows of_all(8 * page_size, config_of(), 1);
  return of_all;
}
std::vector<OptionSetting> settings_of(std::string_view policy) {
  return short_periods(policy_facts(policy).option_keys, 2);
}
AnyCache make_cache(std::string_view policy, ScalarType scalar) {
  return named_cache(policy, scalar, config_of(), settings_of(policy));
}

/// Brings a cache, or a layer of a sequence, the next tokens up to a length, and asks each one's query.
void decode_to(AnyCache& cache, std::size_t length) {
  std::vector<float> out(2 * 8);
  for (auto t = static_cast<std::size_t>(cache.next_position().value); t < length; ++t) {
    ASSERT_TRUE(cache.append(rows().token_k(t), rows().token_v(t)).ok());
    ASSERT_TRUE(cache.attend(rows().token_q(t), out).ok());
  }
}

/// Everything later steps depend on, and the pages of the pool.
std::string state_of(const AnyCache& cache) {
  std::ostringstream out;
  save(cache, out);
  out << cache.pool_demand(1).free_pages << " " << cache.oldest_reachable();
  for (std::size_t h = 0; h < 2; ++h) {
    for (const Position position : cache.read_positions(h)) out << " " << position.value;
  }
  return out.str();
}

/// Lets each allocation of act(state) fail in turn, state being a new make() each time: act throws, and the state is
/// what it was. At last none fails, and all that was taken is given back.
template <class Make, class Act, class Look>
void expect_strong_guarantee(Make&& make, Act&& act, Look&& look) {
  rows();  // are made once
  const std::size_t live_at_first = kvsparse_tools::allocations_of_this_thread().live_bytes;
  for (std::size_t failing = 1;; ++failing) {
    auto state = make();
    const auto before = look(state);
    const std::size_t live = kvsparse_tools::allocations_of_this_thread().live_bytes;
    bool threw = false;
    kvsparse_tools::fail_allocation_of_this_thread(failing);
    try {
      act(state);
    } catch (const std::exception&) {  // std::bad_alloc, or what a stream made of it
      threw = true;
    }
    const bool failed = !kvsparse_tools::allocation_is_to_fail();
    kvsparse_tools::fail_allocation_of_this_thread(0);
    ASSERT_EQ(threw, failed) << "allocation " << failing;
    if (!failed) {
      ASSERT_GT(failing, 1U) << "nothing is allocated";
      break;
    }
    ++faults;
    ASSERT_EQ(kvsparse_tools::allocations_of_this_thread().live_bytes, live) << "allocation " << failing << " of it";
    ASSERT_EQ(look(state), before) << "allocation " << failing;
  }
  EXPECT_EQ(kvsparse_tools::allocations_of_this_thread().live_bytes, live_at_first);
}

template <class Visit>
void for_every_policy(Visit&& visit) {
  for (const std::string& policy : policy_names()) {
    SCOPED_TRACE(policy);
    visit(std::string_view(policy));
  }
}

struct Nothing {};
const auto look_at_nothing = [](const Nothing&) { return 0; };

AnyPagePool pool_of(std::size_t pages, PageSummary summary = PageSummary::min_max) {
  return PagePool<float>(config_of().geometry(), summary, pages);
}
std::size_t free_pages(const AnyPagePool& pool) {
  return std::visit([](const auto& of_type) { return of_type.free_pages(); }, pool);
}

// ----------------------------------------------------------------------------------------------------------
// allocations

TEST(FailingAllocations, LeaveNothingOfACacheThatCouldNotBeMade) {
  for_every_policy([](std::string_view policy) {
    const std::vector<OptionSetting> settings = settings_of(policy);
    for (const std::string_view scalar : scalar_type_names) {
      SCOPED_TRACE(scalar);
      expect_strong_guarantee([] { return Nothing{}; },
                              [&](Nothing&) { (void)named_cache(policy, scalar_type(scalar), config_of(), settings); },
                              look_at_nothing);
    }
    const AnyPagePool pool = pool_of(20, policy == "clustered" ? PageSummary::mean : PageSummary::min_max);
    expect_strong_guarantee([] { return Nothing{}; },
                            [&](Nothing&) { (void)named_cache_over(pool, policy, config_of(), settings); },
                            look_at_nothing);
  });
  expect_strong_guarantee([] { return Nothing{}; }, [](Nothing&) { (void)pool_of(20); }, look_at_nothing);
}

TEST(FailingAllocations, LeaveACacheThatCouldNotBeCopiedForkedSavedOrLoaded) {
  for_every_policy([](std::string_view policy) {
    for (const std::string_view scalar : scalar_type_names) {
      SCOPED_TRACE(scalar);
      const auto make = [&] {
        AnyCache cache = make_cache(policy, scalar_type(scalar));
        decode_to(cache, 6 * page_size + 1);
        return cache;
      };
      expect_strong_guarantee(
          make, [](AnyCache& cache) { (void)AnyCache(cache); }, state_of);
      expect_strong_guarantee(
          make, [](AnyCache& cache) { (void)cache.fork(); }, state_of);
      AnyCache other = make_cache(policy, scalar_type(scalar));
      decode_to(other, 3 * page_size + 2);
      expect_strong_guarantee(
          make, [&](AnyCache& cache) { cache = other; }, state_of);
      expect_strong_guarantee(
          make,
          [](AnyCache& cache) {
            std::ostringstream out;
            save(cache, out);
          },
          state_of);
      std::ostringstream saved;
      save(other, saved);
      expect_strong_guarantee(
          make,
          [&](AnyCache& cache) {
            std::istringstream in(saved.str());
            load(cache, in);
          },
          state_of);
    }
  });
}

using Sequence = SequenceCache<AnyCache>;
using Table = SequenceTable<AnyCache>;

Sequence make_sequence(const AnyPagePool& pool) {
  std::vector<AnyCache> layers;
  layers.push_back(named_cache_over(pool, "raas+quest", config_of(0)));
  layers.push_back(named_cache_over(pool, "h2o", config_of(1)));
  return Sequence(std::move(layers));
}
/// One token in every layer; the first refusal ends it.
Status step(Sequence& sequence, std::size_t seed = 0) {
  const std::size_t t = (static_cast<std::size_t>(sequence.next_position().value) + seed) % rows().tokens;
  std::vector<float> out(2 * 8);
  while (true) {
    const std::size_t layer = sequence.turn();
    if (const Status status = sequence.append(layer, rows().token_k(t), rows().token_v(t)); !status) return status;
    if (const Status status = sequence.attend(layer, rows().token_q(t), out); !status) return status;
    if (layer + 1 == sequence.layers()) return {};
  }
}
std::string state_of_sequence(const Sequence& sequence) {
  std::string state = std::to_string(sequence.turn());
  for (std::size_t l = 0; l < sequence.layers(); ++l) state += state_of(sequence.layer(l));
  return state;
}

TEST(FailingAllocations, LeaveATableOfSequencesAsItWas) {
  const AnyPagePool pool = pool_of(200);
  const auto make = [&] {
    Table table;
    for (const std::uint64_t id : {1U, 2U}) {
      Sequence& sequence = table.add({id}, make_sequence(pool));
      for (std::size_t t = 0; t < 3 * page_size + 2; ++t) EXPECT_TRUE(step(sequence, id).ok());
    }
    return table;
  };
  const auto look = [&](const Table& table) {
    std::string state = std::to_string(free_pages(pool));
    for (const SequenceId id : table.ids()) state += std::to_string(id.value) + state_of_sequence(table.at(id));
    return state;
  };
  expect_strong_guarantee(
      make, [](Table& table) { table.fork({1}, {3}); }, look);
  expect_strong_guarantee(
      make, [&](Table& table) { table.add({3}, make_sequence(pool)); }, look);
  expect_strong_guarantee(
      make, [](Table& table) { (void)table.ids(); }, look);
  const std::vector<SequenceId> batch{{1}, {2}};
  expect_strong_guarantee(
      make, [&](Table& table) { (void)table.can_append(batch, 2); }, look);
  std::ostringstream saved;
  {
    const Table table = make();
    save(table.at({2}), saved);
  }
  expect_strong_guarantee(
      make,
      [&](Table& table) {
        std::istringstream in(saved.str());
        load(table.at({1}), in);
      },
      look);
  EXPECT_EQ(free_pages(pool), 200U);
}

TEST(FailingAllocations, LeaveNoThreadOfATeamThatCouldNotBeMade) {
  std::size_t failing = 1;
  for (bool failed = true; failed; ++failing) {
    kvsparse_tools::fail_allocation_of_this_thread(failing);
    try {
      ThreadTeam team(4);
    } catch (const std::bad_alloc&) {
    }
    failed = !kvsparse_tools::allocation_is_to_fail();
    kvsparse_tools::fail_allocation_of_this_thread(0);
    faults += failed ? 1 : 0;
  }
  EXPECT_GE(failing, 3U);
}

// --------------------------------------------------------------------------------------------------------------
// streams

enum class Failing { quietly, by_exception };

/// Takes so many bytes, and then no more.
class FullBuffer : public std::streambuf {
 public:
  FullBuffer(std::size_t room, Failing how) : room_(room), how_(how) {}
  std::string taken;

 private:
  std::streamsize xsputn(const char* bytes, std::streamsize count) override {
    const std::size_t fits = std::min(static_cast<std::size_t>(count), room_ - taken.size());
    taken.append(bytes, fits);
    if (fits < static_cast<std::size_t>(count) && how_ == Failing::by_exception) throw std::runtime_error("disk full");
    return static_cast<std::streamsize>(fits);
  }
  int_type overflow(int_type) override { return traits_type::eof(); }
  std::size_t room_;
  Failing how_;
};
/// Gives so many bytes, and then no more.
class BrokenBuffer : public std::streambuf {
 public:
  BrokenBuffer(std::string_view bytes, Failing how) : bytes_(bytes), how_(how) {}

 private:
  std::streamsize xsgetn(char* to, std::streamsize count) override {
    const std::size_t given = std::min(static_cast<std::size_t>(count), bytes_.size());
    std::copy_n(bytes_.data(), given, to);
    bytes_.remove_prefix(given);
    if (given < static_cast<std::size_t>(count) && how_ == Failing::by_exception) throw std::runtime_error("disk gone");
    return static_cast<std::streamsize>(given);
  }
  int_type underflow() override { return traits_type::eof(); }
  std::string_view bytes_;
  Failing how_;
};

/// Whatever the caller wants to be told by.
constexpr std::ios_base::iostate exception_masks[] = {std::ios_base::goodbit, std::ios_base::badbit};

/// Cuts the stream at each byte of a snapshot, while saving and while loading into `other`: both say so and change
/// nothing. What was loaded in full is what was saved.
template <class Saved, class Look>
void expect_streams_to_fail_at_each_byte(const Saved& saved, Saved& other, Look&& look) {
  std::ostringstream whole;
  save(saved, whole);
  const std::string bytes = whole.str();
  const auto state_of_saved = look(saved);
  const auto state_of_other = look(other);
  for (const Failing how : {Failing::quietly, Failing::by_exception}) {
    for (const std::ios_base::iostate mask : exception_masks) {
      for (std::size_t cut = 0; cut < bytes.size(); ++cut) {
        FullBuffer full(cut, how);
        std::ostream out(&full);
        out.exceptions(mask);
        ASSERT_ANY_THROW(save(saved, out)) << "after " << cut << " bytes";
        BrokenBuffer broken(std::string_view(bytes).substr(0, cut), how);
        std::istream in(&broken);
        in.exceptions(mask);
        ASSERT_ANY_THROW(load(other, in)) << "after " << cut << " bytes";
        if (mask == std::ios_base::goodbit) {
          std::istringstream cut_short(bytes.substr(0, cut));
          ASSERT_THROW(load(other, cut_short), SnapshotError);
        }
        faults += 2;
        // What it costs to look is more than what it costs to fail.
        if (cut % 61 != 0 && cut + 1 != bytes.size()) continue;
        ASSERT_TRUE(look(saved) == state_of_saved) << "after " << cut << " bytes";
        ASSERT_TRUE(look(other) == state_of_other) << "after " << cut << " bytes";
      }
    }
  }
  BrokenBuffer unbroken(bytes, Failing::by_exception);
  std::istream in(&unbroken);
  load(other, in);
  std::ostringstream again;
  save(other, again);
  EXPECT_TRUE(again.str() == bytes);
}

TEST(FailingStreams, AreToldOfAndChangeNothing) {
  for (const std::string_view policy : {"raas+quest", "h2o", "kindred"}) {
    SCOPED_TRACE(policy);
    AnyCache cache = make_cache(policy, ScalarType::f16);
    decode_to(cache, 6 * page_size + 1);
    AnyCache other = make_cache(policy, ScalarType::f16);
    decode_to(other, 2 * page_size + 3);
    expect_streams_to_fail_at_each_byte(cache, other, state_of);
  }
}

TEST(FailingStreams, LeaveAllLayersOfASequence) {
  const AnyPagePool pool = pool_of(100);
  Sequence sequence = make_sequence(pool);
  Sequence other = make_sequence(pool);
  for (std::size_t t = 0; t < 3 * page_size; ++t) ASSERT_TRUE(step(sequence).ok());
  for (std::size_t t = 0; t < page_size + 1; ++t) ASSERT_TRUE(step(other, 9).ok());
  expect_streams_to_fail_at_each_byte(sequence, other, state_of_sequence);
}

// -----------------------------------------------------------------------------------------------------------------
// pools

TEST(AnExhaustedPool, InTheMiddleOfABatchLeavesTheOthersAndTheStepGoesOnLater) {
  // Three sequences of two layers, and a pool that has the pages of one, but not of all.
  const std::size_t of_sequence = 2 * 2 * (config_of().budget_tokens / page_size);
  for (std::size_t pages = of_sequence; pages < 3 * of_sequence; pages += 2) {
    const AnyPagePool pool = pool_of(pages);
    const AnyPagePool large = pool_of(1000);
    Table table, alone;
    const std::vector<SequenceId> batch{{1}, {2}, {3}};
    for (const SequenceId id : batch) {
      table.add(id, make_sequence(pool));
      alone.add(id, make_sequence(large));
    }
    std::size_t refusals = 0;
    for (std::size_t t = 0; t < 6 * page_size; ++t) {
      const bool fits = table.can_append(batch, 1);
      bool refused = false;
      for (const SequenceId id : batch) {
        Sequence* const sequence = table.find(id);
        if (sequence == nullptr) continue;
        while (true) {
          const Position length = sequence->next_position();
          const Status status = step(*sequence, id.value);
          if (status.ok()) break;
          // Told of, and no token has come to the layer whose turn it is, nor to those behind.
          ++faults;
          ++refusals;
          refused = true;
          ASSERT_EQ(status.code(), Status::Code::pool_exhausted);
          ASSERT_EQ(sequence->next_position(), length);
          // The engine gives up another sequence, and the same step goes on where it stopped.
          const std::vector<SequenceId> there = table.ids();
          const SequenceId victim = there.back() == id ? there.front() : there.back();
          ASSERT_TRUE(victim != id) << "one sequence alone does not fit";
          table.remove(victim);
        }
        ASSERT_TRUE(step(alone.at(id), id.value).ok());
        for (std::size_t l = 0; l < 2; ++l) {
          for (std::size_t h = 0; h < 2; ++h) {
            ASSERT_EQ(sequence->layer(l).resident_positions(h), alone.at(id).layer(l).resident_positions(h));
          }
        }
      }
      ASSERT_FALSE(fits && refused && table.size() == 3) << "can_append promised room";
      if (table.size() < 3) break;
    }
    for (const SequenceId id : table.ids()) {
      std::ostringstream of_table, of_alone;
      while (table.at(id).next_position() < alone.at(id).next_position())
        ASSERT_TRUE(step(table.at(id), id.value).ok());
      while (alone.at(id).next_position() < table.at(id).next_position())
        ASSERT_TRUE(step(alone.at(id), id.value).ok());
      for (std::size_t l = 0; l < 2; ++l) {
        EXPECT_EQ(table.at(id).layer(l).stats().evicted_tokens, alone.at(id).layer(l).stats().evicted_tokens);
      }
      save(table.at(id), of_table);
      save(alone.at(id), of_alone);
      EXPECT_EQ(of_table.str().size(), of_alone.str().size());
      EXPECT_TRUE(!padding_is_cleared || of_table.str() == of_alone.str())
          << "sequence " << id.value << " in a pool of " << pages << " pages";
    }
    EXPECT_GT(refusals, 0U);
    table.clear();
    EXPECT_EQ(free_pages(pool), pages);
  }
}

// -------------------------------------------------------------------------------------------------------------
// executors

/// Runs so many bodies, from the last on, and then throws.
struct ThrowingExecutor {
  std::size_t threads;
  mutable std::size_t left;
  void operator()(std::size_t count, RangeBody body) const {
    while (count-- > 0) {
      if (left-- == 0) throw std::runtime_error("no more threads");
      body(count);
    }
  }
  std::size_t concurrency() const { return threads; }
};

TEST(ThrowingExecutors, LeaveEveryPolicyACacheThatAnswersExactly) {
  for_every_policy([](std::string_view policy) {
    for (const std::size_t bodies : {0U, 1U}) {
      AnyCache cache = make_cache(policy, ScalarType::f32);
      std::vector<float> out(2 * 8);
      for (std::size_t t = 0; t < 7 * page_size; ++t) {
        ASSERT_TRUE(cache.append(rows().token_k(t), rows().token_v(t)).ok());
        std::vector<std::vector<Position>> resident;
        for (std::size_t h = 0; h < 2; ++h) resident.push_back(cache.resident_positions(h));
        const ThrowingExecutor throwing{3, bodies};
        ASSERT_THROW((void)cache.attend(rows().token_q(t), out, {}, throwing), std::runtime_error);
        ++faults;
        for (std::size_t h = 0; h < 2; ++h) ASSERT_EQ(cache.resident_positions(h), resident[h]);
        ASSERT_TRUE(cache.attend(rows().token_q(t), out).ok());
        for (std::size_t h = 0; h < 2 && !answers_for_the_gone(policy); ++h) {
          std::vector<std::size_t> read;
          for (const Position position : cache.read_positions(h))
            read.push_back(static_cast<std::size_t>(position.value));
          const ExactAttention exact = rows().exact(t, h, read);
          for (std::size_t d = 0; d < 8; ++d) ASSERT_NEAR(out[h * 8 + d], exact.out[d], 1e-5);
        }
      }
    }
  });
}

}  // namespace
}  // namespace kvsparse_test
