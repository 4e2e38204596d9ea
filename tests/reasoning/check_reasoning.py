#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks the evaluator `reasoning` from outside.

    check_reasoning.py path/to/reasoning path/to/generate_problems path/to/decode path/to/model

The same run must write the same bytes on any number of threads; its texts, answers and memory must be what `decode`
finds for the same problems; fed tokens, ends of text, refusals and interrupts must show in the files; and bad input
must be refused in one sentence.
"""
import csv
import io
import json
import math
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "engine"))
from check_engine import write_model  # noqa: E402

COLUMNS = ("model,set,format,lines,problems,seed,policy,page_size,budget,dtype,answer_right,answer_stderr,chain_right,"
           "chain_stderr,lines_right,lines_stderr,tokens_generated,tokens_stderr,peak_resident_tokens,"
           "peak_resident_bytes,mean_resident_bytes,allocated_bytes,stamped_share,refused").split(",")
TINY = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": True, "hidden_act": "silu", "eos_token_id": None}

failures = []


def check(holds, sentence):
    if not holds:
        failures.append(sentence)
        print("FAILED", sentence)


def run(command):
    return subprocess.run([str(word) for word in command], capture_output=True, text=True)


def output_of(command):
    done = run(command)
    if done.returncode != 0:
        sys.exit(f"{' '.join(str(word)[:60] for word in command)}: exit code {done.returncode}, {done.stderr.strip()}")
    return done.stdout


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def check_threads(reasoning, model, directory):
    """Returns the JSON of one of the runs."""
    sweep = ["--model", model, "--set", "fall,fall:gmax=4,life=12", "--budget", "96,160", "--page-size", 4,
             "--policy", "dense,raas,streaming_llm,random,quest:read_budget=64,quest:read_share=0.4,decayed_mass", "--problems", 2]
    texts = []
    for name, threads in (("one", 1), ("two", 2), ("again", 2)):
        files = ["--csv", directory / f"{name}.csv", "--json", directory / f"{name}.json"]
        output_of([reasoning, *sweep, "--threads", threads, *files])
        texts.append((files[1].read_bytes(), files[3].read_bytes()))
    check(texts[0] == texts[1] == texts[2], "the files depend on the number of threads")
    text = texts[0][0].decode()
    check(text.splitlines()[0].split(",") == COLUMNS, "the CSV has other columns")
    rows, result = rows_of(text), json.loads(texts[0][1])
    check(len(rows) == 2 * (1 + 6 * 2) == len(result["cells"]), f"{len(rows)} rows")
    check(result["complete"] is True, "the JSON is not complete")
    for row, cell in zip(rows, result["cells"]):
        what = f"{row['set']} {row['policy']} {row['budget']}"
        pins = row["policy"].split(":")[0] in ("raas", "random", "decayed_mass")
        refused = row["budget"] == "96" and pins  # the prompt alone has 112 tokens
        check((row["refused"] == "refused") == refused, f"{what}: refused is {row['refused']!r}")
        check(("prompt would pin" in (cell["refused"] or "")) == refused, f"{what}: JSON says {cell['refused']}")
        check((row["budget"] == "") == (row["policy"] == "dense"), f"{what}: the budget is {row['budget']!r}")
        if refused:
            check(row["answer_right"] == "" and row["peak_resident_bytes"] == "", f"{what}: measured though refused")
            continue
        share = sum(cell["answers_right"]) / 2
        check(float(row["answer_right"]) == share, f"{what}: answer_right")
        check(math.isclose(float(row["answer_stderr"]), math.sqrt(share * (1 - share) / 2)), f"{what}: answer_stderr")
        lines = cell["lines_right_each"]
        check(math.isclose(float(row["lines_right"]), sum(lines) / 2), f"{what}: lines_right")
        check(math.isclose(float(row["lines_stderr"]), abs(lines[0] - lines[1]) / 2), f"{what}: lines_stderr")
        names = ("mean_resident", "peak_resident", "allocated")
        mean, peak, allocated = (float(row[f"{name}_bytes"]) for name in names)
        check(0 < mean <= peak <= allocated, f"{what}: {mean}, {peak} and {allocated} bytes")
        keeps_all = row["policy"].startswith(("dense", "quest"))
        check(int(row["peak_resident_tokens"]) == (688 if keeps_all else int(row["budget"])), f"{what}: peak tokens")
        check((row["stamped_share"] != "") == (row["policy"] == "raas"), f"{what}: stamped_share")
    read = {(cell["set"], cell["policy"], cell["budget"]): cell["lines_right_each"] for cell in result["cells"]}
    for name in ("fall", "fall:gmax=4,life=12"):
        share, tokens = ((name, f"quest:read_{what}", 160) for what in ("share=0.4", "budget=64"))
        check(read[share] == read[tokens], f"{name}: 0.4 of 160 is not 64 tokens to read")
    print("threads: checked")


def check_against_decode(reasoning, generator, decode, model, directory):
    variants = [("dense", "dense", []), ("h2o:pin_prompt=true", "h2o", ["--set", "pin_prompt=true"])]
    out = directory / "texts.json"
    output_of([reasoning, "--model", model, "--set", "fall", "--policy", ",".join(v[0] for v in variants),
               "--budget", 192, "--problems", 3, "--seed", 11, "--json", out, "--texts"])
    cells = json.loads(out.read_text())["cells"]
    problems = [json.loads(line) for line in output_of([generator, "--seed", 11, "--count", 3]).splitlines()]
    for cell, (text, policy, options) in zip(cells, variants):
        peaks = []
        for i, problem in enumerate(problems):
            found = directory / "decode.json"
            output_of([decode, "--model", model, "--prompt", problem["prompt"], "--max-new", 576, "--policy", policy,
                       "--budget", 192, "--page-size", 4, *options, "--json", found])
            decoded = json.loads(found.read_text())["policies"][0]
            what = f"{text}, problem {i}"
            check(cell["texts"][i] == decoded["text"], f"{what}: another text than decode's")
            check(cell["answers"][i] == decoded["answer"], f"{what}: answer {cell['answers'][i]}")
            check(cell["answers_right"][i] == (decoded["answer"] == problem["answer"]), f"{what}: answers_right")
            right = 0
            for word, expected in zip(decoded["text"].split(), problem["chain"].split()):
                if word != expected:
                    break
                right += 1
            check(cell["lines_right_each"][i] == right // 12, f"{what}: {cell['lines_right_each'][i]} lines right")
            peaks.append(decoded["peak_resident_bytes"])
        check(cell["peak_resident_bytes"] == max(peaks), f"{text}: peak bytes")
    print("against decode: checked")


def check_formats(reasoning, generator, directory):
    """With random weights: what is fed is fed, and the model's end of text ends it."""
    def model_of(line_format, name, **changes):
        tokenizer = output_of([generator, "--tokenizer", "--format", line_format])
        config = {**TINY, "vocab_size": len(json.loads(tokenizer)["model"]["vocab"]), **changes}
        write_model(directory / name, config, "F32", 1, 3)
        (directory / name / "tokenizer.json").write_text(tokenizer)
        return directory / name, json.loads(tokenizer)["model"]["vocab"]

    def cells_of(model, line_format):
        out = directory / "formats.json"
        output_of([reasoning, "--model", model, "--format", line_format, "--set", "uniform", "--policy", "dense,raas",
                   "--budget", 128, "--problems", 2, "--seed", 5, "--lines", 40, "--json", out, "--texts"])
        return json.loads(out.read_text())["cells"]

    def problems_of(line_format):
        text = output_of([generator, "--format", line_format, "--set", "uniform", "--seed", 5, "--lines", 40,
                          "--count", 2, "--with-lines"])
        return [json.loads(line) for line in text.splitlines()]

    for cell in cells_of(model_of("long", "random_long")[0], "long"):
        for problem, text in zip(problems_of("long"), cell["texts"]):
            words, prompt, chain = text.split(), len(problem["prompt"].split()), problem["chain"].split()
            fed = [position - prompt for line in problem["lines"] for position in line[6]]
            check(len(fed) == 80 and len(words) == len(chain), "long: other lengths")
            check(all(words[i] == chain[i] for i in fed), f"long, {cell['policy']}: a fed word is missing")
            check(words != chain, "long: a random model solved it")

    model, vocabulary = model_of("varied", "random_varied")
    cell = cells_of(model, "varied")[0]
    lengths = [2 * len(problem["chain"].split()) for problem in problems_of("varied")]
    check(cell["tokens_each"] == lengths, f"varied: {cell['tokens_each']} tokens, not twice the chains, {lengths}")
    check(cell["answers"] == ["", ""], "varied: a text without end has an answer")
    words = cell["texts"][0].split()
    stop = words[len(words) // 2]
    (model / "config.json").write_text(json.dumps(
        {**TINY, "vocab_size": len(vocabulary), "eos_token_id": vocabulary[stop]}))
    cell = cells_of(model, "varied")[0]
    check(cell["tokens_each"][0] == words.index(stop) + 1, "varied: the end of text did not end it")
    print("formats: checked")


def check_interrupt(reasoning, model, directory):
    files = [directory / "interrupted.csv", directory / "interrupted.json"]
    command = [reasoning, "--model", model, "--set", "fall,mile,lru", "--policy", "dense,raas,h2o,quest", "--budget",
               "160,192,224,256,288,320", "--problems", 4, "--csv", files[0], "--json", files[1]]
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (files[0].exists() and len(files[0].read_text().splitlines()) > 1):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    check(process.returncode == 130 and b"interrupted" in error, f"interrupt: {process.returncode}, {error}")
    rows, result = rows_of(files[0].read_text()), json.loads(files[1].read_text())
    check(0 < len(rows) < 57 and len(rows) == len(result["cells"]) and result["complete"] is False,
          f"interrupt: {len(rows)} rows, {len(result['cells'])} cells, complete {result['complete']}")
    print("interrupt: checked")


def check_refusals(reasoning, model, directory):
    good = {"--model": model, "--set": "fall", "--policy": "raas", "--budget": 256, "--problems": 1, "--lines": 4}

    def refused(what, changes, words, extra=()):
        options = {**good, **changes}
        arguments = [word for option, value in options.items() if value is not None for word in (option, value)]
        done = run([reasoning, *arguments, *extra])
        check(done.returncode == 2, f"{what}: exit code {done.returncode}")
        check(done.stderr.count("\n") == 1 and all(word in done.stderr for word in words),
              f"{what}: said {done.stderr.strip()!r}")

    vocabulary = json.loads((pathlib.Path(model) / "tokenizer.json").read_text())
    for name, changed in (("moved", {"step": 95, ",": 91}), ("missing", {"step": None})):
        copy = directory / f"model_{name}"
        copy.mkdir()
        for file in ("config.json", "model.safetensors"):
            (copy / file).symlink_to((pathlib.Path(model) / file).resolve())
        words = {word: id for word, id in {**vocabulary["model"]["vocab"], **changed}.items() if id is not None}
        changed_model = {**vocabulary["model"], "vocab": words}
        (copy / "tokenizer.json").write_text(json.dumps({**vocabulary, "model": changed_model}))
    refused("moved word", {"--model": directory / "model_moved"}, ["','", "has the id 91", "95"])
    refused("missing word", {"--model": directory / "model_missing"}, ["lacks the word 'step'"])
    refused("another format's model", {"--format": "long"}, ["has the id", "--format"])
    refused("no model there", {"--model": directory / "nowhere"}, ["no such file"])
    refused("model without a name", {"--model": f"={model}"}, ["NAME=DIR"])
    refused("one name twice", {}, ["'main'", "twice"], ["--model", model])
    refused("unknown set", {"--set": "snail"}, ["'snail'", "uniform"])
    refused("set's unknown setting", {"--set": "mile,fall:gmin=4"}, ["'fall:gmin=4'", "gmax"])
    refused("set twice", {"--set": "fall,mile,fall"}, ["'fall'", "twice"])
    refused("unknown policy", {"--policy": "raas,snail"}, ["'snail'", "raas+quest"])
    refused("unknown option", {"--policy": "raas:sinks=2"}, ["'raas:sinks=2'", "has no option sinks"])
    refused("option without value", {"--policy": "raas:alpha"}, ["'raas:alpha'", "key=value"])
    refused("bad value", {"--policy": "raas:alpha=2"}, ["alpha = 2.000000", "[0, 1]"])
    refused("read budget of an evictor", {"--policy": "raas:read_budget=8"}, ["has no option read_budget"])
    refused("bad read budget", {"--policy": "quest:read_budget=0"}, ["read_budget got '0'"])
    for share in ("0", "1.5", "half"):
        refused("bad read share", {"--policy": f"quest:read_share={share}"}, [f"read_share got '{share}'"])
    refused("read share of an evictor", {"--policy": "raas:read_share=0.5"}, ["has no option read_share"])
    refused("policy twice", {"--policy": "raas,raas"}, ["'raas'", "twice"])
    refused("idea in f16", {"--policy": "decayed_mass", "--dtype": "f16"}, ["decayed_mass", "f16"])
    refused("no budget", {"--budget": None}, ["--budget"])
    refused("no set", {"--set": None}, ["--set"])
    refused("budget 0", {"--budget": "96,0"}, ["--budget got '0'"])
    refused("budget twice", {"--budget": "96,96"}, ["'96'", "twice"])
    refused("page size", {"--page-size": 257}, ["--page-size got '257'", "256"])
    refused("problems", {"--problems": "many"}, ["--problems got 'many'"])
    refused("lines", {"--lines": 63}, ["--lines is 63", "62"])
    refused("format", {"--format": "short"}, ["'short'", "varied"])
    refused("dtype", {"--dtype": "f64"}, ["--dtype got 'f64'"])
    refused("threads", {"--threads": 0}, ["--threads got '0'"])
    refused("dense layers", {"--dense-layers": 3}, ["--dense-layers is 3", "2 layers"])
    refused("texts nowhere", {}, ["--texts", "--json"], ["--texts"])
    refused("one file twice", {"--csv": directory / "x", "--json": directory / "x"}, ["--csv and --json"])
    refused("a directory", {"--csv": directory}, ["directory"])
    none = {"--set": None, "--policy": None, "--budget": None, "--lines": None}
    refused("unknown experiment", {**none, "--experiment": "slow"}, ["'slow'", "gate"])
    refused("experiment and list", {**none, "--experiment": "quick", "--budget": 96}, ["--experiment", "--budget"])
    refused("experiment without its model", {**none, "--experiment": "quick", "--model": f"other={model}"},
            ["named main, plain"])
    for name, needed in (("full", "main"), ("ideas", "main"), ("long", "long")):  # its lists are checked before that
        refused(f"experiment {name} without its model", {**none, "--experiment": name, "--model": f"other={model}"},
                [f"needs --model NAME=DIR of a model named {needed}"])
    print("refusals: checked")


def main():
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    reasoning, generator, decode, model = (str(pathlib.Path(argument).resolve()) for argument in sys.argv[1:])
    with tempfile.TemporaryDirectory() as temporary:
        directory = pathlib.Path(temporary)
        check_refusals(reasoning, model, directory)
        check_threads(reasoning, model, directory)
        check_against_decode(reasoning, generator, decode, model, directory)
        check_formats(reasoning, generator, directory)
        check_interrupt(reasoning, model, directory)
    print("all checks passed" if not failures else f"{len(failures)} checks failed")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
