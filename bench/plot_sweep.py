# SPDX-License-Identifier: Apache-2.0
"""What each policy keeps of one trace against its budget, between the ceilings and the floor: from replay --sweep."""
import csv
import itertools
import json
import math
import pathlib

import matplotlib.pyplot as plt

from plot_style import GREY, InputError, finish, legend_below, logarithmic

CEILINGS = ("oracle", "clairvoyant")
FLOOR = "random"
# policy: label, colour, marker, filled; the page of replay --report looks the same. Whoever evicts is drawn solid, whoever
# only selects is dashed.
LOOKS = {policy: tuple(look[part] for part in ("label", "colour", "marker", "filled"))
         for policy, look in json.loads(pathlib.Path(__file__).with_name("policy_looks.json").read_text()).items()}
# Of a policy that nobody knew: drawn as thick as the ends, in colours that no other has.
SPARE_LOOKS = tuple((colour, marker, True) for marker in "^v<>" for colour in ("#7B3294", "#B2182B", "#01665E"))
COLUMNS = ("policy", "budget_tokens", "share", "mean_error", "evicted_tokens")


def read_points(path):
    """{policy: [(budget, share, error, tokens evicted)]} by budget, in the file's order; shares and errors that are
    missing are NaN. Dense, which has no budget, is left out."""
    policies = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [column for column in COLUMNS if column not in (reader.fieldnames or [])]
            if missing:
                raise InputError(f"{path}: column {missing[0]} is missing from the first line")
            for record in reader:
                if record["policy"] == "dense":
                    continue
                try:
                    share, error = (float(record[column] or "nan") for column in ("share", "mean_error"))
                    point = (int(record["budget_tokens"]), share, error, int(record["evicted_tokens"] or 0))
                except (TypeError, ValueError):
                    raise InputError(f"{path}:{reader.line_num}: a column holds no number") from None
                policies.setdefault(record["policy"], []).append(point)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not any(math.isfinite(point[1]) for points in policies.values() for point in points):
        raise InputError(f"{path} holds no policy that took a budget")
    return {name: sorted(points) for name, points in policies.items()}


def looks_of(policies):
    spare = itertools.cycle(SPARE_LOOKS)
    return {policy: LOOKS.get(policy) or (policy, *next(spare)) for policy in policies}


def evicts(points):
    return any(point[3] for point in points)


def draw_lines(axes, policies, looks, value):
    for policy, points in policies.items():
        label, colour, marker, filled = looks[policy]
        stands_out = policy in CEILINGS or policy == FLOOR or policy not in LOOKS
        axes.plot([point[0] for point in points], [value(point) for point in points], label=label, color=colour,
                  marker=marker, markersize=9 if marker == "*" else 6, markerfacecolor=colour if filled else "white",
                  linewidth=2.6 if stands_out else 1.3, linestyle="-" if evicts(points) else "--",
                  zorder=5 if stands_out else 3)


def shade_the_gap(axes, policies, value):
    """Between the floor and the clairvoyant: where an evictor should be."""
    if FLOOR not in policies or "clairvoyant" not in policies:
        return
    floor, ceiling = ({point[0]: value(point) for point in policies[name]} for name in (FLOOR, "clairvoyant"))
    budgets = [b for b in floor if math.isfinite(floor[b]) and math.isfinite(ceiling.get(b, math.nan))]
    axes.fill_between(budgets, [floor[b] for b in budgets], [ceiling[b] for b in budgets], color=GREY, alpha=0.13,
                      linewidth=0)


def sweep(options):
    policies = read_points(options.csv)
    # What all others are held against comes first in the legend.
    first = [name for name in (*CEILINGS, FLOOR) if name in policies]
    policies = {name: policies[name] for name in (*first, *(n for n in policies if n not in first))}
    budgets = sorted({point[0] for points in policies.values() for point in points if math.isfinite(point[1])})
    # Two rows of panels, of those that evict and of those that keep everything, each beside the ceilings it has.
    evictors = {name: points for name, points in policies.items() if evicts(points) or name in first}
    keepers = {name: points for name, points in policies.items() if not evicts(points)}
    rows = [(shown, meaning) for shown, meaning in (
        (evictors, "policies that evict; budget: tokens kept per kv head"),
        (keepers, "policies that keep everything; budget: tokens read per kv head")) if not shown.keys() <= set(first)]
    rows = rows or [(policies, "budget: tokens per kv head")]
    looks = looks_of(policies)
    figure, panels = plt.subplots(len(rows), 2, figsize=(13, 4.7 * len(rows)), squeeze=False)
    for (shown, meaning), (kept, error) in zip(rows, panels):
        for axes, value, name in ((kept, lambda point: 100 * point[1], "dense softmax mass on the tokens read, %"),
                                  (error, lambda point: point[2] or math.nan,  # a logarithm shows no zero
                                   "mean error of a head's output,\n|out - dense| / |dense|")):
            draw_lines(axes, shown, looks, value)
            shade_the_gap(axes, shown, value)
            logarithmic(axes.xaxis, budgets)
            axes.set_xlabel(meaning)
            axes.set_ylabel(name)
            axes.grid(color="#e6e6e6", linewidth=0.8)
            axes.set_axisbelow(True)
        kept.set_ylim(0, 101.5)
        error.set_yscale("log")
    legend_rows = legend_below(figure, panels.flat, columns=4)
    note = "A line begins at the first budget that the policy takes."
    if "oracle" in policies:
        note += " No choice of as many tokens holds more mass than Oracle's."
    if "clairvoyant" in policies:
        note += " No evictor of pages keeps more than the clairvoyant with the same budget for every head."
    if FLOOR in policies and "clairvoyant" in policies:
        note += " Grey: from Random to there."
    finish(figure, "Kept and lost of one layer's attention, between the ceilings and the floor",
           options.output / "sweep.png", legend_rows=legend_rows, note=note, grows=True)
