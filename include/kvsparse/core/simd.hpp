// SPDX-License-Identifier: Apache-2.0
// The one small layer under the kernels: a vector of floats as wide as the target has, loads that widen f16, bf16 and
// int8, and exp. Compiler vector extensions give the arithmetic on every target; intrinsics appear only where the
// compilers have no portable word for an instruction (f16 conversion, fused multiply-add), or miss it (widening).
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "../config.hpp"
#include "scalar.hpp"

namespace kvsparse::simd {

#if KVSPARSE_AVX512
inline constexpr std::size_t lanes = 16;
#elif defined(__AVX__)
inline constexpr std::size_t lanes = 8;
#else
inline constexpr std::size_t lanes = 4;
#endif

typedef float Floats __attribute__((vector_size(lanes * sizeof(float))));
typedef std::int32_t Ints __attribute__((vector_size(lanes * sizeof(std::int32_t))));

template <class To, class From>
KVSPARSE_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

KVSPARSE_INLINE Floats broadcast(float value) { return value - Floats{}; }

/// a * b + c, fused wherever the target can.
KVSPARSE_INLINE Floats fma(Floats a, Floats b, Floats c) {
#if KVSPARSE_AVX512
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX__) && defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

/// The larger one; b where one of them is NaN.
KVSPARSE_INLINE Floats max(Floats a, Floats b) { return a > b ? a : b; }
KVSPARSE_INLINE Floats min(Floats a, Floats b) { return a < b ? a : b; }

KVSPARSE_INLINE Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

KVSPARSE_INLINE Ints load(const std::int32_t* p) {
  Ints v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

/// The same value, which the compiler must now hold in a register instead of loading it again at every use.
KVSPARSE_INLINE Floats in_register(Floats v) {
#if defined(__AVX__)
  asm("" : "+v"(v));
#elif defined(__SSE2__)
  asm("" : "+x"(v));
#elif defined(__ARM_NEON)
  asm("" : "+w"(v));
#endif
  return v;
}

KVSPARSE_INLINE void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
KVSPARSE_INLINE void store(std::int32_t* p, Ints v) { std::memcpy(p, &v, sizeof v); }

KVSPARSE_INLINE float widened(float element) { return element; }
KVSPARSE_INLINE float widened(Half element) { return static_cast<float>(element); }
KVSPARSE_INLINE float widened(Bfloat16 element) { return static_cast<float>(element); }
KVSPARSE_INLINE float widened(Int8 element) { return static_cast<float>(element.steps); }

/// Widens `count` stored elements one by one: the fallback for targets without a conversion instruction, and for tails.
template <class Scalar>
KVSPARSE_INLINE Floats load_elements(const Scalar* p, std::size_t count) {
  float elements[lanes] = {};
  for (std::size_t i = 0; i < count; ++i) elements[i] = widened(p[i]);
  return load(elements);
}

KVSPARSE_INLINE Floats load(const Half* p) {
#if KVSPARSE_AVX512
  return _mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX__) && defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__ARM_NEON) && defined(__aarch64__)
  uint16x4_t stored;
  std::memcpy(&stored, p, sizeof stored);
  return vcvt_f32_f16(vreinterpret_f16_u16(stored));
#else
  return load_elements(p, lanes);
#endif
}

KVSPARSE_INLINE Floats load(const Bfloat16* p) {
  // The conversion of a whole vector extension is several instructions under g++ 12.
#if KVSPARSE_AVX512
  const auto bits =
      bits_as<Ints>(_mm512_maskz_cvtepu16_epi32(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))) << 16;
#elif defined(__AVX2__)
  const auto bits = bits_as<Ints>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))) << 16;
#elif defined(__ARM_NEON)
  uint16x4_t stored;
  std::memcpy(&stored, p, sizeof stored);
  const auto bits = vshll_n_u16(stored, 16);
#else
  typedef std::uint16_t Halves __attribute__((vector_size(lanes * sizeof(std::uint16_t))));
  Halves stored;
  std::memcpy(&stored, p, sizeof stored);
  const auto bits = __builtin_convertvector(stored, Ints) << 16;
#endif
  return bits_as<Floats>(bits);
}

/// Steps, not yet multiplied by the row's scale.
KVSPARSE_INLINE Floats load(const Int8* p) {
#if KVSPARSE_AVX512
  const auto steps =
      bits_as<Ints>(_mm512_maskz_cvtepi8_epi32(0xFFFF, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  return __builtin_convertvector(steps, Floats);
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#elif defined(__ARM_NEON)
  std::uint32_t stored;  // four bytes are no vector of NEON's
  std::memcpy(&stored, p, sizeof stored);
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(stored))))));
#else
  typedef std::int8_t Steps __attribute__((vector_size(lanes)));
  Steps stored;
  std::memcpy(&stored, p, sizeof stored);
  return __builtin_convertvector(__builtin_convertvector(stored, Ints), Floats);
#endif
}

