"""Search spaces: presets, membership, counting, round trips and wrong input."""

import json
import random

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from litgpt import Config

from tests.conftest import resized, tiny_config, uniform
from whittle_nas.errors import ConfigError
from whittle_nas.space import HeadChannels, SearchSpace, SubNetwork, load_space, violations
from whittle_nas.space.presets import preset_names

FULL = uniform(16, 8, 4, 8, 24, 4, of=4)
PRESET_MODELS = {
    "aligned": "Llama-3.1-8B",
    "v1-pythia": "pythia-410m",
    "v1-llama-2": "Llama-2-7b-hf",
    "v1-llama-3.1": "Llama-3.1-8B",
    "v1-phi-3": "Phi-3-mini-4k-instruct",
    "v3-joint": "Llama-3.1-8B",
    "v3-fixed-head-size": "Llama-3.1-8B",
    "v3-fixed-head": "Llama-3.1-8B",
}


def test_every_preset_has_a_model_here():
    assert sorted(PRESET_MODELS) == preset_names()


@pytest.mark.parametrize(("preset", "model"), PRESET_MODELS.items())
def test_presets_hold_the_whole_model_and_survive_round_trips(preset, model):
    config = Config.from_name(model)
    space = load_space(preset, config)
    assert space.largest == SubNetwork.from_config(config)
    for text in (json.dumps(space.to_dict()), yaml.safe_dump(space.to_dict())):
        assert SearchSpace.from_dict(yaml.safe_load(text), space.full) == space
    rng = random.Random(0)
    for _ in range(100):
        member = space.sample(rng)
        assert space.contains(member)
        assert violations(member, config) == []
        assert space.build(**space.genes(member)) == member
        for near in space.neighbours(member):
            assert space.contains(near)
            assert near != member


def test_aligned_space_keeps_tiles_and_groups():
    space = load_space("aligned", Config.from_name("Llama-3.1-8B"))
    rng = random.Random(1)
    for sub in (space.sample(rng) for _ in range(200)):
        (block,) = sub.shapes
        assert sub.n_embd % 64 == 0
        assert block.intermediate_size % 64 == 0
        assert block.n_query_groups == 8
        assert block.n_head % 8 == 0


def domains(limit: int) -> st.SearchStrategy:
    values = st.lists(st.integers(1, limit), min_size=1, max_size=4)
    bounds = st.tuples(st.integers(1, limit), st.integers(1, 3)).map(
        lambda pair: {"min": pair[0], "max": "full", "step": pair[1]}
    )
    return st.one_of(values, bounds, st.just("full"))


spaces = st.fixed_dictionaries(
    {},
    optional={
        "n_embd": domains(16),
        "n_head": domains(8),
        "n_query_groups": domains(4),
        "intermediate_size": domains(24),
        "n_layer": domains(4),
    },
)


@settings(max_examples=60, deadline=None)
@given(spaces, st.booleans(), st.integers(0, 2**16))
def test_counting_agrees_with_listing(spec, by_ratio, seed):
    if by_ratio:
        spec = {
            **{k: v for k, v in spec.items() if k != "intermediate_size"},
            "mlp_ratio": [0.5, 1, 1.5],
        }
    try:
        space = SearchSpace.from_dict(spec, FULL)
    except ConfigError as error:
        assert "query groups" in str(error)  # noqa: PT017 - both outcomes are legal
        return
    members = list(space.members())
    assert len(set(members)) == len(members) == space.num_members()
    assert all(space.contains(member) for member in members)
    assert space.smallest in members
    assert space.largest in members
    assert space.sample(random.Random(seed)) in members
    assert SearchSpace.from_dict(json.loads(json.dumps(space.to_dict())), FULL) == space


@settings(max_examples=100, deadline=None)
@given(st.builds(uniform, *[st.integers(1, 40)] * 5, st.integers(1, 3)))
def test_subnetwork_round_trip_and_rules(sub):
    assert SubNetwork.from_dict(json.loads(json.dumps(sub.to_dict())), range(3)) == sub
    config = tiny_config("Llama-3.1-8B")
    broken = violations(sub, config)
    space = load_space(
        {
            "n_embd": {"max": "full"}, "n_head": {"max": "full"}, "n_query_groups": {"max": "full"},
            "intermediate_size": {"max": "full"}, "n_layer": {"max": "full"},
            "head_size": [2, 4, 8],
        },
        config,
    )  # fmt: skip
    assert space.contains(sub) == (broken == [])


