// The table: built once per choice of columns, then only put in another order.

function shownColumns(report, all) {
  return report.columns.filter(column => all || !column.extra);
}

function groupsOf(columns) {
  const groups = [];
  for (const column of columns) {
    const last = groups[groups.length - 1];
    if (last && last.name === column.group) last.size += 1;
    else groups.push({name: column.group, size: 1});
  }
  return groups;
}

function headerOf(columns, sort, shapes) {
  const first = [make('td', {class: 'group'})];
  for (const {name, size} of groupsOf(columns))
    first.push(make('th', {class: 'group begins', colspan: size, scope: 'colgroup'}, name));
  const second = [heading('sub-network', {at: -1, name: 'order of the list'}, sort)];
  columns.forEach((column, at) => {
    const begins = at === 0 || columns[at - 1].group !== column.group;
    second.push(heading(column.label, column, sort, begins ? 'begins' : ''));
  });
  if (shapes) {
    first.push(make('th', {class: 'group begins', scope: 'colgroup'}, 'shape'));
    second.push(make('th', {scope: 'col', class: 'begins'}, 'heads up, neurons down'));
  }
  return make('thead', {}, make('tr', {}, ...first), make('tr', {}, ...second));
}

function heading(label, column, sort, kind = '') {
  const better = {true: ', lower is better', false: ', higher is better'}[column.lower_is_better];
  // A long name may break after an underscore where there is little room, as on paper.
  const parts = label.split(/(?<=_)/).flatMap((part, at) => at ? [make('wbr'), part] : [part]);
  const button = make('button', {type: 'button', onclick: () => sort(column.at)}, ...parts);
  const title = `sort by ${column.name}${better || ''}`;
  return make('th', {scope: 'col', class: kind, title, 'data-column': column.at}, button);
}

function rowOf(item, columns, digits, on) {
  const button = make('button', {type: 'button', 'aria-pressed': 'false'}, item.label);
  const cells = columns.map((column, at) => {
    const begins = at === 0 || columns[at - 1].group !== column.group;
    const value = text(item.values[column.at], digits[column.at]);
    const cell = make('td', {class: begins ? 'begins' : ''}, value);
    const stderr = item.stderrs[column.at];
    if (known(stderr))
      cell.append(make('span', {class: 'stderr'}, ` \u00b1\u00a0${text(stderr, digits[column.at])}`));
    return cell;
  });
  if (item.shape.length) cells.push(make('td', {class: 'begins'}, shapeOf(item, 22)));
  const moves = {onclick: () => on.choose(item), onmouseenter: () => on.near(item),
    onmouseleave: () => on.near(null), onkeydown: moveFocus};
  return make('tr', moves, make('th', {scope: 'row'}, button), ...cells);
}

function moveFocus(event) {
  const row = event.currentTarget;
  const next = {ArrowDown: row.nextElementSibling, ArrowUp: row.previousElementSibling}[event.key];
  if (!next) return;
  event.preventDefault();
  next.querySelector('button').focus();
}

// Unknown numbers stay last in both directions.
function inOrder(items, at, falling) {
  if (at < 0) return falling ? [...items].reverse() : [...items];
  const value = item => item.values[at];
  return [...items].sort((a, b) => known(value(b)) - known(value(a)) ||
    (known(value(a)) ? (value(a) - value(b)) * (falling ? -1 : 1) : 0));
}
