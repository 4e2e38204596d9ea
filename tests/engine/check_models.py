#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks examples/decode with models that have the config.json, the tensor names, the heads and the chat prompts of those
that people run, and random weights: Qwen2.5-0.5B-Instruct, DeepSeek-R1-Distill-Qwen-1.5B, Llama-3.2-1B-Instruct.

    check_models.py path/to/decode [README.md]
    check_models.py path/to/decode --full-size DIR   # by hand: writes Qwen2.5-0.5B at its full size (1 GB) and decodes

Widths and heads are the real ones; layers, vocabulary and the inner width of the MLP are smaller. Logits and tokens are
compared with check_engine's forward pass, prompts with check_tokenizer's tokenizer, sizes with arithmetic done here.
Then come files that must be refused. Exit code 0 when all agree.
"""
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import numpy as np

import check_engine as engine
import check_tokenizer as tokenizer
from check_engine import check, decode

LAYERS, VOCAB, INNER = 2, 700, 96

QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.43.1",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151936}
DEEPSEEK = {
    **QWEN, "eos_token_id": 151643, "hidden_size": 1536, "intermediate_size": 8960, "max_position_embeddings": 131072,
    "num_attention_heads": 12, "num_hidden_layers": 28, "rope_theta": 10000, "sliding_window": 4096,
    "tie_word_embeddings": False, "transformers_version": "4.44.0", "use_mrope": False}
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0",
    "use_cache": True, "vocab_size": 128256}
# As transformers 5 saves the first.
QWEN_SAVED_ANEW = {key: value for key, value in QWEN.items() if key not in ("rope_theta", "sliding_window", "torch_dtype")}
QWEN_SAVED_ANEW |= {"dtype": "bfloat16", "layer_types": ["full_attention"] * 24, "pad_token_id": None, "sliding_window": None,
                    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "transformers_version": "5.0.0"}

# Numbers in the published weights.
PARAMETERS = {"qwen": (QWEN, 494_032_768), "deepseek": (DEEPSEEK, 1_777_088_000), "llama": (LLAMA, 1_235_814_400)}

QWEN_CHAT = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
             "<|im_start|>user\nWhat is 17 * 23?<|im_end|>\n<|im_start|>assistant\n")
DEEPSEEK_CHAT = "<｜begin▁of▁sentence｜><｜User｜>What is 17 * 23?<｜Assistant｜><think>\n"
LLAMA_CHAT = ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is 17 * 23?<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n")
SPECIAL = {
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "deepseek": ["<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>"],
    "llama": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]}
NOT_SPECIAL = {"qwen": ["<tool_call>", "</tool_call>"], "deepseek": ["<think>", "</think>"], "llama": []}


def small(config):
    config = {**config, "num_hidden_layers": LAYERS, "vocab_size": VOCAB, "intermediate_size": INNER}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:LAYERS]
    return config


def write_tokenizer(directory, family, begins_each_text):
    """In the family's manner. begins_each_text: a word that the file's post_processor puts before texts, or None."""
    rng = random.Random(family)
    corpus = [QWEN_CHAT, DEEPSEEK_CHAT, LLAMA_CHAT] + [tokenizer.random_text(rng) for _ in range(50)]
    merges = tokenizer.learn_merges(tokenizer.LLAMA3, corpus, 250)
    description = tokenizer.describe("llama3" if family == "llama" else "qwen2", merges, family == "qwen", rng)
    first = max(description["model"]["vocab"].values()) + 1
    words = SPECIAL[family] + NOT_SPECIAL[family]
    description["added_tokens"] = [
        {"id": first + n, "content": word, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": word in SPECIAL[family]} for n, word in enumerate(words)]
    description["post_processor"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    if begins_each_text is not None:
        begin = {"id": begins_each_text, "type_id": 0}
        description["post_processor"] = {
            "type": "TemplateProcessing", "single": [{"SpecialToken": begin}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [], "special_tokens": {begins_each_text: {"id": begins_each_text, "tokens": [begins_each_text],
                                                              "ids": [first + words.index(begins_each_text)]}}}
    (directory / "tokenizer.json").write_text(json.dumps(description))
    check(first + len(words) <= VOCAB, f"{family}: the tokenizer has more words than the model")
    return tokenizer.Reference(description)


# ------------------------------------------------------------------------------------------------------ what is decoded
def check_model(binary, root, name, config, dtype, shards, family, chat, seed):
    """The reference's logits and tokens after a chat prompt, and an end at each token that ends a turn."""
    directory, out = root / name, root / (name + ".json")
    weights = engine.write_model(directory, small(config), dtype, shards, seed, 0.1)
    begins = chat.split(">")[0] + ">"
    encoder = write_tokenizer(directory, family, None)
    expected_ids = encoder.encode(chat)
    for word in SPECIAL[family][1:]:
        if word in chat:
            check(encoder.added[word] in expected_ids, f"{name}: the reference splits {word}")
    new = 40

    def run(*more):
        result = decode(binary, "--model", directory, "--prompt", chat, "--max-new", new, "--json", out, *more)
        check(result.returncode == 0, f"{name}: {result.stderr.strip()}")
        if result.returncode != 0:
            return None, result
        return json.loads(out.read_text()), result

    (directory / "config.json").write_text(json.dumps({**small(config), "eos_token_id": None}))
    answer, _ = run("--policy", "dense")
    if answer is None:
        return
    check(answer["prompt_ids"] == expected_ids, f"{name}: the prompt became {answer['prompt_ids']}, not {expected_ids}")
    tokens, logits = answer["policies"][0]["tokens"], np.array(answer["policies"][0]["logits"])
    scores = engine.reference(small(config), weights, expected_ids + tokens)[0][len(expected_ids) - 1 : -1]
    chosen = scores[np.arange(len(tokens)), tokens]
    error = engine.relative_error(logits, chosen)
    check(len(tokens) == new, f"{name}: {len(tokens)} tokens")
    check(error < engine.TOLERANCE, f"{name}: logits differ by {error:.1e}")
    check(np.all(chosen >= scores.max(-1) - engine.TOLERANCE * np.abs(scores).max()), f"{name}: a token is not the best")
    print(f"{name}: logits within {error:.1e}, {len(set(tokens))} distinct tokens after {len(expected_ids)}")

    answer, _ = run("--compare", "raas,raas+quest", "--budget", 4096)
    check(all(policy["tokens"] == tokens for policy in answer["policies"]), f"{name}: other tokens under a budget never reached")

    # The list of generation_config.json ends texts, and config.json's token no longer does.
    stop = next(i for i in range(1, new) if tokens[i] not in tokens[:i])
    (directory / "config.json").write_text(json.dumps({**small(config), "eos_token_id": tokens[0]}))
    check(run("--policy", "dense")[0]["policies"][0]["tokens"] == tokens[:1], f"{name}: config.json's eos_token_id")
    generation = {"bos_token_id": 1, "do_sample": True, "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8}
    (directory / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": [VOCAB + 3, tokens[stop]]}))
    ended = run("--policy", "dense")[0]["policies"][0]
    check(ended["tokens"] == tokens[: stop + 1] and ended["stopped"] == "end_of_text", f"{name}: generation_config.json")
    (directory / "generation_config.json").write_text(json.dumps(generation))
    check(run("--policy", "dense")[0]["policies"][0]["tokens"] == tokens[:1], f"{name}: a generation_config.json without")

    # A first token that tokenizer.json puts there too is read once, with or without it in the prompt.
    write_tokenizer(directory, family, begins)
    answer, result = run("--policy", "dense")
    check(answer["prompt_ids"] == expected_ids, f"{name}: a doubled beginning became {answer['prompt_ids']}")
    check(result.stderr.count("\n") == 1 and begins in result.stderr, f"{name}: said {result.stderr!r}")
    chat = chat[len(begins) :]
    answer, result = run("--policy", "dense")
    check(answer["prompt_ids"] == expected_ids and result.stderr == "", f"{name}: a beginning not in the prompt")


# ------------------------------------------------------------------------------------------------------------ estimates
def linear_cache_bytes(config, tokens, element_bytes, page=16):
    """Keys and values alone, whole pages, all layers."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rows = -(-tokens // page) * page * config["num_key_value_heads"] * config["num_hidden_layers"]
    return rows * 2 * head_dim * element_bytes


def check_estimates(binary, root):
    out = root / "estimate.json"

    def estimate(directory, *more):
        run = decode(binary, "--model", directory, "--estimate", "--json", out, *more)
        check(run.returncode == 0, f"estimate {more}: {run.stderr.strip()}")
        return json.loads(out.read_text()), run.stdout

    def close(bytes, rows, what):
        check(rows <= bytes <= 1.3 * rows + 2**20, f"{what}: {bytes} bytes of caches, keys and values are {rows}")

    for name, (config, parameters) in PARAMETERS.items():
        directory = root / ("only-config-" + name)
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(config))
        result, text = estimate(directory, "--max-new", 8000)
        untied = 0 if config["tie_word_embeddings"] else config["vocab_size"] * config["hidden_size"]
        check(result["parameters"] == parameters, f"{name}: {result['parameters']} parameters, not {parameters}")
        check(result["weight_bytes"] == 4 * parameters, f"{name}: weight_bytes")
        check(result["weight_bytes_per_token"] == 4 * (parameters - untied), f"{name}: weight_bytes_per_token")
        check(result["checkpoint_bytes"] is None and str(parameters) in text, f"{name}: said {text}")
        dense = result["policies"][0]
        check(dense["policy"] == "dense", f"{name}: estimates {dense['policy']}")
        close(dense["cache_bytes"], linear_cache_bytes(config, 8000, 4), name)
        check(dense["read_bytes_at_end"] == linear_cache_bytes(config, 8000, 4), f"{name}: read at the end")
        check(result["bytes"] == result["weight_bytes"] + dense["cache_bytes"], f"{name}: bytes")
        check(0 < dense["token_seconds"] and dense["prompt_seconds"] == 0, f"{name}: seconds")
        check(abs(dense["seconds"] - 8000 * dense["token_seconds"]) < 1e-6 * dense["seconds"], f"{name}: seconds in all")

        ids = ",".join(map(str, range(100)))
        result, _ = estimate(directory, "--prompt-ids", ids, "--prompt-ids", "1,2,3", "--fork", 3, "--max-new", 8000,
                             "--compare", "raas,quest", "--budget", 1024, "--dtype", "bf16", "--dense-layers", 2)
        check((result["sequences"], result["prompt_tokens"]) == (6, 100), f"{name}: sequences")
        dense, raas, quest = result["policies"]
        tokens, deep = 8100, {**config, "num_hidden_layers": config["num_hidden_layers"] - 2}
        first_layers = linear_cache_bytes({**config, "num_hidden_layers": 2}, tokens, 2)
        close(dense["cache_bytes"], 6 * linear_cache_bytes(config, tokens, 2), name + ", dense")
        close(raas["cache_bytes"], 6 * (first_layers + linear_cache_bytes(deep, 1024, 2)), name + ", raas")
        close(quest["cache_bytes"], 6 * linear_cache_bytes(config, tokens, 2) * (1 + 1 / 16), name + ", quest")
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        read = 2 * head_dim * 2 * config["num_key_value_heads"] * (2 * tokens + (config["num_hidden_layers"] - 2) * 1024)
        check(raas["read_bytes_at_end"] == quest["read_bytes_at_end"] == read, f"{name}: read under a budget")
        check(result["bytes"] == result["weight_bytes"] + max(dense["cache_bytes"], quest["cache_bytes"]), f"{name}: the most")
        check(0 < raas["prompt_seconds"] and raas["token_seconds"] < dense["token_seconds"], f"{name}: seconds under a budget")

    # Layers that fit no machine are a figure too.
    result, _ = estimate(root / "only-config-qwen", "--max-new", 2**24, "--compare", "quest", "--budget", 1024)
    for policy in result["policies"]:
        close(policy["cache_bytes"], linear_cache_bytes(QWEN, 2**24, 4), "huge caches of " + policy["policy"])

    # With weights beside it: what they take there, and what loading would refuse.
    directory = root / "estimated"
    weights = engine.write_model(directory, small(QWEN), "BF16", 2, 1)
    count = sum(array.size for array in weights.values())
    result, text = estimate(directory, "--max-new", 10)
    check((result["parameters"], result["checkpoint_bytes"]) == (count, 2 * count), f"estimate: {result}")
    check("BF16" in text, f"estimate: said {text}")
    (directory / "config.json").write_text(json.dumps({**small(QWEN), "vocab_size": VOCAB + 1}))
    run = decode(binary, "--model", directory, "--estimate")
    check(run.returncode == 2 and "shape" in run.stderr, f"estimate of other weights: {run.stderr.strip()!r}")
    for more, word in [(["--load", "x"], "--load"), (["--speculative", 3], "--speculative"), (["--pool-bytes", 9], "--pool-bytes"),
                       (["--policy", "raas"], "--budget"), (["--policy", "raas", "--budget", 3], "budget")]:
        run = decode(binary, "--model", root / "only-config-qwen", "--estimate", *more)
        check(run.returncode == 2 and word in run.stderr, f"estimate {more}: {run.stderr.strip()!r}")

    # A model that fits nowhere is told of before its weights are asked for.
    huge = {**QWEN, "num_hidden_layers": 2**16, "hidden_size": 2**21, "num_attention_heads": 2**14, "head_dim": 64}
    (root / "only-config-qwen" / "config.json").write_text(json.dumps(huge))
    run = decode(binary, "--model", root / "only-config-qwen", "--policy", "dense", "--prompt-ids", "1", "--max-new", 1)
    check(run.returncode == 2 and "are available" in run.stderr and "no such file" in run.stderr, f"huge: {run.stderr!r}")
    huge = {**huge, "hidden_size": 2**24, "num_attention_heads": 2**24, "intermediate_size": 2**24}
    (root / "only-config-qwen" / "config.json").write_text(json.dumps(huge))
    run = decode(binary, "--model", root / "only-config-qwen", "--estimate")
    check(run.returncode == 2 and "64 bits" in run.stderr, f"beyond 64 bits: {run.stderr!r}")
    print("estimates: checked")


# ------------------------------------------------------------------------------------------------------------- refusals
def check_refusals(binary, root):
    base = root / "refused"
    engine.write_model(base, small(QWEN), "BF16", 2, 7)
    arguments = ["--model", base, "--policy", "dense", "--prompt-ids", "1,2,3", "--max-new", 2]

    def refused(what, *words):
        run = decode(binary, *arguments)
        check(run.returncode == 2, f"{what}: exit code {run.returncode}")
        said = run.stderr.strip()
        check(run.stderr.count("\n") == 1 and all(word in said for word in words), f"{what}: said {said!r}")

    def accepted(what):
        run = decode(binary, *arguments)
        check(run.returncode == 0, f"{what}: {run.stderr.strip()}")

    accepted("the good directory")
    known, whole = "'llama' and 'qwen2'", "'default' and 'llama3'"
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32768}
    for change, *words in [
        ({"model_type": "qwen2_moe", "num_experts": 60, "num_experts_per_tok": 4}, "'qwen2_moe'", known),
        ({"model_type": "qwen3"}, "'qwen3'", known),
        ({"model_type": "mistral"}, "'mistral'", known),
        ({"model_type": None}, "no model_type", known),
        ({"num_local_experts": 8}, "num_local_experts is '8'", "without experts"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "'awq'", "bf16"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 8}}, "'gptq'", "bf16"),
        ({"quantization_config": {"bits": 4}}, "bits", "bf16"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantization is", "bf16"),
        ({"use_sliding_window": True}, "use_sliding_window true", "'32768'", "the whole text"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is '\"sliding_attention\"'", "'full_attention'"),
        ({"rope_scaling": {"type": "yarn", **yarn}}, "'yarn'", whole),
        ({"rope_scaling": {"rope_type": "yarn", **yarn}}, "'yarn'", whole),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'", whole),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0}}, "'longrope'", whole),
        ({"use_mrope": True}, "use_mrope is true", "one position per token"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5", "whole heads"),
        ({"hidden_act": "gelu"}, "'gelu'", "'silu'"),
        ({"num_hidden_layers": 24}, "model.layers.2.input_layernorm.weight", "config.json calls for"),
        ({"vocab_size": 151936}, "model.embed_tokens.weight", "[700, 896]", "[151936, 896]"),
        ({"tie_word_embeddings": False}, "lm_head.weight", "tie_word_embeddings"),
    ]:
        (base / "config.json").write_text(json.dumps({**small(QWEN), **change}))
        refused(f"config {change}", *words)
    (base / "config.json").write_text(json.dumps(small(QWEN)))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": ["<|im_end|>"]}))
    refused("an end that is no id", "generation_config.json", "eos_token_id")
    (base / "generation_config.json").unlink()

    # Weights: a download that broke off, a clone without Git LFS, other formats.
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 988097824\n"
    shard = base / "model-00001-of-00002.safetensors"
    index, good = base / "model.safetensors.index.json", shard.read_bytes()
    shard.unlink()
    refused("a shard that is missing", "1 of 2", "'model-00001-of-00002.safetensors'")
    shard.write_bytes(pointer)
    refused("a Git LFS pointer", "00001-of-00002.safetensors: is a Git LFS pointer", "git lfs pull")
    shard.write_bytes(good.replace(b'"BF16"', b'"I16" ', 1))
    refused("integers", "dtype I16", "F32, F16 and BF16")
    shard.write_bytes(good)
    list_of_shards = index.read_bytes()
    index.unlink()
    refused("shards without their index", "'model-00001-of-00002.safetensors'", "model.safetensors.index.json")
    index.write_bytes(list_of_shards)
    accepted("the good directory again")

    bare = root / "bare"
    bare.mkdir()
    (bare / "config.json").write_text(json.dumps(small(QWEN)))
    arguments[1] = bare
    refused("no weights", "model.safetensors: no such file")
    for file in ("pytorch_model-00001-of-00002.bin", "pytorch_model.bin", "consolidated.00.pth", "qwen2.5-0.5b-q4_k_m.gguf"):
        (bare / file).write_bytes(b"GGUF")
        refused(file, f"'{file}'", "model.safetensors")
        (bare / file).unlink()
    (bare / "model.safetensors").write_bytes(pointer)
    refused("a Git LFS pointer alone", "is a Git LFS pointer", "git lfs pull")
    (bare / "tokenizer.json").write_bytes(pointer)
    arguments[4:6] = ["--prompt", "a"]
    refused("a tokenizer that is a Git LFS pointer", "tokenizer.json: is a Git LFS pointer")
    print("refusals: checked")


# ------------------------------------------------------------------------------------------------- by hand, at full size
class StoredWeights(dict):
    """Weights as their file has them; each becomes numbers when it is asked for."""

    def __getitem__(self, name):
        bits = super().__getitem__(name)
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)

    def get(self, name, otherwise):
        return self[name] if name in self else otherwise


def write_full_size(directory, config):
    """As check_engine.write_model, in bf16 and in one file, without holding the model as float64."""
    rng = np.random.default_rng(1)
    hidden, inner, heads, kv_heads = (config[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads",
                                                              "num_key_value_heads"))
    head_dim = hidden // heads
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, outputs, inputs, bias in [
            ("self_attn.q_proj", heads * head_dim, hidden, True), ("self_attn.k_proj", kv_heads * head_dim, hidden, True),
            ("self_attn.v_proj", kv_heads * head_dim, hidden, True), ("self_attn.o_proj", hidden, heads * head_dim, False),
            ("mlp.gate_proj", inner, hidden, False), ("mlp.up_proj", inner, hidden, False),
            ("mlp.down_proj", hidden, inner, False),
        ]:
            shapes[prefix + name + ".weight"] = (outputs, inputs)
            if bias:
                shapes[prefix + name + ".bias"] = (outputs,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[prefix + norm + ".weight"] = (hidden,)
    weights, stored = StoredWeights(), {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, dtype=np.float32)
        values = 1 + 0.2 * values if "norm" in name else values * np.float32(
            0.1 if "embed" in name else 1.5 / shape[-1] ** 0.5 if len(shape) == 2 else 0.5)
        data, _ = engine.encode(np.ascontiguousarray(values), "BF16")
        weights[name] = np.frombuffer(data, np.uint16).reshape(shape)
        stored[name] = ("BF16", shape, data)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    engine.write_safetensors(directory / "model.safetensors", stored)
    return weights


def run_and_watch(arguments):
    """Exit code and the most memory that was resident at once. Not from rusage, which knows this process's own, too."""
    process, peak = subprocess.Popen(arguments, stdout=subprocess.DEVNULL), 0
    while process.poll() is None:
        try:
            status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
            peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))])
        except OSError:
            pass
        time.sleep(0.05)
    return process.returncode, 1024 * peak


