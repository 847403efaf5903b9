"""Every command ends with the line that runs the next one; here each of these lines is run."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.cli.test_main import nas
from tests.evaluate.conftest import task_folder  # noqa: F401 - a fixture
from whittle_nas.cli.common import command_line
from whittle_nas.space import SubNetwork
from whittle_nas.weights.checkpoint import open_checkpoint

DATA = ["--data.block_size", 32, "--data.num_blocks", 8]
FINETUNE = [
    "--trainer.max_steps", 1, "--trainer.accelerator", "cpu", "--validation.num_networks", 1,
    "--trainer.enable_progress_bar", "false", "--batch_size", 2, "--lora.r", 2,
]  # fmt: skip


@pytest.fixture
def follow(bundled, capsys):
    """Runs the printed line that starts with some words, with more options; returns `out_dir`."""

    def run(start: str, out_dir: Path, *more: object) -> Path:
        shown = capsys.readouterr().out
        line = next(line for line in shown.splitlines() if line.startswith(start))
        line = re.sub("<(validation |test )?text>", str(bundled / "valid.jsonl"), line)
        line = line.replace("<dir>", str(out_dir)).replace("<tasks>", "tiny_choice")
        assert nas(*shlex.split(line.removeprefix(f"{start} with: nas ")), *more) == 0
        return out_dir

    return run


SEARCH = [*DATA, "--search_blocks", 2, "--num_trials", 4]


@pytest.mark.slow
def test_from_the_model_to_trained_networks(checkpoint_dir, tmp_path, bundled, follow):
    calibration = ["--data.files", bundled / "valid.jsonl", *DATA, "--layer_blocks", 2]
    where = ["--checkpoint_dir", checkpoint_dir, "--out_dir", tmp_path / "with space"]
    assert nas("importance", *where, *calibration) == 0
    follow("find smaller models in it", tmp_path / "b", *SEARCH)
    trained = follow("train them", tmp_path / "c", *DATA, *FINETUNE)
    evaluated = follow("evaluate it", tmp_path / "d", *DATA)
    assert (evaluated / "results.csv").is_file()
    small = SubNetwork.from_config(open_checkpoint(trained / "num_params-80").config)
    whole = SubNetwork.from_config(open_checkpoint(checkpoint_dir).config)
    assert small != whole


@pytest.mark.slow
def test_from_the_model_to_networks_that_are_found_meanwhile(
    checkpoint_dir, tmp_path, bundled, follow
):
    calibration = ["--data.files", bundled / "valid.jsonl", *DATA, "--layer_blocks", 2]
    where = ["--checkpoint_dir", checkpoint_dir, "--out_dir", tmp_path / "with space"]
    assert nas("importance", *where, *calibration) == 0
    trained = follow("or find and train them", tmp_path / "c", *DATA, *FINETUNE)
    follow("evaluate it", tmp_path / "d", *DATA)
    one, two = (
        SubNetwork.from_config(open_checkpoint(trained / f"num_params-{size}").config)
        for size in (60, 80)
    )
    assert one != two


@pytest.mark.slow
def test_from_a_super_network_to_an_exported_sub_network(checkpoint_dir, tmp_path, bundled, follow):
    where = ["--checkpoint_dir", checkpoint_dir, "--out_dir", tmp_path / "a"]
    text = ["--data.files", bundled / "valid.jsonl", "--data.valid_fraction", 0.1]
    assert nas("finetune", *where, *text, *DATA, *FINETUNE) == 0
    follow("search it", tmp_path / "b", *SEARCH)
    exported = follow("export the middle one", tmp_path / "c")
    assert (
        open_checkpoint(exported).config.n_layer <= open_checkpoint(checkpoint_dir).config.n_layer
    )


@pytest.mark.parametrize(
    ("options", "start", "more"),
    [
        (["--subnetwork.n_layer", 2], "export it", []),
        ([], "find better ones", SEARCH),
    ],
)
def test_behind_a_profile(checkpoint_dir, tmp_path, follow, options, start, more):
    assert nas("profile", "--checkpoint_dir", checkpoint_dir, "--measure", "false", *options) == 0
    out_dir = follow(start, tmp_path / "next", *more)
    if options:
        assert open_checkpoint(out_dir).config.n_layer == 2
    else:
        assert json.loads((out_dir / "front.json").read_text())["front"]


def test_behind_an_evaluation(checkpoint_dir, task_folder, tmp_path, follow):  # noqa: F811
    common = ["--checkpoint_dir", checkpoint_dir, "--include_path", task_folder]
    sizes = ["--subnetwork.n_layer", 2, "--include_full", "true", "--tasks", "tiny_choice"]
    assert nas("evaluate", *common, *sizes, "--out_dir", tmp_path / "scores") == 0
    assert open_checkpoint(follow("export the middle one", tmp_path / "small")).config.n_layer == 2


def test_a_command_line_is_quoted_but_for_what_is_to_be_filled_in():
    assert command_line("nas", Path("a b"), "x <= 3", "<dir>", 1) == "nas 'a b' 'x <= 3' <dir> 1"
