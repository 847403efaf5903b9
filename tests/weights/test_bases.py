"""Changes of basis against the formulas written out, and against the outputs of the model."""

import copy
from dataclasses import replace

import pytest
import torch
from litgpt import GPT

from tests.conftest import FAMILIES, fill_random, resized, tiny_config
from whittle_nas.importance.scores import Scores, rank
from whittle_nas.importance.sorting import SortedTensors
from whittle_nas.space import SubNetwork
from whittle_nas.weights import axes
from whittle_nas.weights.bases import Bases, compose, rotates_exactly, transform
from whittle_nas.weights.supernet import SuperNetwork

# pre-norm RMSNorm: everything else keeps its order of channels
ROTATING = {
    "Llama-2-7b-hf", "Llama-3.1-8B", "Llama-3.2-1B", "Phi-3-mini-4k-instruct", "Gemma-2b",
    "Qwen2.5-0.5B", "Qwen3-0.6B", "Mistral-7B-v0.1", "SmolLM2-135M", "tiny-llama-1.1b",
}  # fmt: skip


def random_bases(config, seed: int = 0, *, matrices: bool = True) -> Bases:
    """Any exact change of basis: random orders everywhere, and random matrices."""
    draw = torch.Generator().manual_seed(seed)
    groups, size = config.n_query_groups, config.head_size
    shape = (config.n_layer, groups)
    scores = Scores(
        embd=torch.rand(config.n_embd, generator=draw),
        neurons=torch.rand(config.n_layer, config.intermediate_size, generator=draw),
        groups=torch.rand(shape, generator=draw),
        heads=torch.rand(*shape, config.n_head // groups, generator=draw),
        value_channels=torch.rand(*shape, size, generator=draw),
        qk_channels=torch.rand(*shape, size - config.rope_n_elem, generator=draw),
        block_importance=torch.rand(config.n_layer, generator=draw),
    )
    bases = rank(scores, config)
    if not matrices:
        return bases
    layers = []
    for basis in bases.layers:
        turns = torch.linalg.qr(torch.randn(groups, size, size, generator=draw)).Q
        values = turns * (0.5 + torch.rand(groups, 1, size, generator=draw))
        layers.append(replace(basis, value_channels=values))
    embd = torch.randn(config.n_embd, config.n_embd, generator=draw, dtype=torch.float64)
    rotation = torch.linalg.qr(embd).Q.float()
    return Bases(rotation if rotates_exactly(config) else bases.embd, layers)


def moved(model: GPT, bases: Bases) -> GPT:
    """A model in another basis, with the number format of the first."""
    other = GPT(model.config).to(model.lm_head.weight.dtype)
    other.load_state_dict(dict(SortedTensors(model.state_dict, bases, model.config)))
    return other.eval()


def test_which_families_rotate():
    rotating = {family for family in FAMILIES if rotates_exactly(tiny_config(family))}
    assert rotating == ROTATING


def test_logits_stay_and_rounding_costs_little_more(tiny_gpt):
    config = tiny_gpt.config
    bases = random_bases(config)
    ids = torch.randint(0, config.padded_vocab_size, (4, 20))
    rounded = copy.deepcopy(tiny_gpt).to(torch.bfloat16)
    with torch.no_grad():
        logits = tiny_gpt(ids)
        assert (moved(tiny_gpt, bases)(ids) - logits).abs().max() <= 1e-5 * logits.abs().max()
        error = (rounded(ids).float() - logits).abs().mean()
        new = moved(rounded, bases)
        assert new.lm_head.weight.dtype is torch.bfloat16
        assert (new(ids).float() - logits).abs().mean() <= 2 * error


def test_a_rotation_is_what_the_formulas_say():
    """Scales folded, readers times Q, Q^T times writers and their biases, A and A^-1 on values."""
    config = tiny_config("Qwen2.5-0.5B", bias=True, n_layer=2)
    model, bases = fill_random(GPT(config)), random_bases(config)
    embd = bases.embd
    assert isinstance(embd, torch.Tensor)
    q = embd.mT
    old = model.state_dict()
    new = {name: transform(name, old, bases, config) for name in old}

    def close(name, wanted):
        torch.testing.assert_close(new[name], wanted, rtol=1e-4, atol=1e-5, msg=name)

    groups, size, per_group = config.n_query_groups, config.head_size, 2
    close("transformer.wte.weight", old["transformer.wte.weight"] @ q)
    close("lm_head.weight", old["lm_head.weight"] * old["transformer.ln_f.weight"] @ q)
    for n, basis in enumerate(bases.layers):
        h = f"transformer.h.{n}."
        for norm in ("norm_1", "norm_2"):
            close(f"{h}{norm}.weight", torch.ones(config.n_embd))
        neurons = list(basis.neurons)
        for part in ("fc_1", "fc_2"):
            weight = old[f"{h}mlp.{part}.weight"] * old[f"{h}norm_2.weight"]
            close(f"{h}mlp.{part}.weight", weight[neurons] @ q)
            close(f"{h}mlp.{part}.bias", old[f"{h}mlp.{part}.bias"][neurons])
        close(f"{h}mlp.proj.weight", (q.mT @ old[f"{h}mlp.proj.weight"])[:, neurons])
        close(f"{h}mlp.proj.bias", q.mT @ old[f"{h}mlp.proj.bias"])
        close(f"{h}attn.proj.bias", q.mT @ old[f"{h}attn.proj.bias"])
        weight = (old[f"{h}attn.qkv.weight"] * old[f"{h}norm_1.weight"]) @ q
        bias = old[f"{h}attn.qkv.bias"]
        start = (config.n_head + groups) * size
        columns = q.mT @ old[f"{h}attn.proj.weight"]
        for at, group in enumerate(basis.groups):
            a = basis.value_channels[group]
            rows = slice(start + group * size, start + (group + 1) * size)
            wanted = torch.cat([a @ weight[rows], (a @ bias[rows])[:, None]], 1)
            put = slice(start + at * size, start + (at + 1) * size)
            found = torch.cat(
                [new[f"{h}attn.qkv.weight"][put], new[f"{h}attn.qkv.bias"][put, None]], 1
            )
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
            for slot, head in enumerate(basis.heads[group]):
                was = (group * per_group + head) * size
                now = (at * per_group + slot) * size
                block = columns[:, was : was + size] @ torch.linalg.inv(a)
                torch.testing.assert_close(
                    new[f"{h}attn.proj.weight"][:, now : now + size], block, rtol=1e-3, atol=1e-4
                )


@pytest.mark.parametrize("kinds", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("family", ["Llama-3.1-8B", "pythia-160m"])
def test_matrices_and_orders_compose(family, kinds):
    config = tiny_config(family)
    first, then = (random_bases(config, n, matrices=kind) for n, kind in enumerate(kinds))
    model = fill_random(GPT(config))
    twice = SortedTensors(lambda: SortedTensors(model.state_dict, first, config), then, config)
    once = SortedTensors(model.state_dict, compose(first, then), config)
    for name in model.state_dict():
        torch.testing.assert_close(twice[name], once[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", sorted(ROTATING))
def test_sub_networks_of_a_rotated_model_are_ordinary_models(family):
    """Sliced as stand-alone; the norms that were folded keep nothing but ones (Gemma: zeros)."""
    config = tiny_config(family)
    supernet = SuperNetwork(moved(fill_random(GPT(config)), random_bases(config)))
    whole = SubNetwork.from_config(config)
    sub = resized(whole, n_embd=31, intermediate_size=17, n_layer=2)
    ids = torch.randint(0, config.padded_vocab_size, (2, 12))
    torch.testing.assert_close(supernet.standalone(sub)(ids), supernet.subnet(sub)(ids))
    scale = 0.0 if family == "Gemma-2b" else 1.0
    for name in axes.norms(config):
        assert (supernet.model.get_parameter(name) == scale).all()
