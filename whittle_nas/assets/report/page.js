// What the page shows and what its controls do.

const report = JSON.parse(el('report').textContent);
report.columns.forEach((column, at) => { column.at = at; });
const originals = report.original ? [report.original] : [];
const everything = report.rows.concat(report.others, originals);
// Sizes are shown as options take them, without separators.
const digits = report.columns.map(({at, group}) =>
  group === report.sizes ? null : places(everything.map(item => item.values[at])));
const sizes = report.columns.filter(column => column.group === report.sizes);
const state = {sortedBy: -1, falling: false, chosen: null};
const drawn = {points: new Map(), stars: new Map(), rows: new Map(), headings: []};

const axis = id => report.columns[Number(el(id).value)];
const show = (item, {at}) => text(item.values[at], digits[at]) +
  (known(item.stderrs[at]) ? ` \u00b1 ${text(item.stderrs[at], digits[at])}` : '');

function fillMenu(id, value) {
  const select = el(id);
  for (const group of new Set(report.columns.map(column => column.group))) {
    const within = report.columns.filter(column => column.group === group);
    const options = within.map(({at, words}) => make('option', {value: at}, words));
    select.append(make('optgroup', {label: group}, ...options));
  }
  select.value = String(report.columns.findIndex(column => column.name === value));
  select.onchange = () => { proposeLimit(); drawPoints(); };
}

function drawPoints() {
  const x = axis('x'), y = axis('y'), logs = [el('log-x').checked, el('log-y').checked];
  const fits = (value, log) => known(value) && (!log || value > 0);
  const visible = items => items.filter(item =>
    fits(item.values[x.at], logs[0]) && fits(item.values[y.at], logs[1]));
  const others = visible(report.others), rows = visible(report.rows);
  const stars = visible(originals), all = others.concat(rows, stars);
  const svg = el('points');
  drawn.points.clear();
  drawn.stars.clear();
  svg.replaceChildren();
  svg.setAttribute('aria-label', `${y.words} against ${x.words}; the table holds the same numbers`);
  if (!all.length) return;
  const better = {true: ', lower is better', false: ', higher is better'}[y.lower_is_better] || '';
  const across = all.map(item => item.values[x.at]);
  const up = all.flatMap(item => [item.values[y.at], ...errorEnds(item, y)])
    .filter(value => fits(value, logs[1]));
  const scales = frame(svg, 720, across, up, [x.words, y.words + better], logs);
  const place = item => [scales.x.at(item.values[x.at]), scales.y.at(item.values[y.at])];
  if (x.lower_is_better !== null && y.lower_is_better !== null)
    drawStairs(svg, frontOf(rows, x, y).map(place));
  const limit = readLimit();
  if (known(limit)) drawLimit(svg, scales.x.at(limit));
  for (const item of rows) drawError(svg, place(item)[0], errorEnds(item, y), scales.y);
  for (const item of others) drawPoint(svg, item, place(item), 3.5);
  for (const item of rows) drawPoint(svg, item, place(item), 5.5);
  for (const item of stars) drawStar(svg, item, place(item));
  mark();
}

function drawStairs(svg, points) {
  const d = points.map(([x, y], at) => at ? `H${x}V${y}` : `M${x} ${y}`).join('');
  svg.append(make('path', {class: 'stairs', d}));
}

function drawLimit(svg, x) {
  if (x < FRAME.left || x > FRAME.right(720)) return;
  svg.append(make('line', {class: 'limit', x1: x, x2: x, y1: FRAME.top, y2: FRAME.bottom}));
}

function errorEnds({values, stderrs}, {at}) {
  return known(stderrs[at]) ? [values[at] - stderrs[at], values[at] + stderrs[at]] : [];
}

function drawError(svg, x, ends, scale) {
  if (!ends.length) return;
  // On a logarithmic axis an end below zero is off the chart.
  const [y1, y2] = ends.map(v => scale.log && v <= 0 ? FRAME.bottom : scale.at(v));
  svg.append(make('line', {class: 'error', x1: x, x2: x, y1, y2}));
}

function drawPoint(svg, item, [cx, cy], r) {
  const point = make('circle', {cx, cy, r, onmouseenter: () => near(item),
    onmouseleave: () => near(null), onclick: () => choose(item)});
  drawn.points.set(item, point);
  svg.append(point);
}

// Ten corners, every other one further in.
function drawStar(svg, item, [x, y]) {
  const corners = Array.from({length: 10}, (_, n) => {
    const r = n % 2 ? 4.5 : 11, angle = Math.PI * (n / 5 - 0.5);
    return `${x + r * Math.cos(angle)} ${y + r * Math.sin(angle)}`;
  });
  const star = make('path', {class: 'star', d: `M${corners.join('L')}Z`, cx: x, cy: y,
    onmouseenter: () => near(item), onmouseleave: () => near(null)});
  drawn.stars.set(item, star);
  svg.append(star);
}

// Shows which sub-network is chosen, and which one the mouse points at in the chart or the table.
function mark(pointed) {
  const kinds = item => (item === state.chosen ? ' chosen' : '') + (item === pointed ? ' near' : '');
  for (const [item, point] of drawn.points)
    point.setAttribute('class', (drawn.rows.has(item) ? 'point' : 'point other') + kinds(item));
  for (const [item, {row, button}] of drawn.rows) {
    row.setAttribute('class', kinds(item).trim());
    button.setAttribute('aria-pressed', String(item === state.chosen));
  }
}

