// What a network keeps of every layer: heads above the line, neurons below, hatched where all.

function shapeOf(item, height) {
  const layers = item.shape, half = height / 2, step = Math.max(2, Math.min(8, 240 / layers.length));
  const width = step * layers.length, gap = step > 3 ? 1 : 0.5;
  const said = layers.map(([heads, neurons], at) =>
    `layer ${at}: ${percent(heads)} of the heads, ${percent(neurons)} of the neurons`);
  const svg = make('svg', {class: 'shape', viewBox: `0 0 ${width} ${height}`, width, height,
    role: 'img', 'aria-label': `what ${item.label} keeps of every layer`},
  make('title', {}, said.join('\n')));
  layers.forEach(([heads, neurons], at) => {
    const bar = (kind, share, y) => share > 0 && svg.append(make('rect', {
      class: kind + (share === 1 ? ' original' : ''), x: at * step, y, width: step - gap,
      height: share * (half - 1)}));
    bar('heads', heads, half - 0.5 - heads * (half - 1));
    bar('neurons', neurons, half + 0.5);
  });
  svg.append(make('line', {class: 'grid', x1: 0, x2: width, y1: half, y2: half}));
  return svg;
}

function percent(share) {
  return `${Math.round(100 * share)} %`;
}
