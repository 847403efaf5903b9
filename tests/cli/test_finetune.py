"""`nas finetune` as a user runs it: outputs, bad input, killed and distributed runs."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import lightning as L
import litgpt
import pytest
import torch
import yaml

from tests.conftest import first_of
from whittle_nas.__main__ import main
from whittle_nas.cli.finetune import finetune
from whittle_nas.cli.parser import make_parser
from whittle_nas.cli.training_report import warn_of_rise
from whittle_nas.data import Part, TextData
from whittle_nas.errors import ConfigError
from whittle_nas.space import SubNetwork
from whittle_nas.train.batches import collate
from whittle_nas.train.forward import labels_of
from whittle_nas.train.options import Distillation
from whittle_nas.train.sharded import read_shares
from whittle_nas.train.sources import load_samples
from whittle_nas.train.step import loss_sums
from whittle_nas.weights.checkpoint import load_supernet, open_checkpoint
from whittle_nas.weights.info import SupernetInfo

ROOT = Path(__file__).parents[2]
SMALL = [
    "--batch_size", 2, "--trainer.max_steps", 3, "--trainer.accelerator", "cpu",
    "--trainer.enable_progress_bar", "false", "--validation.num_networks", 2,
    "--validation.num_samples", 4, "--loss.distillation", "none",  # a random model teaches nothing
    "--lora.r", 4, "--lora.dropout", 0, "--optimizer.lr", 0.01,
]  # fmt: skip


def nas(*arguments) -> int:
    return main(["finetune", *map(str, arguments)])


@pytest.fixture
def instructions(tmp_path) -> Path:
    path = tmp_path / "instructions.json"
    rows = [
        {"instruction": f"Say {i} in words{' please' * (i % 5)}.", "output": "many " * (1 + i % 7)}
        for i in range(40)
    ]
    path.write_text(json.dumps(rows))
    return path


def text_options(text):
    return ["--data.files", text, "--data.block_size", 32, "--data.valid_fraction", 0.1]


def instruction_options(path, **more):
    arguments = {"json_path": str(path), "mask_prompt": True, "val_split_fraction": 0.2, **more}
    return ["--data.module", "JSON", "--data.module_args", json.dumps(arguments)]


def test_the_result_is_the_trained_super_network(tmp_path, checkpoint_dir, text, capsys):
    out_dir = tmp_path / "out"
    code = nas(
        "--checkpoint_dir", checkpoint_dir, "--out_dir", out_dir, *text_options(text), *SMALL
    )
    assert code == 0, capsys.readouterr().err
    written = {path.name for path in out_dir.iterdir()}
    assert written >= {
        "lit_model.pth", "lit_model.pth.lora", "model_config.yaml", "tokenizer.json", "run.yaml",
        "supernet.yaml", "grid.yaml", "losses.yaml", "curves.png", "logs", "checkpoints",
        "config.json",
    }  # fmt: skip
    trained = load_supernet(out_dir)
    assert trained.info.search_space is not None
    before = load_supernet(checkpoint_dir).model.state_dict()
    changed = {n for n, t in trained.model.state_dict().items() if not torch.equal(t, before[n])}
    assert {"transformer.wte.weight", "lm_head.weight"} <= changed
    assert not any("norm" in name for name in changed)
    adapters = torch.load(out_dir / "lit_model.pth.lora")["model"]
    assert {name.rpartition(".")[2] for name in adapters} == {"lora_A", "lora_B"}
    losses = yaml.safe_load((out_dir / "losses.yaml").read_text())["nats_per_token"]
    assert losses[3]["mean"] < losses[0]["mean"]
    assert set(losses) == {0, 3}  # a validation takes as long as seven steps
    assert "before" in capsys.readouterr().out
    assert nas("--config", out_dir / "run.yaml", "--out_dir", tmp_path / "again") == 0
    repeated = torch.load(tmp_path / "again" / "lit_model.pth")
    assert all(torch.equal(t, repeated[n]) for n, t in trained.model.state_dict().items())


@pytest.mark.slow
def test_merged_weights_have_the_loss_that_training_showed(tmp_path, checkpoint_dir, text):
    from whittle_nas.train.sampling import validation_networks

    out_dir = tmp_path / "out"
    nas("--checkpoint_dir", checkpoint_dir, "--out_dir", out_dir, *text_options(text), *SMALL)
    trained = load_supernet(out_dir)
    data = TextData(files=text, block_size=32, valid_fraction=0.1)
    held_out = load_samples(data, out_dir, config=trained.config, part=Part.VALID).samples[:4]
    from whittle_nas.space import load_space

    networks = validation_networks(load_space("aligned", trained.config), trained, 2)
    batch = collate(held_out)
    sums = loss_sums(trained, batch, networks.values())
    shown = yaml.safe_load((out_dir / "losses.yaml").read_text())["nats_per_token"][3]
    for name, total in zip(networks, sums.tolist(), strict=True):
        assert total / len(labels_of(batch)) == pytest.approx(shown[name], rel=1e-5)


PICKS = [
    {"name": "shallow", "n_layer": 1},
    {"name": "narrow", "intermediate_size": 20, "n_layer": 2},
]
MIXED = {"name": "mixed", "blocks": [[8, 4, 8, 20], [0, 0, 0, 30], None]}


@pytest.fixture
def picks(tmp_path) -> Path:
    path = tmp_path / "picks.yaml"
    path.write_text(yaml.safe_dump(PICKS))
    return path


@pytest.mark.parametrize("share", [pytest.param("cascade", marks=pytest.mark.slow), "all"])
def test_chosen_sub_networks_become_ordinary_checkpoints(
    tmp_path, checkpoint_dir, text, picks, capsys, share
):
    out_dir = tmp_path / "out"
    picks.write_text(yaml.safe_dump([*PICKS, MIXED]))
    code = nas(
        "--checkpoint_dir", checkpoint_dir, "--out_dir", out_dir, *text_options(text), *SMALL,
        "--subnetworks", picks, "--share", share, "--trainer.max_steps", 6,
        "--trainer.logger", "[]",
        "--repair", "false" if share == "all" else "true",  # which leaves a random model alone
    )  # fmt: skip
    shown = capsys.readouterr()
    assert code == 0, shown.err
    whole = litgpt.Config.from_file(checkpoint_dir / "model_config.yaml")
    for pick in PICKS:
        found = open_checkpoint(out_dir / pick["name"])
        for size in ("n_layer", "intermediate_size", "n_embd"):
            assert getattr(found.config, size) == pick.get(size, getattr(whole, size))
        assert pick["name"] in shown.out
        assert (out_dir / pick["name"] / "tokenizer.json").is_file()
        described = json.loads((out_dir / pick["name"] / "config.json").read_text())
        sizes = ("num_hidden_layers", "intermediate_size", "hidden_size")
        expected = (found.config.n_layer, found.config.intermediate_size, whole.n_embd)
        assert tuple(described[name] for name in sizes) == expected
    mixed = open_checkpoint(out_dir / "mixed", per_layer=True)
    assert [block.to_list() for block in mixed.config.blocks] == MIXED["blocks"][:2]
    assert not (out_dir / "mixed" / "config.json").exists()  # transformers has no such model
    assert (out_dir / "lit_model.pth").exists() == (share == "all")
    assert "super-network" not in shown.out
    if share == "all":
        return
    # These two are no parts of each other: each has a training that the other has not touched.
    losses = yaml.safe_load((out_dir / "narrow" / "losses.yaml").read_text())["nats_per_token"]
    assert losses[6]["full"] < losses[0]["full"]
    picks.write_text(yaml.safe_dump(PICKS[1:]))
    again = tmp_path / "again"
    assert nas("--config", out_dir / "run.yaml", "--out_dir", again) == 0
    one, two = (torch.load(path / "narrow" / "lit_model.pth") for path in (out_dir, again))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.slow
def test_an_earlier_run_stays_until_the_next_one_is_sure_to_start(
    tmp_path, checkpoint_dir, text, instructions, picks, capsys
):
    out_dir = tmp_path / "out"
    picks.write_text(yaml.safe_dump(PICKS[:1]))
    common = ["--checkpoint_dir", checkpoint_dir, "--out_dir", out_dir, *SMALL]
    common += ["--subnetworks", picks]
    assert nas(*common, *text_options(text)) == 0

    def files() -> dict[Path, float]:
        return {path: path.stat().st_mtime_ns for path in out_dir.rglob("*") if path.is_file()}

    before = files()
    assert out_dir / "shallow" / "lit_model.pth" in before
    capsys.readouterr()
    again = [*common, "--overwrite", "true"]
    for options, word in (
        (
            [*instruction_options(instructions), "--repair", "true"],
            "training data are instructions",
        ),
        ([*text_options(text), "--lora.r", 0], "lora.r=0"),
        ([*text_options(text), "--trainer.accelerator", "abacus"], "abacus"),
    ):
        assert nas(*again, *options) == 2
        assert word in capsys.readouterr().err
        assert files() == before, word
    assert nas(*again, *text_options(text)) == 0
    assert out_dir / "shallow" / "lit_model.pth" in files()
    assert not set(files().items()) & set(before.items())  # all of it was written anew


@pytest.mark.slow
def test_a_cascade_goes_on_from_what_the_larger_network_has_learnt(
    tmp_path, checkpoint_dir, text, picks, capsys
):
    wide = {"name": "wide", "intermediate_size": 40, "n_layer": 2}
    picks.write_text(yaml.safe_dump([PICKS[1], wide]))  # the smaller one first
    common = ["--checkpoint_dir", checkpoint_dir, *text_options(text), *SMALL]
    common += ["--subnetworks", picks, "--trainer.logger", "[]"]
    out_dir = tmp_path / "out"
    assert nas(*common, "--out_dir", out_dir) == 0
    assert nas(*common, "--out_dir", tmp_path / "apart", "--share", "none") == 0

    def weights(run: str) -> dict[str, torch.Tensor]:
        return torch.load(tmp_path / run / "narrow" / "lit_model.pth")

    def start(run: str) -> float:
        losses = yaml.safe_load((tmp_path / run / "narrow" / "losses.yaml").read_text())
        return losses["nats_per_token"][0]["full"]

    trained = load_supernet(out_dir / "wide")
    sub = SubNetwork.from_config(replace(trained.config, intermediate_size=20))
    data = TextData(files=text, block_size=32, valid_fraction=0.1)
    valid = load_samples(data, out_dir / "wide", config=trained.config, part=Part.VALID).samples[:4]
    batch = collate(valid)
    (total,) = loss_sums(trained, batch, [sub]).tolist()
    assert start("out") == pytest.approx(total / len(labels_of(batch)), rel=1e-5)
    assert start("apart") != pytest.approx(start("out"), rel=1e-4)
    # What is finished is not trained again, and what follows goes on from it.
    before, when = weights("out"), (out_dir / "wide" / "lit_model.pth").stat().st_mtime_ns
    with pytest.raises(ConfigError, match=f"trained alone; give one of them, such as {out_dir}/n"):
        open_checkpoint(out_dir)
    (out_dir / "narrow" / "lit_model.pth").unlink()
    capsys.readouterr()
    assert nas(*common, "--out_dir", out_dir) == 2
    assert "interrupted; go on with --resume true" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="unfinished training"):
        open_checkpoint(out_dir)
    assert nas(*common, "--out_dir", out_dir, "--resume", "true") == 0
    assert "wide is trained already" in capsys.readouterr().out
    assert (out_dir / "wide" / "lit_model.pth").stat().st_mtime_ns == when
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights("out").items())


@pytest.mark.slow
def test_one_network_is_no_super_network(tmp_path, checkpoint_dir, text, capsys):
    """`standard` trains the whole model alone: nothing else is validated, printed or promised."""
    out_dir = tmp_path / "out"
    common = ["--checkpoint_dir", checkpoint_dir, "--out_dir", out_dir, *text_options(text), *SMALL]
    assert nas(*common, "--sandwich.strategy", "standard") == 0
    shown = capsys.readouterr().out
    assert "super-network" not in shown
    assert "nas search" not in shown
    losses = yaml.safe_load((out_dir / "losses.yaml").read_text())
    assert set(losses["networks"]) == {"full"}
    assert losses["nats_per_token"][3]["full"] < losses["nats_per_token"][0]["full"]
    assert load_supernet(out_dir).info.search_space is None
    exported = ["--checkpoint_dir", out_dir, "--out_dir", tmp_path / "small"]
    assert main(["export", *map(str, exported), "--subnetwork.n_layer", "2"]) == 0
    card = (tmp_path / "small" / "README.md").read_text()
    assert "Before the cut its weights were fine-tuned." in card


@pytest.mark.slow
def test_a_whole_model_alone_says_that_the_labels_taught_it(tmp_path, checkpoint_dir, text, capsys):
    """By the default losses, whose teacher it is itself; another checkpoint does teach it."""
    other = shutil.copytree(checkpoint_dir, tmp_path / "teacher")
    tensors = {n: t + 0.1 for n, t in torch.load(other / "lit_model.pth").items()}
    torch.save(tensors, other / "lit_model.pth")
    common = ["--checkpoint_dir", checkpoint_dir, *text_options(text), *SMALL]
    common += ["--sandwich.strategy", "standard"]
    runs = {"default": TAUGHT, "labels": [], "other": [*TAUGHT, "--loss.teacher", other]}
    shown = {}
    for name, options in runs.items():
        assert nas(*common, "--out_dir", tmp_path / name, *options) == 0
        shown[name] = capsys.readouterr().out
    recorded = {
        name: yaml.safe_load((tmp_path / name / "supernet.yaml").read_text())["training"]
        for name in runs
    }
    for name in ("default", "labels"):
        assert recorded[name]["teacher"] is None
        assert recorded[name]["distillation"] == "none"
    assert (recorded["other"]["teacher"], recorded["other"]["distillation"]) == (
        str(other),
        "forward_kl",
    )
    told = {name for name, text in shown.items() if "the labels alone teach" in text}
    assert told == {"default"}
    weights = {name: torch.load(tmp_path / name / "lit_model.pth") for name in runs}
    for name, tensor in weights["labels"].items():
        assert torch.equal(weights["default"][name], tensor)
    assert not torch.equal(weights["other"]["lm_head.weight"], weights["labels"]["lm_head.weight"])


def test_fixed_members_are_what_is_validated(tmp_path, checkpoint_dir, text):
    sizes = tmp_path / "sizes.yaml"
    full = SubNetwork.from_config(litgpt.Config.from_file(checkpoint_dir / "model_config.yaml"))
    member = {**full.to_dict(), "n_layer": 1}
    sizes.write_text(yaml.safe_dump([member]))
    options = ["--sampler.kind", "fixed", "--sampler.file", sizes]
    common = ["--checkpoint_dir", checkpoint_dir, "--out_dir", tmp_path / "out", *SMALL]
    assert nas(*common, *text_options(text), *options) == 0
    networks = yaml.safe_load((tmp_path / "out" / "losses.yaml").read_text())["networks"]
    assert set(networks) == {"member_0", "full"}
    assert networks["member_0"]["n_layer"] == 1


@pytest.mark.slow
def test_a_space_that_was_fitted_to_the_model_is_the_default(tmp_path, checkpoint_dir, text):
    config = litgpt.Config.from_file(checkpoint_dir / "model_config.yaml")
    spec = {"n_layer": {"min": config.n_layer - 1, "max": config.n_layer}}
    sweep = {"limit": 1.0, "losses": {}, "space": spec}
    info = replace(SupernetInfo.default(config), sweep=sweep)
    (checkpoint_dir / "supernet.yaml").write_text(info.dump())
    common = ["--checkpoint_dir", checkpoint_dir, "--out_dir", tmp_path / "out", *SMALL]
    assert nas(*common, *text_options(text)) == 0
    networks = yaml.safe_load((tmp_path / "out" / "losses.yaml").read_text())["networks"]
    assert networks["smallest"]["n_layer"] == config.n_layer - 1
    assert networks["smallest"]["n_embd"] == config.n_embd


@pytest.mark.slow
def test_a_whole_model_that_got_worse_is_told(tmp_path, checkpoint_dir, text, capsys):
    common = ["--checkpoint_dir", checkpoint_dir, "--out_dir", tmp_path / "out", *SMALL]
    harmful = ["--optimizer.lr", 1.0, "--optimizer.warmup_steps", 0]
    assert nas(*common, *text_options(text), *harmful) == 0
    shown = capsys.readouterr()
    assert "the whole model got worse" in shown.err
    assert "untouched model" in shown.out


@pytest.mark.parametrize(("after", "told"), [(1.029, False), (1.031, True)])
def test_three_percent_are_told(capsys, after, told):
    warn_of_rise("the whole model", 1.0, after)
    assert ("rose by 3.1 %" in capsys.readouterr().err) == told


def test_all_weights_in_bfloat16_are_refused(tmp_path, checkpoint_dir, text, capsys):
    """Most steps are smaller than what 8 bits can add to a weight."""
    small = SMALL[: SMALL.index("--lora.r")]
    common = ["--checkpoint_dir", checkpoint_dir, "--out_dir", tmp_path / "out", *small]
    options = ["--lora", "null", "--trainer.precision", "bf16-true"]
    assert nas(*common, *text_options(text), *options) == 2
    assert "bf16-mixed" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["true", "false"])
def test_instructions_with_masked_prompts(tmp_path, checkpoint_dir, instructions, packing):
    out_dir = tmp_path / "out"
    code = nas(
        "--checkpoint_dir", checkpoint_dir, "--out_dir", out_dir, *SMALL, "--packing", packing,
        *instruction_options(instructions), "--loss.distillation", "cosine",
    )  # fmt: skip
    assert code == 0
    assert (out_dir / "lit_model.pth").is_file()


@pytest.mark.parametrize(
    "kind",
    [
        "random",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("calibrate_mag", "calibrate_ppl", "pareto")
        ),
    ],
)
def test_every_sampler_trains_and_its_grid_trains_again(tmp_path, checkpoint_dir, text, kind):
    out_dir = tmp_path / "out"
    options = ["--sampler.kind", kind, "--sampler.num_bins", 3, "--sampler.candidates_per_bin", 2]
    options += ["--sampler.calibration_samples", 2]
    common = ["--checkpoint_dir", checkpoint_dir, *text_options(text), *SMALL]
    assert nas(*common, "--out_dir", out_dir, *options) == 0
    assert (out_dir / "grid.yaml").is_file() == kind.startswith("calibrate")
    if not kind.startswith("calibrate"):
        return
    members = yaml.safe_load((out_dir / "grid.yaml").read_text())["members"]
    assert all("score" in member for member in members)
    if kind != "calibrate_mag":  # files of grids are alike
        return
    again = ["--sampler.kind", "fixed", "--sampler.file", out_dir / "grid.yaml"]
    assert nas(*common, "--out_dir", tmp_path / "again", *again) == 0


@pytest.mark.slow
def test_losses_that_choose_networks_are_computed_as_those_of_the_training(
    tmp_path, checkpoint_dir, text
):
    """Stored in bfloat16 and with adapters in float32, as a GPU trains them."""
    path = checkpoint_dir / "lit_model.pth"
    torch.save({name: t.bfloat16() for name, t in torch.load(path).items()}, path)
    options = ["--sampler.kind", "calibrate_ppl", "--sampler.num_bins", 2]
    options += ["--sampler.candidates_per_bin", 2, "--sampler.calibration_samples", 2]
    options += ["--trainer.precision", "bf16-mixed", "--lora.ranks", "[2]"]
    common = ["--checkpoint_dir", checkpoint_dir, *text_options(text), *SMALL]
    assert nas(*common, "--out_dir", tmp_path / "out", *options) == 0
    losses = yaml.safe_load((tmp_path / "out" / "losses.yaml").read_text())
    assert list(losses["by_rank"]) == [2, 4]


@pytest.mark.slow
def test_full_fine_tuning_keeps_the_stored_number_format(tmp_path, checkpoint_dir, text):
    path = checkpoint_dir / "lit_model.pth"
    stored = {name: t.bfloat16() for name, t in torch.load(path).items()}
    torch.save(stored, path)
    out_dir = tmp_path / "out"
    small = SMALL[: SMALL.index("--lora.r")]
    code = nas(
        "--checkpoint_dir", checkpoint_dir, "--out_dir", out_dir, *text_options(text), *small,
        "--lora", "null", "--trainer.precision", "bf16-mixed", "--optimizer.lr", 0.01,
    )  # fmt: skip
    assert code == 0
    trained = torch.load(out_dir / "lit_model.pth")
    assert {t.dtype for t in trained.values()} == {torch.bfloat16}
    assert not torch.equal(trained["transformer.ln_f.weight"], stored["transformer.ln_f.weight"])
    assert not (out_dir / "lit_model.pth.lora").exists()


@pytest.mark.slow
def test_dry_run_prints_memory_and_writes_nothing(tmp_path, checkpoint_dir, text, capsys):
    common = ["--checkpoint_dir", checkpoint_dir, "--out_dir", tmp_path / "out", *SMALL]
    assert nas(*common, *text_options(text), "--trainer.fast_dev_run", "true") == 0
    shown = capsys.readouterr().out
    assert all(part in shown for part in ("weights", "adapters", "optimizer", "activations"))
    assert not (tmp_path / "out").exists()


def test_dry_run_without_weights(tmp_path, capsys):
    config = litgpt.Config.from_name("Llama-3.1-8B")
    litgpt.utils.save_config(config, tmp_path)
    code = nas(
        "--checkpoint_dir", tmp_path, "--out_dir", tmp_path / "out", "--data.module", "Alpaca",
        "--trainer.fast_dev_run", "true", "--batch_size", 512,
    )  # fmt: skip
    shown = capsys.readouterr()
    assert code == 0
    assert "nothing was run" in shown.out
    assert "lower batch_size" in shown.err


TAUGHT = ["--loss.distillation", "forward_kl"]


def edit(path: Path, **changes) -> None:
    spec = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**spec, **changes}))


@pytest.mark.parametrize(
    ("options", "words"),
    first_of(
        every=3,
        values=[
            (["--batch_size", 0], ["--batch_size 0"]),
            (["--data.block_size", 4096], ["4096", "128"]),
            (["--data.valid_fraction", 0], ["valid_fraction=0"]),
            (["--search_space", "{n_layer: [9]}"], ["n_layer"]),
            (["--require_importance", "true"], ["nas importance"]),
            (["--sampler.kind", "fixed"], ["sampler.file"]),
            (["--sampler.kind", "fixed", "--sampler.file", "no.yaml"], ["no.yaml"]),
            (["--sampler.kind", "clever"], ["clever", "grid_params"]),
            (["--loss.temperature", 0], ["loss.temperature=0"]),
            (
                ["--loss.distillation", "cosine", "--loss.teacher", "nobody"],
                ["nobody", "directory"],
            ),
            (["--loss.teacher", "in_place", "--loss.hidden", "cosine"], ["frozen teacher"]),
            (
                ["--sandwich.strategy", "standard", *TAUGHT, "--loss.hidden", "square_head"],
                ["loss.hidden=square_head", "--sandwich.strategy standard", "loss.teacher"],
            ),
            (
                ["--sandwich.strategy", "standard", "--loss.distillation", "l2"],
                ["loss.distillation=l2", "no effect"],
            ),
            (
                ["--sandwich.strategy", "standard", *TAUGHT, "--loss.teacher", "in_place"],
                ["loss.teacher=in_place", "no effect"],
            ),
            (["--share", "all"], ["--subnetworks"]),
            (["--lora.ranks", "[2,8]"], ["lora.ranks: 8", "at most r=4"]),
            (["--repair", "true"], ["--repair", "--subnetworks"]),
            (["--validation.max_full_loss", 0.1], ["max_full_loss=0.1", "untouched"]),
            (["--lora.r", 0], ["lora.r=0"]),
            (["--lora", "false"], ["--lora false must be null or", "--lora.r"]),
            (["--optimizer.lr", "fast"], ["--optimizer.lr fast must be null or a number"]),
            (["--trainer.strategy", "deepspeed"], ["deepspeed", "ddp", "fsdp"]),
            (
                ["--trainer.strategy", "fsdp", "--sampler.kind", "calibrate_ppl"],
                ["calibrate_ppl", "grid_params"],
            ),
            (["--trainer.precision", "16-mixed"], ["16-mixed", "bf16-mixed"]),
            (["--trainer.accelerator", "abacus"], ["abacus"]),
            (["--optimizer.lr", "1e30"], ["step", "not finite"]),
        ],
    ),
)
def test_bad_options_are_one_sentence(tmp_path, checkpoint_dir, text, capsys, options, words):
    common = ["--checkpoint_dir", checkpoint_dir, "--out_dir", tmp_path / "out"]
    assert nas(*common, *text_options(text), *SMALL, *options) == 2
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1
    assert all(word in message for word in words), message
    assert not (tmp_path / "out" / "lit_model.pth").exists()


@pytest.mark.parametrize("more", [[], ["--dry_run", "true"]])
def test_a_torch_that_can_not_share_out_is_one_sentence(
    checkpoint_dir, tmp_path, monkeypatch, capsys, more
):
    monkeypatch.delattr("torch.distributed.fsdp.FSDPModule.set_reduce_scatter_unused_params")
    common = ["--checkpoint_dir", checkpoint_dir, "--out_dir", tmp_path / "out", *more]
    data = ["--data.module", "Alpaca"]
    assert nas(*common, *data, "--trainer.strategy", "fsdp") == 2
    message = capsys.readouterr().err
    assert "trainer.strategy=fsdp needs torch 2.13 or newer" in message
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_data_without_labels(tmp_path, checkpoint_dir, instructions, capsys):
    common = ["--checkpoint_dir", checkpoint_dir, "--out_dir", tmp_path / "out", *SMALL]
    options = [*instruction_options(instructions), "--data.block_size", 8]
    assert nas(*common, *options) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in ("label", "block_size=8", "mask_prompt"))


def test_space_that_does_not_fit(tmp_path, checkpoint_dir, text, capsys):
    space = tmp_path / "space.yaml"
    space.write_text("n_embd: [16, 4096]\n")
    common = ["--checkpoint_dir", checkpoint_dir, "--out_dir", tmp_path / "out", *SMALL]
    assert nas(*common, *text_options(text), "--search_space", space) == 2
    assert "n_embd" in capsys.readouterr().err


class Terminate(L.Callback):
    """A scheduler that wants the second step to be the last one."""

    def on_train_batch_start(self, *arguments):
        if arguments[-1] == 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_a_stopped_training_and_its_rerun_say_how_to_go_on(tmp_path, checkpoint_dir, text, capsys):
    common = ["--checkpoint_dir", checkpoint_dir, "--out_dir", tmp_path / "out"]
    common += [*text_options(text), *SMALL]
    stop = json.dumps([{"class_path": f"{__name__}.Terminate"}])
    assert nas(*common, "--trainer.callbacks", stop) == 143
    assert "stopped by SIGTERM; run the same command again with --resume true" in (
        capsys.readouterr().err
    )
    assert nas(*common) == 2
    assert "--resume true" in capsys.readouterr().err
    other = shutil.copytree(checkpoint_dir, tmp_path / "other")
    tensors = {n: 2 * t for n, t in torch.load(checkpoint_dir / "lit_model.pth").items()}
    torch.save(tensors, other / "lit_model.pth")
    for changed, words in (
        (["--loss.temperature", 3], "loss.temperature was 1.0 and is 3"),
        (["--validation.num_networks", 3], "validated networks was"),
        (["--sampler.kind", "pareto"], 'sampler was "GridSampler" and is "ParetoSampler"'),
        (["--weights", "all"], "trained parameters was"),
        (["--lora.alpha", 3], "lora.alpha was 16 and is 3"),
        (["--checkpoint_dir", other], "checkpoint_dir was"),
    ):
        assert nas(*common, "--resume", "true", *changed) == 2, changed
        assert words in capsys.readouterr().err
    assert nas(*common, "--resume", "true") == 0


def test_out_dir_is_not_written_over(tmp_path, checkpoint_dir, text, capsys):
    common = ["--checkpoint_dir", checkpoint_dir, *text_options(text), *SMALL]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("")
    assert nas(*common, "--out_dir", tmp_path / "out") == 2
    assert nas(*common, "--out_dir", checkpoint_dir) == 2
    assert "is the --checkpoint_dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path",
    first_of(
        path
        for name in ("finetune", "instatune", "lonas", "shears")
        for path in sorted(ROOT.glob(f"whittle_nas/configs/*/{name}.yaml"))
    ),
    ids=str,
)
def test_every_config_is_parsed(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    parser = make_parser("finetune", finetune)
    given = yaml.safe_load(path.read_text())
    required = {"checkpoint_dir": "x", "out_dir": "y"}
    missing = [f"--{name}={value}" for name, value in required.items() if name not in given]
    options = parser.instantiate_classes(parser.parse_args([f"--config={path}", *missing]))
    # What the pages say: LoNAS and Shears learn from the labels alone, as they are published.
    by_labels = path.stem in ("lonas", "shears")
    assert (options.loss.distillation is Distillation.none) == by_labels


def words(checkpoint_dir, out_dir, text, *options) -> list[object]:
    return [
        "--checkpoint_dir", checkpoint_dir, "--out_dir", out_dir, *text_options(text), *SMALL,
        "--lora.dropout", 0.1, "--loss.distillation", "forward_kl", *options,
    ]  # fmt: skip


def started(*given, **more) -> subprocess.Popen:
    """The command in a process of its own."""
    line = [sys.executable, "-m", "whittle_nas", "finetune", *map(str, given)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(line, env={**os.environ, **threads}, **more)


def launched(count, *runs) -> None:
    """The command several times, in processes that were started together as torchrun does it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    code = "import json, sys; from whittle_nas.__main__ import main; "
    code += "sys.exit(max(main(['finetune', *run]) for run in json.loads(sys.argv[1])))"
    line = [sys.executable, "-c", code, json.dumps([[*map(str, run)] for run in runs])]
    env = {
        **os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT),
        "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0", "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port), "WORLD_SIZE": str(count),
    }  # fmt: skip
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    processes = [subprocess.Popen(line, env={**env, **rank}) for rank in ranks]
    assert [process.wait() for process in processes] == [0] * count


