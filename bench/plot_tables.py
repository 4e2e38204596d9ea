# SPDX-License-Identifier: Apache-2.0
"""Markdown tables of accuracy against budget, from the rows of `reasoning`."""
from plot_rows import MODELS, PERCENT, SETS, by_policy, dense_of, model_name, pick, present, shares
from plot_style import InputError, shown

METRICS = {"answer": "answer_right", "chain": "chain_right", "lines": "lines_right", "tokens": "tokens_generated"}
TABLE_NAMES = {"answer_right": "right final answers", "chain_right": "whole chains right",
               "lines_right": "lines before the first error", "tokens_generated": "tokens generated"}


def digits(column, value):
    return 0 if column in PERCENT or value >= 100 else 1


def cell(row, column):
    if row is None:
        return ""
    if row.refused:
        return "–"
    (value,), (error,) = shares([row], column)
    places = digits(column, value)
    return f"{value:.{places}f} ± {error:.{places}f}"


def unit(column):
    return " [%]" if column in PERCENT else ""


def print_tables(rows, column):
    """One table per model, set and page size: a line per policy, a column per budget, dense first."""
    for model in present(rows, "model", MODELS):
        for name in present([row for row in rows if row.model == model], "set", SETS):
            part = [row for row in rows if (row.model, row.set) == (model, name)]
            dense = dense_of(part)
            for size in present([row for row in part if row.policy != "dense"], "page_size", ()):
                table = [row for row in part if row.policy != "dense" and row.page_size == size]
                budgets = present(table, "budget", ())
                counts = ", ".join(f"{shown(n)} problems" for n in present(table, "problems", ()))
                print(f"{model_name(model)}, `{name}`, pages of {size:g}: {TABLE_NAMES[column]}{unit(column)}, "
                      f"{counts}\n")
                print("| policy | " + " | ".join(f"{budget:g}" for budget in budgets) + " |")
                print("|---" + "|---:" * len(budgets) + "|")
                if dense is not None:
                    cells = " | ".join([cell(dense, column)] * len(budgets))
                    print(f"| `dense` (keeps {shown(dense.peak_resident_tokens)}) | {cells} |")
                for policy, points in by_policy(table).items():
                    at = {row.budget: row for row in points}
                    print(f"| `{policy}` | " + " | ".join(cell(at.get(budget), column) for budget in budgets) + " |")
                print()


def print_beside(rows, column, model, sets, budgets, size, policies):
    """One table with the budgets of several sets side by side, without errors: the largest stands above it."""
    rows = [row for row in rows if row.model == model and row.set in sets]
    policies = policies or ["dense", *by_policy([row for row in rows if not row.is_ablation()])]
    columns = [(name, budget) for name in sets for budget in budgets
               if any(row.budget == budget for row in pick(rows, set=name, page_size=size) if row.policy in policies)]
    drawn, lines = [], []
    for policy in policies:
        cells, told = [], set()
        for name, budget in columns:
            found = pick(rows, policy=policy, set=name, budget=None if policy == "dense" else budget, page_size=size)
            if policy == "dense" and name in told:
                found = []  # once for all budgets
            told.add(name)
            drawn += found
            (value,) = shares(found, column)[0] or [None]
            cells.append("" if value is None else f"{value:.{digits(column, value)}f}")
        if any(cells):
            lines.append(f"| {policy} | " + " | ".join(cells) + " |")
    if not drawn:
        raise InputError(f"no row of model {model} has set {', '.join(sets)} and pages of {size}")
    counts = " or ".join(shown(n) for n in present(drawn, "problems", ()))
    error = max(shares(drawn, column)[1])
    print(f"{model_name(model)}, pages of {size}: {TABLE_NAMES[column]}{unit(column)}, {counts} problems a cell, "
          f"standard error at most {error:.1f}\n")
    headings = [f"{budget}" if i and columns[i - 1][0] == name else f"{name} {budget}"
                for i, (name, budget) in enumerate(columns)]
    print("| policy | " + " | ".join(headings) + " |")
    print("|---" + "|---:" * len(headings) + "|")
    print("\n".join(lines) + "\n")
