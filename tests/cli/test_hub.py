"""Hugging Face directories and the hub, as the user of a command meets them."""

import os
import subprocess
import sys

import pytest
import torch

from tests.cli.test_main import nas
from tests.hub import running_hub
from whittle_nas.weights.checkpoint import open_checkpoint


def same_weights(one, other):
    first, second = open_checkpoint(one).state_dict(), open_checkpoint(other).state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


@pytest.mark.slow
def test_down_from_the_hub_and_up_again(checkpoint_dir, tmp_path):
    assert nas("export", "--checkpoint_dir", checkpoint_dir, "--extreme", "largest",
               "--format", "hf", "--out_dir", tmp_path / "hf") == 0  # fmt: skip
    with running_hub() as hub:
        hub.repos["someone/tiny"] = {
            p.name: p.read_bytes() for p in (tmp_path / "hf").iterdir() if p.name != "run.yaml"
        }

        def command(*arguments, status=0):
            environment = {
                **os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_x",
                "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"),
            }  # fmt: skip
            line = [sys.executable, "-m", "whittle_nas", *map(str, arguments)]
            done = subprocess.run(
                line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == status, done.stderr
            return done.stdout + done.stderr

        export = ("export", "--checkpoint_dir", "someone/tiny", "--extreme", "smallest")
        pushed = ("--format", "hf", "--push_to_hub", "tiny-small")
        said = command(*export, *pushed, "--out_dir", "small")
        assert "downloading" in said
        assert "converting it once" in said
        assert f"uploaded to {hub.url}/me/tiny-small" in said
        assert "Bearer hf_x" in hub.tokens
        here = {p.name: p.read_bytes() for p in (tmp_path / "small").iterdir()}
        del here["run.yaml"]  # it names paths of this machine
        assert hub.repos["me/tiny-small"] == here
        # What came down is kept, and is the model that went up.
        assert same_weights(tmp_path / "checkpoints/someone/tiny", checkpoint_dir)
        hub.repos.clear()
        assert "downloading" not in command(*export, "--out_dir", "again")
        said = command("export", "--checkpoint_dir", "no/such", "--out_dir", "x", status=2)
        assert "--checkpoint_dir no/such is no directory, and the hub has no model" in said
        assert not (tmp_path / "checkpoints/no").exists()


@pytest.mark.slow
def test_a_hugging_face_directory_in_and_no_hub(checkpoint_dir, tmp_path, monkeypatch, capsys):
    source = ("export", "--extreme", "largest", "--format", "hf")
    assert nas(*source, "--checkpoint_dir", checkpoint_dir, "--out_dir", tmp_path / "hf") == 0
    again = tmp_path / "again"
    where = ("--checkpoint_dir", tmp_path / "hf", "--out_dir", again)
    assert nas("export", "--extreme", "largest", *where) == 0
    assert "converting it once" in capsys.readouterr().out
    assert same_weights(again, checkpoint_dir)
    monkeypatch.chdir(tmp_path)
    missing = ("--checkpoint_dir", "runs/none", "--out_dir", tmp_path / "x")
    assert nas("export", "--extreme", "largest", *missing) == 2
    assert "runs/none is no directory, and the hub can't be reached" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_a_teacher_may_be_a_hugging_face_directory(checkpoint_dir, bundled, tmp_path, capsys):
    source = (
        "export",
        "--extreme",
        "largest",
        "--format",
        "hf",
        "--checkpoint_dir",
        checkpoint_dir,
    )
    assert nas(*source, "--out_dir", tmp_path / "hf") == 0
    data = (
        "--data.files",
        bundled / "train.jsonl",
        "--data.num_blocks",
        8,
        "--data.block_size",
        16,
    )
    train = ("finetune", "--checkpoint_dir", checkpoint_dir, *data, "--data.valid_fraction", 0.5)
    short = ("--sandwich.strategy", "standard", "--trainer.max_steps", 1, "--batch_size", 2)
    teacher = ("--loss.teacher", tmp_path / "hf")
    assert nas(*train, *short, *teacher, "--out_dir", tmp_path / "trained") == 0
    assert "converting it once" in capsys.readouterr().out
    assert same_weights(tmp_path / "hf", checkpoint_dir)


def test_an_upload_that_can_not_work_is_refused_first(
    checkpoint_dir, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    where = ("--checkpoint_dir", checkpoint_dir, "--out_dir", tmp_path / "out")
    export = ("export", *where, "--extreme", "smallest", "--push_to_hub")
    for options, sentence in (
        (["me/x"], "--push_to_hub me/x uploads a model for transformers: add --format hf"),
        (["a b", "--format", "hf"], "--push_to_hub a b must be a repository"),
    ):
        assert nas(*export, *options) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
