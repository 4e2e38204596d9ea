#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Checks a `replay` binary from outside, through its command line only.

    check_replay.py PATH_TO_REPLAY [--quick] [--dtypes f32,f16,bf16] [--only TEXT] [--keep DIR]

Makes traces, runs the binary on them with many policies, options, budgets and page sizes, and recomputes every
decision, output and metric here in double precision. Then feeds it broken files and wrong options. Deterministic.
Exit code 1 if anything failed.

Written independently of the library and of tests/support/naive_replay.hpp: per head this keeps flat arrays over all
page numbers with an "alive" mask, computes all logits of a trace once, and masks them.

A float32 implementation may decide a close call the other way than double precision does. Such a head is excused from
the first difference on, but only if a decision up to there really was close (see NEAR); how often is printed.
"""

import argparse
import csv
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

REAL = np.float64

# Relative gap, divided by (1 + largest sum |q_i k_i| / sqrt(d)), below which rounding may turn a decision around: about
# fifty times the float32 rounding unit, because a logit's absolute error is a share's relative error.
NEAR = 3e-6


# ---- safetensors, by hand --------------------------------------------------------------------------------------------


def pack(header, body=b"", length=None):
    """A file from a header (JSON value or raw bytes); `length` lies about the header's length."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + body


def pack_tensors(tensors, metadata=None):
    header, body = OrderedDict(), b""
    if metadata is not None:
        header["__metadata__"] = metadata
    for name, array in tensors.items():
        data = np.ascontiguousarray(array, dtype="<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    return pack(header, body)


def read_tensors(path):
    with open(path, "rb") as file:
        raw = file.read()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    types = {"F32": "<f4", "U8": "u1"}
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        data = np.frombuffer(raw[8 + length + begin : 8 + length + end], dtype=types[entry["dtype"]])
        tensors[name] = data.reshape(entry["shape"])
    return tensors


# ---- traces ----------------------------------------------------------------------------------------------------------


@dataclass
class Trace:
    name: str
    q: np.ndarray  # [tokens, query_heads, head_dim] float32, as k and v
    k: np.ndarray
    v: np.ndarray
    prompt: int
    cache: dict = field(default_factory=dict)

    @property
    def shape(self):
        return self.q.shape[0], self.q.shape[1], self.k.shape[1], self.q.shape[2]

    def file(self, metadata=True):
        meta = {"prompt_tokens": str(self.prompt)} if metadata else None
        return pack_tensors({"q": self.q, "k": self.k, "v": self.v}, meta)


def gaussian(name, tokens, query_heads, kv_heads, dim, prompt, seed, sharpness=2.5):
    rng = np.random.RandomState(seed)  # its stream is frozen, unlike default_rng's
    q = (sharpness * rng.standard_normal((tokens, query_heads, dim))).astype(np.float32)
    k = rng.standard_normal((tokens, kv_heads, dim)).astype(np.float32)
    v = rng.standard_normal((tokens, kv_heads, dim)).astype(np.float32)
    return Trace(name, q, k, v, prompt)


def milestones(name, tokens, query_heads, kv_heads, dim, prompt, seed, boost=8.0):
    """Keys that later queries want for a while and then no more; one prompt key wanted again after a long silence."""
    trace = gaussian(name, tokens, query_heads, kv_heads, dim, prompt, seed, sharpness=1.0)
    rng = np.random.RandomState(seed + 1000)
    group = query_heads // kv_heads
    size = math.sqrt(boost * math.sqrt(dim))
    life = max(8, (tokens - prompt) // 2)
    for head in range(kv_heads):
        planted = np.flatnonzero(rng.random_sample(tokens) < 1 / 15)
        for at in planted[planted >= prompt]:
            u = rng.standard_normal(dim)
            u *= size / np.linalg.norm(u)
            trace.k[at, head] += u.astype(np.float32)
            lives = np.arange(at + 1, min(tokens, at + 2 + rng.randint(life)))
            strength = np.linspace(1.0, 0.4, len(lives))[:, None] if len(lives) else np.zeros((0, 1))
            trace.q[lives, head * group + rng.randint(group)] += (strength * u).astype(np.float32)
        u = rng.standard_normal(dim)
        u *= size / np.linalg.norm(u)
        trace.k[rng.randint(max(1, prompt)), head] += u.astype(np.float32)
        late = np.arange((tokens + prompt) // 2, tokens, 11)
        trace.q[late, head * group] += u.astype(np.float32)
    return trace


def ties(name, tokens, query_heads, kv_heads, dim, prompt, seed, period=0, zero=False, constant=False):
    """The very same keys again every `period` tokens: ties that no rounding can decide, so position has to."""
    trace = gaussian(name, tokens, query_heads, kv_heads, dim, prompt, seed, sharpness=1.0)
    if period:
        trace.k[:] = trace.k[np.arange(tokens) % period]
    if zero:
        trace.k[:] = 0
    if constant:
        trace.q[:] = trace.q[0]
    return trace


def huge(name, tokens, query_heads, kv_heads, dim, prompt, seed):
    trace = gaussian(name, tokens, query_heads, kv_heads, dim, prompt, seed)
    rng = np.random.RandomState(seed + 2000)
    trace.k *= np.where(rng.random_sample(trace.k.shape[:2]) < 0.25, 1e-3, 1e3)[:, :, None].astype(np.float32)
    return trace


def rounded(array, dtype):
    if dtype == "f16":
        return array.astype(np.float16).astype(np.float32)
    if dtype == "bf16":  # nearest, ties to even
        bits = array.view(np.uint32).astype(np.uint64)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.astype(np.uint32).view(np.float32)
    return array


# ---- what depends on the trace alone ---------------------------------------------------------------------------------


class Layer:
    """Logits of every query against every key, and dense attention."""

    def __init__(self, trace, dtype):
        tokens, query_heads, kv_heads, dim = trace.shape
        self.group = query_heads // kv_heads
        self.scale = REAL(1 / math.sqrt(dim))
        self.q = trace.q.astype(REAL)
        self.k = rounded(trace.k, dtype).astype(REAL)
        self.v = rounded(trace.v, dtype).astype(REAL)
        self.logits, self.noise = self._logits(self.k)
        exact, _ = (self.logits, None) if dtype == "f32" else self._logits(trace.k.astype(REAL))
        causal = np.tril(np.ones((tokens, tokens), bool))
        masked = np.where(causal, exact, -np.inf)
        weights = np.exp(masked - masked.max(axis=2, keepdims=True))
        self.dense = weights / weights.sum(axis=2, keepdims=True)
        values = np.repeat(trace.v.astype(REAL), self.group, axis=1)
        self.dense_out = np.einsum("hts,shd->thd", self.dense, values)

    def _logits(self, keys):
        tokens, query_heads, _ = self.q.shape
        logits = np.zeros((query_heads, tokens, tokens), REAL)
        noise = np.zeros((query_heads, tokens))
        for head in range(query_heads):
            for t in range(tokens):
                # Row by row sums, not a matrix product: equal keys must give equal logits to the last bit.
                products = self.q[t, head] * keys[: t + 1, head // self.group]
                logits[head, t, : t + 1] = products.sum(axis=1) * self.scale
                noise[head, t] = np.abs(products).sum(axis=1).max() * self.scale
        return logits, np.maximum.accumulate(noise, axis=1)


def layer_of(trace, dtype):
    if dtype not in trace.cache:
        trace.cache[dtype] = Layer(trace, dtype)
    return trace.cache[dtype]


# ---- the policies ----------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One run of the binary with one policy and one budget."""

    policy: str
    page: int
    budget: int
    options: dict = field(default_factory=dict)  # exactly what goes to --set
    dtype: str = "f32"

    def __post_init__(self):
        evictor, _, selector = self.policy.partition("+")
        if evictor == "quest":
            evictor, selector = "dense", "quest"
        self.evictor, self.quest = evictor, selector == "quest"
        o = dict(self.options)
        preset = o.pop("preset", None)
        if preset == "paper_v1":
            o = {"evidence": "quest_bound", "alpha": "1e-4", **o}
        elif preset == "paper_v2":
            o = {"evidence": "quest_bound", "used": "rank", "r": "0.5", **o}
        self.alpha = float(o.get("alpha", 0.01))
        self.r = float(o.get("r", 0.5))
        self.rank = o.get("used") == "rank"
        self.by_bound = o.get("evidence") == "quest_bound"
        self.window, self.patience = int(o.get("window", 24)), float(o.get("patience", 16))
        self.caution = float(o.get("caution", 0.5))
        self.sinks = int(o.get("sinks", 4))
        pin = o.get("pin_prompt")
        self.pin = evictor in ("raas", "kindred", "random") if pin is None else pin == "true"
        self.P = self.budget // self.page
        self.read_P = int(o.get("read_budget", self.budget)) // self.page

    def pinned_pages(self, prompt):
        sinks = -(-self.sinks // self.page) if self.evictor == "streaming_llm" else 0
        return max(sinks, -(-prompt // self.page) if self.pin and self.evictor != "dense" else 0)

    def arguments(self):
        line = ["--policy", self.policy, "--budget", str(self.budget), "--page-size", str(self.page)]
        if self.dtype != "f32":
            line += ["--dtype", self.dtype]
        for key, value in self.options.items():
            line += ["--set", f"{key}={value}"]
        return line

    def label(self):
        return " ".join([self.policy] + [f"{k}={v}" for k, v in self.options.items() if k != "read_budget"])


class Illegal(Exception):
    """The binary evicted what its policy may not evict."""


def apart(these, those, noise):
    """Smallest relative gap between any of these and any of those; equal values do not count, position decides them."""
    a, b = np.asarray(these, float)[:, None], np.asarray(those, float)[None, :]
    gaps = np.where(a == b, np.inf, np.abs(a - b) / np.maximum(np.maximum(a, b), 1e-30))
    return gaps.min(initial=np.inf) / (1 + noise)


class Head:
    """One kv head under one policy. Arrays are indexed by page number: page j holds positions [j B, (j + 1) B)."""

    def __init__(self, trace, layer, case, kv, follow=None):
        self.layer, self.case, self.kv, self.follow = layer, case, kv, follow
        self.tokens, self.prompt = trace.shape[0], trace.prompt
        pages = -(-self.tokens // case.page)
        first = np.arange(pages) * case.page
        self.page_of = np.arange(self.tokens) // case.page
        self.alive = np.zeros(pages, bool)
        self.stamp = first.copy()
        self.last = np.zeros(pages, REAL)
        self.heavy = np.zeros(pages, REAL)
        self.pinned = np.arange(pages) < case.pinned_pages(trace.prompt)
        self.low, self.high = self._bounds(pages)
        self.resident = np.zeros((self.tokens, self.tokens), np.uint8)
        self.read = np.zeros((self.tokens, self.tokens), np.uint8)
        self.margin = np.full(self.tokens, np.inf)
        self.milestone = np.zeros(pages, bool)  # of Kindred, as are the four below
        self.looks = self._looks(pages)
        self.direction = np.zeros(self.looks.shape[1])
        self.ordinary, self.late = [], []  # cosines with the direction
        self.evictions = 0
        self.picks = []  # (index among the candidates, how many) of Random

    def _bounds(self, pages):
        """Running minimum and maximum of each page's keys after each of its tokens."""
        low, high = np.empty_like(self.layer.k[:, self.kv]), np.empty_like(self.layer.k[:, self.kv])
        for page in range(pages):
            span = slice(page * self.case.page, (page + 1) * self.case.page)
            low[span] = np.minimum.accumulate(self.layer.k[span, self.kv], axis=0)
            high[span] = np.maximum.accumulate(self.layer.k[span, self.kv], axis=0)
        return low, high

    def _looks(self, pages):
        """Each page's summed value at length 1."""
        v = self.layer.v[:, self.kv, :256]
        sums = np.array([v[page * self.case.page : (page + 1) * self.case.page].sum(axis=0) for page in range(pages)])
        return self._unit(sums)

    @staticmethod
    def _unit(x):
        length = np.sqrt((x * x).sum(axis=-1, keepdims=True))
        return np.divide(x, length, out=np.zeros_like(x), where=length > 0)

    def heads(self):
        return range(self.kv * self.layer.group, (self.kv + 1) * self.layer.group)

    def page_bounds(self, t, pages):
        """[group, pages] upper bounds, and the same sums without cancellation."""
        newest = np.minimum((pages + 1) * self.case.page - 1, t)
        bounds, sizes = [], []
        for head in self.heads():
            one, other = self.layer.q[t, head] * self.low[newest], self.layer.q[t, head] * self.high[newest]
            bounds.append(np.maximum(one, other).sum(axis=1))
            sizes.append(np.maximum(np.abs(one), np.abs(other)).sum(axis=1))
        return np.array(bounds), np.array(sizes)

    def step(self, t):
        page = t // self.case.page
        self.noise = max(self.layer.noise[head, t] for head in self.heads())
        if t == page * self.case.page:
            if self.case.evictor != "dense" and self.alive.sum() == self.case.P:
                self.alive[self.victim(t)] = False
                self.evictions += 1
            self.alive[page] = True
        if (t + 1) % self.case.page == 0 and self.direction.any():
            self.ordinary.append(self.looks[page] @ self._unit(self.direction))
        pages = np.flatnonzero(self.alive)
        chosen = self.select(t, pages)
        past = np.arange(self.tokens) <= t
        self.resident[t] = self.alive[self.page_of] & past
        wanted = np.zeros_like(self.alive)
        wanted[chosen] = True
        self.read[t] = wanted[self.page_of] & past

        at = np.flatnonzero(self.read[t])
        masses, outs, shares = [], [], []
        for head in self.heads():
            x = self.layer.logits[head, t, at]
            w = np.exp(x - x.max())
            w /= w.sum()
            masses.append(np.bincount(self.page_of[at], weights=w, minlength=len(self.alive)).astype(REAL))
            outs.append(w @ self.layer.v[at, self.kv])
            shares.append(self.layer.dense[head, t, at].sum())
        masses = np.array(masses)
        together = masses[0].copy()
        for mass in masses[1:]:
            together += mass
        self.last[chosen] = together[chosen]
        self.heavy[chosen] += together[chosen]
        if self.case.evictor == "raas" and t >= self.prompt:
            self.mark(t, page, pages, chosen, masses.max(axis=0), together)
        if self.case.evictor == "kindred" and t >= self.prompt:
            self.learn(t, chosen[~self.pinned[chosen]], masses.max(axis=0))
        return outs, shares

    def select(self, t, pages):
        if not self.case.quest or len(pages) <= self.case.read_P:
            return pages
        others = pages[:-1]
        bounds, sizes = self.page_bounds(t, others)
        bound, size = bounds.max(axis=0), sizes.max(axis=0)
        order = np.lexsort((others, -bound))
        k = self.case.read_P - 1
        best, rest = order[:k], order[k:]
        gaps = bound[best][:, None] - bound[rest][None, :]
        scale = np.maximum(size[best][:, None], size[rest][None, :])
        with np.errstate(invalid="ignore", divide="ignore"):
            gaps = np.where(gaps == 0, np.inf, gaps / scale)
        self.margin[t] = min(self.margin[t], gaps.min(initial=np.inf))
        return np.sort(np.append(others[best], pages[-1]))

    def victim(self, t):
        free = np.flatnonzero(self.alive & ~self.pinned)
        case = self.case
        if case.evictor == "streaming_llm":
            return free[0]
        if case.evictor == "random":
            # Whatever it evicted, provided that it was allowed to. The dump shows who is still there.
            now = self.follow[t - self.prompt, self.kv]
            still = np.unique(self.page_of[np.flatnonzero(now)])
            gone = np.setdiff1d(np.flatnonzero(self.alive), still)
            if len(gone) != 1 or gone[0] not in free:
                raise Illegal(f"at token {t} head {self.kv} evicted pages {gone.tolist()}, candidates {free.tolist()}")
            self.picks.append((int(np.searchsorted(free, gone[0])), len(free)))
            return gone[0]
        if case.evictor == "h2o":
            share = case.P - (self.pinned.sum() if case.pin else 0)
            if recent := max(1, int(share) // 2) - 1:
                free = free[:-recent]
            order = np.lexsort((free, self.heavy[free]))
            out, rivals = free[order[0]], free[order[1:]]
            self.margin[t] = min(self.margin[t], apart(self.heavy[[out]], self.heavy[rivals], self.noise))
            if case.page > 1 and (self.heavy[rivals] == self.heavy[out]).any():
                # Sums over different queries that meet exactly do so by luck of rounding. (A page of one token that is
                # read alone has share 1 in any arithmetic: such ties are real.)
                self.margin[t] = 0
            return out
        if case.evictor == "kindred":
            return self.kindred_victim(t, free)
        order = np.lexsort((free, self.last[free], self.stamp[free]))
        out = free[order[0]]
        rivals = free[self.stamp[free] == self.stamp[out]]
        self.margin[t] = min(self.margin[t], apart(self.last[[out]], self.last[rivals], self.noise))
        return out

    def learn(self, t, free, mass):
        """Kindred after a decode step."""
        gap = np.abs(mass[free] - self.case.alpha) / np.maximum(np.maximum(mass[free], self.case.alpha), 1e-30)
        self.margin[t] = min(self.margin[t], gap.min(initial=np.inf) / (1 + self.noise))
        used = free[mass[free] > self.case.alpha]
        self.stamp[used] = t
        for page in used[(t - used * self.case.page >= self.case.window) & ~self.milestone[used]]:
            self.milestone[page] = True
            looks = self.looks[page]
            if (page + 1) * self.case.page > t + 1:  # still filling
                looks = self._unit(self.layer.v[page * self.case.page : t + 1, self.kv, :256].sum(axis=0))
            if self.direction.any():
                self.late.append(looks @ self._unit(self.direction))
            self.direction = self.direction + mass[page] * looks

    def kindred_victim(self, t, free):
        """Scores by the formula; `error` is how far a score moves when cosines are off by 1."""
        silence = np.log(t - self.stamp[free])
        if len(self.ordinary) < 2 or not self.late:
            return free[np.argmin(-silence)]
        weights, late_weights = (0.98 ** np.arange(len(x))[::-1] for x in (self.ordinary, self.late))
        mean, late = np.average(self.ordinary, weights=weights), np.average(self.late, weights=late_weights)
        spread = max(1e-6, math.sqrt(np.average((np.array(self.ordinary) - mean) ** 2, weights=weights)))
        gap = (late - mean) / spread
        sure = gap - self.case.caution / math.sqrt(late_weights.sum())
        self.margin[t] = min(self.margin[t], abs(sure) * spread / (2 + abs(gap)) / (1 + self.noise))
        if sure <= 0:
            return free[np.argmin(-silence)]
        trust = min(1.0, sure) ** 2
        above = (self.looks[free] @ self._unit(self.direction) - mean) / spread
        likeness = np.clip(2 * above / gap, 0, 1)
        score = trust * likeness * math.log(self.case.patience) - silence
        moves = (likeness > 0) & (likeness < 1)
        error = trust * moves * (2 * (2 + np.abs(above)) + likeness * (2 + gap)) / gap / spread
        error += likeness * (2 * sure * (2 + gap) / spread if sure < 1 else 0)
        error *= math.log(self.case.patience)
        at = np.argmin(score)
        with np.errstate(invalid="ignore", divide="ignore"):
            close = (score - score[at]) / (error + error[at]) / (1 + self.noise)
        close = close[(score != score[at]) & (error + error[at] > 0)]
        self.margin[t] = min(self.margin[t], close.min(initial=np.inf))
        return free[at]

    def mark(self, t, page, pages, chosen, largest, together):
        case = self.case
        self.stamp[page] = t
        value, noise = largest, self.noise
        if case.by_bound:
            bounds, sizes = self.page_bounds(t, pages)
            x = bounds * self.layer.scale
            share = np.exp(x - x.max(axis=1, keepdims=True))
            share /= share.sum(axis=1, keepdims=True)
            value = np.zeros(len(self.alive), REAL)
            value[pages] = share.max(axis=0)
            noise = max(noise, (sizes * self.layer.scale).max())
        if not case.rank:
            old = chosen[chosen != page]
            self.stamp[old[value[old] > case.alpha]] = t
            free = old[~self.pinned[old]]
            gap = np.abs(value[free] - case.alpha) / np.maximum(np.maximum(value[free], case.alpha), 1e-30)
            self.margin[t] = min(self.margin[t], gap.min(initial=np.inf) / (1 + noise))
            return
        if not case.by_bound:
            value = together
        full = pages[(pages != page) & ~self.pinned[pages]]
        k = math.ceil(case.r * len(full))
        known = full if case.by_bound else np.intersect1d(full, chosen)
        order = known[np.lexsort((known, -value[known]))]
        self.margin[t] = min(self.margin[t], apart(value[order[:k]], value[order[k:]], noise))
        self.stamp[np.intersect1d(order[:k], chosen)] = t


@dataclass
class Expected:
    resident: np.ndarray  # [decode, kv, tokens]
    read: np.ndarray
    out: np.ndarray  # [decode, query heads, dim]
    margin: np.ndarray  # [tokens, kv], smallest so far
    noise: np.ndarray  # [query heads]
    rounding: np.ndarray  # [decode, query heads] what float32 may do to the relative error
    share: float
    mean_error: float
    max_error: float
    peak: int
    evicted: int
    picks: list


def expect(trace, case, follow=None):
    layer = layer_of(trace, case.dtype)
    tokens, query_heads, kv_heads, dim = trace.shape
    heads = [Head(trace, layer, case, kv, follow) for kv in range(kv_heads)]
    out = np.zeros((tokens, query_heads, dim))
    share = np.zeros((tokens, query_heads))
    for head in heads:
        for t in range(tokens):
            outs, shares = head.step(t)
            out[t, list(head.heads())] = outs
            share[t, list(head.heads())] = shares
    decode = slice(trace.prompt, tokens)
    resident = np.stack([head.resident for head in heads], axis=1)
    size = np.linalg.norm(layer.dense_out, axis=2)
    error = np.linalg.norm(out - layer.dense_out, axis=2) / size
    rounding = NEAR * (1 + layer.noise.T) * np.abs(trace.v).max() * math.sqrt(dim) / size
    return Expected(
        resident=resident[decode],
        read=np.stack([head.read for head in heads], axis=1)[decode],
        out=out[decode],
        margin=np.minimum.accumulate(np.stack([head.margin for head in heads], axis=1), axis=0),
        noise=layer.noise[:, -1],
        rounding=rounding[decode],
        share=float(share[decode].mean()),
        mean_error=float(error[decode].mean()),
        max_error=float(error[decode].max()),
        peak=int(resident.sum(axis=2).max()),
        evicted=sum(head.evictions for head in heads) * case.page,
        picks=[pick for head in heads for pick in head.picks],
    )


# ---- reading the binary's answers ------------------------------------------------------------------------------------

# What a metric's column may be called: every pattern must match, none of the forbidden ones may.
METRICS = {
    "share": (("share|mass",), ("stamp", "budget")),
    "mean_error": (("mean|avg", "err"), ()),
    "max_error": (("max", "err"), ()),
    "peak_tokens": (("peak", "token"), ("byte",)),
    "peak_bytes": (("peak", "byte"), ()),
    "evicted_tokens": (("evict",), ("byte", "page")),
}


def metric(row, name):
    need, forbid = METRICS[name]
    if name in row:
        return float(row[name])
    keys = [k for k in row if all(re.search(p, k) for p in need) and not any(re.search(p, k) for p in forbid)]
    if len(keys) != 1:
        raise KeyError(f"cannot tell which column is {name}: {keys or list(row)}")
    return float(row[keys[0]])


def rows_in(value):
    """The first list of objects that name a policy, wherever it stands in the JSON."""
    if isinstance(value, list) and value and all(isinstance(x, dict) and "policy" in x for x in value):
        return value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
        if found := rows_in(child):
            return found
    return None


def same_row(row, policy, budget):
    names = [v for k, v in row.items() if re.search("^budget", k)]
    return row["policy"] == policy and (not names or int(float(names[0] or 0)) == budget)


class Checker:
    def __init__(self, binary, folder):
        self.binary, self.folder = binary, folder
        self.passed, self.failures, self.groups = 0, [], OrderedDict()
        self.files, self.heads, self.excused = {}, 0, 0

    # -- bookkeeping

    def check(self, fine, what, detail="", command=None):
        if fine:
            self.passed += 1
        else:
            self.failures.append(what)
            print(f"FAIL  {what}" + (f": {detail}" if detail else ""))
            if command:
                print("      " + " ".join(command))
        return bool(fine)

    def path(self, name):
        return os.path.join(self.folder, name)

    def trace_file(self, trace):
        if trace.name not in self.files:
            path = self.path(f"{trace.name}.safetensors")
            with open(path, "wb") as file:
                file.write(trace.file())
            self.files[trace.name] = path
        return self.files[trace.name]

    def run(self, arguments, timeout=120):
        command = [self.binary] + arguments
        try:
            done = subprocess.run(command, capture_output=True, timeout=timeout, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            return command, None, "", f"no end after {timeout} s"
        return command, done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")

    def run_case(self, trace, case, name="run"):
        """Runs one case with all outputs. Returns (command, dump, JSON row, CSV row), or None after a failure."""
        paths = {kind: self.path(f"{name}.{kind}") for kind in ("safetensors", "json", "csv")}
        for path in paths.values():
            if os.path.exists(path):
                os.remove(path)
        arguments = ["--trace", self.trace_file(trace)] + case.arguments()
        arguments += ["--dump", paths["safetensors"], "--json", paths["json"], "--csv", paths["csv"]]
        command, code, stdout, stderr = self.run(arguments)
        what = f"{trace.name}: {case.label()} page {case.page} budget {case.budget}"
        if not self.check(code == 0, f"{what}: exit code", f"{code}, {stderr.strip()[:300]}", command):
            return None
        self.check(case.policy in stdout and "\r" not in stderr, f"{what}: prints a table, no progress bar in a pipe",
                   f"stdout {stdout[:200]!r} stderr {stderr[:200]!r}", command)
        try:
            dump = read_tensors(paths["safetensors"])
            with open(paths["json"]) as file:
                found = [r for r in rows_in(json.load(file)) or [] if same_row(r, case.policy, case.budget)]
            with open(paths["csv"], newline="") as file:
                lines = [r for r in csv.DictReader(file) if same_row(r, case.policy, case.budget)]
            json_row, csv_row = found[0], lines[0]
        except Exception as problem:  # whatever is wrong with a file is the finding
            self.check(False, f"{what}: its files can be read", repr(problem), command)
            return None
        return command, dump, json_row, csv_row

    # -- one case against the recomputation

    def compare(self, trace, case):
        result = self.run_case(trace, case)
        group = self.groups.setdefault(case.label(), {"runs": 0, "steps": 0, "excused": 0})
        group["runs"] += 1
        if result is None:
            return None
        command, dump, json_row, csv_row = result
        what = f"{trace.name}: {case.label()} page {case.page} budget {case.budget}"
        tokens, query_heads, kv_heads, dim = trace.shape
        decode = tokens - trace.prompt
        shapes = {name: tuple(array.shape) for name, array in dump.items()}
        wanted = {"out": (decode, query_heads, dim), "resident": (decode, kv_heads, tokens),
                  "read": (decode, kv_heads, tokens)}
        if not self.check(all(shapes.get(n) == s for n, s in wanted.items()), f"{what}: shapes of the dump",
                          f"{shapes}, wanted {wanted}", command):
            return None
        types = (dump["out"].dtype, dump["resident"].dtype, dump["read"].dtype)
        self.check(types == (np.float32, np.uint8, np.uint8), f"{what}: types of the dump", str(types), command)
        try:
            wish = expect(trace, case, dump["resident"])
        except Illegal as problem:
            self.check(False, f"{what}: legal evictions", str(problem), command)
            return None

        good = np.ones(kv_heads, bool)
        self.heads += kv_heads
        for kv in range(kv_heads):
            differs = ((dump["resident"][:, kv] != wish.resident[:, kv]) | (dump["read"][:, kv] != wish.read[:, kv]))
            wrong = np.flatnonzero(differs.any(axis=1))
            steps = decode if len(wrong) == 0 else int(wrong[0])
            group["steps"] += steps
            lines = range(kv * (query_heads // kv_heads), (kv + 1) * (query_heads // kv_heads))
            if steps:
                error = np.abs(dump["out"][:steps, lines] - wish.out[:steps, lines])
                limit = NEAR * (1 + wish.noise[lines].max()) * np.abs(trace.v).max()
                self.check(np.isfinite(error).all() and error.max() <= limit, f"{what}: outputs of head {kv}",
                           f"off by {error.max():.3g}, allowed {limit:.3g}", command)
            if len(wrong) == 0:
                self.check(True, what)
                continue
            good[kv] = False
            if wish.margin[trace.prompt + steps, kv] < NEAR:
                group["excused"] += 1
                self.excused += 1
                continue
            pages = lambda mask: sorted(set((np.flatnonzero(mask) // case.page).tolist()))
            kind = "resident" if (dump["resident"][steps, kv] != wish.resident[steps, kv]).any() else "read"
            got, should = pages(dump[kind][steps, kv]), pages(getattr(wish, kind)[steps, kv])
            self.check(False, f"{what}: decisions of head {kv}",
                       f"at token {trace.prompt + steps} {kind} pages differ: only in the dump "
                       f"{sorted(set(got) - set(should))}, missing {sorted(set(should) - set(got))} "
                       f"(closest decision so far {wish.margin[trace.prompt + steps, kv]:.2g})", command)
        if good.all():
            self.metrics(what, trace, case, wish, json_row, csv_row, command)
        return dump, wish

    def metrics(self, what, trace, case, wish, json_row, csv_row, command):
        tokens, query_heads, kv_heads, dim = trace.shape
        wanted = {
            "share": (wish.share, 1e-6),
            "mean_error": (wish.mean_error, wish.rounding.mean()),
            "max_error": (wish.max_error, wish.rounding.max()),
            "peak_tokens": (wish.peak, 0),
            "evicted_tokens": (wish.evicted, 0),
        }
        for name, (value, allowed) in wanted.items():
            try:
                got, line = metric(json_row, name), metric(csv_row, name)
            except (KeyError, TypeError, ValueError) as problem:
                self.check(False, f"{what}: {name}", str(problem), command)
                continue
            self.check(abs(got - value) <= allowed, f"{what}: {name}", f"{got}, should be {value} +- {allowed:.2g}",
                       command)
            self.check(abs(line - got) <= 1e-3 * abs(got) + 1e-6, f"{what}: {name} in CSV as in JSON", f"{line}, {got}",
                       command)
        try:  # how the rest of a page and the policy's state count is the library's affair
            size = metric(json_row, "peak_bytes")
            least = wish.peak * kv_heads * 2 * dim * (4 if case.dtype == "f32" else 2)
            self.check(least <= size <= 4 * least + 2 * kv_heads * 8 * dim * case.page + 65536, f"{what}: peak_bytes",
                       f"{size}, the tokens alone are {least}", command)
        except (KeyError, TypeError, ValueError) as problem:
            self.check(False, f"{what}: peak_bytes", str(problem), command)


# ---- what is run -----------------------------------------------------------------------------------------------------


def variants(read_budget):
    yield "dense", {}
    yield "streaming_llm", {}
    yield "streaming_llm", {"sinks": "0"}
    yield "streaming_llm", {"sinks": "5", "pin_prompt": "true"}
    yield "h2o", {}
    yield "h2o", {"pin_prompt": "true"}
    yield "quest", {}
    yield "quest", {"read_budget": read_budget}
    yield "raas", {}
    yield "raas", {"alpha": "0.05"}
    yield "raas", {"pin_prompt": "false"}
    yield "raas", {"used": "rank"}
    yield "raas", {"used": "rank", "r": "0.25", "pin_prompt": "false"}
    yield "raas", {"evidence": "quest_bound"}
    yield "raas", {"evidence": "quest_bound", "alpha": "0.1", "pin_prompt": "false"}
    yield "raas", {"evidence": "quest_bound", "used": "rank"}
    yield "raas", {"preset": "paper_v1"}
    yield "raas", {"preset": "paper_v2"}
    yield "kindred", {"window": "6"}
    yield "kindred", {"window": "3", "caution": "0", "patience": "200", "alpha": "0.05", "pin_prompt": "false"}
    yield "random", {}
    yield "streaming_llm+quest", {"read_budget": read_budget}
    yield "h2o+quest", {"read_budget": read_budget}
    yield "h2o+quest", {"read_budget": read_budget, "pin_prompt": "true"}
    yield "raas+quest", {"read_budget": read_budget}
    yield "raas+quest", {}
    yield "raas+quest", {"read_budget": read_budget, "used": "rank"}
    yield "raas+quest", {"read_budget": read_budget, "evidence": "quest_bound", "alpha": "0.05"}
    yield "raas+quest", {"read_budget": read_budget, "evidence": "quest_bound", "used": "rank"}
    yield "kindred+quest", {"read_budget": read_budget, "window": "6"}
    yield "random+quest", {"read_budget": read_budget}


def traces_for(page):
    yield gaussian("gauss_g2_d40", 170, 4, 2, 40, 21, 1)
    yield gaussian("gauss_g8_d8_noprompt", 120, 8, 1, 8, 0, 2)
    yield gaussian("gauss_g1_d128_fullpages", 120, 2, 2, 128, 48, 3)
    yield gaussian("gauss_sharp_d5", 130, 3, 3, 5, 10, 4, 5.0)
    yield milestones("milestones_g4_d64", 240, 8, 2, 64, 30, 5)
    yield milestones("milestones_g2_d80", 200, 4, 2, 80, 7, 6)
    yield ties(f"ties_zero_keys_p{page}", 110, 4, 2, 16, 9, 7, zero=True)
    yield ties(f"ties_equal_pages_p{page}", 110, 4, 2, 16, 9, 8, period=page)
    yield ties(f"ties_period_p{page}", 130, 4, 1, 24, 5, 9, period=3 * page, constant=True)
    yield ties(f"ties_constant_queries_p{page}", 110, 2, 1, 24, 12, 10, constant=True)
    yield huge("huge_norms", 110, 4, 2, 40, 13, 11)


def cases_for(trace, page, dtype):
    tokens = trace.shape[0]
    for position, (policy, options) in enumerate(variants("?")):
        base = Case(policy, page, 10**6, {k: v for k, v in options.items() if v != "?"})
        least = base.pinned_pages(trace.prompt) + 1
        pages = -(-tokens // page)
        # The least that is allowed, with a remainder that must not count; a few pages more; a third of it all.
        for number, P in enumerate(sorted({least, least + 3, max(least + 4, pages // 3)})):
            budget = P * page + ((page - 1) if number == 0 else 0)
            read = {"read_budget": str(max(1, (P * (1 + position % 2)) // 3) * page)} if "?" in options.values() else {}
            yield Case(policy, page, budget, {**options, **read}, dtype)


def decisions(checker, quick, dtypes, only):
    seen = {}
    number = 0
    for page in (1, 3, 7, 16):
        for trace in traces_for(page):
            trace = seen.setdefault(trace.name, trace)
            for dtype in dtypes:
                for case in cases_for(trace, page, dtype):
                    number += 1
                    # 13 has no factor in common with the numbers of variants, budgets, page sizes and traces.
                    if quick and number % 13:
                        continue
                    if only and only not in f"{trace.name} {case.label()} page {page}":
                        continue
                    checker.compare(trace, case)
            if trace.name.endswith(f"_p{page}"):
                trace.cache.clear()


def below_the_budget(checker):
    """With room for everything, every policy gives the very bits of Dense."""
    trace = milestones("below_budget", 90, 4, 2, 40, 11, 20)
    reference = checker.run_case(trace, Case("dense", 16, 96))
    if reference is None:
        return
    for policy in ("streaming_llm", "h2o", "quest", "raas", "kindred", "random", "raas+quest", "h2o+quest"):
        other = checker.run_case(trace, Case(policy, 16, 96))
        if other is not None:
            same = other[1]["out"].tobytes() == reference[1]["out"].tobytes()
            checker.check(same, f"below the budget {policy} is bit-identical to dense", command=other[0])


def randomness(checker):
    """Same seed, same run; another seed, another run; all candidates equally likely; heads choose on their own."""
    trace = gaussian("random_long", 420, 4, 4, 8, 1, 21)
    case = Case("random", 1, 8)
    one, again = checker.compare(trace, case), checker.compare(trace, case)
    other = checker.compare(trace, Case("random", 1, 8, {"seed": "12345"}))
    if None in (one, again, other):
        return
    first, second, third = (result[0]["resident"] for result in (one, again, other))
    checker.check((first == second).all(), "random: the same seed repeats itself")
    checker.check((first != third).any(), "random: another seed differs")
    checker.check(any((first[:, 0] != first[:, kv]).any() for kv in range(1, 4)), "random: heads choose independently")
    for wish, seed in ((one[1], "default seed"), (other[1], "seed 12345")):
        counts = np.bincount([pick for pick, n in wish.picks if n == 7], minlength=7)
        mean = counts.sum() / 7
        chi2 = float(((counts - mean) ** 2).sum() / mean)
        checker.check(chi2 < 40, f"random: uniform among the candidates ({seed})", f"counts {counts.tolist()}")


def many_at_once(checker):
    """Lists of policies and budgets, keys restricted to one policy, no metadata, odd but valid files."""
    trace = milestones("many", 150, 4, 2, 40, 12, 22)
    path, out, sheet = checker.trace_file(trace), checker.path("many.json"), checker.path("many.csv")
    lines = ["--trace", path, "--policy", "dense,streaming_llm,h2o,quest,raas,h2o+quest", "--budget", "48,96",
             "--page-size", "4", "--json", out, "--csv", sheet, "--set", "h2o.pin_prompt=true", "--set",
             "raas.alpha=0.05"]
    command, code, stdout, stderr = checker.run(lines)
    if checker.check(code == 0, "several policies and budgets: exit code", f"{code} {stderr[:300]}", command):
        with open(out) as file:
            rows = rows_in(json.load(file)) or []
        with open(sheet, newline="") as file:
            sheet_rows = list(csv.DictReader(file))
        checker.check(len(rows) == len(sheet_rows), "several policies: as many rows in JSON as in CSV", command=command)
        for policy in ("streaming_llm", "h2o", "quest", "raas"):
            for budget in (48, 96):
                options = {"h2o": {"pin_prompt": "true"}, "raas": {"alpha": "0.05"}}.get(policy, {})
                wish = expect(trace, Case(policy, 4, budget, options))
                row = [r for r in rows if same_row(r, policy, budget)]
                what = f"several policies: {policy} at {budget}"
                if checker.check(len(row) == 1, f"{what} has one row", str(rows)[:300], command):
                    if wish.margin.min() >= NEAR:
                        got = metric(row[0], "share"), metric(row[0], "peak_tokens"), metric(row[0], "evicted_tokens")
                        fine = abs(got[0] - wish.share) < 1e-6 and got[1:] == (wish.peak, wish.evicted)
                        checker.check(fine, f"{what}: metrics", f"{got} {wish.share, wish.peak, wish.evicted}", command)
        for policy in ("dense", "h2o+quest"):
            checker.check(any(r["policy"] == policy for r in rows), f"several policies: {policy} has a row")

    # read_budget applies to the selectors, pin_prompt to the evictors, in one command line.
    lines = ["--trace", path, "--policy", "quest,raas", "--budget", "96", "--page-size", "4", "--json", out, "--set",
             "read_budget=24", "--set", "pin_prompt=false"]
    command, code, _, stderr = checker.run(lines)
    if checker.check(code == 0, "keys that some of the policies have", f"{code} {stderr[:300]}", command):
        with open(out) as file:
            rows = rows_in(json.load(file)) or []
        for policy, options in (("quest", {"read_budget": "24"}), ("raas", {"pin_prompt": "false"})):
            wish = expect(trace, Case(policy, 4, 96, options))
            row = [r for r in rows if same_row(r, policy, 96)]
            checker.check(len(row) == 1 and abs(metric(row[0], "share") - wish.share) < 1e-6,
                          f"keys that some of the policies have: {policy}", command=command)

    # Valid files that are unlike ours: no metadata (no prompt), other order, a foreign tensor, a padded header.
    bare = Trace("no_metadata", trace.q, trace.k, trace.v, 0)
    with open(checker.path("no_metadata.safetensors"), "wb") as file:
        file.write(bare.file(metadata=False))
    checker.files[bare.name] = checker.path("no_metadata.safetensors")
    checker.compare(bare, Case("raas", 4, 48))
    odd = Trace("odd_but_valid", trace.q, trace.k, trace.v, trace.prompt)
    plain = pack_tensors(OrderedDict(v=trace.v, other=np.zeros((3, 2)), q=trace.q, k=trace.k),
                         {"prompt_tokens": "12", "format": "pt"})
    (length,) = struct.unpack("<Q", plain[:8])
    with open(checker.path("odd.safetensors"), "wb") as file:
        file.write(pack(plain[8 : 8 + length] + b" " * 13, plain[8 + length :]))
    checker.files[odd.name] = checker.path("odd.safetensors")
    checker.compare(odd, Case("raas", 4, 48))
    one = gaussian("one_token", 1, 2, 1, 8, 0, 23)
    checker.compare(one, Case("quest", 16, 16))


# ---- the clairvoyant and the sweep -----------------------------------------------------------------------------------


def wanting(name, wishes):
    """One head, a key of its own for each token; query t gives key i the share wishes[t][i], others next to nothing."""
    tokens = len(wishes)
    q = np.zeros((tokens, 1, tokens), np.float32)
    for t, wish in enumerate(wishes):
        for i, share in wish.items():
            q[t, 0, i] = (20 + math.log(share)) * math.sqrt(tokens)
    rng = np.random.RandomState(41)
    return Trace(name, q, np.eye(tokens, dtype=np.float32)[:, None, :],
                 rng.standard_normal((tokens, 1, tokens)).astype(np.float32), 0)


def most_mass_kept(trace, page, P):
    """Mean share of an evictor that errs nowhere: of every set of pages that can be resident, the most mass kept on any
    way to it."""
    layer = layer_of(trace, "f32")
    tokens, query_heads, kv_heads, _ = trace.shape
    starts = np.arange(0, tokens, page)
    total = 0.0
    for kv in range(kv_heads):
        heads = slice(kv * layer.group, (kv + 1) * layer.group)
        mass = np.add.reduceat(layer.dense[heads].sum(axis=0), starts, axis=1)  # [queries, pages]
        mass[: trace.prompt] = 0
        best = {frozenset(): 0.0}
        for opened in range(len(starts)):
            step = mass[opened * page : (opened + 1) * page].sum(axis=0)
            reached = {}
            for pages, kept in best.items():
                for rest in [pages - {out} for out in pages] if len(pages) == P else [pages]:
                    now = rest | {opened}
                    reached[now] = max(reached.get(now, 0.0), kept + sum(step[p] for p in now))
            best = reached
        total += max(best.values())
    return total / ((tokens - trace.prompt) * query_heads)


def clairvoyant(checker):
    """By hand, against all ways to evict, and against every evictor there is."""
    # Nobody wants 2, then nobody wants 3; 0 is wanted until 4, 1 at the end alone.
    simple = wanting("clairvoyant_simple", [{0: 1}, {0: 1}, {0: 1}, {0: 1}, {0: 1}, {1: 1}])
    # 0 is wanted most in sum, but keeping it costs every newer page: the least to come is not what should go.
    trap = wanting("clairvoyant_trap", [{0: 1}, {0: 0.9}] + [{0: 0.3, t - 1: 0.6} for t in range(2, 9)])
    for trace, P, wish in ((simple, 3, {3: {0, 1, 3}, 4: {0, 1, 4}}), (trap, 2, {t: {t - 1, t} for t in range(2, 9)})):
        result = checker.run_case(trace, Case("clairvoyant", 1, P))
        for t, tokens in wish.items() if result else ():
            got = set(np.flatnonzero(result[1]["resident"][t, 0]).tolist())
            checker.check(got == tokens, f"{trace.name}: resident at {t}", f"{got}, should be {tokens}", result[0])

    small = [gaussian("clairvoyant_gauss", 26, 4, 2, 8, 5, 42), gaussian("clairvoyant_sharp", 25, 2, 1, 8, 0, 43, 8.0),
             milestones("clairvoyant_milestones", 28, 4, 2, 16, 6, 44),
             ties("clairvoyant_ties", 24, 2, 1, 8, 3, 45, zero=True)]
    for trace in small:
        for page in (2, 3):
            for P in (1, 2, 3, 5, 8, 20):
                result = checker.run_case(trace, Case("clairvoyant", page, P * page))
                if result is None:
                    continue
                command, dump, row, _ = result
                what = f"{trace.name}: page {page} budget {P * page}"
                wish = most_mass_kept(trace, page, P)
                checker.check(abs(metric(row, "share") - wish) < 1e-6, f"{what}: no evictions keep more",
                              f"{metric(row, 'share')}, {wish} can be kept", command)
                resident = dump["resident"].astype(int)
                checker.check(resident.sum(axis=2).max() <= P * page, f"{what}: the budget holds", command=command)
                t = np.arange(trace.prompt + 1, trace.shape[0])
                back = (resident[1:] > resident[:-1]).any(axis=1)
                back[np.arange(len(t)), t] = False
                checker.check(not back.any(), f"{what}: nothing comes back", command=command)

    sheet = checker.path("ceilings.csv")
    for trace in traces_for(4):
        for seed in (0, 1, 2):
            lines = ["--trace", checker.trace_file(trace), "--sweep", "--page-size", "4", "--csv", sheet, "--budget",
                     "8,24,40,64,80,100", "--set", f"random.seed={seed}"]
            # The others know no seed: once is enough.
            lines += ["--policy", "clairvoyant,random"] if seed else []
            command, code, _, stderr = checker.run(lines)
            if not checker.check(code == 0, f"{trace.name}: sweep", f"{code} {stderr[:300]}", command):
                continue
            with open(sheet, newline="") as file:
                rows = [row for row in csv.DictReader(file) if not row["refused"] and row["policy"] != "dense"]
            share = {(row["policy"], row["budget_tokens"]): float(row["share"]) for row in rows}
            for row in rows:
                selects_only = row["read_budget_tokens"] and row["evicted_tokens"] == "0"
                shares_budget = row["policy"].startswith("ada_kv")  # the ceilings give every head as much
                for ceiling in [] if selects_only or shares_budget else ["clairvoyant"] + ["oracle"] * (seed == 0):
                    most = share[ceiling, row["budget_tokens"]]
                    checker.check(float(row["share"]) <= most + 1e-6,
                                  f"{trace.name}: {row['policy']} at {row['budget_tokens']} is not above {ceiling}",
                                  f"{row['share']}, {most}", command)


def sweep(checker):
    """A row for every policy and power of two, the figures of single runs, reasons in the gaps, and a picture."""
    trace = milestones("sweep", 150, 4, 2, 40, 22, 46)
    path, out, sheet = checker.trace_file(trace), checker.path("sweep.json"), checker.path("sweep.csv")
    command, _, _, stderr = checker.run(["--trace", path, "--policy", "snail", "--budget", "8"])
    known = stderr.strip().rsplit("known are ", 1)[-1].split(", ")
    single = {name for name in known if "+" not in name}
    checker.check({"dense", "raas", "oracle", "random", "clairvoyant"} <= single, "policies are listed", stderr,
                  command)
    command, code, stdout, stderr = checker.run(
        ["--trace", path, "--sweep", "--page-size", "4", "--csv", sheet, "--json", out])
    if not checker.check(code == 0, "sweep: exit code", f"{code} {stderr[:300]}", command):
        return
    with open(sheet, newline="") as file:
        rows = list(csv.DictReader(file))
    with open(out) as file:
        in_json = rows_in(json.load(file)) or []
    wanted = {(name, budget) for name in single for budget in (4, 8, 16, 32, 64, 128)}
    got = [(row["policy"], int(row["budget_tokens"])) for row in rows]
    checker.check(set(got) == wanted and len(got) == len(wanted), "sweep: a row for every policy and power of two",
                  str(set(got) ^ wanted), command)
    checker.check([(r["policy"], r["budget_tokens"]) for r in in_json] == got, "sweep: the same rows in JSON",
                  command=command)
    measures = ("decode_steps", "share", "mean_error", "max_error", "peak_resident_tokens", "evicted_tokens")
    for row, twin in zip(rows, in_json):
        what = f"sweep: {row['policy']} at {row['budget_tokens']}"
        cells = [row[name] for name in measures]
        checker.check(not any(cells) if row["refused"] else all(cells), f"{what}: figures or a reason", str(row),
                      command)
        checker.check((twin["refused"] or "") == row["refused"] and row["refused"] in stdout, f"{what}: the reason",
                      f"{twin['refused']}", command)
        # 22 tokens of prompt are 6 pages; one more is to decode in.
        if row["policy"] in ("raas", "random"):
            checker.check(bool(row["refused"]) == (int(row["budget_tokens"]) < 28), f"{what}: refused where it must be",
                          row["refused"], command)
        if row["policy"] in ("dense", "h2o", "quest", "oracle", "clairvoyant"):
            checker.check(not row["refused"], f"{what}: not refused", row["refused"], command)
    for policy, budget in (("raas", 64), ("clairvoyant", 16), ("oracle", 8), ("quest", 32)):
        lines = ["--trace", path, "--policy", policy, "--budget", str(budget), "--page-size", "4", "--json", out]
        alone_command, code, _, stderr = checker.run(lines)
        if checker.check(code == 0, f"sweep: {policy} at {budget} alone", stderr[:300], alone_command):
            with open(out) as file:
                alone = rows_in(json.load(file))[0]
            swept = next(r for r in in_json if (r["policy"], r["budget_tokens"]) == (policy, budget))
            checker.check(all(alone[name] == swept[name] for name in measures), f"sweep: {policy} at {budget} as alone",
                          f"{alone} {swept}", alone_command)

    lines = ["--trace", path, "--sweep", "--policy", "raas,h2o", "--budget", "8,48", "--page-size", "4", "--csv", sheet]
    command, code, _, stderr = checker.run(lines)
    with open(sheet, newline="") as file:
        got = [(row["policy"], row["budget_tokens"], bool(row["refused"])) for row in csv.DictReader(file)]
    wish = [("raas", "8", True), ("raas", "48", False), ("h2o", "8", False), ("h2o", "48", False)]
    checker.check(code == 0 and got == wish, "sweep: of lists", f"{code} {got} {stderr[:300]}", command)
    lines = ["--trace", path, "--sweep", "--policy", "raas,random", "--budget", "8", "--page-size", "4"]
    refused(checker, "a sweep that nobody takes part in", lines, ("raas", "prompt"))
    refused(checker, "a dump of a sweep", ["--trace", path, "--sweep", "--dump", checker.path("swept.safetensors")])
    refused(checker, "no --policy without --sweep", ["--trace", path, "--budget", "48"], ("--policy", "--sweep"))
    refused(checker, "no --budget without --sweep", ["--trace", path, "--policy", "raas"], ("--budget", "--sweep"))

    picture = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "bench", "plot.py")
    # The checks need numpy alone, so that another python than the one that runs them may have matplotlib.
    for python in dict.fromkeys([sys.executable, "/usr/bin/python3"]):
        if subprocess.run([python, "-c", "import matplotlib"], capture_output=True).returncode != 0:
            continue
        command = [python, picture, "sweep", "--csv", sheet, "--output", checker.folder]
        done = subprocess.run(command, capture_output=True)
        drawn = os.path.exists(checker.path("sweep.png")) and os.path.getsize(checker.path("sweep.png")) > 10000
        checker.check(done.returncode == 0 and drawn, "sweep: a picture", done.stderr.decode()[-300:], command)
        break


# ---- what must be refused --------------------------------------------------------------------------------------------

SET_KEYS = ("used", "r", "alpha", "evidence", "window", "patience", "caution", "pin_prompt", "sinks", "read_budget",
            "seed", "preset")


def refused(checker, what, arguments, must_name=(), timeout=30):
    command, code, stdout, stderr = checker.run(arguments, timeout)
    lines = [line for line in stderr.splitlines() if line.strip()]
    checker.check(code == 2, f"refused: {what}: exit code 2", f"{code}, {stderr.strip()[:200]}", command)
    checker.check(len(lines) == 1, f"refused: {what}: one line on stderr", f"{len(lines)}: {stderr[:300]!r}", command)
    absent = lambda word: not re.search(rf"(?<![A-Za-z0-9_]){re.escape(word)}(?![A-Za-z0-9_])", stderr)
    missing = [word for word in must_name if absent(word)]
    checker.check(not missing, f"refused: {what}: the line names what it should", f"{missing} not in {stderr[:300]!r}",
                  command)


def broken_files():
    q, kv = np.zeros((6, 4, 8), np.float32), np.zeros((6, 2, 8), np.float32)
    good = {"q": q, "k": kv, "v": kv}
    meta = {"prompt_tokens": "2"}
    whole = pack_tensors(good, meta)
    (length,) = struct.unpack("<Q", whole[:8])
    header, body = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    def changed(name, **entries):
        other = json.loads(json.dumps(header))
        other[name].update(entries)
        return pack(other, body)

    def tensors(**others):
        return pack_tensors({**good, **others}, meta)

    yield "an empty file", b""
    yield "four bytes", b"\x10\0\0\0"
    yield "a header length and nothing else", struct.pack("<Q", 100)
    yield "a truncated header", whole[: 8 + length // 2]
    yield "truncated data", whole[:-10]
    yield "a header length of 2^63", pack(header, body, 1 << 63)
    yield "a header length of 2^64 - 1", pack(header, body, (1 << 64) - 1)
    yield "a header length of 2^40", pack(header, body, 1 << 40)
    yield "a header length of 0", pack(header, body, 0)
    yield "a header that is not JSON", pack(b"{this is not JSON}", body)
    yield "a header that is an array", pack([1, 2], body)
    yield "a header nested very deeply", pack(b"[" * 200000, body)
    yield "binary noise", bytes(np.random.RandomState(3).bytes(2000))
    yield "an entry that is not an object", pack({**header, "k": 7}, body)
    yield "offsets beyond the file", changed("v", data_offsets=[len(body), len(body) + 6 * 2 * 8 * 4])
    yield "offsets near 2^64", changed("v", data_offsets=[(1 << 64) - 400, (1 << 64) - 16])
    yield "negative offsets", changed("v", data_offsets=[-384, 0])
    yield "offsets the wrong way round", changed("v", data_offsets=[384, 0])
    yield "offsets that do not fit the shape", changed("v", data_offsets=[0, 100])
    yield "offsets that are words", changed("v", data_offsets=["a", "b"])
    yield "no offsets", pack({**header, "q": {"dtype": "F32", "shape": [6, 4, 8]}}, body)
    yield "a shape whose size overflows", changed("q", shape=[1 << 32, 1 << 32, 4])
    yield "a negative shape", changed("q", shape=[-6, -4, 8])
    yield "a shape that is a word", changed("q", shape="6x4x8")
    yield "a tensor of I32", changed("q", dtype="I32")
    yield "an unknown dtype", changed("q", dtype="F99")
    for name in good:
        yield f"no {name}", pack_tensors({n: a for n, a in good.items() if n != name}, meta)
    yield "q of rank 2", tensors(q=q.reshape(6, 32))
    yield "k of rank 4", tensors(k=kv.reshape(6, 2, 4, 2))
    yield "3 kv heads under 4 query heads", tensors(k=np.zeros((6, 3, 8)), v=np.zeros((6, 3, 8)))
    yield "k and v of different heads", tensors(v=np.zeros((6, 4, 8)))
    yield "q and k of different tokens", tensors(q=np.zeros((7, 4, 8)))
    yield "q and k of different head_dim", tensors(q=np.zeros((6, 4, 4)))
    yield "no tokens", tensors(q=np.zeros((0, 4, 8)), k=np.zeros((0, 2, 8)), v=np.zeros((0, 2, 8)))
    yield "no head_dim", tensors(q=np.zeros((6, 4, 0)), k=np.zeros((6, 2, 0)), v=np.zeros((6, 2, 0)))
    yield "no kv heads", tensors(k=np.zeros((6, 0, 8)), v=np.zeros((6, 0, 8)))
    for words in ("6", "7", "99999999999999999999999", "-1", "two", "", "3abc"):
        yield f"prompt_tokens {words!r} of 6 tokens", pack_tensors(good, {"prompt_tokens": words})
    yield "metadata that is a word", pack({**header, "__metadata__": "x"}, body)


def refusals(checker):
    for what, content in broken_files():
        path = checker.path("broken.safetensors")
        with open(path, "wb") as file:
            file.write(content)
        refused(checker, what, ["--trace", path, "--policy", "raas", "--budget", "64", "--page-size", "2"])
    refused(checker, "a file that is not there",
            ["--trace", checker.path("nothing"), "--policy", "raas", "--budget", "64"])
    refused(checker, "a directory", ["--trace", checker.folder, "--policy", "raas", "--budget", "64"])

    trace = gaussian("refusals", 60, 4, 2, 8, 20, 30)
    path = checker.trace_file(trace)

    def options(what, *more, policy="raas", budget="48", page="4", names=()):
        lines = ["--trace", path, "--policy", policy, "--budget", budget, "--page-size", page, *more]
        refused(checker, what, lines, names)

    options("an unknown policy", policy="snail", names=("snail",))
    options("an unknown policy in a list", policy="raas,snail", names=("snail",))
    options("no policy name", policy="")
    options("a composition without its second half", policy="raas+")
    options("a composition without its first half", policy="+quest")
    options("an unknown name in a composition", policy="raas+snail", names=("snail",))
    options("an evictor as selector", policy="raas+h2o")
    options("an unknown --set key", "--set", "alhpa=1", names=SET_KEYS)
    options("a --set key that no listed policy has", "--set", "alpha=0.1", policy="h2o", names=SET_KEYS)
    options("a --set key for a policy that is not listed", "--set", "raas.alpha=0.1", policy="h2o")
    options("--set without a value", "--set", "alpha")
    options("--set with an empty value", "--set", "alpha=")
    options("--set alpha with a word", "--set", "alpha=much")
    options("--set alpha with a tail", "--set", "alpha=0.1x")
    options("--set used with an unknown word", "--set", "used=often")
    options("--set evidence with an unknown word", "--set", "evidence=hearsay")
    options("--set preset with an unknown word", "--set", "preset=paper_v9")
    options("--set pin_prompt with an unknown word", "--set", "pin_prompt=perhaps")
    options("--set patience below 1", "--set", "patience=0.5", policy="kindred", names=("patience", "0.500000"))
    options("--set window with a word", "--set", "window=soon", policy="kindred")
    options("--set sinks with a word", "--set", "sinks=few", policy="streaming_llm")
    options("--set seed with a word", "--set", "seed=x", policy="random")
    options("budget 0", budget="0")
    options("budget 0 for quest", budget="0", policy="quest")
    options("a budget below one page", budget="3", policy="h2o")
    options("a negative budget", budget="-16")
    options("a budget that is a word", budget="much")
    options("one bad budget in a list", budget="48,x")
    options("a read budget below one page", "--set", "read_budget=3", policy="quest")
    options("a read budget below one page in a composition", "--set", "read_budget=3", policy="raas+quest")
    options("P smaller than the prompt's pages plus one", budget="20")
    options("the same for random", budget="20", policy="random")
    options("the same for h2o with pin_prompt", "--set", "pin_prompt=true", budget="20", policy="h2o")
    options("the same for kindred", budget="20", policy="kindred")
    options("the same in a composition", budget="20", policy="raas+quest")
    options("the same at one budget of a list", budget="48,20")
    options("P smaller than the sinks' pages plus one", budget="4", policy="streaming_llm")
    options("the same with more sinks", "--set", "sinks=45", policy="streaming_llm")
    options("page size 0", page="0")
    options("a negative page size", page="-4")
    options("page size 257", page="257", budget="1028", policy="h2o")
    options("an unknown dtype", "--dtype", "f8")
    options("an unknown option", "--colour", "red")
    dump = ("--dump", checker.path("two.safetensors"))
    options("a dump of two policies", *dump, policy="raas,h2o")
    options("a dump of two budgets", *dump, budget="48,52")
    refused(checker, "no --trace", ["--policy", "raas", "--budget", "48"])
    refused(checker, "no --policy", ["--trace", path, "--budget", "48"])

    # The residency of 33,000 tokens at 33,000 steps is above 2 GiB; the refusal must come before the work.
    long = gaussian("long", 33000, 1, 1, 1, 0, 31)
    lines = ["--trace", checker.trace_file(long), "--policy", "streaming_llm", "--budget", "64"]
    lines += ["--dump", checker.path("big.safetensors")]
    refused(checker, "a dump above 2 GiB without --force", lines, ("--force",))

    # And after all that, the plain thing works, and help is no error.
    command, code, _, stderr = checker.run(["--trace", path, "--policy", "raas", "--budget", "24", "--page-size", "4"])
    checker.check(code == 0, "P of exactly the pinned pages plus one is accepted", f"{code} {stderr[:200]}", command)
    command, code, stdout, _ = checker.run(["--help"])
    checker.check(code == 0 and "--trace" in stdout, "--help", f"{code}", command)


# ---- main ------------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description="Checks a replay binary from outside.")
    parser.add_argument("replay", help="path of the binary")
    parser.add_argument("--quick", action="store_true", help="one case in thirteen")
    parser.add_argument("--dtypes", default="f32", help="storage types to check, from f32,f16,bf16 (default f32)")
    parser.add_argument("--only", help="only decision cases whose description contains this, and nothing else")
    parser.add_argument("--keep", help="work in this directory and leave it there")
    options = parser.parse_args()
    binary = os.path.abspath(options.replay)
    if not os.access(binary, os.X_OK):
        sys.exit(f"{options.replay} is not an executable file")

    folder = options.keep or tempfile.mkdtemp(prefix="check_replay.")
    os.makedirs(folder, exist_ok=True)
    checker = Checker(binary, folder)
    try:
        decisions(checker, options.quick, options.dtypes.split(","), options.only)
        # Correct float32 code is excused for 1 or 2 heads in a hundred; many more would hide a real difference.
        checker.check(checker.excused <= 3 + 0.05 * checker.heads, "close calls are the exception",
                      f"{checker.excused} of {checker.heads} heads excused")
        sections = [] if options.only else [
            ("below the budget: bits of dense", below_the_budget), ("randomness", randomness),
            ("several policies, odd but valid files", many_at_once),
            ("the clairvoyant: against all evictions, above every evictor", clairvoyant),
            ("sweeps", sweep), ("refusals of files and options", refusals)]
        before = checker.passed + len(checker.failures)
        summary = [f"decisions, outputs and metrics: {before} checks"]
        for name, section in sections:
            section(checker)
            now = checker.passed + len(checker.failures)
            summary.append(f"{name}: {now - before} checks")
            before = now
    finally:
        if not options.keep:
            shutil.rmtree(folder)

    print(f"{'policy and options':<62}{'runs':>6}{'head-steps':>12}{'excused':>9}")
    for label, group in sorted(checker.groups.items()):
        print(f"{label:<62}{group['runs']:>6}{group['steps']:>12}{group['excused']:>9}")
    print("\n".join(summary))
    print(f"heads excused from some step on, because a decision was too close for float32: {checker.excused} of "
          f"{checker.heads}")
    print(f"{checker.passed} passed, {len(checker.failures)} failed")
    return 1 if checker.failures else 0


if __name__ == "__main__":
    sys.exit(main())
