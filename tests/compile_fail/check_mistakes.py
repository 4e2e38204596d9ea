#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks that each mistake in a policy is answered with its sentence.

    check_mistakes.py COMPILER [FLAG...]

Compiles mistakes.cpp, once against the checks alone and once through the container as a user would, and assigns every
failed assertion in the output to the struct whose check it is. Fails if a struct does not get its sentence, gets another
one, or if a sentence of the contract is not tested. Then no_mistake.cpp must compile without a warning.
"""
import os
import pathlib
import re
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
INCLUDE = HERE.parent.parent / "include"


def compile(compiler, flags, source, extra=()):
    command = [compiler, *flags, "-std=c++20", "-fsyntax-only", f"-I{INCLUDE}", *extra, str(source)]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    return run.returncode, run.stderr


def expectations():
    """{struct: (sentence, may other errors follow)} in the order of the file."""
    found = {}
    text = (HERE / "mistakes.cpp").read_text()
    for sentence, more, name in re.findall(
        r"// EXPECT (.*?)( AND MORE)?\n(?:NEAR_MISS\(|struct )(\w+)", text
    ):
        found[name] = (sentence, bool(more))
    return found


def contract_sentences():
    """Every sentence that a static_assert of the contract can print."""
    sentences = []
    for header in ("contract_check.hpp", "compose.hpp"):
        text = (INCLUDE / "kvsparse" / "policy" / header).read_text()
        for literals in re.findall(r'((?:"(?:[^"\\]|\\.)*"\s*)+)\);', text):
            joined = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', literals)).replace('\\"', '"')
            if joined.startswith("kvsparse"):
                sentences.append(joined)
    return sentences


def printed(output):
    """{struct: [sentences]} from the compiler's output, g++'s or clang's."""
    found = {}
    current, pending = None, []
    for line in output.splitlines():
        inside = re.search(r"[Ii]n instantiation of .*mistakes::(\w+)", line)
        if inside:
            current = inside.group(1)
            for sentence in pending:  # clang names the struct after the error, g++ before it
                found.setdefault(current, []).append(sentence)
            pending = []
        failed = re.search(r"(static assertion failed|static_assert failed|static assertion failed due to).*?(kvsparse.*)", line)
        if failed and " error: " in line:
            sentence = failed.group(2)
            if "static assertion failed: kvsparse" in line:
                found.setdefault(current, []).append(sentence)
            else:
                pending.append(line[line.index('"kvsparse') + 1 :].rstrip('"').replace('\\"', '"'))
    return found


def main():
    compiler, flags = sys.argv[1], sys.argv[2:]
    unlimited = ["-ferror-limit=0"] if "clang" in compiler else ["-fmax-errors=0"]
    expected = expectations()
    problems = []

    in_compositions = {"NotAnEvictor", "SelectsToo", "NotASelector"}
    for how, macros in (("alone", []), ("in the container", ["-DIN_THE_CONTAINER"])):
        with tempfile.TemporaryDirectory() as directory:
            names = [name for name in expected if name not in in_compositions]
            pathlib.Path(directory, "mistakes.inc").write_text("".join(f"MISTAKE({name})\n" for name in names))
            code, output = compile(compiler, flags + unlimited + macros, HERE / "mistakes.cpp", [f"-I{directory}"])
        if code == 0:
            problems.append(f"{how}: mistakes.cpp compiles")
        sentences = printed(output)
        for name, (sentence, more) in expected.items():
            if macros and name in in_compositions:
                continue
            got = sentences.get(name, [])
            right = [s for s in got if s.split(": ", 1)[1].startswith(sentence)]
            if not right:
                problems.append(f"{how}: {name} does not print '{sentence}' but {got}")
            elif len(set(got)) > 1 and not more:
                problems.append(f"{how}: {name} prints more than its sentence: {got}")

    for sentence in contract_sentences():
        if not any(sentence.split(": ", 1)[1].startswith(start) for start, _ in expected.values()):
            problems.append(f"no mistake tests '{sentence}'")

    code, output = compile(compiler, [*flags, "-Wall", "-Wextra", "-Werror"], HERE / "no_mistake.cpp")
    if code != 0:
        problems.append("no_mistake.cpp does not compile:\n" + output)

    for problem in problems:
        print(problem)
    print(f"{len(expected)} mistakes, {len(contract_sentences())} sentences, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
