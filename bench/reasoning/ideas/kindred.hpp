// SPDX-License-Identifier: Apache-2.0
// Kindred: use cannot tell whether a page not cited yet will be a milestone, but it may look like those that were.
// RaaS, where the silence of a page weighs up to `patience` times less if its values resemble those of milestones, the
// pages used at an age beyond `window` tokens: give up the largest silence / patience^(trust * likeness). Each head
// learns, while it decodes, the mean direction of its milestones' values; a page's cosine with it gives the likeness,
// from 0 at the average page to 1 halfway to the average milestone. Every new milestone is predicted before it is
// learnt, so a head knows how far apart, in standard deviations, its milestones are from other pages: that less its
// error, squared, is the trust, at most 1. A head that cannot tell them is RaaS. Source: none that we know.
// Needs: page mass, values. Per step: O(L d), as RaaS, and 1/B of that to evict.  Memory: a stamp and a bit a page, one
// row and eight numbers a head.
#pragma once

#include <algorithm>
#include <cmath>
#include <kvsparse/policy/policy.hpp>

namespace kvsparse_tools::ideas {

struct Kindred {
  static constexpr std::string_view name = "kindred";
  static constexpr kvsparse::EvidenceKind evidence = kvsparse::EvidenceKind::page_mass;

  struct Options {
    double alpha = 0.01;
    std::size_t window = 24;    ///< tokens: a use of a younger page is local context and teaches nothing
    double patience = 16;       ///< how many times longer a page like a milestone may be silent
    double caution = 0.5;       ///< standard errors taken off how far apart milestones are
    bool always_trust = false;  ///< once a milestone is known: to measure what the caution costs and saves
    bool pin_prompt = true;
    void visit(auto&& field) {
      field("alpha", alpha);
      field("window", window);
      field("patience", patience);
      field("caution", caution);
      field("always_trust", always_trust);
      field("pin_prompt", pin_prompt);
    }
    std::string problem() const { return patience >= 1 ? "" : "patience is below 1"; }
  } options;

  struct PageState {
    kvsparse::Position stamp;  // of the last use
    bool is_milestone = false;
  };
  struct HeadState {
    static constexpr std::size_t channels = 256;  // those beyond are not looked at
    struct Moments {                              // fading, because the direction they are measured along moves
      double count = 0, sum = 0, square = 0;
      void add(double x) {
        constexpr double kept = 0.98;
        count = count * kept + 1;
        sum = sum * kept + x;
        square = square * kept + x * x;
      }
      double mean() const { return sum / std::max(1.0, count); }
      double deviation() const { return std::sqrt(std::max(1e-12, square / std::max(1.0, count) - mean() * mean())); }
    };
    float direction[channels] = {};  // sum over milestones
    double length = 0;               // of it
    Moments all, milestones;         // cosines of new pages, and of milestones when first used late
  };

  bool pin_prompt() const { return options.pin_prompt; }

  void on_page_open(kvsparse::HeadView<Kindred> head, kvsparse::PageIndex page) const {
    head.state(page) = {head.first_position(page), false};
  }
  void on_prompt_end(kvsparse::HeadView<Kindred> head) const { head.head_state() = {}; }
  void on_page_full(kvsparse::HeadView<Kindred> head, kvsparse::PageIndex page) const {
    if (head.head_state().length > 0) head.head_state().all.add(cosine(head, looks_of(head, page)));
  }

  void observe(kvsparse::HeadView<Kindred> head, const kvsparse::Evidence& step) const {
    if (step.is_prompt()) return;
    for (const kvsparse::PageIndex page : head.pages()) {
      if (head.is_pinned(page) || !(static_cast<double>(step.peak_mass(page)) > options.alpha)) continue;
      PageState& state = head.state(page);
      state.stamp = step.position();
      const bool is_late = step.position() - head.first_position(page) >= static_cast<std::int64_t>(options.window);
      if (is_late && !state.is_milestone) learn(head, page, step.peak_mass(page));
      state.is_milestone |= is_late;
    }
  }

  kvsparse::PageIndex victim(kvsparse::HeadView<Kindred> head) const {
    const HeadState::Moments& all = head.head_state().all;
    const HeadState::Moments& milestones = head.head_state().milestones;
    const double gap = (milestones.mean() - all.mean()) / all.deviation();
    const double sure = std::clamp(gap - options.caution / std::sqrt(std::max(1.0, milestones.count)), 0.0, 1.0);
    const double trust = options.always_trust ? 1 : sure * sure;
    const bool can_tell = milestones.count > 0 && gap > 0 && trust > 0;
    return head.lowest_evictable([&](kvsparse::PageIndex page) {
      double likeness = 0;
      if (can_tell) {
        const double z = (cosine(head, looks_of(head, page)) - all.mean()) / all.deviation();
        likeness = std::clamp(2 * z / gap, 0.0, 1.0);
      }
      const auto silence = static_cast<double>(head.end() - head.state(page).stamp);
      return trust * likeness * std::log(options.patience) - std::log(silence);
    });
  }

 private:
  static void learn(kvsparse::HeadView<Kindred> head, kvsparse::PageIndex page, float mass) {
    HeadState& seen = head.head_state();
    const std::span<const float> looks = looks_of(head, page);
    if (seen.length > 0) seen.milestones.add(cosine(head, looks));
    double square = 0;
    for (std::size_t i = 0; i < looks.size(); ++i) {
      seen.direction[i] += mass * looks[i];
      square += static_cast<double>(seen.direction[i] * seen.direction[i]);
    }
    seen.length = std::sqrt(square);
  }

  /// The page's summed value at length 1, in the head's scratch.
  static std::span<const float> looks_of(const kvsparse::HeadPages& head, kvsparse::PageIndex page) {
    float sum[HeadState::channels] = {};
    const std::size_t channels = std::min(head.head_dim(), HeadState::channels);
    const std::span<float> row = head.scratch().first(head.head_dim());
    for (std::uint32_t slot = 0; slot < head.tokens(page); ++slot) {
      head.load_value(page, kvsparse::Slot{slot}, row);
      for (std::size_t i = 0; i < channels; ++i) sum[i] += row[i];
    }
    float square = 0;
    for (std::size_t i = 0; i < channels; ++i) square += sum[i] * sum[i];
    for (std::size_t i = 0; i < channels; ++i) row[i] = square > 0 ? sum[i] / std::sqrt(square) : 0;
    return row.first(channels);
  }

  static double cosine(kvsparse::HeadView<Kindred> head, std::span<const float> looks) {
    const HeadState& seen = head.head_state();
    double product = 0;
    for (std::size_t i = 0; i < looks.size(); ++i) product += static_cast<double>(seen.direction[i] * looks[i]);
    return product / seen.length;
  }
};

}  // namespace kvsparse_tools::ideas
