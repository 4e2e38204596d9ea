#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks examples/decode against a forward pass written here in numpy, in float64, over whole sequences at once.

    check_engine.py path/to/decode

Tiny random models are written to a temporary directory: Llama and Qwen2, tied and untied heads, biases, explicit
head_dim, every RoPE variant, f32, f16 and bf16 weights, one file and shards. For each, the engine's q, k and v of every
layer and token, the logits of its choices and the choices themselves must agree with the reference. Then directories
that the engine must refuse are tried. Exit code 0 when all agree.
"""
import json
import math
import pathlib
import struct
import subprocess
import sys
import tempfile

import numpy as np

PROMPT_TOKENS, NEW_TOKENS = 20, 60
TOLERANCE = 2e-4  # relative to the largest magnitude; float32 against float64


# ---------------------------------------------------------------------------------------------------- safetensors files
def encode(array, dtype):
    """The stored bytes, and the values that a reader gets back from them."""
    single = array.astype(np.float32)
    if dtype == "F32":
        return single.tobytes(), single.astype(np.float64)
    if dtype == "F16":
        half = single.astype(np.float16)
        return half.tobytes(), half.astype(np.float64)
    bits = single.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded.tobytes(), (rounded.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def write_safetensors(path, tensors):
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))


def read_safetensors(path):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    kinds = {"F32": np.float32, "U8": np.uint8}
    arrays = {}
    for name, entry in header.items():
        begin, end = (8 + length + at for at in entry["data_offsets"])
        arrays[name] = np.frombuffer(raw[begin:end], kinds[entry["dtype"]]).reshape(entry["shape"])
    return arrays, metadata


# ------------------------------------------------------------------------------------------------------- a random model
def write_model(directory, config, dtype, shards, seed, embedding_scale=1.0):
    """Writes the model directory; returns the weights as stored. A wide model with a tied head repeats its last token,
    unless the embeddings are small beside what the layers add."""
    random = np.random.default_rng(seed)
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    qwen = config["model_type"] == "qwen2"
    qkv_bias, output_bias = qwen or config.get("attention_bias", False), config.get("attention_bias", False)
    mlp_bias = config.get("mlp_bias", False)

    arrays = {"model.embed_tokens.weight": random.normal(0, embedding_scale, (vocab, hidden))}

    def linear(name, outputs, inputs, bias):
        arrays[name + ".weight"] = random.normal(0, 1.5 / math.sqrt(inputs), (outputs, inputs))
        if bias:
            arrays[name + ".bias"] = random.normal(0, 0.5, outputs)

    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        linear(prefix + "self_attn.q_proj", heads * head_dim, hidden, qkv_bias)
        linear(prefix + "self_attn.k_proj", kv_heads * head_dim, hidden, qkv_bias)
        linear(prefix + "self_attn.v_proj", kv_heads * head_dim, hidden, qkv_bias)
        linear(prefix + "self_attn.o_proj", hidden, heads * head_dim, output_bias)
        linear(prefix + "mlp.gate_proj", inner, hidden, mlp_bias)
        linear(prefix + "mlp.up_proj", inner, hidden, mlp_bias)
        linear(prefix + "mlp.down_proj", hidden, inner, mlp_bias)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            arrays[prefix + norm + ".weight"] = random.normal(1, 0.2, hidden)
    arrays["model.norm.weight"] = random.normal(1, 0.2, hidden)
    if not config.get("tie_word_embeddings", False):
        linear("lm_head", vocab, hidden, False)

    stored, weights = {}, {}
    for name, array in arrays.items():
        data, weights[name] = encode(array, dtype)
        weights[name] = weights[name].reshape(array.shape)
        stored[name] = (dtype, array.shape, data)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_safetensors(directory / "model.safetensors", stored)
    else:
        names, weight_map = list(stored), {}
        for shard in range(shards):
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: stored[name] for name in names[shard::shards]}
            weight_map.update({name: file for name in part})
            write_safetensors(directory / file, part)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weights


# -------------------------------------------------------------------------------------------------- the reference model
def rope_angles(config, head_dim, tokens):
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    frequencies = 1.0 / theta ** (np.arange(0, head_dim, 2) / head_dim)
    if rope.get("rope_type") == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        original, factor = rope["original_max_position_embeddings"], rope["factor"]
        for i, frequency in enumerate(frequencies):
            wavelength = 2 * math.pi / frequency
            if wavelength > original / low:
                frequencies[i] = frequency / factor
            elif wavelength >= original / high:
                smooth = (original / wavelength - low) / (high - low)
                frequencies[i] = (1 - smooth) * frequency / factor + smooth * frequency
    return np.outer(np.arange(tokens), frequencies)


def rotate(x, angles):
    """x [tokens, heads, head_dim], Hugging Face's rotate_half."""
    half = x.shape[-1] // 2
    cos, sin = (np.concatenate([f(angles)] * 2, axis=-1)[:, None, :] for f in (np.cos, np.sin))
    return x * cos + np.concatenate([-x[..., half:], x[..., :half]], axis=-1) * sin


