// The page's script: figures, tooltips, a table that sorts and filters, and the updates of the live page.
// Plain JavaScript on top of uPlot; the page is readable without it. Texts are set as textContent, never as HTML.

"use strict";

let data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
const opened = document.getElementById("opened");
const NEAR = 28; // pixels from a dot within which it is meant
const charts = new Map(); // name -> {draw, plot, place, ...}: what is drawn, and how it is drawn again

document.documentElement.classList.add("script");

// --- Small things ---------------------------------------------------------------------------------------------

const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const color = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const lineColors = () => ["--training", "--failed", "--startup", "--agent", "--dry", "--scoring"].map(color);

function press(buttons, chosen) {
  for (const button of buttons) button.setAttribute("aria-pressed", button === chosen);
}

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// Return a button that is pressed or not, and does something when it is clicked.
function choice(text, pressed, act) {
  const button = element("button", text, {"aria-pressed": pressed});
  button.addEventListener("click", () => act(button));
  return button;
}

// Return a row of controls. null among them: a gap.
function controls(...entries) {
  const row = element("div", "", {class: "controls"});
  row.append(...entries.map(entry => entry ?? element("span", "", {class: "gap"})));
  return row;
}

function showTip(x, y, title, lines) {
  tip.replaceChildren(element("b", title), ...lines.map(line => element("div", line)));
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = x + 14 + box.width > innerWidth ? x - 14 - box.width : x + 14;
  const top = y + 14 + box.height > innerHeight ? y - 14 - box.height : y + 14;
  tip.style.left = Math.max(4, left) + "px";
  tip.style.top = Math.max(4, top) + "px";
}

function hideTip() {
  tip.hidden = true;
}

// Open all about a run in front of the page.
function openRun(id) {
  const card = document.getElementById("run-" + id);
  if (!card) return;
  hideTip();
  const title = element("h3", card.querySelector("summary > :last-child").textContent);
  const copy = card.querySelector(".inside").cloneNode(true);
  opened.lastElementChild.replaceChildren(title, copy);
  if (!opened.open) opened.showModal();
}

// --- The progress of a series ---------------------------------------------------------------------------------

// The same rule as data.value_limits in Python: what failed far above does not flatten the rest.
function valueLimits(values, first) {
  const ordered = values.slice().sort((a, b) => a - b);
  const low = ordered[0];
  const usual = ordered[Math.floor(ordered.length / 2)];
  let high = ordered[Math.min(ordered.length - 1, Math.floor(0.85 * ordered.length))];
  high = Math.max(Math.min(high, low + 4 * (usual - low)), first, usual);
  const margin = 0.08 * (high - low) || 0.01 * low;
  return [low - margin, high + margin];
}

const COUNT = {label: "run", incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500]};
const HOUR = 3600;
// The times are those of the clock where the report was written, as if they were UTC.
const CLOCK = {
  label: "time",
  incrs: [300, 600, 1800, HOUR, 2 * HOUR, 6 * HOUR, 12 * HOUR, 24 * HOUR, 7 * 24 * HOUR, 28 * 24 * HOUR],
  values: (plot, ticks) => ticks.map(seconds => {
    const date = new Date(seconds * 1000).toUTCString(); // Thu, 11 Jun 2026 03:27:00 GMT
    return seconds % (24 * HOUR) ? date.slice(17, 22) : date.slice(5, 11);
  }),
};

// Fill the place of a series: its controls and its plot.
function prepareProgress(place) {
  const number = Number(place.dataset.progress);
  const key = "progress-" + number;
  const plot = element("div", "", {class: "plot"});
  const state = {axis: "n", range: null};
  const axes = ["n", "t"].map(axis => choice(axis === "n" ? "by run" : "by clock", axis === "n", button => {
    state.axis = axis;
    press(axes, button);
    redrawChart(key);
    showLast(0);
  }));
  const counts = [0, 50, 20];
  const lasts = counts.map(count => choice(count ? `last ${count}` : "all", !count, () => showLast(count)));
  const hint = element("span", "drag to zoom, double-click for all; click a run to open it", {class: "soft extra"});
  const hasTimes = data.series[number].t.some(time => time !== null);
  place.append(controls(...(hasTimes ? [...axes, null] : []), ...lasts, hint), plot);

  // Show the last so many runs, 0: all of them.
  function showLast(count) {
    const x = data.series[number][state.axis].filter(value => value !== null).sort((a, b) => a - b);
    const pad = 0.02 * (x.at(-1) - x.at(-count || 0)) || 1;
    showRange(count && x.length > count ? [x.at(-count) - pad, x.at(-1) + pad] : null, lasts[counts.indexOf(count)]);
  }

  function showRange(range, button) {
    state.range = range;
    press(lasts, button);
    charts.get(key).zoom();
  }

  addChart(key, old => drawProgress(number, plot, state, old, showLast, showRange));
}

