# SPDX-License-Identifier: Apache-2.0
"""What a trained model looks at, and what each policy kept, from what `decode` recorded."""
import dataclasses
import json
import math
import pathlib
import struct
import sys

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import PowerNorm

from plot_style import GREEN, RED, InputError, finish, save, shown

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "examples"))
import plot_waterfall  # noqa: E402  (found through the line above)

BAD_SAFETENSORS = (KeyError, ValueError, IndexError, struct.error)


def attention_weights(trace, head):
    """softmax(q k^T / sqrt(head_dim)) of one query head under the causal mask, [tokens, tokens]."""
    q, k = trace["q"], trace["k"]
    tokens, heads, head_dim = q.shape
    scores = q[:, head] @ k[:, head // (heads // k.shape[1])].T / math.sqrt(head_dim)
    scores[np.triu_indices(tokens, 1)] = -np.inf
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class ChainLine:
    label: str
    source: str
    begin: int  # positions in the whole sequence from here on
    asks_source: int  # the word whose query has to find the source, in the line's own entry of the prompt
    asks_value: int  # the word whose query has to find the source's value
    entry: int  # where the prompt names this line's source
    definition: int  # where the value that this line cites was written
    value: int  # where this line's own value is written


def chain_lines(problem):
    """What each line of a solution looks up; a line is "step S : use SRC is v , get S v ;", perhaps with more words."""
    prompt, chain = problem["prompt"].split(), problem["chain"].split()
    entries = {prompt[at]: at + 1 for at in range(13, len(prompt) - 3, 2)}
    written = {prompt[at]: at + 1 for at in range(1, 13, 2)}
    lines, begin = [], len(prompt)
    for text in " ".join(chain).split(" ;"):
        words = text.split()
        if len(words) < 11 or words[0] != "step" or words[3] != "use":
            continue
        line = ChainLine(words[1], words[4], begin, begin + 3, begin + 5, entries[words[1]], written[words[4]],
                         begin + 10)
        written[line.label] = line.value
        lines.append(line)
        begin += len(words) + 1
    if not lines:
        raise InputError("the problem's chain has no line like \"step S1 : use S2 is 3 , get S1 4 ;\"")
    return lines


def load_traces(directory, problem):
    files = sorted(directory.glob("layer_*.safetensors"))
    if not files:
        raise InputError(f"{directory} holds no layer_<n>.safetensors, write them with decode --record-trace")
    traces = {}
    for file in files:
        try:
            arrays, metadata = plot_waterfall.read_safetensors(file)
            arrays = {name: arrays[name] for name in "qkv"}
        except BAD_SAFETENSORS as error:
            raise InputError(f"{file} is not a trace with q, k and v") from error
        prompt_tokens, words = int(metadata.get("prompt_tokens", 0)), len(problem["prompt"].split())
        if prompt_tokens != words or len(arrays["q"]) > words + len(problem["chain"].split()):
            raise InputError(f"{file} was not recorded from this problem: its prompt has "
                             f"{prompt_tokens} tokens, the problem's {words}")
        traces[int(file.stem.split("_")[1])] = arrays
    return traces


def best_head(traces, lines, layer, head):
    """The layer and head that look most at both of what a line needs, its weights, and how many words after a prompt
    entry it looks: a small model moves what an entry says onto a word after it."""
    best = None
    for number, trace in traces.items():
        for query_head in range(trace["q"].shape[1]):
            if layer not in (None, number) or head not in (None, query_head):
                continue
            weights = attention_weights(trace, query_head)
            known = [line for line in lines if line.asks_value < len(weights)]
            cited = np.mean([weights[line.asks_value, line.definition] for line in known])
            found = [np.mean([weights[line.asks_source, line.entry + shift] for line in known]) for shift in range(5)]
            score = min(cited, max(found))
            if best is None or score > best[0]:
                best = (score, number, query_head, weights, int(np.argmax(found)))
    if best is None:
        raise InputError(f"the trace has no layer {shown(layer)} with a query head {shown(head)}")
    return best[1:]


def draw_map(axes_pair, weights, lines, milestone, phoenix, shift):
    """Every line's strongest look at every word of the prompt, and at every page of 4 tokens of the solution."""
    begin = lines[0].begin
    tokens = begin + (len(weights) - begin) // 4 * 4
    solution = weights[:, begin:tokens].reshape(len(weights), -1, 4).sum(axis=2)
    bounds = [line.begin for line in lines] + [len(weights)]
    for axes, mass, left, right in zip(axes_pair, (weights[:, :begin], solution), (0, begin), (begin, tokens)):
        image = np.array([mass[a:b].max(axis=0) for a, b in zip(bounds, bounds[1:])])
        shades = axes.imshow(image, aspect="auto", cmap="Blues", norm=PowerNorm(0.6, 0, 1), interpolation="nearest",
                             extent=(left, right, len(lines), 0))
    axes_pair[0].set_ylabel("line being written (time runs down)")
    axes_pair[1].set_yticks([])
    citing = [i for i, line in enumerate(lines) if line.source == milestone.label]
    look = {"textcoords": "axes fraction", "fontsize": 10.5,
            "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1.5}}
    axes_pair[1].annotate(
        f"milestone: {milestone.label},\ncited by {len(citing)} lines,\nsilent after line {citing[-1] + 1}",
        (milestone.value + 6, citing[-1] + 0.5), (0.98, 0.97), color=RED, ha="right", va="top",
        arrowprops={"arrowstyle": "-|>", "linewidth": 1.5, "color": RED}, **look)
    row = lines.index(phoenix)
    axes_pair[0].annotate(
        f"phoenix:\n\"{phoenix.label} {phoenix.source}\", read\nonce, in line {row + 1}",
        (phoenix.entry + shift, row + 1), (0.06, 0.04), color=GREEN, ha="left", va="bottom",
        arrowprops={"arrowstyle": "-|>", "linewidth": 1.5, "color": GREEN}, **look)
    return shades


def draw_raster(axes, weights, lines, rows, colour):
    """A row per token: where it was written (tick), when it was looked at (dots) and needed (rings)."""
    for y, (label, written, key, queries, needed, remark) in enumerate(rows):
        axes.plot([written, len(weights)], [y, y], color="#dddddd", linewidth=1, zorder=1)
        axes.plot(written, y, marker="|", color="black", markersize=11, markeredgewidth=1.6, zorder=3)
        mass = weights[queries, key]
        axes.scatter(queries, np.full(len(queries), y), s=70 * mass, color=colour, linewidths=0, zorder=4)
        axes.scatter(needed, np.full(len(needed), y), s=110, facecolors="none", edgecolors="#555555", linewidths=0.8,
                     zorder=5)
        axes.text(len(weights) + 8, y, remark, fontsize=9, va="center", color="#444444")
    axes.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=9.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, len(weights))
    axes.axvline(lines[0].begin, color="#888888", linewidth=1)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)


