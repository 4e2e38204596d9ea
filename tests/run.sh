#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that must hold before a change lands, from a fresh Debian or Ubuntu machine on:
#
#   tests/run.sh          all tests built with g++ for this processor; with clang the C++ tests under ASan and UBSan, those
#                         that start threads under TSan, those of the kernels for the plain processor; the same with g++
#                         for aarch64 under qemu; and the fuzzers for 30 seconds each
#   tests/run.sh --full   beside that: all tests built with clang; plain, AVX2, -O3 and scalar builds of the C++ tests, all
#                         of them for aarch64; -O0, -ffast-math and 32-bit builds of some; a short decode under valgrind;
#                         replay checked in full; the mutations
#
# Builds lie in build/<preset>/. Stops at the first failure.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() { printf 'tests/run.sh: %s\n' "$*" >&2; exit 1; }

full=no
case "${1:-}" in
  "") ;;
  --full) full=yes ;;
  *) die "unknown option $1; there is --full" ;;
esac

packages=(build-essential g++ clang clang-format-14 clang-tidy-14 cmake ninja-build libeigen3-dev libgtest-dev libbenchmark-dev nlohmann-json3-dev
  libcli11-dev libicu-dev libopenmpi-dev openmpi-bin pkgconf python3 python3-numpy python3-regex
  g++-aarch64-linux-gnu qemu-user googletest doxygen)
# Ubuntu has Chromium as a snap alone, which no container starts: there the page of replay --report is not opened.
grep -qsx 'ID=debian' /etc/os-release && packages+=(chromium chromium-driver python3-selenium)

. examples/common/debian_packages.sh

passed=()
launcher=()
command -v ccache >/dev/null && launcher=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache)

# build NAME [TARGET...]: quiet when all is well; warnings outside the tests are counted, in them they are errors.
build() {
  local name=$1 log=build/$1/build.log warnings
  shift
  cmake --build "build/$name" --parallel "$(nproc)" ${1:+--target "$@"} >"$log" 2>&1 || { cat "$log"; die "build/$name failed"; }
  warnings=$(grep -c ' warning: ' "$log" || true)
  [ "$warnings" -eq 0 ] || echo "$warnings warnings, in $log"
}

# check NAME PRESET [CMAKE OPTION...]: configures build/NAME, builds it, runs its tests.
# targets="T U" check ...: builds these and runs the tests that they are; tests="T V" beside it: runs those.
check() {
  local name=$1 preset=$2 started=$SECONDS targets=${targets:-} tests=${tests:-${targets:-}} summary
  shift 2
  printf '\n== %s\n' "$name"
  cmake --preset "$preset" -B "build/$name" -DKVSPARSE_TESTS_WERROR=ON "${launcher[@]}" "$@" >/dev/null
  # shellcheck disable=SC2086
  build "$name" $targets
  mkdir -p "build/$name/Testing"
  summary=build/$name/Testing/summary.txt
  ctest --test-dir "build/$name" --output-on-failure --no-tests=error --parallel "$(nproc)" ${tests:+-R "^(${tests// /|})\$"} |
    tee "$summary"
  passed+=("$name: $(grep 'tests passed' "$summary") ($((SECONDS - started)) s with the build)")
}

command -v dpkg-query >/dev/null ||
  die "this script knows Debian and Ubuntu only; elsewhere install what these packages hold: ${packages[*]}"
need_packages "${packages[@]}"
python=/usr/bin/python3  # the one that has Debian's numpy
[ -x "$python" ] || python=python3
tests_only=(-DKVSPARSE_BUILD_BENCH=OFF -DKVSPARSE_BUILD_EXAMPLES=OFF -DKVSPARSE_SOURCE_TESTS=OFF)

check dev dev
kernels="unit_test attend_test"
# What only clang's own optimised code and messages can show; its warnings in most other tests show under the sanitizers, those
# in the tools and in tests of every policy in --full alone.
targets="$kernels 03_decode_loop policy_hooks kvsparse_bench" \
  tests="$kernels policy_hooks codegen_test compile_fail_test style_test" check clang-kernels clang -DKVSPARSE_NATIVE=OFF
check asan-ubsan asan-ubsan "${tests_only[@]}"
targets=threads_test check tsan tsan "${tests_only[@]}"
targets=$kernels tests="$kernels codegen_test" check aarch64 aarch64
printf '\n== fuzzers\n'
tests/fuzz/run.sh 30
passed+=("fuzzers: 30 seconds each")

if [ "$full" = yes ]; then
  # Other processors and other optimisation: the kernels differ from one to the next.
  avx2="-O1 -g1 -mavx2 -mfma -mf16c"
  sanitize="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
  plain=("${tests_only[@]}" -DKVSPARSE_NATIVE=OFF)
  check clang clang
  check x86-64 dev "${plain[@]}"
  check avx2 dev "${plain[@]}" "-DCMAKE_CXX_FLAGS=$avx2"
  check avx2-asan asan-ubsan "${plain[@]}" "-DCMAKE_CXX_FLAGS=$avx2 $sanitize"
  check o3 dev "${tests_only[@]}" "-DCMAKE_CXX_FLAGS=-O3"
  check o3-release release "${plain[@]}"
  check aarch64 aarch64
  targets=$kernels check no-simd aarch64 "-DCMAKE_CXX_FLAGS=-O1 -g1 -march=armv8-a+nosimd"

  # Without optimisation; with arithmetic that takes NaN and infinity for impossible, so without the tests of these; and
  # with addresses of 32 bits.
  small="unit_test misuse_test no_exceptions_test"
  targets="$small attend_test pool_test sequence_test" check o0 dev "${plain[@]}" "-DCMAKE_CXX_FLAGS=-O0 -g1"
  targets="pool_test no_exceptions_test" check fast-math dev "${plain[@]}" "-DCMAKE_CXX_FLAGS=-O1 -g1 -ffast-math"
  # g++-multilib would bring the kernel's headers along, but Debian's excludes the cross compiler above.
  need_packages g++-12-multilib valgrind
  targets=$small check m32 dev "${plain[@]}" -DKVSPARSE_GTEST_SOURCES=/usr/src/googletest \
    "-DCMAKE_CXX_FLAGS=-O1 -g1 -m32 -msse2 -mfpmath=sse -idirafter /usr/include/x86_64-linux-gnu"
  # Knows no AVX-512.
  printf '\n== valgrind\n'
  valgrind --quiet --error-exitcode=1 --leak-check=full build/x86-64/tests/no_exceptions_test --gtest_brief=1 \
    --gtest_filter='-*DeathTest*'
  passed+=("valgrind: a short decode")

  printf '\n== replay in full\n'
  cmake --preset release -B build/release -DKVSPARSE_BUILD_TESTS=OFF "${launcher[@]}" >/dev/null
  build release replay
  "$python" tests/replay/check_replay.py build/release/bench/replay --dtypes f32,f16,bf16
  passed+=("replay: every case, in f32, f16 and bf16")
  printf '\n== mutations\n'
  "$python" tests/mutations.py
  passed+=("mutations: every one caught")
fi

printf '\n== passed\n'
printf '%s\n' "${passed[@]}"
