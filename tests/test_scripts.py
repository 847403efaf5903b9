"""Scripts parse, and what texts say of them is true."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.cli.test_main import nas

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"\bscripts/[\w/.-]*\w\.(?:sh|py)\b")


@pytest.mark.parametrize("path", sorted(ROOT.glob("scripts/**/*.sh")), ids=lambda path: path.stem)
def test_shell_scripts_parse(path):
    subprocess.run(["bash", "-n", path], check=True)


def test_every_script_that_a_text_names_is_there():
    texts = [
        path
        for pattern in ("*.md", "docs/**/*.md", "scripts/**/*", "whittle_nas/**/*.py")
        for path in ROOT.glob(pattern)
        if path.is_file() and path.suffix in (".md", ".sh", ".py")
    ]
    named = {(name, path) for path in texts for name in NAMED.findall(path.read_text("utf-8"))}
    assert named
    assert not {(name, str(path)) for name, path in named if not (ROOT / name).is_file()}


@pytest.mark.slow
def test_the_demos_table_reads_what_the_commands_write(checkpoint_dir, bundled, tmp_path):
    """The stages of `demo_smollm2.sh` that its table needs, with one network and no training."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "scripts" / "demo_smollm2.py")
    assert spec is not None
    assert spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    out, picks = tmp_path / "out", tmp_path / "picks.yaml"
    picks.write_text(yaml.safe_dump([{"name": "half", "n_layer": 1, "intermediate_size": 36}]))
    out.mkdir()
    assert demo.timed(out / "times.csv", "sorted", ["true"]) == 0
    assert demo.timed(out / "times.csv", "search", ["false"]) == 1
    shutil.copytree(checkpoint_dir, out / "supernet")
    shared = ["--checkpoint_dir", out / "supernet", "--subnetworks", picks]
    text = ["--data.files", bundled / "test.jsonl", "--data.block_size", 32, "--data.num_blocks", 2]
    assert nas("evaluate", *shared, "--include_full", "true", *text,
               "--out_dir", out / "evaluated-shared") == 0  # fmt: skip
    load = ["--batch", 1, "--tokens", 16, "--repeats", 1]
    assert nas("profile", *shared, *load, "--out_dir", out / "profiled") == 0
    sizes = ["--subnetwork.n_layer", 1, "--subnetwork.intermediate_size", 36]
    alone = out / "litgpt-half"
    assert nas("export", "--checkpoint_dir", checkpoint_dir, *sizes, "--out_dir", alone) == 0
    for name, source in (("evaluated", checkpoint_dir), ("evaluated-half", alone)):
        where = ["--checkpoint_dir", source, "--out_dir", out / name]
        assert nas("evaluate", *where, *text) == 0
    head, _, *rows = demo.table(out, checkpoint_dir, ["half"]).splitlines()
    cells = {
        row[0]: row for row in ([c.strip() for c in line.split("|")[1:-1]] for line in rows) if row
    }
    columns = [cell.strip() for cell in head.split("|")[1:-1]]
    assert {"parameters", "MB", "prefill ms", "decode ms/token"} < set(columns)
    by_name = {name: dict(zip(columns, row, strict=False)) for name, row in cells.items()}
    untouched, half = by_name["untouched"], by_name["half, shared"]
    scores = [name for name in columns if name not in ("network", "parameters", "MB")]
    assert [untouched[name] for name in scores[:-2]] == [
        by_name["trained, whole"][name] for name in scores[:-2]
    ]  # nothing was trained
    assert [half[name] for name in scores[:-2]] == [
        by_name["half, trained alone"][name] for name in scores[:-2]
    ]
    assert int(half["parameters"].replace(",", "")) < int(untouched["parameters"].replace(",", ""))
    assert {"sorted", "search (exit 1)"} < set(cells)
