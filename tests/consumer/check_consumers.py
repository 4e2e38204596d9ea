#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks every way in which a project gets at kvsparse, as a user would go it.

    check_consumers.py CMAKE COMPILER -isystemEIGEN

Installs the library, moves what was installed, makes the single header, and lets the project of this directory use each
in turn: find_package, add_subdirectory, FetchContent, pkg-config with no build system, the single header. Its two
translation units include the same, every header where it is installed, with warnings as errors; its program checks what
it decodes. Nothing of ours may turn up in the project. No network. EIGEN: where it is, for who does not ask CMake.
"""
import concurrent.futures
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIBRARY = ROOT / "include" / "kvsparse"
WARNINGS = ["-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-pedantic", "-Werror"]
SOURCES = ["decode_loop.cpp", "second_unit.cpp"]

# testing/ is for tests of policies, and needs GoogleTest, which a project that uses the library need not have.
HEADERS = sorted(path.relative_to(LIBRARY.parent).as_posix() for path in LIBRARY.rglob("*.hpp")
                 if path.relative_to(LIBRARY).parts[0] != "testing")

# What may turn up in a project that takes kvsparse: names that say whose they are, and what Eigen's package and CMake's
# own modules leave behind.
WELCOME_VARIABLES = re.compile(r"(?i)_*(kvsparse|eigen3|fetchcontent|cmake_arg|remembered)_?|PACKAGE_PREFIX_DIR$")
WELCOME_TARGETS = {"find_package": {"kvsparse::kvsparse", "Eigen3::Eigen"}, "add_subdirectory": {"kvsparse"},
                   "FetchContent": {"kvsparse", "Eigen3::Eigen"}}  # there Eigen is the project's own


class Failure(Exception):
    pass


def expect(truth, message):
    if not truth:
        raise Failure(message)


def run(*command, **options):
    """Its output; Failure if it fails."""
    command = [str(word) for word in command]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    expect(done.returncode == 0, f"{shlex.join(command)}:\n{done.stdout}")
    return done.stdout


def files_below(directory):
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def version_of_headers():
    text = (LIBRARY / "version.hpp").read_text()
    return ".".join(re.search(rf"#define KVSPARSE_VERSION_{part} (\d+)", text).group(1)
                    for part in ("MAJOR", "MINOR", "PATCH"))


class Consumers:
    def __init__(self, room, cmake, compiler, eigen):
        self.room, self.cmake, self.compiler, self.eigen = room, cmake, compiler, eigen
        self.version = version_of_headers()
        self.installed = room / "moved"
        self.single = room / "build" / "kvsparse_single.hpp"

    # --- what the ways below have in common ---

    def prepare(self):
        """The library installed and moved elsewhere, and the single header, both as README makes them."""
        build, prefix = self.room / "build", self.room / "installed"
        told = run(self.cmake, "--preset", "package", "-B", build, f"-DCMAKE_CXX_COMPILER={self.compiler}", cwd=ROOT)
        expect("Warning" not in told, told)
        run(self.cmake, "--install", build, "--prefix", prefix)
        run(self.cmake, "--build", build, "--target", "single_header")
        prefix.rename(self.installed)

    def project(self, way, includes):
        """A copy of the project of this directory; includes: what its kvsparse_headers.hpp says."""
        directory = self.room / way
        directory.mkdir()
        for name in [*SOURCES, "second_unit.hpp", "CMakeLists.txt", "project_state.cmake"]:
            shutil.copy(HERE / name, directory)
        lines = ["#pragma once", *(f"#include {name}" for name in includes)]
        (directory / "kvsparse_headers.hpp").write_text("\n".join(lines) + "\n")
        return directory

    def decode(self, program, *arguments):
        told = run(program, *arguments)
        expect(f"kvsparse {self.version}: 100 tokens decoded, 0 mistakes" in told, told)

    def use_with_cmake(self, way, directory, *options):
        """Configures, builds, tests and installs the project; answers with the files that it installed."""
        build = directory / "build"
        told = run(self.cmake, "-S", directory, "-B", build, f"-DWAY={way}", f"-DCMAKE_CXX_COMPILER={self.compiler}",
                   "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", *options)
        variables = set(re.findall(r"-- new variable: (.*)", told))
        alien = {name for name in variables if not WELCOME_VARIABLES.match(name)}
        expect(not alien, f"variables that are not ours to set: {sorted(alien)}")
        targets = set(re.findall(r"-- new target: (.*)", told)) - {"my_engine"}
        expect(targets == WELCOME_TARGETS[way], f"targets are {targets}")
        expect("new property" not in told and "Warning" not in told, told)
        expect("CMAKE_BUILD_TYPE:STRING=\n" in (build / "CMakeCache.txt").read_text(), "a build type was chosen")
        self.check_flags(build)

        run(self.cmake, "--build", build)
        self.decode(build / "my_engine")
        tests = run(pathlib.Path(self.cmake).with_name("ctest"), "-N", cwd=build)
        expect("Total Tests: 1\n" in tests, f"tests that are not the project's:\n{tests}")
        run(self.cmake, "--install", build, "--prefix", directory / "out")
        return files_below(directory / "out")

    def check_flags(self, build):
        """Where headers are, and C++20: nothing else comes with the library."""
        for unit in json.loads((build / "compile_commands.json").read_text()):
            words = shlex.split(unit["command"])[1:]
            words = words[: words.index("-o")]
            alien = [word for before, word in zip(["", *words], words)
                     if word not in WARNINGS and word != "-isystem" and before != "-isystem" and
                     not re.match(r"-I|-std=(gnu|c)\+\+20$|-DPACKAGE_VERSION=", word)]
            expect(not alien, f"the project is compiled with {alien}")

    # --- the ways ---

    def check_installed_tree(self):
        found = files_below(self.installed)
        headers = files_below(LIBRARY)
        expected = [f"include/kvsparse/{name}" for name in headers] + [
            "share/cmake/kvsparse/kvsparseConfig.cmake", "share/cmake/kvsparse/kvsparseConfigVersion.cmake",
            "share/cmake/kvsparse/kvsparseTargets.cmake", "share/licenses/kvsparse/LICENSE",
            "share/pkgconfig/kvsparse.pc"]
        expect(found == sorted(expected), f"installed: {sorted(set(found) ^ set(expected))}")
        for name in found:
            text = (self.installed / name).read_text()
            for path in (ROOT, self.room):
                expect(str(path) not in text, f"{name} names {path}")

    def find_package(self):
        directory = self.project("find_package", [f"<{name}>" for name in HEADERS])
        installed = self.use_with_cmake("find_package", directory, f"-DCMAKE_PREFIX_PATH={self.installed}")
        expect(installed == ["bin/my_engine"], f"the project installs {installed}")

    def add_subdirectory(self):
        directory = self.project("add_subdirectory", ["<kvsparse/kvsparse.hpp>"])
        (directory / "kvsparse").symlink_to(ROOT)
        installed = self.use_with_cmake("add_subdirectory", directory)
        expect(installed == ["bin/my_engine"], f"the project installs {installed}")
        # On request, for a library of theirs that is installed and exported itself.
        run(self.cmake, "-DKVSPARSE_INSTALL=ON", directory / "build")
        run(self.cmake, "--install", directory / "build", "--prefix", directory / "out")
        missing = set(files_below(self.installed)) - set(files_below(directory / "out"))
        expect(not missing, f"with KVSPARSE_INSTALL the project does not install {sorted(missing)}")

    def fetch_content(self):
        """From a tree that lies there already: no network. With an Eigen of the project's."""
        directory = self.project("FetchContent", ["<kvsparse/kvsparse.hpp>"])
        self.use_with_cmake("FetchContent", directory, f"-DFETCHCONTENT_SOURCE_DIR_KVSPARSE={ROOT}",
                            "-DFETCHCONTENT_FULLY_DISCONNECTED=ON", f"-DMY_EIGEN={self.eigen}")

    def pkg_config(self):
        directory = self.project("pkg_config", ["<kvsparse/kvsparse.hpp>"])
        environment = {**os.environ, "PKG_CONFIG_PATH": str(self.installed / "share" / "pkgconfig")}

        def ask(*question):
            return run("pkg-config", *question, "kvsparse", env=environment).strip()

        expect(ask("--modversion") == self.version, f"kvsparse.pc says version {ask('--modversion')}")
        expect(ask("--libs") == "", f"kvsparse.pc links {ask('--libs')}")
        flags = shlex.split(ask("--cflags"))
        expect(all(flag.startswith("-I") for flag in flags), f"kvsparse.pc compiles with {flags}")
        expect(os.path.samefile(flags[0][2:], self.installed / "include"), f"kvsparse.pc points at {flags[0]}")
        # Warnings as errors would be for Eigen too, which lies in no system directory here.
        run(self.compiler, "-std=c++20", *SOURCES, *flags, "-o", "my_engine", cwd=directory)
        self.decode(directory / "my_engine")

    def single_header(self):
        directory = self.project("single_header", ['"kvsparse_single.hpp"'])
        text = self.single.read_text()
        sections = re.findall(r"^// ---- (\S+) ----$", text, re.MULTILINE)
        expect(sorted(sections) == HEADERS, f"in the single header: {sorted(set(sections) ^ set(HEADERS))}")
        expect(not re.search(r'^\s*#\s*include\s*"', text, re.MULTILINE), "the single header includes one of ours")
        licence = [line.strip() for line in (ROOT / "LICENSE").read_text().split("\n") if line.strip()]
        comments = {line[2:].strip() for line in text.split("#pragma once")[0].split("\n")}
        expect(set(licence) <= comments, "the single header does not open with the licence")
        expect(f"// kvsparse {self.version}:" in text, "the single header does not say its version")

        shutil.copy(self.single, directory)
        run(self.compiler, f"-isystem{self.eigen}", "-std=c++20", *WARNINGS, *SOURCES, "-o", "my_engine", cwd=directory)
        self.decode(directory / "my_engine")

        # A part of the library, and the mistake of including both kinds.
        part, both = directory / "part.hpp", directory / "both.cpp"
        run(sys.executable, HERE / "single_header.py", part, "core/status.hpp")
        expect("Eigen" not in part.read_text().split("#pragma once")[1], "a part brings more than it needs")
        run(self.compiler, "-std=c++20", "-fsyntax-only", "-x", "c++", "-include", part, os.devnull)
        both.write_text('#include <kvsparse/version.hpp>\n#include "kvsparse_single.hpp"\n')
        try:
            run(self.compiler, "-std=c++20", "-Wfatal-errors", "-fsyntax-only", f"-I{LIBRARY.parent}", both)
        except Failure as failure:
            expect("take one or the other" in str(failure), str(failure))
        else:
            raise Failure("headers and the single header go into one file without a word")

    def readme(self):
        """README's lines are those that were tried."""
        readme = " ".join((ROOT / "README.md").read_text().split())
        project = (HERE / "CMakeLists.txt").read_text()
        ways = r"^ *((?:find_package|add_subdirectory|FetchContent_\w+)\(kvsparse.*\))$"
        lines = [line for line in re.findall(ways, project, re.MULTILINE) if "QUIET" not in line]
        expect(len(lines) == 4, f"the project takes kvsparse by {lines}")
        lines += ["include(FetchContent)", "target_link_libraries(my_engine PRIVATE kvsparse::kvsparse)",
                  "cmake --preset package", "cmake --install build/package --prefix", "--target single_header",
                  "$(pkg-config --cflags kvsparse)"]
        for line in lines:
            expect(" ".join(line.split()) in readme, f"README does not say: {line}")


def main():
    cmake, compiler, eigen = sys.argv[1], sys.argv[2], sys.argv[3].removeprefix("-isystem")
    problems = 0
    for name in ("CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CMAKE_BUILD_TYPE"):  # this machine's, not the library's
        os.environ.pop(name, None)
    with tempfile.TemporaryDirectory() as room:
        consumers = Consumers(pathlib.Path(room).resolve(), cmake, compiler, eigen)
        consumers.prepare()
        ways = [consumers.check_installed_tree, consumers.find_package, consumers.add_subdirectory,
                consumers.fetch_content, consumers.pkg_config, consumers.single_header, consumers.readme]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for way, future in [(way, pool.submit(way)) for way in ways]:
                try:
                    future.result()
                    print(f"{way.__name__}: right")
                except Failure as failure:
                    print(f"{way.__name__}: {failure}")
                    problems += 1
    print(f"{len(ways)} checks, {problems} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
