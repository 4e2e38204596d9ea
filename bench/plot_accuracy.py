# SPDX-License-Identifier: Apache-2.0
"""Pictures of accuracy against budget, from the rows of `reasoning`."""
import math

import matplotlib.pyplot as plt
from matplotlib.ticker import AutoLocator, FixedLocator

from plot_rows import MODELS, PERCENT, SETS, by_policy, dense_of, model_name, pick, present, read_rows, shares
from plot_style import (BLUE, BROWN, GREEN, GREY, ORANGE, PINK, RED, SKY, SPARE_LOOKS, STYLES, finish, legend_below,
                        logarithmic, shown)

# What is set beside RaaS wherever there is room for few lines.
MAIN = ("raas", "kindred", "raas:evidence=quest_bound:alpha=0.01", "h2o:pin_prompt=true", "h2o",
        "streaming_llm:pin_prompt=true", "streaming_llm", "random", "quest")
LIBRARY_STYLES = frozenset(STYLES)  # the research policies get theirs when they turn up
AXIS_NAMES = {"answer_right": "right final answers [%]", "lines_right": "lines before the first error",
              "tokens_generated": "tokens generated", "stamped_share": "pages stamped per step [%]"}


def keeps_all(rows):
    return all(row.peak_resident_tokens > row.budget for row in rows)


def style_of(policy, rows):
    label, colour, marker, filled, width = STYLES[policy]
    all_kept = keeps_all(rows)
    return {"label": label + (", keeps every token" if all_kept else ""), "color": colour, "marker": marker,
            "linewidth": width, "linestyle": (0, (4, 2)) if all_kept else "-", "markersize": 8 if marker == "*" else 6,
            "markerfacecolor": colour if filled else "white", "markeredgecolor": colour,
            "zorder": 5 if policy == "raas" else 3, "alpha": 1.0 if width > 1.3 else 0.8}


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
    size = (max(width * len(panels), 8.5), 0.6 + 2.5 * len(measures))
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


def close(figure, axes_list, title, path, dense=None, note=None, columns=3, extra=()):
    finish(figure, title, path, legend_below(figure, axes_list, dense, columns, extra), note, grows=True)
    return True


def main_policies(rows):
    return [row for row in rows if row.policy == "dense" or row.policy in MAIN]


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
    return title + ("; " + ", ".join(limits) if limits else "")


def policies_only(rows):
    return [row for row in rows if not row.is_ablation()]


def accuracy(rows, path):
    panels = {(name, model): main_policies(pick(rows, model=model, set=name, page_size=4))
              for model in ("main", "plain") for name in ("fall", "uniform")}
    title = accuracy_title(panels)
    panels = {f"{name}, {model_name(model)}": part for (name, model), part in panels.items() if draws_something(part)}
    if not any(heading.startswith("fall") for heading in panels):
        return False
    drawn = [row for part in panels.values() for row in part]
    figure, grid = measure_grid(panels, ("answer_right", "lines_right"), 3.3, lambda axes, _: budget_axis(axes, drawn))
    for axes in grid[0]:
        guess = axes.axhline(10, color=GREY, linewidth=0.9, linestyle=(0, (1, 3)), zorder=1)
    note = ("Pages of 4. fall: what a line cites goes silent for good after a few lines; uniform: any earlier line may "
            "be cited. The plain model was not trained to ignore what it does not need. Like dense: at most two "
            "standard errors below, there and at larger budgets.")
    if any(row.refused for row in rows):
        note += " Not drawn: budgets that a policy refuses, because the prompt that it pins does not fit."
    return close(figure, grid[0], title, path, dense_of(drawn), note, extra=[(guess, "a guess is right in 10 %")])


def sets(rows, path):
    panels = panels_by_set(main_policies(pick(rows, model="main", page_size=4)), SETS)
    if len(panels) < 3:
        return False
    drawn = [row for part in panels.values() for row in part]
    figure, grid = measure_grid(panels, ("answer_right", "lines_right"), 2.5, lambda axes, _: budget_axis(axes, drawn))
    for axes in grid[-1]:
        axes.set_xlabel("budget [tokens]")
    return close(figure, grid[0], "Every set: from what falls silent within a few lines to what never does", path,
                 dense_of(drawn), "Main model, pages of 4. gmax: the longest silence of what is still cited, in lines; "
                 "6 in fall itself.", columns=5)


