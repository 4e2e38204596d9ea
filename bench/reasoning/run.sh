#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Every number and picture of README's accuracy section, from the committed models on:
#
#   bench/reasoning/run.sh           128 problems a cell; about an hour on two cores
#   bench/reasoning/run.sh --quick   32 problems, the main policies; two minutes
#   bench/reasoning/run.sh --redraw  pictures and tables again, from the CSV files of the last run
#
# Writes bench/results/: CSV and JSON, pictures, tables.md, and readme.md with the tables of the two READMEs. The
# pictures that these show are copies in bench/pictures/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

die() { printf 'bench/reasoning/run.sh: %s\n' "$*" >&2; exit 1; }

experiments=(full ideas)
[ ! -d bench/reasoning/models/long ] || experiments+=(long)
redraw=false
case "${1:-}" in
  "") ;;
  --quick) experiments=(quick) ;;
  --redraw) redraw=true ;;
  *) die "unknown option $1; there are --quick and --redraw" ;;
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
  if $redraw; then
    [ -f "$results/$experiment.csv" ] || die "there is no $results/$experiment.csv to draw from; run without --redraw first"
  else
    printf '\n== %s\n' "$experiment"
    "$build/bench/reasoning" --experiment "$experiment" "${models[@]}" \
      --csv "$results/$experiment.csv" --json "$results/$experiment.json" | tee "$results/$experiment.txt"
  fi
  csvs+=(--csv "$results/$experiment.csv")
done

printf '\n== pictures\n'
problem() { /usr/bin/python3 -c 'import json, sys; print(json.loads(open(sys.argv[1]).readline())["prompt"])' "$1"; }
prompt=$(problem examples/model/problems.jsonl)
"$build/examples/decode" --model examples/model --policy dense --max-new 576 --prompt "$prompt" \
  --record-trace "$results/trace" >/dev/null
"$build/examples/decode" --model examples/model --compare dense,streaming_llm,h2o,random,quest,raas,kindred --budget 256 \
  --page-size 4 --max-new 576 --prompt "$prompt" --json "$results/comparison.json" --resident "$results/resident" >/dev/null
plot() { /usr/bin/python3 bench/plot.py "$@"; }
plot pictures "${csvs[@]}" --output "$results"
plot attention --trace "$results/trace" --problems examples/model/problems.jsonl --output "$results"
plot waterfall --run "$results" --problems examples/model/problems.jsonl --output "$results"
plot table "${csvs[@]}" >"$results/tables.md"

bound=raas:evidence=quest_bound:alpha=0.01
compared=dense,raas,kindred,$bound,h2o:pin_prompt=true,h2o,streaming_llm:pin_prompt=true,streaming_llm,random,quest
long_silence=quest,raas,kindred,segmented_lru,late_use,recurrence,value_weighted,sharpest_token,decayed_mass,late_mass,odd_key
beside() { plot beside "${csvs[@]}" "$@"; }
{
  beside --policies "$compared"
  beside --policies "$compared,raas:preset=paper_v2,raas:alpha=0.2" --model plain
  if [ "${1:-}" != --quick ]; then
    beside --policies "$compared,oracle" --sets mile,lru,age,uniform --budgets 256,384
    beside --policies raas,h2o:pin_prompt=true,h2o --page-size 1
    for model in main_seed2 main_seed3; do beside --policies "$compared" --model $model; done
    beside --policies "$compared" --model varied --metric tokens
    beside --policies "$long_silence,h2o:pin_prompt=true,random" --sets mile,fall,lru,age,uniform --budgets 256,384
    beside --policies "$compared" --model long --budgets 104,212,424,848
  fi
} >"$results/readme.md"
printf '\ntables      %s, %s\npictures    %s\n' "$results/readme.md" "$results/tables.md" "$results/*.png"
