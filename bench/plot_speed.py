# SPDX-License-Identifier: Apache-2.0
"""Speed: time per step and memory against decoded tokens, and README's tables from the JSON of the timing benches."""
import csv
import json
import math

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from plot_style import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, YELLOW, InputError, finish

SOURCES = {"roofline": "roofline --json", "micro": "kvsparse_bench --benchmark_out", "curve": "decode_curve --json",
           "compile": "compile_time.py --json"}
LOOKS = {"dense": ("Dense", "black", "o"), "quest": ("Quest", SKY, "o"), "streaming_llm": ("StreamingLLM", GREEN, "P"),
         "h2o": ("H2O", BLUE, "s"), "raas": ("RaaS", RED, "D"), "kindred": ("Kindred", ORANGE, "^"),
         "random": ("Random", GREY, "X"), "raas+quest": ("RaaS + Quest", PINK, "v")}
CURVE_COLUMNS = ("tokens", "step_seconds", "resident_bytes", "allocator_bytes", "rss_growth_bytes", "disturbed")


# ------------------------------------------------------------------------------------------------------- pictures

def read_points(path):
    """{policy: {column: array}} in the order of the file, each policy by its tokens."""
    policies = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [c for c in ("policy", *CURVE_COLUMNS) if c not in (reader.fieldnames or [])]
            if missing:
                raise InputError(f"{path}: column {missing[0]} is missing from the first line")
            for record in reader:
                try:
                    point = [float(record[column]) for column in CURVE_COLUMNS]
                except (TypeError, ValueError):
                    raise InputError(f"{path}:{reader.line_num}: a column holds no number") from None
                policies.setdefault(record["policy"], []).append(point)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not policies:
        raise InputError(f"{path} holds no rows")
    return {name: dict(zip(CURVE_COLUMNS, np.array(sorted(points)).T)) for name, points in policies.items()}


def look_of(policy, number):
    return LOOKS.get(policy, (policy, (YELLOW, PINK)[number % 2], "h"))


def tokens_text(value):
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}"


def bytes_text(value):
    for unit, size in (("GiB", 2 ** 30), ("MiB", 2 ** 20), ("KiB", 2 ** 10)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:g} B"


def microseconds_text(value):
    return f"{value / 1e3:g} ms" if value >= 1e3 else f"{value:g} us"


def spread_apart(heights, gap):
    """The heights moved as little as needed for neighbours to be `gap` apart, in ascending order of the originals."""
    order = np.argsort(heights)
    placed = np.array(heights, dtype=float)[order]
    for _ in range(100):
        for i in range(len(placed) - 1):
            lack = gap - (placed[i + 1] - placed[i])
            if lack > 0:
                placed[i] -= lack / 2
                placed[i + 1] += lack / 2
    result = np.empty(len(placed))
    result[order] = placed
    return result


def label_ends(axes, ends):
    """Names beside the last points, [(name, colour, x, y)]; lines that end together get them one above another."""
    low, high = np.log10(axes.get_ylim())
    height = axes.get_window_extent().height / axes.figure.dpi * 72  # points
    gap = (high - low) * 13.5 / height
    for x in sorted({end[2] for end in ends}):
        group = [end for end in ends if end[2] == x]
        for (name, colour, _, y), at in zip(group, spread_apart([math.log10(end[3]) for end in group], gap)):
            axes.annotate(name, (x, y), (18, (at - math.log10(y)) / (high - low) * height), va="center", color=colour,
                          textcoords="offset points", fontsize=10.5, annotation_clip=False,
                          arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": colour, "relpos": (0, 0.5),
                                      "shrinkA": 1, "shrinkB": 3})