function drawProgress(number, place, state, old, showLast, showRange) {
  const series = data.series[number];
  const x = series[state.axis];
  // A run without a time has no place on the clock.
  const order = [...x.keys()].filter(i => x[i] !== null).sort((a, b) => x[a] - x[b]);
  const column = name => order.map(i => series[name][i]);
  const xs = order.map(i => x[i]);
  const first = xs[0], last = xs.at(-1);
  const pad = 0.02 * (last - first) || 1;
  const isClock = state.axis === "t";
  const whole = [first - pad, last + pad];
  const stepped = uPlot.paths.stepped({align: 1});
  const {axis, below, beside} = axes();
  const options = {
    ...sizeOf(place),
    legend: {show: false},
    cursor: {points: {show: false}, y: false, drag: {x: true, y: false}},
    scales: {
      x: {time: false, range: () => state.range ?? whole},
      y: {range: plot => limitsOf(plot)},
    },
    axes: [
      {...axis, ...below, ...(isClock ? CLOCK : COUNT)},
      {...axis, ...beside, values: (plot, ticks) => ticks.map(tick => tick.toFixed(decimalsOf(ticks)))},
    ],
    series: [
      {},
      {stroke: "transparent", paths: stepped, points: {show: false}},
      {stroke: "transparent", paths: stepped, points: {show: false}},
      {stroke: color("--kept"), width: 1.5, paths: stepped, points: {show: false}},
    ],
    bands: [{series: [2, 1], fill: color("--kept") + "2b"}],
    hooks: {
      draw: [plot => drawRuns(plot, series, order, xs)],
      setCursor: [plot => hoverRun(plot)],
      setSelect: [plot => zoom(plot)],
    },
  };

  function limitsOf(plot) {
    const [low, high] = state.range ?? whole;
    const seen = order.filter(i => x[i] >= low && x[i] <= high);
    const values = seen.map(i => series.v[i]).filter(value => value !== null);
    const built = seen.map(i => series.built[i]).filter(value => value !== null);
    if (!values.length && !built.length) return [0, 1];
    return valueLimits(values.length ? values : built, state.range ? Math.max(...built) : series.baseline);
  }

  function zoom(plot) {
    if (plot.select.width < 6) return;
    const {left, width} = plot.select;
    plot.setSelect({left: 0, width: 0, top: 0, height: 0}, false);
    showRange([plot.posToVal(left, "x"), plot.posToVal(left + width, "x")], null);
  }

  function nearest(plot) {
    let found = null, least = NEAR;
    for (const dot of plot.dots ?? []) {
      const distance = Math.hypot(dot.x - plot.cursor.left, dot.y - plot.cursor.top);
      if (distance < least) [found, least] = [dot.i, distance];
    }
    return found;
  }

  function hoverRun(plot) {
    if (plot.cursor.left < 0) return hideTip();
    const i = nearest(plot);
    plot.over.style.cursor = i === null ? "" : "pointer";
    if (i === null) return hideTip();
    const box = plot.over.getBoundingClientRect();
    showTip(box.left + plot.cursor.left, box.top + plot.cursor.top, series.name[i], series.tip[i]);
  }

  old?.plot.destroy();
  const plot = new uPlot(options, [xs, column("low"), column("high"), column("built")], place);
  let down = 0;
  plot.over.addEventListener("mousedown", event => { down = event.clientX; });
  plot.over.addEventListener("mouseleave", hideTip);
  plot.over.addEventListener("dblclick", () => showLast(0));
  plot.over.addEventListener("click", event => {
    const i = nearest(plot);
    if (i !== null && Math.abs(event.clientX - down) < 4) openRun(series.id[i]);
  });
  const [min, max] = whole;
  return {plot, place, zoom: () => plot.setScale("x", {min, max})}; // the range functions say how far
}

function decimalsOf(ticks) {
  const step = ticks.length > 1 ? Math.abs(ticks[1] - ticks[0]) : 0.01;
  const decimals = [0, 1, 2, 3, 4, 5].find(count => Math.abs(step * 10 ** count - Math.round(step * 10 ** count)) < 1e-6);
  return decimals ?? 6;
}

