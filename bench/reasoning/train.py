#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Trains the LemmaChain models from nothing, one after another, and writes them as Hugging Face directories.

    bench/reasoning/train.py --generator build/reasoning/bench/generate_problems --output build/trained --seeds 1,2,3

Needs Debian's python3-torch and libopenblas0-pthread (without the latter a matrix product takes eight times as long).
Three plain phases over growing chains (stage A) give the `plain` model; stages B and C go on from it to `main`, and a
short stage D from there to `varied`; `long` is trained on its own. A phase ends when its accuracy is reached; where the
first one never gets there, training starts again from other random numbers. A run that was stopped goes on where it was.
"""
import argparse
import concurrent.futures
import dataclasses
import json
import math
import os
import pathlib
import struct
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

RECENT_TOKENS = 24  # never counted as irrelevant: about two lines
TRAINING_MIXTURE = (("uniform", 0.40), ("mile", 0.30), ("lru", 0.15), ("age", 0.15))  # never `fall`, the test's


@dataclasses.dataclass(frozen=True)
class Phase:
    steps: int
    batch: int
    lines: tuple  # a batch has chains of one of these lengths
    accuracy: float  # share of held-out chains that must be right in every token before the next phase
    holds_offset_heads: bool = False


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str
    what: str
    phases: tuple
    learning_rate: float
    warm_up: int
    eviction: float = 0.0  # share of batches in which far tokens that a line does not need are hidden
    parking_penalty: float = 0.0  # weight of the attention mass on those tokens in the loss
    writes: str = ""  # name of the model that is finished after this stage


@dataclasses.dataclass(frozen=True)
class Recipe:
    line_format: str
    stages: tuple
    rope_theta: float = 1e4
    max_positions: int = 1024
    starts_from: str = ""


PLAIN = "plain next-token loss"
HIDING = "far tokens that a line does not need are hidden in 80 % of the batches"
PARKING = "as B, and the attention mass on those tokens is part of the loss"
FIRST_READS = Phase(400, 32, (8,), 0.6, holds_offset_heads=True)

RECIPES = {
    "main": Recipe("plain", (
        Stage("A", PLAIN,
              (FIRST_READS, Phase(300, 32, (8, 16), 0.7), Phase(500, 16, (16, 32, 48), 0.95)),
              2e-3, 50, writes="plain"),
        Stage("B", HIDING,
              (Phase(100, 24, (16, 24), 0.9), Phase(300, 16, (24, 32, 48), 0.95)), 1.5e-3, 30, eviction=0.8),
        Stage("C", PARKING,
              (Phase(220, 16, (16, 32, 48), 0.97),), 1.5e-3, 20, eviction=0.8, parking_penalty=1.0, writes="main"))),
    "varied": Recipe("varied", (
        Stage("D", "as C, on chains whose lines vary in length and which end with <eos>",
              (Phase(150, 32, (8, 16), 0.9), Phase(200, 16, (16, 32, 48), 0.97)), 1.5e-3, 20, eviction=0.8,
              parking_penalty=1.0, writes="varied"),), starts_from="main"),
    "long": Recipe("long", (
        Stage("A", PLAIN, (FIRST_READS, Phase(300, 32, (8, 16), 0.7), Phase(500, 16, (16, 32, 48), 0.9)), 2e-3, 50),
        Stage("B", HIDING, (Phase(150, 16, (24, 32, 48), 0.9),), 1.5e-3, 30, eviction=0.8),
        Stage("C", PARKING,
              (Phase(120, 16, (32, 48), 0.9), Phase(250, 6, (64, 96, 128), 0.9), Phase(250, 2, (192, 350), 0.95)),
              1.5e-3, 20, eviction=0.8, parking_penalty=1.0, writes="long")), rope_theta=1e6, max_positions=8192),
}


class Model(torch.nn.Module):
    """A Llama-architecture decoder; parameters bear the names of Hugging Face's checkpoints."""

    hidden, layers, query_heads, kv_heads, head_dim, intermediate, epsilon = 128, 2, 4, 2, 32, 256, 1e-5
    query_block = 192  # of training's attention
    offset_heads = ("model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.q_proj.weight")

    def __init__(self, vocabulary, recipe):
        super().__init__()
        self.vocabulary, self.rope_theta, self.max_positions = vocabulary, recipe.rope_theta, recipe.max_positions
        self.says_when_finished = recipe.line_format == "varied"
        shapes = {"model.embed_tokens.weight": (vocabulary, self.hidden), "model.norm.weight": (self.hidden,)}
        for layer in range(self.layers):
            name = f"model.layers.{layer}."
            shapes |= {name + "input_layernorm.weight": (self.hidden,),
                       name + "self_attn.q_proj.weight": (self.query_heads * self.head_dim, self.hidden),
                       name + "self_attn.k_proj.weight": (self.kv_heads * self.head_dim, self.hidden),
                       name + "self_attn.v_proj.weight": (self.kv_heads * self.head_dim, self.hidden),
                       name + "self_attn.o_proj.weight": (self.hidden, self.query_heads * self.head_dim),
                       name + "post_attention_layernorm.weight": (self.hidden,),
                       name + "mlp.gate_proj.weight": (self.intermediate, self.hidden),
                       name + "mlp.up_proj.weight": (self.intermediate, self.hidden),
                       name + "mlp.down_proj.weight": (self.hidden, self.intermediate)}
        self.tensors = torch.nn.ParameterDict(
            {name.replace(".", "/"): torch.nn.Parameter(self.initial(name, shape)) for name, shape in shapes.items()})
        with torch.no_grad():
            self.start_offset_heads()

    def initial(self, name, shape):
        if len(shape) == 1:
            return torch.ones(shape)
        scale = shape[1] ** -0.5
        if "o_proj" in name or "down_proj" in name:
            scale *= 0.5 * (2 * self.layers) ** -0.5
        return torch.randn(shape) * scale

    def __getitem__(self, name):
        return self.tensors[name.replace(".", "/")]

    def frequencies(self):
        return self.rope_theta ** (-torch.arange(self.head_dim // 2, dtype=torch.float64) * 2 / self.head_dim)

    def start_offset_heads(self, sharpness=8.0, fast_pairs=5):
        """Three heads of layer 0 begin as "attend 1, 2, 3 tokens back" heads. All embeddings share a mean direction,
        which those heads' keys and queries see: the key is the same everywhere, the query the same turned back by the
        offset, so that after RoPE their product is largest at that distance."""
        half = self.head_dim // 2
        mean = torch.randn(self.hidden)
        mean /= mean.norm()
        self["model.embed_tokens.weight"].add_(mean)
        gain = sharpness / (0.5 * self.hidden) ** 0.5  # a normalised embedding has about this much along the mean
        key, query = (self[name] for name in self.offset_heads)
        for head in range(self.kv_heads):
            for pair in range(fast_pairs):
                key[head * self.head_dim + pair] = gain * mean
                key[head * self.head_dim + pair + half] = 0
        for head, offset in enumerate((1, 2, 3)):
            for pair, frequency in enumerate(self.frequencies()[:fast_pairs].tolist()):
                query[head * self.head_dim + pair] = gain * math.cos(frequency * offset) * mean
                query[head * self.head_dim + pair + half] = -gain * math.sin(frequency * offset) * mean

    def hold_offset_heads(self, hold):
        """Until the first reads have formed, training would wear the offset heads down faster than it finds a use for
        them: the read of a definition then does not form in thousands of steps; with them held it takes 300."""
        for name in self.offset_heads:
            self[name].requires_grad_(not hold)

    def norm(self, x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon) * self[name]

    def heads(self, x, name, count):
        return F.linear(x, self[name]).unflatten(-1, (count, self.head_dim)).transpose(1, 2)

    def rotate(self, x, cosine, sine):
        a, b = x.chunk(2, -1)
        return torch.cat((a * cosine - b * sine, b * cosine + a * sine), -1)

    def forward(self, tokens, hidden_pairs=None, watched_pairs=None):
        """Logits [batch, tokens, vocabulary], and the attention mass on `watched_pairs`, per query and layer.
        Pairs are bool [batch, query, key]; `hidden_pairs` has one such mask per layer."""
        length = tokens.shape[1]
        angles = torch.arange(length, dtype=torch.float64)[:, None] * self.frequencies()
        cosine, sine = angles.cos().float(), angles.sin().float()
        future = torch.full((length, length), -math.inf).triu(1)
        group = self.query_heads // self.kv_heads
        x = F.embedding(tokens, self["model.embed_tokens.weight"])
        watched = x.new_zeros(())
        for layer in range(self.layers):
            name = f"model.layers.{layer}."
            normed = self.norm(x, name + "input_layernorm.weight")
            q = self.rotate(self.heads(normed, name + "self_attn.q_proj.weight", self.query_heads), cosine, sine)
            k = self.rotate(self.heads(normed, name + "self_attn.k_proj.weight", self.kv_heads), cosine, sine)
            v = self.heads(normed, name + "self_attn.v_proj.weight", self.kv_heads)
            q = q * self.head_dim ** -0.5
            k, v = k.repeat_interleave(group, 1).transpose(-1, -2), v.repeat_interleave(group, 1)
            mixed = []
            for begin in range(0, length, self.query_block):  # a block of queries needs no keys beyond it
                end = min(begin + self.query_block, length)
                mask = future[begin:end, :end]
                if hidden_pairs is not None:
                    mask = mask.masked_fill(hidden_pairs[layer][:, None, begin:end, :end], -math.inf)
                weights = torch.add(mask, q[:, :, begin:end] @ k[..., :end]).softmax(-1)
                if watched_pairs is not None:
                    watched = watched + (weights * watched_pairs[:, None, begin:end, :end]).sum()
                mixed.append(weights @ v[:, :, :end])
            mixed = torch.cat(mixed, 2).transpose(1, 2).flatten(-2)
            x = x + F.linear(mixed, self[name + "self_attn.o_proj.weight"])
            normed = self.norm(x, name + "post_attention_layernorm.weight")
            gate = F.silu(F.linear(normed, self[name + "mlp.gate_proj.weight"]))
            x = x + F.linear(gate * F.linear(normed, self[name + "mlp.up_proj.weight"]),
                             self[name + "mlp.down_proj.weight"])
        logits = F.linear(self.norm(x, "model.norm.weight"), self["model.embed_tokens.weight"])
        return logits, watched / (self.layers * self.query_heads * tokens.numel())

    def save(self, directory, tokenizer):
        directory.mkdir(parents=True, exist_ok=True)
        header, data = {}, b""
        for name, tensor in sorted((n.replace("/", "."), t) for n, t in self.tensors.items()):
            raw = tensor.detach().numpy().astype("<f4").tobytes()
            header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
            data += raw
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
        (directory / "tokenizer.json").write_text(tokenizer)
        ends = json.loads(tokenizer)["model"]["vocab"]["<eos>"] if self.says_when_finished else None
        (directory / "config.json").write_text(json.dumps({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": self.vocabulary,
            "hidden_size": self.hidden, "num_hidden_layers": self.layers, "num_attention_heads": self.query_heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim, "intermediate_size": self.intermediate,
            "rope_theta": self.rope_theta, "rms_norm_eps": self.epsilon, "tie_word_embeddings": True,
            "max_position_embeddings": self.max_positions, "hidden_act": "silu", "bos_token_id": 0,
            "eos_token_id": ends, "attention_bias": False, "torch_dtype": "float32"}, indent=1) + "\n")


class Problems:
    """Batches of freshly generated chains, and what the generator knows about them."""

    def __init__(self, generator, line_format):
        self.generator, self.line_format = generator, line_format
        self.tokenizer = self.call("--tokenizer")
        self.ids = json.loads(self.tokenizer)["model"]["vocab"]

    def call(self, *arguments):
        return subprocess.run([self.generator, "--format", self.line_format, *map(str, arguments)], check=True,
                              stdout=subprocess.PIPE, text=True).stdout

    def batch(self, size, lines, seed, mixture=TRAINING_MIXTURE):
        random = np.random.default_rng(seed)
        names = random.choice([name for name, _ in mixture], size, p=[share for _, share in mixture])
        rows = []
        for index, (name, _) in enumerate(mixture):
            count = int((names == name).sum())
            text = self.call("--set", name, "--lines", lines, "--count", count, "--seed", seed * len(mixture) + index,
                             "--with-lines") if count else ""
            rows += [json.loads(line) for line in text.splitlines()]
        return Batch(rows, self.ids)


class Batch:
    def __init__(self, rows, ids):
        sequences = [[ids[word] for word in (row["prompt"] + " " + row["chain"]).split()] for row in rows]
        size, length = len(rows), max(map(len, sequences))
        self.tokens = torch.zeros(size, length, dtype=torch.long)
        self.weights = torch.zeros(size, length)  # of a token as a target of the loss
        self.informative = torch.zeros(size, length, dtype=torch.bool)
        self.prompt = torch.zeros(size, 1, 1, dtype=torch.long)
        definition_begin = torch.zeros(size, length, 1, dtype=torch.long)
        definition_end = torch.zeros(size, length, 1, dtype=torch.long)
        for i, (row, sequence) in enumerate(zip(rows, sequences)):
            prompt = len(row["prompt"].split())
            self.tokens[i, : len(sequence)] = torch.tensor(sequence)
            self.weights[i, prompt : len(sequence)] = 0.1
            self.prompt[i] = prompt
            informative, fed = [len(sequence) - 1], []
            for begin, end, source, _, _, line_informative, line_fed in row["lines"]:
                informative += line_informative
                fed += line_fed
                if source:
                    definition_begin[i, begin:end], definition_end[i, begin:end] = row["lines"][source - 1][3:5]
            self.informative[i, informative] = True
            self.weights[i, informative] = 1.0
            self.weights[i, fed] = 0.0
        positions = torch.arange(length)
        query, key = positions[None, :, None], positions[None, None, :]
        needed = (key >= definition_begin) & (key < definition_end)
        self.irrelevant = (key >= self.prompt) & (key + RECENT_TOKENS < query) & ~needed

    def hidden_pairs(self, layers):
        """Per sequence and layer, irrelevant tokens hidden at a rate drawn from U(0, 1)."""
        size, length = self.tokens.shape
        return [self.irrelevant & (torch.rand(size, 1, length) < torch.rand(size, 1, 1)) for _ in range(layers)]

    def loss(self, logits):
        return ((F.cross_entropy(logits[:, :-1].flatten(0, 1), self.tokens[:, 1:].flatten(), reduction="none")
                 * self.weights[:, 1:].flatten()).sum() / self.weights[:, 1:].sum())

    def accuracy(self, logits):
        """Of the informative tokens, and of whole chains. Every token right given the ones before means that
        decoding freely gives the same chain."""
        right = logits[:, :-1].argmax(-1) == self.tokens[:, 1:]
        counted, informative = self.weights[:, 1:] > 0, self.informative[:, 1:]
        return right[informative].float().mean().item(), (right | ~counted).all(1).float().mean().item()


class Trainer:
    def __init__(self, options, name, seed):
        self.name, self.seed, self.recipe = name, seed, RECIPES[name]
        self.problems = Problems(options.generator, self.recipe.line_format)
        self.directory = options.output / f"seed{seed}"
        self.checkpoint = self.directory / f"{name}.checkpoint"
        self.seconds, self.attempt, self.log, self.finished = 0.0, 0, [], []
        self.restart()
        if self.checkpoint.exists():
            self.load()

    def restart(self):
        torch.manual_seed(1000 * self.seed + self.attempt)
        self.model = Model(len(self.problems.ids), self.recipe)
        if self.recipe.starts_from:
            state = torch.load(self.directory / f"{self.recipe.starts_from}.checkpoint")
            self.model.load_state_dict(state["model"])
        self.optimizer, self.stage, self.phase, self.step = None, 0, 0, 0

    def save(self):
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = self.checkpoint.with_suffix(".partial")
        torch.save({"model": self.model.state_dict(), "random": torch.get_rng_state(),
                    "optimizer": self.optimizer and self.optimizer.state_dict(),
                    "at": (self.stage, self.phase, self.step, self.attempt, self.seconds),
                    "log": self.log, "finished": self.finished}, partial)
        partial.rename(self.checkpoint)

    def load(self):
        state = torch.load(self.checkpoint)
        self.model.load_state_dict(state["model"])
        torch.set_rng_state(state["random"])
        self.stage, self.phase, self.step, self.attempt, self.seconds = state["at"]
        self.log, self.finished = state["log"], state["finished"]
        if state["optimizer"]:
            self.make_optimizer()
            self.optimizer.load_state_dict(state["optimizer"])

    def make_optimizer(self):
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1.0, betas=(0.9, 0.98), weight_decay=0.01)

    def learning_rate(self, stage):
        """Warm-up, then a cosine down to 5 %; a phase that takes longer than planned keeps its last rate, and takes
        nothing from the phases after it."""
        steps = [phase.steps for phase in stage.phases]
        step = sum(steps[: self.phase]) + min(self.step, steps[self.phase])
        if step < stage.warm_up:
            return stage.learning_rate * (step + 1) / stage.warm_up
        progress = (step - stage.warm_up) / (sum(steps) - stage.warm_up)
        return stage.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))

    def planned_cost(self):
        """Work that is left if every phase takes as long as planned, in sequence tokens weighted by attention."""
        left = 0.0
        for s, stage in enumerate(self.recipe.stages):
            for p, phase in enumerate(stage.phases):
                steps = phase.steps if (s, p) > (self.stage, self.phase) else max(0, phase.steps - self.step)
                if (s, p) >= (self.stage, self.phase):
                    left += steps * sum(self.step_cost(phase, lines) for lines in phase.lines) / len(phase.lines)
        return left

    @staticmethod
    def step_cost(phase, lines):
        length = 16 + 14 * lines
        return phase.batch * length * (1 + length / 500)

    def train_step(self, stage, phase):
        # Numbered by everything that decides it, so that a run that was interrupted repeats itself exactly.
        at = (self.seed, self.attempt, self.stage, self.phase, self.step)
        seed = int(np.random.SeedSequence(at).generate_state(1)[0]) & 0x7FFFFFFF
        lines = phase.lines[seed % len(phase.lines)]
        batch = self.problems.batch(phase.batch, lines, seed)
        self.model.hold_offset_heads(phase.holds_offset_heads)
        hides = torch.rand(()).item() < stage.eviction
        logits, watched = self.model(batch.tokens, batch.hidden_pairs(Model.layers) if hides else None,
                                     batch.irrelevant if stage.parking_penalty else None)
        loss = batch.loss(logits) + stage.parking_penalty * watched
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(stage)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.item(), batch.accuracy(logits.detach())[0], self.step_cost(phase, lines)

    def held_out(self, lines, count=64, mixture=TRAINING_MIXTURE):
        """Accuracy on chains that training never sees: its seeds, times the sets of the mixture, stay below 2^33."""
        right, seen = 0.0, 0
        batch_size = max(1, min(16, 12000 // (14 * lines)))
        with torch.no_grad():
            while seen < count:
                batch = self.problems.batch(batch_size, lines, (1 << 34) + seen, mixture)
                right += batch.accuracy(self.model(batch.tokens)[0])[1] * batch_size
                seen += batch_size
        return right / seen

    def run(self):
        began, done, shown = time.monotonic(), 0.0, 0.0
        while self.stage < len(self.recipe.stages):
            stage = self.recipe.stages[self.stage]
            if self.optimizer is None:
                self.make_optimizer()
            phase = stage.phases[self.phase]
            started = time.monotonic()
            loss, accuracy, cost = self.train_step(stage, phase)
            self.seconds += time.monotonic() - started
            done += cost
            if time.monotonic() - shown > 5:
                shown = time.monotonic()
                left = self.planned_cost() / done * (shown - began)
                print(f"{self.name} seed {self.seed}  stage {stage.name}.{self.phase + 1}  step {self.step}/{phase.steps}  "
                      f"loss {loss:.3f}  informative tokens right {100 * accuracy:5.1f} %  "
                      f"about {left / 60:.0f} min left", flush=True)
            if self.step >= phase.steps and (self.step - phase.steps) % 50 == 0:
                self.end_of_phase(stage, phase)
            if self.step % 100 == 0:
                self.save()
        return self.finished

    def end_of_phase(self, stage, phase):
        started = time.monotonic()
        right = self.held_out(max(phase.lines), 24 if max(phase.lines) > 100 else 64)
        self.seconds += time.monotonic() - started
        line = (f"attempt {self.attempt + 1}, stage {stage.name}.{self.phase + 1}, {self.step} steps, {self.seconds:.0f} s: "
                f"{100 * right:.0f} % of held-out chains of {max(phase.lines)} lines right")
        self.log.append(line)
        print(f"{self.name} seed {self.seed}  {line}", flush=True)
        if right < phase.accuracy:
            if self.step < 2 * phase.steps + 200:
                return
            if (self.stage, self.phase) == (0, 0):  # what has not formed by now is as likely from other random numbers
                self.attempt += 1
                self.log.append(f"starts again: {100 * phase.accuracy:.0f} % were wanted")
                self.restart()
                return
            self.log.append(f"goes on all the same: {100 * phase.accuracy:.0f} % were wanted")
        self.phase, self.step = self.phase + 1, 0
        if self.phase == len(stage.phases):
            if stage.writes:
                self.finish(stage)
            self.stage, self.phase, self.optimizer = self.stage + 1, 0, None
        self.save()

    def finish(self, stage):
        directory = self.directory / stage.writes
        self.model.save(directory, self.problems.tokenizer)
        last = self.recipe.stages.index(stage) + 1
        lines = max(stage.phases[-1].lines)
        sets = [(name, self.held_out(lines, 32, ((name, 1.0),))) for name in ("fall", "mile", "lru", "age", "uniform")]
        count = 32 if lines <= 48 else 2
        (directory / "problems.jsonl").write_text(
            self.problems.call("--set", "fall", "--lines", lines, "--count", count, "--seed", 1 << 35))
        write_card(directory, self, self.recipe.stages[:last], lines, sets)
        self.finished.append(str(directory))


def write_card(directory, trainer, stages, lines, sets):
    parameters = sum(tensor.numel() for tensor in trainer.model.tensors.values())
    text = [f"# {directory.name}: a LemmaChain model", "",
            f"Trained by `bench/reasoning/train.py`, recipe `{trainer.name}`, seed {trainer.seed}, "
            f"{trainer.seconds / 60:.0f} minutes on {torch.get_num_threads()} thread(s), {parameters} parameters."]
    if trainer.recipe.starts_from:
        text += [f"Goes on from `{trainer.recipe.starts_from}` of the same seed; the minutes are those of this part alone."]
    text += ["", "| stage | what | phases: steps x sequences (lines) | peak rate |", "|---|---|---|---|"]
    for stage in stages:
        phases = ", ".join(f"{p.steps} x {p.batch} ({'/'.join(map(str, p.lines))})" for p in stage.phases)
        text.append(f"| {stage.name} | {stage.what} | {phases} | {stage.learning_rate:g} |")
    text += ["", "**What the start knows.** Three heads of the first layer begin as \"look 1, 2 and 3 words back\", and "
             "are held until short chains are right; without, the read of a definition did not form."]
    if any(stage.eviction or stage.parking_penalty for stage in stages) or trainer.recipe.starts_from:
        text += ["", "**What the extra losses know.** Hiding and penalising tokens that a line does not need uses the generator's "
                 "knowledge of what is irrelevant. No language model is trained like that: it makes attention sharper, and "
                 "eviction easier, than it would be; the plain model shows how much."]
    else:
        text += ["", "**No extra losses.** Only the next token counts, at weight 1 where it cannot be guessed from its line "
                 "and 0.1 elsewhere."]
    text += ["", "Training saw `uniform`, `mile`, `lru` and `age`, never `fall`. How it went:", ""]
    text += [f"- {line}" for line in trainer.log]
    text += ["", f"Chains of {lines} lines right in every token (32 fresh ones each): "
             + ", ".join(f"{name} {100 * right:.0f} %" for name, right in sets) + ".", ""]
    (directory / "README.md").write_text("\n".join(text))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", required=True, help="path of the built generate_problems")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="directory for checkpoints and models")
    parser.add_argument("--seeds", default="1", help="one or several, separated by commas [1]")
    parser.add_argument("--models", default="main,varied,long", help=f"of {', '.join(RECIPES)} [main,varied,long]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="models trained at a time, a thread each")
    options = parser.parse_args()
    names = options.models.split(",")
    unknown = [name for name in names if name not in RECIPES]
    if unknown:
        sys.exit(f"train.py: --models names '{unknown[0]}', known are {', '.join(RECIPES)}")
    keep_freed_memory()
    # `varied` goes on from `main`; all others are on their own.
    chained = [name for name in names if name in ("main", "varied")]
    jobs = [(group, int(seed)) for seed in options.seeds.split(",")
            for group in [chained] + [[name] for name in names if name not in chained] if group]
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        for done in [pool.submit(train, options, *job) for job in jobs]:
            for directory in done.result():
                print(f"wrote {directory}")


def train(options, names, seed):
    torch.set_num_threads(1)  # two models side by side train faster than one on two threads
    return [directory for name in names for directory in Trainer(options, name, seed).run()]


def keep_freed_memory():
    """Starts this program again with an allocator that keeps freed memory: every step's large temporaries would go
    back to the kernel and be zeroed anew, which takes longer than the arithmetic. OpenBLAS has threads of its own."""
    settings = {"OPENBLAS_NUM_THREADS": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
                "MALLOC_MMAP_THRESHOLD_": str(1 << 33),
                "MALLOC_TRIM_THRESHOLD_": str(1 << 33), "MALLOC_TOP_PAD_": str(1 << 28)}
    if not settings.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **settings})


if __name__ == "__main__":
    main()
