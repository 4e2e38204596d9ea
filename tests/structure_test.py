#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks the house: floors, lengths, licences, the top level, presets, and that every header stands on its own.

    structure_test.py COMPILER [FLAG...]
"""
import concurrent.futures
import json
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "include" / "kvsparse"

# A header includes from its own floor and from lower ones. Headers beside the directories have floors of their own.
FLOORS = {"config.hpp": 0, "version.hpp": 0, "core": 1, "memory": 2, "policy": 3, "attention": 4, "cache": 5,
          "interop": 6, "testing": 7, "kvsparse.hpp": 8}
# Stricter than its floor: the kernel is for engines that have neither our cache nor our policies.
ATTENTION_SEES = {"config.hpp", "core", "attention"}

TOP_LEVEL = {"include", "tests", "bench", "examples", "CMakeLists.txt", "CMakePresets.json", "README.md", "LICENSE"}
# What a policy is built from; every other header of policy/ is a policy, or two joined.
POLICY_CONTRACT = {"policy.hpp", "contract_check.hpp", "head_view.hpp", "selection.hpp", "evidence.hpp", "options.hpp",
                   "name_table.hpp", "mass_bounds.hpp", "state.hpp"}
LONGEST_HEADER, LONGEST_POLICY = 430, 150
SPDX = "SPDX-License-Identifier: Apache-2.0"
WARNINGS = ["-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-pedantic", "-Werror"]


def repository_files():
    """Tracked files and new ones, not what .gitignore names; without git everything but build/."""
    listing = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                             capture_output=True, text=True)
    if listing.returncode == 0:
        names = listing.stdout.splitlines()
    else:
        names = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]
        names = [name for name in names if not name.startswith(("build/", ".git/"))]
    return [name for name in sorted(set(names)) if (ROOT / name).is_file()]


def headers():
    return sorted(LIBRARY.rglob("*.hpp"))


def room(path):
    """The directory of a header below include/kvsparse/, or its name when it lies there itself."""
    return path.relative_to(LIBRARY).parts[0]


def check_floors():
    for header in headers():
        if room(header) not in FLOORS:
            yield f"{header.relative_to(ROOT)}: no floor is known for {room(header)}"
            continue
        for line in header.read_text().splitlines():
            include = re.match(r'\s*#\s*include\s+"([^"]+)"', line)
            if re.match(r"\s*#\s*include\s+<kvsparse/", line):
                yield f"{header.relative_to(ROOT)}: includes its own library in angle brackets"
            if not include:
                continue
            target = (header.parent / include.group(1)).resolve()
            if not target.is_file() or LIBRARY not in target.parents:
                yield f"{header.relative_to(ROOT)}: {include.group(1)} is no header of the library"
            elif FLOORS.get(room(target), 99) > FLOORS[room(header)]:
                yield f"{header.relative_to(ROOT)} (floor {FLOORS[room(header)]}) includes upwards: {include.group(1)}"
            elif room(header) == "attention" and room(target) not in ATTENTION_SEES:
                yield f"{header.relative_to(ROOT)}: attention must not know of {include.group(1)}"


def check_eigen():
    for header in headers():
        if "#include <Eigen" in header.read_text() and header.relative_to(LIBRARY).as_posix() != "core/scalar.hpp":
            yield f"{header.relative_to(ROOT)}: Eigen is included by core/scalar.hpp alone"


def check_lengths():
    for header in headers():
        length = len(header.read_text().splitlines())
        is_policy = room(header) == "policy" and header.name not in POLICY_CONTRACT
        limit = LONGEST_POLICY if is_policy else LONGEST_HEADER
        if length > limit:
            yield f"{header.relative_to(ROOT)} has {length} lines; the limit is {limit}"


def check_licences(files):
    sources = (".hpp", ".cpp", ".h", ".c", ".cc", ".py", ".sh", ".cmake", ".yml", ".yaml")
    for name in files:
        path = ROOT / name
        if path.suffix not in sources and path.name not in ("CMakeLists.txt", "run"):
            continue
        lines = path.read_text(errors="replace").splitlines()
        if lines and lines[0].startswith("#!"):
            lines = lines[1:]
        if not lines or SPDX not in lines[0]:
            yield f"{name}: the first line (after #!) is not the SPDX line"


def check_top_level(files):
    for name in sorted({name.split("/")[0] for name in files}):
        if name not in TOP_LEVEL and not name.startswith("."):
            yield f"{name} does not belong into the top level"


def check_macros():
    """Macros of the library live in config.hpp and version.hpp, and start with KVSPARSE_."""
    for header in headers():
        for name in re.findall(r"^\s*#\s*define\s+(\w+)", header.read_text(), re.MULTILINE):
            if header.name not in ("config.hpp", "version.hpp"):
                yield f"{header.relative_to(ROOT)} defines the macro {name}"
            elif not name.startswith("KVSPARSE_"):
                yield f"{header.relative_to(ROOT)}: the macro {name} does not start with KVSPARSE_"


def check_presets():
    """What an IDE offers: each way to configure says what it is, and can be built."""
    presets = json.loads((ROOT / "CMakePresets.json").read_text())
    built = {preset["configurePreset"] for preset in presets["buildPresets"]}
    for preset in presets["configurePresets"]:
        if preset.get("hidden"):
            continue
        for key in ("displayName", "description"):
            if not preset.get(key):
                yield f"CMakePresets.json: the configure preset {preset['name']} has no {key}"
        if preset["name"] not in built:
            yield f"CMakePresets.json: no build preset is for {preset['name']}"


def compile_alone(compiler, flags, header):
    """Twice in a row, so that a missing #pragma once shows as well."""
    name = header.relative_to(LIBRARY.parent).as_posix()
    text = f'#include "{name}"\n#include "{name}"\nint main() {{}}\n'
    command = [compiler, *flags, "-std=c++20", *WARNINGS, "-fsyntax-only", f"-I{LIBRARY.parent}", "-x", "c++", "-"]
    run = subprocess.run(command, input=text, capture_output=True, text=True)
    if run.returncode != 0:
        yield f"{name} does not compile alone:\n{run.stderr}"


def main():
    compiler, flags = sys.argv[1], sys.argv[2:]
    files = repository_files()
    problems = [*check_floors(), *check_eigen(), *check_lengths(), *check_licences(files), *check_top_level(files),
                *check_macros(), *check_presets()]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for found in pool.map(lambda header: list(compile_alone(compiler, flags, header)), headers()):
            problems += found
    for problem in problems:
        print(problem)
    print(f"{len(headers())} headers, {len(files)} files, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