def log_ticks(low, high, base):
    """1, 2, 5 of every decade, or powers of two times `base`, as long as they are few."""
    if base == 10:
        ticks = [m * 10.0 ** e for e in range(-3, 12) for m in (1, 2, 5)]
    else:
        ticks = [2.0 ** e for e in range(0, 50)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    while len(ticks) > 9:
        ticks = [t for t in ticks if math.log10(t).is_integer()] if base == 10 and len(ticks) > 12 else ticks[::2]
    return ticks


def curve_picture(policies, column, scale, texts, base, axis_name, title, note, path):
    figure, axes = plt.subplots(figsize=(10, 6.2))
    ends, lowest, highest = [], math.inf, -math.inf
    for number, (policy, points) in enumerate(policies.items()):
        label, colour, marker = look_of(policy, number)
        values = points[column] * scale
        axes.plot(points["tokens"], values, color=colour, linewidth=2.4 if policy == "raas" else 1.6, marker=marker,
                  markersize=4.5, zorder=5 if policy == "raas" else 3)
        noisy = points["disturbed"] > 0
        if column == "step_seconds":
            axes.plot(points["tokens"][noisy], values[noisy], linestyle="", marker="o", markersize=9, zorder=6,
                      markerfacecolor="none", markeredgecolor=colour, markeredgewidth=0.8)
        ends.append((label, colour, points["tokens"][-1], values[-1]))
        lowest, highest = min(lowest, values.min()), max(highest, values.max())
    left = min(points["tokens"][0] for points in policies.values())
    right = max(points["tokens"][-1] for points in policies.values())
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left / 1.15, right * (right / left) ** 0.02)
    axes.set_ylim(lowest / 1.7, highest * 1.6)
    for axis, ticks, text in ((axes.xaxis, log_ticks(left / 1.15, right * 1.1, 10), tokens_text),
                              (axes.yaxis, log_ticks(lowest / 1.7, highest * 1.6, base), texts)):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _, text=text: text(value)))
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("tokens decoded")
    axes.set_ylabel(axis_name)
    finish_with_labels(figure, axes, ends, title, path, note)


def finish_with_labels(figure, axes, ends, title, path, note):
    """The margin on the right is the labels'; they are placed when the axes have their final size."""
    figure.canvas.draw()
    label_ends(axes, ends)
    finish(figure, title, path, note=note)
    print(f"drawn: {path}")


def curve(options):
    policies = read_points(options.csv)
    disturbed = any((points["disturbed"] > 0).any() for points in policies.values())
    keepers = [look_of(name, 0)[0] for name in ("dense", "quest") if name in policies]
    flat = [name for name in policies if name not in ("dense", "quest")]
    note = "Append and attend, one thread, median of the steps timed at each point; the policies took turns."
    if disturbed:
        note += " Circles: measured while something else wanted the processor."
    curve_picture(policies, "step_seconds", 1e6, microseconds_text, 10, "time per step of one layer",
                  "Time per decode step against decoded tokens", note, options.output / "step_time.png")
    note = "Growth of the process's resident memory (RSS) in each policy's own turns, as the kernel counts it."
    if flat:
        most = max(policies[name]["allocator_bytes"][-1] for name in flat)
        note += f" The allocator counts at most {bytes_text(most)} for a policy with a budget"
        note += f"; {' and '.join(keepers)} keep every token." if keepers else "."
    curve_picture(policies, "rss_growth_bytes", 1, bytes_text, 2, "resident memory of one layer, measured",
                  "Measured memory against decoded tokens", note, options.output / "resident_bytes.png")


# --------------------------------------------------------------------------------------------------------- tables

def load(path, key):
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        report[key]
        return report
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not what it should be, it lacks {error}") from error


