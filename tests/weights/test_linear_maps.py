"""A matrix in place of an attention or an MLP: in a checkpoint of its own, and from a patch."""

import json

import pytest
import torch
import torch.nn.functional as F
from litgpt import GPT
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from tests.conftest import FAMILIES, fill_random, tiny_config
from tests.export.test_per_layer import exported
from whittle_nas.calibration import embed, rotary
from whittle_nas.errors import ConfigError
from whittle_nas.export.deci import Engine
from whittle_nas.metrics.analytic import AnalyticCosts
from whittle_nas.space import Block, SubNetwork
from whittle_nas.train.specialise import slice_of
from whittle_nas.weights.assembly import build
from whittle_nas.weights.axes import num_params
from whittle_nas.weights.checkpoint import load_supernet, open_checkpoint, write_checkpoint
from whittle_nas.weights.config import extended
from whittle_nas.weights.counting import parameter_counter
from whittle_nas.weights.patch import Patch
from whittle_nas.weights.supernet import SuperNetwork

IDS = torch.randint(0, 90, (2, 14), generator=torch.Generator().manual_seed(0))


def shape_of(config) -> tuple[Block, ...]:
    """A matrix in place of attention, of the MLP, and of both."""
    heads, neurons = (config.n_head, config.n_query_groups, config.head_size), 40
    return (
        Block(0, 0, 0, neurons, attn="linear"),
        Block(*heads, 0, mlp="linear"),
        Block(0, 0, 0, 0, "linear", "linear"),
    )


def with_maps(family: str) -> SuperNetwork:
    config = tiny_config(family)
    config = extended(config, blocks=shape_of(config))
    return SuperNetwork(fill_random(build(config)).eval())


