#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks what examples/decode does beyond one prompt at a time: batches over one pool, forks, guessing ahead, save and load,
text as it streams. Each is compared with runs that do without it.

    check_decode.py path/to/decode path/to/examples/model
"""
import json
import pathlib
import sys
import tempfile

import numpy as np

import check_engine as engine
import check_tokenizer as tokenizer
from check_decisions import read_safetensors
from check_engine import check, decode

PAGE, LAYERS, KV_HEADS, HEAD_DIM = 4, 2, 2, 16
CONFIG = {"model_type": "llama", "vocab_size": 270, "hidden_size": 48, "intermediate_size": 64,
          "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
          "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True}
BUDGET = 48  # the prompts below fit, their answers do not
POLICIES = {name: ["--policy", name, *([] if name == "dense" else ["--budget", BUDGET])]
            for name in ("dense", "streaming_llm", "h2o", "quest", "raas", "kindred", "random", "ada_kv", "raas+quest",
                         "h2o+quest")}


def random_prompts(count, seed):
    rng = np.random.default_rng(seed)
    return [",".join(map(str, rng.integers(0, 256, int(rng.integers(3, 40))))) for _ in range(count)]


class Runs:
    """decode with what all runs have in common; answers are the JSON's."""

    def __init__(self, binary, root, model):
        self.binary, self.out = binary, root / "out.json"
        self.common = ["--model", model, "--page-size", PAGE, "--json", self.out]

    def __call__(self, what, *arguments):
        run = decode(self.binary, *self.common, *arguments)
        check(run.returncode == 0, f"{what}: exit code {run.returncode}, {run.stderr.strip()}")
        return json.loads(self.out.read_text())["policies"][0] if run.returncode == 0 else None

    def refused(self, what, arguments, *words):
        run = decode(self.binary, *self.common, *arguments)
        check(run.returncode == 2, f"{what}: exit code {run.returncode}")
        check(run.stderr.count("\n") == 1 and all(word in run.stderr for word in words), f"{what}: said {run.stderr.strip()!r}")


def same(a, b):
    return a["tokens"] == b["tokens"] and a["logits"] == b["logits"] and a["evicted_tokens"] == b["evicted_tokens"]


