#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks that replay, on a trace that decode recorded, decides as decode did: same tokens resident, same tokens read.

    check_decisions.py path/to/decode path/to/replay path/to/model

The model decodes a problem with each policy, recording traces and residency; then each layer's trace is replayed with
the same policy and budget and dumped. Both tables must agree bit for bit, for every answer token, kv head and position.
"""
import json
import pathlib
import struct
import subprocess
import sys
import tempfile

# policy, budget, page size, storage type, options
CASES = [
    ("raas", 160, 4, "f32", []),
    ("raas", 160, 4, "f16", ["evidence=quest_bound", "used=rank"]),
    ("h2o", 64, 4, "f32", []),  # evicts inside the prompt
    ("streaming_llm", 64, 7, "bf16", ["sinks=9"]),
    ("quest", 64, 8, "f32", []),
    ("random", 160, 4, "f32", ["seed=3"]),  # each layer draws its own numbers
    ("raas+quest", 160, 4, "f32", ["read_budget=32"]),
    ("raas", 160, 1, "bf16", ["preset=paper_v1"]),
    ("raas", 112, 16, "f32", ["pin_prompt=false"]),
    ("kindred", 160, 4, "f32", []),
    ("ada_kv", 160, 4, "f32", ["window=8"]),
    ("snap_kv", 96, 4, "f32", ["window=8", "period=16"]),
    ("h2o", 160, 1, "f16", ["pin_prompt=true"]),
    ("h2o+quest", 64, 4, "f32", ["read_budget=24"]),
    ("streaming_llm+quest", 64, 3, "f32", ["read_budget=24", "pool=query_head"]),
    ("random+quest", 160, 4, "f16", ["read_budget=32"]),
    ("dense", 96, 16, "f32", []),
]


def read_safetensors(path):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + length + at for at in entry["data_offsets"])
        tensors[name] = (entry["dtype"], entry["shape"], raw[begin:end])
    return tensors, metadata


def run(command):
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if result.returncode != 0:
        words = [str(word) if len(str(word)) < 100 else "..." for word in command]
        sys.exit(f"{' '.join(words)}\nexited with {result.returncode}: {result.stderr}")


def check(decode, replay, model, prompt, case, directory):
    policy, budget, page_size, dtype, options = case
    chosen = ["--policy", policy, "--budget", budget, "--page-size", page_size, "--dtype", dtype]
    for option in options:
        chosen += ["--set", option]
    run([decode, "--model", model, "--prompt", prompt, "--max-new", 160, *chosen, "--record-trace", directory / "trace",
         "--resident", directory / "resident"])
    layers = sorted((directory / "trace").glob("layer_*.safetensors"))
    if not layers:
        sys.exit("decode wrote no trace")
    evicted = skipped = 0
    for layer in layers:
        dump = directory / f"dump_{layer.name}"
        run([replay, "--trace", layer, *chosen, "--dump", dump])
        replayed, _ = read_safetensors(dump)
        decoded, _ = read_safetensors(directory / "resident" / layer.name)
        for name in ("resident", "read"):
            if decoded[name][:2] != replayed[name][:2]:
                return f"{name} of {layer.stem}: shapes {decoded[name][:2]} and {replayed[name][:2]}", 0, 0
            if decoded[name][2] != replayed[name][2]:
                return f"{name} of {layer.stem} differs: {first_difference(decoded[name], replayed[name])}", 0, 0
        tokens = decoded["resident"][1][2]
        last = decoded["resident"][2][-tokens:]
        evicted += tokens - sum(last)
        skipped += sum(decoded["resident"][2]) - sum(decoded["read"][2])
    return None, evicted, skipped


def first_difference(decoded, replayed):
    _, (_, kv_heads, tokens), ours = decoded
    at = next(i for i, (a, b) in enumerate(zip(ours, replayed[2])) if a != b)
    return f"answer token {at // (kv_heads * tokens)}, kv head {at // tokens % kv_heads}, position {at % tokens}"


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    decode, replay, model = map(pathlib.Path, sys.argv[1:4])
    problems = (model / "problems.jsonl").read_text().splitlines()
    prompt = max((json.loads(line)["prompt"] for line in problems), key=len)
    failures = 0
    for case in CASES:
        with tempfile.TemporaryDirectory() as directory:
            problem, evicted, skipped = check(decode, replay, model, prompt, case, pathlib.Path(directory))
        if problem is None and "quest" in case[0] and skipped == 0:
            problem = "nothing was skipped: the case tests nothing"
        if problem is None and case[0] not in ("quest", "dense") and evicted == 0:
            problem = "nothing was evicted: the case tests nothing"
        failures += problem is not None
        print(f"{'FAILED' if problem else 'ok':6} {case}: {problem or f'{evicted} evicted at the end, {skipped} skipped'}")
    print("all decisions agree" if not failures else f"{failures} cases failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