/// The last row_padding = 8 elements of a row whose stride is no multiple of `lanes`; the upper lanes are zero.
template <class Scalar>
KVSPARSE_INLINE Floats load_half_row(const Scalar* p) {
#if KVSPARSE_AVX512
  __m256 half;
  if constexpr (std::same_as<Scalar, float>) {
    half = _mm256_loadu_ps(p);
  } else if constexpr (std::same_as<Scalar, Half>) {
    half = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  } else if constexpr (std::same_as<Scalar, Bfloat16>) {
    half = _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
  } else {
    half = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  return __builtin_shufflevector(half, __m256{}, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  return load_elements(p, lanes / 2);
#endif
}

/// Rounds to nearest even, as Eigen does.
KVSPARSE_INLINE void store(Half* p, Floats v) {
#if KVSPARSE_AVX512
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xFFFF, v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX__) && defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__ARM_NEON) && defined(__aarch64__)
  const uint16x4_t rounded = vreinterpret_u16_f16(vcvt_f16_f32(v));
  std::memcpy(static_cast<void*>(p), &rounded, sizeof rounded);
#else
  for (std::size_t i = 0; i < lanes; ++i) p[i] = static_cast<Half>(v[i]);
#endif
}

KVSPARSE_INLINE void store(Bfloat16* p, Floats v) {
  for (std::size_t i = 0; i < lanes; ++i) p[i] = static_cast<Bfloat16>(v[i]);
}

/// e^x for x <= 0, the softmax's range, to about 1 ulp; below the smallest normal float the result is 0, and NaN stays
/// NaN. Cephes' reduction and polynomial: x = n ln 2 + r with |r| <= ln 2 / 2.
KVSPARSE_INLINE Floats exp_nonpositive(Floats x) {
  const Floats lowest = broadcast(-87.3365402F);
  const Floats clamped = max(lowest, x);
  // Adding 1.5 * 2^23 rounds to a whole number and leaves it in the lowest bits; with the 127 they are 2^n's exponent.
  constexpr float round = 12582912.0F + 127.0F;
  const Floats shifted =
      in_register(fma(clamped, broadcast(1.44269504F), broadcast(round)));  // -ffast-math would undo it
  const Floats n = shifted - round;
  Floats r = fma(n, broadcast(-0.693359375F), clamped);
  r = fma(n, broadcast(2.12194440e-4F), r);
  Floats p = broadcast(1.9875691500e-4F);
  p = fma(p, r, broadcast(1.3981999507e-3F));
  p = fma(p, r, broadcast(8.3334519073e-3F));
  p = fma(p, r, broadcast(4.1665795894e-2F));
  p = fma(p, r, broadcast(1.6666665459e-1F));
  p = fma(p, r, broadcast(5.0000001201e-1F));
  p = fma(p, r * r, r) + 1.0F;
  const Floats power = bits_as<Floats>(bits_as<Ints>(shifted) << 23);
  return x < lowest ? Floats{} : p * power;
}

// Sums across lanes. The single sum and the sum of many vectors at once add the same lanes in the same order, so a dot
// product has the same bits whatever tile computed it.

KVSPARSE_INLINE float sum(Floats v) {
#if KVSPARSE_AVX512
  Floats half = v + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15);
  return ((half[0] + half[4]) + (half[2] + half[6])) + ((half[1] + half[5]) + (half[3] + half[7]));
#elif defined(__AVX__)
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

namespace detail {

template <std::size_t Distance, std::size_t... Lane>
KVSPARSE_INLINE Floats exchange(Floats v, std::index_sequence<Lane...>) {
  return __builtin_shufflevector(v, v, static_cast<int>(Lane ^ Distance)...);
}

}  // namespace detail

/// Lane i receives lane i ^ Distance.
template <std::size_t Distance>
KVSPARSE_INLINE Floats exchange(Floats v) {
  return detail::exchange<Distance>(v, std::make_index_sequence<lanes>{});
}

/// Where sum_each wants the vector whose sum shall come out in lane `lane`.
constexpr std::size_t slot_of_lane(std::size_t lane) { return (lane % 4) * (lanes / 4) + lane / 4; }

/// The sums of `lanes` vectors in one vector: lane l holds sum(v[slot_of_lane(l)]). A tree of shuffles: three
/// instructions for each pair of vectors instead of a full reduction for each vector.
KVSPARSE_INLINE Floats sum_each(const Floats (&v)[lanes]) {
#if KVSPARSE_AVX512
  const auto halves = [](Floats a, Floats b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  };
  const auto quarters = [](Floats a, Floats b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  };
  const auto pairs = [](Floats a, Floats b) {
    return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  };
  const auto singles = [](Floats a, Floats b) {
    return __builtin_shufflevector(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
           __builtin_shufflevector(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
  };
  const auto four = [&](std::size_t i) { return quarters(halves(v[i], v[i + 1]), halves(v[i + 2], v[i + 3])); };
  return singles(pairs(four(0), four(4)), pairs(four(8), four(12)));
#elif defined(__AVX__)
  const auto halves = [](Floats a, Floats b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  };
  const auto pairs = [](Floats a, Floats b) {
    return __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
           __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  };
  const auto singles = [](Floats a, Floats b) {
    return __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
           __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
  };
  return singles(pairs(halves(v[0], v[1]), halves(v[2], v[3])), pairs(halves(v[4], v[5]), halves(v[6], v[7])));
#else
  const auto pairs = [](Floats a, Floats b) {
    return __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
  };
  const auto singles = [](Floats a, Floats b) {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
  };
  return singles(pairs(v[0], v[1]), pairs(v[2], v[3]));
#endif
}

/// Starts moving a cache line towards the core; a hint without effect on results. Into the second cache: its queue of
/// misses is the longer one, and the nearest cache stays with what is in use.
KVSPARSE_INLINE void prefetch(const void* line) { __builtin_prefetch(line, 0, 2); }

}  // namespace kvsparse::simd
