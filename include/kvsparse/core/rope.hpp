// SPDX-License-Identifier: Apache-2.0
// Rotary position embedding, as far as a cache needs it: keys come rotated and stay as they are, but a query can be
// turned back, which moves it towards older keys.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <string>
#include <vector>

namespace kvsparse {

/// Which two of a head's dimensions turn together.
enum class RopeLayout {
  halves,       ///< dimension i turns with i + rotary_dims / 2, as in Hugging Face's Llama and Qwen
  interleaved,  ///< dimension 2 i turns with 2 i + 1, as in GPT-J and Meta's Llama
};
/// How a model's frequencies were lowered for contexts longer than those it was first trained on.
enum class RopeScaling {
  none,    ///< not at all
  linear,  ///< every frequency divided by `factor`
  llama3,  ///< long wavelengths stretched by `factor`, short ones kept, those between blended
};

/// A model's rotary embedding, by the names of its config.json. theta = 0: not given, and nothing can be turned.
struct Rope {
  double theta = 0.0;                       ///< rope_theta: the base of the frequencies
  std::size_t rotary_dims = 0;              ///< the first so many of a head's dimensions turn; 0: all
  RopeLayout layout = RopeLayout::halves;   ///< of the pairs
  RopeScaling scaling = RopeScaling::none;  ///< rope_scaling's type
  double factor = 1.0;                      ///< linear and llama3
  double low_freq_factor = 1.0;             ///< llama3
  double high_freq_factor = 4.0;            ///< llama3
  double original_positions = 8192.0;       ///< llama3: original_max_position_embeddings

  /// [rotary_dims / 2] radians that each pair of dimensions turns per position; empty where theta is 0. Allocates.
  std::vector<double> frequencies(std::size_t head_dim) const {
    const std::size_t dims = rotary_dims != 0 ? rotary_dims : head_dim;
    std::vector<double> result(theta > 0.0 ? dims / 2 : 0);
    for (std::size_t pair = 0; pair < result.size(); ++pair) {
      double frequency = std::pow(theta, -2.0 * static_cast<double>(pair) / static_cast<double>(dims));
      if (scaling == RopeScaling::linear) frequency /= factor;
      if (scaling == RopeScaling::llama3) {
        const double turns_in_training = original_positions * frequency / (2.0 * std::numbers::pi);
        const double kept = (turns_in_training - low_freq_factor) / (high_freq_factor - low_freq_factor);
        const double share = std::clamp(kept, 0.0, 1.0);
        frequency *= share + (1.0 - share) / factor;
      }
      result[pair] = frequency;
    }
    return result;
  }

  /// A sentence that names the value and the limit; empty if nothing is wrong.
  std::string problem(std::size_t head_dim) const {
    const auto is_positive = [](double x) { return x > 0.0 && std::isfinite(x); };
    if (theta == 0.0) return {};
    if (!is_positive(theta)) return "rope.theta = " + std::to_string(theta) + " must be positive and finite, or 0";
    const std::size_t dims = rotary_dims != 0 ? rotary_dims : head_dim;
    if (dims > head_dim) {
      return "rope.rotary_dims = " + std::to_string(dims) + " exceeds head_dim = " + std::to_string(head_dim);
    }
    if (dims % 2 != 0)
      return "the rotary embedding turns pairs, and its " + std::to_string(dims) + " dimensions are odd";
    if (scaling != RopeScaling::none && !is_positive(factor)) {
      return "rope.factor = " + std::to_string(factor) + " must be positive and finite";
    }
    if (scaling == RopeScaling::llama3) {
      if (!is_positive(original_positions)) {
        return "rope.original_positions = " + std::to_string(original_positions) + " must be positive and finite";
      }
      if (!(low_freq_factor < high_freq_factor) || !std::isfinite(high_freq_factor - low_freq_factor)) {
        return "rope.high_freq_factor = " + std::to_string(high_freq_factor) +
               " must be finite and above low_freq_factor = " + std::to_string(low_freq_factor);
      }
    }
    return {};
  }
};

/// Turns rows. Allocates at construction only.
class RopeRotation {
 public:
  /// For a rope whose problem(head_dim) is empty.
  RopeRotation(const Rope& rope, std::size_t head_dim)
      : layout_(rope.layout), frequencies_(rope.frequencies(head_dim)) {}

  /// Bytes that construction allocates.
  static std::size_t bytes_required(const Rope& rope, std::size_t head_dim) {
    return rope.theta > 0.0 ? sizeof(double) * ((rope.rotary_dims != 0 ? rope.rotary_dims : head_dim) / 2) : 0;
  }
  /// False when no rotary embedding was given: turn() then does nothing.
  bool can_turn() const { return !frequencies_.empty(); }

  /// Moves `count` rows of head_dim, `stride` floats apart, by so many positions; negative: back. O(count *
  /// rotary_dims).
  void turn(float* rows, std::size_t count, std::size_t stride, std::int64_t positions) const {
    const std::size_t pairs = frequencies_.size();
    for (std::size_t pair = 0; pair < pairs; ++pair) {
      const double angle = static_cast<double>(positions) * frequencies_[pair];
      const auto cosine = static_cast<float>(std::cos(angle));
      const auto sine = static_cast<float>(std::sin(angle));
      const bool halves = layout_ == RopeLayout::halves;
      float* a = rows + (halves ? pair : 2 * pair);
      float* b = halves ? a + pairs : a + 1;
      for (std::size_t row = 0; row < count; ++row, a += stride, b += stride) {
        const float x = *a;
        *a = x * cosine - *b * sine;
        *b = *b * cosine + x * sine;
      }
    }
  }

 private:
  RopeLayout layout_;
  std::vector<double> frequencies_;  // of each pair
};

}  // namespace kvsparse
