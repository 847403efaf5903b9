"""Layer orders against whole models built without those layers."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from litgpt import GPT

from tests.conftest import fill_random, resized, tiny_config
from whittle_nas.data import TextData, load_blocks
from whittle_nas.importance.layers import falling_order, greedy_order, loss_of, losses_without
from whittle_nas.importance.narrowing import narrowed_sizes
from whittle_nas.space import SubNetwork
from whittle_nas.weights.checkpoint import load_supernet
from whittle_nas.weights.info import SupernetInfo
from whittle_nas.weights.supernet import SuperNetwork


def loss_of_layers(model: GPT, layers: list[int], tokens: torch.Tensor) -> float:
    """Loss of the sub-network that keeps exactly these layers, through the slicing core."""
    rest = [layer for layer in range(model.config.n_layer) if layer not in layers]
    supernet = SuperNetwork(model, SupernetInfo(layer_order=(*layers, *rest)))
    whole = SubNetwork.from_config(model.config)
    sub = resized(whole, order=supernet.info.layer_order, n_layer=len(layers))
    logits = supernet.standalone(sub)(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


def narrow_model(kind: str, n_layer: int) -> GPT:
    """Skeleton of a narrow sub-network, as the layer order looks at it."""
    config = tiny_config(kind, n_layer=n_layer)
    supernet = SuperNetwork(fill_random(GPT(config)).eval())
    return supernet.subnet(narrowed_sizes(config, 0.75))


@pytest.mark.parametrize("kind", ["Llama-3.1-8B", "Gemma-3-1b-it", "Gemma-2-2b", "pythia-160m"])
def test_losses_are_those_of_the_model_without_the_layer(kind):
    model = fill_random(GPT(tiny_config(kind, n_layer=4))).eval()
    tokens = torch.randint(0, 96, (5, 17))
    kept = [0, 1, 3]
    expected = {n: loss_of_layers(model, [m for m in kept if m != n], tokens) for n in (1, 3)}
    found = losses_without(model, tokens, [3, 1], kept=kept, batch_size=2)
    assert found == pytest.approx(expected, rel=1e-5)
    whole = loss_of_layers(model, kept, tokens)
    assert loss_of(model, tokens, kept=kept, batch_size=2) == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("min_layers", [1, 3])
def test_greedy_drops_the_cheapest_layer_each_time(min_layers, bundled):
    """On a trained model, whose layers differ in what they are worth."""
    supernet = load_supernet(bundled)
    model, depth = supernet.model, supernet.config.n_layer
    text = TextData(files=bundled / "calibration.jsonl", num_blocks=4, block_size=64)
    tokens = load_blocks(text, bundled, config=supernet.config).tokens
    order, losses = greedy_order(model, tokens, min_layers=min_layers)
    assert sorted(order) == list(range(depth))
    kept = list(range(depth))
    for layer in reversed(order[min_layers:]):
        without = losses_without(model, tokens, kept, kept=kept)
        assert without[layer] <= min(without.values()) + 1e-6
        assert losses[layer] == pytest.approx(without[layer], rel=1e-5)
        kept.remove(layer)
    assert sorted(order[:min_layers]) == kept


def test_greedy_with_few_layers_is_exact():
    model = narrow_model("Llama-3.1-8B", 5)
    tokens = torch.randint(0, 96, (4, 17))
    order, _ = greedy_order(model, tokens)
    kept = list(range(5))
    for layer in reversed(order[1:]):
        without = {n: loss_of(model, tokens, kept=[m for m in kept if m != n]) for n in kept}
        assert layer == min(without, key=without.__getitem__)
        kept.remove(layer)


def test_layers_beside_a_gap_are_tried_again(monkeypatch):
    """Leaving out the first layers makes the next but one the cheapest, which was dear before."""
    costs = {(): [9, 9, 9, 9, 1, 9, 9, 5, 9, 9], (4,): [9, 9, 9, 9, 0, 9, 2, 5, 9, 9]}

    def losses(_model, _tokens, candidates, *, kept, **_):
        gone = tuple(layer for layer in range(10) if layer not in kept)
        return {layer: float(costs[gone][layer]) for layer in candidates}

    monkeypatch.setattr("whittle_nas.importance.layers.losses_without", losses)
    monkeypatch.setattr("whittle_nas.importance.layers.loss_of", lambda *_, **__: 0.0)
    model = GPT(tiny_config("Llama-3.1-8B", n_layer=10))
    assert greedy_order(model, torch.zeros(4, 2), min_layers=8)[0][-2:] == [6, 4]


@pytest.mark.slow
def test_fewer_layers_run_than_by_trying_them_all():
    model = narrow_model("Llama-3.1-8B", 16)
    blocks = Counter()
    for block in model.transformer.h:
        block.register_forward_hook(lambda *_: blocks.update(["runs"]))
    tokens = torch.randint(0, 96, (16, 9))
    greedy_order(model, tokens, min_layers=8, batch_size=4)
    everything = 4 * sum(m * (m + 1) // 2 for m in range(1, 17))
    assert blocks["runs"] < everything / 2


@pytest.mark.parametrize(
    ("kind", "heads", "groups"),
    [("Llama-3.1-8B", 8, 4), ("pythia-160m", 3, 3), ("Gemma-3-1b-it", 3, 1), ("falcon-7b", 4, 1)],
)
def test_sizes_of_a_narrow_network(kind, heads, groups):
    config = tiny_config(kind)
    sub = narrowed_sizes(config, 0.75)
    wanted = (36, heads, groups, round(0.75 * config.intermediate_size), config.n_layer)
    sizes = sub.summary()
    del sizes["head_size"]
    assert tuple(sizes.values()) == wanted
    assert narrowed_sizes(config, 1.0) == SubNetwork.from_config(config)


def test_the_loss_is_computed_in_pieces(monkeypatch):
    model = fill_random(GPT(tiny_config("Gemma-2-2b"))).eval()
    tokens = torch.randint(0, 96, (3, 12))
    whole = loss_of(model, tokens, kept=[0, 1, 2])
    monkeypatch.setattr("whittle_nas.calibration.steps._LOGITS", 96 * 5)
    assert loss_of(model, tokens, kept=[0, 1, 2]) == pytest.approx(whole, rel=1e-6)


def test_falling_order_keeps_ties_in_place():
    assert falling_order([1.0, 3.0, 1.0, 2.0]) == [1, 3, 0, 2]
