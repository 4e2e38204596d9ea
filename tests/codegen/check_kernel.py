#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks, without timing anything, that the compiler made of the decode kernel what makes it fast.

    check_kernel.py COMPILER [FLAG...]

Compiles kernel.cpp, which holds only the kernel, to assembly for AVX-512 and for AVX2, or for NEON if that is what the
compiler is for, and looks at all of it, whatever was inlined where: stored values are widened a whole vector at a time,
products are added by packed multiply-adds, and no scalar conversion or multiply-add is left. A naive dot product, in the
same file, must not pass.
"""
import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
INCLUDE = HERE.parent.parent / "include"
SKIPPED = 77

STORAGE_TYPES = ("float", "kvsparse::Half", "kvsparse::Bfloat16", "kvsparse::Int8")
SCALAR_CALLS = re.compile(r"__extendhfsf2|__gnu_h2f_ieee|__truncsfbf2|half_to_float|bfloat16_to_float")


def run(command):
    return subprocess.run(command, capture_output=True, text=True)


def instructions(compiler, flags, target, stored, macros=()):
    """[(mnemonic, operands)] of the whole translation unit."""
    command = [compiler, *flags, "-std=c++20", "-O3", "-DNDEBUG", f"-march={target}", "-fno-verbose-asm",
               f"-DSTORED={stored}", *macros, f"-I{INCLUDE}", "-S", "-o", "-", str(HERE / "kernel.cpp")]
    done = run(command)
    if done.returncode != 0:
        raise SystemExit(f"kernel.cpp does not compile for {target}:\n{done.stderr}")
    found = []
    for line in done.stdout.splitlines():
        # No directive (.text), label or comment; clang explains multiply-adds behind a #.
        match = re.match(r"\s+([a-z]\w*)\s*([^#]*)", line)
        if match:
            found.append((match.group(1), match.group(2).strip()))
    return found


def calls_of(code):
    for name, operands in code:
        if name.startswith(("call", "jmp", "bl", "b")) and SCALAR_CALLS.search(operands):
            yield f"a call for every value: {name} {operands}"


class X86:
    """AT&T syntax: the destination comes last. The vectors that the kernel has to work in, for each target."""
    targets = {"x86-64-v4": "zmm", "x86-64-v3": "ymm"}
    # What widens the storage type, and whether a whole vector at once: g++ 12 widens bf16 in halves.
    widening = {"float": (None, False), "kvsparse::Half": ("vcvtph2ps", True),
                "kvsparse::Bfloat16": ("vpmovzxwd", False), "kvsparse::Int8": ("vpmovsxbd", True)}

    @staticmethod
    def destination(operands):
        register = re.search(r"%([xyz]mm)\d+(?:\s*\{[^}]*\})*$", operands)
        return register.group(1) if register else ""

    @classmethod
    def problems_of(cls, code, target, stored):
        vector = cls.targets[target]
        widening, whole = cls.widening[stored]
        packed = [operands for name, operands in code if re.fullmatch(r"vfn?m(add|sub)\d+ps", name)]
        if not any(cls.destination(operands) == vector for operands in packed):
            yield f"no packed multiply-add in {vector} registers"
        scalar = [name for name, _ in code if re.fullmatch(r"vfn?m(add|sub)\d+ss", name)]
        if scalar:
            yield f"{len(scalar)} scalar multiply-adds ({scalar[0]})"
        if widening:
            widened = [cls.destination(operands) for name, operands in code if name == widening]
            if not widened or (whole and vector not in widened):
                yield f"no {widening}" + (f" into {vector} registers" if whole else "")
        # An xmm destination holds four floats at most; that is what the conversion of a single value compiles to.
        single = [operands for name, operands in code if name == "vcvtph2ps" and cls.destination(operands) == "xmm"]
        if single:
            yield f"{len(single)} conversions of single values (vcvtph2ps {single[0]})"


class Aarch64:
    """The destination comes first; v0.4s is a vector of four floats, s0 a single one."""
    targets = {"armv8-a": "v.4s"}
    widening = {"float": None, "kvsparse::Half": "fcvtl", "kvsparse::Bfloat16": "u?shll", "kvsparse::Int8": "scvtf"}

    @classmethod
    def problems_of(cls, code, target, stored):
        def into(pattern, register):
            return [f"{name} {operands}" for name, operands in code
                    if re.fullmatch(pattern, name) and re.match(register, operands)]
        whole = r"v\d+\.4s"
        if not into("fmla", whole):
            yield "no packed multiply-add"
        scalar = into("fn?m(add|sub)", r"s\d+")
        if scalar:
            yield f"{len(scalar)} scalar multiply-adds ({scalar[0]})"
        widening = cls.widening[stored]
        if widening and not into(widening, whole):
            yield f"no {widening} of four values"
        single = into("fcvt", r"s\d+, *h") + into("scvtf", r"s\d+, *w") + into("ldrsb", "[wx]")
        if single:
            yield f"{len(single)} conversions of single values ({single[0]})"


MACHINES = {"x86_64": X86, "aarch64": Aarch64}


def main():
    compiler, flags = sys.argv[1], sys.argv[2:]
    machine = run([compiler, "-dumpmachine"]).stdout.strip()
    expected = MACHINES.get(machine.split("-")[0])
    if expected is None:
        print(f"skipped: {compiler} compiles for {machine}; there are expectations for {', '.join(MACHINES)}")
        return SKIPPED
    cases = [(target, stored, ()) for target in expected.targets for stored in STORAGE_TYPES]
    cases += [(target, "kvsparse::Half", ("-DNAIVE",)) for target in expected.targets]
    problems = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        codes = pool.map(lambda case: instructions(compiler, flags, *case), cases)
        for (target, stored, naive), code in zip(cases, codes):
            found = [*expected.problems_of(code, target, stored), *calls_of(code)]
            if not naive:
                problems += [f"{stored}, {target}: {problem}" for problem in found]
            elif not found:
                problems.append(f"{target}: the naive dot product passes, so this check finds nothing")
    for problem in problems:
        print(problem)
    print(f"{len(cases)} translation units, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
