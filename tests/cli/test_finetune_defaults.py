"""`nas finetune` with nothing but data: safe on any checkpoint, here on three real ones."""

import pytest
import yaml

from whittle_nas.__main__ import main
from whittle_nas.assets import bundled_checkpoint

# What is left out of a user's call is only time: fewer and shorter samples, fewer steps.
SHORT = [
    "--data.block_size", 128, "--data.num_blocks", 256, "--trainer.max_steps", 12,
    "--validation.num_samples", 16, "--validation.num_networks", 3, "--trainer.logger", "[]",
    "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
]  # fmt: skip


def texts(name, shared_data):
    if name == "pydoc-1m":
        return bundled_checkpoint(), "pydoc-1m/train.jsonl"
    return shared_data / "checkpoints" / name, shared_data / "tinystories" / "train.jsonl"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories260K", "babyllama-char361", "pydoc-1m"])
def test_every_sub_network_gains_and_the_whole_model_keeps_99_percent(
    tmp_path, shared_data, name, capsys
):
    checkpoint, text = texts(name, shared_data)
    words = ["finetune", "--checkpoint_dir", checkpoint, "--out_dir", tmp_path / "out"]
    words += ["--data.files", text, "--data.valid_fraction", 0.1, *SHORT]
    code = main([str(word) for word in words])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    losses = yaml.safe_load((tmp_path / "out" / "losses.yaml").read_text())["nats_per_token"]
    before, after = losses[0], losses[12]
    assert after["full"] < 1.01 * before["full"]
    assert "got worse" not in shown.err
    others = set(before) - {"full", "mean"}
    assert len(others) == 4
    assert all(after[one] < before[one] for one in others), (before, after)
