#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks LemmaChain problems by solving them anew from their words, knowing nothing of how they were made.

    check_problems.py path/to/generate_problems

Every prompt and chain must match its format, every value must follow, every citation must be one that the set's rule
allows, and the pauses between uses of a lemma must be distributed as in the table that the sets are known by. The same
seed must give the same problems for ever: their digests stand below.
"""
import hashlib
import json
import pathlib
import re
import subprocess
import sys

SETS = ["fall", "fall:gmax=4", "fall:gmax=12", "fall:gmax=4,life=12", "mile", "lru", "age", "uniform"]
LONGEST_GAP = {"fall": 6, "fall:gmax=4": 4, "fall:gmax=12": 12, "fall:gmax=4,life=12": 4}
# Lines since a cited lemma was last used or, before its first use, defined; at 50, 75, 90 and 99 % of the citations.
GAPS = {"fall": (2, 3, 5, 6), "mile": (3, 5, 8, 17), "lru": (2, 5, 9, 14), "age": (6, 11, 17, 24),
        "uniform": (7, 13, 21, 35)}
# sha256 of three problems of every set from seed 7: were one to change, every published number would be another one.
DIGESTS = {"plain": "df6e00cf12fd44b3", "varied": "5d20d7a945000091", "long": "d4d2fca98c86f03d"}

failures = []


def check(holds, sentence):
    if not holds:
        failures.append(sentence)
        print("FAILED", sentence)


def generate(binary, *arguments):
    run = subprocess.run([binary, *map(str, arguments)], capture_output=True, text=True)
    if run.returncode != 0:
        sys.exit(f"generate_problems {' '.join(map(str, arguments))}: {run.stderr}")
    return run.stdout


class Grammar:
    """How the words of a format go together."""

    def __init__(self, line_format):
        self.format = line_format
        self.label = r"(H\d+ T\d+)" if line_format == "long" else r"(S\d+)"
        given = r"(G\d+ T\d+)" if line_format == "long" else r"(g\d+)"
        self.source = rf"(?:{given}|{self.label})"
        self.labels = 384 if line_format == "long" else 64
        if line_format == "long":
            prompt = rf"<bos> ((?:G\d+ T\d+ \d )+){self.label} (\d) ;"
            self.line = rf"{self.label} use {self.source} is (\d) get {self.label} (\d) ;"
        else:
            end = rf"{self.label} <eos> " if line_format == "varied" else "()"
            prompt = rf"<bos> ((?:g\d+ \d )+)((?:S\d+ [Sg]\d+ )*?){end}{self.label} (\d) ;"
            check_words = r"(?: , check (\d))?" if line_format == "varied" else ""
            self.line = rf"step {self.label} : use {self.source} is (\d) , get {self.label} (\d){check_words} ;"
        self.prompt = re.compile(prompt)

    def number(self, label):
        parts = [int(word[1:]) for word in label.split()]
        return parts[0] * 6 + parts[1] if self.format == "long" else parts[0]


def solve(grammar, problem, lines):
    """The line that each line cites (0: a given), or a sentence about what is wrong."""
    prompt = grammar.prompt.fullmatch(problem["prompt"])
    if not prompt:
        return "the prompt does not match the format"
    words = prompt.group(1).split()
    width = 3 if grammar.format == "long" else 2
    givens = {" ".join(words[i : i + width - 1]): int(words[i + width - 1]) for i in range(0, len(words), width)}
    if len(givens) != 6 or len(words) != 6 * width:
        return "there are not six different givens"
    first, value = grammar.number(prompt.groups()[-2]), int(prompt.groups()[-1])
    listed = [] if grammar.format == "long" else prompt.group(2).split()
    chain, position = problem["chain"], 0
    values, cited = {}, []
    for n in range(1, lines + 1):
        line = re.compile(grammar.line + "(?: |$)").match(chain, position)
        if not line:
            return f"line {n} does not match the format"
        position = line.end()
        label, given, source, source_value, again, new_value, *checked = line.groups()
        if grammar.number(label) != (first + n) % grammar.labels or again != label:
            return f"line {n} bears the label {label}"
        if given is None:
            cited.append((grammar.number(source) - first) % grammar.labels)
            if not 1 <= cited[-1] <= n - 2:
                return f"line {n} cites line {cited[-1]}"
            expected = values[cited[-1]]
        else:
            cited.append(0)
            if given not in givens:
                return f"line {n} cites {given}, which is not given"
            expected = givens[given]
        value = (value + expected) % 10
        values[n] = value
        if int(source_value) != expected or int(new_value) != value:
            return f"line {n} says {source_value} and {new_value}, not {expected} and {value}"
        if grammar.format == "varied" and checked[0] != (str(value) if value % 2 else None):
            return f"line {n} checks {checked[0]}"
        if listed and listed[2 * n - 2 : 2 * n] != [label, given or source]:
            return f"the prompt lists another source for line {n}"
    if grammar.format == "varied":
        end = f"S{(first + lines + 1) % 64}"
        if chain[position:] != f"step {end} : use <eos>" or prompt.group(3) != end:
            return "the end is not the one that the prompt asks for"
    elif position != len(chain):
        return "words follow the last line"
    if listed and len(listed) != 2 * lines:
        return "the prompt lists other lines than there are"
    return cited if problem["answer"] == str(value) else f"the answer is {value}, not {problem['answer']}"


def gaps_of(cited):
    last_use, gaps = {}, []
    for n, source in enumerate(cited, start=1):
        if source:
            gaps.append(n - last_use.get(source, source))
            last_use[source] = n
    return gaps


def percentiles(values):
    ordered = sorted(values)
    return [ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.75, 0.9, 0.99)]


def check_set(binary, rule, line_format, lines, count):
    what = f"{rule}, {line_format}"
    grammar = Grammar(line_format)
    text = generate(binary, "--set", rule, "--format", line_format, "--lines", lines, "--count", count, "--seed", 7)
    citations, gaps = [], []
    problems = [json.loads(line) for line in text.splitlines()]
    check(len(set(text.splitlines())) == count, f"{what}: the problems are not {count} different ones")
    for i, problem in enumerate(problems):
        cited = solve(grammar, problem, lines)
        if isinstance(cited, str):
            check(False, f"{what}: problem {i}: {cited}")
            return
        citations += cited
        gaps += gaps_of(cited)
    check(max(gaps) <= LONGEST_GAP.get(rule, lines), f"{what}: a gap of {max(gaps)} lines")
    if rule == "age":
        for i, problem in enumerate(problems):
            cited = solve(grammar, problem, lines)
            check(all(n - source <= 24 for n, source in enumerate(cited, 1) if source), f"{what}: a line older than 24")
    if line_format == "plain" and rule in GAPS:
        found = percentiles(gaps)
        near = all(abs(a - b) <= max(1, 0.15 * b) for a, b in zip(found, GAPS[rule]))
        check(near, f"{what}: gaps at 50/75/90/99 % are {found}, about {GAPS[rule]} were expected")
        print(f"{what}: gaps {found}, givens {citations.count(0) / len(citations):.3f}")
        if rule == "uniform":  # the first two lines have nothing but givens to cite
            expected = (2 + 0.15 * (lines - 2)) / lines
            check(abs(citations.count(0) / len(citations) - expected) < 0.01, f"{what}: share of givens")


def check_digests(binary):
    for line_format, known in DIGESTS.items():
        everything = ""
        for rule in SETS:
            arguments = ("--set", rule, "--format", line_format, "--seed", 7)
            text = generate(binary, *arguments, "--count", 3)
            check(text == generate(binary, *arguments, "--count", 3), f"{rule}, {line_format}: not the same twice")
            check(generate(binary, *arguments, "--count", 5).startswith(text),
                  f"{rule}, {line_format}: the first problems depend on how many there are")
            everything += text
        digest = hashlib.sha256(everything.encode()).hexdigest()[:16]
        check(digest == known, f"{line_format}: the digest is {digest}, not {known}")
    check(generate(binary, "--seed", 8) != generate(binary, "--seed", 7), "seeds 7 and 8 give the same problem")


def check_tokenizers(binary):
    for line_format in ("plain", "varied", "long"):
        vocabulary = json.loads(generate(binary, "--tokenizer", "--format", line_format))["model"]["vocab"]
        check(sorted(vocabulary.values()) == list(range(len(vocabulary))), f"{line_format}: ids are not 0, 1, 2, ...")
        text = generate(binary, "--format", line_format, "--count", 20)
        problems = [json.loads(line) for line in text.splitlines()]
        words = {word for problem in problems for word in f"{problem['prompt']} {problem['chain']}".split()}
        unknown = sorted(words - vocabulary.keys())
        check(not unknown, f"{line_format}: {unknown} are not in the vocabulary")


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    binary = str(pathlib.Path(sys.argv[1]).resolve())
    for rule in SETS:
        check_set(binary, rule, "plain", 48, 300)
        check_set(binary, rule, "varied", 48, 40)
        check_set(binary, rule, "long", 300, 5)
    check_digests(binary)
    check_tokenizers(binary)
    print("all checks passed" if not failures else f"{len(failures)} checks failed")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
