// SPDX-License-Identifier: Apache-2.0
// The decode loop of README, as a program of somebody who has nothing of kvsparse but its headers. Every output is
// compared with the formula over the tokens that the cache says it holds; 0 is returned when all is right.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "kvsparse_headers.hpp"  // written by check_consumers.py: every header of the library, or the single one
#include "second_unit.hpp"

namespace {

constexpr std::size_t query_heads = 4, kv_heads = 2, head_dim = 16, prompt_tokens = 12, decoded_tokens = 100;
int mistakes = 0;

void report(const std::string& mistake) {
  std::printf("%s\n", mistake.c_str());
  ++mistakes;
}

/// Multiples of 1/16, which Eigen::half stores as they are.
std::vector<float> random_rows(std::mt19937& random, std::size_t rows) {
  std::uniform_int_distribution<int> sixteenths(-32, 32);
  std::vector<float> values(rows * head_dim);
  for (float& value : values) value = static_cast<float>(sixteenths(random)) / 16.0F;
  return values;
}

double dot(const float* a, const float* b) {
  double sum = 0;
  for (std::size_t i = 0; i < head_dim; ++i) sum += double{a[i]} * double{b[i]};
  return sum;
}

/// Softmax attention of a query head over the tokens at `positions`; keys, values: [tokens, kv_heads, head_dim].
void check_head(std::size_t query_head, const std::vector<kvsparse::Position>& positions, const float* query,
                const std::vector<float>& keys, const std::vector<float>& values, const float* out, float log_sum_exp) {
  const std::size_t kv_head = query_head / (query_heads / kv_heads);
  std::vector<double> expected(head_dim);
  double denominator = 0;
  for (const kvsparse::Position position : positions) {
    const std::size_t row = (static_cast<std::size_t>(position.value) * kv_heads + kv_head) * head_dim;
    const double weight = std::exp(dot(query, &keys[row]) / std::sqrt(double{head_dim}));
    denominator += weight;
    for (std::size_t i = 0; i < head_dim; ++i) expected[i] += weight * double{values[row + i]};
  }
  for (std::size_t i = 0; i < head_dim; ++i) {
    if (!(std::abs(double{out[i]} - expected[i] / denominator) < 1e-5)) report("an output is wrong");
  }
  if (!(std::abs(double{log_sum_exp} - std::log(denominator)) < 1e-5)) report("a log-sum-exp is wrong");
}

std::string header_version() {
  return std::to_string(KVSPARSE_VERSION_MAJOR) + "." + std::to_string(KVSPARSE_VERSION_MINOR) + "." +
         std::to_string(KVSPARSE_VERSION_PATCH);
}

}  // namespace

int main() {
  const kvsparse::CacheConfig config{
      .query_heads = query_heads, .kv_heads = kv_heads, .head_dim = head_dim, .page_size = 4, .budget_tokens = 32};
  kvsparse::PagedKvCache<kvsparse::Raas, Eigen::half> cache(config);

  std::mt19937 random(1);
  std::vector<float> keys = random_rows(random, prompt_tokens * kv_heads);
  std::vector<float> values = random_rows(random, prompt_tokens * kv_heads);
  if (auto status = cache.append_prompt(keys, values); !status) report(status.message());

  for (std::size_t step = 0; step < decoded_tokens; ++step) {
    const std::vector<float> k = random_rows(random, kv_heads), v = random_rows(random, kv_heads);
    const std::vector<float> q = random_rows(random, query_heads);
    std::vector<float> out(query_heads * head_dim), log_sum_exp(query_heads);
    if (auto status = cache.append(k, v); !status) report(status.message());
    if (auto status = kvsparse::attend(cache, q, out, log_sum_exp); !status) report(status.message());

    keys.insert(keys.end(), k.begin(), k.end());
    values.insert(values.end(), v.begin(), v.end());
    for (std::size_t head = 0; head < query_heads; ++head) {
      const std::vector<kvsparse::Position> held = cache.resident_positions(head / (query_heads / kv_heads));
      if (held.empty() || held.size() > config.budget_tokens) report("the budget does not hold");
      check_head(head, held, &q[head * head_dim], keys, values, &out[head * head_dim], log_sum_exp[head]);
    }
  }
  if (cache.resident_positions(0).size() == prompt_tokens + decoded_tokens) report("nothing was evicted");

  if (bytes_in_second_unit() != decltype(cache)::bytes_required(config)) report("the translation units disagree");
#if defined(PACKAGE_VERSION)
  if (header_version() != PACKAGE_VERSION) report("the package is not of the headers' version, " + header_version());
#endif
  std::printf("kvsparse %s: %zu tokens decoded, %d mistakes\n", header_version().c_str(), decoded_tokens, mistakes);
  return mistakes == 0 ? 0 : 1;
}
