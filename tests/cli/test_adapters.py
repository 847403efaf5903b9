"""Elastic adapters: trained at several ranks, one of them merged or written for PEFT."""

import json
import shutil

import pytest
import torch
import yaml

from whittle_nas.__main__ import main
from whittle_nas.data import Part, TextData
from whittle_nas.train.batches import collate
from whittle_nas.train.forward import labels_of
from whittle_nas.train.sources import load_samples
from whittle_nas.train.step import loss_sums
from whittle_nas.weights.checkpoint import load_supernet

TRAINING = [
    "--batch_size", 2, "--trainer.max_steps", 3, "--trainer.accelerator", "cpu",
    "--trainer.enable_progress_bar", "false", "--validation.num_networks", 1,
    "--validation.num_samples", 2, "--loss.distillation", "none", "--trainer.logger", "[]",
    "--lora.r", 4, "--lora.dropout", 0, "--optimizer.lr", 0.01,
]  # fmt: skip


def nas(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def train(checkpoint_dir, out_dir, text, *more) -> int:
    return nas(
        "finetune", "--checkpoint_dir", checkpoint_dir, "--out_dir", out_dir, "--data.files", text,
        "--data.block_size", 32, "--data.valid_fraction", 0.1, *TRAINING, *more,
    )  # fmt: skip


def weights(path) -> dict[str, torch.Tensor]:
    return load_supernet(path).model.state_dict()


@pytest.mark.slow
def test_any_rank_is_merged_after_the_training(tmp_path, checkpoint_dir, text, capsys):
    out_dir = tmp_path / "out"
    assert train(checkpoint_dir, out_dir, text, "--lora.ranks", "[1,2]") == 0
    shown = capsys.readouterr().out
    assert "rank 4 is merged" in shown
    assert "rank 1" in shown
    losses = yaml.safe_load((out_dir / "losses.yaml").read_text())
    assert list(losses["by_rank"]) == [1, 2, 4]
    assert losses["by_rank"][4] == pytest.approx(
        {name: losses["nats_per_token"][3][name] for name in losses["networks"]}, rel=1e-5
    )
    export = ["export", "--checkpoint_dir", out_dir, "--subnetwork.n_layer", 3]
    for rank in (2, 4):
        assert nas(*export, "--out_dir", tmp_path / str(rank), "--lora_r", rank) == 0
    trained, base, two = map(weights, (out_dir, checkpoint_dir, tmp_path / "2"))
    for name, tensor in weights(tmp_path / "4").items():
        torch.testing.assert_close(tensor, trained[name])
    stored = torch.load(out_dir / "lit_model.pth.lora")["model"]
    a, b = (stored[f"transformer.h.1.mlp.proj.lora_{kind}"] for kind in "AB")
    name = "transformer.h.1.mlp.proj.weight"
    torch.testing.assert_close(two[name], base[name] + 16 / 4 * b[:, :2] @ a[:2])
    model = load_supernet(tmp_path / "2")
    data = TextData(files=text, block_size=32, valid_fraction=0.1)
    held_out = load_samples(data, out_dir, config=model.config, part=Part.VALID).samples[:2]
    (found,) = loss_sums(model, collate(held_out), [model.full]).tolist()
    of_rank = found / len(labels_of(collate(held_out)))
    assert of_rank == pytest.approx(losses["by_rank"][2]["full"], rel=1e-5)
    # Repair fits what is exported: the weights of that rank, and not those of the file.
    fitted = ["--repair", "true", "--data.files", text, "--data.block_size", 32]
    small = ["export", "--checkpoint_dir", out_dir, "--subnetwork.intermediate_size", 36]
    assert nas(*small, *fitted, "--lora_r", 2, "--out_dir", tmp_path / "fitted") == 0
    assert nas("export", "--checkpoint_dir", tmp_path / "2", *small[3:], *fitted,
               "--out_dir", tmp_path / "expected") == 0  # fmt: skip
    expected = weights(tmp_path / "expected")
    for name, tensor in weights(tmp_path / "fitted").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
    capsys.readouterr()
    shutil.rmtree(tmp_path / "4")
    for wrong, words in ((0, "--lora_r 0"), (5, "at most the trained 4")):
        assert nas(*export, "--out_dir", tmp_path / "no", "--lora_r", wrong) == 2
        assert words in capsys.readouterr().err
    torch.save({n: t * 1.5 for n, t in base.items()}, checkpoint_dir / "lit_model.pth")
    assert nas(*export, "--out_dir", tmp_path / "no", "--lora_r", 2) == 2
    assert "is not what" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_what_has_no_ranks_is_refused(tmp_path, checkpoint_dir, text, capsys):
    out = ["--checkpoint_dir", checkpoint_dir, "--out_dir", tmp_path / "no"]
    learn = ["finetune", *out, "--data.files", text, "--lora.ranks", "[8]"]
    alone = [*learn, "--lora.r", 8, "--subnetworks", tmp_path / "picks.yaml"]
    (tmp_path / "picks.yaml").write_text("[{n_layer: 2}]")
    for words, needle in (
        (["export", *out, "--format", "peft", "--subnetwork.n_layer", 3], "no adapters"),
        ([*learn, "--lora.r", 4], "at most r=4"),
        (alone, "lora.ranks"),
    ):
        assert nas(*words) == 2
        assert needle in capsys.readouterr().err


@pytest.mark.slow
def test_zeros_of_nas_prune_stay_through_the_merge(tmp_path, checkpoint_dir, text, capsys):
    prune = ["prune", "--checkpoint_dir", checkpoint_dir, "--method", "magnitude"]
    assert nas(*prune, "--sparsity", 0.5, "--out_dir", tmp_path / "sparse") == 0
    assert train(tmp_path / "sparse", tmp_path / "filled", text) == 0
    assert "--keep_zeros true keeps them" in capsys.readouterr().err
    assert train(tmp_path / "sparse", tmp_path / "kept", text, "--keep_zeros", "true") == 0
    assert "--keep_zeros" not in capsys.readouterr().err
    before, filled, kept = (weights(tmp_path / name) for name in ("sparse", "filled", "kept"))
    for name, tensor in before.items():
        assert torch.equal(kept[name] == 0, tensor == 0), name
        if tensor.ndim == 2:
            assert not torch.equal(kept[name], tensor)
    assert any(bool(((t == 0) & (filled[n] != 0)).any()) for n, t in before.items())
    # What comes out knows of its zeros while it has them: its card, and the next training.
    assert not (tmp_path / "filled" / "prune.json").exists()
    for name, known in (("filled", False), ("kept", True)):
        export = ["export", "--checkpoint_dir", tmp_path / name, "--extreme", "largest"]
        assert nas(*export, "--out_dir", tmp_path / f"{name}-out") == 0
        card = (tmp_path / f"{name}-out" / "README.md").read_text()
        assert ("today's engines do not speed them up" in card) == known
        assert ("compressed with `nas prune`: magnitude, sparsity 0.5" in card) == known
        capsys.readouterr()
        assert train(tmp_path / name, tmp_path / f"{name}-again", text) == 0
        assert ("--keep_zeros true keeps them" in capsys.readouterr().err) == known
    # A dense checkpoint is trained as without the option, to the last bit.
    assert train(checkpoint_dir, tmp_path / "plain", text) == 0
    assert train(checkpoint_dir, tmp_path / "option", text, "--keep_zeros", "true") == 0
    assert "--keep_zeros" not in capsys.readouterr().err
    plain, option = weights(tmp_path / "plain"), weights(tmp_path / "option")
    assert all(torch.equal(tensor, option[name]) for name, tensor in plain.items())


@pytest.mark.slow
@pytest.mark.parametrize("lora", [[], ["--lora.key", "false", "--lora.embedding", "false"]])
def test_peft_adds_what_is_merged(tmp_path, checkpoint_dir, text, lora):
    """Of a smaller sub-network at a smaller rank, in transformers."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert train(checkpoint_dir, tmp_path / "out", text, "--lora.ranks", "[2]", *lora) == 0
    sub = [
        "--subnetwork.n_layer",
        2,
        "--subnetwork.n_embd",
        40,
        "--subnetwork.intermediate_size",
        50,
    ]
    base = ["export", *sub, "--checkpoint_dir", checkpoint_dir, "--format", "hf"]
    assert nas(*base, "--out_dir", tmp_path / "base") == 0
    export = ["export", *sub, "--checkpoint_dir", tmp_path / "out", "--lora_r", 2]
    assert nas(*export, "--format", "peft", "--out_dir", tmp_path / "peft") == 0
    assert nas(*export, "--format", "hf", "--out_dir", tmp_path / "merged") == 0
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["r"] == 2
    idx = torch.randint(90, (2, 9))
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        before = plain(idx).logits
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(idx).logits
        found = PeftModel.from_pretrained(plain, tmp_path / "peft").eval()(idx).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (before - expected).abs().max() > 1e-2
