// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace kvsparse_test {

/// Whether the compiler can clear the bytes between a state's members, so that equal states are equal bytes. Elsewhere
/// these are whatever the stack held.
#if defined(__has_builtin)
#if __has_builtin(__builtin_clear_padding)
#define KVSPARSE_TEST_PADDING_IS_CLEARED true
#endif
#endif
#ifndef KVSPARSE_TEST_PADDING_IS_CLEARED
#define KVSPARSE_TEST_PADDING_IS_CLEARED false
#endif
inline constexpr bool padding_is_cleared = KVSPARSE_TEST_PADDING_IS_CLEARED;

}  // namespace kvsparse_test
