#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The timing benches, each compared within one process, from a fresh Debian or Ubuntu machine on:
#
#   bench/run.sh           the quick suite; under ten minutes on two cores
#   bench/run.sh --curve   the decode curve to a million tokens beside it; about half an hour
#
# Writes bench/results/: JSON, CSV, pictures, speed.md. Other programs on the machine disturb the figures: roofline and
# decode_curve notice and measure again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() { printf 'bench/run.sh: %s\n' "$*" >&2; exit 1; }

curve_tokens=(--tokens 32768 --dense-tokens 32768 --turns 2)
case "${1:-}" in
  "") ;;
  --curve) curve_tokens=() ;;
  *) die "unknown option $1; there is --curve" ;;
esac

. examples/common/debian_packages.sh
command -v dpkg-query >/dev/null || die "this script knows Debian and Ubuntu only; elsewhere build the benches with CMake"
need_packages build-essential g++ cmake ninja-build libeigen3-dev libbenchmark-dev nlohmann-json3-dev libcli11-dev libicu-dev \
  python3 python3-numpy python3-matplotlib

build=build/bench results=bench/results
cmake --preset release -B "$build" -DKVSPARSE_BUILD_TESTS=OFF >/dev/null
cmake --build "$build" --target roofline kvsparse_bench decode_curve
mkdir -p "$results"

printf '\n== roofline\n'
"$build/bench/roofline" --tokens 1024,65536 --json "$results/roofline.json"

printf '\n== decode steps, selection, append, prefill\n'
usual='/(dense|streaming_llm|h2o|raas|kindred|random|quest)/f16/N:[0-9]+/L:1024/group:4/head_dim:128'
"$build/bench/kvsparse_bench" --benchmark_filter="(decode_step|select|append)$usual|prefill|bandwidth" \
  --benchmark_min_time=0.1 --benchmark_repetitions=3 --benchmark_enable_random_interleaving=true \
  --benchmark_report_aggregates_only=true --benchmark_out="$results/micro.json" --benchmark_out_format=json

printf '\n== decode curve\n'
"$build/bench/decode_curve" "${curve_tokens[@]}" --csv "$results/decode_curve.csv" --json "$results/decode_curve.json"

printf '\n== compile time\n'
/usr/bin/python3 bench/compile_time.py --rounds 5 --json "$results/compile_time.json"

printf '\n== tables and pictures\n'
/usr/bin/python3 bench/plot.py curve --csv "$results/decode_curve.csv" --output "$results"
/usr/bin/python3 bench/plot.py speed --roofline "$results/roofline.json" --micro "$results/micro.json" \
  --curve "$results/decode_curve.json" --compile "$results/compile_time.json" | tee "$results/speed.md"
