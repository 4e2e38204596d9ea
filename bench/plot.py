#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Draws the accuracy section's pictures and prints its tables, from what `reasoning` and `decode` wrote.

    plot.py pictures  --csv results.csv [--csv more.csv] [--output DIR] [--only accuracy,long] [--where dtype=f32]
    plot.py table     --csv results.csv [--metric answer] [--where set=fall]
    plot.py attention --trace DIR --problems problems.jsonl [--output DIR]     DIR from decode --record-trace
    plot.py waterfall --run DIR --problems problems.jsonl [--output DIR]       DIR holds decode's --json comparison.json
                                                                               and its --resident resident/
Needs numpy and matplotlib. Error bars and +/- are one standard error. A picture without rows in the CSV is skipped.
"""
import argparse
import csv
import dataclasses
import json
import math
import pathlib
import struct
import sys
import textwrap

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "examples"))
import plot_waterfall  # noqa: E402  (found through the line above)

TEXT_COLUMNS = ("model", "set", "format", "policy", "dtype", "refused")
NUMBER_COLUMNS = (
    "lines", "problems", "seed", "page_size", "budget", "answer_right", "answer_stderr", "chain_right", "chain_stderr",
    "lines_right", "lines_stderr", "tokens_generated", "tokens_stderr", "peak_resident_tokens", "peak_resident_bytes",
    "mean_resident_bytes", "allocated_bytes", "stamped_share")
MAY_BE_EMPTY = ("page_size", "budget", "stamped_share")  # in a row that was not refused
SETS = ("fall", "mile", "lru", "age", "uniform", "fall:gmax=4", "fall:gmax=12")  # in the order of the pictures
MODELS = ("main", "plain", "varied", "long")
ERRORS = {"answer_right": "answer_stderr", "chain_right": "chain_stderr", "lines_right": "lines_stderr",
          "tokens_generated": "tokens_stderr"}
PERCENT = ("answer_right", "chain_right", "stamped_share")
AXIS_NAMES = {"answer_right": "right final answers [%]", "lines_right": "lines before the first error",
              "tokens_generated": "tokens generated", "stamped_share": "pages stamped per step [%]"}

# Okabe and Ito's palette. Filled marks and solid lines for what a reader compares first, open marks for its variants.
RED, ORANGE, YELLOW, GREEN, BLUE, SKY, PINK, GREY = (
    "#D55E00", "#E69F00", "#B8A800", "#009E73", "#0072B2", "#56B4E9", "#CC79A7", "#777777")
STYLES = {  # policy: label, colour, marker, filled, width
    "raas": ("RaaS, exact page mass > .01", RED, "o", True, 2.8),
    "raas+quest": ("RaaS, reads by Quest", RED, "D", False, 1.2),
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
SPARE_LOOKS = ((YELLOW, "h"), (PINK, "p"), (SKY, ">"), (GREEN, "<"), (BLUE, "d"), (ORANGE, "8"))  # of further policies


class InputError(Exception):
    """One sentence about what is wrong with a file or an option."""


# ------------------------------------------------------------------------------------------------------- the CSV

@dataclasses.dataclass(frozen=True)
class Row:
    values: dict

    def __getattr__(self, column):
        return self.values[column]

    def error(self, column):
        return self.values[ERRORS[column]] if column in ERRORS else 0.0

    def settings(self):
        """("raas", {"alpha": "0.01"}) of "raas:alpha=0.01"."""
        name, *pairs = self.policy.split(":")
        return name, dict(pair.partition("=")[::2] for pair in pairs)

    def is_ablation(self):
        """One point of a sweep over alpha or r, not a policy to set beside the others."""
        name, settings = self.settings()
        return name == "raas" and self.policy not in STYLES and bool({"alpha", "r"} & set(settings))


def parse_row(record, where):
    values = {column: record[column].strip() for column in TEXT_COLUMNS}
    for column in NUMBER_COLUMNS:
        text = record[column].strip()
        if text == "":
            if not values["refused"] and column not in MAY_BE_EMPTY:
                raise InputError(f"{where}: column {column} is empty, though the row was not refused")
            values[column] = None
            continue
        try:
            values[column] = float(text)
        except ValueError:
            values[column] = math.nan
        if not math.isfinite(values[column]):
            raise InputError(f"{where}: column {column} holds '{text}', not a number")
    for column in PERCENT:
        if values[column] is not None and not 0 <= values[column] <= 1:
            raise InputError(f"{where}: column {column} holds {values[column]:g}, a share is from 0 to 1")
    for column in ("budget", "page_size"):
        if values["policy"] != "dense" and values[column] is None:
            raise InputError(f"{where}: policy {values['policy']} has no {column}, only dense may lack one")
    return Row(values)


def read_rows(paths, conditions):
    rows = []
    for path in paths:
        try:
            with open(path, newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file, restval="", restkey="")
                missing = [c for c in (*TEXT_COLUMNS, *NUMBER_COLUMNS) if c not in (reader.fieldnames or [])]
                if missing:
                    raise InputError(f"{path}: column {missing[0]} is missing from the first line")
                rows += [parse_row(record, f"{path}:{reader.line_num}") for record in reader]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    for column, text in conditions:
        rows = [row for row in rows if matches(row.values[column], text)]
    seen, kept = {}, []
    key = ("model", "set", "format", "policy", "page_size", "budget")
    for row in rows:
        twin = seen.setdefault(tuple(row.values[c] for c in key), row)
        if twin is row:
            kept.append(row)
        if twin.values == row.values:
            continue
        differing = [c for c in ("lines", "problems", "seed", "dtype") if twin.values[c] != row.values[c]]
        hint = f"; they differ in {differing[0]}, choose with --where {differing[0]}=..." if differing else ""
        raise InputError("two rows for " + ", ".join(f"{c} {shown(row.values[c])}" for c in key) + hint)
    return kept


def shown(value):
    return "-" if value in (None, "") else value if isinstance(value, str) else f"{value:g}"


def matches(value, text):
    return value == text if isinstance(value, str) else shown(value) == text


def pick(rows, **wanted):
    """Rows that were not refused and whose columns equal what is wanted; dense, without pages, fits every page size."""
    def fits(row):
        return all(row.values[column] == value or (column == "page_size" and row.policy == "dense")
                   for column, value in wanted.items())
    return [row for row in rows if not row.refused and fits(row)]


def by_policy(rows):
    """{policy: its rows by budget}, known policies first."""
    order = list(STYLES)
    names = {row.policy for row in rows if row.policy != "dense"}
    names = sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))
    return {name: sorted((row for row in rows if row.policy == name), key=lambda row: row.budget) for name in names}


def present(rows, column, order):
    found = {row.values[column] for row in rows}
    return [value for value in order if value in found] + sorted(found - set(order))


def dense_of(rows):
    return next((row for row in rows if row.policy == "dense"), None)


# ------------------------------------------------------------------------------------------------- drawing policies

def keeps_all(rows):
    return all(row.peak_resident_tokens > row.budget for row in rows)


def style_of(policy, rows):
    label, colour, marker, filled, width = STYLES[policy]
    all_kept = keeps_all(rows)
    return {"label": label + (", keeps every token" if all_kept else ""), "color": colour, "marker": marker,
            "linewidth": width, "linestyle": (0, (4, 2)) if all_kept else "-", "markersize": 8 if marker == "*" else 6,
            "markerfacecolor": colour if filled else "white", "markeredgecolor": colour,
            "zorder": 5 if policy == "raas" else 3, "alpha": 1.0 if width > 1.3 else 0.8}


def shares(rows, column):
    scale = 100 if column in PERCENT else 1
    return [scale * row.values[column] for row in rows], [scale * row.error(column) for row in rows]


def draw_policies(axes, rows, y, x="budget", x_scale=1.0):
    """A line per policy, and dense as a level across."""
    for policy, points in by_policy(rows).items():
        values, errors = shares(points, y)
        axes.errorbar([row.values[x] * x_scale for row in points], values, yerr=errors, elinewidth=1, capsize=2,
                      **style_of(policy, points))
    dense = dense_of(rows)
    if dense is not None:
        (value,), _ = shares([dense], y)
        axes.axhline(value, color="black", linewidth=1, linestyle=":", zorder=1)
    finish_axis(axes, y, dense)


def finish_axis(axes, y, dense=None):
    if y in PERCENT:
        axes.set_ylim(-4, 106)
        axes.yaxis.set_major_locator(FixedLocator(range(0, 101, 20)))
    elif y == "lines_right":
        axes.set_ylim(0, 1.06 * dense.lines if dense else None)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def logarithmic(axis, ticks, text=shown):
    axis.axes.set_xscale("log")
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(float(value))))


def budget_axis(axes, rows):
    """Powers of two bear labels, and what has room between them."""
    budgets = sorted({row.budget for row in rows if row.budget is not None})
    ticks = [b for b in budgets if math.log2(b).is_integer()]
    for b in budgets:
        if all(abs(math.log(b / tick)) > 0.25 for tick in ticks):
            ticks.append(b)
    logarithmic(axes.xaxis, ticks)
    axes.set_xlim(budgets[0] / 1.08, budgets[-1] * 1.08)
    axes.set_xlabel("budget [tokens per kv head]")


def draws_something(rows):
    return any(row.policy != "dense" for row in rows)


def panels_by_set(rows, names):
    panels = {name: pick(rows, set=name) for name in names}
    return {name: part for name, part in panels.items() if draws_something(part)}


def measure_grid(panels, measures, width, set_x_axis):
    """A column per panel {heading: rows}, a row per measure."""
    size = (max(width * len(panels), 8.5), 1.9 + 3.1 * len(measures))
    figure, grid = plt.subplots(len(measures), len(panels), figsize=size, squeeze=False, sharey="row", sharex="col")
    for column, (heading, part) in zip(grid.T, panels.items()):
        for axes, measure in zip(column, measures):
            draw_policies(axes, part, measure)
            set_x_axis(axes, part)
        for axes in column[:-1]:
            axes.set_xlabel("")
        column[0].set_title(heading, fontsize=12, loc="left")
    for axes, measure in zip(grid[:, 0], measures):
        axes.set_ylabel(AXIS_NAMES[measure])
    return figure, grid


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


def model_name(model):
    return "model of varied lines" if model == "varied" else f"{model} model"


def wrapped(text, width):
    return "\n".join(textwrap.fill(line, round(width)) for line in text.split("\n"))


def finish(figure, title, path, legend_rows=0, note=None):
    """Title above, room for the legend and a note below, and the file."""
    width, height = figure.get_size_inches()
    title = wrapped(title, width * 8.2)
    note = note and wrapped(note, width * 14.5)
    heading = figure.suptitle(title, x=0.012, y=1 - 0.12 / height, ha="left", va="top", fontsize=14.5,
                              fontweight="bold")
    heading.set_in_layout(False)
    bottom = (0.12 + 0.235 * legend_rows) / height
    if note:
        figure.text(0.012, bottom + 0.06 / height, note, fontsize=9.5, color="#555555", va="bottom")
        bottom += (0.12 + 0.18 * (note.count("\n") + 1)) / height
    figure.tight_layout(rect=(0, bottom, 1, 1 - (0.45 + 0.25 * title.count("\n")) / height), w_pad=1.6, h_pad=1.4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ------------------------------------------------------------------------------------------ pictures from the CSV

def clearly_below(row, other):
    """By more than two standard errors of the difference, in final answers."""
    return other.answer_right - row.answer_right > 2 * math.hypot(row.answer_stderr, other.answer_stderr)


def sound_budget(rows, policy):
    """The policy's row of the smallest budget from which on it is never clearly below dense; None without one."""
    dense, smallest = dense_of(rows), None
    for row in reversed(by_policy(rows).get(policy, [])):
        if dense is None or clearly_below(row, dense):
            break
        smallest = row
    return smallest