def attention(options):
    problem = problem_of(options)
    lines = chain_lines(problem)
    layer, head, weights, shift = best_head(load_traces(options.trace, problem), lines, options.layer, options.head)
    lines = [line for line in lines if line.value < len(weights)]
    citing = {line: [other for other in lines if other.source == line.label] for line in lines}
    ranked = sorted((line for line in lines if citing[line]), key=lambda line: (-len(citing[line]), line.begin))[:10]
    if not ranked:
        raise InputError("no line of this problem cites another, there is no milestone to draw")
    milestones = sorted(ranked, key=lambda line: line.begin)
    faded = max((line for line in ranked if len(citing[line]) > 2 and citing[line][-1].begin < 0.7 * len(weights)),
                key=lambda line: len(citing[line]), default=ranked[0])
    phoenixes = lines[2 :: max(1, len(lines) // 10)][:10]

    figure = plt.figure(figsize=(13, 8.4))
    grid = figure.add_gridspec(2, 2, width_ratios=(1.05, 1))
    left = grid[:, 0].subgridspec(2, 2, width_ratios=(1, 1.5), height_ratios=(1, 0.03), wspace=0.04, hspace=0.2)
    whole = [figure.add_subplot(left[0, column]) for column in (0, 1)]
    shades = draw_map(whole, weights, lines, faded, phoenixes[len(phoenixes) // 2], shift)
    whole[0].set_title("Looks at the prompt", fontsize=12, loc="left")
    whole[1].set_title("... and the solution, by pages of 4", fontsize=12, loc="left")
    whole[0].set_xlabel("position looked at")
    whole[1].set_xlabel("position looked at")
    figure.colorbar(shades, cax=figure.add_subplot(left[1, :]), orientation="horizontal",
                    label="attention mass, the largest of the line's words")

    rows = [(line.label, line.value, line.value, [other.asks_value for other in lines if other.asks_value > line.value],
             [other.asks_value for other in citing[line]], f"used {len(citing[line])}x") for line in milestones]
    upper = figure.add_subplot(grid[0, 1])
    draw_raster(upper, weights, lines, rows, RED)
    upper.set_title("Milestones: a lemma's value, cited for a while, then never again", fontsize=12, loc="left")
    rows = [(f"{line.label} {line.source}", line.entry, line.entry + shift, [other.asks_source for other in lines],
             [line.asks_source], f"after {line.asks_source - line.entry} words") for line in phoenixes]
    lower = figure.add_subplot(grid[1, 1], sharex=upper)
    draw_raster(lower, weights, lines, rows, GREEN)
    lower.set_title("Phoenixes: entries of the prompt, read once after a long silence", fontsize=12, loc="left")
    lower.set_xlabel("position in the sequence: when it is looked at (black tick: where it was written)")
    note = "Dot: attention mass of the query that has to find it, by area. Ring: the solution needs it here. "
    note += "Grey line: end of the prompt. Stripes in the prompt: where words that need nothing look."
    if shift:
        note += f"\nThe model looks for a prompt entry {shift} words after it, where its first layer has copied it to."
    path = options.output / "attention_map.png"
    title = f"What a trained model looks at while it writes its solution (layer {layer}, query head {head})"
    finish(figure, title, path, note=note)
    print(f"drawn: {path}  (layer {layer}, query head {head})")


def problem_of(options):
    try:
        lines = options.problems.read_text(encoding="utf-8").splitlines()
        return {key: json.loads(lines[options.problem])[key] for key in ("prompt", "chain", "answer")}
    except IndexError:
        raise InputError(f"{options.problems} has {len(lines)} problems, none is number {options.problem}") from None
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{options.problems} is no file of problems with prompt, chain and answer: {error}") from error


def waterfall(options):
    file = options.run / "comparison.json"
    try:
        comparison = json.loads(file.read_text(encoding="utf-8"))
        results = {result["policy"]: result for result in comparison["policies"]}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{file} is not what decode --json writes: {error}") from error
    names = options.policies.split(",") if options.policies else list(results)
    unknown = [name for name in names if name not in results]
    if unknown:
        raise InputError(f"{file} has no policy {unknown[0]}, it has {', '.join(results)}")
    comparison["policies"] = [results[name] for name in names]
    problem = problem_of(options)
    try:
        figure = plot_waterfall.draw(options.run, comparison, options.layer, options.head, problem,
                                     columns=min(options.columns, len(names) + 1))
    except BAD_SAFETENSORS as error:
        raise InputError(f"{options.run}/resident is not of this problem, or has no head {options.head}") from error
    save(figure, options.output / "waterfall.png")
    print(f"drawn: {options.output / 'waterfall.png'}")
