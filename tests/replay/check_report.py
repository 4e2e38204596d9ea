#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Opens the pages of `replay --report` in headless Chromium and reads them as a person would.

    check_report.py PATH_TO_REPLAY

The figures that the page shows at a step, the cells of its waterfalls and the points of its curves are compared with what
--dump and --json say of the same run; mass and error of a step are computed here, in double precision, from the trace and
the dump. Nothing may be fetched, nothing may be written to the console, no name of a file may become markup.
Exit code 77, which means skipped, where there is no Chromium, chromedriver or selenium.
"""
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse

import numpy as np

from check_replay import gaussian, milestones, read_tensors

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")


def skip(sentence):
    print(f"skipped: {sentence}; on Debian: apt-get install chromium chromium-driver python3-selenium")
    sys.exit(77)


try:
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select
except ImportError:
    skip("this Python has no selenium")

failures = []
checks = 0


def check(holds, what, detail=""):
    global checks
    checks += 1
    if not holds:
        failures.append(what)
        print(f"FAILED: {what}: {detail}")


# ---- the browser -----------------------------------------------------------------------------------------------------


class Browser:
    requests = 0  # seen so far: none would mean that nobody looked

    def __init__(self, profile):
        options = Options()
        options.binary_location = CHROMIUM
        # As root in a container there is neither a sandbox nor much of /dev/shm.
        for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                         f"--user-data-dir={profile}"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(service=Service(CHROMEDRIVER), options=options)
        self.driver.set_page_load_timeout(60)
        self.driver.get("about:blank")
        for log in ("browser", "performance"):  # of the page that a new window shows
            self.driver.get_log(log)

    def open(self, page, width=1300, scheme="light"):
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia",
                                    {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                                    {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500})
        self.driver.get("file://" + urllib.parse.quote(str(page)))

    def quiet(self, what):
        """Nothing on the console, and no request but for the page itself and what lies inside of it."""
        complaints = self.driver.get_log("browser")
        check(not complaints, f"{what}: the console is empty", complaints)
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
        stray = [url for url in asked if not url.startswith("data:") and url != self.driver.current_url]
        check(not stray, f"{what}: no request but the page", stray)
        self.requests += len(asked)

    def script(self, text, *arguments):
        return self.driver.execute_script(text, *arguments)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def choose(self, identifier, value):
        Select(self.one(f"#{identifier}")).select_by_value(str(value))

    def press(self, *keys):
        self.one("#step").send_keys(*keys)

    def to_row(self, row):
        """By dragging, as far as a script can."""
        self.script("const slider = document.getElementById('step'); slider.value = arguments[0];"
                    "slider.dispatchEvent(new Event('input', {bubbles: true}))", row)

    def panel(self, policy):
        """{figure: text} of what is shown under a policy's waterfall."""
        return self.script("return Object.fromEntries([...document.querySelectorAll(arguments[0])]"
                           ".map((place) => [place.dataset.figure, place.textContent]))",
                           f".panel[data-policy='{policy}'] [data-figure]")


# ---- what replay says of a run ---------------------------------------------------------------------------------------


