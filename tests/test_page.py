"""A page must hold its data, need nothing from elsewhere, and its script must run."""

import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest

from whittle_nas.page import Column, Report, Row, export_line, render, size_columns, size_options
from whittle_nas.space import Block, SubNetwork

HOSTILE = "</script><img src=x onerror=alert(1)>&amp;<!--"

# As much of a browser as the script touches.
DOM = """
class Element {
  constructor(name) { Object.assign(this, {name, children: [], attributes: {}, style: {}}); }
  append(...more) { for (const child of more) {
    if (child instanceof Element) this.children = this.children.filter(c => c !== child);
    this.children.push(child); } }
  replaceChildren(...more) { this.children = []; this.append(...more); }
  setAttribute(key, value) {
    if (/NaN|Infinity|undefined/.test(String(value))) throw new Error(`${key}=${value}`);
    this.attributes[key] = String(value); }
  getAttribute(key) { return this.attributes[key]; }
  all() { return this.children.flatMap(c => c instanceof Element ? [c, ...c.all()] : []); }
  querySelectorAll(what) { return this.all().filter(c => what.startsWith('[') ?
    what.slice(1, -1) in c.attributes : c.name === what); }
  querySelector(what) { return this.querySelectorAll(what)[0]; }
  get textContent() { return this.children.map(c => c.textContent ?? c).join(''); }
  set textContent(text) { this.children = [text]; }
}
const byId = {report: new Element('script')};
const document = {
  getElementById: id => byId[id] ??= new Element(id),
  createElement: name => new Element(name), createElementNS: (_, name) => new Element(name),
};
"""


def sample(**changes) -> Report:
    """Three sub-networks, one without a loss; the cheap one is the worst."""
    sizes = [{"n_embd": 16, "n_layer": n} for n in (3, 1, 2)]
    losses = [2.0, None, 3.5]
    rows = [
        Row(
            f"front-{n}",
            {"loss": loss, "num_params": 1200 - 400 * n, **sub},
            {"loss": None if loss is None else 0.25},
            export_line("a b", size_options(sub), f"exported-{n}"),
        )
        for n, (sub, loss) in enumerate(zip(sizes, losses, strict=True))
    ]
    columns = [
        Column("loss", "quality", lower_is_better=True),
        Column("num_params", "costs", lower_is_better=True),
        Column("flops", "costs", lower_is_better=True, extra=True),
        *size_columns(sizes[0]),
    ]
    whole = Row("original model", {"loss": 1.9, "num_params": 1500, "n_embd": 16, "n_layer": 4})
    parts = {"title": "t", "summary": "s", "columns": columns, "rows": rows, "original": whole}
    return Report(**{**parts, "x": "num_params", "y": "loss", "growth": [0.0, 0.5], **changes})


def run(report: Report, actions: str) -> list[str]:
    """Lines that the actions print after the page's script ran."""
    page = render(report)
    data = re.search(r'<script type="application/json" id="report">(.*?)</script>', page, re.S)
    script = page.split("<script>")[1].split("</script>")[0]
    assert data
    text = f"byId.report.textContent = {json.dumps(data[1])};"
    command = ["node", "-e", DOM + text + script + actions]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


SHAPES = "byId.table.querySelectorAll('rect').map(r => r.attributes.class).join(' | ')"


needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs node for the script")
ROWS = "console.log(byId.table.querySelectorAll('tr').slice(2).map(r => r.textContent).join('|'));"


def test_page_needs_nothing_from_elsewhere():
    page = render(sample())
    elsewhere = r"(src|href)\s*=|@import|url\((?!#)|https?://(?!www\.w3\.org/2000/svg)"
    assert not re.search(elsewhere, page)
    assert "default-src 'none'" in page


def test_names_stay_text():
    row = Row(HOSTILE, {"loss": 1.0, "num_params": 1})
    columns = [*sample().columns, Column(HOSTILE, HOSTILE, HOSTILE)]
    texts = {"title": HOSTILE, "summary": HOSTILE, "details": {HOSTILE: HOSTILE}}
    page = render(sample(rows=[row], columns=columns, numbers=HOSTILE, named=HOSTILE, **texts))
    assert "<img" not in page
    assert page.count("</script>") == 2
    assert "<!--" not in page


def test_numbers_that_are_none_are_left_out():
    page = render(sample(rows=[Row("a", {"loss": float("nan"), "num_params": float("inf")})]))
    assert '"values":[null,null,null,null,null]' in page


