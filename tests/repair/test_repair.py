"""Repair of whole sub-networks, against plain forward passes of litgpt models."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from litgpt import GPT

from tests.conftest import fill_random, tiny_config
from whittle_nas.cli.options import Sizes
from whittle_nas.errors import ConfigError
from whittle_nas.repair.engine import repair
from whittle_nas.repair.lockstep import Lockstep
from whittle_nas.repair.options import RepairOptions
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.weights.patch import Patch
from whittle_nas.weights.supernet import SuperNetwork

TOKENS = torch.randint(0, 96, (16, 25), generator=torch.Generator().manual_seed(1))
OPTIONS = RepairOptions(held_back=0.25, batch_size=4)
HELD_BACK = TOKENS[12:]


def network(family, **changes):
    return SuperNetwork(fill_random(GPT(tiny_config(family, **changes))).eval())


def sub_of(net, **sizes):
    return Sizes(**sizes).resolve(net)


@torch.no_grad()
def loss_of(model, tokens):
    logits = model(tokens[:, :-1])
    return float(F.cross_entropy(logits.flatten(0, 1).double(), tokens[:, 1:].flatten()))


def test_the_whole_network_stays_as_it_is(tiny_gpt):
    net = SuperNetwork(tiny_gpt)
    found = repair(net, net.full, TOKENS, options=OPTIONS)
    assert not found.patch
    assert found.before == found.after == pytest.approx(loss_of(tiny_gpt, HELD_BACK), rel=1e-5)


def test_the_reported_losses_are_those_of_the_models(family):
    net = network(family)
    before = {name: tensor.clone() for name, tensor in net.model.state_dict().items()}
    sub = sub_of(net, n_embd=40, intermediate_size=56, n_layer=2)
    found = repair(net, sub, TOKENS, options=OPTIONS)
    assert found.before == pytest.approx(loss_of(net.standalone(sub), HELD_BACK), rel=1e-4)
    assert found.after == pytest.approx(
        loss_of(net.standalone(sub, found.patch), HELD_BACK), rel=1e-4
    )
    assert found.after <= found.before
    for name, tensor in net.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert (found.tokens, found.held_back) == (12 * 24, 4 * 24)


@pytest.mark.parametrize("family", ["Llama-3.1-8B", "pythia-160m", "falcon-7b", "Gemma-3-1b-it"])
def test_blocks_may_differ_and_lack_parts(family):
    net = network(family, n_layer=5)
    whole = net.full.blocks[0]
    heads = whole._replace(n_head=whole.n_query_groups, intermediate_size=40)
    blocks = (heads, whole._replace(n_head=0), None, whole._replace(intermediate_size=0), whole)
    sub = SubNetwork(40, blocks)
    found = repair(net, sub, TOKENS, options=OPTIONS)
    assert any(choice.step is not None for choice in found.choices.values())
    assert found.before == pytest.approx(loss_of(net.standalone(sub), HELD_BACK), rel=1e-4)
    if found.patch:
        after = loss_of(net.standalone(sub, found.patch), HELD_BACK)
        assert found.after == pytest.approx(after, rel=1e-4)


@torch.no_grad()
def test_where_text_is_short_the_better_of_two_passes_is_kept():
    """One follows the whole model's stream, one mends every layer's own error."""
    for seed, sizes in enumerate([{"n_head": 4, "n_query_groups": 2}, {"intermediate_size": 24}]):
        torch.manual_seed(seed)
        net = network("Llama-3.1-8B")
        sub, losses = sub_of(net, **sizes), {}
        for follow in (True, False):
            streams = Lockstep(net, sub, TOKENS, OPTIONS, follow=follow)
            for pair in streams.pairs():
                streams.repair(pair)
            losses[follow] = streams.repair_head()
        found = repair(net, sub, TOKENS, options=OPTIONS)
        losses = {follow: min(loss, found.before) for follow, loss in losses.items()}
        local = losses[False] < losses[True]
        assert found.after == pytest.approx(min(losses.values()))
        sources = {choice.source for choice in found.choices.values()}
        assert sources <= {"", "local"} if local else "sequential" in sources


@pytest.mark.parametrize("family", ["Llama-3.1-8B", "pythia-160m", "Gemma-2-2b"])
def test_streams_come_nearer_to_the_whole_models(family):
    """What is fitted: with half the neurons the narrow stream's end is nearer on fitted text."""
    net = network(family)
    sub = sub_of(net, intermediate_size=40)
    found = repair(net, sub, TOKENS, options=OPTIONS)
    assert any(choice.step is not None for choice in found.choices.values()) or not found.patch
    if found.patch:
        text = TOKENS[:12, :-1]
        ends = [
            stream_end(m, text) for m in (net.standalone(sub), net.standalone(sub, found.patch))
        ]
        plain, mended = ((end - stream_end(net.model, text)).norm() for end in ends)
        assert mended < plain


