"""Layer orders against whole models built without those layers."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from litgpt import GPT

from tests.conftest import fill_random, tiny_config
from whittle_nas.importance.layers import falling_order, greedy_order, losses_without_each
from whittle_nas.importance.narrowing import narrowed, narrowed_sizes
from whittle_nas.importance.scores import rank
from whittle_nas.importance.sorting import PermutedTensors
from whittle_nas.importance.statistics import collect
from whittle_nas.space import SubNetwork
from whittle_nas.weights.info import SupernetInfo
from whittle_nas.weights.supernet import SuperNetwork


def loss_of_layers(model: GPT, layers: list[int], tokens: torch.Tensor) -> float:
    """Loss of the sub-network that keeps exactly these layers, through the slicing core."""
    rest = [layer for layer in range(model.config.n_layer) if layer not in layers]
    supernet = SuperNetwork(model, SupernetInfo(layer_order=(*layers, *rest)))
    sizes = {**SubNetwork.from_config(model.config).to_dict(), "n_layer": len(layers)}
    logits = supernet.standalone(SubNetwork(**sizes))(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


@pytest.mark.parametrize("kind", ["Llama-3.1-8B", "Gemma-3-1b-it", "Gemma-2-2b", "pythia-160m"])
def test_losses_are_those_of_the_model_without_the_layer(kind):
    model = fill_random(GPT(tiny_config(kind, n_layer=4))).eval()
    tokens = torch.randint(0, 96, (5, 17))
    kept = [0, 1, 3]
    expected = [loss_of_layers(model, [m for m in kept if m != n], tokens) for n in kept]
    found = losses_without_each(model, tokens, kept=kept, batch_size=2)
    assert found == pytest.approx(expected, rel=1e-5)


def test_greedy_drops_the_cheapest_layer_each_time():
    model = fill_random(GPT(tiny_config("Llama-3.1-8B", n_layer=4))).eval()
    tokens = torch.randint(0, 96, (4, 17))
    order, losses = greedy_order(model, tokens)
    kept = [0, 1, 2, 3]
    for layer in reversed(order[1:]):
        candidates = itertools.combinations(kept, len(kept) - 1)
        cheapest = min(loss_of_layers(model, list(rest), tokens) for rest in candidates)
        kept.remove(layer)
        assert loss_of_layers(model, kept, tokens) == pytest.approx(cheapest, rel=1e-5)
        assert losses[layer] == pytest.approx(cheapest, rel=1e-5)
    assert kept == order[:1]


@pytest.mark.parametrize(
    ("kind", "heads", "groups"),
    [("Llama-3.1-8B", 8, 4), ("pythia-160m", 3, 3), ("Gemma-3-1b-it", 3, 1), ("falcon-7b", 4, 1)],
)
def test_a_narrowed_model_is_the_sub_network_of_the_sorted_one(kind, heads, groups):
    config = tiny_config(kind)
    model = fill_random(GPT(config)).eval()
    tokens = torch.randint(0, 96, (2, 12))
    orders = rank(collect(model, tokens), config)
    sub = narrowed_sizes(config, 0.75)
    wanted = (36, heads, groups, round(0.75 * config.intermediate_size), config.n_layer)
    assert (
        sub.n_embd, sub.n_head, sub.n_query_groups, sub.intermediate_size, sub.n_layer
    ) == wanted  # fmt: skip
    sorted_model = GPT(config)
    sorted_model.load_state_dict(dict(PermutedTensors(model.state_dict, orders, config)))
    expected = SuperNetwork(sorted_model.eval()).standalone(sub)(tokens)
    narrow = narrowed(model, orders, 0.75)
    torch.testing.assert_close(narrow(tokens), expected)
    one_less = SubNetwork(**{**sub.to_dict(), "n_layer": config.n_layer - 1})
    without_first = SupernetInfo(layer_order=(*range(1, config.n_layer), 0))
    logits = SuperNetwork(sorted_model, without_first).standalone(one_less)(tokens[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    found = losses_without_each(narrow, tokens, kept=range(config.n_layer))
    assert found[0] == pytest.approx(loss, rel=1e-5)
    assert narrowed(model, orders, 1.0) is model


def test_the_loss_is_computed_in_pieces(monkeypatch):
    model = fill_random(GPT(tiny_config("Gemma-2-2b"))).eval()
    tokens = torch.randint(0, 96, (3, 12))
    whole = losses_without_each(model, tokens, kept=[0, 1, 2])
    monkeypatch.setattr("whittle_nas.importance.layers._CHUNK", 96 * 5)
    assert losses_without_each(model, tokens, kept=[0, 1, 2]) == pytest.approx(whole, rel=1e-6)


def test_falling_order_keeps_ties_in_place():
    assert falling_order([1.0, 3.0, 1.0, 2.0]) == [1, 3, 0, 2]
