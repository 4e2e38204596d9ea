// SPDX-License-Identifier: Apache-2.0
// Kindred: how a page was used so far cannot tell whether it will be a milestone after a long silence, but its values
// may look like those of the pages that were. RaaS, where the silence of such a page weighs less:
//
//   a page is used       when its mass exceeds alpha; its stamp is then the step, as in RaaS
//   it is a milestone    from the first use at an age of `window` tokens or more: younger uses are local context
//   a head learns        the mean direction of its milestones' summed values, weighted by mass; each milestone's cosine
//                        with it, taken before that milestone is learnt, and each new page's cosine
//   gap                = how far the milestones' mean cosine is above that of all pages, in standard deviations
//   trust              = (gap less `caution` standard errors)^2, from 0 to 1: what the head can tell of new milestones
//   likeness of a page = 0 at the average page's cosine or below, 1 halfway to the average milestone's or above
//   the victim           has the largest silence / patience^(trust * likeness); ties go to the oldest page
//
// With trust 0 the oldest stamp goes, as in RaaS, which breaks ties by mass and stamps the page being filled always.
// Source: kvsparse's own; measured in README.  Needs: page mass; reads values.  Per step: O(L d), and 1/B of that again
// for a victim. Memory: L tokens, prompt included; a stamp and a bit a page, 263 numbers a head; 256 channels at most.
// Limits: gains only where a page is about as large as what is cited: 2 and 4 on lines of 12 tokens, not 5, 8 and 16.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include "policy.hpp"

namespace kvsparse {

struct Kindred {
  static constexpr std::string_view name = "kindred";
  static constexpr EvidenceKind evidence = EvidenceKind::page_mass;
  static constexpr bool reads_rows = true;
  static constexpr std::size_t max_channels = 256;  ///< of a value, the first ones, that likeness looks at

  struct Options {
    double alpha = 0.01;      ///< a page is used when its mass, under any query head of the group, exceeds this
    std::size_t window = 24;  ///< tokens: from this age on a use makes a milestone
    double patience = 16.0;   ///< how many times longer a page like a milestone may be silent
    double caution = 0.5;     ///< standard errors taken off the gap; 0 trusts the first milestone as much as the tenth
    bool pin_prompt = true;
    void visit(auto&& field) {
      field("alpha", alpha);
      field("window", window);
      field("patience", patience);
      field("caution", caution);
      field("pin_prompt", pin_prompt);
    }
    std::string problem() const {
      if (!(alpha >= 0 && alpha <= 1)) return "alpha = " + std::to_string(alpha) + " is not in [0, 1]";
      if (!(patience >= 1 && patience <= 1e6)) return "patience = " + std::to_string(patience) + " is not in [1, 1e6]";
      if (!(caution >= 0 && caution <= 1e6)) return "caution = " + std::to_string(caution) + " is not in [0, 1e6]";
      return {};
    }
  } options;

  struct PageState {
    Position stamp;  // of the last use; a page not used yet: its first token
    bool is_milestone = false;
  };
  /// Mean and spread of cosines, fading, because the direction they are measured along moves.
  struct Moments {
    double count = 0.0, sum = 0.0, square = 0.0;
    void add(double cosine) {
      constexpr double kept = 0.98;
      count = count * kept + 1.0;
      sum = sum * kept + cosine;
      square = square * kept + cosine * cosine;
    }
    double mean() const { return sum / std::max(1.0, count); }
    double deviation() const { return std::sqrt(std::max(1e-12, square / std::max(1.0, count) - mean() * mean())); }
  };
  struct HeadState {
    std::array<double, max_channels> direction{};  // summed over milestones
    double length = 0.0;                           // of it
    Moments pages, milestones;
  };

  bool pin_prompt() const { return options.pin_prompt; }

  void on_page_open(HeadView<Kindred> head, PageIndex page) const {
    head.state(page) = {.stamp = head.first_position(page), .is_milestone = false};
  }

  void on_page_full(HeadView<Kindred> head, PageIndex page) const {
    if (head.head_state().length > 0.0) head.head_state().pages.add(cosine(head, looks_of(head, page)));
  }

  void observe(HeadView<Kindred> head, const Evidence& step) const {
    if (step.is_prompt()) return;
    for (const PageIndex page : head.pages()) {
      if (head.is_pinned(page) || !(static_cast<double>(step.peak_mass(page)) > options.alpha)) continue;
      PageState& state = head.state(page);
      state.stamp = step.position();
      if (state.is_milestone) continue;
      state.is_milestone = static_cast<std::size_t>(step.position() - head.first_position(page)) >= options.window;
      if (state.is_milestone) learn(head, looks_of(head, page), static_cast<double>(step.peak_mass(page)));
    }
  }

  PageIndex victim(HeadView<Kindred> head) const {
    const HeadState& seen = head.head_state();
    const double average = seen.pages.mean();
    const double spread = seen.pages.deviation();  // never 0
    const double gap = (seen.milestones.mean() - average) / spread;
    const double sure = gap - options.caution / std::sqrt(std::max(1.0, seen.milestones.count));
    const bool can_tell = seen.pages.count > 1.0 && seen.milestones.count > 0.0 && sure > 0.0;  // one has no spread
    const double trust = can_tell ? std::min(1.0, sure * sure) : 0.0;
    return head.lowest_evictable([&](PageIndex page) {
      // At least 1: a stamp is the position of a token that is stored, and none is being stored now.
      const double silence = std::log(static_cast<double>(head.end() - head.state(page).stamp));
      if (trust == 0.0) return -silence;
      const double above = (cosine(head, looks_of(head, page)) - average) / spread;
      return trust * std::clamp(2.0 * above / gap, 0.0, 1.0) * std::log(options.patience) - silence;
    });
  }

 private:
  using Looks = std::array<double, max_channels>;
  static std::size_t channels(const HeadPages& head) { return std::min(head.value_dim(), max_channels); }

  /// The page's summed value at length 1; all zeros if the sum is zero or not finite.
  static Looks looks_of(const HeadPages& head, PageIndex page) {
    Looks looks{};
    const std::span<double> sum = std::span(looks).first(channels(head));
    const std::span<float> row = head.scratch().first(head.value_dim());
    for (std::uint32_t slot = 0; slot < head.tokens(page); ++slot) {
      head.load_value(page, Slot{slot}, row);
      for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += static_cast<double>(row[i]);
    }
    const double square = std::inner_product(sum.begin(), sum.end(), sum.begin(), 0.0);
    for (double& x : sum) x = square > 0.0 && std::isfinite(square) ? x / std::sqrt(square) : 0.0;
    return looks;
  }

  static double cosine(HeadView<Kindred> head, const Looks& looks) {
    const HeadState& seen = head.head_state();
    const auto end = looks.begin() + static_cast<std::ptrdiff_t>(channels(head));
    return seen.length > 0.0 ? std::inner_product(looks.begin(), end, seen.direction.begin(), 0.0) / seen.length : 0.0;
  }

  static void learn(HeadView<Kindred> head, const Looks& looks, double mass) {
    HeadState& seen = head.head_state();
    if (seen.length > 0.0) seen.milestones.add(cosine(head, looks));
    for (std::size_t i = 0; i < channels(head); ++i) seen.direction[i] += mass * looks[i];
    seen.length =
        std::sqrt(std::inner_product(seen.direction.begin(), seen.direction.end(), seen.direction.begin(), 0.0));
  }
};

}  // namespace kvsparse
