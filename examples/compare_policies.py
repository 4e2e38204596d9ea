# SPDX-License-Identifier: Apache-2.0
"""Runs the shipped model's problems through examples/decode and says, in words, what came of it.

    compare_policies.py path/to/decode MODEL_DIR OUTPUT_DIR
"""
import json
import pathlib
import shlex
import subprocess
import sys

BUDGET, PAGE_SIZE, READ_BUDGET = 256, 4, 128
LINE_TOKENS = 12  # "step S55 : use g12 is 9 , get S55 6 ;"
POLICIES = {
    "dense": "keeps every token: what the model does without any sparsity",
    "streaming_llm": "keeps the first page and the most recent tokens",
    "h2o": "keeps the tokens that have drawn most attention so far, and the most recent ones",
    "quest": "keeps every token, but each step reads only the pages that may matter most to it",
    "raas": "keeps the prompt; gives up the page that has gone unused for longest",
    "random": "keeps the prompt; gives up a page at random, the control that a good policy must beat",
    "raas+quest": f"gives up pages like raas, and like quest reads only {READ_BUDGET} of the tokens that are left",
}


def heading(text):
    print(f"\n== {text}")


def run(arguments, show):
    if show:
        shown = ["'<the prompt>'" if before == "--prompt" else shlex.quote(argument)
                 for before, argument in zip([""] + arguments, arguments)]
        print("$ " + " ".join(shown) + "\n", flush=True)
    done = subprocess.run(arguments, stdout=None if show else subprocess.PIPE, check=False)
    if done.returncode != 0:
        sys.exit(f"decode ended with exit code {done.returncode}")


def command(decode, model, problem, json_file, policies, *more):
    return [decode, "--model", model, "--compare", ",".join(policies), "--budget", str(BUDGET),
            "--page-size", str(PAGE_SIZE), "--max-new", str(len(problem["chain"].split())),
            "--json", str(json_file), *more, "--prompt", problem["prompt"]]


def lines_of(text):
    words = text.split()
    return [" ".join(words[i : i + LINE_TOKENS]) for i in range(0, len(words), LINE_TOKENS)]


def verdict(problem, result):
    expected, written = lines_of(problem["chain"]), lines_of(result["text"])
    wrong = next((i for i, line in enumerate(expected) if i >= len(written) or written[i] != line), None)
    answer = "right" if result["answer"] == problem["answer"] else "WRONG"
    if wrong is None:
        return f"{answer} answer ({result['answer']}), and all {len(expected)} lines are correct"
    return (f"{answer} answer ({result['answer']}); line {wrong + 1} of {len(expected)} is the first wrong one: "
            f"\"{written[wrong] if wrong < len(written) else ''}\" instead of \"{expected[wrong]}\"")


def one_problem(decode, model, problem, output):
    words = problem["prompt"].split()
    steps = len(problem["chain"].split()) // LINE_TOKENS
    heading("The problem")
    print(f"""\
A small Llama-architecture model (310 thousand parameters) has been trained to work through chains like this one.
Its prompt is {len(words)} words, one token each:
    {' '.join(words[:24])} ... {' '.join(words[-5:])}
It gives six values ("{words[1]} {words[2]}": {words[1]} is {words[2]}), names for each of {steps} steps the earlier
fact that it uses ("{words[13]} {words[14]}": step {words[13]} uses {words[14]}), and ends with the value to start from
("{words[-3]} {words[-2]}"). The model must write {steps} lines, {steps * LINE_TOKENS} tokens:
    {lines_of(problem['chain'])[0]}
    {lines_of(problem['chain'])[1]} ...
Every line's result is the previous result plus the fact's value, modulo 10. So every line has to find its own entry
in the prompt, and the fact's value wherever that was written, perhaps hundreds of tokens ago. One wrong line ruins what
follows.
The answer is the last result; a guess is right one time in ten.""")

    heading("The policies")
    print(f"""\
The model keeps keys and values of what it has read: {len(words) + steps * LINE_TOKENS} tokens in the end, per layer
and kv head. Every policy but dense and quest has to make do with {BUDGET} of them, in pages of {PAGE_SIZE}:""")
    for name, meaning in POLICIES.items():
        print(f"    {name:14} {meaning}")

    heading("Decoding the first problem under each policy")
    json_file = output / "comparison.json"
    run(command(decode, model, problem, json_file, list(POLICIES), "--set", f"raas+quest.read_budget={READ_BUDGET}",
                "--resident", str(output / "resident")), show=True)

    heading(f"Compared with the true solution, whose answer is {problem['answer']}")
    for result in json.loads(json_file.read_text())["policies"]:
        print(f"    {result['policy']:14} {verdict(problem, result)}")


def all_problems(decode, model, problems, output):
    json_file = output / "one_problem.json"
    counts = {}
    for done, problem in enumerate(problems):
        if sys.stderr.isatty():
            print(f"\r{done} of {len(problems)} problems", end="", file=sys.stderr, flush=True)
        for policies, more, suffix in (
            (list(POLICIES), ["--set", f"raas+quest.read_budget={READ_BUDGET}"], ""),
            (["streaming_llm", "h2o"], ["--set", "pin_prompt=true"], ", prompt pinned"),
        ):
            run(command(decode, model, problem, json_file, policies, *more), show=False)
            for result in json.loads(json_file.read_text())["policies"]:
                if result["policy"] not in policies:
                    continue  # dense again, run as the reference
                right, whole = counts.get(result["policy"] + suffix, (0, 0))
                counts[result["policy"] + suffix] = (right + (result["answer"] == problem["answer"]),
                                                     whole + (result["text"] == problem["chain"]))
    json_file.unlink()
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    heading(f"One problem proves little: all {len(problems)} problems, same settings")
    print(f"    {'policy':30} {'right answers':>13} {'whole chains right':>19}")
    for name, (right, whole) in counts.items():
        print(f"    {name:30} {right:>13} {whole:>19}")
    print("""
"prompt pinned" forbids a policy to give up tokens of the prompt. raas and random always keep it here, so these are the
rows to compare them with. And mind what this is: one small model, one kind of problem, and a training that taught
the model to ignore tokens which its lines do not need. It shows how the policies differ, not how well a large language
model would do under them.""")


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    decode, model, output = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
    output.mkdir(parents=True, exist_ok=True)
    problems = [json.loads(line) for line in (pathlib.Path(model) / "problems.jsonl").read_text().splitlines()]
    one_problem(decode, model, problems[0], output)
    all_problems(decode, model, problems, output)


if __name__ == "__main__":
    main()
