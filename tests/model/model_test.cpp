// SPDX-License-Identifier: Apache-2.0
//
// Random sequences of every public verb over caches that share a pool, for every policy, storage type and page size,
// against a model that remembers everything (model_world.hpp). What fails is shrunk to the verbs that matter.
//
//   KVSPARSE_MODEL_VERBS=20000000 model_test     runs so many verbs instead of 200,000
//   KVSPARSE_MODEL_SEED=7 model_test             other ones
//   KVSPARSE_MODEL_ONLY=raas+quest/f16/5 ...     those of the worlds whose name contains that
//   KVSPARSE_MODEL_CRASHES=1 ...                 each world in a process of its own, so that crashes are shrunk too
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <iterator>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "model_world.hpp"
#include "support/shrink.hpp"
#include "support/test_settings.hpp"

namespace kvsparse_test {
namespace {

using kvsparse::ScalarType;

struct WorldName {
  std::string policy;
  ScalarType scalar;
  std::size_t page_size;
  std::uint64_t seed;

  std::string text() const {
    return policy + "/" + std::string(kvsparse::scalar_type_names[static_cast<std::size_t>(scalar)]) + "/" +
           std::to_string(page_size);
  }
  ModelWorld make() const { return ModelWorld(policy, scalar, page_size, seed); }
  std::vector<Verb> verbs(std::size_t count) const {
    std::uint64_t mixed = seed;
    for (const char c : text()) mixed = mixed * 1000003 + static_cast<unsigned char>(c);
    TestRng rng(mixed);
    std::vector<Verb> sequence(count);
    for (Verb& verb : sequence) verb = Verb::random(rng);
    return sequence;
  }
};

constexpr int crashes[] = {SIGABRT, SIGSEGV, SIGFPE, SIGILL, SIGBUS};

struct Failure {
  std::string sentence;
  std::size_t verbs;  // until it showed
};

std::optional<Failure> failure_of(const WorldName& name, const std::vector<Verb>& verbs, std::size_t& done,
                                  Sights& sights) {
  try {
    ModelWorld world = name.make();
    for (const Verb& verb : verbs) {
      ++done;
      world.run(verb);
    }
    world.finish();
    sights.add(world.sights());
  } catch (const Broken& broken) {
    return Failure{broken.what(), done};
  }
  return std::nullopt;
}

/// The same in a process of its own, so that a crash is a failure like any other.
std::optional<Failure> failure_in_a_child(const WorldName& name, const std::vector<Verb>& verbs) {
  struct Shared {
    std::size_t done;
    char sentence[1000];
  };
  void* const memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("no shared memory");
  auto* const shared = new (memory) Shared{};
  const pid_t child = fork();
  if (child == 0) {
    for (const int signal : crashes) std::signal(signal, SIG_DFL);
    if (std::freopen("/dev/null", "w", stderr) == nullptr) _exit(2);
    Sights sights;
    const std::optional<Failure> failure = failure_of(name, verbs, shared->done, sights);
    if (failure) std::snprintf(shared->sentence, sizeof shared->sentence, "%s", failure->sentence.c_str());
    _exit(failure ? 1 : 0);
  }
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child) throw std::runtime_error("no child process");
  std::optional<Failure> failure;
  if (WIFSIGNALED(status)) failure = Failure{"crashed: " + std::string(strsignal(WTERMSIG(status))), shared->done};
  if (WIFEXITED(status) && WEXITSTATUS(status) != 0) failure = Failure{shared->sentence, shared->done};
  munmap(memory, sizeof(Shared));
  return failure;
}

/// What a crash leaves on the screen.
char running[300] = "";
void tell_how_to_shrink_a_crash(int signal) {
  if (write(STDERR_FILENO, running, std::strlen(running)) < 0) _exit(2);
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

std::optional<Verb> simpler(const Verb& verb, std::size_t n) {
  const std::uint32_t amounts[] = {0, 1, 2, verb.amount / 2, verb.amount - 1};
  if (n >= std::size(amounts) || verb.amount == 0) return std::nullopt;
  Verb other = verb;
  other.amount = std::min(amounts[n], verb.amount - 1);
  return other;
}

/// A sentence, and the shortest sequence of verbs found that still leads to some failure.
std::string report(const WorldName& name, std::vector<Verb> verbs, const Failure& failure) {
  verbs.resize(std::min(verbs.size(), failure.verbs));
  const auto fails = [&](const std::vector<Verb>& some) { return failure_in_a_child(name, some).has_value(); };
  verbs = shrink(std::move(verbs), fails, simpler);
  std::string text = "world " + name.text() + ", seed " + std::to_string(name.seed) + ": " + failure.sentence + "\n" +
                     name.make().describe();
  const std::optional<Failure> left = failure_in_a_child(name, verbs);
  if (left) text += "shrunk to " + std::to_string(verbs.size()) + " verbs: " + left->sentence + "\n";
  for (const Verb& verb : verbs) text += "  " + verb.describe() + "\n";
  return text;
}

TEST(Model, RandomVerbsKeepEveryPromise) {
  const std::size_t verbs = test_setting("KVSPARSE_MODEL_VERBS", 200'000);
  const std::size_t first_seed = test_setting("KVSPARSE_MODEL_SEED", 1);
  const std::string only = test_setting("KVSPARSE_MODEL_ONLY");
  const bool crashes_are_caught = test_setting("KVSPARSE_MODEL_CRASHES", 0) != 0;
  std::vector<WorldName> names;
  for (const std::string& policy : policies_to_model()) {
    for (const ScalarType scalar : {ScalarType::f32, ScalarType::f16, ScalarType::bf16, ScalarType::int8}) {
      for (const std::size_t page_size : {1U, 5U, 16U}) {
        const WorldName name{policy, scalar, page_size, first_seed};
        if (name.text().find(only) != std::string::npos) names.push_back(name);
      }
    }
  }
  ASSERT_FALSE(names.empty()) << "no world is called " << only;
  for (const int signal : crashes) std::signal(signal, tell_how_to_shrink_a_crash);

  // Each seed draws other kinds of cache: many short worlds see more than few long ones.
  constexpr std::size_t verbs_of_world = 400;
  std::size_t done = 0;
  Sights sights;
  for (std::uint64_t round = 0; done < verbs; ++round) {
    for (WorldName name : names) {
      name.seed = first_seed + round;
      std::vector<Verb> sequence = name.verbs(verbs_of_world);
      std::snprintf(running, sizeof running,
                    "\nKVSPARSE_MODEL_CRASHES=1 KVSPARSE_MODEL_ONLY=%s KVSPARSE_MODEL_SEED=%llu shrinks what crashed\n",
                    name.text().c_str(), static_cast<unsigned long long>(name.seed));
      std::size_t of_world = 0;
      const std::optional<Failure> failure =
          crashes_are_caught ? failure_in_a_child(name, sequence) : failure_of(name, sequence, of_world, sights);
      if (failure) {
        FAIL() << report(name, std::move(sequence), *failure);
      }
      done += sequence.size();
      if (done >= verbs) break;
    }
  }
  std::cout << done << " verbs in " << names.size() << " kinds of world\n";
  if (crashes_are_caught || !only.empty()) return;

  using Code = kvsparse::Status::Code;
  for (const Code code :
       {Code::ok, Code::prompt_ended, Code::prompt_exceeds_budget, Code::max_tokens_reached, Code::pool_exhausted,
        Code::too_many_drafts, Code::too_many_draft_queries, Code::unreachable_length, Code::nothing_to_attend}) {
    EXPECT_GT(sights.outcomes[code], done / 10000) << kvsparse::Status(code, 0, 0).message();
  }
  EXPECT_GT(sights.evicted_pages, done / 20);
  EXPECT_GT(sights.shared_pages, done / 2);
  EXPECT_GT(sights.forks, done / 200);
  EXPECT_GT(sights.loads, done / 200);
  EXPECT_GT(sights.refused_loads, done / 2000);
  EXPECT_GT(sights.drafts_taken_back, done / 500);
  EXPECT_GT(sights.settled_tokens_taken_back, done / 500);
}

}  // namespace
}  // namespace kvsparse_test