// Draw the dots, the marks of what failed, and the names of the kept runs. Keeps where the dots are, for the cursor.
function drawRuns(plot, series, order, xs) {
  const {ctx} = plot, ratio = devicePixelRatio;
  const {left, top, width, height} = plot.bbox;
  const kept = color("--kept"), tried = color("--tried"), paper = color("--paper");
  const dots = [];
  plot.dots = dots;
  ctx.save();
  ctx.beginPath();
  ctx.rect(left, top, width, height);
  ctx.clip();
  order.forEach((i, at) => {
    const x = plot.valToPos(xs[at], "x", true);
    if (x < left || x > left + width) return;
    const kind = series.kind[i];
    let y = top + height - 8 * ratio;
    if (series.v[i] === null) {
      cross(ctx, x, y, 3 * ratio, tried);
    } else {
      const place = plot.valToPos(series.v[i], "y", true);
      const above = place < top + 6 * ratio;
      y = above ? top + 7 * ratio : place;
      if (above) triangle(ctx, x, y, 4 * ratio, kind === "kept" ? kept : tried);
      else disc(ctx, x, y, (kind === "kept" ? 4.2 : 2.8) * ratio, kind === "kept" ? kept : tried, paper);
    }
    dots.push({i, x: (x - left) / ratio, y: (y - top) / ratio});
  });
  ctx.restore();
  drawNames(plot, series, dots);
}

function disc(ctx, x, y, radius, fill, edge) {
  ctx.beginPath();
  ctx.arc(x, y, radius, 0, 2 * Math.PI);
  ctx.fillStyle = fill;
  ctx.strokeStyle = edge;
  ctx.lineWidth = 1;
  ctx.fill();
  ctx.stroke();
}

function triangle(ctx, x, y, half, fill) {
  ctx.beginPath();
  ctx.moveTo(x, y - half);
  ctx.lineTo(x + half, y + half);
  ctx.lineTo(x - half, y + half);
  ctx.fillStyle = fill;
  ctx.fill();
}

function cross(ctx, x, y, half, stroke) {
  ctx.beginPath();
  for (const sign of [-1, 1]) {
    ctx.moveTo(x - half, y - sign * half);
    ctx.lineTo(x + half, y + sign * half);
  }
  ctx.strokeStyle = stroke;
  ctx.lineWidth = devicePixelRatio;
  ctx.stroke();
}

// Name the kept runs whose names collide with nothing, those with the largest gains first.
function drawNames(plot, series, dots) {
  const {ctx} = plot, ratio = devicePixelRatio, gap = 5, line = 14;
  const frame = {left: 0, top: 0, right: plot.over.clientWidth, bottom: plot.over.clientHeight};
  const taken = dots.map(dot => ({left: dot.x - 5, right: dot.x + 5, top: dot.y - 5, bottom: dot.y + 5}));
  const steps = dots.filter(dot => series.built[dot.i] !== null);
  steps.forEach((dot, at) => {
    const next = steps[at + 1];
    if (!next) return;
    const y = plot.valToPos(series.built[dot.i], "y"), then = plot.valToPos(series.built[next.i], "y");
    taken.push({left: dot.x, right: next.x, top: y - 2, bottom: y + 2});
    taken.push({left: next.x - 2, right: next.x + 2, top: Math.min(y, then), bottom: Math.max(y, then)});
  });
  const wanted = dots.filter(dot => series.kind[dot.i] === "kept" && series.v[dot.i] !== null);
  wanted.sort((a, b) => (series.gain[b.i] ?? 0) - (series.gain[a.i] ?? 0));
  wanted.length = Math.min(wanted.length, 60);
  ctx.save();
  ctx.font = `${11.5 * ratio}px system-ui, sans-serif`;
  ctx.textBaseline = "middle";
  ctx.textAlign = "left";
  for (const dot of wanted) {
    const name = series.name[dot.i];
    const text = name.length > 46 ? name.slice(0, 43).trimEnd() + "..." : name;
    const width = ctx.measureText(text).width / ratio + 4;
    const label = placesAround(dot, width, line, gap).find(place => fits(place, taken, frame));
    if (!label) continue;
    taken.push(label.box, ...(label.leader ? [label.leader] : []));
    if (label.leader) {
      ctx.fillStyle = color("--faint");
      const {left, top, bottom} = label.leader;
      ctx.fillRect(plot.bbox.left + left * ratio, plot.bbox.top + top * ratio, ratio, (bottom - top) * ratio);
    }
    ctx.fillStyle = color("--ink");
    ctx.fillText(text, plot.bbox.left + label.box.left * ratio, plot.bbox.top + (label.box.top + line / 2) * ratio);
  }
  ctx.restore();
}

