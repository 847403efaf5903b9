"""Scores against a slow reference: plain loops over stored activations, in Python's own floats."""

import math

import pytest
import torch
from litgpt import GPT

from tests.conftest import fill_random, tiny_config
from whittle_nas.errors import ConfigError
from whittle_nas.importance.options import Aggregation, HeadActivation, NeuronActivation
from whittle_nas.importance.statistics import collect

# GQA; partial rotary + parallel residual + biases; MQA + shared norm; no pre-norms, q/k norms;
# post-norms, soft-capping and sliding windows
KINDS = ("Llama-3.1-8B", "pythia-160m", "falcon-7b", "OLMo-2-1124-7B", "Gemma-2-2b", "phi-2")


def model_of(family: str) -> GPT:
    return fill_random(GPT(tiny_config(family, n_layer=2))).eval()


def tokens_of(model: GPT, count: int, length: int) -> torch.Tensor:
    return torch.randint(0, model.config.padded_vocab_size, (count, length))


def stored_activations(model: GPT, tokens: torch.Tensor) -> dict[str, list]:
    """Every activation that a score is made of: name -> for each sequence its tokens' vectors."""
    stored: dict[str, list] = {}
    removers = []

    def keep(name, tensor):
        stored.setdefault(name, []).append(tensor[0].double().tolist())

    def output(module, name):
        removers.append(module.register_forward_hook(lambda _m, _i, out: keep(name, out)))

    def inputs(module, name):
        removers.append(module.register_forward_pre_hook(lambda _m, args: keep(name, args[0])))

    for layer, block in enumerate(model.transformer.h):
        for norm in ("norm_1", "norm_2"):
            if getattr(block, norm) is not None:
                output(getattr(block, norm), f"{layer}.{norm}")
        output(block.attn.qkv, f"{layer}.qkv")
        inputs(block.attn.proj, f"{layer}.attention")
        output(block.mlp.fc if hasattr(block.mlp, "fc") else block.mlp.fc_1, f"{layer}.fc")
        inputs(block.mlp.proj, f"{layer}.down")
        inputs(block, f"{layer}.in")
        output(block, f"{layer}.out")
    output(model.transformer.ln_f, "ln_f")
    with torch.no_grad():
        for sequence in tokens:
            model(sequence[None])
    for remover in removers:
        remover.remove()
    return stored


def reduced(values: list[float], how: str) -> float:
    values = [abs(v) for v in values]
    average = sum(values) / len(values)
    if how == "mean":
        return average
    if how == "norm":
        return math.sqrt(sum(v * v for v in values))
    return sum((v - average) ** 2 for v in values) / len(values)


def aggregated(sequences: list, entry, aggregation: Aggregation, batch_size: int) -> float:
    """Score of one entry; `entry(token)` is its activation at one token."""
    per_sequence = [reduced([entry(t) for t in s], aggregation.sequence) for s in sequences]
    batches = [per_sequence[i : i + batch_size] for i in range(0, len(per_sequence), batch_size)]
    total = sum(len(batch) * reduced(batch, aggregation.batch) for batch in batches)
    return total / len(sequences)


def head_gains(model: GPT, layer: int) -> list[float]:
    """Frobenius norm of every head's columns of the output projection."""
    size, weight = model.config.head_size, model.transformer.h[layer].attn.proj.weight.tolist()
    return [
        math.sqrt(sum(v * v for row in weight for v in row[h * size : (h + 1) * size]))
        for h in range(model.config.n_head)
    ]


def reference(
    model: GPT, stored: dict, aggregation: Aggregation, batch_size: int, fc: bool, plain: bool
) -> dict:
    c = model.config
    groups, per_group, size = c.n_query_groups, c.n_head // c.n_query_groups, c.head_size

    def score(name, entry):
        return aggregated(stored[name], entry, aggregation, batch_size)

    gains = [[1.0] * c.n_head if plain else head_gains(model, n) for n in range(c.n_layer)]

    def squares(token, head, layer):
        return gains[layer][head] ** 2 * sum(v * v for v in token[head * size : (head + 1) * size])

    def heads_of(group):
        return range(group * per_group, (group + 1) * per_group)

    def qk(token, group, channel):
        key = abs(token[(c.n_head + group) * size + channel])
        return sum(abs(token[head * size + channel]) for head in heads_of(group)) * key

    norms = [name for name in stored if "norm" in name or name == "ln_f"]
    found: dict = {
        "embd": [sum(score(n, lambda t, i=i: t[i]) for n in norms) for i in range(c.n_embd)]
    }
    layers = range(c.n_layer)
    neurons = "fc" if fc else "down"
    found["neurons"] = [
        [score(f"{n}.{neurons}", lambda t, i=i: t[i]) for i in range(c.intermediate_size)]
        for n in layers
    ]
    found["heads"] = [
        [
            [
                score(f"{n}.attention", lambda t, h=h, n=n: math.sqrt(squares(t, h, n)))
                for h in heads_of(g)
            ]
            for g in range(groups)
        ]
        for n in layers
    ]
    found["groups"] = [
        [
            score(
                f"{n}.attention",
                lambda t, g=g, n=n: math.sqrt(sum(squares(t, h, n) for h in heads_of(g))),
            )
            for g in range(groups)
        ]
        for n in layers
    ]
    found["value_channels"] = [
        [
            [
                score(
                    f"{n}.attention",
                    lambda t, g=g, k=k: sum(abs(t[h * size + k]) for h in heads_of(g)),
                )
                for k in range(size)
            ]
            for g in range(groups)
        ]
        for n in layers
    ]
    found["qk_channels"] = [
        [
            [score(f"{n}.qkv", lambda t, g=g, k=k: qk(t, g, k)) for k in range(c.rope_n_elem, size)]
            for g in range(groups)
        ]
        for n in layers
    ]
    found["block_importance"] = [block_importance(stored, n) for n in layers]
    return found