// The box with sizes and numbers beside a point.
function near(item) {
  const tip = el('tip');
  const point = item && (drawn.points.get(item) || drawn.stars.get(item));
  tip.hidden = !point;
  mark(item);
  if (!point) return;
  const shown = [...sizes, ...report.columns.filter(c => !sizes.includes(c) && !c.extra)];
  const pairs = shown.filter(({at}) => known(item.values[at]))
    .flatMap(c => [make('span', {}, c.name), make('span', {}, show(item, c))]);
  tip.replaceChildren(make('strong', {}, item.label), make('div', {}, ...pairs));
  const x = point.getAttribute('cx') / 720, y = point.getAttribute('cy') / FRAME.height;
  tip.style.left = `${100 * x}%`;
  tip.style.top = `${100 * y * el('points').clientHeight / el('main-chart').clientHeight}%`;
  const across = x > 0.5 ? 'calc(-100% - 14px)' : '14px';
  tip.style.transform = `translate(${across}, ${y > 0.5 ? '-100%' : '0'})`;
}

function choose(item) {
  state.chosen = item;
  el('name').textContent = item.label;
  el('sizes').textContent = sizes.map(c => `${c.name} ${show(item, c)}`).join(', ');
  // One element per word: lines break between words, not after the hyphens of an option.
  const words = item.command.split(' ').flatMap(word => [make('span', {}, word), ' ']);
  el('command').replaceChildren(...words.slice(0, -1));
  el('copy').textContent = 'Copy';
  el('shape').replaceChildren(...(item.shape.length ? [shapeOf(item, 44)] : []));
  mark();
}

function buildTable() {
  const columns = shownColumns(report, el('all').checked);
  const head = headerOf(columns, sortBy, report.rows.some(item => item.shape.length));
  drawn.headings = head.querySelectorAll('[data-column]');
  drawn.rows.clear();
  for (const item of report.rows) {
    const row = rowOf(item, columns, digits, {choose, near: mark});
    drawn.rows.set(item, {row, button: row.querySelector('button')});
  }
  drawn.body = make('tbody');
  el('table').replaceChildren(head, drawn.body);
  order();
  mark();
}

function sortBy(at) {
  state.falling = state.sortedBy === at && !state.falling;
  state.sortedBy = at;
  order();
}

function order() {
  const items = inOrder(report.rows, state.sortedBy, state.falling);
  drawn.body.append(...items.map(item => drawn.rows.get(item).row));
  for (const heading of drawn.headings) {
    const sorted = Number(heading.getAttribute('data-column')) === state.sortedBy;
    const value = !sorted ? 'none' : state.falling ? 'descending' : 'ascending';
    heading.setAttribute('aria-sort', value);
  }
}

// The best in the column of the chart's height, of those that cost no more than the limit.
function readLimit() {
  const value = parseFloat(el('limit').value.replaceAll(',', ''));
  return el('budget').hidden || !Number.isFinite(value) ? null : value;
}

function proposeLimit() {
  const x = axis('x'), y = axis('y');
  const usable = x.lower_is_better === true && y.lower_is_better !== null && x !== y;
  el('budget').hidden = el('best').hidden = !usable;
  if (!usable) return;
  const costs = report.rows.map(item => item.values[x.at]).filter(known).sort((a, b) => a - b);
  const middle = costs[Math.floor(costs.length / 2)];
  // Rounded up, so that the sub-network itself stays within the limit.
  const unit = 10 ** -digits[x.at];
  el('limit').value = known(middle) ? text(Math.ceil(middle / unit) * unit, digits[x.at]) : '';
  el('budget-cost').textContent = x.words;
  chooseBest();
}

function chooseBest() {
  const x = axis('x'), y = axis('y'), limit = readLimit(), sign = y.lower_is_better ? 1 : -1;
  if (!known(limit)) return el('best').textContent = '';
  const best = report.rows.filter(({values}) => known(values[y.at]) && known(values[x.at]) &&
    values[x.at] <= limit).sort((a, b) => sign * (a.values[y.at] - b.values[y.at]))[0];
  el('best').textContent = best ? `${best.label}: ${y.name} ${show(best, y)}` : 'none';
  if (best) choose(best);
}

// A page opened as a file may lack the clipboard, so the selection is copied as in older browsers.
async function copyCommand() {
  try {
    await navigator.clipboard.writeText(state.chosen.command);
  } catch {
    const area = make('textarea', {'aria-hidden': 'true'});
    area.value = state.chosen.command;
    document.body.append(area);
    area.select();
    document.execCommand('copy');
    area.remove();
  }
  el('copy').textContent = 'Copied';
}

function drawGrowth() {
  const values = report.growth, numbers = values.map((_, at) => at + 1);
  el('growth-chart').hidden = !values.length;
  if (!values.length) return;
  const svg = el('growth');
  svg.setAttribute('aria-label', 'how the front grew during the search');
  const {x, y} = frame(svg, 360, numbers, values, ['trials', 'dominated share of the range']);
  const d = values.map((value, at) => `${at ? 'L' : 'M'}${x.at(at + 1)} ${y.at(value)}`).join('');
  svg.append(make('path', {class: 'stairs', d}));
}

function drawLegend() {
  const words = [['', report.names.rows], ['chosen', 'chosen']];
  if (report.others.length) words.splice(1, 0, ['other', report.names.others]);
  if (originals.length) words.push(['original', report.original.label]);
  el('legend').append(...words.map(([kind, word]) => make('span', {class: kind}, word)));
}

fillMenu('x', report.x);
fillMenu('y', report.y);
el('log-x').onchange = el('log-y').onchange = drawPoints;
el('limit').oninput = () => { chooseBest(); drawPoints(); };
el('controls').onsubmit = event => event.preventDefault();
el('all').onchange = buildTable;
el('all-columns').hidden = !report.columns.some(column => column.extra);
el('copy').onclick = copyCommand;
drawLegend();
drawGrowth();
buildTable();
el('chosen').hidden = !report.rows.length;
if (report.rows.length) choose(report.rows[0]);
proposeLimit();
drawPoints();