function placesAround({x, y}, width, height, gap) {
  const box = (left, top) => ({left, top, right: left + width, bottom: top + height});
  const places = [
    box(x + gap, y - gap - height), box(x - gap - width, y - gap - height),
    box(x + gap, y + gap), box(x - gap - width, y + gap),
    box(x + 2 * gap, y - height / 2), box(x - 2 * gap - width, y - height / 2),
  ].map(place => ({box: place}));
  for (let step = 1; step <= 6; step++) {
    const top = y + 10 + step * height;
    const leader = {left: x - 0.5, right: x + 0.5, top: y + 6, bottom: top + height};
    places.push({box: box(x - gap - width, top), leader}, {box: box(x + gap, top), leader});
  }
  return places;
}

function fits({box, leader}, taken, frame) {
  if (box.left < frame.left || box.right > frame.right || box.top < frame.top || box.bottom > frame.bottom) return false;
  const parts = leader ? [box, leader] : [box];
  return !taken.some(other => parts.some(part =>
    part.left < other.right && other.left < part.right && part.top < other.bottom && other.top < part.bottom));
}

// --- Lines: devices, agents -----------------------------------------------------------------------------------

function prepareLines(place) {
  const plot = element("div", "", {class: "plot low"});
  const legend = controls();
  place.append(plot, legend);
  addChart(place.dataset.lines, old => drawLines(place.dataset.lines, plot, legend, old));
}

function drawLines(name, place, legend, old) {
  const {x, y, lines} = data.lines[name];
  const colors = lineColors();
  const table = uPlot.join(lines.map(line => [line.x, line.y]));
  const {axis, below, beside} = axes();
  old?.plot.destroy();
  const plot = new uPlot({
    ...sizeOf(place),
    legend: {show: false},
    cursor: {drag: {x: false, y: false}},
    scales: {x: {time: false}},
    axes: [{...axis, ...below, label: x}, {...axis, ...beside, label: y}],
    series: [{}, ...lines.map((line, at) => ({
      stroke: colors[at % colors.length], width: 1.6, spanGaps: true, points: {show: false},
      paths: uPlot.paths.stepped({align: 1}),
    }))],
  }, table, place);
  legend.replaceChildren(...lines.map((line, at) => chip(line.label, colors[at % colors.length])));
  return {plot, place};
}

function chip(text, fill) {
  const made = element("span", "", {class: "chip"});
  const mark = element("i", "");
  mark.style.background = fill;
  made.append(mark, element("span", text));
  return made;
}

// --- Loss curves ----------------------------------------------------------------------------------------------

const curveState = {difference: true, chosen: null};

function prepareCurves(place) {
  place.hidden = !Object.keys(data.curves.curves).length;
  if (place.hidden) return;
  curveState.chosen = data.curves.chosen;
  const plot = element("div", "", {class: "plot low"});
  const kinds = [true, false].map(difference =>
    choice(difference ? "difference from the best" : "loss", difference, button => {
      curveState.difference = difference;
      press(kinds, button);
      redrawChart("curves");
    }));
  const add = element("select", "", {"aria-label": "add a run"});
  add.addEventListener("change", () => chooseCurves([...curveState.chosen, add.value]));
  const chips = controls();
  place.append(controls(...kinds, add), chips, plot);
  addChart("curves", old => drawCurves(plot, add, chips, old));
}

function drawCurves(place, add, chips, old) {
  const {seconds, curves, names, best} = data.curves;
  const shown = curveState.chosen.filter(id => curves[id]);
  const colors = lineColors();
  const reference = curves[best] ?? [];
  const values = shown.map(id => curves[id].map((value, at) => {
    if (!curveState.difference) return value;
    return value === null || reference[at] == null ? null : value - reference[at];
  }));
  const {axis, below, beside} = axes();
  old?.plot.destroy();
  const plot = new uPlot({
    ...sizeOf(place),
    legend: {show: false},
    cursor: {drag: {x: true, y: false}},
    scales: {x: {time: false}, y: {range: () => curveLimits(values)}},
    axes: [{...axis, ...below, label: "seconds of training"}, {...axis, ...beside}],
    series: [{}, ...shown.map((id, at) => ({
      stroke: colors[at % colors.length], width: id === best ? 2.2 : 1.3, points: {show: false},
    }))],
  }, [seconds, ...values], place);
  chips.replaceChildren(...shown.map((id, at) => {
    const button = choice("", false, () => chooseCurves(curveState.chosen.filter(other => other !== id)));
    button.title = "remove";
    button.append(chip((id === best ? "best: " : "") + names[id], colors[at % colors.length]));
    return button;
  }));
  const rest = Object.keys(names).filter(id => !shown.includes(id));
  const options = rest.map(id => element("option", names[id], {value: id}));
  add.replaceChildren(element("option", "add a run ...", {value: ""}), ...options);
  return {plot, place};
}