def block_importance(stored: dict, layer: int) -> float:
    cosines = []
    for before, after in zip(stored[f"{layer}.in"], stored[f"{layer}.out"], strict=True):
        for x, y in zip(before, after, strict=True):
            dot = sum(a * b for a, b in zip(x, y, strict=True))
            cosines.append(dot / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y)))
    return 1 - sum(cosines) / len(cosines)


def assert_equal_to_reference(model, tokens, aggregation, *, fc=False, plain=False):
    scores = collect(
        model,
        tokens,
        aggregation=aggregation,
        neuron_activation=NeuronActivation.fc if fc else NeuronActivation.down_input,
        head_activation=HeadActivation.proj_input if plain else HeadActivation.contribution,
        batch_size=2,
    )
    stored = stored_activations(model, tokens)
    expected = reference(model, stored, aggregation, 2, fc, plain)
    for name, value in scores.to_dict().items():
        wanted = torch.tensor(expected[name], dtype=torch.float64).view(value.shape)
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("aggregation", list(Aggregation), ids=lambda a: a.value)
def test_scores_equal_plain_loops_for_every_aggregation(aggregation):
    model = model_of("pythia-160m")
    assert_equal_to_reference(model, tokens_of(model, 5, 6), aggregation)  # batches of 2, 2, 1


@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_plain_loops_for_every_kind_of_block(kind):
    model = model_of(kind)
    assert_equal_to_reference(model, tokens_of(model, 3, 5), Aggregation.norm_mean)


@pytest.mark.parametrize("kind", ["Llama-3.1-8B", "phi-2"])
def test_neurons_measured_after_the_first_linear_layer(kind):
    model = model_of(kind)
    assert_equal_to_reference(model, tokens_of(model, 3, 5), Aggregation.mean_mean, fc=True)


@pytest.mark.parametrize("aggregation", list(Aggregation), ids=lambda a: a.value)
def test_heads_measured_by_their_output_alone(aggregation):
    model = model_of("Llama-3.1-8B")
    assert_equal_to_reference(model, tokens_of(model, 3, 5), aggregation, plain=True)


@pytest.mark.parametrize("aggregation", list(Aggregation), ids=lambda a: a.value)
def test_scores_do_not_depend_on_the_size_of_a_forward_pass(aggregation):
    model = model_of("Llama-3.1-8B")
    tokens = tokens_of(model, 10, 16)
    whole = collect(model, tokens, aggregation=aggregation, batch_size=4)
    for size in (1, 3):
        parts = collect(model, tokens, aggregation=aggregation, batch_size=4, micro_batch_size=size)
        for name, value in whole.to_dict().items():
            torch.testing.assert_close(parts.to_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("aggregation", ["mean_mean", "mean_norm", "mean_variance"])
def test_a_mean_over_the_batch_does_not_depend_on_the_batch_size(aggregation):
    model = model_of("Llama-3.1-8B")
    tokens = tokens_of(model, 10, 16)
    found = [
        collect(model, tokens, aggregation=Aggregation(aggregation), batch_size=size).to_dict()
        for size in (1, 4, 10)
    ]
    for name, value in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6)


def test_float32_accumulation_of_bfloat16_activations():
    model = model_of("Llama-3.1-8B")
    tokens = tokens_of(model, 4, 64)
    exact = collect(model, tokens).to_dict()
    coarse = collect(model.to(torch.bfloat16), tokens).to_dict()
    for name, value in coarse.items():
        assert value.dtype is torch.float32
        torch.testing.assert_close(value, exact[name], rtol=0.1, atol=0.02)


def test_nothing_is_left_behind_in_the_model():
    model = model_of("Gemma-2-2b")
    before = model(tokens_of(model, 1, 4))
    collect(model, tokens_of(model, 2, 4))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert isinstance(model.lm_head, torch.nn.Linear)
    assert model.config.final_logit_softcapping is not None
    assert before.shape[-1] == model.config.padded_vocab_size


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_layer_with_broken_activations_is_named(value):
    model = model_of("Llama-3.1-8B")
    with torch.no_grad():
        model.transformer.h[1].mlp.fc_2.weight[3, 5] = value
    with pytest.raises(ConfigError, match=r"transformer\.h\.1\.mlp\.proj are not finite in calib"):
        collect(model, tokens_of(model, 2, 4))
