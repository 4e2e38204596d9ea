# SPDX-License-Identifier: Apache-2.0
"""Draws, per policy, which tokens were in the cache at each decode step, from the files that decode --resident wrote.

    plot_waterfall.py OUTPUT_DIR [--layer N] [--head N] [--problems problems.jsonl]

OUTPUT_DIR holds comparison.json and resident/<policy>/layer_<n>.safetensors; waterfall.png is written beside them. With
--problems, whose first problem was decoded, the tokens that the solution has to look up are marked.
"""
import argparse
import json
import pathlib
import struct

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

LINE_TOKENS = 12
DTYPES = {"U8": np.uint8, "F32": np.dtype("<f4")}
FUTURE, EVICTED, SKIPPED, READ, PROMPT_SKIPPED, PROMPT_READ = range(6)
RED = "#d0021b"
COLOURS = ["#ffffff", "#e4e4e4", "#a9cbe8", "#2f6fb0", "#f6d3a3", "#e08a1e"]


def read_safetensors(path):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    arrays = {}
    for name, entry in header.items():
        begin, end = (8 + length + at for at in entry["data_offsets"])
        arrays[name] = np.frombuffer(raw[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return arrays, metadata


def cells(arrays, head, prompt_tokens):
    """[decode step, position] -> one of the six kinds above."""
    resident, read = arrays["resident"][:, head].astype(bool), arrays["read"][:, head].astype(bool)
    steps, tokens = resident.shape
    position = np.arange(tokens)[None, :]
    kinds = np.where(position > prompt_tokens + np.arange(steps)[:, None], FUTURE, EVICTED)
    kinds[resident] = SKIPPED
    kinds[read] = READ
    kinds[resident & (position < prompt_tokens)] = PROMPT_SKIPPED
    kinds[read & (position < prompt_tokens)] = PROMPT_READ
    return kinds


def needed_tokens(problem):
    """(decode step, position) of every look-up of the true solution: a line's prompt entry, and its fact's value."""
    prompt, chain = problem["prompt"].split(), problem["chain"].split()
    steps_begin = 1 + 2 * 6
    needed, value_of = [], {}
    for line in range(len(chain) // LINE_TOKENS):
        words = chain[LINE_TOKENS * line : LINE_TOKENS * (line + 1)]
        label, source = words[1], words[4]
        needed.append((LINE_TOKENS * line + 3, steps_begin + 2 * line + 1))
        needed.append((LINE_TOKENS * line + 5, value_of[source] if source in value_of else prompt.index(source) + 1))
        value_of[label] = len(prompt) + LINE_TOKENS * line + 10
    return np.array(needed)


def title(result, kinds, problem):
    resident = int((kinds >= SKIPPED).sum(axis=1).max())
    read = int(((kinds == READ) | (kinds == PROMPT_READ)).sum(axis=1).max())
    text = f"holds at most {resident} tokens" + (f", reads at most {read}" if read < resident else ", reads them all")
    if problem is not None:
        right = result["answer"] == problem["answer"]
        whole = result["text"] == problem["chain"]
        text += f"\nanswer {result['answer']}: {'right' if right else 'wrong'}, "
        text += "whole chain right" if whole else "chain broken"
    return text


def draw_panel(axes, result, kinds, needed, problem):
    steps, tokens = kinds.shape
    axes.imshow(kinds, cmap=ListedColormap(COLOURS), vmin=0, vmax=len(COLOURS) - 1, aspect="auto",
                interpolation="nearest", extent=(0, tokens, steps, 0))
    if needed is not None:
        held = np.isin(kinds[needed[:, 0], needed[:, 1]], (READ, PROMPT_READ))
        y, x = needed.T + 0.5
        axes.scatter(x[held], y[held], s=9, c="black", linewidths=0, zorder=3)
        axes.scatter(x[~held], y[~held], s=26, c=RED, marker="x", linewidths=1.4, zorder=4)
    departure = result.get("departs_from_dense_at")
    if departure is not None:
        axes.axhline(departure, color=RED, linewidth=1.2, linestyle=(0, (5, 3)))
        axes.text(tokens * 0.985, departure - 6, "departs from dense", color=RED, fontsize=8.5, ha="right", va="bottom")
    axes.set_title(result["policy"], fontsize=13, fontweight="bold", loc="left", pad=32)
    axes.text(0, 1.015, title(result, kinds, problem), transform=axes.transAxes, fontsize=9.5, va="bottom",
              linespacing=1.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8.5)


def draw_legend(axes, with_needed):
    axes.axis("off")
    names = ["not written yet", "evicted: gone for good", "in the cache, not read", "in the cache and read",
             "prompt token, not read", "prompt token, read"]
    order = (PROMPT_READ, READ, PROMPT_SKIPPED, SKIPPED, EVICTED, FUTURE)
    handles = [Patch(facecolor=COLOURS[kind], edgecolor="#999999", linewidth=0.6, label=names[kind]) for kind in order]
    if with_needed:
        handles.append(Line2D([], [], marker="o", color="black", markersize=4, linestyle="",
                              label="the solution needs it now: was read"))
        handles.append(Line2D([], [], marker="x", color=RED, markersize=6, markeredgewidth=1.6, linestyle="",
                              label="the solution needs it now: not read"))
    handles.append(Line2D([], [], color=RED, linestyle=(0, (5, 3)), label="first token unlike dense's"))
    axes.legend(handles=handles, loc="center left", fontsize=10.5, frameon=False, labelspacing=0.75, borderaxespad=0)


def draw(directory, comparison, layer, head, problem, columns=4):
    """One panel per policy, the legend last. `comparison` is what `directory`/comparison.json holds, or a part of it."""
    needed = needed_tokens(problem) if problem else None
    results = comparison["policies"]
    rows = -(-(len(results) + 1) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4.6 * columns, 5.0 * rows), squeeze=False)
    panels = list(grid.flat)
    for axes, result in zip(panels, results):
        arrays, metadata = read_safetensors(directory / "resident" / result["policy"] / f"layer_{layer}.safetensors")
        kinds = cells(arrays, head, int(metadata["prompt_tokens"]))
        draw_panel(axes, result, kinds, needed, problem)
    for axes in panels[len(results) :]:
        axes.axis("off")
    draw_legend(panels[len(results)], needed is not None)
    for row in grid:
        row[0].set_ylabel("decode step (time runs down)", fontsize=10)
    for axes in panels[: len(results)]:
        axes.set_xlabel("position of the token in the sequence", fontsize=9)
    figure.suptitle(f"What each policy keeps: layer {layer}, kv head {head}, budget "
                    f"{comparison['budget']} tokens, pages of {comparison['page_size']}",
                    fontsize=15, fontweight="bold", x=0.012, ha="left", y=0.992)
    figure.tight_layout(rect=(0, 0, 1, 0.985), h_pad=2.0, w_pad=1.5)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--head", type=int, default=0)
    parser.add_argument("--problems", type=pathlib.Path)
    options = parser.parse_args()

    comparison = json.loads((options.output / "comparison.json").read_text())
    problem = json.loads(options.problems.read_text().splitlines()[0]) if options.problems else None
    figure = draw(options.output, comparison, options.layer, options.head, problem)
    picture = options.output / "waterfall.png"
    figure.savefig(picture, dpi=110)
    print("\nThe picture shows, for each policy, which tokens one kv head held at each step.", end=" ")
    if problem is not None:
        print("A black dot is a token\nthat the solution has to look up at that step and that was read, "
              "a red cross one that was not.", end="")
    print(f"\n{picture.resolve()}")


if __name__ == "__main__":
    main()
