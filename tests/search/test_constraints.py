import pytest

from tests.search.conftest import FULL, toy_cost
from whittle_nas.errors import ConfigError
from whittle_nas.search.constraints import (
    check_attainable,
    excess_function,
    read_constraints,
    untrained_dimensions,
)
from whittle_nas.search.objectives import parse_objectives
from whittle_nas.space import SearchSpace


def cost(sub, name):
    return toy_cost(sub) if name == "num_params" else float(sub.n_layer)


def test_objectives_are_brought_to_one_spelling():
    assert parse_objectives("val_loss, num_params") == ("val_loss", "num_params")
    assert parse_objectives(["1-arc_easy.acc", "flops"]) == ("1 - arc_easy.acc", "flops")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("val_loss", "two or more"),
        ("val_loss,val_loss", "different"),
        ("", "two or more"),
        ("val_loss,size", "unknown metric 'size'; choose from val_loss"),
    ],
)
def test_wrong_objectives(text, words):
    with pytest.raises(ConfigError, match=words):
        parse_objectives(text)


def test_unknown_metric_in_a_constraint():
    with pytest.raises(ConfigError, match="--constraints: unknown metric 'params'"):
        read_constraints("params <= 1")


def test_excess_is_relative_and_leaves_out_quality(space):
    excess = excess_function(read_constraints("num_params <= 1000, val_loss <= 0"), cost)
    assert excess(space.largest) == pytest.approx(toy_cost(space.largest) / 1000 - 1)
    exactly = toy_cost(space.smallest)
    assert excess_function(read_constraints(f"num_params < {exactly}"), cost)(space.smallest) > 0
    assert excess_function(read_constraints(f"num_params <= {exactly}"), cost)(space.smallest) == 0


def test_attainable_limits_pass(space):
    check_attainable(space, read_constraints("num_params <= 20000, num_params >= 19000"), cost)
    check_attainable(space, read_constraints("val_loss <= -1"), cost)


def test_nearest_attainable_value(space):
    nearest = f"{toy_cost(space.smallest):.6g}"
    with pytest.raises(ConfigError, match=f"nearest attainable value is {nearest}"):
        check_attainable(space, read_constraints("num_params <= 10"), cost)
    nearest = f"{toy_cost(space.largest):.6g}"
    with pytest.raises(ConfigError, match=f"nearest attainable value is {nearest}"):
        check_attainable(space, read_constraints("num_params > 1e9"), cost)


def test_limits_that_exclude_each_other(space):
    limits = read_constraints("num_params >= 200000, num_params <= 100000")
    with pytest.raises(ConfigError, match="at once"):
        check_attainable(space, limits, cost)


def test_sizes_beyond_the_trained_space(space):
    assert untrained_dimensions(space, space) == []
    narrow = SearchSpace.from_dict({"n_embd": {"min": 32, "step": 8}, "n_layer": [3, 6]}, FULL)
    beyond = untrained_dimensions(space, narrow)
    assert any(name.startswith("n_embd=") for name in beyond)
    assert any(name.startswith("n_layer=") for name in beyond)
    assert (
        untrained_dimensions(
            narrow,
            SearchSpace.from_dict({"n_embd": {"min": 16, "step": 8}, "n_layer": {"min": 1}}, FULL),
        )
        == []
    )