def accuracy_title(panels):
    """What the data says of RaaS, or, where it says nothing, what is drawn."""
    fall = panels["fall", "main"]
    sound, pinned = sound_budget(fall, "raas"), sound_budget(fall, "h2o:pin_prompt=true")
    if sound is None:
        return "Accuracy against the budget of the KV cache, pages of 4 tokens"
    title = f"RaaS answers like dense with {sound.budget:g} of {dense_of(fall).peak_resident_tokens:g} tokens on fall"
    title += f", H2O with a pinned prompt with {pinned.budget:g}" if pinned else ""

    def lost(key):  # the largest budget at which RaaS is clearly below dense although it suffices on fall
        dense = dense_of(panels[key])
        return max((row.budget for row in panels[key] if row.policy == "raas" and row.budget >= sound.budget
                    and dense and clearly_below(row, dense)), default=None)
    limits = [("on uniform", lost(("uniform", "main"))), ("with the plain model", lost(("fall", "plain")))]
    limits = [f"{where} not even with {budget:g}" for where, budget in limits if budget]
    return title + (";\n" + ", ".join(limits) if limits else "")


def policies_only(rows):
    return [row for row in rows if not row.is_ablation()]


def accuracy(rows, path):
    panels = {(name, model): policies_only(pick(rows, model=model, set=name, page_size=4))
              for model in ("main", "plain") for name in ("fall", "uniform")}
    title = accuracy_title(panels)
    panels = {f"{name}, {model_name(model)}": part for (name, model), part in panels.items() if draws_something(part)}
    if not any(heading.startswith("fall") for heading in panels):
        return False
    drawn = [row for part in panels.values() for row in part]
    figure, grid = measure_grid(panels, ("answer_right", "lines_right"), 3.3, lambda axes, _: budget_axis(axes, drawn))
    for axes in grid[0]:
        guess = axes.axhline(10, color=GREY, linewidth=0.9, linestyle=(0, (1, 3)), zorder=1)
    used = legend_below(figure, grid[0], dense_of(drawn), extra=[(guess, "a guess is right in 10 %")])
    note = ("Pages of 4. fall: what a line cites goes silent for good after a few lines; uniform: any earlier line may "
            "be cited. The plain model was not trained to ignore what it does not need. Like dense: at most two "
            "standard errors below, there and at larger budgets.")
    if any(row.refused for row in rows):
        note += " Not drawn: budgets that a policy refuses, because the prompt that it pins does not fit."
    finish(figure, title, path, used, note)
    return True


