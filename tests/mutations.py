#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Would the tests notice? Changes one line of the library at a time, in a scratch copy, and runs the smallest test that
should fail then.

    tests/mutations.py              every mutation, one after the other
    tests/mutations.py raas fork    those whose name contains one of these words

A mutation that its test does not catch, that does not compile, or whose line is not found once, is told of, and the exit
code is 1. Each test is first seen to pass on the library as it is. Needs g++ and GoogleTest; ccache, where there is one,
saves most of the compiling.
"""
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIMIT = 300  # seconds; a test that hangs has noticed too

# One policy by name, of one type: what a case of policy_oracle_test needs of the library kvsparse_named_cache.
ONE_NAMED_CACHE = """
#include "engine/named_cache.hpp"
using namespace kvsparse;
AnyCache kvsparse_tools::named_cache(std::string_view policy, ScalarType scalar, const CacheConfig& config,
                                     std::span<const OptionSetting> settings) {
  return AnyCache::find<PolicyList<%s>, float>(policy, scalar, config, settings).value();
}
"""
ORACLES = {"raas": "Raas", "h2o": "H2o", "quest": "Quest", "kindred": "Kindred", "streaming_llm": "StreamingLlm"}

# name: sources, --gtest_filter
TESTS = {
    "softmax_state": (["unit/softmax_state_test.cpp"], "*"),
    "page_pool": (["unit/page_pool_test.cpp"], "*"),
    "page_table": (["unit/page_table_test.cpp"], "*"),
    "page_summary": (["unit/page_summary_test.cpp"], "*"),
    "selection": (["unit/selection_test.cpp"], "*"),
    "stored_row": (["unit/stored_row_test.cpp"], "*"),
    "evidence": (["unit/evidence_test.cpp"], "*"),
    "contract": (["policy_contract_test.cpp"], "*"),
    "fork": (["pool_test.cpp"], "Fork.*"),
    "draft": (["draft_test.cpp"], "*"),
    "snapshot": (["snapshot_test.cpp"], "Snapshot*:-*EveryFlippedByte*"),
    **{f"oracle of {policy}": (["policy_oracle_test.cpp", "support/test_cache.cpp", f"one_named_cache_{policy}.cpp"],
                               f"*.DecidesAsTheOracleOnRandomTraces/{case}:*/{case}WithoutPins-*EveryStorageType*")
       for policy, case in ORACLES.items()},
}

# name, file under include/kvsparse, the line's part that changes, what it becomes, the test that should fail
MUTATIONS = [
    ("raas uses the pages that were not used", "policy/raas.hpp", "> options.alpha && step", "<= options.alpha && step",
     "oracle of raas"),
    ("raas gives up the heavier of two old pages", "policy/raas.hpp",
     "std::pair(head.state(page).stamp, head.state(page).last_mass)",
     "std::pair(head.state(page).stamp, -head.state(page).last_mass)", "oracle of raas"),
    ("raas does not stamp a page when it opens", "policy/raas.hpp", "{.stamp = head.first_position(page), .last_mass",
     "{.stamp = {}, .last_mass", "oracle of raas"),
    ("h2o forgets the mass of earlier steps", "policy/h2o.hpp", "accumulated_mass += ", "accumulated_mass = ",
     "oracle of h2o"),
    ("h2o keeps one recent page more", "policy/h2o.hpp", "budget / 2) - 1;", "budget / 2);", "oracle of h2o"),
    ("quest reads one page more", "policy/quest.hpp", "head.read_page_budget() - selection.pages().size()",
     "head.read_page_budget() + 1 - selection.pages().size()", "oracle of quest"),
    ("quest does not always read the newest page", "policy/quest.hpp", "selection.add(head.open_page());", "",
     "oracle of quest"),
    ("kindred never stamps a page again", "policy/kindred.hpp", "state.stamp = step.position();", "",
     "oracle of kindred"),
    ("streaming_llm gives up its newest page", "policy/streaming_llm.hpp", "return head.first_position(page);",
     "return -head.first_position(page).value;", "oracle of streaming_llm"),
    ("bounds take the wrong end of a page", "memory/page_bounds.hpp", "(queries[q][i] > 0.0F ?",
     "(queries[q][i] < 0.0F ?", "page_summary"),
    ("all pages that tie for the last place are read", "policy/selection.hpp", "ties -= count_ranks(lowest + 1);",
     "ties -= count_ranks(lowest);", "selection"),
    ("a score that is none is read last", "policy/selection.hpp",
     "simd::broadcast(std::numeric_limits<float>::infinity())", "simd::broadcast(-1e30F)", "selection"),
    ("merged states forget what one was scaled by", "core/softmax_state.hpp",
     "state.sum = state.sum * keep + other.sum * take;", "state.sum = state.sum + other.sum * take;", "softmax_state"),
    ("int8 wastes steps", "core/stored_row.hpp", "most_steps = 127.0F", "most_steps = 120.0F", "stored_row"),
    ("a page that a fork still holds is free", "memory/page_ledger.hpp", "if (left > 0) return;",
     "if (left > 1) return;", "page_pool"),
    ("shared pages are counted wrong", "memory/page_ledger.hpp", "if (left == 1) --shared_pages_;",
     "if (left == 0) --shared_pages_;", "page_pool"),
    ("an erased page's tokens stay counted", "memory/page_table.hpp",
     "resident_tokens_ -= page.tokens;", "", "page_table"),
    ("a fork writes into its origin's page", "cache/paged_kv_cache.hpp", "if (!open_pages_may_be_shared_) return;",
     "return;", "fork"),
    ("the summary of a reused page keeps its old keys", "cache/paged_kv_cache.hpp",
     "memory.rows.key_row(page, slot), slot.value == 0);", "memory.rows.key_row(page, slot), false);", "contract"),
    ("one page more than the budget is kept", "cache/layer_pages.hpp", "make_room(owner, page_budget() - 1);",
     "make_room(owner, page_budget());", "contract"),
    ("truncation goes back behind an eviction", "cache/layer_pages.hpp", "length_at_last_eviction_ = next_index() + 1;",
     "length_at_last_eviction_ = 0;", "draft"),
    ("a snapshot of more pages than the budget is loaded", "cache/layer_check.hpp",
     "if (count > state.page_budget && !layer.heads_share_budget) {", "if (false) {", "snapshot"),
]


class Copy:
    """The library and its tests in a directory of their own."""

    def __init__(self, directory):
        self.root = pathlib.Path(directory)
        for part in ("include", "tests", "examples/engine", "examples/common"):
            shutil.copytree(ROOT / part, self.root / part)
        for policy, type_name in ORACLES.items():
            (self.root / f"tests/one_named_cache_{policy}.cpp").write_text(ONE_NAMED_CACHE % type_name)
        self.launcher = ["ccache"] if shutil.which("ccache") else []

    def run(self, test):
        """'passed', or how it did not."""
        sources, chosen = TESTS[test]
        binary = self.root / "test"
        objects = []
        for source in sources:
            objects.append(self.root / (source.replace("/", "_") + ".o"))
            command = [*self.launcher, "g++", "-std=c++20", "-O0", "-w", "-Iinclude", "-Itests", "-Iexamples",
                       "-isystem", "/usr/include/eigen3", "-c", f"tests/{source}", "-o", objects[-1]]
            if (built := subprocess.run(command, cwd=self.root, capture_output=True, text=True)).returncode != 0:
                return "does not compile: " + built.stderr[:500]
        subprocess.run(["g++", *objects, "-lgtest_main", "-lgtest", "-lpthread", "-o", binary], cwd=self.root,
                       check=True)
        try:
            ran = subprocess.run([binary, f"--gtest_filter={chosen}", "--gtest_brief=1", "--gtest_fail_fast"],
                                 cwd=self.root, capture_output=True, text=True, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return f"hangs for {LIMIT} s"
        if "] 0 tests from" in ran.stdout:
            return "does not compile: the filter finds no test"
        if ran.returncode == 0:
            return "passed"
        failed = next((line for line in ran.stdout.splitlines() if "FAILED" in line), "")
        return failed.replace("[  FAILED  ]", "failed").strip() or f"crashed with {-ran.returncode}"


def main():
    words = sys.argv[1:]
    chosen = [m for m in MUTATIONS if not words or any(word in " ".join(m[:2]) for word in words)]
    caught = 0
    sound = {}
    with tempfile.TemporaryDirectory() as directory:
        copy = Copy(directory)
        for name, file, before, after, test in chosen:
            started = time.monotonic()
            if test not in sound:
                sound[test] = copy.run(test)
            path = copy.root / "include/kvsparse" / file
            text = path.read_text()
            if sound[test] != "passed":
                verdict = f"NOT TRIED: {test} {sound[test]} on the library as it is"
            elif text.count(before) != 1:
                verdict = f"NOT TRIED: {before!r} is there {text.count(before)} times"
            else:
                path.write_text(text.replace(before, after))
                result = copy.run(test)
                path.write_text(text)
                is_caught = result != "passed" and not result.startswith("does not compile")
                caught += is_caught
                verdict = f"caught: {result}" if is_caught else f"NOT CAUGHT by {test}: {result}"
            print(f"{name}: {verdict} ({time.monotonic() - started:.0f} s)", flush=True)
    print(f"{caught} of {len(chosen)} mutations caught")
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
