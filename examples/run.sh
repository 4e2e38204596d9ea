#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From a fresh Debian or Ubuntu machine to a comparison of sparsity policies on a real trained model, and a picture of it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\n== %s\n' "$*"; }
die() { printf 'run.sh: %s\n' "$*" >&2; exit 1; }

. examples/common/debian_packages.sh

say "Checking what the build needs"
command -v dpkg-query >/dev/null || die "this script knows Debian and Ubuntu only; elsewhere, build the target 'decode' with CMake"
need_packages g++ cmake ninja-build libeigen3-dev nlohmann-json3-dev libcli11-dev libicu-dev python3 python3-matplotlib
compiler=g++
if [ "$(g++ -dumpversion | cut -d. -f1)" -lt 12 ]; then
  need_packages g++-12  # the library is tested from g++ 12 on; Ubuntu 22.04's default is older
  compiler=g++-12
fi
echo "all there ($("$compiler" --version | head -n 1))"

say "Building examples/decode"
# Its own build directory: the tests and benchmarks, which the release preset would also configure, need more packages.
cmake --preset release -B build/examples -DCMAKE_CXX_COMPILER="$compiler" \
  -DKVSPARSE_BUILD_TESTS=OFF -DKVSPARSE_BUILD_BENCH=OFF >/dev/null
cmake --build build/examples --target decode

/usr/bin/python3 examples/compare_policies.py build/examples/examples/decode examples/model examples/output
/usr/bin/python3 examples/plot_waterfall.py examples/output --layer 1 --head 0 --problems examples/model/problems.jsonl

say "Where to go on"
cat <<TEXT
picture     $PWD/examples/output/waterfall.png
numbers     $PWD/examples/output/comparison.json
try it      build/examples/examples/decode --help
TEXT
