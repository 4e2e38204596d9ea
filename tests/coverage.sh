#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Lines and branches of include/ that the C++ tests run, file by file; which they are is in build/coverage/report.html.
#
#   tests/coverage.sh                       all tests
#   tests/coverage.sh unit_test pool_test   these alone
#
# Needs what tests/run.sh installs, and Debian's gcovr. KVSPARSE_COVERAGE_JOBS: how many compilers at a time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() { printf 'tests/coverage.sh: %s\n' "$*" >&2; exit 1; }
command -v gcovr >/dev/null || die "there is no gcovr; apt-get install gcovr"

build=build/coverage
# Not optimised, so that every line is itself; counted atomically, because tests start threads. allocation_test counts
# allocations, and gcov allocates.
cmake --preset dev -B "$build" "-DCMAKE_CXX_FLAGS=-O0 -g1 --coverage -fprofile-update=atomic" -DKVSPARSE_BUILD_BENCH=OFF \
  -DKVSPARSE_BUILD_EXAMPLES=OFF -DKVSPARSE_SOURCE_TESTS=OFF >/dev/null
cmake --build "$build" --parallel "${KVSPARSE_COVERAGE_JOBS:-$(nproc)}" ${1:+--target "$@"}
find "$build" -name '*.gcda' -delete
chosen=(-E '^allocation_test$')
[ $# -eq 0 ] || chosen=(-R "^($(IFS='|' && echo "$*"))\$")
ctest --test-dir "$build" --output-on-failure --no-tests=error "${chosen[@]}"
# What only an exception in flight takes, the compiler added. A line of a template counts once, with all that any of its
# instances ran.
gcovr --root . --object-directory "$build" --filter 'include/kvsparse/.*' --exclude-throw-branches \
  --exclude-unreachable-branches --html-details "$build/report.html" --txt --print-summary