@pytest.mark.slow
def test_a_run_killed_twice_goes_on_as_if_nothing_had_happened(tmp_path, checkpoint_dir, text):
    length = [
        "--trainer.max_steps", 80, "--trainer.checkpoint_every_n_steps", 5,
        "--validation.every_n_steps", 50,
    ]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert nas(*words(checkpoint_dir, whole, text, *length)) == 0
    resumed = words(checkpoint_dir, parts, text, *length)
    for sent in (signal.SIGKILL, signal.SIGTERM):
        before = set((parts / "checkpoints").glob("step=*.ckpt"))
        running = started(*resumed, cwd=tmp_path)
        while not set((parts / "checkpoints").glob("step=*.ckpt")) - before:
            assert running.poll() is None, "ended before it was killed"
            time.sleep(0.01)
        running.send_signal(sent)
        assert running.wait() == (-sent if sent == signal.SIGKILL else 143)
        assert not (parts / "lit_model.pth").exists()
        resumed = words(checkpoint_dir, parts, text, *length, "--resume", "true")
    assert nas(*resumed) == 0
    assert (whole / "losses.yaml").read_text() == (parts / "losses.yaml").read_text()
    expected, found = torch.load(whole / "lit_model.pth"), torch.load(parts / "lit_model.pth")
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def assert_same_training(found, expected) -> None:
    """Where a gradient is nearly all rounding, Adam makes a part of a step of it."""
    off = torch.cat([(found[n] - expected[n]).float().abs().flatten() for n in expected])
    assert (off > 2e-6).float().mean() < 1e-3
    assert off.max() < 1e-4  # a hundredth of a step: nothing was lost, or done twice


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "strategy"), [("text", "ddp"), ("instructions", "ddp"), ("instructions", "fsdp")]
)
def test_two_processes_are_one_with_the_doubled_batch(
    tmp_path, checkpoint_dir, text, instructions, kind, strategy
):
    """Masked prompts give the two processes different numbers of labels."""
    data = [] if kind == "text" else ["--data.files", "null", "--data.block_size", 128]
    data += instruction_options(instructions) if data else []
    common = [
        "--trainer.max_steps", 5, "--lora.dropout", 0, "--loss.weighting", "balanced", *data,
        "--sandwich.full_share", 1, "--sandwich.smallest_share", 1,
    ]  # fmt: skip
    paths = tmp_path / "one", tmp_path / "two"
    assert nas(*words(checkpoint_dir, paths[0], text, *common, "--batch_size", 4)) == 0
    shared = ["--trainer.devices", 2, "--trainer.strategy", strategy]
    assert started(*words(checkpoint_dir, paths[1], text, *common, *shared)).wait() == 0
    one, two = (torch.load(path / "lit_model.pth") for path in paths)
    start = torch.load(checkpoint_dir / "lit_model.pth")
    assert max(float((one[n] - start[n]).abs().max()) for n in one) > 1e-3
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-6, rtol=0)
    texts = [(path / "losses.yaml").read_text() for path in paths]
    means = [yaml.safe_load(text)["nats_per_token"][5]["mean"] for text in texts]
    assert means[0] == pytest.approx(means[1], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("share", "strategy"), [("all", "ddp"), ("all", "fsdp"), ("cascade", "ddp")]
)
def test_two_processes_train_the_chosen_networks_as_one_does(
    tmp_path, checkpoint_dir, text, picks, strategy, share
):
    """One process writes what all start the second network of the cascade from."""
    wide = {"name": "wide", "intermediate_size": 40, "n_layer": 2}
    picks.write_text(yaml.safe_dump([wide, *PICKS[1:]]))
    common = ["--subnetworks", picks, "--share", share, "--trainer.max_steps", 4]
    common += ["--lora.dropout", 0]
    one, two = tmp_path / "one", tmp_path / "two"
    assert nas(*words(checkpoint_dir, one, text, *common, "--batch_size", 4)) == 0
    shared = ["--trainer.devices", 2, "--trainer.strategy", strategy]
    assert started(*words(checkpoint_dir, two, text, *common, *shared)).wait() == 0
    for name in ("wide", "narrow"):
        losses = (one if share == "all" else one / name) / "losses.yaml"
        shown = yaml.safe_load(losses.read_text())["nats_per_token"]
        before, after = (shown[step][name if share == "all" else "full"] for step in (0, 4))
        assert after < before - 0.1
        assert_same_training(*(torch.load(run / name / "lit_model.pth") for run in (two, one)))


