"""A search space in which everything can be computed at once, with a known front."""

import numpy as np
import pytest

from tests.conftest import uniform
from whittle_nas.search.searchers import Problem
from whittle_nas.space import SearchSpace, SubNetwork

FULL = uniform(64, 8, 4, 8, 176, 6, of=6)
SPEC = {
    "n_embd": {"min": 16, "step": 8},
    "n_head": [2, 4, 8],
    "n_query_groups": [2, 4],
    "intermediate_size": {"min": 16, "step": 32},
    "n_layer": {"min": 1},
}


PER_LAYER = {
    "n_embd": [32, 64],
    "n_query_groups": [0, 1, 2, 4],
    "intermediate_size": [0, 48, 112, 176],
    "n_layer": {"min": 4},
    "per_layer": ["n_query_groups", "intermediate_size"],
}


def toy_cost(sub: SubNetwork) -> float:
    """Parameters of the blocks, about."""
    rows = ((2 * b.n_head + 2 * b.n_query_groups) * b.head_size for b in sub.blocks if b)
    neurons = sum(b.intermediate_size for b in sub.blocks if b)
    return float(sub.n_embd * (sum(rows) + 3 * neurons))


def toy_loss(sub: SubNetwork) -> float:
    """Saturates in every dimension, as the loss of super-networks does."""
    sizes, full = sub.summary(), FULL.summary()
    shares = [sizes[name] / full[name] for name in ("n_embd", "intermediate_size")]
    penalty = sum((1 - share) ** 2 for share in shares) + 0.3 / max(sizes["n_head"], 0.5)
    return 1.2 + 2 * penalty + 0.5 * (6 - sub.n_layer) ** 1.5 / 6


@pytest.fixture
def space() -> SearchSpace:
    return SearchSpace.from_dict(SPEC, FULL)


@pytest.fixture
def problem(space) -> Problem:
    return Problem(
        space,
        ("val_loss", "num_params"),
        costs={"num_params": toy_cost},
        size=toy_cost,
        first=[space.largest, space.smallest],
    )


def values(sub: SubNetwork) -> np.ndarray:
    return np.array([toy_loss(sub), toy_cost(sub)])
