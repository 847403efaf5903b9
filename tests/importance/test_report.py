"""The report's arithmetic, and which sub-networks it draws."""

import math

import pytest
import torch
from litgpt import GPT

from tests.conftest import fill_random, tiny_config, uniform
from whittle_nas.importance.report import (
    draw_subnetworks,
    improvement,
    make_report,
    perplexities,
)
from whittle_nas.space import SubNetwork, load_space
from whittle_nas.weights.axes import num_params
from whittle_nas.weights.supernet import SuperNetwork


def test_rpd_is_the_mean_relative_difference():
    config = tiny_config("Llama-3.1-8B")
    subs = draw_subnetworks(load_space("aligned", config), 4, seed=0)
    report = make_report(subs, [5.0, 10, 20, 40, 10], [5.0, 5, 10, 50, 10], config)
    assert report.rpd == [0.5, 0.5, -0.25, 0.0]
    found = report.improvement
    assert (found.mean, found.median, found.share_improved) == (0.1875, 0.25, 0.5)
    assert found.quantile_10 == pytest.approx(-0.175)
    assert found.quantile_90 == pytest.approx(0.5)
    written = report.to_dict()
    first = {n: v for n, v in written["subnetworks"][0].items() if n in subs[0].to_dict()}
    assert SubNetwork.from_dict(first, range(3)) == subs[0]
    plan = SuperNetwork(GPT(config)).plan(subs[0])
    assert written["subnetworks"][0]["num_params"] == num_params(plan.config)


def test_one_sub_network_is_enough():
    assert improvement([0.25]).quantile_90 == 0.25


def test_draws_are_different_members_and_repeat():
    space = load_space("aligned", tiny_config("Llama-3.1-8B"))
    drawn = draw_subnetworks(space, 20, seed=3)
    assert len(set(drawn)) == 20
    assert all(space.contains(sub) for sub in drawn)
    assert drawn == draw_subnetworks(space, 20, seed=3)
    assert drawn != draw_subnetworks(space, 20, seed=4)


def test_a_small_space_is_listed_whole():
    config = tiny_config("Llama-3.1-8B")
    space = load_space({"n_layer": [1, 2, 3]}, config)
    assert draw_subnetworks(space, 10, seed=0) == list(space.members())


def test_perplexity_is_the_exponential_of_the_loss_of_the_sub_network():
    model = fill_random(GPT(tiny_config("Llama-3.1-8B"))).eval()
    supernet = SuperNetwork(model)
    subs = [supernet.full, uniform(24, 4, 4, 8, 36, 2)]
    tokens = torch.randint(0, 96, (2, 9))

    def loss(network) -> float:
        logits = network(tokens[:, :-1]).flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).item()

    found = perplexities(supernet, subs, loss)
    expected = [math.exp(loss(supernet.subnet(sub))) for sub in subs]
    assert found == pytest.approx(expected, rel=1e-5)
    assert math.isfinite(perplexities(supernet, subs[:1], lambda _: 1e6)[0])
