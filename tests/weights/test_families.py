"""Slicing against stand-alone litgpt models, for every family and for odd sizes."""

import pytest
import torch
from litgpt import GPT, Config
from litgpt import lora as litgpt_lora
from litgpt.utils import num_parameters

from tests.conftest import FAMILIES, fill_random, resized, tiny_config, uniform
from whittle_nas.errors import ConfigError
from whittle_nas.space import HeadChannels, SubNetwork
from whittle_nas.weights import axes
from whittle_nas.weights.bases import Bases, LayerBasis, transform
from whittle_nas.weights.slicing import copied, plan_slices, take, view_of
from whittle_nas.weights.supernet import SupernetInfo, SuperNetwork

LORA = {
    "lora_r": 3, "lora_alpha": 7, "lora_query": True, "lora_key": True, "lora_value": True,
    "lora_projection": True, "lora_mlp": True, "lora_head": True,
}  # fmt: skip


def odd_sizes(config: Config) -> list[SubNetwork]:
    """Half, narrow, one of everything, and smaller heads where the rotary part allows."""
    groups, size = config.n_query_groups, config.head_size
    whole = SubNetwork.from_config(config)
    sizes = [
        whole,
        uniform(24, config.n_head // 2 if groups <= config.n_head // 2 else groups // 2,
                   min(groups, config.n_head // 2), size, 36, 2),
        uniform(31, 1, 1, size, 17, 1),  # one head, one group, one layer, n_embd prime
        uniform(48, config.n_head // groups, 1, size, 72, 3),  # one group with all its heads
    ]  # fmt: skip
    for smaller in (size // 2, size // 4):
        sub = uniform(40, config.n_head, groups, smaller, 50, 2)
        try:
            plan_slices(sub, config)
        except ConfigError:
            continue
        sizes.append(sub)
    return sizes


def info_of(config: Config) -> SupernetInfo:
    """The last layer matters most, so that kept layers are not simply the first."""
    return SupernetInfo(layer_order=(2, 0, 1)[: config.n_layer])


def ids(config: Config, length: int = 12) -> torch.Tensor:
    return torch.randint(0, config.padded_vocab_size, (2, length))


def stand_alone(supernet: SuperNetwork, sub: SubNetwork, model_class: type) -> torch.nn.Module:
    """An ordinary model with its own memory, filled from the slices with strict=True."""
    model = model_class(supernet.plan(sub).config)
    slices = {name: tensor.clone() for name, tensor in supernet.slices(sub).items()}
    model.load_state_dict(slices, strict=True)
    return model.eval()


def test_sliced_run_equals_extracted_model(tiny_gpt):
    supernet = SuperNetwork(tiny_gpt, info_of(tiny_gpt.config))
    for sub in odd_sizes(tiny_gpt.config):
        x = ids(tiny_gpt.config)
        sliced = supernet.subnet(sub)(x)
        torch.testing.assert_close(stand_alone(supernet, sub, GPT)(x), sliced, rtol=0, atol=1e-5)
        torch.testing.assert_close(supernet.standalone(sub)(x), sliced, rtol=0, atol=1e-5)
        hidden = supernet.subnet(sub, hidden=True)(x)
        assert hidden.shape == (2, 12, sub.n_embd)
        torch.testing.assert_close(supernet.head(sub)(hidden), sliced, rtol=0, atol=1e-5)


def test_sliced_lora_run_equals_extracted_model(family):
    config = litgpt_lora.Config(**{**vars_of(tiny_config(family)), **LORA})
    supernet = SuperNetwork(fill_random(litgpt_lora.GPT(config)).eval(), info_of(config))
    for sub in odd_sizes(config):
        x = ids(config)
        alone = stand_alone(supernet, sub, litgpt_lora.GPT)
        torch.testing.assert_close(alone(x), supernet.subnet(sub)(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("parts", [("query",), ("key", "value"), ("query", "value", "head")])
def test_lora_on_some_parts(parts):
    lora = {"lora_r": 2, **{f"lora_{part}": True for part in parts}}
    config = litgpt_lora.Config(**{**vars_of(tiny_config("Llama-3.1-8B")), **lora})
    supernet = SuperNetwork(fill_random(litgpt_lora.GPT(config)).eval())
    for sub in odd_sizes(config):
        x = ids(config)
        alone = stand_alone(supernet, sub, litgpt_lora.GPT)
        torch.testing.assert_close(alone(x), supernet.subnet(sub)(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("parts", [("query",), ("query", "value"), ("query", "key", "value")])
def test_the_two_ways_to_take_a_slice_agree(family, parts):
    lora = {"lora_r": 2, "lora_projection": True, **{f"lora_{part}": True for part in parts}}
    config = litgpt_lora.Config(**{**vars_of(tiny_config(family)), **lora})
    model = fill_random(litgpt_lora.GPT(config)).eval()
    supernet = SuperNetwork(model, info_of(config))
    for sub in odd_sizes(config):
        plan = supernet.plan(sub)
        for name in supernet.slices(sub):
            full, cut = model.get_parameter(plan.source_name(name)), plan.cut(name)
            assert torch.equal(take(full, cut), copied(view_of(full, cut), cut)), name
        with_gradients = supernet.subnet(sub)(x := ids(config))
        with torch.no_grad():
            assert torch.equal(with_gradients, supernet.subnet(sub)(x))


def vars_of(config: Config) -> dict:
    """Arguments that make the same config again."""
    from dataclasses import fields

    return {field.name: getattr(config, field.name) for field in fields(Config)}


def test_counts_and_names_are_litgpts_own(tiny_gpt):
    config = tiny_gpt.config
    assert sorted(axes.parameter_names(config)) == sorted(tiny_gpt.state_dict())
    for name, parameter in tiny_gpt.named_parameters():
        assert axes.shape(name, config) == tuple(parameter.shape), name
    supernet = SuperNetwork(tiny_gpt, info_of(config))
    for sub in odd_sizes(config):
        own = GPT(supernet.plan(sub).config)
        assert axes.num_params(supernet.plan(sub).config) == num_parameters(own)


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "pythia-2.8b", "Gemma-2-9b", "Qwen3-8B"])
def test_counts_at_real_sizes(name):
    config = Config.from_name(name)
    with torch.device("meta"):
        assert axes.num_params(config) == num_parameters(GPT(config))


def random_orders(config: Config) -> Bases:
    """Any permutation that is allowed: rotary channels stay, shared q/k norms share an order."""
    groups, per_group, size = (
        config.n_query_groups,
        config.n_head // config.n_query_groups,
        config.head_size,
    )

    def perm(n: int) -> list[int]:
        return torch.randperm(n).tolist()

    layers = []
    for _ in range(config.n_layer):
        n = config.rope_n_elem
        unrotated = [n + i for i in perm(size - n)]
        qk = [[*range(n), *unrotated]] * groups
        layers.append(
            LayerBasis(
                neurons=perm(config.intermediate_size),
                groups=perm(groups),
                heads=[perm(per_group) for _ in range(groups)],
                qk_channels=qk,
                value_channels=[perm(size) for _ in range(groups)],
            )
        )
    return Bases(embd=perm(config.n_embd), layers=layers)


def test_permuting_leaves_logits_unchanged(tiny_gpt):
    config, x = tiny_gpt.config, ids(tiny_gpt.config)
    orders = random_orders(config)
    permuted = GPT(config)
    tensors = tiny_gpt.state_dict()
    state = {n: transform(n, tensors, orders, config) for n in tensors}
    assert any(not torch.equal(state[n], t) for n, t in tiny_gpt.state_dict().items())
    permuted.load_state_dict(state, strict=True)
    torch.testing.assert_close(permuted(x), tiny_gpt(x), rtol=1e-4, atol=1e-4)


def test_gradients_reach_exactly_the_kept_entries(tiny_gpt):
    config = tiny_gpt.config
    supernet = SuperNetwork(tiny_gpt.requires_grad_(True), info_of(config))
    for sub in odd_sizes(config):
        tiny_gpt.zero_grad()
        # A random read-out, so that no gradient vanishes by symmetry.
        logits = supernet.subnet(sub)(torch.arange(config.padded_vocab_size)[:64][None])
        (logits * torch.randn_like(logits)).sum().backward()
        plan = supernet.plan(sub)
        kept = {plan.source_name(name): name for name in axes.parameter_names(plan.config)}
        for name, parameter in tiny_gpt.named_parameters():
            if name not in kept:
                assert parameter.grad is None, name
                continue
            touched = torch.zeros_like(parameter, dtype=torch.bool)
            touched[_grid(plan.indices(kept[name]), parameter)] = True
            assert parameter.grad is not None
            assert not parameter.grad[~touched].any(), name
            if "attn.qkv.bias" in name or "norm_k" in name or sub.summary()["n_head"] == 1:
                continue  # softmax ignores a shift of all keys, and one token sees only itself
            share = (parameter.grad[touched] != 0).float().mean()
            assert share > (0.5 if "wte" in name else 0.9), (name, share)


def _grid(indices, parameter):
    entries = []
    for index, size in zip(indices, parameter.shape, strict=True):
        entries.append(
            torch.arange(size if index is None else index)
            if not isinstance(index, torch.Tensor)
            else index
        )
    return torch.meshgrid(*entries, indexing="ij")


def test_checkpointed_blocks_give_the_same_gradients():
    config = tiny_config("Llama-3.1-8B")
    model = fill_random(GPT(config))
    supernet = SuperNetwork(model, info_of(config))
    sub, x = odd_sizes(config)[1], ids(config)
    grads = []
    for recompute in (False, True):
        model.zero_grad()
        supernet.subnet(sub, checkpoint_blocks=recompute)(x).square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name])


def test_prefix_slices_are_views(tiny_gpt):
    supernet = SuperNetwork(tiny_gpt, info_of(tiny_gpt.config))
    sub = odd_sizes(tiny_gpt.config)[1]
    storages = {t.untyped_storage().data_ptr() for t in tiny_gpt.state_dict().values()}
    for name, tensor in supernet.slices(sub).items():
        if "attn.qkv" in name or "attn.proj.weight" in name or "norm_" in name:
            continue  # a gather where whole query groups stay
        assert tensor.untyped_storage().data_ptr() in storages, name


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "phi-2"])
def test_rotary_phases_of_smaller_heads_are_those_of_the_kept_pairs(family):
    config = tiny_config(family, head_size=16)
    model = GPT(config)
    supernet = SuperNetwork(model)
    kept_any = False
    for head_size in (8, 4):
        whole = SubNetwork.from_config(config)
        sub = resized(whole, head_size=head_size)
        try:
            small = supernet.standalone(sub)
        except ConfigError:
            continue
        kept_any = True
        n = small.config.rope_n_elem
        channels = list(axes.qk_channels(head_size, config, HeadChannels.rope))[:n]
        torch.testing.assert_close(small.cos, model.cos[:, channels], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(small.sin, model.sin[:, channels], rtol=1e-6, atol=1e-6)
        assert small.transformer.h[0].attn.config.attention_scores_scalar in (
            16,
            config.attention_scores_scalar,
        )
    assert kept_any


def test_first_dims_move_the_phases():
    config = tiny_config("Llama-3.1-8B", head_size=16)
    model = fill_random(GPT(config)).eval()
    info = SupernetInfo(layer_order=(0, 1, 2), head_channels=HeadChannels.first)
    sub = uniform(48, 8, 4, 8, 72, 3)
    first = SuperNetwork(model, info)
    x = ids(config)
    torch.testing.assert_close(first.subnet(sub)(x), stand_alone(first, sub, GPT)(x))
    assert not torch.allclose(first.standalone(sub).cos, model.cos[:, :8])
    weight = first.slices(sub)["transformer.h.0.attn.qkv.weight"]
    assert torch.equal(weight[:8], model.transformer.h[0].attn.qkv.weight[:8])


def test_attention_scale_stays_that_of_the_full_head():
    config = tiny_config("Llama-3.1-8B", head_size=16)
    sub = uniform(48, 8, 4, 8, 72, 3)
    assert plan_slices(sub, config).config.attention_scores_scalar == 16


@pytest.mark.parametrize(
    ("name", "kind"), [("Mixtral-8x7B-v0.1", "mixture of experts"), ("DeepSeek", "latent")]
)
def test_unsupported_architectures_have_one_clear_error(name, kind):
    config = tiny_config("Llama-3.1-8B")
    if kind == "latent":
        config.latent_attention = {"q_lora_rank": 4}
    else:
        config = Config.from_name(name)
    with pytest.raises(ConfigError, match=kind):
        plan_slices(SubNetwork.from_config(config), config)


def test_unknown_parameter_is_named():
    with pytest.raises(ConfigError, match="'transformer.h.0.attn.gate.weight'"):
        axes.dims("transformer.h.0.attn.gate.weight", tiny_config("Llama-3.1-8B"))
