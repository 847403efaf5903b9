"""`--device` with several names: the same files and texts as with one."""

import csv
import gc
import json
import weakref
from typing import Any

import pytest
import torch
from litgpt import GPT, Config

from tests.cli.test_dry_run import plan
from tests.cli.test_main import nas
from tests.conftest import tiny_config
from whittle_nas.cli import importance_report
from whittle_nas.metrics.plan import placed_memory, placed_rate
from whittle_nas.weights import checkpoint
from whittle_nas.weights.checkpoint import load_supernet
from whittle_nas.weights.placement import home_of, place

TWO = ["--device", "cpu,cpu"]


@pytest.fixture
def text(bundled):
    return [
        "--data.files", bundled / "valid.jsonl", "--data.block_size", 32, "--data.num_blocks", 8,
    ]  # fmt: skip


def said(capsys, *words):
    assert nas(*words) == 0
    return capsys.readouterr().out


def test_networks_are_evaluated_and_continue_a_prompt(checkpoint_dir, text, tmp_path, capsys):
    source = ["--checkpoint_dir", checkpoint_dir, "--subnetwork.n_embd", 32]
    prompt = ["--prompt", "def f(x):", "--temperature", 0, "--max_new_tokens", 8]
    one, two = (said(capsys, "generate", *source, *prompt, *where) for where in ([], TWO))
    assert one == two
    scores = []
    for name, where in (("one", []), ("two", [*TWO, "--latency", "true"])):
        out_dir = tmp_path / name
        said(capsys, "evaluate", *source, *text, "--out_dir", out_dir, *where)
        with (out_dir / "results.csv").open() as file:
            row = next(csv.DictReader(file))
        scores.append({key: row[key] for key in row if key not in ("latency_ms", "seconds")})
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_a_search_finds_the_same_front(checkpoint_dir, text, tmp_path, capsys):
    fronts = []
    for name, where in (("one", []), ("two", TWO)):
        source = ["--checkpoint_dir", checkpoint_dir, "--out_dir", tmp_path / name, *text]
        words = [*source, "--objectives", "val_loss,num_params", "--num_trials", 6]
        words += ["--time_front", "false"]
        said(capsys, "search", *words, *where)
        fronts.append(json.loads((tmp_path / name / "front.json").read_text()))
    assert fronts[1]["how_measured"].pop("device") == "cpu,cpu"
    del fronts[0]["how_measured"]["device"]
    assert fronts[0] == fronts[1]


@pytest.mark.slow
def test_sorted_and_repaired_checkpoints_are_the_same(checkpoint_dir, text, tmp_path, capsys):
    source, ids = ["--checkpoint_dir", checkpoint_dir, *text], torch.arange(20)[None]
    repair = ["--subnetwork.n_embd", 32, "--repair", "true"]
    for command, words in (("importance", []), ("export", repair)):
        logits = []
        for name, where in (("one", []), ("two", TWO)):
            out_dir = tmp_path / f"{command} {name}"
            said(capsys, command, *source, *words, "--out_dir", out_dir, *where)
            logits.append(load_supernet(out_dir).model(ids))
        assert torch.equal(*logits)


@pytest.mark.slow
def test_sorting_with_a_report_holds_one_model_at_a_time(
    checkpoint_dir, text, tmp_path, capsys, monkeypatch
):
    models, shared_out = [], []

    def placed(model, device, dtype=None):
        assert {one() for one in models} <= {None}
        models.append(weakref.ref(model))
        shared_out.append(len(device))
        return place(model, device, dtype)

    for module in (checkpoint, importance_report):
        monkeypatch.setattr(module, "place", placed, raising=False)
    report = ["--report.num_subnetworks", 2, "--report.data.files", text[1], "--basis", "rotation"]
    report += ["--data.num_blocks", 20, "--report.repair", "true"]
    words = ["--checkpoint_dir", checkpoint_dir, *text, "--out_dir", tmp_path / "out", *report]
    gc.disable()
    try:
        shown = said(capsys, "importance", *words, *TWO)
    finally:
        gc.enable()
    assert "permuted" in shown
    assert len(models) == 5  # unsorted; sorted for layers, the sweep, the report; permuted
    assert set(shared_out) == {2}


