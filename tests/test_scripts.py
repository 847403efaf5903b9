"""Scripts parse, and what texts say of them is true."""

import importlib.util
import json
import os
import re
import subprocess
import sys
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


def gpu_bench(*words, **variables):
    """The GPU figures, as on a machine that has none."""
    script = ROOT / "scripts" / "bench" / "gpu.sh"
    hidden = {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "SMOLLM2": "", **variables}
    command = ["bash", script, *map(str, words)]
    return subprocess.run(command, env=os.environ | hidden, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.long
def test_gpu_figures_of_a_small_model_are_complete(bundled, tmp_path):
    out = tmp_path / "gpu.json"
    done = gpu_bench("--small", "--out", out, "--minutes", 60, SMOLLM2=str(bundled))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["skipped"] == []
    assert (found["device"], found["model"]) == ("cpu", "Llama-3.1-8B, small")
    assert 0 < found["step"]["utilisation"] < 2
    assert found["step"]["ratio"] > 0
    rows = {name: row for name, row in found["latency"].items() if name != "took_s"}
    sizes = {name: row["params"] for name, row in rows.items()}
    names = ["90 %", "75 %", "50 %"]
    assert list(sizes) == ["100 %", *names, *(f"{name} per layer" for name in names)]
    for name in names:
        for size in (sizes[name], sizes[f"{name} per layer"]):
            assert size / sizes["100 %"] == pytest.approx(float(name[:2]) / 100, abs=0.06)
    times = ["prefill_2x64_ms", "prefill_1x128_ms", "decode_1_ms", "decode_16_ms"]
    assert all(list(row) == ["params", *times] for row in rows.values())
    assert set(found["unseen"]) == {"step", "evaluation", "took_s"}
    assert found["unseen"]["step"]["unseen_over_seen"] > 0
    assert {"forward_s", "scores_s", "scores_and_orders_s"} < set(found["importance"])
    assert {"in_place_s", "alone_s"} < set(found["evaluation"])
    assert {"prefill", "decode"} < set(found["table"])
    line = ["importance", "search", "finetune", "export", "evaluate"]
    assert [found["smollm2"][name]["status"] for name in line] == [0] * 5
    # A second run without time names what it leaves out, and keeps what was there.
    again = gpu_bench("--small", "--out", out, "--minutes", 0)
    assert again.returncode == 0, again.stderr
    kept = json.loads(out.read_text())
    assert "smollm2: no SMOLLM2=<checkpoint> was given" in kept["skipped"]
    assert {"step", "latency", "evaluation", "unseen", "importance", "table"} < {*kept["skipped"]}
    parts = [name for name in found if isinstance(found[name], dict)]
    assert len(parts) == 7
    assert {name: kept[name] for name in parts} == {name: found[name] for name in parts}
    other = gpu_bench("--small", "--out", out, "--model", "pythia-160m")
    assert other.returncode == 2
    assert "has figures of Llama-3.1-8B, small, these are of pythia-160m, small" in other.stderr
    assert json.loads(out.read_text()) == kept


@pytest.mark.slow
def test_gpu_figures_need_a_gpu(tmp_path):
    for words, sentence in (
        ((), "no CUDA device here; --small"),
        (("--small", "--smollm2", tmp_path / "x"), "is not a directory"),
    ):
        done = gpu_bench("--out", tmp_path / "gpu.json", *words)
        assert done.returncode == 2
        assert sentence in done.stderr
    assert not list(tmp_path.iterdir())


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
