// SPDX-License-Identifier: Apache-2.0
#include "named_pool.hpp"

#include <algorithm>
#include <stdexcept>

namespace kvsparse_tools {

namespace {

kvsparse::Geometry geometry_of(const ModelConfig& model, const CacheChoice& choice) {
  return {model.query_heads, model.kv_heads, model.head_dim, choice.page_size};
}

/// What the policy, with its options, needs.
kvsparse::PageSummary summary_of(const CacheChoice& choice) {
  kvsparse::PageSummary summary = kvsparse::PageSummary::none;
  kvsparse::detail::visit_policy<kvsparse::NamedPolicies>(choice.policy, [&]<class Policy>() {
    summary = kvsparse::traits::page_summary(kvsparse::with_options(Policy{}, choice.settings.options));
  });
  return summary;
}

template <class Scalar>
std::uint64_t pool_bytes(const ModelConfig& model, const CacheChoice& choice, std::size_t pages) {
  return kvsparse::PagePool<Scalar>::bytes_required(geometry_of(model, choice), summary_of(choice), pages);
}

}  // namespace

NamedPool::NamedPool(const ModelConfig& model, const CacheChoice& choice, std::uint64_t bytes)
    : pool_(kvsparse::any_page_pool(choice.dtype, geometry_of(model, choice), summary_of(choice), bytes)) {}

std::size_t NamedPool::pages_for(const ModelConfig& model, const CacheChoice& choice, std::size_t tokens) {
  const std::size_t page = std::max<std::size_t>(choice.page_size, 1);
  const std::size_t whole = (tokens + page - 1) / page;
  const bool evicts = kvsparse::policy_facts(choice.policy).evicts;
  std::size_t pages = model.layers * whole;
  if (evicts) {
    const std::vector<std::size_t> budgets = choice.layer_budgets(model.layers);
    pages = std::min(choice.dense_layers, model.layers) * whole;
    for (std::size_t layer = choice.dense_layers; layer < model.layers; ++layer) {
      pages += std::min(whole, budgets[layer] / page);
    }
  }
  return pages * model.kv_heads;
}

std::uint64_t NamedPool::bytes_of(const ModelConfig& model, const CacheChoice& choice, std::size_t pages) {
  switch (choice.dtype) {
    case kvsparse::ScalarType::f32: return pool_bytes<float>(model, choice, pages);
    case kvsparse::ScalarType::f16: return pool_bytes<kvsparse::Half>(model, choice, pages);
    case kvsparse::ScalarType::bf16: return pool_bytes<kvsparse::Bfloat16>(model, choice, pages);
    case kvsparse::ScalarType::int8: return pool_bytes<kvsparse::Int8>(model, choice, pages);
  }
  throw std::logic_error("unknown storage type");
}

}  // namespace kvsparse_tools