def distance(one, two) -> float:
    """Between two sets of weights."""
    return float(torch.cat([(one[n] - two[n]).double().flatten() for n in one]).norm())


@pytest.mark.slow
def test_two_processes_are_one_in_bfloat16(tmp_path, checkpoint_dir, text):
    """As far from it as roundings, a small part of the way that the training goes.

    Other networks or rows in a step would be much further off: half of the rows are.
    """
    kinds = {
        "adapters": ["--trainer.precision", "bf16-mixed"],
        "all": ["--trainer.precision", "bf16-mixed", "--weights", "all"],
        "true": ["--trainer.precision", "bf16-true"],
    }

    def run(name, kind, *options):
        common = ["--trainer.max_steps", 4, "--lora.dropout", 0, "--trainer.logger", "[]"]
        return words(checkpoint_dir, tmp_path / name, text, *common, *kinds[kind], *options)

    strategies = {s: ["--trainer.devices", 2, "--trainer.strategy", s] for s in ("ddp", "fsdp")}
    pairs = [(kind, s) for kind in kinds for s in strategies if (kind, s) != ("true", "ddp")]
    launched(2, *(run(kind + s, kind, *strategies[s]) for kind, s in pairs))
    start = torch.load(checkpoint_dir / "lit_model.pth")
    for kind in kinds:
        assert nas(*run(kind, kind, "--batch_size", 4)) == 0
        assert nas(*run(kind + "half", kind, "--batch_size", 2)) == 0
        names = (kind, kind + "half", *(kind + s for found, s in pairs if found == kind))
        one, half, *two = (torch.load(tmp_path / n / "lit_model.pth") for n in names)
        moved = distance(one, start)
        assert distance(half, one) > 0.3 * moved
        for found in two:
            assert distance(found, one) < 0.1 * moved  # bf16-mixed .01, bf16-true .03
        if kind != "true":  # sums of gradients are in float32, and of the same two parts
            assert distance(*two) < 1e-5 * moved