@torch.no_grad()
def stream_end(model, ids):
    seen = []
    hook = model.transformer.ln_f.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    model(ids)
    hook.remove()
    return seen[0]


@torch.no_grad()
def inputs_of(model, name, ids):
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    model(ids)
    hook.remove()
    return seen[0].flatten(0, 1).double()


def dense_ridge(a, e, ridge, free):
    """Minimum of |e - a W^T|^2 + ridge mean diag |W|^2 with all tokens at once."""
    last = a.shape[1] - free
    damping = torch.zeros(a.shape[1], dtype=torch.float64)
    damping[:last] = (ridge * a[:, :last].square().sum(0).mean()).sqrt()
    rows = torch.cat([a, damping.diag()])
    wanted = torch.cat([e, torch.zeros(a.shape[1], e.shape[1], dtype=torch.float64)])
    return torch.linalg.lstsq(rows, wanted, driver="gelsd").solution.T


def lacking(net, plain, fit):
    """What the narrow stream lacks (n, k), and what the norm behind it divides by (n, 1)."""
    whole = stream_end(net.model, fit).flatten(0, 1).double()
    root = (whole.square().mean(-1, keepdim=True) + net.config.norm_eps).sqrt()
    return whole - stream_end(plain, fit).flatten(0, 1).double(), root