def test_log_uniform_draws_small_sizes_more_often():
    space = load_space("v1-pythia", Config.from_name("pythia-410m"))
    rng = random.Random(0)
    draws = [space.sample(rng).n_embd for _ in range(2000)]
    assert 0.4 < sum(d <= 32 for d in draws) / 2000 < 0.6  # half of log 1024


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"n_embed": [1]}, "unknown dimension n_embed"),
        ([1], "unknown dimension"),
        ({"n_embd": [17]}, "n_embd runs from 17 to 17"),
        ({"n_embd": [0]}, "n_embd runs from 0"),
        ({"n_embd": []}, "no value"),
        ({"n_embd": {"min": 9, "max": 3}}, "no value"),
        ({"n_embd": ["x"]}, "n_embd='x' must be a whole number"),
        ({"n_embd": [1.5]}, "n_embd=1.5 must be a whole number"),
        ({"n_embd": [True]}, "n_embd=True"),
        ({"n_embd": {"low": 1}}, "unknown keys"),
        ({"n_embd": {"min": 1, "step": 0}}, "step=0"),
        ({"n_embd": {"min": 1, "factor": 1}}, "factor >= 2"),
        ({"n_embd": {"log_uniform": "yes"}}, "log_uniform"),
        ({"mlp_ratio": [1], "intermediate_size": [8]}, "not both"),
        ({"mlp_ratio": [3]}, "mlp_ratio runs from 3"),
        ({"n_head": [7]}, "no n_head of .* whole query groups"),
    ],
)
def test_wrong_spaces(spec, message):
    with pytest.raises(ConfigError, match=message):
        SearchSpace.from_dict(spec, FULL)


def test_wrong_files(tmp_path):
    config = tiny_config("Llama-3.1-8B")
    with pytest.raises(ConfigError, match="neither a YAML file nor one of the presets"):
        load_space("no-such-preset", config)
    bad = tmp_path / "space.yaml"
    bad.write_text("n_embd: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_space(str(bad), config)
    bad.write_text("n_embd: !!python/name:os.system")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_space(str(bad), config)
    bad.write_text("head_size: [3]")
    with pytest.raises(
        ConfigError, match=r"head_size=3 has 3 rotary channels.*head sizes that fit"
    ):
        load_space(str(bad), config)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"n_embd": 49}, "n_embd=49 must be between 1 and the model's 48"),
        ({"n_layer": 0}, "n_layer=0"),
        ({"n_head": 6}, "must be a multiple of n_query_groups=4"),
        ({"n_head": 8, "n_query_groups": 2}, "4 heads per group, the model has 2"),
        ({"head_size": 6}, "6 rotary channels"),
    ],
)
def test_rules_are_named(change, rule):
    config = tiny_config("Llama-3.1-8B")
    sub = resized(SubNetwork.from_config(config), **change)
    assert any(rule in broken for broken in violations(sub, config))


def test_first_dims_allow_sizes_that_rope_exact_refuses():
    config = tiny_config("Llama-3.1-8B")
    sub = resized(SubNetwork.from_config(config), head_size=6)
    assert violations(sub, config, HeadChannels.first) == []


def test_yarn_refuses_smaller_heads():
    adjustments = {"factor": 4.0, "beta_fast": 32, "beta_slow": 1, "original_max_seq_len": 32}
    config = tiny_config("Llama-3.1-8B", rope_adjustments=adjustments)
    sub = resized(SubNetwork.from_config(config), head_size=4)
    assert "YaRN" in violations(sub, config)[0]


@pytest.mark.parametrize(
    "sizes", [{}, None, [1], {"n_embd": 1}, {**FULL.to_dict(), "n_embd": 1.5},
              {**FULL.to_dict(), "n_layer": 0}, {**FULL.to_dict(), "n_layer": True},
              {**FULL.to_dict(), "more": 1}],
)  # fmt: skip
def test_wrong_sizes(sizes):
    with pytest.raises(ConfigError, match="sub-network"):
        SubNetwork.from_dict(sizes, range(4))


@pytest.mark.parametrize("spec", [[10**400], {"min": 1, "max": 10**400}, {"step": -(10**400)}])
def test_a_number_beyond_all_floats_is_one_sentence(spec):
    with pytest.raises(ConfigError, match="n_embd"):
        SearchSpace.from_dict({"n_embd": spec}, FULL)