# ------------------------------------------------------------------------------------------------------------- batches
def check_batches(runs, root):
    prompts = random_prompts(5, 21)
    lists = [argument for prompt in prompts for argument in ("--prompt-ids", prompt)]
    for name, policy in POLICIES.items():
        for threads in (1, 3):
            batch = runs(f"batch of {name}", *policy, *lists, "--max-new", 50, "--threads", threads)
            if batch is None:
                continue
            check(len(batch["sequences"]) == 5 and batch["pool"]["most_sequences"] == 5, f"batch of {name}: not at once")
            for prompt, together in zip(prompts, batch["sequences"]):
                alone = runs(f"alone, {name}", *policy, "--prompt-ids", prompt, "--max-new", 50)
                check(same(alone, together), f"batch of {name}: differs from the prompt alone")
            check(0 < batch["pool"]["peak_bytes"] <= batch["pool"]["bytes"], f"batch of {name}: the pool's peak")

        # Half the memory: some wait, and nothing else changes.
        fewer = runs(f"small pool of {name}", *policy, *lists, "--max-new", 50, "--pool-bytes", batch["pool"]["bytes"] // 2)
        if fewer is not None:
            check(0 < fewer["pool"]["most_sequences"] < 5, f"small pool of {name}: {fewer['pool']}")
            check(fewer["pool"]["bytes"] <= batch["pool"]["bytes"] // 2, f"small pool of {name}: too large")
            for a, b in zip(batch["sequences"], fewer["sequences"]):
                check(same(a, b), f"small pool of {name}: other tokens")
    runs.refused("a tiny pool", [*POLICIES["dense"], *lists, "--pool-bytes", 9000], "--pool-bytes", "pages")
    runs.refused("no pool at all", [*POLICIES["dense"], *lists, "--pool-bytes", 10], "pool")

    # The same prompts from files.
    texts = ["abc", "[d,e]", "f g"]
    (root / "prompts.txt").write_text("abc\n[d,e]\r\n\nf g\n")
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text, "more": 1}) + "\n" for text in texts))
    given = runs("texts", *POLICIES["dense"], *(a for text in texts for a in ("--prompt", text)), "--max-new", 8)
    for file in ("prompts.txt", "prompts.jsonl"):
        read = runs(file, *POLICIES["dense"], "--prompt-file", root / file, "--max-new", 8)
        check(read["sequences"] and all(same(a, b) for a, b in zip(given["sequences"], read["sequences"], strict=True)), file)
    (root / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    runs.refused("a line without prompt", [*POLICIES["dense"], "--prompt-file", root / "bad.jsonl"], "line 2", "prompt")
    (root / "empty.txt").write_text("\n\n")
    runs.refused("a file without prompts", [*POLICIES["dense"], "--prompt-file", root / "empty.txt"], "no prompt")
    runs.refused("no such file", [*POLICIES["dense"], "--prompt-file", root / "nowhere"], "no such file")
    print("batches: checked")


# --------------------------------------------------------------------------------------------------------------- forks
def check_forks(runs, weights):
    prompt = random_prompts(1, 31)[0] + ",7,8,9,10,11,12,13"
    ids = list(map(int, prompt.split(",")))
    forks = 6
    for name, policy in POLICIES.items():
        result = runs(f"forks of {name}", *policy, "--prompt-ids", prompt, "--max-new", 40, "--fork", forks)
        if result is None:
            continue
        sequences = result["sequences"]
        check([s["fork"] for s in sequences] == list(range(forks)), f"forks of {name}: which")
        check(len({s["tokens"][0] for s in sequences}) == forks, f"forks of {name}: first tokens")
        alone = runs(f"alone, {name}", *policy, "--prompt-ids", prompt, "--max-new", 40)
        check(same(alone, sequences[0]), f"forks of {name}: the first differs from the prompt alone")
        fewer = runs(f"two forks of {name}", *policy, "--prompt-ids", prompt, "--max-new", 40, "--fork", 2)
        check(all(same(a, b) for a, b in zip(sequences, fewer["sequences"])), f"forks of {name}: their number changes them")

        # When the forks begin they share every page, the last one too, though it may not be full.
        pages = -(-len(ids) // PAGE) * LAYERS * KV_HEADS
        rows = PAGE * 2 * HEAD_DIM * 4
        saved = result["pool"]["saved_when_forked"] / ((forks - 1) * pages)
        summary = HEAD_DIM * 2 * 4 if "quest" in name else 0
        check(saved == rows + summary, f"forks of {name}: a shared page saves {saved} bytes, not {rows + summary}")
        if name in ("dense", "quest"):  # full prompt pages are never written again
            full = len(ids) // PAGE * LAYERS * KV_HEADS * (rows + summary) * (forks - 1)
            check(result["pool"]["saved_when_first_ended"] == full, f"forks of {name}: saved at the end")

        if name == "dense":
            logits = engine.reference(CONFIG, weights, ids)[0][-1]
            best = list(np.argsort(-logits)[:forks])
            check([s["tokens"][0] for s in sequences] == best, "forks: not the likeliest first tokens")
            for s in sequences:
                scores = engine.reference(CONFIG, weights, ids + s["tokens"])[0][len(ids) - 1 : -1]
                chosen = scores[np.arange(40), s["tokens"]]
                error = engine.relative_error(np.array(s["logits"]), chosen)
                check(error < engine.TOLERANCE, f"forks: logits differ by {error:.1e}")
                check(np.all(chosen[1:] >= scores[1:].max(-1) - engine.TOLERANCE * np.abs(scores).max()), "forks: not greedy")
    runs.refused("too many forks", [*POLICIES["dense"], "--prompt-ids", "1", "--fork", 271], "--fork", "270")
    print("forks: checked")


# ------------------------------------------------------------------------------------------------------- guessing ahead
def check_speculation(runs, shipped):
    """The same tokens as without guesses. Guesses are read in chunks, so logits may be rounded otherwise."""
    prompts = random_prompts(3, 41) + [",".join(map(str, [5, 6, 7, 8, 9] * 6))]
    for name, policy in POLICIES.items():
        drafted = accepted = 0
        for prompt in prompts:
            arguments = [*policy, "--prompt-ids", prompt, "--max-new", 80]
            plain = runs(f"no guesses, {name}", *arguments)
            for ahead in (1, 4, 13):
                what = f"{ahead} guesses, {name}"
                guessed = runs(what, *arguments, "--speculative", ahead)
                if guessed is None:
                    continue
                check(guessed["tokens"] == plain["tokens"], f"{what}: other tokens")
                error = engine.relative_error(np.array(guessed["logits"]), np.array(plain["logits"]))
                check(error < engine.TOLERANCE, f"{what}: logits differ by {error:.1e}")
                check(guessed["evicted_tokens"] == plain["evicted_tokens"], f"{what}: evictions")
                check(guessed["accepted_drafts"] <= guessed["drafted_tokens"], f"{what}: counts")
                drafted += guessed["drafted_tokens"]
                accepted += guessed["accepted_drafts"]
        check(0 < accepted < drafted, f"guesses under {name}: {accepted} of {drafted} right, so not both ways were taken")
        print(f"guesses under {name}: {accepted} of {drafted} right")

    # A trained model, in a batch, forked.
    problem = json.loads((shipped / "problems.jsonl").read_text().splitlines()[0])
    trained = Runs(runs.binary, runs.out.parent, shipped)
    arguments = ["--policy", "raas", "--budget", 256, "--prompt", problem["prompt"], "--max-new", 200, "--fork", 3]
    plain, guessed = trained("trained", *arguments), trained("trained, guesses", *arguments, "--speculative", 6)
    for a, b in zip(plain["sequences"], guessed["sequences"], strict=True):
        check(a["tokens"] == b["tokens"], "trained, guesses: other tokens")
        check(b["accepted_drafts"] > 0, "trained, guesses: none was right")
    print("guesses: checked")


# ------------------------------------------------------------------------------------------------------- save and load
def check_saving(runs, root):
    prompt = random_prompts(1, 51)[0]
    file = root / "sequence.saved"
    for name, policy in POLICIES.items():
        for dtype, ahead in (("f32", 0), ("bf16", 0), ("f32", 3)):
            what = f"saving {name} in {dtype}, {ahead} guesses"
            arguments = [*policy, "--dtype", dtype, "--speculative", ahead]
            begin = [*arguments, "--prompt-ids", prompt]
            whole = runs(what, *begin, "--max-new", 70)
            parts = [runs(what, *begin, "--max-new", 11, "--max-tokens", 120, "--save", file)]
            parts.append(runs(what, *arguments, "--load", file, "--max-new", 29, "--save", file))
            parts.append(runs(what, *arguments, "--load", file, "--max-new", 30))
            if None in parts:
                continue
            tokens = [token for part in parts for token in part["tokens"]]
            logits = [logit for part in parts for logit in part["logits"]]
            check(tokens == whole["tokens"], f"{what}: other tokens")
            if ahead == 0:
                check(logits == whole["logits"], f"{what}: other logits")
            check(parts[-1]["evicted_tokens"] == whole["evicted_tokens"], f"{what}: evictions")

    raas = POLICIES["raas"]
    runs("to be refused", *raas, "--prompt-ids", prompt, "--max-new", 20, "--save", file)
    good = file.read_bytes()
    load = ["--load", file, "--max-new", 5]
    runs.refused("load beyond the room", [*POLICIES["raas"], "--load", file, "--max-new", 10**6], "--max-tokens")
    for change in (["--policy", "h2o", "--budget", BUDGET], ["--policy", "raas", "--budget", BUDGET + PAGE],
                   [*raas, "--dtype", "f16"], [*raas, "--set", "alpha=0.5"], [*raas, "--dense-layers", 1],
                   [*raas, "--budgets", "pyramid"], ["--policy", "dense"]):
        runs.refused(f"load with {change}", [*change, *load], "")
    for what, data in (("empty", b""), ("junk", b"junk"), ("another JSON", b'{"a":1}\n'), ("cut", good[:-9]),
                       ("cut early", good[: good.index(b"\n") + 20]), ("no newline", b"{" * 1000),
                       ("a flipped bit", good[:-200] + bytes([good[-200] ^ 4]) + good[-199:]),
                       ("a flipped bit of the hidden state", good[: len(head := good[: good.index(b"\n") + 1]) + 9] +
                        bytes([good[len(head) + 9] ^ 1]) + good[len(head) + 10 :]),
                       ("another token", good.replace(b'"tokens":[', b'"tokens":[1,', 1))):
        file.write_bytes(data)
        runs.refused(f"load {what}", [*raas, *load], "")
    file.unlink()
    runs.refused("load nothing", [*raas, *load], "no such file")
    file.write_bytes(good)
    other = root / "other"
    engine.write_model(other, CONFIG, "F32", 1, 99)
    run = decode(runs.binary, "--model", other, "--page-size", PAGE, *raas, *load)
    check(run.returncode == 2 and "another model" in run.stderr, f"load with another model: {run.stderr.strip()!r}")
    print("saving: checked")


# ------------------------------------------------------------------------------------------------------ text and errors
def check_text(runs, root):
    """What is shown as it comes is the text of the JSON, in UTF-8, whatever bytes the model chooses."""
    for seed, text in enumerate(("abc é 日本", "x\n y 😀", "z")):
        result = decode(runs.binary, *runs.common, *POLICIES["dense"], "--prompt", text, "--max-new", 60)
        answer = json.loads(runs.out.read_text())
        check(result.returncode == 0, f"text {text!r}: {result.stderr.strip()}")
        check(answer["prompt_ids"] == list(text.encode()), f"text {text!r}: became {answer['prompt_ids']}")
        only = answer["policies"][0]
        expected = b"".join(bytes([t]) if t < 256 else f"<{t}>".encode() for t in only["tokens"]).decode("utf-8", "replace")
        check(only["text"] == expected, f"text {text!r}: {only['text']!r}, not {expected!r}")
        check(result.stdout.startswith(expected + "\n\npolicy "), f"text {text!r}: shown as {result.stdout[:200]!r}")
    run = decode(runs.binary, *runs.common, *POLICIES["dense"], "--prompt", b"a\xff".decode("utf-8", "surrogateescape"))
    check(run.returncode == 2 and "not UTF-8" in run.stderr, f"a prompt that is not UTF-8: {run.stderr.strip()!r}")

    ids = ["--prompt-ids", "1,2"]
    dense, saved = POLICIES["dense"], root / "x"
    for arguments, *words in [
        ([*dense, *ids, "--prompt", "a"], "--prompt"),
        ([*dense, *ids, "--load", saved], "--load"),
        ([*dense, *ids, *ids, "--save", saved], "--save", "several"),
        ([*dense, *ids, "--fork", 2, "--save", saved], "--save", "--fork"),
        ([*dense, "--load", saved, "--fork", 2], "--load", "--fork"),
        (["--compare", "dense", *ids, "--save", saved], "--save", "--compare"),
        ([*dense, *ids, "--save", saved, "--pool-bytes", 10**6], "--save", "--pool-bytes"),
        ([*dense, *ids, "--save", runs.out], "--save", "--json"),
        ([*dense, *ids, "--save", root / "no" / "such" / "place"], "place"),
        ([*dense, *ids, *ids, "--record-trace", saved], "--record-trace"),
        ([*dense, *ids, "--fork", 2, "--resident", saved], "--resident"),
        ([*dense, *ids, "--speculative", 2, "--record-trace", saved], "--speculative"),
        ([*dense, "--load", saved, "--max-tokens", 10], "--max-tokens"),
        ([*dense, *ids, "--max-new", 9, "--max-tokens", 10], "room for 10"),
        ([*dense, *ids, "--speculative", 64], "--speculative"),
        ([*dense, *ids, "--fork", 0], "--fork"),
        ([*dense, *ids, "--pool-bytes", 0], "--pool-bytes"),
        ([*dense, *ids, "--prompt-chunk", 0], "--prompt-chunk"),
        ([*dense, *ids, "--prompt-chunk", 65], "--prompt-chunk"),
    ]:
        runs.refused("arguments " + " ".join(map(str, arguments)), arguments, *words)
    print("text and errors: checked")


def check_budgets(runs, root):
    """A pyramid gives each layer its budget of the same sum, and a batch finds the pages for it."""
    # 24 pages of two layers: one each, and of 22 more 1.95 and 0.05 of the mean, 21.45 and 0.55, to whole pages.
    prompts, most = random_prompts(3, 77), (22 * PAGE, 2 * PAGE)
    for policy in ("streaming_llm", "h2o"):
        arguments = [*POLICIES[policy], "--budgets", "pyramid", "--max-new", 90]
        alone = []
        for prompt in prompts:
            alone.append(runs(f"pyramid of {policy}", *arguments, "--prompt-ids", prompt, "--resident", root / "budgets")["tokens"])
            for layer in range(LAYERS):
                tensors, _ = read_safetensors(root / "budgets" / f"layer_{layer}.safetensors")
                _, shape, data = tensors["resident"]
                held = np.frombuffer(data, np.uint8).reshape(shape).sum(axis=2)
                check(held.max() == most[layer], f"pyramid of {policy}, layer {layer}: {held.max()} held, not {most[layer]}")
        together = runs(f"pyramid of {policy}, batch", *arguments, *(a for p in prompts for a in ("--prompt-ids", p)))
        got = [sequence["tokens"] for sequence in together["sequences"]]
        check(got == alone, f"pyramid of {policy}: a batch decodes something else")
    runs.refused("a pyramid of one page a layer", ["--policy", "h2o", "--budget", PAGE - 1, "--budgets", "pyramid",
                                                   "--prompt-ids", "1,2"], "total_tokens")
    print("budgets of layers: checked")


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    binary = str(pathlib.Path(sys.argv[1]).resolve())
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(temporary)
        weights = engine.write_model(root / "model", CONFIG, "F32", 1, 5)
        bytes_alone = {tokenizer.CHARACTER[byte]: byte for byte in range(256)}
        (root / "model" / "tokenizer.json").write_text(json.dumps({
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}, "decoder": {"type": "ByteLevel"},
            "model": {"type": "BPE", "vocab": bytes_alone, "merges": []}}))
        runs = Runs(binary, root, root / "model")
        check_text(runs, root)
        check_batches(runs, root)
        check_forks(runs, weights)
        check_speculation(runs, pathlib.Path(sys.argv[2]))
        check_saving(runs, root)
        check_budgets(runs, root)
    print("all checks passed" if not engine.failures else f"{len(engine.failures)} checks failed")
    sys.exit(1 if engine.failures else 0)


if __name__ == "__main__":
    main()