@pytest.mark.parametrize("dropped", [0, 1], ids=["same depth", "a layer dropped"])
def test_a_writer_is_the_dense_fit_of_what_its_stream_lacks(dropped):
    net = network("Llama-3.1-8B", n_layer=1 + dropped)
    sub = sub_of(net, intermediate_size=40, n_layer=1)
    many = torch.randint(0, 96, (128, 25), generator=torch.Generator().manual_seed(2))
    found = repair(net, sub, many, options=replace(OPTIONS, ridges=(0.01,)))
    choice = found.choices["transformer.h.0.mlp.proj"]
    fit, plain = many[:96, :-1], net.standalone(sub)
    # the attention is whole, so the plain model has the right inputs
    a = inputs_of(plain, "transformer.h.0.mlp.proj", fit)
    e, root = lacking(net, plain, fit)
    step = dense_ridge(a / root, e / root, 0.01, 0)
    if dropped:  # else both fits are the same
        assert choice.source == "sequential"
    torch.testing.assert_close(choice.step, step, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_every_layer_sees_what_the_repaired_ones_before_it_give():
    """Layer by layer with plain forward passes of copies, all tokens in one least squares."""
    net = network("Llama-3.1-8B", n_layer=2)
    sub = sub_of(net, intermediate_size=40, n_head=4)
    many = torch.randint(0, 96, (128, 25), generator=torch.Generator().manual_seed(2))
    found = repair(net, sub, many, options=replace(OPTIONS, ridges=(0.01,)))
    fit, model = many[:96, :-1], copy.deepcopy(net.standalone(sub))
    behind = ("h.0.norm_2", "h.1.norm_1", "h.1.norm_2", "ln_f")
    parts = ("h.0.attn", "h.0.mlp", "h.1.attn", "h.1.mlp")
    sources = []
    for part, end in zip(parts, behind, strict=True):
        name = f"transformer.{part}.proj"
        writer, choice = model.get_submodule(name), found.choices[name]
        sources.append(choice.source)
        wanted = inputs_of(net.model, f"transformer.{end}", fit)
        root = (wanted.square().mean(-1, keepdim=True) + net.config.norm_eps).sqrt()
        if choice.source == "sequential":
            inputs = inputs_of(model, name, fit)
            errors = wanted - inputs_of(model, f"transformer.{end}", fit)
        else:  # its own error only, on the whole model's activations
            full = net.model.get_submodule(name)
            given = inputs_of(net.model, name, fit)
            columns = net.plan(sub).indices(f"{name}.weight", torch.device("cpu"))[1]
            inputs = given[:, :columns] if isinstance(columns, int) else given[:, columns]
            errors = given @ full.weight.double().T - inputs @ writer.weight.double().T
        step = dense_ridge(inputs / root, errors / root, 0.01, 0)
        torch.testing.assert_close(choice.step, step, atol=1e-4, rtol=1e-4)
        writer.weight.copy_(writer.weight.double() + step)
    assert "sequential" in sources[2:]
    for part in parts if found.patch else ():
        name = f"transformer.{part}.proj.weight"
        torch.testing.assert_close(
            found.patch.replaced[name], model.get_parameter(name), atol=1e-4, rtol=1e-4
        )


def test_behind_a_writer_with_a_norm_its_own_output_is_the_aim():
    net = network("Gemma-2-2b", n_layer=1)
    sub = sub_of(net, intermediate_size=40)
    many = torch.randint(0, 96, (128, 25), generator=torch.Generator().manual_seed(2))
    found = repair(net, sub, many, options=replace(OPTIONS, ridges=(0.01,)))
    name, fit, plain = "transformer.h.0.mlp.proj", many[:96, :-1], net.standalone(sub)
    weights = (model.get_parameter(f"{name}.weight").double().T for model in (net.model, plain))
    inputs = [inputs_of(model, name, fit) for model in (net.model, plain)]
    wanted, given = (a @ w for a, w in zip(inputs, weights, strict=True))
    root = (wanted.square().mean(-1, keepdim=True) + net.config.norm_eps).sqrt()
    step = dense_ridge(inputs[1] / root, (wanted - given) / root, 0.01, 0)
    torch.testing.assert_close(found.choices[name].step, step, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_head_is_the_dense_fit_of_the_last_norms_outputs():
    net = network("Llama-3.1-8B", n_layer=1)
    sub = sub_of(net, n_embd=32)
    many = torch.randint(0, 96, (128, 25), generator=torch.Generator().manual_seed(2))
    found = repair(net, sub, many, options=replace(OPTIONS, ridges=(0.01,)))
    fit, before = many[:96, :-1], {**found.patch.replaced}
    before.pop("lm_head.weight", None)
    mended = net.standalone(sub, Patch(before))
    h, s = (inputs_of(model, "lm_head", fit) for model in (net.model, mended))
    step = dense_ridge(s, h - F.pad(s, (0, 16)), 0.01, 0)
    if found.patch:
        choice = found.choices["transformer.ln_f"]
        torch.testing.assert_close(choice.step, step, atol=1e-4, rtol=1e-4)
    assert found.patch


def test_with_a_parallel_residual_both_writers_and_one_bias_are_fitted_together():
    net = network("pythia-160m", n_layer=1)
    sub = sub_of(net, intermediate_size=40, n_head=2)
    found = repair(net, sub, TOKENS, options=replace(OPTIONS, ridges=(0.01,)))
    choice = found.choices["transformer.h.0.attn.proj + transformer.h.0.mlp.proj"]
    fit, plain = TOKENS[:12, :-1], net.standalone(sub)
    parts = [inputs_of(plain, f"transformer.h.0.{p}.proj", fit) for p in ("attn", "mlp")]
    a = torch.cat([*parts, torch.ones(len(parts[0]), 1, dtype=torch.float64)], 1)
    e, root = lacking(net, plain, fit)
    step = dense_ridge(a / root, e / root, 0.01, 1)
    torch.testing.assert_close(choice.step, step, atol=1e-4, rtol=1e-4)


def test_readers_are_the_dense_fit_of_the_whole_norms_outputs_through_their_weights():
    net = network("Qwen2.5-0.5B", n_layer=1)  # with a bias of qkv
    sub = sub_of(net, n_embd=32)
    found = repair(net, sub, TOKENS, options=replace(OPTIONS, ridges=(0.01,)))
    fit, plain = TOKENS[:12, :-1], net.standalone(sub)
    h = inputs_of(net.model, "transformer.h.0.attn.qkv", fit)
    s = inputs_of(plain, "transformer.h.0.attn.qkv", fit)
    lost = h - F.pad(s, (0, 16))
    ones = torch.ones(len(s), 1, dtype=torch.float64)
    step = dense_ridge(torch.cat([s, ones], 1), lost, 0.01, 1)
    torch.testing.assert_close(
        found.choices["transformer.h.0.norm_1"].step, step, atol=1e-4, rtol=1e-4
    )
    # the outputs that the new layer gives are those of the old one for the predicted inputs
    full, changed = net.model.transformer.h[0].attn.qkv, net.standalone(sub, found.patch)
    predicted = F.pad(s, (0, 16)) + torch.cat([s, ones], 1) @ step.T
    wanted = predicted @ full.weight.double().T + full.bias.double()
    new = changed.transformer.h[0].attn.qkv
    torch.testing.assert_close(
        s @ new.weight.double().T + new.bias.double(), wanted, atol=1e-4, rtol=1e-4
    )


def test_dead_neurons_and_few_tokens_are_damped():
    net = network("Llama-3.1-8B")
    with torch.no_grad():
        for block in net.model.transformer.h:
            block.mlp.fc_1.weight[::3] = 0  # silu(0) = 0: these neurons never say anything
    few = TOKENS[:4, :8]
    found = repair(net, sub_of(net, intermediate_size=40), few, options=OPTIONS)
    assert found.after <= found.before
    assert all(tensor.isfinite().all() for tensor in found.patch.replaced.values())
    assert any("more text would repair more" in note for note in found.notes)


def test_a_layer_without_inputs_is_named():
    net = network("Llama-3.1-8B")
    with torch.no_grad():
        net.model.transformer.h[1].mlp.fc_1.weight.zero_()
    found = repair(net, sub_of(net, intermediate_size=40), TOKENS, options=OPTIONS)
    (note,) = [note for note in found.notes if "inputs are 0" in note]
    assert note.startswith("transformer.h.1.mlp.proj can't be fitted")
    assert found.choices["transformer.h.1.mlp.proj"].singular
    assert not found.choices["transformer.h.2.mlp.proj"].singular


def test_a_tied_head_stays_tied():
    net = network("SmolLM2-135M")
    net.model.lm_head.weight = net.model.transformer.wte.weight
    found = repair(net, sub_of(net, n_embd=32), TOKENS, options=OPTIONS)
    assert "lm_head.weight" not in found.patch.replaced
    assert any("token table" in note for note in found.notes)


def test_too_little_text_and_weights_that_overflow_are_one_sentence():
    net = network("Llama-3.1-8B")
    sub = sub_of(net, intermediate_size=40)
    with pytest.raises(ConfigError, match="at least 2 blocks"):
        repair(net, sub, TOKENS[:1])
    with torch.no_grad():
        net.model.transformer.h[1].mlp.fc_1.weight[0] = float("inf")
    with pytest.raises(ConfigError, match="not finite"):
        repair(net, sub, TOKENS, options=OPTIONS)
