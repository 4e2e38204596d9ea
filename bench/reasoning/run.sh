#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Every number and picture of README's accuracy section, from the committed models on:
#
#   bench/reasoning/run.sh           128 problems a cell; about an hour on two cores
#   bench/reasoning/run.sh --quick   32 problems, the main policies; two minutes
#
# Writes bench/results/: CSV and JSON, pictures, tables.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

die() { printf 'bench/reasoning/run.sh: %s\n' "$*" >&2; exit 1; }

experiments=(full ideas)
[ ! -d bench/reasoning/models/long ] || experiments+=(long)
case "${1:-}" in
  "") ;;
  --quick) experiments=(quick) ;;
  *) die "unknown option $1; there is --quick" ;;
esac

. examples/common/debian_packages.sh
command -v dpkg-query >/dev/null || die "this script knows Debian and Ubuntu only; elsewhere build 'reasoning' and 'decode' with CMake"
need_packages build-essential g++ cmake ninja-build libeigen3-dev libbenchmark-dev nlohmann-json3-dev libcli11-dev libicu-dev \
  python3 python3-numpy python3-matplotlib

build=build/reasoning results=bench/results
cmake --preset release -B "$build" -DKVSPARSE_BUILD_TESTS=OFF >/dev/null
cmake --build "$build" --target reasoning decode
mkdir -p "$results"

models=(--model main=examples/model)
for directory in bench/reasoning/models/*/; do
  models+=(--model "$(basename "$directory")=${directory%/}")
done
csvs=()
for experiment in "${experiments[@]}"; do
  printf '\n== %s\n' "$experiment"
  "$build/bench/reasoning" --experiment "$experiment" "${models[@]}" \
    --csv "$results/$experiment.csv" --json "$results/$experiment.json" | tee "$results/$experiment.txt"
  csvs+=(--csv "$results/$experiment.csv")
done

printf '\n== pictures\n'
problem() { /usr/bin/python3 -c 'import json, sys; print(json.loads(open(sys.argv[1]).readline())["prompt"])' "$1"; }
prompt=$(problem examples/model/problems.jsonl)
"$build/examples/decode" --model examples/model --policy dense --max-new 576 --prompt "$prompt" \
  --record-trace "$results/trace" >/dev/null
"$build/examples/decode" --model examples/model --compare dense,streaming_llm,h2o,quest,raas,random --budget 256 \
  --page-size 4 --max-new 576 --prompt "$prompt" --json "$results/comparison.json" --resident "$results/resident" >/dev/null
plot=bench/plot.py
/usr/bin/python3 $plot pictures "${csvs[@]}" --output "$results"
/usr/bin/python3 $plot attention --trace "$results/trace" --problems examples/model/problems.jsonl --output "$results"
/usr/bin/python3 $plot waterfall --run "$results" --problems examples/model/problems.jsonl --output "$results"
/usr/bin/python3 $plot table "${csvs[@]}" >"$results/tables.md"
printf '\ntables      %s\npictures    %s\n' "$results/tables.md" "$results/*.png"
