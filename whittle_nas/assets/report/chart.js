'use strict';
// Numbers as text, and the drawing of charts.

const SVG = 'http://www.w3.org/2000/svg';
const DRAWN = new Set(['circle', 'line', 'path', 'rect', 'svg', 'text', 'title']);
const TICK = new Intl.NumberFormat('en', {notation: 'compact', maximumSignificantDigits: 5});

const el = id => document.getElementById(id);
const known = value => typeof value === 'number';

function make(name, attributes = {}, ...children) {
  const made = DRAWN.has(name) ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith('on')) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

// Decimal places for a column: five digits for its largest number, none for whole numbers.
function places(values) {
  const numbers = values.filter(known);
  if (numbers.every(Number.isInteger)) return 0;
  const largest = Math.max(...numbers.map(Math.abs));
  const digits = 4 - Math.floor(Math.log10(largest));
  return Math.max(0, Math.min(largest < 0.01 ? 12 : 4, digits));
}

function text(value, digits) {
  if (!known(value)) return '\u2013';
  if (digits === null) return String(value);
  const options = {minimumFractionDigits: digits, maximumFractionDigits: digits};
  return value.toLocaleString('en', options);
}

// From values to positions between `start` and `end`, with some room; one value is in the middle.
function scale(values, start, end, log) {
  const f = log ? Math.log10 : v => v;
  let low = f(Math.min(...values)), high = f(Math.max(...values));
  const room = 0.05 * (high - low) || 0.05 * Math.abs(high) || 0.5;
  low -= room;
  high += room;
  return {low, high, log, at: v => start + (end - start) * (f(v) - low) / (high - low)};
}

function evenTicks(low, high) {
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(n => n * power >= rough);
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high; n++) found.push(n * step + 0); // never -0
  return found;
}

function ticks({low, high, log}) {
  if (!log) return evenTicks(low, high);
  const found = [];
  for (let power = Math.floor(low); power <= high; power++)
    for (const n of [1, 2, 5]) {
      const exponent = power + Math.log10(n);
      if (low <= exponent && exponent <= high) found.push(n * 10 ** power);
    }
  if (found.length < 3) return evenTicks(10 ** low, 10 ** high);
  return found.length <= 8 ? found : found.filter(v => Number.isInteger(Math.log10(v)));
}

// A box with grid lines and numbers; `width` is that of the view box.
const FRAME = {left: 68, top: 40, bottom: 370, height: 420, right: width => width - 20};

function frame(svg, width, xs, ys, names, logs = []) {
  const {left, top, bottom} = FRAME, right = FRAME.right(width);
  const x = scale(xs, left, right, logs[0]), y = scale(ys, bottom, top, logs[1]);
  svg.replaceChildren();
  for (const tick of ticks(x)) {
    const at = x.at(tick);
    svg.append(make('line', {class: 'grid', x1: at, x2: at, y1: top, y2: bottom}));
    svg.append(make('text', {x: at, y: bottom + 19, 'text-anchor': 'middle'}, TICK.format(tick)));
  }
  for (const tick of ticks(y)) {
    const at = y.at(tick);
    svg.append(make('line', {class: 'grid', x1: left, x2: right, y1: at, y2: at}));
    svg.append(make('text', {x: left - 8, y: at + 4, 'text-anchor': 'end'}, TICK.format(tick)));
  }
  const middle = (left + right) / 2;
  svg.append(
    make('text', {class: 'name', x: middle, y: bottom + 41, 'text-anchor': 'middle'}, names[0]),
    make('text', {class: 'name', x: 12, y: 24}, names[1]),
  );
  return {x, y};
}

// The items that no other one beats in both columns, the cheapest first.
function frontOf(items, x, y) {
  const sign = column => column.lower_is_better ? 1 : -1;
  const cost = item => sign(x) * item.values[x.at], loss = item => sign(y) * item.values[y.at];
  let best = Infinity;
  return [...items].sort((a, b) => cost(a) - cost(b) || loss(a) - loss(b))
    .filter(item => loss(item) < best && (best = loss(item), true));
}
