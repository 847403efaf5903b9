"""Methods that drop layers, against their formulas written out on whole models."""

import copy

import pytest
import torch
import torch.nn.functional as F
from litgpt import GPT

from tests.conftest import fill_random, tiny_config
from whittle_nas.errors import ConfigError
from whittle_nas.prune.laco import check_range, laco
from whittle_nas.prune.options import LaCoOptions
from whittle_nas.prune.shortened_llama import shortened_llama, shortened_llama_taylor
from whittle_nas.prune.shortgpt import shortgpt
from whittle_nas.prune.store import BlockStore

FAMILIES = ["Llama-2-7b-hf", "Llama-3.1-8B", "phi-2"]  # MHA, GQA, biases
TOKENS = torch.randint(0, 96, (3, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=FAMILIES)
def model(request):
    return fill_random(GPT(tiny_config(request.param, n_layer=6))).eval()


def without(model, layer):
    """The model with one layer replaced by the identity."""
    twin = copy.deepcopy(model)
    twin.transformer.h[layer].forward = lambda x, *_args: x
    return twin


def loss(model):
    logits = model(TOKENS[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())


def test_shortgpt_keeps_the_layers_that_turn_the_stream_most(model):
    seen = {}
    for at, block in enumerate(model.transformer.h):
        block.register_forward_hook(lambda _, x, y, at=at: seen.update({at: (x[0], y)}))
    with torch.no_grad():
        model(TOKENS[:, :-1])
    scores = [1 - F.cosine_similarity(x, y, dim=-1).mean().item() for x, y in seen.values()]
    best = sorted(sorted(range(6), key=lambda layer: -scores[layer])[:4])
    assert shortgpt(model, TOKENS, drop=2) == best


def test_shortened_llama_keeps_the_layers_whose_loss_is_missed(model):
    with torch.no_grad():
        losses = [loss(without(model, layer)).item() for layer in range(6)]
    kept, found = shortened_llama(model, TOKENS, drop=2)
    assert found == pytest.approx(losses, rel=1e-4)
    assert kept == sorted(sorted(range(6), key=lambda layer: -losses[layer])[:4])


def test_shortened_llama_goes_on_with_the_losses_that_it_had(model, tmp_path):
    def store():
        return BlockStore(tmp_path / "out", {"run": 1})

    def killed(layers, _label, _count):
        for layer in layers:
            if layer == 2:
                raise KeyboardInterrupt
            yield layer

    _, whole = shortened_llama(model, TOKENS, drop=2)
    with pytest.raises(KeyboardInterrupt):
        shortened_llama(model, TOKENS, drop=2, store=store(), progress=killed)
    assert sorted(path.name for path in store().path.glob("*.pth")) == ["0.pth", "1.pth"]
    store().put(0, {"loss": 99.0})  # to see that it is taken from there
    kept, losses = shortened_llama(model, TOKENS, drop=5, store=store())
    assert losses == [99.0, *whole[1:]]
    assert kept == [0]


def test_taylor_sums_weights_times_gradients_and_protects_the_ends(model):
    twin = copy.deepcopy(model)
    loss(twin).backward()
    expected = [
        sum((p * p.grad).abs().sum().item() for p in block.parameters())
        for block in twin.transformer.h
    ]
    kept, scores = shortened_llama_taylor(model, TOKENS, drop=2, first=1, last=1)
    assert scores == pytest.approx(expected, rel=1e-4)
    inner = sorted(range(1, 5), key=lambda layer: -expected[layer])[:2]
    assert kept == sorted([0, *inner, 5])
    assert not any(p.requires_grad for p in model.transformer.h.parameters())
    with pytest.raises(ConfigError, match="drop 3 of 6 layers, but Taylor"):
        shortened_llama_taylor(model, TOKENS, drop=3, first=2, last=2)


@pytest.mark.parametrize("like_notebook", [False, True])
def test_laco_merges_by_the_papers_sum_or_ends_with_the_last_layer(model, like_notebook):
    options = LaCoOptions(threshold=-1, merge_layers=3, interval=1, lowest=0)
    found = laco(model, TOKENS, options, like_notebook=like_notebook, drop=2)
    assert found.layers == [0, 1, 2, 3]
    assert found.tried[0][:2] == (3, 2)
    blocks = [block.state_dict() for block in model.transformer.h]
    for name, weight in found.blocks[3].state_dict().items():
        a, b, c = (blocks[layer][name] for layer in (3, 4, 5))
        torch.testing.assert_close(weight, c if like_notebook else a + (b - a) + (c - a))


def test_merges_that_overflow_are_refused(model):
    with torch.no_grad():  # a neuron that says nothing, until its weight is infinite
        for layer, weight in ((3, -2e38), (4, 2e38), (5, 2e38)):
            mlp = model.transformer.h[layer].mlp
            for name, value in mlp.named_parameters():
                if name.startswith("fc"):
                    value[0] = 0
            mlp.proj.weight[0, 0] = weight
    with pytest.raises(ConfigError, match=r"2 layers behind transformer\.h\.3 merged .* not fin"):
        laco(model, TOKENS, LaCoOptions(-1, 3, 1, 0))


@pytest.mark.parametrize(
    ("option", "value", "right"),
    [
        ("merge_layers", 1, "from 2 to 5"),
        ("merge_layers", 6, "from 2 to 5"),
        ("highest", 99, "from 2 to 6"),
        ("lowest", 5, "from 0 to 4"),
        ("interval", 0, "at least 1"),
        ("sentences", 0, "at least 1"),
    ],
)
def test_constants_of_laco_with_which_nothing_could_merge_are_refused(option, value, right):
    check_range(LaCoOptions(), 6)
    with pytest.raises(ConfigError, match=f"--laco.{option} {value} must be {right}"):
        check_range(LaCoOptions(**{option: value}), 6)


def test_laco_accepts_and_refuses_as_its_threshold_says(model):
    options = LaCoOptions(threshold=0.5, merge_layers=2, interval=1, lowest=0, sentences=3)
    everything = laco(model, TOKENS, LaCoOptions(-1, 2, 1, 0))
    assert len(everything.layers) < 4
    with torch.no_grad():
        original = []
        model.transformer.ln_f.register_forward_hook(lambda _m, _x, y: original.append(y))
        model(TOKENS)
    threshold = sorted(cosine for *_, cosine, _ in everything.tried)[1] + 1e-6
    found = laco(model, TOKENS, LaCoOptions(threshold, 2, 1, 0))
    assert all(stays == (cosine > threshold) for *_, cosine, stays in found.tried)
    assert not all(stays for *_, stays in found.tried)
    assert len(found.layers) == 6 - sum(run for _, run, _, stays in found.tried if stays)
    for before, after in zip(found.tried, found.tried[1:], strict=False):
        assert after[0] == before[0] - 1  # interval 1, or one down after a refusal
    # the first cosine again, from a whole model with one block fewer
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in twin.transformer.h[4].named_parameters():
            weight += model.transformer.h[5].get_parameter(name) - weight
    twin.transformer.h = twin.transformer.h[:5]
    states = []
    twin.transformer.ln_f.register_forward_hook(lambda _m, _x, y: states.append(y))
    with torch.no_grad():
        twin(TOKENS)
    cosine = F.cosine_similarity(states[-1].flatten(1), original[0].flatten(1)).mean().item()
    assert laco(model, TOKENS, options).tried[0][2] == pytest.approx(cosine, abs=1e-5)
