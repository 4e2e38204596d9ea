#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Draws the pictures and prints the tables of README, from what the benches wrote.

    plot.py pictures  --csv results.csv [--csv more.csv] [--output DIR] [--only accuracy,long] [--where dtype=f32]
    plot.py table     --csv results.csv [--metric answer] [--where set=fall]
    plot.py beside    --csv results.csv --model main --sets fall,uniform --budgets 192,256,384 [--policies raas,quest]
    plot.py attention --trace DIR --problems problems.jsonl [--output DIR]     DIR from decode --record-trace
    plot.py waterfall --run DIR --problems problems.jsonl [--output DIR]       DIR holds decode's --json comparison.json
                                                                               and its --resident resident/
    plot.py curve     --csv decode_curve.csv [--output DIR]
    plot.py sweep     --csv sweep.csv [--output DIR]                           from replay --sweep
    plot.py report    --html report.html [--output DIR]                        from replay --report
    plot.py speed     [--roofline F] [--micro F] [--curve F] [--compile F]     their JSON files, as Markdown tables
Needs numpy and matplotlib, and Chromium for a report. Error bars and +/- are one standard error. A picture without rows
in the CSV is skipped.
"""
import argparse
import pathlib
import sys

import matplotlib.pyplot as plt

import plot_attention
import plot_report
import plot_speed
import plot_sweep
from plot_accuracy import PICTURES, draw_pictures
from plot_rows import NUMBER_COLUMNS, TEXT_COLUMNS, read_rows
from plot_style import InputError
from plot_tables import METRICS, print_beside, print_tables


def condition(text):
    column, separator, value = text.partition("=")
    if not separator or column not in (*TEXT_COLUMNS, *NUMBER_COLUMNS):
        raise argparse.ArgumentTypeError(f"'{text}' is not COLUMN=VALUE with a column of the CSV")
    return column, value


def listed(text):
    return text.split(",")


def listed_counts(text):
    return [int(part) for part in text.split(",")]


def names_of_pictures(text):
    names = text.split(",")
    for name in names:
        if name not in PICTURES:
            raise argparse.ArgumentTypeError(f"'{name}' is not a picture, there are {', '.join(PICTURES)}")
    return names


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True,
                                     metavar="pictures|table|beside|attention|waterfall|curve|sweep|report|speed")

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
    beside = command("beside", "print one Markdown table with the budgets of several sets side by side", False)
    takes_csv(beside)
    beside.add_argument("--model", default="main", help="[main]")
    beside.add_argument("--sets", type=listed, default=["fall", "uniform"], help="[fall,uniform]")
    beside.add_argument("--budgets", type=listed_counts, default=[192, 256, 384], help="[192,256,384]")
    beside.add_argument("--page-size", type=int, default=4, help="[4]")
    beside.add_argument("--policies", type=listed, help="in this order [all]")
    for added in (table, beside):
        added.add_argument("--metric", choices=tuple(METRICS), default="answer",
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
    fall.add_argument("--columns", type=int, default=4, help="panels side by side [4]")
    fall.add_argument("--layer", type=int, default=1, help="[1]")
    fall.add_argument("--head", type=int, default=0, help="kv head [0]")
    curve = command("curve", "draw step_time.png and resident_bytes.png: both against the tokens decoded")
    curve.add_argument("--csv", type=pathlib.Path, required=True, help="from decode_curve")
    sweep = command("sweep", "draw sweep.png: mass kept and error against budget, between the ceilings and the floor")
    sweep.add_argument("--csv", type=pathlib.Path, required=True, help="from replay --sweep")
    page = command("report", "draw report.png: the upper part of a page of replay --report, in headless Chromium")
    page.add_argument("--html", type=pathlib.Path, required=True, help="from replay --report")
    page.add_argument("--width", type=int, default=1280, help="of the window, in pixels [1280]")
    page.add_argument("--height", type=int, default=1330, help="[1330]")
    speed = command("speed", "print Markdown tables of the timing benches, each with the command it came from", False)
    for name, tool in plot_speed.SOURCES.items():
        speed.add_argument(f"--{name}", type=pathlib.Path, metavar="JSON", help=f"from {tool}")
    return parser.parse_args()


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
        elif options.command == "beside":
            print_beside(read_rows(options.csv, options.where), METRICS[options.metric], options.model, options.sets,
                         options.budgets, options.page_size, options.policies)
        else:
            {"attention": plot_attention.attention, "waterfall": plot_attention.waterfall,
             "curve": plot_speed.curve, "sweep": plot_sweep.sweep, "report": plot_report.report,
             "speed": plot_speed.speed}[options.command](options)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of the table has enough
    except InputError as error:
        sys.exit(refusal(error))
    except OSError as error:
        sys.exit(refusal(f"{error.filename}: {error.strerror}"))


if __name__ == "__main__":
    main()
