import json

import pytest

from tests.conftest import uniform
from whittle_nas.errors import ConfigError
from whittle_nas.space.front import (
    Constraint,
    Front,
    FrontEntry,
    parse_constraints,
    pick_entry,
    read_front,
)

ENTRIES = tuple(
    FrontEntry(
        index,
        uniform(8 * (index + 1), 2, 2, 8, 16, 2, of=2),
        {"val_loss": 4.0 - index, "num_params": 100.0 * (index + 1), "latency_ms": 9.0 - 2 * index},
    )
    for index in range(4)
)
FRONT = Front(("val_loss", "num_params"), ENTRIES, "checkpoints/x", {"seed": 1})


def test_a_written_front_reads_back_the_same(tmp_path):
    path = tmp_path / "front.json"
    path.write_text(FRONT.dump())
    found = read_front(path, range(2))
    assert found.entries == FRONT.entries
    assert found.objectives == FRONT.objectives
    assert found.checkpoint_dir == "checkpoints/x"


@pytest.mark.parametrize("name", ["val_loss", "latency_ms"])
def test_a_number_beyond_all_floats_is_one_sentence(tmp_path, name):
    spec = json.loads(FRONT.dump())
    spec["front"][0]["metrics"][name] = 10**400
    path = tmp_path / "front.json"
    path.write_text(json.dumps(spec))
    with pytest.raises(ConfigError, match="too large"):
        read_front(path, range(2))


def test_constraints_are_read_from_text_and_lists():
    assert parse_constraints("num_params <= 6e9, latency_ms<40") == (
        Constraint("num_params", "<=", 6e9),
        Constraint("latency_ms", "<", 40.0),
    )
    assert parse_constraints(["1 - arc_easy.acc_norm <= 0.5"])[0].metric == "1 - arc_easy.acc_norm"
    assert parse_constraints(None) == ()


@pytest.mark.parametrize("text", ["num_params", "num_params <= much", "<= 3", "a = 3", "a <= nan"])
def test_malformed_constraints(text):
    with pytest.raises(ConfigError, match="--constraints"):
        parse_constraints(text)


@pytest.mark.parametrize(
    ("relation", "value", "held"),
    [("<=", 3, True), ("<", 3, False), (">=", 3, True), (">", 3, False), ("<", 2.9, True)],
)
def test_limits_at_equality(relation, value, held):
    limit = Constraint("x", relation, 3.0)
    assert limit.holds({"x": value}) is held
    assert (limit.excess(value) == 0) is held


def test_pick_takes_the_best_under_the_limits():
    assert pick_entry(FRONT, pick="num_params <= 250").index == 1
    assert pick_entry(FRONT, pick="num_params <= 350, latency_ms >= 7").index == 1
    # A limit on quality: the cheapest that is good enough.
    assert pick_entry(FRONT, pick="val_loss <= 3").index == 1
    assert pick_entry(FRONT, index=3).subnetwork.n_embd == 32


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pick": "num_params <= 50"}, "nearest has num_params = 100"),
        ({"pick": "num_params <= 150, latency_ms <= 5"}, "at once"),
        ({"pick": "size <= 1"}, "unknown metric 'size'"),
        ({"pick": " "}, "--pick is empty"),
        ({"index": 7}, "0 to 3"),
    ],
)
def test_what_can_not_be_picked(arguments, words):
    with pytest.raises(ConfigError, match=words):
        pick_entry(FRONT, **arguments)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 1}', '{"format": 9}', '{"format": 1, "front": [{}]}']
)
def test_files_that_are_no_front(tmp_path, text):
    (tmp_path / "front.json").write_text(text)
    with pytest.raises(ConfigError, match=r"--front .*front\.json"):
        read_front(tmp_path / "front.json", range(2))


def test_a_missing_or_empty_front_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="can't be read"):
        read_front(tmp_path / "none.json", range(2))
    spec = json.loads(FRONT.dump()) | {"front": []}
    (tmp_path / "front.json").write_text(json.dumps(spec))
    with pytest.raises(ConfigError, match="no sub-network"):
        read_front(tmp_path / "front.json", range(2))
