"""Scripts parse, and what texts say of them is true."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.cli.test_main import nas
from whittle_nas.weights.axes import num_params
from whittle_nas.weights.checkpoint import open_checkpoint

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
    """The stages of `demo_smollm2.sh` that its table needs, with one network and no learning."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "scripts" / "demo_smollm2.py")
    assert spec is not None
    assert spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    out, half = tmp_path / "out", {"n_layer": 1, "intermediate_size": 36}
    picks = out / "searched-width" / "picks.yaml"
    picks.parent.mkdir(parents=True)
    picks.write_text(yaml.safe_dump([{"name": "half", **half, "candidates": "somewhere"}]))
    assert demo.timed(out / "times.csv", "sorted", ["true"]) == 0
    assert demo.timed(out / "times.csv", "search", ["false"]) == 1
    demo.collect(out, ["width"])
    assert demo.names(out) == ["width+half"]
    source = ["--checkpoint_dir", checkpoint_dir]
    text = ["--data.files", bundled / "test.jsonl", "--data.block_size", 32]
    assert nas("finetune", *source, "--subnetworks", out / "picks.yaml", *text,
               "--data.valid_fraction", 0.5, "--trainer.max_steps", 1, "--optimizer.lr", 1e-12,
               "--weights", "all", "--out_dir", out / "trained") == 0  # fmt: skip
    (out / "trained" / "width+half").rename(out / "trained" / "half")
    (out / "trained").rename(out / "trained-width")
    load = ["--batch", 1, "--tokens", 16, "--repeats", 1]
    assert nas("profile", *source, "--subnetworks", out / "picks.yaml", *load,
               "--out_dir", out / "profiled") == 0  # fmt: skip
    for name, where in (("", checkpoint_dir), ("-width+half", out / "trained-width" / "half")):
        scored = ["--checkpoint_dir", where, *text, "--data.num_blocks", 2]
        assert nas("evaluate", *scored, "--out_dir", out / f"evaluated{name}") == 0
    head, _, *rows = demo.table(out, checkpoint_dir).splitlines()
    cells = {
        row[0]: row for row in ([c.strip() for c in line.split("|")[1:-1]] for line in rows) if row
    }
    columns = [cell.strip() for cell in head.split("|")[1:-1]]
    by_name = {name: dict(zip(columns, row, strict=False)) for name, row in cells.items()}
    untouched, chosen = by_name["untouched"], by_name["width+half"]
    assert chosen["loss before training"] == chosen["after it"] != ""
    assert {"MB", "text", "prefill ms", "decode ms/token"} < set(columns)
    counts = [int(row["parameters"].replace(",", "")) for row in (chosen, untouched)]
    config = open_checkpoint(out / "trained-width" / "half").config
    assert counts == [num_params(config), num_params(open_checkpoint(checkpoint_dir).config)]
    assert {"sorted", "search (exit 1)"} < set(cells)
    demo.picture(out)
    assert (out / "front.png").stat().st_size > 5_000
