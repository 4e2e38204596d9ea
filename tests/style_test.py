#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Every source is as clang-format writes it, and clang-tidy has nothing to say about the library.

    style_test.py [FLAG...]     flags of the compiler, for Eigen's headers

Both by .clang-format and .clang-tidy, version 14, since other versions differ; without them the test is skipped. Of the
library all headers are read, and templates where they are instantiated: a cache of each kind, its kernels and a table of
sequences.
"""
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
SKIPPED = 77
# Needs a library beyond Eigen and the standard one.
NOT_ALONE = {"openmp_executor.hpp"}
INSTANTIATED = """
using kvsparse::Int8, kvsparse::PagedKvCache;
template class kvsparse::PagedKvCache<kvsparse::Raas, kvsparse::Half>;
template class kvsparse::PagedKvCache<kvsparse::Compose<kvsparse::H2o, kvsparse::Quest>, float, Int8>;
template class kvsparse::SequenceCache<PagedKvCache<kvsparse::StreamingSketch, float>>;
template class kvsparse::SequenceTable<PagedKvCache<kvsparse::Clustered, float>>;
template kvsparse::Status kvsparse::attend(PagedKvCache<kvsparse::Raas, kvsparse::Half>&, std::span<const float>,
                                           std::span<float>, std::span<float>);
"""


def tool(name):
    return shutil.which(f"{name}-14") or shutil.which(name)


def is_version_14(path):
    return path is not None and "version 14." in subprocess.run([path, "--version"], capture_output=True, text=True).stdout


def sources():
    listing = subprocess.run(["git", "ls-files", "*.hpp", "*.cpp"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode == 0:
        return [name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]
    return [str(path.relative_to(ROOT)) for room in ("include", "tests", "bench", "examples")
            for path in (ROOT / room).rglob("*.[hc]pp")]


def format_problems(clang_format):
    run = subprocess.run([clang_format, "--dry-run", "-Werror", *sources()], cwd=ROOT, capture_output=True, text=True)
    return run.stderr if run.returncode != 0 else ""


def tidy_problems(clang_tidy, flags):
    headers = [header for header in sorted((ROOT / "include").rglob("*.hpp"))
               if header.name not in NOT_ALONE and "testing" not in header.parts]
    with tempfile.TemporaryDirectory() as folder:
        unit = pathlib.Path(folder) / "library.cpp"
        includes = [f'#include "{header.relative_to(ROOT / "include").as_posix()}"\n' for header in headers]
        unit.write_text("".join(includes) + INSTANTIATED)
        run = subprocess.run([clang_tidy, "--quiet", f"--config-file={ROOT / '.clang-tidy'}", str(unit), "--",
                              "-std=c++20", f"-I{ROOT / 'include'}", *flags], cwd=ROOT, capture_output=True, text=True)
    return run.stdout + run.stderr if run.returncode != 0 else ""


def main():
    clang_format, clang_tidy = tool("clang-format"), tool("clang-tidy")
    if not is_version_14(clang_format) or not is_version_14(clang_tidy):
        print("skipped: clang-format and clang-tidy 14 are not here (Debian: clang-format-14, clang-tidy-14)")
        return SKIPPED
    problems = format_problems(clang_format) + tidy_problems(clang_tidy, sys.argv[1:])
    print(problems or "clang-format and clang-tidy have nothing to say")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