// The second half of the training is what differs: the first steps would flatten it.
function curveLimits(values) {
  const later = values.flatMap(curve => curve.slice(Math.floor(curve.length * (curveState.difference ? 0.2 : 0.4))));
  const known = later.filter(value => value !== null);
  if (!known.length) return [0, 1];
  const low = Math.min(...known), high = Math.max(...known);
  const margin = 0.08 * (high - low) || 0.01;
  return [low - margin, high + margin];
}

function chooseCurves(chosen) {
  curveState.chosen = chosen;
  redrawChart("curves");
}

// --- Charts in general ----------------------------------------------------------------------------------------

// What axes have in common, and what those below and beside a figure have.
function axes() {
  const axis = {
    stroke: color("--soft"), grid: {stroke: color("--faint"), width: 0.5}, ticks: {show: false},
    font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif", labelSize: 18,
  };
  return {axis, below: {size: 26}, beside: {size: 56}};
}

function sizeOf(place) {
  return {width: Math.max(200, place.clientWidth), height: place.clientHeight};
}

// Draw a chart, and remember how it is drawn again. draw: takes the chart that was there before.
function addChart(key, draw) {
  charts.set(key, {...draw(undefined), draw});
}

function redrawChart(key) {
  const old = charts.get(key);
  charts.set(key, {...old.draw(old), draw: old.draw});
}

// --- The table of runs ----------------------------------------------------------------------------------------

const rowState = {column: null, ascending: true, kind: "", text: "", unfolded: false};

function valueOf(row, column, isNumber) {
  const cell = row.cells[column];
  const text = cell.dataset.v ?? cell.textContent;
  if (!isNumber) return text.toLowerCase();
  const number = parseFloat(text.replaceAll(",", ""));
  return Number.isNaN(number) ? null : number;
}

function arrangeRows() {
  const table = document.getElementById("run-table");
  const rows = [...table.tBodies[0].rows];
  const {column, ascending, kind, text, unfolded} = rowState;
  if (column !== null) {
    const isNumber = table.tHead.rows[0].cells[column].dataset.sort === "n";
    const keyed = rows.map(row => ({row, key: valueOf(row, column, isNumber)}));
    keyed.sort((a, b) => {
      if (a.key === null || b.key === null) return (a.key === null) - (b.key === null); // no value: last
      return (a.key < b.key ? -1 : a.key > b.key ? 1 : 0) * (ascending ? 1 : -1);
    });
    table.tBodies[0].append(...keyed.map(entry => entry.row));
  }
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  const shown = Number(table.dataset.shown);
  let matching = 0;
  for (const row of table.tBodies[0].rows) {
    const content = row.textContent.toLowerCase();
    const matches = (!kind || row.className === kind) && words.every(word => content.includes(word));
    matching += matches;
    row.hidden = !matches || (!unfolded && matching > shown);
  }
  const more = document.getElementById("run-more");
  more.hidden = matching <= shown;
  more.textContent = unfolded ? `show ${shown}` : `show all ${matching}`;
  all("th", table).forEach((head, at) => {
    if (at === column) head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    else head.removeAttribute("aria-sort");
  });
}

function prepareTable() {
  all("#run-table th").forEach((head, at) => {
    const button = element("button", head.textContent);
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      rowState.ascending = rowState.column === at ? !rowState.ascending : true;
      rowState.column = at;
      arrangeRows();
    });
  });
  const filter = element("input", "", {type: "search", placeholder: "filter", "aria-label": "filter"});
  filter.addEventListener("input", () => {
    rowState.text = filter.value;
    arrangeRows();
  });
  const kinds = {all: "", kept: "kept", "not kept": "discarded", failed: "failed"};
  const buttons = Object.entries(kinds).map(([text, kind]) => choice(text, !kind, button => {
    rowState.kind = kind;
    press(buttons, button);
    arrangeRows();
  }));
  const more = choice("", false, () => {
    rowState.unfolded = !rowState.unfolded;
    arrangeRows();
  });
  more.id = "run-more";
  const place = document.querySelector("#runs .scroll");
  place.before(controls(filter, ...buttons));
  place.after(controls(more));
  arrangeRows();
}

