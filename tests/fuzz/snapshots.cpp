// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <span>
#include <sstream>
#include <string>
#include <vector>

#include "engine/named_cache.hpp"
#include "inputs.hpp"
#include "kvsparse/interop/snapshot.hpp"
#include "support/policy_kinds.hpp"
#include "support/rows.hpp"

namespace kvsparse_test {

using namespace kvsparse;
using kvsparse_tools::named_cache;

namespace {

CacheConfig snapshot_config() {
  CacheConfig config;
  config.query_heads = 2;
  config.kv_heads = 2;
  config.head_dim = 1;
  config.page_size = 2;
  config.budget_tokens = 8;
  config.read_budget_tokens = 4;
  config.max_tokens = 40;
  return config;
}

struct SnapshotKind {
  std::string policy;
  ScalarType scalar;
  AnyCache make() const {
    return named_cache(policy, scalar, snapshot_config(), short_periods(policy_facts(policy).option_keys, small_lag));
  }
  bool is_compiled() const {
    try {
      static_cast<void>(make());
      return true;
    } catch (const ConfigError&) {
      return false;
    }
  }
};

const std::vector<SnapshotKind>& kinds() {
  static const std::vector<SnapshotKind> all = [] {
    std::vector<SnapshotKind> made;
    for (const std::string& policy : policy_names()) {
      const SnapshotKind kind{policy, made.size() % 2 == 0 ? ScalarType::f32 : ScalarType::int8};
      if (kind.is_compiled()) made.push_back(kind);
    }
    return made;
  }();
  return all;
}

const Rows& rows() {
  static const Rows of_all(64, snapshot_config(), 7);
  return of_all;
}

std::string saved(const AnyCache& cache) {
  std::ostringstream out;
  save(cache, out);
  return out.str();
}

/// As far as the cache has room, at most so many tokens.
void decode(AnyCache& cache, std::size_t tokens, std::size_t prompt) {
  const CacheConfig config = snapshot_config();
  const PolicyFacts facts = policy_facts(cache.policy_name());
  std::vector<float> out(config.query_heads * config.head_dim), log_sum_exp(config.query_heads);
  for (std::size_t i = 0; i < tokens; ++i) {
    const std::size_t t = static_cast<std::size_t>(cache.next_position().value) % rows().tokens;
    const auto k = rows().token_k(t), v = rows().token_v(t);
    const Status status = i < prompt ? cache.append_prompt(k, v) : cache.append(k, v);
    if (!status.ok()) {
      if (status.code() == Status::Code::max_tokens_reached && !facts.evicts) return;
      throw BrokenPromise("a loaded cache does not go on: " + status.message());
    }
    if (!cache.attend(rows().token_q(t), out, log_sum_exp).ok()) throw BrokenPromise("a loaded cache does not answer");
    std::size_t of_layer = 0;
    for (std::size_t h = 0; h < config.kv_heads; ++h) {
      const std::vector<Position> resident = cache.resident_positions(h);
      of_layer += resident.size();
      const bool is_over = facts.evicts && !facts.shares_budget && resident.size() > config.budget_tokens;
      if (is_over) throw BrokenPromise("a loaded cache breaks its budget");
      if (!std::is_sorted(resident.begin(), resident.end())) throw BrokenPromise("positions are not in order");
    }
    if (facts.evicts && of_layer > config.kv_heads * config.budget_tokens)
      throw BrokenPromise("a loaded cache breaks its layer's budget");
  }
}

std::uint64_t number_at(std::string_view bytes, std::size_t at) {
  std::uint64_t number;
  std::memcpy(&number, bytes.data() + at, sizeof number);
  return number;
}
/// Writes the checksum of bytes [0, at) to `at`.
void set_checksum(std::string& bytes, std::size_t at) {
  Crc64 checksum;
  checksum.add(std::as_bytes(std::span(bytes).first(at)));
  const std::uint64_t value = checksum.value();
  std::memcpy(bytes.data() + at, &value, sizeof value);
}
/// Makes both checksums of a snapshot right, as far as it has their places (snapshot_stream.hpp).
std::string with_right_checksums(std::string_view snapshot) {
  std::string bytes(snapshot);
  constexpr std::size_t facts = 16 + 8;
  if (bytes.size() < facts + 8) return bytes;
  const std::uint64_t of_facts = number_at(bytes, facts - 8);
  if (of_facts > bytes.size() - facts - 8) return bytes;
  set_checksum(bytes, facts + of_facts);
  const std::size_t state = facts + of_facts + 8 + 8;
  if (bytes.size() < state + 8) return bytes;
  const std::uint64_t of_state = number_at(bytes, state - 8);
  if (of_state <= bytes.size() - state - 8) set_checksum(bytes, state + of_state);
  return bytes;
}

}  // namespace

std::size_t snapshot_kinds() { return kinds().size(); }

std::string snapshot_of(std::size_t kind, std::size_t tokens) {
  AnyCache cache = kinds()[kind].make();
  decode(cache, tokens, 3);
  return static_cast<char>(kind) + saved(cache);
}

std::string read_snapshot(std::string_view bytes) {
  if (bytes.empty()) return "there is no kind of cache";
  const SnapshotKind& kind = kinds()[static_cast<unsigned char>(bytes[0]) % kinds().size()];
  AnyCache cache = kind.make();
  decode(cache, 7, 2);
  const std::string before = saved(cache);
  std::istringstream in(with_right_checksums(bytes.substr(1)));
  try {
    load(cache, in);
  } catch (const SnapshotError& error) {
    require_clear_sentence(error.what());
    if (saved(cache) != before) throw BrokenPromise("a refused snapshot changed the cache");
    return error.what();
  }
  const std::string loaded = saved(cache);
  AnyCache again = kind.make();
  std::istringstream once_more(loaded);
  load(again, once_more);
  if (saved(again) != loaded) throw BrokenPromise("what was loaded is not what is saved");
  decode(cache, 20, 0);
  return {};
}

}  // namespace kvsparse_test
