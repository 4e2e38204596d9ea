#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What the library costs to compile: the umbrella and one cache, beside Eigen/Core alone.

    compile_time.py [--compiler g++] [--compiler clang++] [--rounds 7] [--json FILE]

Times are processor time (user and system) of the compiler, medians of rounds in which the translation units take turns:
a rival on the machine lengthens that less than the time on the clock. Goal: 1.3 times Eigen/Core.
"""
import argparse
import json
import os
import pathlib
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile

INCLUDE = pathlib.Path(__file__).resolve().parent.parent / "include"
GOAL = 1.3

EIGEN = """#include <Eigen/Core>
float first(const Eigen::VectorXf& v) { return v[0]; }
"""
# The step of README's example, in a function that the compiler must emit.
KVSPARSE = """#include <kvsparse/kvsparse.hpp>
using Cache = kvsparse::PagedKvCache<kvsparse::Raas, Eigen::half>;
bool step(Cache& cache, std::span<const float> k, std::span<const float> v, std::span<const float> q,
          std::span<float> out) {
  return bool(cache.append(k, v)) && bool(kvsparse::attend(cache, q, out));
}
"""
# The middle one tells reading the headers from compiling the cache.
UNITS = {"Eigen/Core": EIGEN,
         "kvsparse.hpp, not used": '#include <kvsparse/kvsparse.hpp>\n',
         "kvsparse.hpp and one cache": KVSPARSE}


class InputError(Exception):
    """One sentence about what is wrong with an option."""


def eigen_flags():
    """Where Eigen lies, as CMake's target would say it."""
    for prefix in (os.environ.get("EIGEN3_INCLUDE_DIR"), "/usr/include/eigen3", "/usr/local/include/eigen3"):
        if prefix and (pathlib.Path(prefix) / "Eigen" / "Core").is_file():
            return ["-isystem", prefix]
    raise InputError("Eigen/Core was not found below /usr/include/eigen3; say where in EIGEN3_INCLUDE_DIR")


def compile_once(command, source, output):
    """(processor seconds, seconds on the clock) of one run of the compiler."""
    before = os.times()
    run = subprocess.run([*command, "-c", str(source), "-o", str(output)], capture_output=True, text=True)
    after = os.times()
    if run.returncode != 0:
        raise InputError(f"{source.name} does not compile with {command[0]}:\n{run.stderr}")
    processor = after.children_user - before.children_user + after.children_system - before.children_system
    return processor, after.elapsed - before.elapsed


def text_bytes(output):
    """Code and data of an object file, without its symbols."""
    run = subprocess.run(["size", str(output)], capture_output=True, text=True)
    return int(run.stdout.splitlines()[1].split()[3]) if run.returncode == 0 else None


def measure(compiler, flags, rounds):
    command = [compiler, *flags]
    with tempfile.TemporaryDirectory() as directory:
        sources = {}
        for i, (name, text) in enumerate(UNITS.items()):
            sources[name] = pathlib.Path(directory, f"unit{i}.cpp")
            sources[name].write_text(text)
        times = {name: [] for name in UNITS}
        sizes = {}
        for number in range(rounds + 1):
            for name, source in sources.items():
                output = source.with_suffix(".o")
                taken = compile_once(command, source, output)
                if number > 0:  # the first round reads the headers from the disk
                    times[name].append(taken)
                sizes[name] = (output.stat().st_size, text_bytes(output))
    units = []
    for name in UNITS:
        processor, clock = zip(*times[name])
        units.append({"unit": name, "processor_seconds": statistics.median(processor), "min": min(processor),
                      "max": max(processor), "clock_seconds": statistics.median(clock),
                      "object_bytes": sizes[name][0], "code_bytes": sizes[name][1]})
    eigen, whole = units[0]["processor_seconds"], units[-1]["processor_seconds"]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    return {"compiler": version, "flags": " ".join(flags), "units": units, "ratio": whole / eigen, "goal": GOAL}


def print_result(result):
    print(f"{result['compiler']}, {result['flags']}\n")
    print(f"{'translation unit':<28} {'processor s':>12} {'range':>13} {'clock s':>9} {'object KiB':>11} "
          f"{'code KiB':>9}")
    for unit in result["units"]:
        span = f"{unit['min']:.2f}-{unit['max']:.2f}"
        code = "" if unit["code_bytes"] is None else f"{unit['code_bytes'] / 1024:.1f}"
        print(f"{unit['unit']:<28} {unit['processor_seconds']:>12.2f} {span:>13} {unit['clock_seconds']:>9.2f} "
              f"{unit['object_bytes'] / 1024:>11.1f} {code:>9}")
    print(f"ratio {result['ratio']:.2f} (goal {GOAL})\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiler", action="append", help="may be repeated [g++ and clang++, where they are]")
    parser.add_argument("--flags", default="-O2", help="beside -std=c++20 [-O2]")
    parser.add_argument("--rounds", type=int, default=7, help="5 or more [7]")
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers to this file")
    options = parser.parse_args()
    try:
        if options.rounds < 5:
            raise InputError(f"--rounds is {options.rounds}, it must be at least 5")
        compilers = options.compiler or [name for name in ("g++", "clang++") if shutil.which(name)]
        missing = [name for name in compilers if not shutil.which(name)]
        if missing or not compilers:
            raise InputError(f"the compiler {(missing or ['g++'])[0]} was not found")
        flags = ["-std=c++20", *options.flags.split(), f"-I{INCLUDE}", *eigen_flags()]
        results = []
        for compiler in compilers:
            results.append(measure(compiler, flags, options.rounds))
            print_result(results[-1])
        if options.json:
            report = {"schema": 1, "tool": "compile_time", "command": shlex.join(sys.argv), "results": results}
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    except (InputError, OSError) as error:
        print(f"compile_time.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