def test_export_line_is_quoted_for_a_shell():
    line = export_line("a b; rm x", ["--index", "1"], "out")
    assert line == "nas export --checkpoint_dir 'a b; rm x' --index 1 --out_dir out"


@needs_node
def test_script_draws_chooses_and_sorts():
    lines = run(
        sample(),
        """
        const circles = () => byId.points.querySelectorAll('circle');
        console.log(circles().length, byId.points.querySelectorAll('path').length);
        console.log(byId.best.textContent, '|', byId.command.textContent);
        ROWS
        const press = at => byId.table.querySelectorAll('[data-column]')[at].children[0].onclick();
        press(1); ROWS press(1); ROWS
        byId.points.querySelectorAll('circle')[0].onmouseenter();
        console.log(byId.tip.hidden, byId.tip.textContent);
        circles()[0].onclick();
        console.log(byId.command.textContent);
        byId['log-x'].checked = byId['log-y'].checked = true;
        byId['log-x'].onchange();
        console.log(circles().length);
        """.replace("ROWS", ROWS),
    )
    assert lines[0] == "2 2"  # one has no loss; the front and the star
    assert lines[1].startswith("front-2: loss 3.5000 ± 0.2500 | nas export --checkpoint_dir 'a b'")
    order = [re.findall(r"front-\d", line) for line in lines[2:5]]
    assert order[0] == ["front-0", "front-1", "front-2"]
    assert order[1] == ["front-0", "front-2", "front-1"]  # the unknown loss is last
    assert order[2] == ["front-2", "front-0", "front-1"]
    assert "1,200" in lines[2]
    assert "–" in lines[2]
    assert lines[5] == "false front-0n_embd16n_layer3loss2.0000 ± 0.2500num_params1,200"
    assert lines[6].endswith("--subnetwork.n_layer 3 --out_dir exported-0")
    assert lines[7] == "2"


@needs_node
def test_extra_columns_are_shown_on_demand():
    lines = run(
        sample(),
        """
        const heads = () => byId.table.querySelectorAll('[data-column]').map(h => h.textContent);
        console.log(heads().join());
        byId.all.checked = true; byId.all.onchange();
        console.log(heads().join());
        """,
    )
    assert lines == [
        "sub-network,loss,num_params,n_embd,n_layer",
        "sub-network,loss,num_params,flops,n_embd,n_layer",
    ]


@needs_node
@pytest.mark.parametrize(
    "rows",
    [
        [],
        [Row("only", {"loss": 1.5, "num_params": 7})],
        [Row("a", {"num_params": 0}), Row("b", {"num_params": 0})],
        [Row("a", {"loss": -1e-9, "num_params": 1e12}), Row("b", {"loss": 0.0, "num_params": 2})],
    ],
    ids=["none", "one", "no loss", "extremes"],
)
def test_odd_reports_are_drawn(rows):
    toggles = "byId['log-x'].checked = byId['log-y'].checked = true; byId['log-x'].onchange();"
    report = sample(rows=rows, growth=())
    assert run(report, toggles + "console.log(byId['growth-chart'].hidden);") == ["true"]


@needs_node
def test_ticks_are_round():
    cases = "[[0, 1], [2.98, 6.3], [254400, 1148544], [-3, 4]]"
    lines = run(
        sample(),
        f"""
        for (const [low, high] of {cases})
          console.log(evenTicks(low, high).map(TICK.format).join());
        console.log(ticks({{low: 3, high: 6, log: true}}).map(TICK.format).join());
        console.log([places([1, null]), places([2.5]), places([55.25]), places([4e-5])].join());
        """,
    )
    assert lines == [
        "0,0.2,0.4,0.6,0.8,1", "3,4,5,6", "400K,600K,800K,1M", "-2,0,2,4",
        "1K,10K,100K,1M", "0,4,3,9",
    ]  # fmt: skip


@needs_node
def test_a_row_shows_what_it_keeps_of_every_layer():
    whole = SubNetwork(8, (Block(4, 2, 8, 30),) * 3)
    sub = SubNetwork(8, (Block(4, 2, 8, 15), None, Block(0, 0, 0, 30)))
    assert sub.shares(whole) == [(1, 0.5), (0, 0), (0, 1)]
    report = sample()
    rows = [replace(row, shape=sub.shares(whole)) for row in report.rows[:1]]
    (shown,) = run(replace(report, rows=rows), f"console.log({SHAPES});")
    assert shown == "heads original | neurons | neurons original"
    assert run(report, f"console.log({SHAPES});") == [""]
