// SPDX-License-Identifier: Apache-2.0
// The version is written here and nowhere else: CMake reads these three lines.
#pragma once

/// Raised by a change that breaks users; while it is 0, such a change raises MINOR.
#define KVSPARSE_VERSION_MAJOR 0
/// Raised by an addition.
#define KVSPARSE_VERSION_MINOR 1
/// Raised by a mend.
#define KVSPARSE_VERSION_PATCH 0
