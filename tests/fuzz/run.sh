#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Fuzzes what reads files that anybody may have written, under ASan and UBSan:
#
#   tests/fuzz/run.sh                      30 seconds each
#   tests/fuzz/run.sh 3600                 an hour each
#   tests/fuzz/run.sh 600 tokenizer trace  these alone, ten minutes each
#
# Seeds lie in tests/fuzz/corpus/; what is found beside is kept in build/fuzz/corpus/, so that
# the next run goes on from there. Stops at the first failure, whose input it names.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

die() { printf 'tests/fuzz/run.sh: %s\n' "$*" >&2; exit 1; }

seconds=${1:-30}
[[ $seconds =~ ^[0-9]+$ ]] || die "the first argument is a number of seconds, not $seconds"
shift || true
all=(safetensors trace config tokenizer)
fuzzers=("${@:-${all[@]}}")
[ $# -gt 0 ] || fuzzers=("${all[@]}")

launcher=()
command -v ccache >/dev/null && launcher=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache)
cmake --preset fuzz "${launcher[@]}" >/dev/null
cmake --build --preset fuzz ${KVSPARSE_FUZZ_JOBS:+--parallel "$KVSPARSE_FUZZ_JOBS"}
bin=build/fuzz/tests

for fuzzer in "${fuzzers[@]}"; do
  [ -x "$bin/fuzz_$fuzzer" ] || die "there is no fuzzer $fuzzer; there are: ${all[*]}"
  found=build/fuzz/corpus/$fuzzer
  log=build/fuzz/$fuzzer.log
  mkdir -p "$found" build/fuzz/failures
  corpora=("$found")
  # A trace is a safetensors file.
  committed=tests/fuzz/corpus/${fuzzer/trace/safetensors}
  [ -d "$committed" ] && corpora+=("$committed")
  "$bin/fuzz_$fuzzer" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=2048 -malloc_limit_mb=256 -max_len=8192 \
    -print_final_stats=1 -verbosity=1 -artifact_prefix="build/fuzz/failures/$fuzzer-" "${corpora[@]}" 2>"$log" ||
    { tail -40 "$log" >&2; die "$fuzzer failed; its input lies in build/fuzz/failures/, its words in $log"; }
  awk -v name="$fuzzer" '/stat::number_of_executed_units/ { runs = $2 } / cov: / { for (i = 1; i < NF; ++i) if ($i == "cov:") cov = $(i + 1) }
    END { printf "%s: %d inputs, %d edges of code, no failure\n", name, runs, cov }' "$log"
done