@pytest.mark.slow
def test_two_processes_find_the_same_front_while_they_train(tmp_path, checkpoint_dir, text):
    """Each scores the members itself; a front of its own would train networks of its own."""
    front = ["--sampler.kind", "pareto", "--sampler.every_n_steps", 2, "--sampler.num_bins", 4]
    common = [*front, "--trainer.max_steps", 5, "--lora.dropout", 0]
    one, two = tmp_path / "one", tmp_path / "two"
    assert nas(*words(checkpoint_dir, one, text, *common, "--batch_size", 4)) == 0
    shared = ["--trainer.devices", 2, "--trainer.strategy", "ddp"]
    assert started(*words(checkpoint_dir, two, text, *common, *shared)).wait() == 0
    found, expected = (torch.load(run / "lit_model.pth") for run in (two, one))
    start = torch.load(checkpoint_dir / "lit_model.pth")
    assert max(float((start[n] - expected[n]).abs().max()) for n in expected) > 1e-3
    assert_same_training(found, expected)


@pytest.mark.slow
def test_a_shared_out_run_goes_on_with_another_number_of_processes(tmp_path, checkpoint_dir, text):
    """Two processes up to step 3, one from there on; the same as one that was never interrupted."""
    kinds = {"all": ["--lora", "null"], "adapters": ["--lora.dropout", 0]}
    start = torch.load(checkpoint_dir / "lit_model.pth")

    def run(kind, name, *options):
        common = ["--trainer.max_steps", 5, "--trainer.checkpoint_every_n_steps", 3]
        return words(checkpoint_dir, tmp_path / kind / name, text, *common, *kinds[kind], *options)

    shared = ["--trainer.strategy", "fsdp", "--trainer.devices"]
    launched(2, *(run(kind, "parts", *shared, 2) for kind in kinds))
    for kind in kinds:
        (tmp_path / kind / "parts" / "lit_model.pth").unlink()
    alone = [*shared, 1, "--batch_size", 4, "--resume", "true"]
    launched(1, *(run(kind, "parts", *alone) for kind in kinds))
    for kind in kinds:
        assert nas(*run(kind, "one", "--batch_size", 4)) == 0
        folders = tmp_path / kind / "one", tmp_path / kind / "parts"
        one, parts = (torch.load(folder / "lit_model.pth") for folder in folders)
        assert max(float((one[n] - start[n]).abs().max()) for n in one) > 1e-3
        assert_same_training(parts, one)
        (left,) = (folders[1] / "checkpoints").iterdir()
        assert left.name == "step=00000003.ckpt"  # of the two processes: it was gone on from
        assert sorted(path.name for path in left.iterdir()) == [
            "rest.pt",
            *(f"share-0000{rank}-of-00002.pt" for rank in range(2)),
        ]
        assert (folders[1] / "lit_model.pth.lora").exists() == (kind == "adapters")
        with pytest.raises(ConfigError, match="not a checkpoint of trainer.strategy=fsdp"):
            read_shares(next((folders[0] / "checkpoints").iterdir()))
