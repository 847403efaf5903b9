"""`front.html`: the search as one page that needs nothing else, neither files nor a network."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from string import Template
from typing import Any

from whittle_nas.search.trials import Trial
from whittle_nas.space.front import Front


def render(front: Front, trials: Sequence[Trial], hypervolume: Sequence[float], path: str) -> str:
    """The page.

    Args:
        front: what was found.
        trials: all trials.
        hypervolume: dominated share of the objectives' range after each trial.
        path: of `front.json`, for the export command.
    """
    data = {
        "objectives": front.objectives,
        "checkpoint": front.checkpoint_dir,
        "path": path,
        "front": [entry.to_dict() for entry in front.entries],
        "trials": [_plain(trial) for trial in trials],
        "hypervolume": [round(value, 6) for value in hypervolume],
    }
    measured = json.dumps(dict(front.how_measured), indent=1)
    return Template(_PAGE).substitute(
        title=html.escape(f"Front of {front.checkpoint_dir}"),
        measured=html.escape(measured),
        # In a script, only the end of the script itself must not appear.
        data=json.dumps(data).replace("</", "<\\/"),
        script=_SCRIPT,
        style=_STYLE,
    )


def _plain(trial: Trial) -> dict[str, Any]:
    return {
        "number": trial.number,
        "status": trial.status.value,
        "subnetwork": trial.sub.to_dict(),
        "metrics": dict(trial.metrics),
    }


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title><style>$style</style></head>
<body>
<h1>$title</h1>
<p><label>across <select id="x"></select></label> <label>up <select id="y"></select></label>
<label><input type="checkbox" id="log"> log</label></p>
<div class="charts"><svg id="front" viewBox="0 0 640 400"></svg>
<svg id="growth" viewBox="0 0 400 400"></svg></div>
<p>Best under <select id="metric"></select> &le; <input id="budget" size="12">
<output id="best"></output></p>
<pre id="command"></pre>
<table id="table"></table>
<details><summary>How it was measured</summary><pre>$measured</pre></details>
<script>const data = $data;
$script</script>
</body></html>
"""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; }
h1 { font-size: 1.3em; } .charts { display: flex; gap: 1em; flex-wrap: wrap; }
svg { flex: 1 1 20em; background: #fafafa; font-size: 12px; }
table { border-collapse: collapse; margin: 1em 0; } th { cursor: pointer; }
th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid #ddd; }
tr.chosen { background: #dbe9f6; } pre { background: #f3f3f3; padding: .6em; overflow-x: auto; }
"""

_SCRIPT = """
const el = id => document.getElementById(id);
const number = v => typeof v !== 'number' ? '' : Math.abs(v) >= 1e4 ?
  Math.round(v).toLocaleString('en') : String(+v.toPrecision(4));
const metrics = Object.keys(data.front[0].metrics);
const [first, ...costs] = data.objectives, cost = costs[costs.length - 1];
let chosen = null, sortBy = null;

function options(select, names, value, change) {
  for (const name of names) select.add(new Option(name, name, false, name === value));
  select.onchange = change;
}
function scale(values, low, high, log) {
  const f = log ? Math.log : v => v, all = values.map(f);
  const a = Math.min(...all), b = Math.max(...all);
  return v => low + (high - low) * (b > a ? (f(v) - a) / (b - a) : 0.5);
}
function node(parent, name, attributes, text) {
  const made = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (text !== undefined) made.textContent = text;
  return parent.appendChild(made);
}
function axes(svg, xs, ys, width, x, y) {
  const style = {stroke: '#888', fill: 'none'};
  node(svg, 'path', {d: `M60 20V360H${width - 10}`, ...style});
  const ends = values => [Math.min(...values), Math.max(...values)];
  ends(xs).forEach((v, i) => node(svg, 'text',
    {x: i ? width - 10 : 60, y: 376, 'text-anchor': i ? 'end' : 'start'}, number(v)));
  ends(ys).forEach((v, i) => node(svg, 'text', {x: 55, y: i ? 28 : 360, 'text-anchor': 'end'},
    number(v)));
  node(svg, 'text', {x: width / 2, y: 394, 'text-anchor': 'middle'}, x);
  node(svg, 'text', {transform: 'translate(14 190) rotate(-90)', 'text-anchor': 'middle'}, y);
}
function label(item) {
  const of = pairs => Object.entries(pairs).map(([k, v]) => `${k} ${number(v)}`).join('\\n');
  return of(item.subnetwork) + '\\n' + of(item.metrics);
}
function drawFront() {
  const svg = el('front'), x = el('x').value, y = el('y').value, log = el('log').checked;
  const known = item => typeof item.metrics[x] === 'number' && typeof item.metrics[y] === 'number';
  const trials = data.trials.filter(known), all = trials.concat(data.front);
  const xs = all.map(t => t.metrics[x]), ys = all.map(t => t.metrics[y]);
  const px = scale(xs, 66, 624, log), py = scale(ys, 354, 26, log);
  svg.replaceChildren();
  axes(svg, xs, ys, 640, x, y);
  const dot = (item, r, fill) => {
    const c = node(svg, 'circle', {cx: px(item.metrics[x]), cy: py(item.metrics[y]), r, fill});
    node(c, 'title', {}, label(item));
    return c;
  };
  trials.forEach(t => dot(t, 3, '#bbb'));
  if (data.objectives.length === 2 && x === cost && y === first) {
    const line = [...data.front].sort((a, b) => a.metrics[x] - b.metrics[x]).map((e, i) =>
      (i ? `H${px(e.metrics[x])}V${py(e.metrics[y])}` :
        `M${px(e.metrics[x])} ${py(e.metrics[y])}`));
    node(svg, 'path', {d: line.join(''), stroke: '#1f77b4', fill: 'none'});
  }
  for (const e of data.front)
    dot(e, e === chosen ? 8 : 5, e === chosen ? '#d62728' : '#1f77b4').onclick = () => choose(e);
}
function drawGrowth() {
  const svg = el('growth'), ys = data.hypervolume, xs = ys.map((_, i) => i + 1);
  const px = scale(xs, 66, 384), py = scale(ys, 354, 26);
  axes(svg, xs, ys, 400, 'trials', "dominated share of the objectives' range");
  const d = ys.map((v, i) => `${i ? 'L' : 'M'}${px(i + 1)} ${py(v)}`).join('');
  node(svg, 'path', {d, stroke: '#1f77b4', fill: 'none'});
}
function table() {
  const sizes = Object.keys(data.front[0].subnetwork), columns = [...metrics, ...sizes];
  const value = (e, c) => c in e.metrics ? e.metrics[c] : e.subnetwork[c];
  const rows = [...data.front].sort((a, b) => sortBy ? value(a, sortBy) - value(b, sortBy) : 0);
  el('table').replaceChildren();
  const head = el('table').insertRow();
  for (const c of ['index', ...columns]) {
    const th = head.appendChild(document.createElement('th'));
    th.textContent = c;
    th.onclick = () => { sortBy = c === 'index' ? null : c; table(); };
  }
  for (const e of rows) {
    const row = el('table').insertRow();
    row.className = e === chosen ? 'chosen' : '';
    row.onclick = () => choose(e);
    row.insertCell().textContent = e.index;
    for (const c of columns) row.insertCell().textContent = number(value(e, c));
  }
}
function choose(entry, flag) {
  chosen = entry;
  el('command').textContent = entry ? `nas export --checkpoint_dir ${data.checkpoint} ` +
    `--front ${data.path} ${flag || '--index ' + entry.index} --out_dir <dir>` : '';
  drawFront(); table();
}
function budget() {
  const metric = el('metric').value, limit = parseFloat(el('budget').value);
  const fit = data.front.filter(e => e.metrics[metric] <= limit);
  const by = data.objectives.find(name => name !== metric);
  const best = fit.sort((a, b) => a.metrics[by] - b.metrics[by])[0] || null;
  el('best').textContent = best ? `index ${best.index}: ${by} ${number(best.metrics[by])}` :
    'none on the front';
  choose(best, best && `--pick "${metric} <= ${limit}"`);
}
options(el('x'), metrics, cost, drawFront);
options(el('y'), metrics, first, drawFront);
options(el('metric'), metrics, cost, budget);
el('log').onchange = drawFront;
el('budget').oninput = budget;
const prices = data.front.map(e => e.metrics[cost]).sort((a, b) => a - b);
el('budget').value = prices[Math.floor(prices.length / 2)];
drawGrowth(); budget();
"""
