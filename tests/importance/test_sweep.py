"""The sweep against a loss that is known."""

import litgpt
import pytest
import torch

from whittle_nas.importance.sweep import sweep
from whittle_nas.space import SubNetwork, load_space
from whittle_nas.weights.supernet import SuperNetwork

CONFIG = litgpt.Config(
    n_layer=8, n_embd=64, n_head=8, n_query_groups=8, head_size=8, intermediate_size=256,
    vocab_size=1000, padded_vocab_size=1024, block_size=32, bias=False, norm_class_name="RMSNorm",
    mlp_class_name="LLaMAMLP", parallel_residual=False, rotary_percentage=1.0,
)  # fmt: skip


@pytest.fixture
def supernet() -> SuperNetwork:
    torch.manual_seed(0)
    return SuperNetwork(litgpt.GPT(CONFIG))


def loss(model) -> float:
    """2 nats for the whole, and 4 more for each dimension that is gone altogether."""
    config = model.config
    gone = sum(
        1 - getattr(config, name) / getattr(CONFIG, name)
        for name in ("n_embd", "n_head", "intermediate_size", "n_layer")
    )
    return 2 + 4 * gone


def test_space_reaches_to_where_the_loss_has_risen_by_the_bound(supernet):
    swept = sweep(supernet, loss, bound=0.25)
    assert swept.limit == pytest.approx(2 + 0.25 * (6.907755 - 2))
    # 1.227 of 4 nats: a dimension lives down to 69.3 % of its size, rounded up to a size there is
    lows = {name: spec["min"] for name, spec in swept.space.items()}
    assert lows == {"n_embd": 48, "n_head": 6, "intermediate_size": 192, "n_layer": 6}
    for points in swept.losses.values():
        sizes, losses = zip(*points, strict=True)
        assert list(sizes) == sorted(sizes, reverse=True)
        assert losses[-1] > swept.limit > losses[-2]
    space = load_space(swept.space, CONFIG)
    assert space.largest == SubNetwork.from_config(CONFIG)
    assert load_space(swept.to_dict()["space"], CONFIG) == space


def test_a_dimension_may_have_a_bound_of_its_own(supernet):
    swept = sweep(supernet, loss, bound=0.25, bounds={"n_layer": 0.5, "n_embd": 0.01})
    # 2.454 of 4 nats: down to 38.7 % of the layers; .049 nats: the whole width alone
    lows = {name: spec["min"] for name, spec in swept.space.items()}
    assert lows == {"n_embd": 64, "n_head": 6, "intermediate_size": 192, "n_layer": 4}
    assert swept.limits["n_layer"] == pytest.approx(2 + 0.5 * (6.907755 - 2))
    assert swept.to_dict()["limits"] == swept.limits


def test_a_model_that_nothing_hurts_keeps_every_size(supernet):
    swept = sweep(supernet, lambda _: 2.0, bound=0.25)
    assert {name: spec["min"] for name, spec in swept.space.items()} == {
        name: points[-1][0] for name, points in swept.losses.items()
    }


def test_a_model_that_everything_hurts_keeps_the_whole_alone(supernet):
    swept = sweep(supernet, lambda model: 2.0 if model.config == CONFIG else 99.0, bound=0.25)
    space = load_space(swept.space, CONFIG)
    assert space.smallest == space.largest == SubNetwork.from_config(CONFIG)