def check_full_size(binary, directory):
    config, out, new = QWEN, directory / "out.json", 8
    weights = write_full_size(directory, config)
    prompt = list(map(int, np.random.default_rng(2).integers(0, config["vocab_size"], 64)))
    arguments = [binary, "--model", directory, "--prompt-ids", ",".join(map(str, prompt)), "--max-new", new,
                 "--policy", "raas", "--budget", 1024, "--json", out]
    arguments = list(map(str, arguments))
    print(subprocess.run([*arguments, "--estimate"], check=True, capture_output=True, text=True).stdout)
    estimate = json.loads(out.read_text())
    started = time.monotonic()
    exit_code, peak = run_and_watch(arguments)
    seconds = time.monotonic() - started
    check(exit_code == 0, f"full size: exit code {exit_code}")
    result = json.loads(out.read_text())["policies"][0]
    scores = engine.reference(config, weights, prompt + result["tokens"])[0][len(prompt) - 1 : -1]
    error = engine.relative_error(np.array(result["logits"]), scores[np.arange(new), result["tokens"]])
    check(error < engine.TOLERANCE, f"full size: logits differ by {error:.1e}")
    check(estimate["weight_bytes"] <= peak <= estimate["bytes"] + 2**28, f"full size: {peak} bytes, not {estimate['bytes']}")
    print(f"full size: logits within {error:.1e}; peak memory {peak / 2**20:.0f} MiB, estimated {estimate['bytes'] / 2**20:.0f} "
          f"for weights and caches; {1 / result['tokens_per_second']:.3f} s a token, estimated "
          f"{estimate['policies'][0]['token_seconds']:.3f}; {seconds:.1f} s in all, estimated "
          f"{estimate['policies'][0]['seconds']:.1f} beside loading")


