"use strict";
// Draws what the JSON in #data holds. Every string of it goes into the page as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const {trace, grid, results} = data;
const part = (id) => document.getElementById(id);
const policies = [...new Set(results.map((result) => result.policy))];
const budgets = [...new Set(results.map((result) => result.budget_tokens))].sort((a, b) => a - b);
const hidden = new Set();  // policies
const rows = data.runs[0][0].resident.length;
const state = {row: Math.floor(rows / 2), head: 0, budget: 0};
let panels = [];  // of the policies shown

// ---- elements -------------------------------------------------------------------------------------------------------

function element(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
const html = (tag, attributes = {}, ...children) => element(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  element(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const label = (x, y, text, anchor = "middle", more = {}) => svg("text", {x, y, "text-anchor": anchor, ...more}, text);

// ---- numbers --------------------------------------------------------------------------------------------------------

const percent = (share) => (share === null ? "–" : `${(100 * share).toFixed(2)} %`);
const counted = (count) => (count === null ? "–" : count.toLocaleString("en"));
const plural = (count, noun) => `${counted(count)} ${noun}${count === 1 ? "" : "s"}`;
function small(value) {
  if (value === null) return "–";
  if (value === 0) return "0";
  return value < 0.001 || value >= 1000 ? value.toExponential(2) : value.toPrecision(3);
}
function bytes(count) {
  if (count === null) return "–";
  let unit = 0;
  for (; count >= 1024 && unit < 4; ++unit) count /= 1024;
  return `${unit === 0 ? count : count.toFixed(1)} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`;
}
/** About `most` round numbers from 0 to `end`. */
function roundTicks(end, most) {
  const power = 10 ** Math.floor(Math.log10(Math.max(end, 1) / most));
  const step = Math.max(1, [1, 2, 5, 10].map((factor) => factor * power).find((size) => end / size <= most));
  return Array.from({length: Math.floor(end / step) + 1}, (_, i) => i * step);
}
const stepOf = (row) => grid.first_step + row * grid.step_stride;

// ---- looks of policies ----------------------------------------------------------------------------------------------

const around = (corners, turn, radius = 1) => Array.from({length: corners}, (_, i) => {
  const angle = ((turn + (360 * i) / corners) * Math.PI) / 180;
  return [radius * Math.cos(angle), radius * Math.sin(angle)];
});
const plus = [[-1, 3], [1, 3], [1, 1], [3, 1], [3, -1], [1, -1], [1, -3], [-1, -3], [-1, -1], [-3, -1], [-3, 1], [-1, 1]]
  .map(([x, y]) => [x / 3, y / 3]);
const shapes = {
  o: around(20, 0), s: around(4, 45, 1.2), D: around(4, 0, 1.2), d: around(4, 0, 1.2).map(([x, y]) => [0.6 * x, y]),
  "^": around(3, -90, 1.2), v: around(3, 90, 1.2), ">": around(3, 0, 1.2), "<": around(3, 180, 1.2), p: around(5, -90, 1.1),
  h: around(6, -90, 1.1), 8: around(8, 22.5, 1.1), P: plus, X: plus.map(([x, y]) => [0.75 * (x - y), 0.75 * (x + y)]),
  "*": around(5, -90, 1.5).flatMap((corner, i) => [corner, around(5, -54, 0.6)[i]]),
};
const spareColours = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#8C510A", "#B8A800"];
const strange = policies.filter((policy) => !Object.hasOwn(data.looks, policy));
function look(policy) {
  if (Object.hasOwn(data.looks, policy)) return data.looks[policy];
  const number = strange.indexOf(policy);
  return {colour: spareColours[number % spareColours.length], marker: "^v<>"[Math.floor(number / 6) % 4], filled: false};
}
/** In the ink of the page where a picture on white paper has black. */
const painted = (policy) => (look(policy).colour === "#222222" ? {} : {style: `--colour: ${look(policy).colour}`});
const endsOfScale = ["oracle", "clairvoyant", "random"];
const evicts = (policy) => results.some((result) => result.policy === policy && result.evicted_tokens > 0);
const strokeOf = (policy) => ({
  class: "stroke", "stroke-width": endsOfScale.includes(policy) ? 2.6 : 1.5,
  "stroke-dasharray": evicts(policy) ? "none" : "5 4",
});
function mark(policy, x, y, size = 4.2) {
  const corners = shapes[look(policy).marker].map(([dx, dy]) => `${(x + size * dx).toFixed(1)},${(y + size * dy).toFixed(1)}`);
  return svg("path", {class: look(policy).filled ? "mark filled" : "mark", d: `M${corners.join("L")}Z`});
}
const swatch = (policy) => svg("svg", {class: "swatch", width: 28, height: 14, "aria-hidden": "true", ...painted(policy)},
  svg("path", {...strokeOf(policy), d: "M1,7H27"}), mark(policy, 14, 7));

// ---- curves against the budget --------------------------------------------------------------------------------------

const hasBudget = (result) => result.policy !== "dense" && result.run !== null;
const takenBudgets = budgets.filter((b) => results.some((result) => hasBudget(result) && result.budget_tokens === b));

function drawChart(figure, {value, low, high, ticks, at, text, what}) {
  const place = figure.querySelector(".drawing");
  const width = Math.max(260, place.clientWidth), height = Math.max(230, Math.min(340, 0.62 * width));
  const left = 46, right = width - 10, top = 8, bottom = height - 40;
  const first = Math.log2(takenBudgets[0]), last = Math.log2(takenBudgets.at(-1));
  const x = (budget) => left + 8 + ((right - left - 16) * (Math.log2(budget) - first)) / (last - first);
  const y = (number) => bottom - ((bottom - top) * (at(number) - at(low))) / (at(high) - at(low));
  const drawing = svg("svg", {width, height, role: "img", "aria-label": `${what} against the budget, by policy`});
  for (const tick of ticks) {
    drawing.append(svg("path", {class: "grid", d: `M${left},${y(tick)}H${right}`}),
      label(left - 6, y(tick) + 4, text(tick), "end"));
  }
  let free = -Infinity;
  for (const budget of takenBudgets) {
    drawing.append(svg("path", {class: "grid", d: `M${x(budget)},${top}V${bottom}`}));
    if (x(budget) < free) continue;
    drawing.append(label(x(budget), bottom + 16, counted(budget)));
    free = x(budget) + 7 * counted(budget).length + 8;
  }
  drawing.append(svg("path", {class: "axis", d: `M${left},${top}V${bottom}H${right}`}),
    label((left + right) / 2, height - 6, "budget: tokens per kv head"));

  const pointsOf = (policy) => results
    .filter((result) => result.policy === policy && hasBudget(result) && value(result) !== null)
    .sort((a, b) => a.budget_tokens - b.budget_tokens);
  const shown = policies.filter((policy) => policy !== "dense" && !hidden.has(policy));
  if (shown.includes("random") && shown.includes("clairvoyant")) {
    const floor = pointsOf("random"), ceiling = pointsOf("clairvoyant");
    const both = floor.filter((point) => ceiling.some((other) => other.budget_tokens === point.budget_tokens));
    const back = ceiling.filter((point) => both.some((other) => other.budget_tokens === point.budget_tokens)).reverse();
    const corners = [...both, ...back].map((result) => `${x(result.budget_tokens)},${y(value(result))}`);
    if (both.length > 1) drawing.append(svg("path", {class: "gap", d: `M${corners.join("L")}Z`}));
  }
  for (const policy of shown.sort((a, b) => endsOfScale.includes(a) - endsOfScale.includes(b))) {
    const points = pointsOf(policy);
    if (points.length === 0) continue;
    const curve = svg("g", {class: "curve", "data-policy": policy, ...painted(policy)});
    curve.append(svg("path", {...strokeOf(policy),
      d: `M${points.map((point) => `${x(point.budget_tokens)},${y(value(point))}`).join("L")}`}));
    for (const point of points) {
      const drawn = mark(policy, x(point.budget_tokens), y(value(point)));
      drawn.append(svg("title", {},
        `${policy}, budget ${point.budget_tokens}: mass ${percent(point.share)}, error ${small(point.mean_error)}`));
      curve.append(drawn);
    }
    drawing.append(curve);
  }
  place.replaceChildren(drawing);
}

function drawCharts() {
  if (takenBudgets.length < 2) return;
  drawChart(part("mass-chart"), {
    value: (result) => result.share, low: 0, high: 1, ticks: [0, 0.2, 0.4, 0.6, 0.8, 1], at: (share) => share,
    text: (share) => `${Math.round(100 * share)} %`, what: "Mass kept",
  });
  const errors = results.filter(hasBudget).map((result) => result.mean_error).filter((error) => error > 0);
  if (errors.length === 0) return;
  const powers = [Math.floor(Math.log10(Math.min(...errors))), Math.ceil(Math.log10(Math.max(...errors)))];
  if (powers[0] === powers[1]) ++powers[1];
  const stride = Math.ceil((powers[1] - powers[0]) / 8);
  const ticks = [];
  for (let power = powers[0]; power <= powers[1]; power += stride) ticks.push(10 ** power);
  drawChart(part("error-chart"), {
    value: (result) => (result.mean_error > 0 ? result.mean_error : null), low: 10 ** powers[0], high: 10 ** powers[1],
    ticks, at: Math.log10, what: "Output error",
    text: (tick) => (tick >= 0.01 && tick <= 1000 ? String(Number(tick.toPrecision(1))) : tick.toExponential(0)),
  });
}

function highlight(policy) {
  for (const curve of document.querySelectorAll(".curve")) {
    curve.classList.toggle("faint", policy !== null && curve.dataset.policy !== policy);
  }
}

// ---- waterfalls -----------------------------------------------------------------------------------------------------

/** The cells of one column from the top: [first row, rows, resident level, read level], levels from 0, none, to 3, all. */
function runsOfColumn(text) {
  const runs = [...text.matchAll(/([a-p])(\d*)/g)].map(([, kind, count]) => [kind.charCodeAt(0) - 97, Number(count || 1)]);
  let row = rows - runs.reduce((sum, run) => sum + run[1], 0);
  return runs.map(([kind, count]) => [(row += count) - count, count, kind >> 2, kind & 3]);
}

const levels = ["", " few", " most", ""];
function cellsOf(waterfall) {
  const paths = new Map();
  const add = (kind, column, row, count) =>
    paths.set(kind, (paths.get(kind) ?? "") + `M${column},${row}h1v${count}h-1z`);
  waterfall.columns.split(",").forEach((text, column) => {
    const prompt = column * grid.column_tokens < trace.prompt_tokens ? " prompt" : "";
    for (const [row, count, resident, read] of runsOfColumn(text)) {
      if (resident < 3) add("1 gone", column, row, count);
      if (resident > 0 && read < 3) add(`2 kept${prompt}${levels[resident]}`, column, row, count);
      if (read > 0) add(`3 read${prompt}${levels[read]}`, column, row, count);
    }
  });
  return [...paths].sort(([a], [b]) => a.localeCompare(b)).map(([kind, d]) => svg("path", {class: kind.slice(2), d}));
}

function drawWaterfall(panel) {
  const place = panel.element.querySelector(".drawing");
  const width = Math.max(250, place.clientWidth), strip = 46, left = 34;
  const right = width - strip - 16, top = 18, bottom = top + Math.round(0.66 * width), height = bottom + 34;
  const x = (position) => left + ((right - left) * position) / trace.tokens;
  const y = (row) => top + ((bottom - top) * row) / rows;
  const massX = (share) => right + 10 + strip * Math.min(1, Math.max(0, share));
  const drawing = svg("svg", {width, height, role: "img",
    "aria-label": `What ${panel.result.policy} keeps and reads: positions from left to right, decode steps from top ` +
      "to bottom; at the right the attention mass on what it reads at each step"});
  drawing.append(svg("svg", {class: "cells", x: left, y: top, width: right - left, height: bottom - top,
    viewBox: `0 0 ${trace.tokens / grid.column_tokens} ${rows}`, preserveAspectRatio: "none"},
    ...(panel.cells ??= cellsOf(panel.waterfall))));
  drawing.append(svg("path", {class: "axis", d: `M${left},${top}V${bottom}H${right}`}),
    svg("path", {class: "grid", d: `M${massX(0)},${top}V${bottom}H${massX(1)}V${top}`}));
  const most = Math.max(1, Math.min(5, Math.floor((right - left) / (7 * counted(trace.tokens).length + 12))));
  for (const tick of roundTicks(trace.tokens, most)) drawing.append(label(x(tick), bottom + 15, counted(tick)));
  for (const tick of roundTicks(stepOf(rows - 1), 6)) {
    drawing.append(label(left - 5, y((tick - grid.first_step + 0.5) / grid.step_stride) + 4, counted(tick), "end"));
  }
  drawing.append(label(0, 10, "decode step", "start"), label((left + right) / 2, bottom + 30, "position"),
    label(massX(1), 10, "mass", "end"),
    label(massX(0), bottom + 15, "0"), label(massX(1), bottom + 15, "100 %", "end"));
  const line = panel.waterfall.share.map((share, row) => `${massX(share ?? 0).toFixed(1)},${y(row + 0.5).toFixed(1)}`);
  drawing.append(svg("path", {class: "mass", d: `M${line.join("L")}`}));
  panel.cursor = svg("g", {class: "cursor"});
  drawing.append(panel.cursor);
  Object.assign(panel, {x, y, left, edge: massX(1), top, bottom});
  place.replaceChildren(drawing);
}

function rangesText([tokens, ranges]) {
  const listed = ranges.map(([first, last]) => (first === last ? String(first) : `${first}–${last}`));
  const named = ranges.reduce((sum, [first, last]) => sum + last - first + 1, 0);
  return `${listed.join(", ")}${named < tokens ? ", …" : ""} (${plural(tokens, "token")})`;
}

/** Moves a panel's cursor to the current row and shows that step's figures. */
function showRow(panel) {
  const {waterfall} = panel, {row} = state;
  const gone = waterfall.evicted[row];
  const height = panel.y(row + 0.5);
  panel.cursor.replaceChildren(svg("path", {class: "halo", d: `M${panel.left},${height}H${panel.edge}`}),
    svg("path", {class: "line", d: `M${panel.left},${height}H${panel.edge}`}));
  for (const [first, last] of gone ? gone[1] : []) {
    const begin = panel.x(first), wide = Math.max(3, panel.x(last + 1) - begin);
    panel.cursor.append(svg("rect", {class: "given-up", x: begin - 0.5, y: height - 5, width: wide, height: 10}));
  }
  const texts = {
    resident: counted(waterfall.resident[row]), read: counted(waterfall.read[row]), share: percent(waterfall.share[row]),
    error: small(waterfall.error[row]), evicted: gone ? rangesText(gone) : "nothing",
  };
  for (const [name, text] of Object.entries(texts)) {
    panel.element.querySelector(`[data-figure=${name}]`).textContent = text;
  }
}

function summary(result) {
  const reads = result.read_budget_tokens === null ? "" : `, may read ${counted(result.read_budget_tokens)}`;
  return `overall mass ${percent(result.share)}, error ${small(result.mean_error)}; held ` +
    `${plural(result.peak_resident_tokens, "token")} at most${reads}`;
}

function makePanel(result) {
  const heading = html("h3", {}, swatch(result.policy), result.policy);
  const attributes = {class: "panel", "data-policy": result.policy, "data-budget": result.budget_tokens};
  if (result.run === null) {
    return {result, element: html("article", attributes, heading, html("p", {}, `refuses this budget: ${result.refused}`))};
  }
  const figure = (name, text, wide) => [html("dt", {}, text), html("dd", {"data-figure": name, class: wide ? "wide" : ""})];
  const figures = html("dl", {}, ...figure("resident", "holds"), ...figure("read", "reads"), ...figure("share", "mass"),
    ...figure("error", "error"), ...figure("evicted", "gave up", true));
  const drawing = html("div", {class: "drawing"});
  const panel = {result, waterfall: data.runs[result.run][state.head],
    element: html("article", attributes, heading, html("p", {}, summary(result)), drawing, figures)};
  const follow = (event) => {
    if (event.type === "pointermove" && event.buttons !== 1) return;
    const place = drawing.getBoundingClientRect();
    setRow(Math.floor((rows * (event.clientY - place.top - panel.top)) / (panel.bottom - panel.top)));
  };
  drawing.addEventListener("pointerdown", follow);
  drawing.addEventListener("pointermove", follow);
  return panel;
}

function drawPanels() {
  if (rows === 0) return;
  const shown = results.filter((result) => result.budget_tokens === state.budget && !hidden.has(result.policy));
  panels = shown.map(makePanel);
  part("panels").replaceChildren(...panels.map((panel) => panel.element));
  panels = panels.filter((panel) => panel.waterfall);
  panels.forEach(drawWaterfall);
  setRow(state.row);
}

function setRow(row) {
  state.row = Math.min(rows - 1, Math.max(0, row));
  const text = `decode step ${counted(stepOf(state.row))}, position ${counted(trace.prompt_tokens + stepOf(state.row))}`;
  part("step").value = state.row;
  part("step").setAttribute("aria-valuetext", text);
  part("where").textContent = text;
  panels.forEach(showRow);
}

// ---- the page -------------------------------------------------------------------------------------------------------

function writeFacts() {
  const file = trace.file.split("/").at(-1);
  const settings = data.settings.length ? `; ${data.settings.join(", ")}` : "";
  part("facts").textContent = `${file}: ${plural(trace.tokens, "token")}, ${counted(trace.prompt_tokens)} of them prompt; ` +
    `${plural(trace.query_heads, "query head")} over ${plural(trace.kv_heads, "kv head")}, head_dim ${trace.head_dim}; ` +
    `pages of ${plural(data.page_size, "token")}, stored as ${data.dtype}${settings}`;
  if (!data.complete) {
    part("interrupted").hidden = false;
    part("interrupted").textContent = `Interrupted: this covers the first ${plural(data.replayed_tokens, "token")} only.`;
  }
}

function writeNotes() {
  part("curves-note").textContent = "Solid lines evict: the budget is what stays. Dashed lines keep everything: the budget is " +
    "what a query reads of it. A line begins at the first budget that the policy takes; dense, which has none, is not drawn." +
    (policies.includes("oracle") ? " No choice of as many tokens holds more mass than oracle's." : "") +
    (policies.includes("clairvoyant") ? " No evictor of whole pages with the same budget for every head keeps more mass than the " +
      "clairvoyant, which knows the rest of the trace." : "") +
    (policies.includes("clairvoyant") && policies.includes("random") ? " Grey: from random to there." : "");
  const pages = grid.column_tokens / data.page_size;
  const steps = grid.step_stride === 1 ? "Every decode step is shown" :
    `Of ${plural(grid.steps, "decode step")} one in ${grid.step_stride} is shown, and the last`;
  const columns = `a column is ${plural(pages, "page")} of ${plural(data.page_size, "token")}` +
    (grid.column_tokens === 1 ? "" : ", paler where only some of its tokens are there or read");
  const heads = grid.kv_heads < trace.kv_heads ?
    ` Waterfalls are of the first ${grid.kv_heads} of ${trace.kv_heads} kv heads.` : "";
  part("steps-note").textContent = `Time runs down. ${steps}; ${columns}.${heads} Drag in a picture, or use the slider and its ` +
    "arrow keys. Figures under a picture are that step's, of the chosen kv head; mass and error are means over its query " +
    "heads. What a policy gave up is what has gone since the step shown before, the first one's since the beginning.";
}

function writeKinds() {
  const kinds = [["--prompt-read", "prompt, read"], ["--read", "in the cache and read"], ["--prompt-kept", "prompt, not read"],
    ["--kept", "in the cache, not read"], ["--gone", "evicted: gone for good"], ["--card", "not written yet"],
    ["--given-up", "given up at this step"]];
  part("kinds").append(...kinds.map(([colour, text]) => html("li", {}, html("i", {style: `background: var(${colour})`}), text)));
}

function writeFigures() {
  const columns = [
    ["policy"], ["budget", (r) => counted(r.budget_tokens)], ["read budget", (r) => counted(r.read_budget_tokens)],
    ["mass read", (r) => percent(r.share)], ["mean error", (r) => small(r.mean_error)], ["max error", (r) => small(r.max_error)],
    ["peak tokens", (r) => counted(r.peak_resident_tokens)], ["peak memory", (r) => bytes(r.peak_resident_bytes)],
    ["evicted", (r) => counted(r.evicted_tokens)],
  ];
  const body = results.map((result) => {
    const cells = result.refused === null ? columns.slice(1).map(([, text]) => html("td", {}, text(result))) :
      [html("td", {}, counted(result.budget_tokens)), html("td", {class: "reason", colspan: columns.length - 2}, result.refused)];
    return html("tr", {}, html("th", {scope: "row"}, result.policy), ...cells);
  });
  part("figures").append(html("thead", {}, html("tr", {}, ...columns.map(([name]) => html("th", {scope: "col"}, name)))),
    html("tbody", {}, ...body));
}

function writeControls() {
  for (const policy of policies) {
    const box = html("input", {type: "checkbox", checked: "", value: policy});
    const choice = html("label", {}, box, swatch(policy), policy);
    box.addEventListener("change", () => {
      if (box.checked) hidden.delete(policy); else hidden.add(policy);
      drawCharts();
      drawPanels();
    });
    for (const event of ["pointerenter", "focusin"]) choice.addEventListener(event, () => highlight(policy));
    for (const event of ["pointerleave", "focusout"]) choice.addEventListener(event, () => highlight(null));
    part("policies").append(choice);
  }
  // The smallest of the budgets that most policies take shows best how they differ.
  const takers = (budget) => results.filter((result) => result.budget_tokens === budget && result.run !== null).length;
  const most = Math.max(...budgets.map(takers));
  state.budget = budgets.find((budget) => takers(budget) === most);
  part("budget").append(...budgets.map((budget) => html("option", {value: budget}, counted(budget))));
  part("budget").value = state.budget;
  part("budget").addEventListener("change", () => { state.budget = Number(part("budget").value); drawPanels(); });
  for (let head = 0; head < grid.kv_heads; ++head) part("head").append(html("option", {value: head}, String(head)));
  part("head").addEventListener("change", () => { state.head = Number(part("head").value); drawPanels(); });
  part("step").max = Math.max(0, rows - 1);
  part("step").disabled = rows === 0;
  part("step").addEventListener("input", () => setRow(Number(part("step").value)));
}

writeFacts();
writeNotes();
writeKinds();
writeFigures();
writeControls();
if (takenBudgets.length < 2) {
  part("curves").hidden = true;
  part("curves-note").textContent = "Curves need two budgets or more; the figures of this one are at the end of the page.";
}
drawCharts();
drawPanels();
let width = window.innerWidth;
window.addEventListener("resize", () => {
  if (window.innerWidth === width) return;
  width = window.innerWidth;
  drawCharts();
  panels.forEach(drawWaterfall);
  setRow(state.row);
});
