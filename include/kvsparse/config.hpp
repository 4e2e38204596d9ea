// SPDX-License-Identifier: Apache-2.0
// Every macro of the library. Define one before the first include to override it.
#pragma once

#include <cassert>
#include <cstdio>
#include <cstdlib>

/// Checks a precondition of the caller or of a policy author; on in debug builds, free in release builds.
#ifndef KVSPARSE_ASSERT
#define KVSPARSE_ASSERT(condition) assert(condition)
#endif

/// Fills the rows of a page that nobody holds any more with NaN; on in debug builds. Who still reads it, or reads a new
/// page before writing it, then gets no plausible number.
#ifndef KVSPARSE_POISON_FREED_PAGES
#if defined(NDEBUG)
#define KVSPARSE_POISON_FREED_PAGES 0
#else
#define KVSPARSE_POISON_FREED_PAGES 1
#endif
#endif

/// Configuration and I/O errors throw; without exceptions they print the same sentence and abort.
#ifndef KVSPARSE_THROW
#if defined(__cpp_exceptions)
#define KVSPARSE_THROW(exception) throw exception
#else
#define KVSPARSE_THROW(exception) (std::fputs((exception).what(), stderr), std::fputc('\n', stderr), std::abort())
#endif
#endif

/// Unrolls the loop that follows: the kernels keep their accumulators in registers only when it is unrolled whole.
#if defined(__clang__)
#define KVSPARSE_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define KVSPARSE_UNROLL _Pragma("GCC unroll 16")
#else
#define KVSPARSE_UNROLL
#endif

/// Leaves the loop that follows as it is: unrolled, its register tile would be spilled.
#if defined(__clang__)
#define KVSPARSE_NO_UNROLL _Pragma("clang loop unroll(disable) vectorize(disable)")
#elif defined(__GNUC__)
#define KVSPARSE_NO_UNROLL _Pragma("GCC unroll 1")
#else
#define KVSPARSE_NO_UNROLL
#endif

/// A kernel's inner tiles must be inlined into their loop, else their register tile goes through memory.
#if defined(__GNUC__)
#define KVSPARSE_INLINE inline __attribute__((always_inline))
#else
#define KVSPARSE_INLINE inline
#endif

/// Arithmetic that several callers must do to the bit alike exists once: two inlined copies may fuse different
/// products.
#if defined(__GNUC__)
#define KVSPARSE_NOINLINE __attribute__((noinline))
#else
#define KVSPARSE_NOINLINE
#endif

/// Zeroes the bytes of an object that belong to no member, where the compiler can: what was left there on some stack
/// belongs in no file.
#if defined(__has_builtin)
#if __has_builtin(__builtin_clear_padding)
#define KVSPARSE_CLEAR_PADDING(pointer) __builtin_clear_padding(pointer)
#endif
#endif
#ifndef KVSPARSE_CLEAR_PADDING
#define KVSPARSE_CLEAR_PADDING(pointer) static_cast<void>(pointer)
#endif

/// The AVX-512 subset that the 16-lane kernels need.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define KVSPARSE_AVX512 1
#else
#define KVSPARSE_AVX512 0
#endif

/// Defines has_member_NAME<T>: does class T have any member of that name, of whatever kind or signature? A name
/// inherited from two bases is ambiguous, so `&Both::NAME` is well-formed only when T lacks it. Policy checks use it to
/// tell "absent" from "present with the wrong signature" and to catch near-miss spellings.
// NOLINTBEGIN(bugprone-macro-parentheses): NAME is declared, not computed with.
#define KVSPARSE_DEFINE_HAS_MEMBER(NAME)                      \
  template <class T>                                          \
  struct HasMember_##NAME {                                   \
    struct Named {                                            \
      int NAME;                                               \
    };                                                        \
    struct Both : T, Named {};                                \
    static constexpr bool value = !requires { &Both::NAME; }; \
  };                                                          \
  template <class T>                                          \
  inline constexpr bool has_member_##NAME = HasMember_##NAME<T>::value;
// NOLINTEND(bugprone-macro-parentheses)

/// Defines has_trait_NAME<T, Value>: T has no such member, or it is a Value or a const function that returns one.
#define KVSPARSE_DEFINE_HAS_TRAIT(NAME)                                        \
  template <class T, class Value>                                              \
  inline constexpr bool has_trait_##NAME = !has_member_##NAME<T> || requires { \
    { T::NAME } -> std::convertible_to<Value>;                                 \
  }                                                                            \
  || requires(const T policy) {                                                \
    { policy.NAME() } -> std::convertible_to<Value>;                           \
  };
