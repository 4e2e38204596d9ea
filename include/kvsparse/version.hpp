// SPDX-License-Identifier: Apache-2.0
// The version is written here and nowhere else: CMake reads these three lines.
#pragma once

#define KVSPARSE_VERSION_MAJOR 0
#define KVSPARSE_VERSION_MINOR 1
#define KVSPARSE_VERSION_PATCH 0