def checkpoint(model, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    write_checkpoint(source, model.state_dict(), config=model.config, source=source)
    return open_checkpoint(source, per_layer=True)


def written_out(model, ids):
    """The forward pass with the matrices as products."""
    x, config = embed(model, ids), model.config
    tables = model.cos[None, : ids.shape[1]], model.sin[None, : ids.shape[1]]
    for layer, (block, shape) in enumerate(zip(model.transformer.h, config.blocks, strict=True)):
        cos, sin = rotary(model, layer, *tables)
        read, attn, mlp = block.norm_1(x), block.attn, block.mlp
        given = (
            F.linear(read, attn.map.weight, attn.map.bias) if shape.attn else attn(read, cos, sin)
        )
        given = block.post_attention_norm(given)
        after = x + given
        if not config.shared_attention_norm:
            read = block.norm_2(x if config.parallel_residual else after)
        made = F.linear(read, mlp.map.weight, mlp.map.bias) if shape.mlp else mlp(read)
        x = after + block.post_mlp_norm(made)
    logits = model.lm_head(model.transformer.ln_f(x))
    cap = config.final_logit_softcapping
    return logits if cap is None else torch.tanh(logits / cap) * cap


def narrower(net: SuperNetwork) -> list[SubNetwork]:
    """Less of everything, and without some of the matrices."""
    first, second, third = net.full.blocks
    return [
        net.full,
        SubNetwork(40, (first._replace(intermediate_size=9), second, third)),
        SubNetwork(33, (first._replace(attn=""), None, third._replace(mlp=""))),
    ]


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_sliced_stand_alone_exported_and_cached_are_the_same(family, tmp_path):
    net = with_maps(family)
    expected = written_out(net.model, IDS)
    torch.testing.assert_close(net.model(IDS), expected, rtol=1e-4, atol=1e-5)
    source, count = checkpoint(net.model, tmp_path), parameter_counter(net.config)
    costs = AnalyticCosts(net.config)
    for sub in narrower(net):
        alone = net.standalone(sub)
        wanted = alone(IDS)
        torch.testing.assert_close(net.subnet(sub)(IDS), wanted)
        assert count(sub) == sum(parameter.numel() for parameter in alone.parameters())
        cache = costs.kv_cache_bytes(sub, batch=1, length=1, dtype=torch.float32)
        heads = sum(b.n_query_groups * b.head_size for b in sub.blocks if b)
        assert cache == 8 * heads
        out_dir, _ = exported(source, sub, tmp_path)
        read = load_supernet(out_dir)
        assert read.full == SubNetwork(sub.n_embd, tuple(filter(None, sub.blocks)))
        assert num_params(read.config) == count(sub)
        torch.testing.assert_close(read.model(IDS), wanted)
        if net.config.attention_logit_softcapping is None:
            alone.set_kv_cache(2, max_seq_length=20)
            start = alone(IDS[:, :7], torch.arange(7), input_pos_maxp1=7)
            step = alone(IDS[:, 7:8], torch.tensor([7]), input_pos_maxp1=8)
            found = torch.cat([start, step], 1)
            torch.testing.assert_close(found, wanted[:, :8], rtol=1e-4, atol=1e-4)
            alone.clear_kv_cache()


def test_gradients_reach_the_matrices():
    net = with_maps("Llama-3.1-8B")
    sub = narrower(net)[1]
    net.subnet(sub)(IDS).square().mean().backward()
    full = dict(net.model.named_parameters())
    found = {name: p.grad for name, p in full.items() if p.grad is not None}
    net.model.zero_grad(set_to_none=True)
    slices = net.slices(sub)
    for name in ("transformer.h.0.attn.map.weight", "transformer.h.2.mlp.map.weight"):
        slices[name] = full[name][: sub.n_embd, : sub.n_embd]
    functional_call(net.standalone(sub), slices, (IDS,)).square().mean().backward()
    for name in ("transformer.h.0.attn.map.weight", "transformer.h.2.mlp.map.weight"):
        assert found[name][:40, :40].abs().min() > 0
        torch.testing.assert_close(found[name], full[name].grad)


@pytest.mark.parametrize("family", ["Llama-3.1-8B", "pythia-160m"])
@torch.inference_mode()
def test_a_patch_gives_them_to_a_model_that_has_none(family, tmp_path):
    config = tiny_config(family)
    net = SuperNetwork(fill_random(GPT(config)).eval())
    sub = SubNetwork(config.n_embd, shape_of(config))
    own = net.plan(sub).maps()
    assert len(own) == 4 * (1 + config.bias)
    slices = net.slices(sub)
    patch = Patch({name: torch.randn_like(slices[name]) for name in own})
    alone = net.standalone(sub, patch)
    wanted = build(net.plan(sub).own_config)
    wanted.load_state_dict({**slices, **patch.replaced})
    torch.testing.assert_close(alone(IDS), wanted.eval()(IDS))
    source = checkpoint(net.model, tmp_path)
    torch.testing.assert_close(
        slice_of(source, sub, patch).state_dict()[own[0]], patch.replaced[own[0]]
    )
    out_dir, planned = exported(source, sub, tmp_path, patch=patch)
    torch.testing.assert_close(load_supernet(out_dir).model(IDS), alone(IDS))
    for lacking in (
        lambda: net.standalone(sub),
        lambda: net.subnet(sub),
        lambda: slice_of(source, sub),
        lambda: exported(source, sub, tmp_path),
    ):
        with pytest.raises(ConfigError, match="layer 0 has a linear attn, which only"):
            lacking()
    with pytest.raises(ConfigError, match="equal layers can't hold a linear map"):
        exported(source, sub, tmp_path, patch=patch, pad=True)
    assert planned.padding is None


@torch.inference_mode()
def test_transformers_runs_them(tmp_path):
    net = with_maps("Llama-3.1-8B")
    source = checkpoint(net.model, tmp_path)
    out_dir, planned = exported(source, net.full, tmp_path, to_hf=True)
    said = json.loads((out_dir / "config.json").read_text())["block_configs"]
    linear = [[part["replace_with_linear"] for part in layer.values()] for layer in said]
    assert linear == [[True, False], [False, True], [True, True]]
    assert not any(part["no_op"] for layer in said for part in layer.values())
    load = AutoModelForCausalLM.from_pretrained
    theirs, info = load(out_dir, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    expected = net.model(IDS)
    torch.testing.assert_close(theirs(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    start = theirs(IDS[:, :7], use_cache=True).past_key_values
    assert [layer.is_initialized for layer in start.layers].count(True) == 1
    rest = theirs(IDS[:, 7:], past_key_values=start).logits
    torch.testing.assert_close(rest, expected[:, 7:], rtol=1e-4, atol=1e-5)
    assert any("vLLM" in note for note in planned.notes)
    for engine in Engine:
        with pytest.raises(ConfigError, match=rf"--targets {engine.value}: .*without it"):
            exported(source, net.full, tmp_path, to_hf=True, targets={engine})


def test_llama_cpp_takes_matrices_in_place_of_attention(tmp_path):
    config = tiny_config("Llama-3.1-8B", n_embd=64, intermediate_size=256)
    blocks = (Block(0, 0, 0, 256, attn="linear"), Block(8, 4, 8, 256), Block(0, 0, 0, 0, "linear"))
    net = SuperNetwork(fill_random(build(extended(config, blocks=blocks))).eval())
    source, cpp = checkpoint(net.model, tmp_path), {"to_hf": True, "targets": {Engine.llama_cpp}}
    fits = SubNetwork(64, (*blocks[:2], None))
    exported(source, fits, tmp_path, **cpp)
    with pytest.raises(ConfigError, match="an MLP in every layer with attention; nearest"):
        exported(source, net.full, tmp_path, **cpp)


@pytest.mark.parametrize(
    "entry",
    [
        [0, 0, 0, 9, "linear"],
        [0, 0, 0, 9, "x", ""],
        [8, 4, 8, 9, "linear", ""],
        [0, 0, 0, 9, "2:4", ""],
    ],
)
def test_a_wrong_form_is_one_sentence(entry):
    spec = {"n_embd": 48, "blocks": [entry, None, None]}
    with pytest.raises(
        ConfigError, match="block 0 must be null or the 4 numbers .* 'linear' without"
    ):
        SubNetwork.from_dict(spec, (0, 1, 2))


def test_no_matrix_where_the_model_has_nothing():
    config = tiny_config("Llama-3.1-8B")
    blocks = (Block(0, 0, 0, 9), Block(8, 4, 8, 9), Block(8, 4, 8, 9))
    net = SuperNetwork(build(extended(config, blocks=blocks)))
    with pytest.raises(ConfigError, match="layer 0: a linear map where the model has no attention"):
        net.plan(SubNetwork(48, (replace_attn(blocks[0]), None, None)))


def replace_attn(block: Block) -> Block:
    return block._replace(attn="linear")