class Truth:
    """One policy at one budget: residency and outputs from --dump, mass and error of each step from the trace."""

    def __init__(self, replay, folder, trace, path, policy, budget, page_size):
        dump = folder / "truth.safetensors"
        subprocess.run([replay, "--trace", path, "--policy", policy, "--budget", str(budget), "--page-size", str(page_size),
                        "--dump", dump], check=True, stdout=subprocess.DEVNULL)
        tensors = read_tensors(dump)
        self.resident = tensors["resident"].astype(bool)  # [step, kv head, position]
        self.read = tensors["read"].astype(bool)
        self.prompt = trace.prompt
        self.share, self.error = self._losses(trace, tensors["out"].astype(np.float64))

    def _losses(self, trace, out):
        tokens, query_heads, kv_heads, dim = trace.shape
        group = query_heads // kv_heads
        share, error = (np.zeros((tokens - trace.prompt, kv_heads)) for _ in range(2))
        for step in range(tokens - trace.prompt):
            end = trace.prompt + step + 1
            for head in range(query_heads):
                logits = trace.k[:end, head // group].astype(np.float64) @ trace.q[end - 1, head].astype(np.float64)
                weights = np.exp((logits - logits.max()) / math.sqrt(dim))
                weights /= weights.sum()
                dense = weights @ trace.v[:end, head // group].astype(np.float64)
                share[step, head // group] += weights[self.read[step, head // group, :end]].sum() / group
                error[step, head // group] += np.linalg.norm(out[step, head] - dense) / np.linalg.norm(dense) / group
        return share, error

    def evicted(self, step, before, head):
        """Positions that were there after step `before` (None: since the beginning), or have come since, and are gone."""
        end = self.prompt + step + 1
        was_there = np.ones(end, bool)
        if before is not None:
            known = self.prompt + before + 1
            was_there[:known] = self.resident[before, head, :known]
        return np.flatnonzero(was_there & ~self.resident[step, head, :end])


def positions_in(text):
    """Of "3–5, 9 (4 tokens)": the positions listed, the count, and whether the list is whole."""
    if text == "nothing":
        return [], 0, True
    found = re.fullmatch(r"(.*?)(, …)? \(([\d,]+) tokens?\)", text)
    positions = []
    for part in found[1].split(", "):
        first, _, last = part.partition("–")
        positions += range(int(first), int(last or first) + 1)
    return positions, int(found[3].replace(",", "")), found[2] is None


def check_figures(shown, truth, step, before, head, what):
    resident, read = truth.resident[step, head].sum(), truth.read[step, head].sum()
    check(shown["resident"].replace(",", "") == str(resident), f"{what}: tokens held", f"{shown} {resident}")
    check(shown["read"].replace(",", "") == str(read), f"{what}: tokens read", f"{shown} {read}")
    share, error = truth.share[step, head], truth.error[step, head]
    check(abs(float(shown["share"].rstrip(" %")) - 100 * share) < 0.0052, f"{what}: mass", f"{shown} {share}")
    check(abs(float(shown["error"]) - error) <= 0.006 * error + 1e-12, f"{what}: error", f"{shown} {error}")
    listed, count, whole = positions_in(shown["evicted"])
    gone = truth.evicted(step, before, head).tolist()
    check(count == len(gone) and (listed == gone if whole else listed == gone[: len(listed)] and len(listed) < count),
          f"{what}: what was given up", f"{shown['evicted']} {gone}")


def kind_of(flags):
    return 0 if not flags.any() else 3 if flags.all() else 1 if 2 * flags.sum() < len(flags) else 2


def check_cells(browser, truth, policy, head, rows, column_tokens, what, seed=1, samples=400):
    """Asks the drawing itself, at random points, what is painted there; rows: the step of each."""
    rng = np.random.RandomState(seed)
    tokens = truth.resident.shape[2]
    points, wanted = [], []
    for _ in range(samples):
        row, position = rng.randint(len(rows)), rng.randint(tokens)
        step, column = rows[row], position // column_tokens
        end = min((column + 1) * column_tokens, truth.prompt + step + 1)
        place = slice(column * column_tokens, end)
        points.append([column + 0.5, row + 0.5])
        if end <= column * column_tokens:
            wanted.append([])
            continue
        held, read = kind_of(truth.resident[step, head, place]), kind_of(truth.read[step, head, place])
        prompt = " prompt" if column * column_tokens < truth.prompt else ""
        pale = ["", " few", " most", ""]
        wanted.append(sorted((["gone"] if held < 3 else []) + ([f"kept{prompt}{pale[held]}"] if held and read < 3 else []) +
                             ([f"read{prompt}{pale[read]}"] if read else [])))
    painted = browser.script("""
        const paths = [...document.querySelectorAll(`.panel[data-policy='${arguments[0]}'] .cells path`)];
        return arguments[1].map(([x, y]) => paths.filter((path) => path.isPointInFill(new DOMPoint(x, y)))
                                                 .map((path) => path.getAttribute("class")).sort());""", policy, points)
    wrong = [(p, got, wish) for p, got, wish in zip(points, painted, wanted) if got != wish]
    check(not wrong, f"{what}: cells of the waterfall", f"{len(wrong)} of {samples}, {wrong[:3]}")


# ---- the pages -------------------------------------------------------------------------------------------------------


def report_of(replay, folder, path, *more):
    page, numbers = folder / "report.html", folder / "report.json"
    subprocess.run([replay, "--trace", path, "--report", page, "--json", numbers, *more], check=True,
                   stdout=subprocess.DEVNULL)
    return page, json.loads(numbers.read_text())


def policies_at_budgets(browser, replay, folder):
    trace = milestones("report", 150, 4, 2, 8, 21, 5)
    # What a careless page would run, end its script with, or take for an entity.
    cruel = folder / "<" / "script><img src=x onerror=alert(1)><b>&amp;'\"\u2028é.safetensors"
    cruel.parent.mkdir()
    cruel.write_bytes(trace.file())
    policies, budgets = ("dense", "raas", "h2o", "quest", "lazy_eviction", "raas+quest"), (40, 64)
    page, numbers = report_of(replay, folder, cruel, "--policy", ",".join(policies), "--budget", "40,64", "--page-size", "4",
                              "--set", "raas+quest.read_budget=16")
    browser.open(page)
    browser.quiet("policies at budgets")
    check(cruel.name in browser.one("#facts").text.replace("\u2028", " ") or cruel.name in
          browser.script("return document.getElementById('facts').textContent"), "the trace's name is shown as it is",
          browser.one("#facts").text)
    check(cruel.name.split("\u2028")[0] in browser.driver.title, "and in the title", browser.driver.title)
    check(not browser.all("img, b"), "the trace's name is no markup")
    check([p.get_attribute("data-policy") for p in browser.all(".panel")] == list(policies), "a panel for each policy")

    steps = 150 - trace.prompt
    check(browser.one("#step").get_attribute("max") == str(steps - 1), "a row for each decode step")
    for budget in budgets:
        browser.choose("budget", budget)
        for policy in policies:
            if policy == "raas+quest":
                continue  # its settings are those of the page alone
            truth = Truth(replay, folder, trace, cruel, policy, budget, 4)
            for head in (0, 1):
                browser.choose("head", head)
                seen = set()
                for step in (0, 1, 11, 40, 77, steps - 1):
                    browser.to_row(step)
                    where = browser.one("#where").text
                    check(where == f"decode step {step}, position {trace.prompt + step}", "where the cursor is", where)
                    shown = browser.panel(policy)
                    seen.add(tuple(shown.values()))
                    what = f"{policy}, budget {budget}, head {head}, step {step}"
                    check_figures(shown, truth, step, step - 1 if step else None, head, what)
                check(len(seen) == 6, f"{policy}: the figures change with the step", seen)
                check_cells(browser, truth, policy, head, range(steps), 4, f"{policy}, budget {budget}, head {head}")

    keyboard(browser, steps)
    hiding(browser, policies)
    means(browser, numbers)
    curves(browser, numbers, [p for p in policies if p != "dense"])
    browser.quiet("after all that")
    for width, scheme in ((360, "light"), (360, "dark"), (1300, "dark")):
        browser.open(page, width, scheme)
        wide = browser.script("return document.documentElement.scrollWidth")
        check(wide <= width, f"nothing sticks out at {width} pixels", wide)
        paper = browser.script("return getComputedStyle(document.body).backgroundColor")
        check((paper == "rgb(255, 255, 255)") == (scheme == "light"), f"the page is {scheme}", paper)
        check(contrast(browser) >= 4.5, f"text is readable, {scheme}", contrast(browser))
        browser.quiet(f"{width} pixels, {scheme}")


def keyboard(browser, steps):
    browser.press(Keys.HOME)
    check(browser.one("#where").text.startswith("decode step 0,"), "Home: the first step", browser.one("#where").text)
    cursor = "return document.querySelector('.cursor .line').getBoundingClientRect().top"
    first = browser.script(cursor)
    browser.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    check(browser.one("#where").text.startswith("decode step 2,"), "arrows: a step each", browser.one("#where").text)
    spoken = browser.one("#step").get_attribute("aria-valuetext")
    check(spoken == browser.one("#where").text, "the slider says where it is", spoken)
    check(browser.script(cursor) > first, "the cursor moves down")
    browser.press(Keys.END)
    last = browser.script(cursor)
    bottom = browser.script("return document.querySelector('svg.cells').getBoundingClientRect().bottom")
    check(browser.one("#where").text.startswith(f"decode step {steps - 1},"), "End: the last", browser.one("#where").text)
    check(0 <= bottom - last < 4, "the cursor is at the foot of the waterfall", f"{last} {bottom}")


def hiding(browser, policies):
    box = browser.one("#policies input[value=h2o]")
    box.click()
    shown = [p.get_attribute("data-policy") for p in browser.all(".panel")]
    check(shown == [p for p in policies if p != "h2o"], "a policy can be hidden", shown)
    check(not browser.all(".curve[data-policy=h2o]"), "its curves too")
    box.click()
    check(len(browser.all(".curve[data-policy=h2o]")) == 2, "and shown again")


def means(browser, numbers):
    """Every step is on the page, so its means must be those that --json has."""
    runs = browser.script("return [data.results.map((result) => result.run), data.runs.map((run) => run.map((head) =>"
                          "[head.share, head.error, head.resident]))]")
    for run, result in zip(runs[0], numbers["results"]):
        heads = np.array(runs[1][run], dtype=float)  # [kv head, figure, step]
        what = f"{result['policy']} at {result['budget_tokens']}"
        check(abs(heads[:, 0].mean() - result["share"]) < 1e-6, f"{what}: mean mass", heads[:, 0].mean())
        check(abs(heads[:, 1].mean() - result["mean_error"]) < 1e-3 * result["mean_error"] + 1e-12, f"{what}: mean error",
              f"{heads[:, 1].mean()} {result['mean_error']}")
        check(heads[:, 2].max() <= result["peak_resident_tokens"], f"{what}: peak", heads[:, 2].max())


def curves(browser, numbers, policies):
    """Each point has the figures of its run as its title, and lies where the axis says."""
    for chart, figure, scale in (("mass-chart", "share", lambda v: v), ("error-chart", "mean_error", math.log10)):
        points = browser.script("""
            return [...document.querySelectorAll(`#${arguments[0]} .curve .mark`)].map((mark) => {
              const box = mark.getBBox();
              return [mark.querySelector("title").textContent, mark.closest(".curve").dataset.policy,
                      box.x + box.width / 2, box.y + box.height / 2];
            });""", chart)
        wanted = [r for r in numbers["results"] if r["policy"] in policies and not r["refused"]]
        check(len(points) == len(wanted), f"{chart}: a point for each run", f"{len(points)} {len(wanted)}")
        by_run = {(p[1], re.search(r"budget (\d+)", p[0])[1]): p for p in points}
        pairs = []
        for result in wanted:
            title, _, x, y = by_run[result["policy"], str(result["budget_tokens"])]
            mass, error = re.search(r"mass ([\d.]+) %, error (\S+)", title).groups()
            check(abs(float(mass) - 100 * result["share"]) < 0.0052 and
                  abs(float(error) - result["mean_error"]) <= 0.006 * result["mean_error"], f"{chart}: a point's title", title)
            pairs.append((math.log2(result["budget_tokens"]), x, scale(result[figure]), y))
        budget, x, value, y = map(np.array, zip(*pairs))
        for given, drawn, axis, sign in ((budget, x, "x", 1), (value, y, "y", -1)):
            slope, offset = np.polyfit(given, drawn, 1)
            # Triangles and stars are not centred in their boxes.
            check(sign * slope > 0 and np.abs(slope * given + offset - drawn).max() < 2.5, f"{chart}: {axis} follows its axis",
                  np.abs(slope * given + offset - drawn).max())


def contrast(browser):
    """The least of what text has before what it stands on (WCAG 2's definition)."""
    colours = browser.script("""
        return ["#facts", ".panel p", "dd", "#curves-note", ".slider span", "h1"].map((selector) => {
          const place = document.querySelector(selector);
          const behind = place.closest(".panel") ?? document.body;
          return [getComputedStyle(place).color, getComputedStyle(behind).backgroundColor];
        });""")

    def luminance(colour):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    ratios = []
    for pair in colours:
        dark, light = sorted(luminance(colour) for colour in pair)
        ratios.append((light + 0.05) / (dark + 0.05))
    return min(ratios)


def sweep(browser, replay, folder):
    trace = gaussian("sweep", 90, 2, 1, 8, 9, 6)
    path = folder / "sweep.safetensors"
    path.write_bytes(trace.file())
    policies = ["raas", "quest", "random", "oracle", "clairvoyant"]
    page, numbers = report_of(replay, folder, path, "--sweep", "--policy", ",".join(policies), "--page-size", "4")
    browser.open(page)
    refused = {(r["policy"], r["budget_tokens"]) for r in numbers["results"] if r["refused"]}
    check(("raas", 8) in refused and ("oracle", 8) not in refused, "a sweep has gaps", refused)
    curves(browser, numbers, policies)
    check(len(browser.all(".gap")) == 2, "grey from random to the clairvoyant", len(browser.all(".gap")))
    browser.choose("budget", 8)
    browser.to_row(60)
    panel = browser.one(".panel[data-policy=raas]")
    reason = next(r["refused"] for r in numbers["results"] if r["policy"] == "raas" and r["budget_tokens"] == 8)
    check(reason in panel.text and not browser.all(".panel[data-policy=raas] svg.cells"), "a refusal says why", panel.text)
    truth = Truth(replay, folder, trace, path, "clairvoyant", 8, 4)
    check_figures(browser.panel("clairvoyant"), truth, 60, 59, 0, "clairvoyant")
    cells = browser.script("return [...document.querySelectorAll('#figures tbody tr')].map((row) => row.textContent)")
    check(len(cells) == len(numbers["results"]) and any(reason in text for text in cells), "the table has every run",
          len(cells))
    browser.quiet("a sweep")


def long_trace(browser, replay, folder):
    """More steps and pages than a page shows."""
    trace = gaussian("long", 2600, 1, 1, 4, 40, 7)
    path = folder / "long.safetensors"
    path.write_bytes(trace.file())
    page, _ = report_of(replay, folder, path, "--policy", "lrfu,quest", "--budget", "200", "--page-size", "2")
    size = page.stat().st_size
    check(size < 1_500_000, "a long trace makes no long page", size)
    browser.open(page)
    check(browser.script("return document.getElementById('curves').hidden"), "one budget makes no curve")
    rows = int(browser.one("#step").get_attribute("max")) + 1
    column_tokens = browser.script("return data.grid.column_tokens")
    note = browser.one("#steps-note").text
    stride = int(re.search(r"one in (\d+)", note)[1])
    check(stride > 1 and rows <= 1024 and f"a column is {column_tokens // 2} pages" in note and column_tokens > 2,
          "the page says what it leaves out", note)
    steps = list(range(2559, -1, -stride))[::-1]
    check(len(steps) == rows, "one step in so many, and the last", f"{rows} {len(steps)}")
    for policy in ("lrfu", "quest"):
        truth = Truth(replay, folder, trace, path, policy, 200, 2)
        for row in (0, 1, rows // 2, rows - 1):
            browser.to_row(row)
            where = browser.one("#where").text.replace(",", "")
            check(where == f"decode step {steps[row]} position {40 + steps[row]}", "where the cursor is", where)
            check_figures(browser.panel(policy), truth, steps[row], steps[row - 1] if row else None, 0, f"{policy}, row {row}")
        check_cells(browser, truth, policy, 0, steps, column_tokens, f"{policy}, long")
    browser.quiet("a long trace")


def interrupted(browser, replay, folder):
    page = folder / "interrupted.html"
    running = subprocess.Popen([replay, "--trace", folder / "long.safetensors", "--sweep", "--page-size", "2", "--budget",
                                "64,128,256,512", "--report", page], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not page.exists() and running.poll() is None:
        time.sleep(0.01)
    browser.open(page)  # nothing has been replayed yet
    browser.quiet("a page without steps")
    check(browser.script("return document.getElementById('step').disabled"), "there is no step to go to yet")
    running.send_signal(signal.SIGINT)
    check(running.wait(60) == 130, "it was interrupted", running.returncode)
    browser.open(page)
    browser.quiet("an interrupted run")
    check("Interrupted" in browser.one("#interrupted").text, "the page says so", browser.one("#interrupted").text)


def refusals(replay, folder):
    path = folder / "sweep.safetensors"
    run = [replay, "--trace", path, "--policy", "h2o", "--budget", "32", "--report"]
    for place, word in ((path, "same file"), (folder / "none" / "report.html", "report.html"), (folder, "directory")):
        done = subprocess.run([*run, place], capture_output=True, text=True)
        check(done.returncode == 2 and word in done.stderr, f"refused: --report {place.name}", f"{done.returncode} {done.stderr}")
    done = subprocess.run([*run, "/dev/stdout"], capture_output=True, text=True, check=True)
    check(done.stdout.startswith("<!doctype html>") and done.stdout.endswith("</html>\n"), "to a stream: the page alone",
          done.stdout[-100:])


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    if CHROMIUM is None or CHROMEDRIVER is None:
        skip("there is no " + ("Chromium" if CHROMIUM is None else "chromedriver"))
    replay = os.path.abspath(sys.argv[1])
    folder = pathlib.Path(tempfile.mkdtemp(prefix="check_report."))
    browser = Browser(folder / "profile")
    try:
        policies_at_budgets(browser, replay, folder)
        sweep(browser, replay, folder)
        long_trace(browser, replay, folder)
        interrupted(browser, replay, folder)
        refusals(replay, folder)
        check(browser.requests >= 8, "requests are watched", browser.requests)
    finally:
        browser.driver.quit()
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{checks - len(failures)} passed, {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
