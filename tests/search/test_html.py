"""The page must hold its data, need nothing from elsewhere, and its script must run."""

import re
import shutil
import subprocess

import pytest

from whittle_nas.search.html import render
from whittle_nas.search.trials import Status, Trial
from whittle_nas.space import SubNetwork
from whittle_nas.space.front import Front, FrontEntry

# As much of a browser as the script touches; prints what was drawn.
DOM = """
const made = [];
const element = name => { const e = {name, children: [], attributes: {}, options: [], value: '',
  checked: false, setAttribute(k, v) { if (String(v).includes('NaN')) throw k + v;
    this.attributes[k] = v; }, appendChild(c) { this.children.push(c); return c; },
  replaceChildren() { this.children = []; },
  insertRow() { return this.appendChild(element('tr')); },
  insertCell() { return this.appendChild(element('td')); },
  add(o) { this.options.push(o); if (o.chosen) this.value = o.value; } };
  made.push(e); return e; };
const byId = {};
const document = { getElementById: id => byId[id] ??= element(id), createElement: element,
  createElementNS: (_, name) => element(name) };
function Option(text, value, _, chosen) { Object.assign(this, {text, value, chosen}); }
"""
REPORT = """
const circles = byId.front.children.filter(c => c.name === 'circle').length;
console.log(circles, byId.table.children.length, byId.best.textContent, '|',
  byId.command.textContent);
byId.table.children[2].onclick(); byId.table.children[0].children[1].onclick();
byId.log.checked = true; byId.log.onchange();
console.log(byId.command.textContent);
"""


@pytest.fixture
def page():
    trials = [
        Trial(n, SubNetwork(8 + n, 1, 1, 8, 8, 2), Status.complete,
              {"val_loss": 4.0 - n, "num_params": 100 + 10 * n})
        for n in range(3)
    ]  # fmt: skip
    trials.append(Trial(3, SubNetwork(9, 1, 1, 8, 8, 1), Status.failed, {"num_params": 5}))
    entries = tuple(FrontEntry(n, t.sub, (0, 1), t.metrics) for n, t in enumerate(trials[:3]))
    front = Front(("val_loss", "num_params"), entries, "a</script>b", {"seed": 1})
    return render(front, trials, [0.0, 0.5, 0.6, 0.6], "out/front.json")


def test_page_is_self_contained(page):
    assert not re.search(r"(src|href)\s*=|@import|url\(|https?://(?!www\.w3\.org/2000/svg)", page)
    assert page.count("</script>") == 1
    assert "$" not in re.sub(r"\$\{", "", page)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to run the script")
def test_script_runs(page):
    script = page.split("<script>")[1].split("</script>")[0]
    done = subprocess.run(["node", "-e", DOM + script + REPORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    # Three trials with a loss and three members of the front; a header and three rows.
    assert first.startswith("6 4 index 1: val_loss 3 | nas export --checkpoint_dir a</script>b")
    assert '--pick "num_params <= 110"' in first
    assert "--index 1 " in second
