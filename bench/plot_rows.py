# SPDX-License-Identifier: Apache-2.0
"""The CSV that `reasoning` writes: its columns, its rows, and how to pick among them."""
import csv
import dataclasses
import math

from plot_style import STYLES, InputError, shown

TEXT_COLUMNS = ("model", "set", "format", "policy", "dtype", "refused")
NUMBER_COLUMNS = (
    "lines", "problems", "seed", "page_size", "budget", "answer_right", "answer_stderr", "chain_right", "chain_stderr",
    "lines_right", "lines_stderr", "tokens_generated", "tokens_stderr", "peak_resident_tokens", "peak_resident_bytes",
    "mean_resident_bytes", "allocated_bytes", "stamped_share")
MAY_BE_EMPTY = ("page_size", "budget", "stamped_share")  # in a row that was not refused
SETS = ("fall", "mile", "lru", "age", "uniform", "fall:gmax=4", "fall:gmax=12")  # in the order of the pictures
MODELS = ("main", "main_seed2", "main_seed3", "plain", "varied", "long")
ERRORS = {"answer_right": "answer_stderr", "chain_right": "chain_stderr", "lines_right": "lines_stderr",
          "tokens_generated": "tokens_stderr"}
PERCENT = ("answer_right", "chain_right", "stamped_share")


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


def shares(rows, column):
    """Values and standard errors, shares in percent."""
    scale = 100 if column in PERCENT else 1
    return [scale * row.values[column] for row in rows], [scale * row.error(column) for row in rows]


def model_name(model):
    name, _, seed = model.partition("_seed")
    return "model of varied lines" if model == "varied" else f"{name} model" + (f", seed {seed}" if seed else "")
