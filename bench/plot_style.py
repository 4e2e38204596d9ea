# SPDX-License-Identifier: Apache-2.0
"""Looks that all pictures of plot.py share: colours, legends, axes, titles."""
import io
import math
import textwrap

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend)
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator  # noqa: E402
from PIL import Image  # noqa: E402  (matplotlib itself needs it)

# Okabe and Ito's palette. Filled marks and solid lines for what a reader compares first, open marks for its variants.
RED, ORANGE, YELLOW, GREEN, BLUE, SKY, PINK, GREY = (
    "#D55E00", "#E69F00", "#B8A800", "#009E73", "#0072B2", "#56B4E9", "#CC79A7", "#777777")
STYLES = {  # policy: label, colour, marker, filled, width
    "raas": ("RaaS, exact page mass > .01", RED, "o", True, 2.8),
    "kindred": ("Kindred", YELLOW, "D", True, 1.8),
    "raas+quest:read_share=0.5": ("RaaS, reads half by Quest", RED, "D", False, 1.2),
    "raas:evidence=quest_bound:alpha=0.01": ("RaaS, Quest bound > .01", ORANGE, "^", True, 1.6),
    "raas:preset=paper_v1": ("RaaS paper v1: bound > .0001", ORANGE, "^", False, 1.2),
    "raas:preset=paper_v2": ("RaaS paper v2: top half by bound", PINK, "v", True, 1.6),
    "raas:used=rank": ("RaaS, top half by exact mass", PINK, "v", False, 1.2),
    "raas:pin_prompt=false": ("RaaS, prompt not pinned", RED, "o", False, 1.2),
    "h2o:pin_prompt=true": ("H2O, prompt pinned", BLUE, "s", True, 2.0),
    "h2o": ("H2O", BLUE, "s", False, 1.2),
    "streaming_llm:pin_prompt=true": ("StreamingLLM, prompt pinned", GREEN, "P", True, 1.6),
    "streaming_llm": ("StreamingLLM", GREEN, "P", False, 1.2),
    "random": ("Random, prompt pinned", GREY, "X", True, 2.0),
    "random:pin_prompt=false": ("Random, prompt not pinned", GREY, "X", False, 1.2),
    "quest": ("Quest", SKY, "o", True, 1.8),
    "oracle": ("exact top tokens", "#333333", "*", True, 1.4),
}
BROWN = "#8C510A"
SPARE_LOOKS = ((BROWN, "h"), (PINK, "p"), (SKY, ">"), (GREEN, "<"), (BLUE, "d"), (ORANGE, "8"))  # of further policies


class InputError(Exception):
    """One sentence about what is wrong with a file or an option."""


def shown(value):
    return "-" if value in (None, "") else value if isinstance(value, str) else f"{value:g}"


def logarithmic(axis, ticks, text=shown):
    axis.axes.set_xscale("log")
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(float(value))))


def legend_below(figure, axes_list, dense=None, columns=3, extra=()):
    """One legend for all the axes, policies that keep everything last; returns its height in lines."""
    handles = {}
    for axes in axes_list:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    entries = [(handles[label], label) for label in sorted(handles, key=lambda label: "keeps every token" in label)]
    if dense is not None:
        entries.append((Line2D([], [], color="black", linewidth=1, linestyle=":"), "dense: the model without sparsity"))
    entries += extra
    columns = max(1, min(columns, int(figure.get_figwidth() / 3.2)))
    figure.legend(*zip(*entries), loc="lower center", ncol=columns, frameon=False, fontsize=10.5, columnspacing=1.6)
    return -(-len(entries) // columns)


def wrapped(text, width):
    return "\n".join(textwrap.fill(line, round(width)) for line in text.split("\n"))


def finish(figure, title, path, legend_rows=0, note=None, grows=False):
    """Title above, room for the legend and a note below, and the file. A figure that grows keeps its height for the
    axes; else they give up the room."""
    width, height = figure.get_size_inches()
    title = wrapped(title, width * 8.2)
    note = note and wrapped(note, width * 14.5)
    if grows:
        height += 0.57 + 0.25 * title.count("\n") + 0.235 * legend_rows
        height += 0.12 + 0.18 * (note.count("\n") + 1) if note else 0.0
        figure.set_figheight(height)
    heading = figure.suptitle(title, x=0.012, y=1 - 0.12 / height, ha="left", va="top", fontsize=14.5,
                              fontweight="bold")
    heading.set_in_layout(False)
    bottom = (0.12 + 0.235 * legend_rows) / height
    if note:
        figure.text(0.012, bottom + 0.06 / height, note, fontsize=9.5, color="#555555", va="bottom")
        bottom += (0.12 + 0.18 * (note.count("\n") + 1)) / height
    figure.tight_layout(rect=(0, bottom, 1, 1 - (0.45 + 0.25 * title.count("\n")) / height), w_pad=1.6, h_pad=1.4)
    save(figure, path)


def save(figure, path):
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=140)
    plt.close(figure)
    with Image.open(drawn) as image:
        save_image(image, path, Image.Quantize.MEDIANCUT)


def save_image(image, path, choice_of_colours):
    """With few colours, because the pictures of README are in the repository: a third of the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.convert("RGB").quantize(256, choice_of_colours, dither=Image.Dither.NONE).save(path, optimize=True)
