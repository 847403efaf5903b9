import random

import pytest
import torch

from tests.conftest import tiny_config
from whittle_nas.metrics import analytic
from whittle_nas.metrics.latency_parts import Load
from whittle_nas.search.costs import Costs
from whittle_nas.space import load_space
from whittle_nas.weights.info import SupernetInfo


@pytest.mark.parametrize("family", ["Llama-3.1-8B", "Gemma-2-2b", "pythia-160m", "phi-2"])
def test_costs_are_those_of_the_sub_networks_config(family):
    config = tiny_config(family, n_layer=4)
    info = SupernetInfo(layer_order=(3, 0, 2, 1))
    load = Load(2, 40, torch.device("cpu"), torch.bfloat16)
    costs = Costs(config, info, load)
    space = load_space("aligned", config)
    rng = random.Random(0)
    for sub in [space.smallest, space.largest, *(space.sample(rng) for _ in range(10))]:
        own = costs.config_of(sub)
        weights = analytic.weight_bytes(own, torch.bfloat16)
        cache = analytic.kv_cache_bytes(own, batch=2, length=40, dtype=torch.bfloat16)
        assert costs.of(sub) == {
            "num_params": analytic.num_params(own),
            "num_params_non_embedding": analytic.num_params_non_embedding(own),
            "flops": analytic.flops(own, 40),
            "weight_bytes": weights,
            "memory_bytes": weights + cache,
        }
        assert len(costs.layers(sub)) == sub.n_layer