def reference(config, weights, ids):
    """Logits of every position, and per layer (q, k, v) after RoPE."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    tokens, epsilon = len(ids), config["rms_norm_eps"]
    angles = rope_angles(config, head_dim, tokens)

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weights[name + ".weight"]

    def linear(x, name):
        return x @ weights[name + ".weight"].T + weights.get(name + ".bias", 0.0)

    x, layers = weights["model.embed_tokens.weight"][ids], []
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        y = norm(x, prefix + "input_layernorm")
        q = rotate(linear(y, prefix + "self_attn.q_proj").reshape(tokens, heads, head_dim), angles)
        k = rotate(linear(y, prefix + "self_attn.k_proj").reshape(tokens, kv_heads, head_dim), angles)
        v = linear(y, prefix + "self_attn.v_proj").reshape(tokens, kv_heads, head_dim)
        layers.append((q, k, v))
        out = np.empty_like(q)
        for head in range(heads):
            kv = head // (heads // kv_heads)
            scores = q[:, head] @ k[:, kv].T / math.sqrt(head_dim)
            scores[np.triu_indices(tokens, 1)] = -np.inf
            share = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = share / share.sum(-1, keepdims=True) @ v[:, kv]
        x = x + linear(out.reshape(tokens, -1), prefix + "self_attn.o_proj")
        y = norm(x, prefix + "post_attention_layernorm")
        gate = linear(y, prefix + "mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, prefix + "mlp.up_proj"), prefix + "mlp.down_proj")
    head = "model.embed_tokens" if config.get("tie_word_embeddings", False) else "lm_head"
    return norm(x, "model.norm") @ weights[head + ".weight"].T, layers


# ---------------------------------------------------------------------------------------------------------- the checks
failures = []


def check(condition, what):
    if not condition:
        failures.append(what)
        print("FAILED: " + what)


def decode(binary, *arguments):
    return subprocess.run([binary, *map(str, arguments)], capture_output=True, text=True)


def relative_error(got, expected):
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def check_model(binary, root, name, config, dtype, shards, seed):
    directory, out = root / name, root / (name + ".json")
    weights = write_model(directory, config, dtype, shards, seed)
    prompt = np.random.default_rng(seed + 1).integers(0, config["vocab_size"], PROMPT_TOKENS)
    arguments = ["--model", directory, "--prompt-ids", ",".join(map(str, prompt)), "--max-new", NEW_TOKENS]
    run = decode(binary, *arguments, "--policy", "dense", "--json", out, "--record-trace", root / (name + ".trace"))
    check(run.returncode == 0, f"{name}: decode failed: {run.stderr.strip()}")
    if run.returncode != 0:
        return
    result = json.loads(out.read_text())["policies"][0]
    generated = result["tokens"]
    logits, layers = reference(config, weights, list(prompt) + generated)
    scores = logits[PROMPT_TOKENS - 1 : -1]  # row i chose generated token i
    scale = np.abs(scores).max()
    chosen = scores[np.arange(len(generated)), generated]
    check(len(generated) == NEW_TOKENS, f"{name}: {len(generated)} tokens generated")
    check(np.all(chosen >= scores.max(-1) - TOLERANCE * scale), f"{name}: a token is not the reference's best")
    logit_error = relative_error(np.array(result["logits"]), chosen)
    check(logit_error < TOLERANCE, f"{name}: logits differ by {logit_error:.1e}")
    errors = []
    for layer, expected in enumerate(layers):
        arrays, metadata = read_safetensors(root / (name + ".trace") / f"layer_{layer}.safetensors")
        check(metadata["prompt_tokens"] == str(PROMPT_TOKENS), f"{name}: prompt_tokens of the trace")
        for tensor, array in zip("qkv", expected):
            same_shape = arrays[tensor].shape == array.shape
            check(same_shape, f"{name}: layer {layer} {tensor} has shape {arrays[tensor].shape}, not {array.shape}")
            errors.append(relative_error(arrays[tensor], array) if same_shape else math.inf)
    check(max(errors) < TOLERANCE, f"{name}: q, k or v differ by {max(errors):.1e}")
    print(f"{name}: logits within {logit_error:.1e}, q/k/v within {max(errors):.1e}, "
          f"{len(set(generated))} distinct tokens")

    # Nor do threads change anything.
    run = decode(binary, *arguments, "--policy", "raas", "--budget", 28, "--page-size", 4, "--json", out)
    threaded = root / (name + ".threaded.json")
    decode(binary, *arguments, "--policy", "raas", "--budget", 28, "--page-size", 4, "--threads", 3, "--json", threaded)
    alone, together = (json.loads(path.read_text())["policies"][0] for path in (out, threaded))
    check(together["tokens"] == alone["tokens"] and together["logits"] == alone["logits"], f"{name}: three threads differ")

    # A budget that is never reached changes nothing, whatever the policy.
    run = decode(binary, *arguments, "--compare", "h2o,quest,raas,raas+quest", "--budget", 4096, "--page-size", 4,
                 "--json", out)
    check(run.returncode == 0, f"{name}: comparison failed: {run.stderr.strip()}")
    if run.returncode == 0:
        policies = json.loads(out.read_text())["policies"]
        for other in policies:
            same = other["tokens"] == generated and other["logits"] == policies[0]["logits"]
            check(same, f"{name}: {other['policy']} differs from dense although its budget was never reached")

    # The first token that repeats none before it, taken as end of text, ends the text.
    stop = next(i for i in range(1, NEW_TOKENS) if generated[i] not in generated[:i])
    for eos in (generated[stop], [config["vocab_size"] + 5, generated[stop]]):
        (directory / "config.json").write_text(json.dumps({**config, "eos_token_id": eos}))
        decode(binary, *arguments, "--policy", "dense", "--json", out)
        tokens = json.loads(out.read_text())["policies"][0]["tokens"]
        check(tokens == generated[: stop + 1], f"{name}: eos_token_id {eos}")
    (directory / "config.json").write_text(json.dumps(config))


def check_prompt_chunks(binary, root, config):
    """A prompt read in chunks is the prompt read token by token, but for rounding; beyond the budget it is that anyway."""
    directory, out = root / "chunks", root / "chunks.json"
    weights = write_model(directory, config, "F32", 1, 11)
    prompt = list(map(int, np.random.default_rng(12).integers(0, config["vocab_size"], 150)))
    arguments = ["--model", directory, "--prompt-ids", ",".join(map(str, prompt)), "--max-new", 20, "--page-size", 4,
                 "--json", out]
    for policy in (["dense"], ["h2o", "--budget", 64], ["quest", "--budget", 72], ["quest", "--budget", 4096]):
        results = {}
        for chunk in (1, 7, 64):
            run = decode(binary, *arguments, "--policy", *policy, "--prompt-chunk", chunk)
            check(run.returncode == 0, f"chunks of {chunk}, {policy}: {run.stderr.strip()}")
            results[chunk] = json.loads(out.read_text())["policies"][0]
        for chunk in (7, 64):
            what = f"chunks of {chunk}, {policy}"
            check(results[chunk]["tokens"] == results[1]["tokens"], f"{what}: other tokens")
            error = relative_error(np.array(results[chunk]["logits"]), np.array(results[1]["logits"]))
            check(error < TOLERANCE, f"{what}: logits differ by {error:.1e}")
            check(error > 0, f"{what}: not a bit differs, so nothing was read in chunks")
            check(results[chunk]["evicted_tokens"] == results[1]["evicted_tokens"], f"{what}: evictions")
        if policy == ["dense"]:
            tokens = results[64]["tokens"]
            expected = reference(config, weights, prompt + tokens)[0][len(prompt) - 1 : -1]
            error = relative_error(np.array(results[64]["logits"]), expected[np.arange(len(tokens)), tokens])
            check(error < TOLERANCE, f"chunks: logits differ from the reference by {error:.1e}")
    print("prompt chunks: checked")


def check_refusals(binary, root, config):
    """Each directory differs from a good one in one point and must be refused in one sentence that names it."""
    base = root / "refused"
    write_model(base, config, "F32", 1, 7)
    good = ["--model", base, "--policy", "raas", "--budget", 64, "--page-size", 4, "--max-new", 4]
    ids = ["--prompt-ids", "1,2,3"]

    def refused(what, arguments, word):
        run = decode(binary, *arguments)
        check(run.returncode == 2, f"{what}: exit code {run.returncode}")
        check(run.stderr.count("\n") == 1 and word in run.stderr, f"{what}: said {run.stderr.strip()!r}")

    check(decode(binary, *good, *ids).returncode == 0, "the good directory is refused")
    for change, word in [
        ({"model_type": "gpt2"}, "model_type"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": 5}, "rope_scaling"),
        ({"sliding_window": 64}, "sliding"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_hidden_layers": 3}, "model.layers.2"),
        ({"num_hidden_layers": 65537}, "num_hidden_layers"),
        ({"hidden_size": 56}, "shape"),
        ({"hidden_size": -48}, "hidden_size"),
        ({"hidden_size": 48.5}, "hidden_size"),
        ({"vocab_size": 10**30}, "vocab_size"),
        ({"head_dim": 9}, "head_dim"),
        ({"tie_word_embeddings": False}, "lm_head.weight"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"eos_token_id": True}, "eos_token_id"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ]:
        (base / "config.json").write_text(json.dumps({**config, **change}))
        refused(f"config {change}", good + ids, word)
    for text, word in [("[]", "object"), ("{", "JSON"), ("[" * 10**5, "nested"), ('{"a":1,"a":2}', "twice"),
                       ("", "JSON")]:
        (base / "config.json").write_text(text)
        refused(f"config {text[:20]!r}", good + ids, word)
    (base / "config.json").write_text(json.dumps(config))

    weights = (base / "model.safetensors").read_bytes()
    for what, data, word in [
        ("truncated weights", weights[:-10], "data_offsets"),
        ("empty weights", b"", "few"),
        ("weights with a long header", struct.pack("<Q", 2**60) + weights[8:], "header length"),
    ]:
        (base / "model.safetensors").write_bytes(data)
        refused(what, good + ids, word)
    (base / "model.safetensors").unlink()
    refused("no weights", good + ids, "no such file")
    index = base / "model.safetensors.index.json"
    for shard, word in [("../refused/x.safetensors", "plain file name"), ("gone.safetensors", "missing"),
                        ("..", "plain")]:
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
        refused(f"shard {shard}", good + ids, word)
    index.unlink()
    (base / "model.safetensors").write_bytes(weights)

    refused("no tokenizer", good + ["--prompt", "a b"], "tokenizer.json")
    tokenizer = {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "?"},
                 "pre_tokenizer": {"type": "WhitespaceSplit"}}
    for change, word in [
        ({"model": {"type": "BPE", "vocab": {}}}, "merges"),
        ({"model": {"type": "Unigram", "vocab": []}}, "--prompt-ids"),
        ({"pre_tokenizer": {"type": "ByteLevel"}}, "--prompt-ids"),
        ({"normalizer": {"type": "Lowercase"}}, "--prompt-ids"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 10**6}}}, "vocab_size"),
        ({"model": {"type": "WordLevel", "vocab": {"a": "x"}}}, "vocab_size"),
        ({"model": {"type": "WordLevel", "vocab": {"b": 0}}}, "'a'"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 0}}}, "share"),
        ({"added_tokens": [{"id": 5, "content": "a"}]}, "two ids"),
    ]:
        (base / "tokenizer.json").write_text(json.dumps({**tokenizer, **change}))
        refused(f"tokenizer {change}", good + ["--prompt", "a b"], word)
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    check(decode(binary, *good, "--prompt", "a b a").returncode == 0, "the good tokenizer is refused")

    for arguments, word in [
        (good + ["--prompt-ids", "1,x"], "--prompt-ids"),
        (good + ["--prompt-ids", "1,,2"], "--prompt-ids"),
        (good + ["--prompt-ids", "99999"], "vocab_size"),
        (good + ["--prompt", ""], "empty"),
        (good, "--prompt"),
        (good + ids + ["--dense-layers", 3], "--dense-layers"),
        (good + ids + ["--dtype", "f64"], "--dtype"),
        (good + ids + ["--no-such-option"], "--no-such-option"),
        (good + ids + ["--set", "alpha"], "--set"),
        (good + ids + ["--set", "no_such_key=1"], "no_such_key"),
        (good + ids + ["--set", "alpha=x"], "alpha"),
        (good + ids + ["--compare", "dense,no_such_policy"], "no_such_policy"),
        (good + ids + ["--json", base], "directory"),
        (["--model", base, "--policy", "raas", *ids], "--budget"),
        (["--model", base, "--budget", 64, *ids], "--policy"),
        (["--model", base, "--policy", "raas", "--budget", 2, "--page-size", 4, *ids], "budget"),
        (["--model", base, "--policy", "raas", "--budget", 0, *ids], "--budget"),
        (good + ids + ["--threads", 0], "--threads"),
        (["--model", base, "--policy", "raas", "--budget", 64, "--page-size", 0, *ids], "page_size"),
        (["--model", base, "--policy", "raas", "--budget", 8, "--page-size", 4, "--prompt-ids", "1,2,3,4,5,6"],
         "prompt"),
        (good + ids + ["--policy", "dense,raas"], "--policy"),
        (["--model", root / "nowhere", "--policy", "dense", *ids], "no such file"),
    ]:
        refused("arguments " + " ".join(map(str, arguments[2:])), arguments, word)
    print("refusals: checked")


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    binary = str(pathlib.Path(sys.argv[1]).resolve())
    llama = {"model_type": "llama", "vocab_size": 64, "hidden_size": 48, "intermediate_size": 80,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
             "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
             "hidden_act": "silu", "eos_token_id": None}
    qwen = {"model_type": "qwen2", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
            "num_attention_heads": 8, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
            "tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": 32, "max_window_layers": 3}
    llama3 = {"model_type": "llama", "vocab_size": 80, "hidden_size": 64, "intermediate_size": 64,
              "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": None, "rms_norm_eps": 1e-5,
              "rope_theta": 500.0, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False,
              "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                               "original_max_position_embeddings": 64}}
    newer = {**llama, "num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 10, "rope_scaling": None,
             "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(temporary)
        check_model(binary, root, "llama-tied-f32", llama, "F32", 1, 1)
        check_model(binary, root, "qwen2-bias-bf16-shards", qwen, "BF16", 3, 2)
        check_model(binary, root, "llama3-rope-f16", llama3, "F16", 1, 3)
        check_model(binary, root, "llama-rope-parameters", newer, "F32", 2, 4)
        check_prompt_chunks(binary, root, qwen)
        check_refusals(binary, root, llama)
    print("all checks passed" if not failures else f"{len(failures)} checks failed")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