def check_readme(readme):
    """README's prompts are those that were checked."""
    text = readme.read_text()
    for chat in (QWEN_CHAT, DEEPSEEK_CHAT):
        check("$'" + chat.replace("\n", "\\n") + "'" in text, f"README lacks the prompt {chat!r}")


def main():
    if len(sys.argv) not in (2, 3, 4):
        sys.exit(__doc__)
    binary = str(pathlib.Path(sys.argv[1]).resolve())
    if len(sys.argv) == 4 and sys.argv[2] == "--full-size":
        check_full_size(binary, pathlib.Path(sys.argv[3]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            root = pathlib.Path(temporary)
            check_estimates(binary, root)
            check_refusals(binary, root)
            check_model(binary, root, "qwen2.5-0.5b", QWEN, "BF16", 1, "qwen", QWEN_CHAT, 1)
            check_model(binary, root, "qwen2.5-0.5b-saved-anew", QWEN_SAVED_ANEW, "F16", 1, "qwen", QWEN_CHAT, 2)
            check_model(binary, root, "deepseek-r1-distill-qwen-1.5b", DEEPSEEK, "BF16", 1, "deepseek", DEEPSEEK_CHAT, 3)
            check_model(binary, root, "llama-3.2-1b", LLAMA, "BF16", 3, "llama", LLAMA_CHAT, 4)
            if len(sys.argv) == 3:
                check_readme(pathlib.Path(sys.argv[2]))
    print("all checks passed" if not engine.failures else f"{len(engine.failures)} checks failed")
    sys.exit(1 if engine.failures else 0)


if __name__ == "__main__":
    main()