// --- What is clicked ------------------------------------------------------------------------------------------

document.addEventListener("click", event => {
  const link = event.target.closest('a[href^="#run-"], [data-run]:is(rect)');
  if (link) {
    event.preventDefault();
    openRun(link.dataset.run ?? decodeURIComponent(link.getAttribute("href").slice("#run-".length)));
    return;
  }
  if (event.target === opened) opened.close(); // beside what is opened
});

// The stretches of the time line say what they are.
document.addEventListener("pointerover", event => {
  const title = event.target.closest?.(".hour rect")?.querySelector("title");
  if (!title) return;
  showTip(event.clientX, event.clientY, title.textContent, []);
  event.target.addEventListener("pointerleave", hideTip, {once: true});
});

// --- The live page --------------------------------------------------------------------------------------------

const POLL = 2000; // milliseconds
let version = document.querySelector('meta[name="version"]').content;
const parts = new Map(); // name -> HTML of a part as it came, before the script changed it

function rememberParts() {
  for (const part of all("[data-part]")) parts.set(part.dataset.part, part.outerHTML);
}

// Change the page, and keep what is seen of it where it is on the screen.
function keepPlace(change) {
  const seen = all("main section[id], main [data-progress]").find(part => part.getBoundingClientRect().bottom > 0);
  const find = () => seen.id ? document.getElementById(seen.id) : seen; // a section may be replaced
  const top = seen?.getBoundingClientRect().top;
  change();
  if (seen) scrollBy(0, find().getBoundingClientRect().top - top);
}

function showNow(state) {
  const now = document.getElementById("now");
  keepPlace(() => {
    now.hidden = !state.phase;
    now.classList.toggle("gone", !state.alive);
    now.textContent = state.phase;
  });
}

// Return what the server answers, null where it does not.
async function ask(path) {
  try {
    const answer = await fetch(path, {cache: "no-store"});
    return answer.ok ? await answer.text() : null;
  } catch (error) {
    return null;
  }
}

async function poll() {
  const answer = await ask("state");
  if (answer === null) return showNow({phase: "not live any more: autoresearch watch has ended", alive: false});
  const state = JSON.parse(answer);
  showNow(state);
  if (state.version === version) return;
  const text = await ask(".");
  if (text === null) return; // the next poll says so
  try {
    update(text, state.version);
  } catch (error) {
    console.error(error);
    showNow({phase: "what is new could not be drawn here: reload the page", alive: false});
  }
}

// Take over what changed. Scroll, folds, zoom, filter and what was chosen stay.
function update(text, newest) {
  const page = new DOMParser().parseFromString(text, "text/html");
  const fresh = all("[data-part]", page);
  const names = fresh.map(part => part.dataset.part).join();
  if (names !== all("[data-part]").map(part => part.dataset.part).join()) return location.reload();
  keepPlace(() => takeOver(page, fresh));
  version = newest;
}

function takeOver(page, fresh) {
  const open = new Set(all("details[open]").map(details => details.id));
  for (const part of fresh) {
    const name = part.dataset.part;
    if (part.outerHTML === parts.get(name)) continue;
    parts.set(name, part.outerHTML);
    const adopted = document.adoptNode(part);
    for (const details of all("details", adopted)) details.open = open.has(details.id);
    document.querySelector(`[data-part="${name}"]`).replaceWith(adopted);
  }
  data = JSON.parse(page.getElementById("data").textContent);
  document.title = page.title;
  for (const key of charts.keys()) redrawChart(key);
  arrangeRows();
}

// --- Begin ----------------------------------------------------------------------------------------------------

rememberParts();
if (data) {
  all("[data-progress]").forEach(prepareProgress);
  all("[data-lines]").forEach(prepareLines);
  prepareCurves(document.getElementById("curves"));
  prepareTable();
}
new ResizeObserver(() => {
  for (const chart of charts.values()) {
    const size = sizeOf(chart.place);
    if (size.width !== chart.plot.width || size.height !== chart.plot.height) chart.plot.setSize(size);
  }
}).observe(document.body);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const key of charts.keys()) redrawChart(key);
});
if (version) setInterval(() => document.hidden || poll(), POLL);
if (version) poll();
