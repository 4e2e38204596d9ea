// SPDX-License-Identifier: Apache-2.0
// RaaS: a reasoning model uses a milestone token for a while and then never again, so stamp each page with the last
// step that used it and give up the page unused for longest. The prompt, to which attention returns after long silences
// (phoenix tokens), is never given up. Source: Hu et al., ACL Findings 2025 (2502.11147), section 3.  Needs: page mass
// (min/max summaries too under quest_bound). Per step: O(L d).  Memory: L tokens, prompt included; a stamp and a mass a
// page. Departs from the paper: "used" is decided by the page's exact mass, not by Quest's bound on it, because all
// resident pages are attended anyway and the bound refreshes junk; presets paper_v1 (bound > 1e-4) and paper_v2 (the
// better half by bound) restore it. A group's page is used when any of its query heads uses it.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

#include "policy.hpp"

namespace kvsparse {

struct Raas {
  static constexpr std::string_view name = "raas";
  static constexpr EvidenceKind evidence = EvidenceKind::page_mass;

  /// Which pages count as used: those above a score, or a share of them, the best.
  enum class Used { alpha, rank };
  /// What the score is: a page's mass, or its share of the softmax over Quest's bounds.
  enum class Evidenced { exact_mass, quest_bound };
  static constexpr std::string_view names_of(Used) { return "alpha|rank"; }
  static constexpr std::string_view names_of(Evidenced) { return "exact_mass|quest_bound"; }

  struct Options {
    Used used = Used::alpha;                     ///< what makes a page used
    double alpha = 0.01;                         ///< used = alpha: a page is used when its score exceeds this
    double r = 0.5;                              ///< used = rank: the share of the evictable pages that count as used
    Evidenced evidence = Evidenced::exact_mass;  ///< what its score is
    bool pin_prompt = true;

    void visit(auto&& field) {
      field("used", used);
      field("alpha", alpha);
      field("r", r);
      field("evidence", evidence);
      field("pin_prompt", pin_prompt);
    }
    std::string problem() const {
      if (!(alpha >= 0.0 && alpha <= 1.0)) return "alpha = " + std::to_string(alpha) + " is not in [0, 1]";
      if (!(r >= 0.0 && r <= 1.0)) return "r = " + std::to_string(r) + " is not in [0, 1]";
      return {};
    }
    static constexpr std::string_view presets = "paper_v1|paper_v2";
    bool preset(std::string_view preset) {
      if (preset != "paper_v1" && preset != "paper_v2") return false;
      *this = {};
      evidence = Evidenced::quest_bound;
      if (preset == "paper_v1") alpha = 1e-4;
      if (preset == "paper_v2") used = Used::rank;
      return true;
    }
  } options;

  struct PageState {
    Position stamp;          // the last decode step that used the page
    float last_mass = 0.0F;  // summed over the group, at the latest query that read the page
  };
  struct HeadState {
    PagesUsed pages_used;
  };

  bool pin_prompt() const { return options.pin_prompt; }
  PageSummary page_summary() const {
    return options.evidence == Evidenced::quest_bound ? PageSummary::min_max : PageSummary::none;
  }

  void on_page_open(HeadView<Raas> head, PageIndex page) const {
    head.state(page) = {.stamp = head.first_position(page), .last_mass = 0.0F};
  }

  PageIndex victim(HeadView<Raas> head) const {
    return head.lowest_evictable(
        [&](PageIndex page) { return std::pair(head.state(page).stamp, head.state(page).last_mass); });
  }

  void observe(HeadView<Raas> head, const Evidence& step) const {
    // What is ranked or compared with alpha; -1 for a page that was not read.
    const std::span<float> scores = head.scratch().first(head.size());
    for (const PageIndex page : head.pages()) {
      const PageShare share = step.share(page);
      if (share.visited) head.state(page).last_mass = share.sum;
      scores[page.value] = !share.visited ? -1.0F : options.used == Used::alpha ? share.peak : share.sum;
    }
    if (step.is_prompt()) return;
    if (options.evidence == Evidenced::quest_bound) score_by_bound(head, step, scores);

    PagesUsed& counted = head.head_state().pages_used;
    const std::size_t evictable = head.evictable_count();
    if (options.used == Used::rank) {
      const auto used = static_cast<std::size_t>(std::ceil(options.r * static_cast<double>(evictable)));
      head.visit_highest_evictable(scores, used, [&](PageIndex page) {
        if (!step.visited(page)) return;
        head.state(page).stamp = step.position();
        ++counted.used;
      });
    } else {
      for (const PageIndex page : head.evictable_pages()) {  // no branch that guesses which pages are used
        const bool used = static_cast<double>(scores[page.value]) > options.alpha && step.visited(page);
        Position& stamp = head.state(page).stamp;
        stamp = used ? step.position() : stamp;
        counted.used += used ? 1 : 0;
      }
    }
    counted.judged += evictable;
    if (head.has_open_page()) head.state(head.open_page()).stamp = step.position();
  }

  PagesUsed pages_used(HeadView<Raas> head) const { return head.head_state().pages_used; }

 private:
  static void score_by_bound(const HeadView<Raas>& head, const Evidence& step, std::span<float> scores) {
    const std::span<float> bounds = head.scratch().subspan(head.size(), head.size() * step.group());
    head.upper_bounds(step.queries(), bounds);
    softmax_scores(bounds, step.group(), step.queries().scale, scores);
  }

  /// scores[page] = max over the group of the softmax over the resident pages of scale * bound.
  static void softmax_scores(std::span<float> bounds, std::size_t group, float scale, std::span<float> scores) {
    std::fill(scores.begin(), scores.end(), 0.0F);
    for (std::size_t q = 0; q < group; ++q) {
      float largest = bounds[q];
      for (std::size_t i = q; i < bounds.size(); i += group) largest = std::max(largest, bounds[i]);
      float sum = 0.0F;
      for (std::size_t i = q; i < bounds.size(); i += group) {
        bounds[i] = std::exp(scale * (bounds[i] - largest));
        sum += bounds[i];
      }
      for (std::size_t page = 0; page < scores.size(); ++page) {
        scores[page] = std::max(scores[page], bounds[page * group + q] / sum);
      }
    }
  }
};

}  // namespace kvsparse