def test_training_after_a_search_and_pruning_need_one_device(
    checkpoint_dir, text, tmp_path, capsys
):
    source = ["--checkpoint_dir", checkpoint_dir, "--out_dir", tmp_path / "out", *text]
    recovery = ["--recovery.budget", "num_params <= 90%", "--recovery.data.files", text[1]]
    for command, words, wanted in (
        ("search", ["--objectives", "val_loss,latency_ms"], "latency_ms comes from times"),
        ("search", recovery, "--recovery.budget trains on one device"),
        ("prune", ["--method", "magnitude", "--sparsity", 0.5], "this command runs on one device"),
    ):
        refused = []
        for more in ([], ["--dry_run", "true"]):
            assert nas(command, *source, *words, *TWO, *more) == 2
            refused.append(capsys.readouterr().err)
        assert refused[0] == refused[1]  # a plan is refused as its run is
        assert refused[0].startswith("nas: --device cpu,cpu: ")
        assert wanted in refused[0]
    for more in ([], ["--dry_run", "true"]):
        assert nas("evaluate", *source, "--devices", 2, *TWO, *more) == 2
        assert "--devices 2 gives each process one device" in capsys.readouterr().err


def test_a_plan_says_what_each_device_holds(bundled, text, capsys):
    source = ["--checkpoint_dir", bundled, "--out_dir", "out", *text, "--dry_run", "true"]
    shown = said(capsys, "evaluate", *source, "--device", "cpu,cpu")
    assert "memory of the devices that hold one model" in shown
    assert "fits: cpu of this machine" in shown


def test_what_a_pass_takes_along_is_on_every_device(bundled, text):
    """Sums are of inputs of the blocks, which are on all devices; covariances are on the first."""
    source = ["--checkpoint_dir", bundled, "--out_dir", "out", *text, "--dry_run", "true"]
    devices = (torch.device("cpu"), torch.device("meta"))
    repair = ["--repair", "true", "--subnetwork.n_embd", 32]
    for command, words, shared in (
        ("export", repair, {"streams", "normal equations"}),
        ("candidates", [], {"sums of products"}),
        ("importance", [], set()),
    ):
        found = plan(command, *source, *words)
        first, second = placed_memory(found.config, found.memory, devices).values()
        assert set(second) == {"weights", "activations"} | shared
        assert all(second[what] == found.memory[what] for what in shared)
        assert set(first) == set(found.memory)


def test_devices_take_turns_each_at_its_own_rate():
    config, devices = tiny_config("Llama-3.1-8B"), (torch.device("cpu"), torch.device("meta"))
    model: Any = place(GPT(config), devices)
    rates = {devices[0]: 2e9, devices[1]: 6e9}
    blocks = list(model.transformer.h)
    first = [b for b in blocks if home_of(b) == devices[0]]
    assert 0 < len(first) < len(blocks)
    fast, slow = entries(blocks[len(first) :]), entries([*first, model.lm_head])
    expected = (fast + slow) / (fast / 6e9 + slow / 2e9)
    assert placed_rate(config, devices, rates) == pytest.approx(expected, rel=1e-3)
    assert placed_rate(config, devices[:1], rates) == pytest.approx(2e9)


def entries(modules) -> int:
    """Of the matrices of some modules."""
    parts = [part for module in modules for part in module.modules()]
    return sum(part.weight.numel() for part in parts if isinstance(part, torch.nn.Linear))


def test_bytes_of_each_device_are_those_of_its_tensors():
    config, devices = Config.from_name("pythia-160m"), (torch.device("cpu"), torch.device("meta"))
    memory = {"weights": 10**9, "activations": 10, "logits": 7}
    found = placed_memory(config, memory, devices)
    assert sum(parts["weights"] for parts in found.values()) == pytest.approx(10**9, abs=2)
    assert {d: set(parts) for d, parts in found.items()} == {
        devices[0]: {"weights", "activations", "logits"},
        devices[1]: {"weights", "activations"},
    }
    with torch.device("meta"):
        model: Any = GPT(config)
    sizes = [sum(p.numel() for p in block.parameters()) for block in model.transformer.h]
    total = sum(p.numel() for p in model.parameters())
    blocks = round(found[devices[1]]["weights"] / 1e9 * total / sizes[0])
    assert found[devices[1]]["weights"] == pytest.approx(blocks * sizes[0] / total * 1e9, rel=1e-6)
    assert max(parts["weights"] for parts in found.values()) < 10**9 * (0.5 + sizes[0] / total)
