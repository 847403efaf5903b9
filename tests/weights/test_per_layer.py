"""Blocks of different sizes, without attention, without MLP, and layers that are gone."""

import random
from functools import partial

import pytest
import torch
from litgpt import GPT, lora
from torch import nn
from torch.func import functional_call

from tests.conftest import fill_random, tiny_config, uniform
from whittle_nas.errors import ConfigError
from whittle_nas.space import Block, HeadChannels, SearchSpace, SubNetwork, load_space
from whittle_nas.weights.assembly import Nothing
from whittle_nas.weights.counting import parameter_counter
from whittle_nas.weights.info import SupernetInfo
from whittle_nas.weights.slicing import plan_slices
from whittle_nas.weights.supernet import SuperNetwork


def space_of(config) -> SearchSpace:
    """Everything varies by layer; 0 heads and 0 neurons are among the choices."""
    spec = {
        "n_embd": [32, 48], "n_head": {"min": 0}, "intermediate_size": [0, 33, 72],
        "n_layer": [2, 3], "per_layer": ["n_head", "intermediate_size", "head_size"],
    }  # fmt: skip
    if config.n_query_groups not in (1, config.n_head):
        spec |= {"n_query_groups": {"min": 0}}
        spec["per_layer"].append("n_query_groups")
    if config.head_size == 16 and config.rotary_percentage == 1:
        spec |= {"head_size": [8, 16]}
    return load_space(spec, config, layer_order=(2, 0, 1))


