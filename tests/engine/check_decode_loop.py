#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The minimal engine and the same over kvsparse: equal tokens while the budget holds all of them, a bound on memory
where it does not, and an integration as short as the page for engine developers says.

    check_decode_loop.py MINIMAL_ENGINE DECODE_LOOP EXAMPLES_DIRECTORY
"""
import pathlib
import re
import subprocess
import sys


def decode(program, *arguments):
    run = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=True)
    tokens, summary = run.stdout.splitlines()
    return tokens.split(), int(re.search(r"(\d+) KiB", summary).group(1))


def changed_lines(examples):
    """Of the command that the page gives: lines written and lines gone."""
    command = ["diff", str(examples / "minimal_engine.cpp"), str(examples / "03_decode_loop.cpp")]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return sum(line.startswith(">") for line in lines), sum(line.startswith("<") for line in lines)


def main():
    minimal_engine, decode_loop, examples = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
    dense_tokens, dense_kib = decode(minimal_engine, 200)
    tokens, kib = decode(decode_loop, 200, 1024)
    assert tokens == dense_tokens, f"{tokens} are not {dense_tokens}"
    assert kib < 0.6 * dense_kib, f"halves take {kib} KiB, floats {dense_kib}"
    assert len(set(tokens)) > 5, f"{tokens} would be right for an engine that says one thing only"

    # 4 layers of 2 kv heads, keys and values, 32 halves.
    for decoded in (200, 2000):
        _, kib = decode(decode_loop, decoded, 128)
        assert kib <= 1.05 * 4 * 2 * 2 * 128 * 32 * 2 / 1024, f"{kib} KiB after {decoded} tokens"

    written, gone = changed_lines(examples)
    assert written < 60, f"the integration takes {written} lines"
    page = (examples / "in_your_engine.md").read_text()
    stated = f"{written} lines had to be written, and {gone} went"
    assert stated in page, f"in_your_engine.md should say: {stated}"
    print(f"equal tokens; {written} lines written, {gone} gone")


if __name__ == "__main__":
    main()