def accuracy_bytes(rows, path):
    chosen = policies_only(pick(rows, model="main", page_size=4))
    panels = panels_by_set(chosen, SETS[:5])
    if not panels:
        return False
    columns = min(3, len(panels))
    depth = -(-len(panels) // columns)
    figure, grid = plt.subplots(depth, columns, figsize=(4 * columns, 1.7 + 3 * depth), squeeze=False, sharey=True)
    drawn = [row for part in panels.values() for row in part]
    sizes = [row.peak_resident_bytes / 1024 for row in drawn]
    ticks = [2.0 ** n for n in range(math.ceil(math.log2(min(sizes))), math.floor(math.log2(max(sizes))) + 1)]
    for axes, (name, part) in zip(grid.flat, panels.items()):
        draw_policies(axes, part, "answer_right", "peak_resident_bytes", 1 / 1024)
        dense = dense_of(part)
        if dense is not None:
            axes.plot(dense.peak_resident_bytes / 1024, 100 * dense.answer_right, "kd", markersize=7, zorder=6)
        logarithmic(axes.xaxis, ticks)
        axes.set_xlim(min(sizes) / 1.1, max(sizes) * 1.1)
        axes.set_title(name, fontsize=12, loc="left")
        axes.set_xlabel("peak resident memory [KiB, one sequence]")
    for axes in grid[:, 0]:
        axes.set_ylabel(AXIS_NAMES["answer_right"])
    for axes in list(grid.flat)[len(panels) :]:
        axes.axis("off")
    used = legend_below(figure, grid.flat, dense_of(drawn))
    finish(figure, "Accuracy against the memory that the cache really fills, main model, pages of 4 tokens", path, used,
           "Pages, their summaries and the policies' own state, all layers and heads. Diamond: dense.")
    return True


def page_size(rows, path):
    chosen = policies_only(pick(rows, model="main", set="fall"))
    panels = {policy: part for policy, part in by_policy(chosen).items() if len({row.page_size for row in part}) > 1}
    if not panels:
        return False
    columns, dense = min(4, len(panels)), dense_of(chosen)
    depth = -(-len(panels) // columns)
    figure, grid = plt.subplots(depth, columns, figsize=(3.1 * columns, 1.0 + 2.75 * depth), squeeze=False, sharey=True)
    sizes = present([row for part in panels.values() for row in part], "page_size", ())
    looks = [(RED, "o", "-"), (BLUE, "s", (0, (4, 2))), (GREEN, "^", (0, (1, 1))), (PINK, "v", (0, (6, 1, 1, 1)))]
    for axes, (policy, part) in zip(grid.flat, panels.items()):
        for size, (colour, marker, line) in zip(sizes, looks):
            points = pick(part, page_size=size)
            values, errors = shares(points, "answer_right")
            axes.errorbar([row.budget for row in points], values, yerr=errors, color=colour, marker=marker,
                          markersize=5, linestyle=line, elinewidth=1, capsize=2, label=f"pages of {size:g} tokens")
        if dense is not None:
            axes.axhline(100 * dense.answer_right, color="black", linewidth=1, linestyle=":", zorder=1)
        finish_axis(axes, "answer_right")
        budget_axis(axes, chosen)
        axes.set_title(style_of(policy, part)["label"], fontsize=10.5, loc="left")
        axes.set_xlabel("")
    for axes in list(grid.flat)[len(panels) :]:
        axes.axis("off")
    for row in grid:
        row[0].set_ylabel("right answers [%]")
    for axes in list(grid.flat)[max(0, len(panels) - columns) : len(panels)]:
        axes.set_xlabel("budget [tokens per kv head]")
    used = legend_below(figure, grid.flat, dense, columns=len(sizes) + 1)
    finish(figure, "Accuracy with small and large pages, set fall, main model", path, used)
    return True


def length(rows, path):
    chosen = policies_only(pick(rows, model="varied", page_size=4))
    panels = panels_by_set(chosen, present(chosen, "set", SETS))
    if not panels:
        return False
    measures = ("tokens_generated", "lines_right")
    figure, grid = measure_grid(panels, measures, 5.5, lambda axes, _: budget_axis(axes, chosen))
    used = legend_below(figure, grid[0], dense_of(chosen))
    finish(figure, "How long the model writes, and how far it gets before it errs", path, used,
           "A model whose lines vary in length and which ends its text itself; pages of 4.")
    return True


def sweep_of(row, parameter):
    """(evidence, value) of a RaaS row of a sweep over `parameter`, else None. Defaults as in policy/raas.hpp."""
    name, settings = row.settings()
    if name != "raas" or set(settings) - {"alpha", "r", "used", "evidence", "preset"}:
        return None
    preset = settings.get("preset")
    used = settings.get("used", "rank" if preset == "paper_v2" else "alpha")
    evidence = settings.get("evidence", "quest_bound" if preset else "exact_mass")
    if used != {"alpha": "alpha", "r": "rank"}[parameter]:
        return None
    default = {"alpha": "0.0001" if preset == "paper_v1" else "0.01", "r": "0.5"}[parameter]
    return evidence, float(settings.get(parameter, default))


def ablation(rows, path, budget=256.0):
    chosen = [row for row in pick(rows, page_size=4, budget=budget) if row.model in ("main", "plain")]
    panels = (("alpha", "answer_right", "share of mass that counts as use, alpha"),
              ("r", "answer_right", "share of pages that count as used, r"),
              ("alpha", "stamped_share", "share of mass that counts as use, alpha"))
    looks = {("main", "exact_mass"): (RED, "o", True), ("main", "quest_bound"): (ORANGE, "^", True),
             ("plain", "exact_mass"): (BLUE, "o", False), ("plain", "quest_bound"): (SKY, "^", False)}
    evidences = {"exact_mass": "exact page mass", "quest_bound": "Quest bound"}

    def curve(name, look, parameter, y):
        points = {}
        for row in pick(chosen, set=name, model=look[0]):
            swept = sweep_of(row, parameter)
            if swept and swept[0] == look[1] and row.values[y] is not None:
                points.setdefault(swept[1], row)
        return sorted(points.items())

    names = [name for name in ("fall", "uniform")
             if any(len(curve(name, look, parameter, y)) > 1 for look in looks for parameter, y, _ in panels)]
    if not names:
        return False
    figure, grid = plt.subplots(len(names), 3, figsize=(12, 1.5 + 3.4 * len(names)), squeeze=False)
    for line, name in zip(grid, names):
        for axes, (parameter, y, axis_name) in zip(line, panels):
            for look, (colour, marker, filled) in looks.items():
                points = curve(name, look, parameter, y)
                if not points:
                    continue
                values, errors = shares([row for _, row in points], y)
                axes.errorbar([at for at, _ in points], values, yerr=errors, color=colour, marker=marker, capsize=2,
                              elinewidth=1, markerfacecolor=colour if filled else "white",
                              linestyle="-" if filled else (0, (4, 2)),
                              label=f"{model_name(look[0])}, {evidences[look[1]]}")
            ticks = sorted({at for look in looks for at, _ in curve(name, look, parameter, y)})
            if parameter == "alpha" and ticks and ticks[0] > 0:
                decades = range(math.floor(math.log10(ticks[0])), math.ceil(math.log10(ticks[-1])) + 1)
                logarithmic(axes.xaxis, [10.0 ** n for n in decades])
            axes.set_xlabel(axis_name)
            axes.set_ylabel(AXIS_NAMES[y])
            heading = "stamped pages" if y == "stamped_share" else "accuracy"
            axes.set_title(f"{name}: {heading}", fontsize=12, loc="left")
            finish_axis(axes, y)
    used = legend_below(figure, grid.flat, columns=4)
    finish(figure, f"When does RaaS count a page as used? Budget {budget:g} tokens, pages of 4", path, used)
    return True


def long(rows, path):
    chosen = policies_only(pick(rows, model="long"))
    panels = panels_by_set(chosen, present(chosen, "set", SETS))
    dense, sizes = dense_of(chosen), present([row for row in chosen if row.policy != "dense"], "page_size", ())
    if not panels or dense is None:
        return False
    panels = panels_by_set(pick(chosen, page_size=sizes[0]), panels)  # the smallest pages
    tokens = dense.peak_resident_tokens

    def fraction_axis(axes, part):
        budgets = sorted({row.budget for row in part if row.budget is not None})
        logarithmic(axes.xaxis, budgets, lambda budget: f"1/{tokens / budget:.3g}\n{budget:g}")
        axes.set_xlim(budgets[0] / 1.2, budgets[-1] * 1.2)
        axes.set_xlabel("budget [part of the sequence, and tokens]")

    figure, grid = measure_grid(panels, ("answer_right", "lines_right"), 4.8, fraction_axis)
    used = legend_below(figure, grid[0], dense)
    finish(figure, f"Long chains: {tokens:,.0f} tokens in the end, pages of {sizes[0]:g}", path, used)
    return True


PICTURES = {"accuracy": accuracy, "accuracy_bytes": accuracy_bytes, "page_size": page_size, "length": length,
            "ablation": ablation, "long": long}


# ---------------------------------------------------------------------------------------------- attention, waterfall
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
    options.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output / "waterfall.png", dpi=150)
    print(f"drawn: {options.output / 'waterfall.png'}")


# ------------------------------------------------------------------------------------------------------- tables

def cell(row, column):
    if row is None:
        return ""
    if row.refused:
        return "–"
    (value,), (error,) = shares([row], column)
    digits = 0 if column in PERCENT or value >= 100 else 1
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def print_tables(rows, column):
    """One table per model, set and page size: a line per policy, a column per budget, dense first."""
    for model in present(rows, "model", MODELS):
        for name in present([row for row in rows if row.model == model], "set", SETS):
            part = [row for row in rows if (row.model, row.set) == (model, name)]
            dense = dense_of(part)
            for size in present([row for row in part if row.policy != "dense"], "page_size", ()):
                table = [row for row in part if row.policy != "dense" and row.page_size == size]
                budgets = present(table, "budget", ())
                unit = " [%]" if column in PERCENT else ""
                counts = ", ".join(f"{shown(n)} problems" for n in present(table, "problems", ()))
                print(f"{model_name(model)}, `{name}`, pages of {size:g}: {TABLE_NAMES[column]}{unit}, {counts}\n")
                print("| policy | " + " | ".join(f"{budget:g}" for budget in budgets) + " |")
                print("|---" + "|---:" * len(budgets) + "|")
                if dense is not None:
                    cells = " | ".join([cell(dense, column)] * len(budgets))
                    print(f"| `dense` (keeps {shown(dense.peak_resident_tokens)}) | {cells} |")
                for policy, points in by_policy(table).items():
                    at = {row.budget: row for row in points}
                    print(f"| `{policy}` | " + " | ".join(cell(at.get(budget), column) for budget in budgets) + " |")
                print()


METRICS = {"answer": "answer_right", "chain": "chain_right", "lines": "lines_right", "tokens": "tokens_generated"}
TABLE_NAMES = {"answer_right": "right final answers", "chain_right": "whole chains right",
               "lines_right": "lines before the first error", "tokens_generated": "tokens generated"}


# --------------------------------------------------------------------------------------------------- command line

def condition(text):
    column, separator, value = text.partition("=")
    if not separator or column not in (*TEXT_COLUMNS, *NUMBER_COLUMNS):
        raise argparse.ArgumentTypeError(f"'{text}' is not COLUMN=VALUE with a column of the CSV")
    return column, value


def names_of_pictures(text):
    names = text.split(",")
    for name in names:
        if name not in PICTURES:
            raise argparse.ArgumentTypeError(f"'{name}' is not a picture, there are {', '.join(PICTURES)}")
    return names


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="pictures|table|attention|waterfall")

    def command(name, meaning, output=True):
        added = commands.add_parser(name, help=meaning, description=meaning)
        if output:
            added.add_argument("--output", type=pathlib.Path, default=pathlib.Path("bench/results"), metavar="DIR",
                               help="where the PNGs go [bench/results]")
        return added

    def takes_csv(added):
        added.add_argument("--csv", type=pathlib.Path, action="append", required=True,
                           help="from reasoning; may be repeated")
        added.add_argument("--where", type=condition, action="append", default=[], metavar="COLUMN=VALUE",
                           help="use these rows only, e.g. seed=7; may be repeated")

    def takes_problem(added):
        added.add_argument("--problems", type=pathlib.Path, required=True, help="the model's problems.jsonl")
        added.add_argument("--problem", type=int, default=0, help="which of them was decoded, from 0 [0]")

    pictures = command("pictures", "draw the pictures that need only the CSV")
    takes_csv(pictures)
    pictures.add_argument("--only", type=names_of_pictures, default=list(PICTURES), metavar="NAMES",
                          help="some of " + ",".join(PICTURES) + " [all]")
    table = command("table", "print Markdown tables: value ± standard error, a dash where a budget was refused", False)
    takes_csv(table)
    table.add_argument("--metric", choices=tuple(METRICS), default="answer",
                       help="final answers, whole chains, lines before the first error, tokens generated [answer]")
    attend = command("attention", "draw attention_map.png from a trace of one decoded problem")
    attend.add_argument("--trace", type=pathlib.Path, required=True, metavar="DIR",
                        help="what decode --record-trace wrote")
    takes_problem(attend)
    attend.add_argument("--layer", type=int, help="[the one that looks most at what lines need]")
    attend.add_argument("--head", type=int, help="query head [likewise]")
    fall = command("waterfall", "draw waterfall.png: what each policy kept while it decoded one problem")
    fall.add_argument("--run", type=pathlib.Path, required=True, metavar="DIR",
                      help="holds comparison.json (decode --json) and resident/ (decode --resident)")
    takes_problem(fall)
    fall.add_argument("--policies", metavar="NAMES", help="some of comparison.json's, separated by commas [all]")
    fall.add_argument("--columns", type=int, default=3, help="panels side by side [3]")
    fall.add_argument("--layer", type=int, default=1, help="[1]")
    fall.add_argument("--head", type=int, default=1, help="kv head [1]")
    return parser.parse_args()