def table(header, rows):
    print("| " + " | ".join(header) + " |")
    print("|---" + "|---:" * (len(header) - 1) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def introduce(heading, context, command, warning=None):
    print(f"## {heading}\n\n```sh\n{command}\n```\n")
    print(", ".join(str(context[key]) for key in ("processor", "compiler", "flags") if context.get(key))
          + f", commit {context.get('commit', 'unknown')}" + "\n")
    if warning:
        print(f"**{warning}**\n")


def busy_sentence(report):
    return f"The machine was busy: {report['rounds_disturbed']} of {report['rounds_tried']} rounds disturbed; " \
           "the ratios are no more than a hint."


def microseconds(seconds):
    return f"{seconds * 1e6:.0f} us"


def roofline_tables(report):
    introduce("Dense decode steps against the roofline", report["context"], report["command"],
              busy_sentence(report) if report["busy"] else None)
    table(["threads", "L2 read GB/s", "L3", "DRAM", "FMA GFLOP/s"],
          [[str(limits["threads"]), *(f"{limits[name + '_bytes_per_second']['median'] / 1e9:.1f}"
                                      for name in ("L2", "L3", "DRAM")),
            f"{limits['flops_per_second']['median'] / 1e9:.1f}"] for limits in report["limits"]])
    steps = report["steps"]
    sizes = sorted({step["tokens"] for step in steps})
    rows = []
    for dtype, threads in dict.fromkeys((step["dtype"], step["threads"]) for step in steps):
        cells = {}
        for step in steps:
            if (step["dtype"], step["threads"]) == (dtype, threads):
                bound = step["bound_by"] if step["bound_by"] == "arithmetic" else step["level"]
                cells[step["tokens"]] = f"{step['seconds']['median'] * 1e6:.0f} us, " \
                                        f"{100 * step['fraction']['median']:.0f} % ({bound})"
        rows.append([f"{dtype}, {threads} thread" + ("s" if threads > 1 else ""), *(cells.get(n, "") for n in sizes)])
    table(["time per step, share of its roofline", *(f"N = {n}" for n in sizes)], rows)


def micro_table(report):
    """Medians of the repetitions if there are any, else the single runs: policies by N, for each shape."""
    def of_kind(kind):
        runs = [run for run in report["benchmarks"] if run["name"].startswith(kind + "/")]
        return [run for run in runs if run.get("aggregate_name") == "median"] or \
               [run for run in runs if run.get("run_type") == "iteration"]

    def policy_table(kind, of_what):
        shapes = {}
        for run in of_kind(kind):
            _, policy, dtype, n, *rest = run["run_name"].removesuffix("/real_time").split("/")
            shape = shapes.setdefault((dtype, *rest), {})
            shape.setdefault(policy, {})[int(n.partition(":")[2])] = run
        for (dtype, *rest), policies in shapes.items():
            sizes = sorted({n for cells in policies.values() for n in cells})
            rows = [[policy, *(f"{cells[n]['real_time']:.0f} us ({100 * cells[n]['roofline']:.0f} %)" if n in cells
                               else "" for n in sizes)] for policy, cells in policies.items()]
            table([f"{dtype}, {', '.join(rest)}: {of_what}", *(f"N = {n}" for n in sizes)], rows)

    introduce("Policies", report["context"], report["context"].get("command", report["context"]["executable"]))
    policy_table("decode_step", "step (of the roofline of what it reads)")
    policy_table("select", "selection alone (of the roofline of the summaries)")
    prefills = of_kind("prefill")
    if prefills:
        table(["prefill", "time", "GFLOP/s", "of FMA peak"],
              [[run["run_name"].partition("/")[2].replace("/", ", "), f"{run['real_time']:.1f} ms",
                f"{run['flops_per_second'] / 1e9:.0f}", f"{100 * run['roofline']:.0f} %"] for run in prefills])


def curve_table(report):
    disturbed = [flat for flat in report["flatness"] if flat["disturbed"]]
    introduce("Flat in N", report["context"], report["command"],
              "The machine was busy; what is marked with ? is no more than a hint." if disturbed else None)
    if report["flatness"]:
        early, late = report["flatness"][0]["early_tokens"], report["flatness"][0]["late_tokens"]
        table(["policy", f"step at {early} tokens", f"at {late}", "ratio", "bookkeeping", "allocations"],
              [[flat["policy"], microseconds(flat["early_step_seconds"]), microseconds(flat["late_step_seconds"]),
                f"{flat['ratio']:.3f}" + ("?" if flat["disturbed"] else ""), f"{100 * flat['bookkeeping_share']:.1f} %",
                str(flat["allocations"])] for flat in report["flatness"]])
    last = {point["policy"]: point for point in report["points"]}
    memory = ("resident_bytes", "allocator_bytes", "rss_growth_bytes")
    step = "step_seconds"
    table(["policy", "tokens", "step", "cache's own count", "allocator", "RSS growth"],
          [[name, f"{point['tokens']:.0f}", microseconds(point[step]), *(bytes_text(point[m]) for m in memory)]
           for name, point in last.items()])


def compile_table(report):
    print(f"## Compile time\n\n```sh\n{report['command']}\n```\n")
    rows = []
    for result in report["results"]:
        for unit in result["units"]:
            rows.append([f"{result['compiler']}: {unit['unit']}", f"{unit['processor_seconds']:.2f} s",
                         f"{unit['object_bytes'] / 1024:.0f} KiB",
                         f"{unit['processor_seconds'] / result['units'][0]['processor_seconds']:.2f}"])
    table(["translation unit", "processor time", "object", "times Eigen/Core"], rows)


def speed(options):
    if not any(getattr(options, name) for name in SOURCES):
        raise InputError("speed needs at least one of " + ", ".join(f"--{name}" for name in SOURCES))
    for name, key, show in (("roofline", "steps", roofline_tables), ("micro", "benchmarks", micro_table),
                            ("curve", "points", curve_table), ("compile", "results", compile_table)):
        if getattr(options, name):
            show(load(getattr(options, name), key))
