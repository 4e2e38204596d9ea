// SPDX-License-Identifier: Apache-2.0
//
// Policies that use the whole contract, and must compile.
#include "kvsparse/cache/attend.hpp"
#include "kvsparse/policy/compose.hpp"
#include "kvsparse/policy/quest.hpp"

namespace no_mistake {

using namespace kvsparse;

struct Least {
  static constexpr std::string_view name = "least";
};

/// Every verb and trait of a policy of one head; traits as constants.
struct Whole {
  static constexpr std::string_view name = "whole";
  static constexpr PolicyScope scope = PolicyScope::kv_head;
  static constexpr PolicyGranularity granularity = PolicyGranularity::token;
  static constexpr SelectionScope selection = SelectionScope::query_head;
  static constexpr EvidenceKind evidence = EvidenceKind::page_mass | EvidenceKind::token_weights;
  static constexpr int query_window = 8;
  static constexpr PageSummary page_summary = PageSummary::mean;
  static constexpr std::size_t slack_tokens = 16;
  static constexpr std::size_t period = 16;
  static constexpr bool pin_prompt = true;
  enum class Mood { calm, hasty };
  static constexpr std::string_view names_of(Mood) { return "calm|hasty"; }
  struct Options {
    double alpha = 0.5;
    Mood mood = Mood::calm;
    void visit(auto&& field) {
      field("alpha", alpha);
      field("mood", mood);
    }
    std::string problem() const { return {}; }
    static constexpr std::string_view presets = "one";
    bool preset(std::string_view preset) { return preset == "one"; }
  } options;
  struct PageState {
    float mass = 0.0F;
  };
  struct HeadState {
    PagesUsed used;
  };
  void on_page_open(HeadView<Whole>, PageIndex) const {}
  void on_append(HeadView<Whole>, PageIndex, Slot) const {}
  void on_page_full(HeadView<Whole>, PageIndex) const {}
  void on_prompt_end(HeadView<Whole>) const {}
  void on_clear(HeadView<Whole>) const {}
  void on_evict(HeadView<Whole>, PageIndex) const {}
  void select(HeadView<Whole>, QueryGroup, Selection& reads) const { reads.add_all(); }
  void select_more(HeadView<Whole>, QueryGroup, std::span<const SoftmaxState>, Selection&) const {}
  void observe(HeadView<Whole>, const Evidence&) const {}
  PageIndex victim(HeadView<Whole> head) const { return *head.evictable_pages().begin(); }
  void trim(HeadView<Whole>, PageList&) const {}
  void residual(HeadView<Whole>, QueryGroup, std::span<SoftmaxState>) const {}
  std::size_t pinned_pages(const Geometry&) const { return 1; }
  PagesUsed pages_used(HeadView<Whole> head) const { return head.head_state().used; }
};

/// A policy of a whole layer; traits as functions, views taken by reference.
struct Layered {
  static constexpr std::string_view name = "layered";
  static constexpr PolicyScope scope = PolicyScope::layer;
  EvidenceKind evidence() const { return EvidenceKind::largest_token_mass; }
  int query_window() const { return 4; }
  PageSummary page_summary() const { return PageSummary::min_max; }
  bool pin_prompt() const { return true; }
  struct LayerState {
    int steps = 0;
  };
  void observe(const HeadView<Layered>&, const Evidence&) const {}
  void on_step_end(const LayerView<Layered>& layer) const { ++layer.layer_state().steps; }
  PageIndex victim(const LayerView<Layered>& layer) const { return *layer.head(0).evictable_pages().begin(); }
};

/// Heads that share a budget.
struct Shared {
  static constexpr std::string_view name = "shared";
  static constexpr PolicyScope scope = PolicyScope::shared_budget;
  static constexpr double budget_floor = 0.5;
  void on_step_end(LayerView<Shared>) const {}
  HeadPage victim(LayerView<Shared> layer) const {
    return layer.lowest_evictable([](const HeadView<Shared>&, PageIndex) { return 0; });
  }
};

template <class Policy>
void use() {
  PagedKvCache<Policy, Half> cache(CacheConfig{});
  float row[8] = {};
  static_cast<void>(cache.append(row, row));
  static_cast<void>(attend(cache, row, row));
}

}  // namespace no_mistake

int main() {
  using namespace no_mistake;
  use<Least>();
  use<Whole>();
  use<Layered>();
  use<Compose<Layered, Quest>>();
  use<Shared>();
  use<Compose<Shared, Quest>>();
  static_assert(HeadEvictor<Whole> && !LayerEvictor<Whole> && LayerEvictor<Layered> && Evictor<Layered>);
  static_assert(SharedBudgetEvictor<Shared> && !HeadEvictor<Shared> && !LayerEvictor<Shared> && Evictor<Shared>);
  static_assert(!Evictor<Least> && !Selector<Least> && !Observer<Least>);
  static_assert(Selector<Whole> && RepeatedSelector<Whole> && Trimmer<Whole> && ResidualProvider<Whole>);
}
