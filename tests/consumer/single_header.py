#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes kvsparse into one header.

    single_header.py OUTPUT [HEADER...]

HEADER, as in kvsparse.hpp or cache/any_cache.hpp: these and what they include. Without any: the whole library except
testing/, which is for tests of policies. Every header comes once, behind those that it includes. One that needs more
than Eigen's core and the standard library comes last, and counts where that library is found (OpenMP's says so itself).
"""
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "include" / "kvsparse"

OWN_INCLUDE = re.compile(r'\s*#\s*include\s+"([^"]+)"')
OTHER_INCLUDE = re.compile(r"\s*#\s*include\s+(<[^>]+>)")
CONDITION = re.compile(r"\s*#\s*(if|ifdef|ifndef|endif)\b")

OPENING = """\
// SPDX-License-Identifier: Apache-2.0
// kvsparse {version}: KV-cache sparsity for long LLM decoding. Needs C++20 and Eigen 3.4.
// Made from the headers of include/kvsparse; change those.
//
{licence}
#pragma once

#if defined(KVSPARSE_VERSION_MAJOR)
#error "kvsparse_single.hpp and headers of kvsparse are included into one file: take one or the other"
#endif

"""


def version():
    text = (LIBRARY / "version.hpp").read_text()
    return ".".join(re.findall(r"^#define KVSPARSE_VERSION_[A-Z]+ ([0-9]+)$", text, re.MULTILINE))


class Header:
    """A header of the library, taken apart: what it includes, and its text without that."""

    def __init__(self, path):
        self.name = path.relative_to(LIBRARY.parent).as_posix()
        self.own, self.others, text = [], [], []
        depth = 0
        for line in path.read_text().splitlines():
            condition = CONDITION.match(line)
            if condition:
                depth += -1 if condition.group(1) == "endif" else 1
            own, other = OWN_INCLUDE.match(line), OTHER_INCLUDE.match(line)
            if own:  # on whatever condition: a header of the library is welcome anywhere
                self.own.append((path.parent / own.group(1)).resolve())
            elif other and depth == 0:
                self.others.append(other.group(1))
            elif not re.match(r"#pragma once|// SPDX-", line):
                text.append(line)  # includes of others that depend on a condition among them
        self.text = re.sub(r"\n{3,}", "\n\n", "\n".join(text)).strip()

    def foreign(self):
        """What it includes of neither the standard library nor Eigen's core."""
        return [name for name in self.others if re.search(r"[/.]", name) and name != "<Eigen/Core>"]


def in_order(paths):
    """These headers and all that they include, each once, behind what it includes."""
    headers = {}

    def visit(path, visiting=()):
        if path in visiting:
            sys.exit(f"{path} includes itself")
        if path in headers:
            return
        header = Header(path)
        for included in header.own:
            visit(included, (*visiting, path))
        headers[path] = header

    for path in paths:
        visit(path)
    return list(headers.values())


def single_header(paths):
    headers = in_order(paths)
    common = [header for header in headers if not header.foreign()]
    foreign = [header for header in headers if header.foreign()]
    for header in common:
        for path in header.own:
            if Header(path).foreign():
                sys.exit(f"{header.name} is for everybody, but includes {path.name}, which is not")
    includes = sorted({name for header in common for name in header.others})
    licence = "\n".join(f"// {line}".rstrip() for line in (ROOT / "LICENSE").read_text().strip().splitlines())
    parts = [OPENING.format(version=version(), licence=licence), "".join(f"#include {name}\n" for name in includes)]
    for header in common + foreign:
        parts.append(f"\n// ---- {header.name} ----\n\n")
        if not header.foreign():
            parts.append(header.text + "\n")
            continue
        found = " && ".join(f"__has_include({name})" for name in header.foreign())
        needed = "".join(f"#include {name}\n" for name in header.others)
        parts.append(f"#if {found}\n\n{needed}\n{header.text}\n\n#endif\n")
    return "".join(parts)


def whole_library():
    """The umbrella first, so that what most people read stands at the top."""
    rest = sorted(path for path in LIBRARY.rglob("*.hpp") if path.relative_to(LIBRARY).parts[0] != "testing")
    return [LIBRARY / "kvsparse.hpp", *rest]


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    paths = [LIBRARY / name for name in sys.argv[2:]] or whole_library()
    for path in paths:
        if not path.is_file():
            sys.exit(f"{path} is no header of kvsparse")
    pathlib.Path(sys.argv[1]).write_text(single_header(paths))


if __name__ == "__main__":
    main()
