#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Fuzzes what reads bytes that anybody may have written, and sequences of verbs, under ASan and UBSan:
#
#   tests/fuzz/run.sh                      30 seconds each
#   tests/fuzz/run.sh 3600                 an hour each
#   tests/fuzz/run.sh 600 tokenizer verbs  these alone, ten minutes each
#
# As many at a time as there are processors. Seeds lie in tests/fuzz/corpus/, or are made by make_seeds where they depend
# on the library's version; what is found beside is kept in build/fuzz/corpus/, so that the next run goes on from there.
# A failure's input is named.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

die() { printf 'tests/fuzz/run.sh: %s\n' "$*" >&2; exit 1; }

seconds=${1:-30}
[[ $seconds =~ ^[0-9]+$ ]] || die "the first argument is a number of seconds, not $seconds"
shift || true
all=(safetensors trace config tokenizer snapshot verbs)
fuzzers=("$@")
[ $# -gt 0 ] || fuzzers=("${all[@]}")
jobs=${KVSPARSE_FUZZ_JOBS:-$(nproc)}

launcher=()
command -v ccache >/dev/null && launcher=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache)
cmake --preset fuzz "${launcher[@]}" >/dev/null
cmake --build --preset fuzz --parallel "$jobs"
bin=build/fuzz/tests
seeds=build/fuzz/seeds
"$bin/make_seeds" "$seeds"
for fuzzer in "${fuzzers[@]}"; do
  [ -x "$bin/fuzz_$fuzzer" ] || die "there is no fuzzer $fuzzer; there are: ${all[*]}"
done

run_one() {
  local fuzzer=$1 found=build/fuzz/corpus/$1 log=build/fuzz/$1.log
  mkdir -p "$found" "$seeds/$fuzzer" build/fuzz/failures
  local corpora=("$found" "$seeds/$fuzzer")
  # A trace is a safetensors file.
  local committed=tests/fuzz/corpus/${fuzzer/trace/safetensors}
  [ -d "$committed" ] && corpora+=("$committed")
  "$bin/fuzz_$fuzzer" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=2048 -malloc_limit_mb=256 -max_len=8192 \
    -print_final_stats=1 -verbosity=1 -artifact_prefix="build/fuzz/failures/$fuzzer-" "${corpora[@]}" 2>"$log" ||
    { tail -40 "$log" >&2; die "$fuzzer failed; its input lies in build/fuzz/failures/, its words in $log"; }
  awk -v name="$fuzzer" '/stat::number_of_executed_units/ { runs = $2 } / cov: / { for (i = 1; i < NF; ++i) if ($i == "cov:") cov = $(i + 1) }
    END { printf "%s: %d inputs, %d edges of code, no failure\n", name, runs, cov }' "$log"
}

failed=0
for fuzzer in "${fuzzers[@]}"; do
  while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n || failed=1; done
  run_one "$fuzzer" &
done
while [ -n "$(jobs -p)" ]; do wait -n || { [ $? -eq 127 ] && break; failed=1; }; done
exit "$failed"
