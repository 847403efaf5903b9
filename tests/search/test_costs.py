import random

import pytest
import torch

from tests.conftest import tiny_config
from whittle_nas.metrics.latency_parts import Load
from whittle_nas.search.costs import Costs
from whittle_nas.space import SubNetwork, load_space
from whittle_nas.weights.assembly import assemble
from whittle_nas.weights.info import SupernetInfo
from whittle_nas.weights.slicing import plan_slices

TOKENS, BATCH = 40, 2


def costs_of_real_model(sub: SubNetwork, config) -> dict[str, int]:
    """From the parameters, caches and products of a model that is built."""
    model = assemble(plan_slices(sub, config))
    params = dict(model.named_parameters())
    count = sum(p.numel() for p in params.values())
    tables = ("transformer.wte.weight", "lm_head.weight", "lm_head.bias")
    products = sum(p.numel() for n, p in params.items() if p.dim() == 2 and n != tables[0])
    model.set_kv_cache(BATCH, max_seq_length=TOKENS, dtype=torch.bfloat16)
    attended, cached = 0, 0
    for block in model.transformer.h:
        if (cache := block.attn.kv_cache) is not None:
            cached += sum(buffer.nbytes for buffer in cache.buffers())
            window = cache.k.shape[2]  # a layer that slides keeps no more than it sees
            seen = sum(min(position + 1, window) for position in range(TOKENS))
            attended += block.attn.config.n_head * block.attn.config.head_size * seen
    return {
        "num_params": count,
        "num_params_non_embedding": count - sum(params[n].numel() for n in tables if n in params),
        "flops": 2 * products * TOKENS + 4 * attended,
        "weight_bytes": 2 * count,
        "memory_bytes": 2 * count + cached,
    }


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("family", ["Llama-3.1-8B", "Gemma-2-2b", "pythia-160m", "falcon-7b"])
def test_costs_are_those_of_the_sub_networks_model(family, per_layer):
    config = tiny_config(family, n_layer=4)
    info = SupernetInfo(layer_order=(3, 0, 2, 1))
    costs = Costs(config, info, Load(BATCH, TOKENS, torch.device("cpu"), torch.bfloat16))
    spec = {"n_head": {"min": 0}, "intermediate_size": [0, 40, 72], "n_layer": {"min": 2},
            "per_layer": ["n_head", "intermediate_size"]}  # fmt: skip
    space = load_space(spec if per_layer else "aligned", config, layer_order=info.layer_order)
    rng = random.Random(0)
    for sub in [space.smallest, space.largest, *(space.sample(rng) for _ in range(8))]:
        assert costs.of(sub) == costs_of_real_model(sub, config)
