"""`nas prune` from end to end on a small model."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml

from tests.cli.test_main import nas
from tests.conftest import first_of
from whittle_nas.candidates.parts import ATTENTION, with_sizes
from whittle_nas.prune import blockwise
from whittle_nas.prune.options import WITHOUT_DATA, Method
from whittle_nas.space import SubNetwork
from whittle_nas.space.front import read_front
from whittle_nas.weights.checkpoint import load_supernet, open_checkpoint

TEXT = "The quick brown fox jumps over the lazy dog and asks why it was so lazy today. " * 60


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def run(checkpoint_dir, out_dir, text, *options):
    data = ("--data.files", text, "--data.num_blocks", 4, "--data.block_size", 32)
    words = ("prune", "--checkpoint_dir", checkpoint_dir, "--out_dir", out_dir, *data, *options)
    return nas(*words)


def report(out_dir):
    return json.loads((out_dir / "prune.json").read_text())


def matrices(out_dir):
    tensors = open_checkpoint(out_dir).state_dict()
    return {n: t for n, t in tensors.items() if n.startswith("transformer.h") and t.dim() == 2}


def copied(checkpoint_dir):
    return {n: t.clone() for n, t in open_checkpoint(checkpoint_dir).state_dict().items()}


def rewrite(checkpoint_dir, tensors):
    (checkpoint_dir / "lit_model.pth").unlink()  # it may still be mapped
    torch.save(tensors, checkpoint_dir / "lit_model.pth")


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_masks_are_written_and_counted(method, checkpoint_dir, tmp_path, text):
    out = tmp_path / "out"
    assert run(checkpoint_dir, out, text, "--method", method, "--sparsity", "2:4") == 0
    for weight in matrices(out).values():
        assert ((weight.unflatten(1, (-1, 4)) != 0).sum(-1) == 2).all()
    found = report(out)
    stored = open_checkpoint(out).state_dict()
    body = sum(int(t.count_nonzero()) for n, t in stored.items() if n.startswith("transformer.h."))
    ends = sum(t.numel() for n, t in stored.items() if not n.startswith("transformer.h."))
    assert found["bytes"] == 2 * (body + ends)
    assert (method == "sparsegpt") == bool(found["errors"])
    for error in found["errors"].values():
        assert error["output_error"] < error["plain_output_error"]
    assert yaml.safe_load((out / "run.yaml").read_text())["method"] == method
    documented = (Path(__file__).parents[2] / "docs" / "files.md").read_text()
    keys = {*found, *found["data"]}.union(*found["errors"].values())
    assert not {key for key in keys if f"`{key}`" not in documented}


def test_model_cards_say_that_zeros_bring_no_speed(checkpoint_dir, tmp_path, text):
    options = ("--method", "magnitude", "--sparsity", "2:4")
    assert run(checkpoint_dir, tmp_path / "out", text, *options) == 0
    assert nas("export", "--checkpoint_dir", tmp_path / "out", "--out_dir", tmp_path / "x") == 0
    card = (tmp_path / "x" / "README.md").read_text()
    assert "It was compressed with `nas prune`: magnitude, sparsity 2:4." in card
    assert "zeros included: today's engines do not speed them up" in card


def test_quantised_weights_are_integers_times_the_scales_beside_them(
    checkpoint_dir, tmp_path, text
):
    from safetensors.torch import load_file

    out = tmp_path / "out"
    options = ("--method", "gptq", "--bits", 3, "--group_size", 8, "--symmetric", "false")
    assert run(checkpoint_dir, out, text, *options) == 0
    grids = load_file(out / "quantization.safetensors")
    for name, weight in matrices(out).items():
        scale = grids[f"{name}.scales"].unsqueeze(-1)
        levels = weight.unflatten(1, (-1, 8)) / scale + grids[f"{name}.zeros"].unsqueeze(-1)
        assert ((levels - levels.round()).abs() < 1e-2).all()
        assert levels.round().min() >= -4
        assert levels.round().max() <= 3
    found = report(out)
    for error in found["errors"].values():
        assert error["output_error"] < error["plain_output_error"]
    stored = open_checkpoint(out).state_dict()
    inner = sum(t.numel() for t in matrices(out).values())
    assert (
        found["bytes"] == (3 * inner + 16 * (sum(t.numel() for t in stored.values()) - inner)) / 8
    )


def interrupted_once(monkeypatch) -> list:
    """Ctrl-C in the third layer, the first time; the layers that are compressed."""
    made, compress = [], blockwise.compress_block

    def dying(*args, layer, **kwargs):
        if layer == 2 and len(made) < 3:
            raise KeyboardInterrupt
        made.append(layer)
        return compress(*args, layer=layer, **kwargs)

    monkeypatch.setattr(blockwise, "compress_block", dying)
    return made


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_blocks_that_it_had(
    checkpoint_dir, tmp_path, text, monkeypatch
):
    options = ("--method", "sparsegpt", "--sparsity", "0.5")
    assert run(checkpoint_dir, tmp_path / "whole", text, *options) == 0
    made = interrupted_once(monkeypatch)
    assert run(checkpoint_dir, tmp_path / "out", text, *options) == 130
    assert not (tmp_path / "out").exists()
    made.append("again")
    assert run(checkpoint_dir, tmp_path / "out", text, *options) == 0
    assert made == [0, 1, "again", 2]
    for name, weight in matrices(tmp_path / "whole").items():
        assert torch.equal(weight, matrices(tmp_path / "out")[name])
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.slow
def test_blocks_of_another_dtype_are_made_again(checkpoint_dir, tmp_path, text, monkeypatch):
    options = ("--method", "wanda", "--sparsity", "0.5", "--dtype")
    made = interrupted_once(monkeypatch)
    assert run(checkpoint_dir, tmp_path / "out", text, *options, "bfloat16") == 130
    made.append("again")
    assert run(checkpoint_dir, tmp_path / "out", text, *options, "float32") == 0
    assert made == [0, 1, "again", 0, 1, 2]
    assert report(tmp_path / "out")["dtype"] == "float32"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sparsegpt", "rtn", "gptq"])
def test_checkpoints_that_are_filled_up_with_zeros_are_compressed(
    method, checkpoint_dir, tmp_path, text
):
    whole = SubNetwork.from_config(open_checkpoint(checkpoint_dir).config)
    blocks = [whole.blocks[0], with_sizes(whole.blocks[1], ATTENTION, (0, 0, 0)), whole.blocks[2]]
    sub = SubNetwork(whole.n_embd, tuple(blocks)).to_dict()
    (tmp_path / "one.yaml").write_text(yaml.safe_dump([{"name": "one", **sub}]))
    words = ("--subnetworks", tmp_path / "one.yaml", "--pad", "true", "--out_dir", tmp_path / "in")
    assert nas("export", "--checkpoint_dir", checkpoint_dir, *words) == 0
    assert not matrices(tmp_path / "in")["transformer.h.1.attn.proj.weight"].any()
    options = ("--sparsity", "0.5") if method == "sparsegpt" else ("--group_size", 8)
    assert run(tmp_path / "in", tmp_path / "out", text, "--method", method, *options) == 0
    errors = report(tmp_path / "out")["errors"]
    assert method == "rtn" or set(errors["transformer.h.1.attn.proj"].values()) == {0}


def test_blocks_see_the_compressed_ones_before_them_or_not(checkpoint_dir, tmp_path, text):
    options = ("--method", "wanda", "--sparsity", "0.5")
    assert run(checkpoint_dir, tmp_path / "a", text, *options) == 0
    assert run(checkpoint_dir, tmp_path / "b", text, *options, "--sequential", "false") == 0
    a, b = matrices(tmp_path / "a"), matrices(tmp_path / "b")
    first = [name for name in a if name.startswith("transformer.h.0.")]
    assert all(torch.equal(a[name], b[name]) for name in first)
    assert not all(torch.equal(a[name], b[name]) for name in a)
    assert [report(tmp_path / name)["sequential"] for name in "ab"] == [True, False]


def test_a_tied_head_stays_tied(checkpoint_dir, tmp_path, text):
    tensors = copied(checkpoint_dir)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    rewrite(checkpoint_dir, tensors)
    assert run(checkpoint_dir, tmp_path / "out", text, "--method", "rtn", "--group_size", 8) == 0
    found = open_checkpoint(tmp_path / "out").state_dict()
    assert found["lm_head.weight"].data_ptr() == found["transformer.wte.weight"].data_ptr()


SMALLER = {
    "shortgpt": (),
    "shortened_llama": (),
    "shortened_llama_taylor": ("--protect_first", 1, "--protect_last", 1),
    "laco": ("--laco.threshold", -1, "--laco.merge_layers", 2),
    "laco_notebook": ("--laco.threshold", -1, "--laco.merge_layers", 2),
    "llm_pruner": ("--protect_first", 1, "--protect_last", 0),
    "flap": (),
    "minitron": (),
    "slicegpt": (),
    "slicegpt_global": (),
}


@pytest.mark.parametrize("method", first_of(SMALLER))
def test_smaller_models_are_ordinary_checkpoints(method, checkpoint_dir, tmp_path, text):
    out = tmp_path / "out"
    options = ("--method", method, "--sparsity", "0.3", *SMALLER[method])
    assert run(checkpoint_dir, out, text, *options) == 0
    found = report(out)
    model = load_supernet(out).model
    logits = model(torch.arange(8)[None])
    if method in ("llm_pruner", "flap"):  # without the zeros it is the same
        supernet = load_supernet(out)
        entry = read_front(out / "front.json", supernet.info.layer_order).entries[0]
        model = supernet.standalone(entry.subnetwork)
        torch.testing.assert_close(model(torch.arange(8)[None]), logits, atol=1e-4, rtol=1e-4)
    assert found["num_params"] == sum(p.numel() for p in model.parameters())
    assert found["bytes"] < found["bytes_before"]
    assert found["sequential"] is None
    assert logits.isfinite().all()
    documented = (Path(__file__).parents[2] / "docs" / "files.md").read_text()
    assert not {key for key in found if f"`{key}`" not in documented}


@pytest.mark.slow
def test_shortcut_matrices_run_in_evaluate_and_profile_only(checkpoint_dir, tmp_path, text, capsys):
    out = tmp_path / "out"
    assert run(checkpoint_dir, out, text, "--method", "slicegpt", "--sparsity", "0.3") == 0
    data = ("--data.files", text, "--data.num_blocks", 2, "--data.block_size", 32)
    there = ("--checkpoint_dir", out, "--out_dir")
    assert nas("evaluate", *there, tmp_path / "e", *data) == 0
    assert nas("profile", *there, tmp_path / "p", "--tokens", 8, "--repeats", 1) == 0
    capsys.readouterr()
    assert nas("export", *there, tmp_path / "x") == 2
    assert "has the shortcut matrices of slicegpt, which no other engine" in capsys.readouterr().err


LACO = ("--method", "laco", "--sparsity", "0.6")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--method", "wanda"), "--method wanda needs --sparsity"),
        (("--method", "wanda", "--sparsity", "1.5"), "--sparsity 1.5 must be a share"),
        (("--method", "gptq", "--bits", "5"), "--bits 5 must be 3, 4 or 8"),
        (("--method", "gptq", "--sparsity", "0.5"), "--sparsity 0.5 has no meaning for gptq"),
        (("--method", "rtn"), "--group_size 128 does not divide the 48 columns of attn.qkv"),
        (("--method", "shortgpt", "--sparsity", "2:4"), "shortgpt must be a share"),
        (("--method", "shortgpt", "--sparsity", "0.1"), "0.1 of 3 layers is 0 layers"),
        ((*LACO, "--laco.merge_layers", 2, "--laco.threshold", 1), "lets only 0 of the 2 layers"),
        (LACO, "--laco.merge_layers 4 must be from 2 to 2"),
        (("--method", "flap", "--sparsity", "0.5", "--subnetwork.n_embd", "8"), "--subnetwork is"),
        (
            ("--method", "flap", "--sparsity", "0.5", "--sequential", "true"),
            "--sequential true has",
        ),
        (
            ("--method", "slicegpt", "--sparsity", "0.5", "--sequential", "false"),
            "--sequential false has no meaning for slicegpt; it is an option of wanda, sparsegpt "
            "and gptq",
        ),
    ],
)
def test_wrong_options_are_one_sentence(options, sentence, checkpoint_dir, tmp_path, text, capsys):
    assert run(checkpoint_dir, tmp_path / "out", text, *options) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_sparse_models_are_refused(checkpoint_dir, tmp_path, text, capsys):
    assert (
        run(checkpoint_dir, tmp_path / "a", text, "--method", "magnitude", "--sparsity", "0.5") == 0
    )
    assert run(tmp_path / "a", tmp_path / "b", text, "--method", "wanda", "--sparsity", "0.5") == 2
    assert "50 % of transformer.h.0.attn.qkv.weight is zero already" in capsys.readouterr().err


def overflowing(checkpoint_dir, where):
    """Finite weights, but an activation that is infinite, or NaN, from one place on."""
    tensors = copied(checkpoint_dir)
    factors = {
        "neurons": {"1.mlp.fc_1": 1e20, "1.mlp.fc_2": 1e20},
        "attention": {"1.attn.qkv": 1e30},
        "last": {"2.mlp.fc_1": 1e5, "2.mlp.fc_2": 1e5, "2.mlp.proj": 1e30},
    }
    for name, factor in factors[where].items():
        tensors[f"transformer.h.{name}.weight"] *= factor
    rewrite(checkpoint_dir, tensors)


OVERFLOWS = {  # where -> what a sentence may name
    "neurons": ("transformer.h.1.mlp",),
    "attention": ("transformer.h.1.attn",),
    "last": ("transformer.h.2", "transformer.ln_f"),
}


CALIBRATED = [method.value for method in Method if method not in WITHOUT_DATA]


@pytest.mark.parametrize(("how", "where"), first_of(product(CALIBRATED, OVERFLOWS), every=3))
def test_models_that_overflow_are_one_sentence_with_the_place(
    how, where, checkpoint_dir, tmp_path, text, capsys
):
    overflowing(checkpoint_dir, where)
    options = ("--group_size", 8) if how == "gptq" else ("--sparsity", "0.4")
    options = ("--method", how, *options, *SMALLER.get(how, ()))
    assert run(checkpoint_dir, tmp_path / "out", text, *options) == 2
    error = capsys.readouterr().err
    assert any(place in error for place in OVERFLOWS[where])
    assert error.count("\n") == 1
    assert "not finite" in error
    assert "parameter" not in error
    assert not (tmp_path / "out").exists()