def accuracy_bytes(rows, path):
    panels = panels_by_set(main_policies(pick(rows, model="main", page_size=4)), SETS[:5])
    if not panels:
        return False
    measures = ("answer_right", "lines_right")
    figure, grid = plt.subplots(2, len(panels), figsize=(max(3.1 * len(panels), 8.5), 5.8), squeeze=False,
                                sharey="row", sharex=True)
    drawn = [row for part in panels.values() for row in part]
    sizes = [row.peak_resident_bytes / 1024 for row in drawn]
    ticks = [2.0 ** n for n in range(math.ceil(math.log2(min(sizes))), math.floor(math.log2(max(sizes))) + 1)]
    for column, (name, part) in zip(grid.T, panels.items()):
        dense = dense_of(part)
        for axes, measure in zip(column, measures):
            draw_policies(axes, part, measure, "peak_resident_bytes", 1 / 1024)
            if dense is not None:
                (value,), _ = shares([dense], measure)
                axes.plot(dense.peak_resident_bytes / 1024, value, "kd", markersize=7, zorder=6)
            logarithmic(axes.xaxis, ticks)
            axes.set_xlim(min(sizes) / 1.1, max(sizes) * 1.1)
        column[0].set_title(name, fontsize=12, loc="left")
        column[-1].set_xlabel("peak resident memory [KiB]")
    for axes, measure in zip(grid[:, 0], measures):
        axes.set_ylabel(AXIS_NAMES[measure])
    return close(figure, grid.flat, "Accuracy at equal memory: what the cache of one sequence really fills", path,
                 dense_of(drawn), "Main model, pages of 4. Pages, their summaries and the policies' own state, all "
                 "layers and heads. Diamond: dense. Quest keeps every token whatever its budget: a column of dots.",
                 columns=4)


def variants(rows, path):
    """RaaS by its own rule, by the letter of its papers, and without its pin, beside what is no scoring at all."""
    chosen = [row for row in policies_only(pick(rows, model="main", set="fall"))
              if row.policy.split(":")[0] in ("dense", "raas", "raas+quest", "random", "oracle")]
    sizes = present(pick(chosen, policy="raas:used=rank"), "page_size", ())
    panels = {f"fall, pages of {size:g}": pick(chosen, page_size=size) for size in sizes}
    if not panels:
        return False
    figure, grid = measure_grid(panels, ("answer_right", "lines_right"), 5.2, lambda axes, _: budget_axis(axes, chosen))
    return close(figure, grid[0], "What counts as use decides RaaS", path, dense_of(chosen),
                 "Main model. Paper v1 stamps a page whose Quest bound has a softmax above alpha = .0001, paper v2 the "
                 "top half of the pages by that bound.")


