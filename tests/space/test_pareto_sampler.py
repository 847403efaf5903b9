"""The Pareto sampler: what it draws from, what it scores, and that it is a value."""

import random

import litgpt
import pytest

from whittle_nas.space import load_space
from whittle_nas.space.pareto import ParetoSampler
from whittle_nas.weights.counting import parameter_counter

CONFIG = litgpt.Config(
    n_layer=4, n_embd=64, n_head=4, n_query_groups=4, head_size=16, intermediate_size=128,
    padded_vocab_size=64, block_size=32, bias=False, norm_class_name="RMSNorm",
    mlp_class_name="LLaMAMLP", parallel_residual=False, rotary_percentage=1.0,
)  # fmt: skip


@pytest.fixture
def sampler() -> ParetoSampler:
    return ParetoSampler.start(load_space("aligned", CONFIG), parameter_counter(CONFIG), 6)


def by_depth(sub) -> float:
    """A loss that depends on the layers alone: a shallow network is never on the front."""
    return 10.0 - sub.n_layer


def rounds(sampler, count=6):
    for step in range(count):
        subs = sampler.candidates(random.Random(step), 24)
        sampler = sampler.updated([(sub, by_depth(sub)) for sub in subs])
    return sampler


def test_front_holds_what_no_cheaper_member_beats(sampler):
    front = rounds(sampler).front()
    costs, losses = [sampler.cost(sub) for sub in front], [by_depth(sub) for sub in front]
    assert costs == sorted(costs)
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == len(losses)


def test_most_draws_are_of_the_front_or_next_to_it_and_some_from_anywhere(sampler):
    trained = rounds(sampler)
    front = trained.front()
    near = {sub for member in front for sub in trained.space.neighbours(member)}
    rng = random.Random(0)
    drawn = [trained.sample(rng, 1)[0] for _ in range(600)]
    on_front = sum(sub in front for sub in drawn) / 600
    close = sum(sub in near and sub not in front for sub in drawn) / 600
    assert 0.5 < on_front < 0.75
    assert 0.15 < close < 0.45
    assert all(trained.space.contains(sub) for sub in drawn)
    assert any(sub not in near and sub not in front for sub in drawn)


def test_draws_depend_on_the_generator_alone(sampler):
    trained = rounds(sampler)
    again = trained.restored(trained.state())
    assert again.sample(random.Random(4), 5) == trained.sample(random.Random(4), 5)
    assert again.candidates(random.Random(4), 9) == trained.candidates(random.Random(4), 9)
    assert len(set(trained.sample(random.Random(1), 3))) == 3


def test_a_new_loss_replaces_the_old_one_of_its_bin(sampler):
    sub = sampler.space.largest
    trained = sampler.updated([(sub, 1.0)]).updated([(sub, 2.0)])
    assert trained.state()[0]["loss"] == 2.0
