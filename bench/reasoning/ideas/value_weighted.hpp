// SPDX-License-Identifier: Apache-2.0
// Value-weighted use: what a page adds to the output is its mass times its values, so a page counts as used when
// mass * |v| exceeds alpha, |v| being the largest norm of its values over the mean of such norms in this head. RaaS
// otherwise. Source: value norms as in VATP (Guo et al., 2406.12335) and VaSE (2606.03928).  Needs: page mass, values.
// Per step: O(L d), as RaaS, and each page's values once. Memory: a stamp and a norm a page.
#pragma once

#include <algorithm>
#include <cmath>
#include <kvsparse/policy/policy.hpp>

namespace kvsparse_tools::ideas {

struct ValueWeighted {
  static constexpr std::string_view name = "value_weighted";
  static constexpr kvsparse::EvidenceKind evidence = kvsparse::EvidenceKind::page_mass;
  static constexpr bool reads_rows = true;

  struct Options {
    double alpha = 0.01;
    double power = 1;  ///< of the relative norm
    bool pin_prompt = true;
    void visit(auto&& field) {
      field("alpha", alpha);
      field("power", power);
      field("pin_prompt", pin_prompt);
    }
  } options;

  struct PageState {
    kvsparse::Position stamp;
    double norm = 0;
  };
  struct HeadState {
    double norms = 0;
    double pages = 0;
  };

  bool pin_prompt() const { return options.pin_prompt; }

  void on_page_open(kvsparse::HeadView<ValueWeighted> head, kvsparse::PageIndex page) const {
    head.state(page) = {head.first_position(page), 0};
  }

  void on_page_full(kvsparse::HeadView<ValueWeighted> head, kvsparse::PageIndex page) const {
    const std::span<float> value = head.scratch();  // channels that do not fit are not looked at
    float largest = 0;
    for (std::uint32_t slot = 0; slot < head.page_size(); ++slot) {
      largest = std::max(largest, squared_norm(head, page, kvsparse::Slot{slot}, value));
    }
    head.state(page).norm = std::sqrt(static_cast<double>(largest));
    head.head_state().norms += head.state(page).norm;
    ++head.head_state().pages;
  }

  void observe(kvsparse::HeadView<ValueWeighted> head, const kvsparse::Evidence& step) const {
    if (step.is_prompt()) return;
    const double mean = head.head_state().norms / std::max(1.0, head.head_state().pages);
    for (const kvsparse::PageIndex page : head.evictable_pages()) {
      const double weight = std::pow(head.state(page).norm / mean, options.power);
      if (static_cast<double>(step.peak_mass(page)) * weight > options.alpha) head.state(page).stamp = step.position();
    }
    if (head.has_open_page()) head.state(head.open_page()).stamp = step.position();
  }

  kvsparse::PageIndex victim(kvsparse::HeadView<ValueWeighted> head) const {
    return head.lowest_evictable([&](kvsparse::PageIndex page) { return head.state(page).stamp; });
  }

 private:
  static float squared_norm(const kvsparse::HeadPages& head, kvsparse::PageIndex page, kvsparse::Slot slot,
                            std::span<float> value) {
    head.load_value(page, slot, value.first(head.head_dim()));
    float sum = 0;
    for (const float x : value.first(head.head_dim())) sum += x * x;
    return sum;
  }
};

}  // namespace kvsparse_tools::ideas
