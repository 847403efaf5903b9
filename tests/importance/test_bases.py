"""Which bases: against eigenvectors and best approximations computed another way."""

import pytest
import torch
from litgpt import GPT

from tests.conftest import fill_random, tiny_config
from whittle_nas.errors import ConfigError
from whittle_nas.importance.bases import Covariances, choose_rotation, value_bases
from whittle_nas.importance.options import Basis, Criterion
from whittle_nas.importance.pipeline import MeasureOptions, measure
from whittle_nas.importance.statistics import collect


def inputs_of(model: GPT, modules: list[str], ids: torch.Tensor) -> list[torch.Tensor]:
    """What enters each module, (tokens, C)."""
    kept: dict[str, torch.Tensor] = {}
    for name in modules:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _m, inputs, name=name: kept.update({name: inputs[0].flatten(0, -2)})
        )
    with torch.no_grad():
        model(ids)
    return [kept[name].double() for name in modules]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_stream_is_turned_to_its_principal_directions(batch_size):
    config = tiny_config("Llama-3.1-8B")
    model = fill_random(GPT(config)).eval()
    tokens = torch.randint(0, 96, (16, 41))
    options = MeasureOptions(basis=Basis.rotation, batch_size=batch_size)
    measured = measure(model, tokens, options)
    norms = [f"transformer.h.{n}.{norm}" for n in range(3) for norm in ("norm_1", "norm_2")]
    streams = inputs_of(model, [*norms, "transformer.ln_f"], tokens[:, :-1])
    # of every norm the outputs without its scale; all have the same trace
    units = torch.cat([x / x.square().mean(1, keepdim=True).sqrt() for x in streams])
    _, sizes, rows = torch.linalg.svd(units, full_matrices=False)
    found = measured.bases.embd
    assert isinstance(found, torch.Tensor)
    torch.testing.assert_close((rows @ found.double().mT).abs(), torch.eye(48).double(), atol=1e-3,
                               rtol=0)  # fmt: skip
    shares = (sizes**2 / (sizes**2).sum()).float()
    torch.testing.assert_close(measured.scores.embd, shares, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["Llama-3.1-8B", "pythia-160m", "falcon-7b"])
def test_the_first_value_channels_write_the_best_approximation(family):
    config = tiny_config(family)
    model = fill_random(GPT(config)).requires_grad_(False).eval()
    tokens = torch.randint(0, 96, (8, 40))
    found = Covariances(config, stream=False, device=torch.device("cpu"))
    collect(model, tokens, covariances=found)
    groups, size = config.n_query_groups, config.head_size
    (heads,) = inputs_of(model, ["transformer.h.1.attn.proj"], tokens)
    attention = model.transformer.h[1].attn
    matrices, sizes = value_bases(
        found.values[1], attention.qkv.weight, attention.proj.weight, config
    )
    columns = attention.proj.weight.double().unflatten(1, (groups, -1, size))  # (D, G, Q, K)
    for group in range(groups):
        y = heads.unflatten(1, (groups, -1, size))[:, group].flatten(0, 1)  # (tokens * Q, K)
        torch.testing.assert_close(found.values[1][group], y.mT @ y, rtol=1e-4, atol=1e-4)
        o = columns[:, group].transpose(0, 1).flatten(0, 1)  # (Q * D, K)
        written = y @ o.mT
        for k in (1, size // 2, size):
            a, b = matrices[group], torch.linalg.inv(matrices[group])
            error = (written - y @ a[:k].mT @ (o @ b[:, :k]).mT).norm()
            best = torch.linalg.svdvals(written)[k:].norm()
            assert error <= 1.001 * best + 1e-3 * written.norm()
        assert (sizes[group].diff() <= 0).all()
        torch.testing.assert_close(sizes[group][0], torch.linalg.svdvals(written)[0], rtol=0.01,
                                   atol=0)  # fmt: skip
        rows = (
            a @ attention.qkv.weight[-groups * size :].double().unflatten(0, (groups, size))[group]
        )
        torch.testing.assert_close(rows.norm(dim=1), (o @ b).norm(dim=0))


def test_a_dead_group_keeps_its_outputs():
    config = tiny_config("Llama-3.1-8B")
    model = fill_random(GPT(config)).eval()
    with torch.no_grad():
        model.transformer.h[0].attn.qkv.weight[-16:] = 0
    measured = measure(model, torch.randint(0, 96, (4, 33)), MeasureOptions())
    values = measured.bases.layers[0].value_channels
    assert isinstance(values, torch.Tensor)
    assert values.isfinite().all()
    assert torch.linalg.cond(values).max() < 1e4


REFUSED = {
    "pythia-160m": "LayerNorms",
    "Gemma-2-2b": "norms after",
    "OLMo-2-1124-7B": "norms after",
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_rotation_that_changes_the_model_is_refused(family):
    config = tiny_config(family)
    some = {"tied": False, "num_tokens": 10**6}
    with pytest.raises(ConfigError, match=f"--basis rotation: .*{REFUSED[family]}"):
        choose_rotation(Basis.rotation, config, **some)
    rotated, why = choose_rotation(Basis.auto, config, **some)
    assert not rotated
    assert REFUSED[family] in why
    assert choose_rotation(Basis.permutation, config, **some) == (False, "")


def test_too_little_text():
    config = tiny_config("Llama-3.1-8B")
    with pytest.raises(ConfigError, match=r"at least 10 \* n_embd = 480 .* these are 479"):
        choose_rotation(Basis.rotation, config, tied=False, num_tokens=479)
    assert choose_rotation(Basis.auto, config, tied=False, num_tokens=479)[0] is False
    assert choose_rotation(Basis.auto, config, tied=False, num_tokens=480) == (True, "")


def test_a_tied_head_is_weighed():
    large = tiny_config("Llama-3.2-1B", padded_vocab_size=512)
    small = tiny_config("Llama-3.2-1B")
    some = {"tied": True, "num_tokens": 10**6}
    rotated, why = choose_rotation(Basis.auto, large, **some)
    assert not rotated
    assert "unties the head" in why
    rotated, why = choose_rotation(Basis.rotation, large, **some)
    assert rotated
    assert "24,576 parameters more" in why
    assert choose_rotation(Basis.auto, small, **some)[0]
    assert not choose_rotation(Basis.auto, small, criterion=Criterion.magnitude, **some)[0]
