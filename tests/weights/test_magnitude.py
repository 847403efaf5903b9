"""Counts and magnitudes of sub-networks against the sub-networks' own tensors."""

import random

import pytest
import torch

from tests.conftest import fill_random, tiny_config
from whittle_nas.space import SearchSpace, SubNetwork, load_space
from whittle_nas.train import lora
from whittle_nas.train.options import LoraOptions
from whittle_nas.weights import axes
from whittle_nas.weights.counting import parameter_counter
from whittle_nas.weights.info import SupernetInfo
from whittle_nas.weights.magnitude import Magnitudes, plain_tensors
from whittle_nas.weights.supernet import SuperNetwork

ORDER = (2, 0, 1)


def members(space, count=25):
    rng = random.Random(0)
    return {space.smallest, space.largest, *(space.sample(rng) for _ in range(count))}


def check(space, supernet):
    info, config = supernet.info, supernet.config
    magnitude = Magnitudes(
        supernet.model.state_dict(),
        config,
        space,
        head_channels=info.head_channels,
    )
    for sub in members(space):
        expected = sum(float(t.double().abs().sum()) for t in supernet.slices(sub).values())
        assert magnitude(sub) == pytest.approx(expected, rel=1e-6)


def test_magnitude_of_every_family(tiny_gpt):
    supernet = SuperNetwork(tiny_gpt, SupernetInfo(layer_order=ORDER))
    check(load_space("aligned", tiny_gpt.config, layer_order=ORDER), supernet)


@pytest.mark.parametrize(
    "spec",
    [
        {"n_embd": {"min": 1, "max": "full", "log_uniform": True}, "mlp_ratio": [0.5, 1, 1.4]},
        {"n_head": [2, 4, 8], "head_size": [4, 8], "n_layer": [1, 3]},
        {
            "n_head": {"min": 0},
            "intermediate_size": [0, 24],
            "per_layer": ["n_head", "intermediate_size"],
        },
        {"n_query_groups": [1, 2, 4], "n_head": {"min": 1, "max": 8}, "n_embd": [7, 48]},
    ],
)
def test_magnitude_of_every_kind_of_dimension(spec):
    config = tiny_config("Qwen3-0.6B")
    model = fill_random(torch.nn.Module.eval(lora.GPT(lora.lora_config(config, LoraOptions(r=2)))))
    plain = SuperNetwork(_plain(model, config), SupernetInfo(layer_order=ORDER))
    check(SearchSpace.from_dict(spec, SubNetwork.from_config(config), layer_order=ORDER), plain)


def _plain(model, config):
    import litgpt

    plain = litgpt.GPT(config)
    plain.load_state_dict(plain_tensors(model.state_dict()))
    return plain.eval()


def test_weights_longer_than_a_stretch_of_rows(monkeypatch):
    monkeypatch.setattr("whittle_nas.weights.magnitude.ROWS", 7)
    test_magnitude_of_every_kind_of_dimension({"intermediate_size": {"min": 1, "max": "full"}})


def test_counts_of_every_family(family):
    config = tiny_config(family)
    count = parameter_counter(config)
    space = load_space("aligned", config)
    supernet = SuperNetwork(fill_random(_empty(config)), SupernetInfo(layer_order=ORDER))
    for sub in members(space):
        model = supernet.standalone(sub)
        assert count(sub) == sum(p.numel() for p in model.parameters())
        assert count(sub) == axes.num_params(model.config)


def _empty(config):
    import litgpt

    return litgpt.GPT(config)
