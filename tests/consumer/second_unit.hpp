// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

/// What the cache of decode_loop.cpp takes, as the other translation unit counts it.
std::size_t bytes_in_second_unit();
