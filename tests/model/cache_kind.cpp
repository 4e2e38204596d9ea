// SPDX-License-Identifier: Apache-2.0
#include "cache_kind.hpp"

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <stdexcept>

#include "engine/named_cache.hpp"
#include "support/row_stock.hpp"
#include "witness.hpp"

namespace kvsparse_test {

using namespace kvsparse;

namespace {

using Witnesses = PolicyList<MassWitness, TokenWitness>;

PolicyFacts facts_of(std::string_view policy) {
  const std::optional<PolicyFacts> of_witness = find_policy_facts<Witnesses>(policy);
  return of_witness ? *of_witness : policy_facts(policy);
}

/// Whether the policy is that one, or composed of it.
bool has_part(std::string_view policy, std::string_view part) {
  const std::size_t plus = policy.find('+');
  if (plus == std::string_view::npos) return policy == part;
  return policy.substr(0, plus) == part || policy.substr(plus + 1) == part;
}

std::string boolean(bool value) { return value ? "true" : "false"; }

std::size_t draw(TestRng& rng, std::size_t least, std::size_t most) {
  return least + static_cast<std::size_t>(rng.below(static_cast<int>(most - least + 1)));
}

/// Small numbers, so that windows close and periods end all the time.
void draw_settings(CacheKind& kind, const std::vector<std::string>& keys, TestRng& rng) {
  const auto has = [&](std::string_view key) { return std::find(keys.begin(), keys.end(), key) != keys.end(); };
  const auto set = [&](const char* key, std::string value) { kind.settings.push_back({key, std::move(value)}); };
  if (has("pin_prompt")) {
    kind.pins_prompt = rng.below(2) == 0;
    set("pin_prompt", boolean(kind.pins_prompt));
  }
  if (has("sinks")) {
    const std::size_t sinks = draw(rng, 0, 2 * kind.config.page_size);
    kind.sink_pages = kind.geometry().pages_for(sinks);
    set("sinks", std::to_string(sinks));
  }
  if (has("in_cache_positions") && kind.config.head_dim > 1 && rng.below(3) == 0) {
    kind.counts_in_cache = true;
    set("in_cache_positions", "true");
    kind.config.rope.theta = 100.0;
    kind.config.rope.rotary_dims = kind.config.head_dim / 2 * 2;
  }
  if (has("window")) set("window", std::to_string(draw(rng, 1, 6)));
  if (has("period")) set("period", std::to_string(draw(rng, 1, 6)));
  if (has("kernel")) set("kernel", "3");
  if (has("alpha") && rng.below(2) == 0) set("alpha", "0.1");
  if (has("used") && rng.below(2) == 0) set("used", "rank");
  if (has("pool") && kind.geometry().group() == 1 && rng.below(2) == 0) set("pool", "query_head");
  if (has("evidence") && rng.below(3) == 0) set("evidence", "quest_bound");
  if (has("safeguard")) {
    kind.budget_floor = 0.25 * rng.below(5);
    set("safeguard", std::to_string(kind.budget_floor));
  }
  kind.trims = has("period") || has_part(kind.policy, "lazy_eviction");
}

CacheKind try_kind(std::string_view policy, ScalarType scalar, const PoolShape& shape, TestRng& rng) {
  const PolicyFacts facts = facts_of(policy);
  CacheKind kind;
  kind.policy = policy;
  kind.scalar = scalar;
  kind.evicts = facts.evicts;
  kind.selects = facts.selects;
  kind.shares_budget = facts.shares_budget;
  const auto is_any_of = [&](std::initializer_list<std::string_view> parts) {
    return std::any_of(parts.begin(), parts.end(), [&](std::string_view part) { return has_part(policy, part); });
  };
  kind.reads_as_needed = is_any_of({"half_space", "certified", "clustered", "token_witness"});
  kind.reads_newest = !is_any_of({"oracle"});
  kind.sink_pages = is_any_of({"value_aware"}) ? 1 : 0;
  kind.answers_for_gone = is_any_of({"clustered", "streaming_sketch"});
  CacheConfig& config = kind.config;
  config.kv_heads = shape.kv_heads;
  config.query_heads = shape.kv_heads * shape.group;
  config.head_dim = shape.head_dim;
  config.value_dim = shape.value_dim;
  config.page_size = shape.page_size;
  draw_settings(kind, facts.option_keys, rng);

  const auto any_tokens = [&](std::size_t least_pages, std::size_t most_pages) {
    return draw(rng, least_pages, most_pages) * config.page_size + draw(rng, 0, config.page_size - 1);
  };
  const std::size_t small = config.page_size < 3 ? 6 : 0;
  config.budget_tokens = any_tokens(1, 6) + small + kind.sink_pages * config.page_size;
  config.read_budget_tokens = any_tokens(1, 3) + small / 2;
  config.max_tokens = any_tokens(4, 9) + 2 * small;
  config.prompt_overflow = static_cast<PromptOverflow>(rng.below(3));
  config.max_prompt_tokens = any_tokens(1, 8);
  config.min_decode_tokens = rng.below(3) == 0 ? any_tokens(0, 2) : 0;
  config.max_speculative = rng.below(3) == 0 ? 0 : draw(rng, 1, 9);
  config.layer = draw(rng, 0, 3);
  switch (rng.below(8)) {
    case 0: config.logits.window = draw(rng, 1, config.budget_tokens); break;
    case 1: config.logits.soft_cap = 4.0F; break;
    case 2: config.logits.sink_logits.assign(config.query_heads, 0.5F); break;
    case 3: config.logits.alibi_slopes.assign(config.query_heads, 0.25F); break;
    default: break;
  }
  return kind;
}

}  // namespace

AnyCache CacheKind::make() const {
  auto witness = AnyCache::find<Witnesses>(policy, scalar, config, settings);
  return witness ? *std::move(witness) : kvsparse_tools::named_cache(policy, scalar, config, settings);
}
AnyCache CacheKind::make(const AnyPagePool& pool) const {
  auto witness = AnyCache::find<Witnesses>(policy, scalar, config, settings, &pool);
  return witness ? *std::move(witness) : kvsparse_tools::named_cache_over(pool, policy, config, settings);
}

std::string CacheKind::describe() const {
  constexpr const char* overflows[] = {"error", "grow", "unpin_middle"};
  std::string text = policy;
  for (const OptionSetting& setting : settings) text += " " + setting.key + "=" + setting.value;
  const auto add = [&](const char* name, std::size_t value) {
    text += std::string(", ") + name + " " + std::to_string(value);
  };
  text += ", " + std::string(scalar_type_names[static_cast<std::size_t>(scalar)]);
  add("query_heads", config.query_heads);
  add("kv_heads", config.kv_heads);
  add("head_dim", config.head_dim);
  add("value_dim", config.value_dim);
  add("page_size", config.page_size);
  if (evicts) add("budget_tokens", config.budget_tokens);
  if (!evicts) add("max_tokens", config.max_tokens);
  if (selects) add("read_budget_tokens", config.read_budget_tokens);
  text += std::string(", prompt_overflow ") + overflows[static_cast<std::size_t>(config.prompt_overflow)];
  add("max_prompt_tokens", config.max_prompt_tokens);
  add("min_decode_tokens", config.min_decode_tokens);
  add("max_speculative", config.max_speculative);
  add("layer", config.layer);
  if (config.logits.window != 0) add("window", config.logits.window);
  if (config.logits.soft_cap != 0.0F) text += ", soft_cap " + std::to_string(config.logits.soft_cap);
  if (!config.logits.sink_logits.empty()) text += ", sink logits " + std::to_string(config.logits.sink_logits[0]);
  if (!config.logits.alibi_slopes.empty()) text += ", ALiBi slopes " + std::to_string(config.logits.alibi_slopes[0]);
  return text;
}

std::vector<std::string> policies_to_model() {
  std::vector<std::string> policies = policy_names();
  for (std::string& witness : policy_names<Witnesses>()) policies.push_back(std::move(witness));
  return policies;
}

PoolShape draw_shape(std::string_view policy, std::size_t page_size, TestRng& rng) {
  constexpr std::size_t head_dims[] = {1, 5, 8, 20};
  constexpr std::size_t value_dims[] = {1, 3, 16, 24};
  PoolShape shape;
  shape.kv_heads = draw(rng, 1, 2);
  // What each query head of a group read by itself is not told.
  shape.group = has_part(policy, "oracle") ? 1 : draw(rng, 1, 3);
  shape.head_dim = head_dims[rng.below(4)];
  shape.value_dim = rng.below(3) == 0 ? value_dims[rng.below(4)] : shape.head_dim;
  shape.page_size = page_size;
  PageSummary summaries[] = {PageSummary::none, PageSummary::min_max, PageSummary::mean};
  std::swap(summaries[0], summaries[draw(rng, 0, 1)]);
  for (const PageSummary summary : summaries) {
    shape.summary = summary;
    try {
      static_cast<void>(draw_kind(policy, ScalarType::f32, shape, rng));
      return shape;
    } catch (const std::runtime_error&) {
    }
  }
  throw std::runtime_error("no pool suits policy " + std::string(policy));
}

CacheKind draw_kind(std::string_view policy, ScalarType scalar, const PoolShape& shape, TestRng& rng) {
  std::string problem;
  const AnyPagePool pool = make_pool(scalar, shape, 1);
  for (int attempt = 0; attempt < 100; ++attempt) {
    CacheKind kind = try_kind(policy, scalar, shape, rng);
    try {
      static_cast<void>(kind.make(pool));
      return kind;
    } catch (const ConfigError& error) {
      problem = error.what();
    }
  }
  throw std::runtime_error("no configuration suits policy " + std::string(policy) + ": " + problem);
}

AnyPagePool make_pool(ScalarType scalar, const PoolShape& shape, std::size_t pages) {
  const Geometry geometry{.query_heads = shape.kv_heads * shape.group,
                          .kv_heads = shape.kv_heads,
                          .head_dim = shape.head_dim,
                          .page_size = shape.page_size,
                          .value_dim = shape.value_dim};
  return with_scalar(scalar, [&]<class Scalar>() -> AnyPagePool {
    return PagePool<Scalar>(geometry, shape.summary, pages * shape.kv_heads);
  });
}

}  // namespace kvsparse_test