def members(config, count: int) -> list[SubNetwork]:
    """Random ones, and one with every kind of layer."""
    heads, groups, size = config.n_head, config.n_query_groups, config.head_size
    mixed = SubNetwork(
        40, (Block(0, 0, 0, 50), Block(heads, groups, size, 0), Block(heads // groups, 1, size, 9))
    )
    gone = SubNetwork(48, (None, Block(heads, groups, size, 72), Block(0, 0, 0, 0)))
    space, rng = space_of(config), random.Random(config.name)
    return [mixed, gone, *(space.sample(rng) for _ in range(count))]


class Reference(nn.Module):
    """A litgpt block, built whole, whose missing parts are written out by hand."""

    def __init__(self, block, shape: Block) -> None:
        super().__init__()
        self.block, self.shape = block, shape

    def forward(self, x, cos, sin):
        block, config = self.block, self.block.config
        normed = block.norm_1(x) if self.shape.n_head or config.shared_attention_norm else None
        update = torch.zeros_like(x)
        if self.shape.n_head:
            update = block.post_attention_norm(block.attn(normed, cos, sin))
        after = x + update
        if not self.shape.intermediate_size:
            return after
        if not config.shared_attention_norm:
            normed = block.norm_2(x if config.parallel_residual else after)
        return after + block.post_mlp_norm(block.mlp(normed))


def written_out(supernet: SuperNetwork, sub: SubNetwork, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a uniform model of every block in turn, with only the parts that are there."""
    model, config = supernet.model, supernet.config
    x = None
    for layer in sub.layers:
        shape = sub.blocks[layer]
        filled = shape._replace(
            **({} if shape.n_head else dict(zip(shape._fields, _whole(config)[:3], strict=False))),
            **({} if shape.intermediate_size else {"intermediate_size": 1}),
        )
        alone = SubNetwork(
            sub.n_embd, tuple(filled if at == layer else None for at in range(config.n_layer))
        )
        small = GPT(supernet.plan(alone).config).eval()
        small.load_state_dict(supernet.slices(alone))
        if x is None:
            x = small.transformer.wte(ids)
            if config.scale_embeddings:
                x = x * torch.tensor(sub.n_embd**0.5, dtype=x.dtype)
        cos, sin = small.cos[None, : ids.shape[1]], small.sin[None, : ids.shape[1]]
        if small.config.rope_indices is not None:
            cos, sin = (t[..., small.config.rope_indices[0]] for t in (cos, sin))
        x = Reference(small.transformer.h[0], shape)(x, cos, sin)
    assert model is not small
    logits = small.lm_head(small.transformer.ln_f(x))
    cap = config.final_logit_softcapping
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _whole(config) -> Block:
    return next(iter(SubNetwork.from_config(config).shapes))


@torch.inference_mode()
def test_sliced_and_stand_alone_are_blocks_written_out(tiny_gpt):
    supernet, config = SuperNetwork(tiny_gpt), tiny_gpt.config
    count = parameter_counter(config)
    ids = torch.randint(0, 90, (2, 20))
    for sub in members(config, 4):
        expected = written_out(supernet, sub, ids)
        alone = supernet.standalone(sub)
        assert torch.equal(supernet.subnet(sub)(ids), alone(ids)), sub
        torch.testing.assert_close(alone(ids), expected, rtol=1e-5, atol=1e-5)
        assert count(sub) == sum(parameter.numel() for parameter in alone.parameters())
        assert len(alone.transformer.h) == sub.n_layer == alone.config.n_layer


@torch.inference_mode()
def test_a_cache_gives_the_same_logits(tiny_gpt):
    if tiny_gpt.config.attention_logit_softcapping is not None:
        pytest.skip("litgpt adds its cache's boolean mask to the scores that it caps")
    supernet = SuperNetwork(tiny_gpt)
    for sub in members(tiny_gpt.config, 3):
        model = supernet.standalone(sub)
        ids = torch.randint(0, 90, (2, 12))
        whole = model(ids)
        model.set_kv_cache(2, max_seq_length=20)
        start = model(ids[:, :7], torch.arange(7), input_pos_maxp1=7)
        torch.testing.assert_close(start, whole[:, :7], rtol=1e-4, atol=1e-4)
        for at in range(7, 12):
            position = torch.tensor([at])
            step = model(ids[:, at : at + 1], position, input_pos_maxp1=at + 1)
            torch.testing.assert_close(step[:, 0], whole[:, at], rtol=1e-4, atol=1e-4)
        held = {block.attn.kv_cache is None for block in model.transformer.h}
        assert held <= {True, False}
        model.clear_kv_cache()
        torch.testing.assert_close(model(ids), whole)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_autograd_through_a_copy(family, recompute):
    config = tiny_config(family)
    model = fill_random(lora.GPT(_with_lora(config)))
    supernet = SuperNetwork(model, SupernetInfo(layer_order=(2, 0, 1)))
    ids = torch.randint(0, 90, (2, 10))
    sub = members(config, 1)[0 if recompute else 2]
    supernet.subnet(sub, checkpoint_blocks=recompute)(ids).square().mean().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)

    full = dict(model.named_parameters())
    plan, alone = supernet.plan(sub), supernet.standalone(sub)
    slices = {}
    for name in dict(alone.named_parameters()):
        part = full[plan.source_name(name)]
        for dim, index in enumerate(plan.indices(name)):
            if isinstance(index, int):
                part = part.narrow(dim, 0, index)
            elif index is not None:
                part = part.index_select(dim, index)
        slices[name] = part
    functional_call(alone, slices, (ids,)).square().mean().backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def _with_lora(config):
    given = {k: v for k, v in vars(config).items() if k not in ("rope_n_elem",)}
    options = {f"lora_{part}": True for part in ("query", "key", "value", "projection", "mlp")}
    return lora.Config(**given, **options, lora_r=2, lora_alpha=4)


def test_heads_of_different_sizes_rotate_as_their_own():
    config = tiny_config("Llama-3.1-8B", head_size=16)
    model = fill_random(GPT(config)).eval()
    sub = SubNetwork(48, tuple(Block(8, 4, size, 72) for size in (4, 16, 8)))
    for channels in HeadChannels:
        supernet = SuperNetwork(model, SupernetInfo((0, 1, 2), channels))
        ids = torch.randint(0, 90, (2, 20))
        with torch.inference_mode():
            expected = written_out(supernet, sub, ids)
            torch.testing.assert_close(supernet.standalone(sub)(ids), expected)


def test_a_missing_part_leaves_the_stream_as_it_is():
    model = fill_random(GPT(tiny_config("Gemma-2-2b"))).eval()
    sub = SubNetwork(48, (Block(8, 4, 8, 72), Block(0, 0, 0, 72), Block(8, 4, 8, 0)))
    blocks = SuperNetwork(model).standalone(sub).transformer.h
    assert isinstance(blocks[1].attn, Nothing)
    assert isinstance(blocks[2].mlp, Nothing)
    names = {name.partition(".")[0] for name, _ in blocks[1].named_parameters()}
    assert names == {"norm_2", "mlp", "post_mlp_norm"}


def test_blocks_are_shared_between_networks_that_have_them():
    supernet = SuperNetwork(fill_random(GPT(tiny_config("Llama-3.1-8B"))))
    first = supernet.subnet(SubNetwork(48, (Block(8, 4, 8, 72), Block(4, 4, 8, 9), None)))
    second = supernet.subnet(SubNetwork(48, (Block(8, 4, 8, 72), Block(4, 4, 8, 8), None)))
    assert first.transformer.h[0] is second.transformer.h[0]
    assert first.transformer.h[1] is not second.transformer.h[1]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"n_embd": 48, "blocks": [None, None]}, "one per layer of the model, 3; got 2"),
        ({"n_embd": 48, "blocks": [None, [8, 4, 8], None]}, "block 1 must be null or the 4"),
        ({"n_embd": 48, "blocks": [None, [8, 4, 8, -1], None]}, "block 1 must be null"),
        ({"n_embd": 48, "blocks": None}, "one per layer of the model, 3; got None"),
        ({"n_embd": 0, "blocks": [None] * 3}, "n_embd=0"),
        ({**uniform(48, 8, 4, 8, 72, 2).to_dict(), "layers": [0]}, "n_layer=2 different layer ids"),
        ({**uniform(48, 8, 4, 8, 72, 2).to_dict(), "layers": [0, 3]}, "from 0 to 2"),
    ],
)
def test_wrong_blocks_are_one_sentence(spec, message):
    with pytest.raises(ConfigError, match=message):
        SubNetwork.from_dict(spec, (2, 0, 1))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ((Block(8, 4, 8, 72),) * 2, "2 blocks, the model has n_layer=3"),
        ((Block(8, 4, 8, 73), None, None), "intermediate_size=73"),
        ((Block(8, 4, 8, 72), Block(6, 4, 8, 0), None), "n_head=6 must be a multiple"),
        ((None, None, None), "n_layer=0"),
    ],
)
def test_blocks_that_do_not_fit_are_named(blocks, message):
    with pytest.raises(ConfigError, match=message):
        plan_slices(SubNetwork(48, blocks), tiny_config("Llama-3.1-8B"))


def test_one_value_for_each_shape():
    assert Block(0, 4, 8, 5) == Block(0, 0, 0, 5) == Block(8, 4, 8, 5)._replace(n_head=0)
    gone = SubNetwork(8, (Block(0, 0, 0, 0), Block(1, 1, 8, 8)))
    assert gone == SubNetwork(8, (None, Block(1, 1, 8, 8)))
    assert gone.sizes() == {**Block(1, 1, 8, 8).to_dict(), "n_embd": 8, "n_layer": 1}
    whole = SubNetwork(8, (Block(1, 1, 8, 8),) * 2)
    assert sorted([whole, gone, SubNetwork(7, whole.blocks)])[1:] == [gone, whole]
    mixed = SubNetwork(8, (Block(1, 1, 8, 8), Block(1, 1, 8, 9)))
    for sub, order in ((gone, (0, 1)), (mixed, (1, 0))):
        assert SubNetwork.from_dict(sub.to_dict(), order) == sub
    old = {"n_embd": 8, **Block(1, 1, 8, 8).to_dict(), "n_layer": 1}
    assert SubNetwork.from_dict(old, (1, 0)) == gone


def test_reordering_moves_blocks_by_rank():
    sub = SubNetwork(8, (Block(1, 1, 8, 3), None, Block(1, 1, 8, 4)))
    moved = sub.reordered((2, 0, 1), (0, 1, 2))
    assert moved.blocks == (Block(1, 1, 8, 4), Block(1, 1, 8, 3), None)
    assert uniform(8, 1, 1, 8, 8, 2, order=(2, 0, 1)).reordered((2, 0, 1), (1, 2, 0)) == (
        uniform(8, 1, 1, 8, 8, 2, order=(1, 2, 0))
    )


def test_litgpts_copy_of_a_model_keeps_its_own_tables():
    """What deepcopy and `to` do with blocks that rotate by their own tables."""
    import copy

    config = tiny_config("Llama-3.1-8B", head_size=16)
    sub = SubNetwork(48, tuple(Block(8, 4, size, 72) for size in (4, 16, 8)))
    model = SuperNetwork(fill_random(GPT(config)).eval()).standalone(sub)
    ids = torch.randint(0, 90, (1, 6))
    twin = copy.deepcopy(model).to(torch.float64)
    run = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4, check_dtype=False)
    run(twin(ids), model(ids))
    assert twin.transformer.h[0].cos.dtype == torch.float64
