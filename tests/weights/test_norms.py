"""Width-aware norms: the formula, and that every way of running a sub-network has the factors."""

from dataclasses import replace

import pytest
import torch
from litgpt import GPT

from tests.conftest import FAMILIES, fill_random, tiny_config, uniform
from whittle_nas.errors import ConfigError
from whittle_nas.importance.narrowing import narrowed_stream
from whittle_nas.importance.statistics import norm_shares
from whittle_nas.space import SubNetwork
from whittle_nas.weights import axes
from whittle_nas.weights.info import SupernetInfo
from whittle_nas.weights.norms import NormTable, scales_norms
from whittle_nas.weights.supernet import SuperNetwork

RMS = [family for family in FAMILIES if scales_norms(tiny_config(family))]


def scaled(model: GPT) -> SuperNetwork:
    """A super-network whose norms have factors, of random shares."""
    shares = torch.rand(len(axes.norms(model.config)), model.config.n_embd) + 0.5
    info = SupernetInfo.default(model.config)
    return SuperNetwork(model, replace(info, norms=NormTable.of(shares, model.config)))


@pytest.mark.parametrize("family", ["Llama-3.1-8B", "OLMo-2-1124-7B", "Gemma-2-2b"])
def test_shares_are_means_over_tokens(family):
    model = fill_random(GPT(tiny_config(family))).eval()
    tokens = torch.randint(0, 96, (5, 9))
    found = norm_shares(model, tokens, batch_size=2)
    names = axes.norms(model.config)
    for row, name in ((0, names[0]), (3, names[3]), (len(names) - 1, "transformer.ln_f.weight")):
        kept = []
        norm = model.get_submodule(name.removesuffix(".weight"))
        handle = norm.register_forward_pre_hook(lambda _m, x, kept=kept: kept.append(x[0]))
        with torch.no_grad():
            model(tokens)
        handle.remove()
        x = kept[0].flatten(0, 1)
        for k in (1, 17, 48):
            share = (x[:, :k].norm(dim=1) / x.norm(dim=1)).mean()
            torch.testing.assert_close(found[row, k - 1], share, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", RMS)
def test_narrow_norms_are_scaled_and_whole_ones_are_not(family):
    config = tiny_config(family)
    supernet = scaled(fill_random(GPT(config)).requires_grad_(False).eval())
    table = supernet.info.norms
    assert table is not None
    slices = supernet.slices(narrowed_stream(config, 0.75))
    offset = 1 if "Gemma" in config.name else 0
    for row, name in enumerate(axes.norms(config)):
        factor = (48 / 36) ** 0.5 * table.shares[row, 35]
        wanted = factor * (offset + supernet.model.get_parameter(name)[:36])
        torch.testing.assert_close(offset + slices[name], wanted, msg=name)
    for name, tensor in supernet.slices(supernet.full).items():
        assert torch.equal(tensor, supernet.model.get_parameter(name)), name


@pytest.mark.parametrize("family", RMS)
def test_slices_stand_alone_and_gradients_agree(family):
    config = tiny_config(family)
    supernet = scaled(fill_random(GPT(config)).eval())
    sub = narrowed_stream(config, 0.5)
    ids = torch.randint(0, 96, (2, 12))
    alone = supernet.standalone(sub)
    logits = supernet.subnet(sub)(ids)
    torch.testing.assert_close(logits, alone(ids), rtol=0, atol=1e-5)
    plain = SuperNetwork(supernet.model).subnet(sub)(ids)
    assert not torch.allclose(plain, logits, atol=1e-3)
    logits.square().mean().backward()
    weight = supernet.model.transformer.ln_f.weight
    fresh = alone.requires_grad_(True)
    fresh(ids).square().mean().backward()
    factor = (48 / 24) ** 0.5 * supernet.info.norms.shares[-1, 23]
    torch.testing.assert_close(
        weight.grad[:24], factor * fresh.transformer.ln_f.weight.grad, rtol=1e-3, atol=1e-6
    )


def test_a_table_that_does_not_fit_is_refused(tmp_path):
    config = tiny_config("Llama-3.1-8B")
    with pytest.raises(
        ConfigError, match=r"importance.safetensors must hold the table norm_shares"
    ):
        NormTable.read(tmp_path, config)
    from safetensors.torch import save_file

    save_file({"norm_shares": torch.ones(2, 48)}, tmp_path / "importance.safetensors")
    with pytest.raises(ConfigError, match=r"shape \(2, 48\) must be finite and of shape \(7, 48\)"):
        NormTable.read(tmp_path, config)


@pytest.mark.parametrize("family", RMS)
def test_a_slice_of_a_slice_is_the_slice(family):
    """What a cascade relies on: norm factors, layers, groups and rotary pairs are those at once."""
    config = tiny_config(family)
    whole = scaled(fill_random(GPT(config)).requires_grad_(False).eval())
    whole = SuperNetwork(whole.model, replace(whole.info, layer_order=(2, 0, 1)))
    heads, groups, size = config.n_head, config.n_query_groups, config.head_size
    larger = uniform(40, heads, groups, size // 2, 60, 2, order=(2, 0, 1))
    smaller = uniform(
        24, max(1, heads // 2), max(1, groups // 2), size // 4, 36, 1, order=(2, 0, 1)
    )
    inside = smaller.within(larger)
    assert inside is not None
    assert inside.layers == (1,)  # layer 2 of the whole
    plan = whole.plan(larger)
    between = SuperNetwork(whole.standalone(larger), plan.info_of(whole.info))
    assert between.info.layer_order == (1, 0)
    wanted = whole.slices(smaller)
    for name, tensor in between.slices(inside).items():
        torch.testing.assert_close(tensor, wanted[name], msg=name)


def test_what_is_no_part():
    larger = uniform(40, 4, 2, 8, 60, 2)
    assert larger.within(larger) == SubNetwork(40, larger.blocks[:2])
    for other in (
        uniform(48, 4, 2, 8, 60, 2),  # wider
        uniform(40, 4, 2, 8, 61, 1),  # more neurons
        uniform(40, 4, 1, 8, 60, 2),  # more heads in its group
        uniform(40, 4, 2, 8, 60, 3),  # another layer
        uniform(40, 4, 2, 6, 60, 2),  # other rotary pairs
    ):
        assert other.within(larger) is None, other