def comparison(panels, dense, lines, axis_rows, title, path, note, columns):
    """A panel per heading with one line per name: {heading: {name: rows}}."""
    depth = -(-len(panels) // columns)
    figure, grid = plt.subplots(depth, columns, figsize=(3.1 * columns, 0.4 + 2.5 * depth), squeeze=False, sharey=True)
    looks = [(RED, "o", "-"), (BLUE, "s", (0, (4, 2))), (GREEN, "^", (0, (1, 1))), (PINK, "v", (0, (6, 1, 1, 1)))]
    for axes, (heading, parts) in zip(grid.flat, panels.items()):
        for name, (colour, marker, line) in zip(lines, looks):
            points = parts.get(name, [])
            if not points:
                continue
            values, errors = shares(points, "answer_right")
            axes.errorbar([row.budget for row in points], values, yerr=errors, color=colour, marker=marker,
                          markersize=5, linestyle=line, elinewidth=1, capsize=2, label=name)
        if dense is not None:
            axes.axhline(100 * dense.answer_right, color="black", linewidth=1, linestyle=":", zorder=1)
        finish_axis(axes, "answer_right")
        budget_axis(axes, axis_rows)
        axes.set_title(heading, fontsize=10.5, loc="left")
        axes.set_xlabel("")
    for axes in list(grid.flat)[len(panels) :]:
        axes.axis("off")
    for row in grid:
        row[0].set_ylabel("right answers [%]")
    for axes in list(grid.flat)[max(0, len(panels) - columns) : len(panels)]:
        axes.set_xlabel("budget [tokens per kv head]")
    return close(figure, grid.flat, title, path, dense, note, columns=len(lines) + 1)


def page_size(rows, path):
    chosen = policies_only(pick(rows, model="main", set="fall"))
    wanted = (*MAIN, "raas:preset=paper_v1", "raas:preset=paper_v2", "oracle")
    sizes = present([row for row in chosen if row.page_size in (1, 4, 16)], "page_size", ())
    names = {size: f"pages of {size:g} token{'' if size == 1 else 's'}" for size in sizes}
    panels = {style_of(policy, part)["label"]: {names[size]: pick(part, page_size=size) for size in sizes}
              for policy, part in by_policy(chosen).items()
              if policy in wanted and len({row.page_size for row in part} & {4, 16}) > 1}
    if not panels:
        return False
    return comparison(panels, dense_of(chosen), list(names.values()), chosen,
                      "Accuracy by tokens, with small and with large pages", path, "Set fall, main model.", 4)


def seeds(rows, path):
    """The same recipe from other random numbers."""
    models = [model for model in MODELS if model.split("_")[0] == "main"]
    shown_policies = ("raas", "raas:evidence=quest_bound:alpha=0.01", "h2o:pin_prompt=true", "random", "quest")
    chosen = [row for row in pick(rows, page_size=4)
              if row.model in models and row.policy in (*shown_policies, "dense")]
    if len({row.model for row in chosen}) < 2:
        return False
    shared = {row.budget for row in chosen if row.model == models[1]}
    names = {model: f"seed {number}" for number, model in enumerate(models, 1)}
    panels = {}
    for name in ("fall", "uniform"):
        for policy in shown_policies:
            part = [row for row in pick(chosen, set=name, policy=policy) if row.budget in shared]
            panels[f"{name}: {STYLES[policy][0]}"] = {
                label: sorted(pick(part, model=model), key=lambda row: row.budget) for model, label in names.items()}
    drawn = [row for parts in panels.values() for part in parts.values() for row in part]
    return comparison(panels, None, list(names.values()), drawn,
                      "Three models of one recipe, trained from different random numbers", path, "Pages of 4.",
                      len(shown_policies))


def ideas(rows, path):
    """Final answers of every idea on every set."""
    chosen = policies_only(pick(rows, model="main", page_size=4))
    names = [name for name in ("fall", "mile", "lru", "age", "uniform")
             if any(row.policy == "decayed_mass" for row in pick(chosen, set=name))]
    if not names:
        return False
    tried = [policy for policy in by_policy(chosen) if policy not in LIBRARY_STYLES]
    policies = ["quest", "raas", "kindred", *tried, "h2o:pin_prompt=true", "random"]
    figure, grid = plt.subplots(1, len(names), figsize=(2.1 + 2.3 * len(names), 0.5 + 0.3 * len(policies)), sharey=True,
                                squeeze=False)
    for axes, name in zip(grid[0], names):
        for budget, shift, filled in ((256.0, -0.13, True), (384.0, 0.13, False)):
            for y, policy in enumerate(policies):
                for row in pick(chosen, set=name, policy=policy, budget=budget):
                    colour = BROWN if policy in tried else STYLES[policy][1]
                    (value,), (error,) = shares([row], "answer_right")
                    axes.errorbar(value, y + shift, xerr=error, color=colour, marker="o", markersize=5.5, elinewidth=1,
                                  capsize=2, markerfacecolor=colour if filled else "white")
        axes.set_title(name, fontsize=12, loc="left")
        axes.set_xlim(-4, 104)
        axes.xaxis.set_major_locator(FixedLocator(range(0, 101, 25)))
        axes.set_xlabel("right answers [%]")
        axes.axvline(90, color=GREY, linewidth=1, linestyle=(0, (1, 3)), zorder=1)
        axes.grid(axis="y", color="#eeeeee", linewidth=0.8)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(axis="y", length=0)
    grid[0][0].set_yticks(range(len(policies)), [STYLES[policy][0] for policy in policies])
    grid[0][0].set_ylim(len(policies) - 0.5, -0.6)
    finish(figure, "Other rules for what RaaS forgets in long silences", path, grows=True,
           note="Filled: budget 256; open: 384. Main model, pages of 4. Dotted: 90 %.")
    return True


def length(rows, path):
    chosen = main_policies(pick(rows, model="varied", page_size=4))
    panels = panels_by_set(chosen, present(chosen, "set", SETS))
    panels = {name: part for name, part in panels.items() if dense_of(part)}
    if not panels:
        return False
    measures = ("tokens_generated", "lines_right")
    figure, grid = measure_grid(panels, measures, 5.5, lambda axes, _: budget_axis(axes, chosen))
    return close(figure, grid[0], "How long the model writes, and how far it gets before it errs", path,
                 dense_of(chosen), "A model whose lines vary in length and which ends its text itself, or is stopped "
                 "at twice the right length; pages of 4.")


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
             if any(len(curve(name, look, parameter, y)) > 2 for look in looks for parameter, y, _ in panels)]
    if not names:
        return False
    figure, grid = plt.subplots(len(names), 3, figsize=(12, 0.3 + 3.0 * len(names)), squeeze=False)
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
            if y == "stamped_share":
                axes.yaxis.set_major_locator(AutoLocator())
                axes.set_ylim(0, 1.15 * max(line.get_ydata().max() for line in axes.get_lines()))
    return close(figure, grid.flat, f"When does RaaS count a page as used? Budget {budget:g} tokens, pages of 4", path,
                 columns=4)


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
    return close(figure, grid[0], f"Long chains: {tokens:,.0f} tokens in the end, pages of {sizes[0]:g}", path, dense)


PICTURES = {"accuracy": accuracy, "sets": sets, "accuracy_bytes": accuracy_bytes, "variants": variants,
            "page_size": page_size, "seeds": seeds, "length": length, "ablation": ablation, "ideas": ideas,
            "long": long}


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
