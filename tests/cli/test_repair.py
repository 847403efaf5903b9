"""`--repair true` in export, search and evaluate."""

import csv
import json
import shlex

import pytest
import torch

from tests.cli.test_main import nas
from whittle_nas.cli.options import Sizes
from whittle_nas.data import TextData, load_blocks
from whittle_nas.evaluate.perplexity import nats_per_token
from whittle_nas.repair.engine import repair
from whittle_nas.space.front import read_front
from whittle_nas.weights.checkpoint import load_supernet, open_checkpoint
from whittle_nas.weights.identity import tokens_id

SIZES = {"n_embd": 96, "intermediate_size": 256}
CHOICE = [item for name, size in SIZES.items() for item in (f"--subnetwork.{name}", size)]


@pytest.fixture
def checkpoint_dir(bundled):
    """A trained model: what repair gains on a random one is no loss."""
    return bundled


@pytest.fixture
def calibration(checkpoint_dir):
    """Text as tokens, and the options that mean it."""
    path = checkpoint_dir / "calibration.jsonl"
    data = TextData(files=[path], num_blocks=24, block_size=32)
    options = ["files", path, "num_blocks", 24, "block_size", 32]
    config = open_checkpoint(checkpoint_dir).config
    return load_blocks(data, checkpoint_dir, config=config).tokens, options


def flags(group, options):
    names = [f"--{group}.{name}" for name in options[::2]]
    return [item for pair in zip(names, options[1::2], strict=True) for item in pair]


@pytest.fixture
def repaired(checkpoint_dir, calibration):
    """The sub-network that the commands have to use, made without them."""
    net = load_supernet(checkpoint_dir)
    sub = Sizes(**SIZES).resolve(net)
    found = repair(net, sub, calibration[0])
    assert found.patch
    return net.standalone(sub, found.patch)


@pytest.mark.parametrize("format", ["litgpt", pytest.param("hf", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_repaired_export_is_an_ordinary_checkpoint(
    checkpoint_dir, tmp_path, calibration, repaired, format, capsys
):
    out_dir = tmp_path / "out"
    arguments = ["--checkpoint_dir", checkpoint_dir, "--out_dir", out_dir, "--format", format]
    data = flags("data", calibration[1])
    assert nas("export", *arguments, *CHOICE, "--repair", "true", *data) == 0
    ids = torch.arange(20)[None]
    if format == "litgpt":
        logits = load_supernet(out_dir, dtype=torch.float32).model(ids)
    else:
        from transformers import AutoModelForCausalLM

        logits = AutoModelForCausalLM.from_pretrained(out_dir).float().eval()(ids).logits
    torch.testing.assert_close(logits, repaired.float()(ids), rtol=1e-4, atol=1e-4)
    assert "672 calibration tokens" in (out_dir / "README.md").read_text()
    assert "repaired on 672 calibration tokens" in capsys.readouterr().out


@pytest.mark.slow
def test_evaluate_scores_the_repaired_subnetwork(checkpoint_dir, tmp_path, calibration, repaired):
    arguments = ["--checkpoint_dir", checkpoint_dir, "--out_dir", tmp_path / "out", *CHOICE]
    data = flags("data", calibration[1])
    assert nas("evaluate", *arguments, *data) == 0
    plain = loss_in(tmp_path / "out")
    again = ["--repair", "true", *flags("calibration", calibration[1])]
    assert nas("evaluate", *arguments, *data, *again) == 0
    found = loss_in(tmp_path / "out")
    assert found == pytest.approx(nats_per_token(repaired, calibration[0]), rel=1e-3)
    assert found < plain


def loss_in(out_dir):
    with (out_dir / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    return next(float(r["value"]) for r in rows if "nats_per_token" in r["metric"])


@pytest.mark.slow
def test_search_ranks_repaired_subnetworks_and_remembers_it(
    checkpoint_dir, tmp_path, calibration, capsys
):
    tokens, options = calibration
    out_dir = tmp_path / "out"
    arguments = ["--checkpoint_dir", checkpoint_dir, "--out_dir", out_dir, "--num_trials", 3]
    data, more = flags("data", options), flags("calibration", options)
    assert nas("search", *arguments, *data, "--repair", "true", *more, "--budgets", "90%") == 0
    shown = capsys.readouterr().out
    assert "losses are those after repair" in shown
    commands = [line for line in shown.splitlines() if " with: nas " in line]
    assert len(commands) == 3  # evaluate, export, train
    assert all("--repair true" in command for command in commands)
    files = {"<text>": str(checkpoint_dir / "valid.jsonl"), "<dir>": str(tmp_path / "trained")}
    words = [files.get(word, word) for word in shlex.split(commands[-1].partition(": nas ")[2])]
    short = ("--trainer.max_steps", 1, "--trainer.accelerator", "cpu", "--data.num_blocks", 40)
    assert nas(*words, *short) == 0  # as printed, but for its length
    assert json.loads((out_dir / "search.json").read_text())["repair"] == tokens_id(tokens)
    front = json.loads((out_dir / "front.json").read_text())
    assert front["how_measured"]["repair"] == {"blocks": 24, "block_size": 32}
    net = load_supernet(checkpoint_dir)
    for entry in read_front(out_dir / "front.json", net.info.layer_order).entries:
        model = net.standalone(entry.subnetwork, repair(net, entry.subnetwork, tokens).patch)
        assert entry.metrics["val_loss"] == pytest.approx(nats_per_token(model, tokens), rel=1e-4)
        assert entry.metrics["repair_seconds"] > 0
    assert nas("search", *arguments, *data, "--resume", "true") == 2
    assert "repair was" in capsys.readouterr().err


@pytest.mark.slow
def test_what_is_recovered_starts_repaired_as_its_trial_was(checkpoint_dir, tmp_path, calibration):
    tokens, options = calibration
    words = ["--checkpoint_dir", checkpoint_dir, "--out_dir", tmp_path / "out", "--num_trials", 6]
    words += flags("data", options) + flags("calibration", options)
    recovery = ["budget", "num_params <= 95%", "candidates", 2, "steps", 2]
    recovery += [f"data.{word}" if at % 2 == 0 else word for at, word in enumerate(options)]
    assert nas("search", *words, "--repair", "true", *flags("recovery", recovery)) == 0
    net = load_supernet(checkpoint_dir)
    entries = read_front(tmp_path / "out" / "recovery.json", net.info.layer_order).entries
    assert len(entries) == 2
    for entry in entries:
        model = net.standalone(entry.subnetwork, repair(net, entry.subnetwork, tokens).patch)
        # the training's numbers are float32, the trials' those of the file
        assert entry.metrics["val_loss"] == pytest.approx(nats_per_token(model, tokens), rel=1e-3)
        plain = nats_per_token(net.standalone(entry.subnetwork), tokens)
        assert plain > 1.01 * entry.metrics["val_loss"]


@pytest.mark.parametrize("command", ["export", "search", "evaluate"])
def test_repair_without_text_is_one_sentence(checkpoint_dir, tmp_path, text, command, capsys):
    arguments = ["--checkpoint_dir", checkpoint_dir, "--out_dir", tmp_path / "out"]
    more = CHOICE if command != "search" else []
    data = ["--data.files", text] if command != "export" else []
    assert nas(command, *arguments, *more, *data, "--repair", "true") == 2
    assert "--repair true needs calibration text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