def draw_pictures(options):
    rows = read_rows(options.csv, options.where)
    further = sorted({row.policy for row in policies_only(rows)} - set(STYLES) - {"dense"})
    for i, policy in enumerate(further):
        colour, marker = SPARE_LOOKS[i % len(SPARE_LOOKS)]
        STYLES[policy] = (policy.replace(":", ", "), colour, marker, i < len(SPARE_LOOKS), 1.6)
    for name in options.only:
        path = options.output / f"{name}.png"
        drawn = PICTURES[name](rows, path)
        print(f"drawn: {path}" if drawn else f"skipped: {path}, the CSV has no rows for it")


def refusal(sentence):
    print(f"plot.py: {sentence}", file=sys.stderr)
    return 2


def main():
    options = parse_options()
    plt.rcParams.update({"font.size": 11, "axes.labelsize": 11, "xtick.labelsize": 10, "ytick.labelsize": 10})
    try:
        if options.command == "pictures":
            draw_pictures(options)
        elif options.command == "table":
            print_tables(read_rows(options.csv, options.where), METRICS[options.metric])
        else:
            {"attention": attention, "waterfall": waterfall}[options.command](options)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of the table has enough
    except InputError as error:
        sys.exit(refusal(error))
    except OSError as error:
        sys.exit(refusal(f"{error.filename}: {error.strerror}"))


if __name__ == "__main__":
    main()
