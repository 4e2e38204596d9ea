// SPDX-License-Identifier: Apache-2.0
//
// Compiled without exceptions and without run-time type information: everything decodes, saves and goes on as
// elsewhere, and what would be thrown is printed before the program ends.
#if defined(__cpp_exceptions) || defined(__cpp_rtti)
#error "tests/CMakeLists.txt compiles this one with -fno-exceptions -fno-rtti"
#endif

#include <gtest/gtest.h>

#include <sstream>
#include <string>
#include <vector>

#include "kvsparse/cache/any_cache.hpp"
#include "kvsparse/cache/sequence_table.hpp"
#include "kvsparse/interop/snapshot.hpp"
#include "kvsparse/kvsparse.hpp"
#include "support/rows.hpp"

namespace kvsparse_test {
namespace {

using namespace kvsparse;

CacheConfig small_config() {
  CacheConfig config;
  config.query_heads = 4;
  config.kv_heads = 2;
  config.head_dim = 8;
  config.page_size = 4;
  config.budget_tokens = 16;
  config.read_budget_tokens = 8;
  config.max_tokens = 64;
  config.max_speculative = 3;
  return config;
}

/// Appends and attends tokens [first, last), the first four a prompt; answers are the softmax over what was read.
template <class Cache>
void decode(Cache& cache, const Rows& rows, std::size_t first, std::size_t last) {
  std::vector<float> out(rows.query_heads * rows.head_dim);
  for (std::size_t t = first; t < last; ++t) {
    const Status status =
        t < 4 ? cache.append_prompt(rows.token_k(t), rows.token_v(t)) : cache.append(rows.token_k(t), rows.token_v(t));
    ASSERT_TRUE(status.ok()) << status.message();
    ASSERT_TRUE(attend(cache, rows.token_q(t), out).ok());
    for (std::size_t head = 0; head < rows.query_heads; ++head) {
      std::vector<std::size_t> read;
      for (const Position position : cache.read_positions(head / 2)) {
        read.push_back(static_cast<std::size_t>(position.value));
      }
      const ExactAttention exact = rows.exact(t, head, read);
      for (std::size_t i = 0; i < rows.head_dim; ++i) {
        ASSERT_NEAR(static_cast<double>(out[head * rows.head_dim + i]), exact.out[i], 1e-5) << "token " << t;
      }
    }
  }
}

template <class Policy>
void expect_decodes_forks_and_goes_on() {
  SCOPED_TRACE(std::string(Policy::name));
  const CacheConfig config = small_config();
  const Rows rows(48, config, 1);
  PagedKvCache<Policy> cache(config);
  decode(cache, rows, 0, 30);
  std::stringstream snapshot;
  save(cache, snapshot);
  PagedKvCache<Policy> loaded(config);
  load(loaded, snapshot);
  decode(cache, rows, 30, 48);
  decode(loaded, rows, 30, 48);
  EXPECT_EQ(cache.resident_positions(0), loaded.resident_positions(0));
  if (Evictor<Policy>) {
    EXPECT_LE(cache.resident_tokens(0), config.budget_tokens);
  }
}

TEST(WithoutExceptions, CachesDecodeSaveAndGoOn) {
  expect_decodes_forks_and_goes_on<Dense>();
  expect_decodes_forks_and_goes_on<Raas>();
  expect_decodes_forks_and_goes_on<H2o>();
  expect_decodes_forks_and_goes_on<Quest>();
  expect_decodes_forks_and_goes_on<Compose<Kindred, Quest>>();
}

TEST(WithoutExceptions, ForksAndDraftsAreTakenBack) {
  const CacheConfig config = small_config();
  const Rows rows(20, config, 2);
  PagedKvCache<Raas> cache(config);
  decode(cache, rows, 0, 10);
  PagedKvCache<Raas> branch = cache.fork();
  const TokenRows<const float> drafts(rows.token_k(10).data(), 3, config.kv_heads, config.head_dim);
  ASSERT_TRUE(branch.append_draft(drafts, drafts).ok());
  ASSERT_TRUE(branch.truncate(Position{11}).ok());
  EXPECT_EQ(branch.next_position(), Position{11});
  EXPECT_EQ(cache.next_position(), Position{10});
  EXPECT_EQ(branch.append_prompt(rows.token_k(0), rows.token_v(0)).code(), Status::Code::prompt_ended);
}

// What is thrown elsewhere, here ends the program with the same sentence.
TEST(WithoutExceptionsDeathTest, RefusalsSayWhatTheyWouldHaveThrown) {
  CacheConfig config = small_config();
  config.budget_tokens = 3;
  EXPECT_DEATH(PagedKvCache<Raas>{config}, "budget_tokens");
  EXPECT_DEATH((AnyCache::of<Raas, float>(ScalarType::f32, small_config(), std::vector<OptionSetting>{{"alhpa", "1"}})),
               "alhpa");
  PagedKvCache<Raas> cache(small_config());
  std::istringstream nothing;
  EXPECT_DEATH(load(cache, nothing), "snapshot");
  EXPECT_DEATH(static_cast<void>(PagePool<float>::of_bytes(small_config().geometry(), PageSummary::none, 10)),
               "a pool of 10 bytes");
}

}  // namespace
}  // namespace kvsparse_test
