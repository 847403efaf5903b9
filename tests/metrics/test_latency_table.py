import json
import random
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from litgpt import Config

from tests.conftest import tiny_config, uniform
from whittle_nas.errors import ConfigError
from whittle_nas.metrics import latency_parts, latency_table
from whittle_nas.metrics.latency_correction import fit_correction
from whittle_nas.metrics.latency_parts import Load, Phase, time_forward, time_whole
from whittle_nas.metrics.latency_table import LatencyTable
from whittle_nas.metrics.measured import peak_memory_bytes
from whittle_nas.space import SubNetwork, load_space
from whittle_nas.weights.axes import num_params
from whittle_nas.weights.info import SupernetInfo
from whittle_nas.weights.slicing import plan_slices

LOAD = Load(1, 16, torch.device("cpu"), torch.float32)


def table(path, config=None, load=LOAD) -> LatencyTable:
    config = config or tiny_config("Llama-3.1-8B")
    return LatencyTable(path, config, SupernetInfo.default(config), load)


@pytest.fixture
def counted(monkeypatch):
    """Times that follow from the sizes, and a count of measurements."""
    calls = []

    def stack(block, *_, **__):
        config = block.config
        calls.append(("block", config))
        windowed = bool(config.sliding_window_indices and config.sliding_window_indices[0])
        return 1.0 + config.n_embd * config.intermediate_size / 1000 + 5 * windowed

    def ends(config, *_, **__):
        calls.append(("ends", config))
        return config.n_embd / 10

    def whole(plan, *_, **__):
        return 2.0 + 1.1 * sum(map(stack, plan.blocks))

    monkeypatch.setattr(latency_table, "time_stack", stack)
    monkeypatch.setattr(latency_table, "time_ends", ends)
    monkeypatch.setattr(latency_table, "time_whole", whole)
    monkeypatch.setattr(latency_table, "time_pace", lambda *_: 1.0)
    return calls


def test_every_part_is_measured_once_and_kept(tmp_path, counted):
    first = table(tmp_path / "t.json")
    sub = uniform(32, 4, 4, 8, 40, 3)
    expected = 3 * (1.0 + 32 * 40 / 1000) + 3.2
    assert first.milliseconds(sub) == pytest.approx(expected)
    assert first.milliseconds(uniform(32, 4, 4, 8, 40, 1)) < expected
    assert len(counted) == 2
    assert table(tmp_path / "t.json").milliseconds(sub) == pytest.approx(expected)
    assert len(counted) == 2
    first.milliseconds(sub, Phase.decode)
    assert len(counted) == 4


@pytest.mark.usefixtures("counted")
def test_parts_of_slow_and_of_fast_minutes_are_comparable(tmp_path, monkeypatch):
    """A device that is twice as slow while the second part is timed, and says so."""
    steady, slow = latency_table.time_stack, [1.0]
    monkeypatch.setattr(latency_table, "time_stack", lambda *a, **k: slow[0] * steady(*a, **k))
    monkeypatch.setattr(latency_table, "time_pace", lambda *_: 3.0 * slow[0])
    latency, small, large = table(tmp_path / "t.json"), *uniform_pair()
    first = latency.parts(large)[0]
    slow[0] = 2.0
    assert latency.parts(small)[0] / first == pytest.approx((1 + 1.28) / (1 + 2.304))


def uniform_pair():
    return uniform(32, 4, 4, 8, 40, 3), uniform(32, 4, 4, 8, 72, 3)


@pytest.mark.usefixtures("counted")
def test_layers_with_and_without_a_window_are_different(tmp_path):
    config = tiny_config("Gemma-2-2b", n_layer=4)
    order = (1, 0, 2, 3)
    latency = LatencyTable(tmp_path / "t.json", config, SupernetInfo(layer_order=order), LOAD)
    windows = config.sliding_window_indices
    for n_layer in (1, 2, 3):
        sub = uniform(32, 4, 4, 8, 40, n_layer, order=order)
        expected = n_layer * (1 + 32 * 40 / 1000) + 5 * sum(windows[i] for i in order[:n_layer])
        assert latency.parts(sub)[0] == pytest.approx(expected)


def test_estimates_measure_little_and_agree_with_what_is_known(tmp_path, counted):
    latency = table(tmp_path / "t.json")
    space = load_space("aligned", tiny_config("Llama-3.1-8B"))
    rng = random.Random(0)
    subs = [space.sample(rng) for _ in range(20)]
    estimates = [latency.estimate(sub) for sub in subs]
    assert len(counted) <= 6
    exact = [latency.milliseconds(sub) for sub in subs]
    assert estimates == pytest.approx(exact, rel=0.2)
    assert [latency.estimate(sub) for sub in subs] == pytest.approx(exact)


@pytest.mark.usefixtures("counted")
def test_calibration_mends_what_sums_get_wrong(tmp_path):
    latency = table(tmp_path / "t.json")
    assert latency.accuracy() is None
    space = load_space("aligned", tiny_config("Llama-3.1-8B"))
    rng = random.Random(0)
    found = latency.calibrate([space.sample(rng) for _ in range(8)])
    assert found.corrected_error < 0.01 < found.sum_error
    assert table(tmp_path / "t.json").accuracy() == found
    fresh = space.smallest
    assert latency.milliseconds(fresh) == pytest.approx(latency.whole(fresh), rel=0.02)


@pytest.mark.parametrize(("off", "timed"), [(1.0, 4), (1.3, 8)])
def test_no_more_networks_are_timed_where_sums_are_right(
    tmp_path, counted, monkeypatch, off, timed
):
    assert not counted
    latency = table(tmp_path / "t.json")
    monkeypatch.setattr(latency, "whole", lambda sub, phase: off * sum(latency.parts(sub, phase)))
    space, rng = load_space("aligned", tiny_config("Llama-3.1-8B")), random.Random(0)
    found = latency.calibrate([space.sample(rng) for _ in range(8)], enough=4)
    assert found.networks == timed
    assert found.corrected_error < 0.01


def test_slow_runs_are_repeated_less(monkeypatch):
    clock = SimpleNamespace(now=0.0, runs=0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)

    def runs_of(milliseconds: float) -> int:
        def model(_ids):
            clock.now += milliseconds / 1e3
            clock.runs += 1

        clock.runs = 0
        assert time_forward(model, LOAD, Phase.prefill) == pytest.approx(milliseconds)
        return clock.runs

    assert runs_of(0.1) > 100
    assert 4 <= runs_of(120) <= 7
    assert runs_of(2500) == 2


def test_whole_networks_are_built_as_they_run(monkeypatch):
    """Not in float32 first, which takes three times the memory."""
    monkeypatch.setattr(latency_parts, "_REPEATS", 1)
    config = Config(
        n_layer=8, n_head=1, n_embd=64, padded_vocab_size=64, block_size=8, intermediate_size=512
    )
    plan = plan_slices(SubNetwork.from_config(config), config)
    load = Load(1, 4, LOAD.device, torch.bfloat16)
    peak = peak_memory_bytes(lambda: time_whole(plan, load, Phase.decode), load.device)
    assert peak < 1.3 * 2 * num_params(config)
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize("phase", Phase)
def test_a_plan_counts_what_timing_holds(monkeypatch, phase):
    monkeypatch.setattr(latency_parts, "_REPEATS", 1)
    monkeypatch.setattr(latency_parts, "_STACK_BYTES", 2**20)
    config = Config(
        n_layer=8, n_head=2, n_embd=128, padded_vocab_size=4096, block_size=64,
        intermediate_size=1024,
    )  # fmt: skip
    plan = plan_slices(SubNetwork.from_config(config), config)
    load = Load(2, 32, LOAD.device, torch.float32)
    timings = [
        partial(latency_parts.time_stack, plan.blocks[0], load, phase, highest=8),
        partial(latency_parts.time_ends, config, load, phase, whole=config),
        partial(time_whole, plan, load, phase),
    ]
    stack, ends, whole = (peak_memory_bytes(timing, load.device) for timing in timings)
    parts, beside = latency_parts.most_held(config, load)
    weights = 4 * num_params(config)
    assert max(stack, ends) < 1.1 * parts < 1.5 * max(stack, ends)
    assert weights < whole < weights + 1.1 * beside


def test_fit_is_not_bent_by_a_disturbed_network():
    rng = np.random.default_rng(0)
    parts = rng.uniform(1, 10, (16, 2))
    whole = 1.2 * parts[:, 0] + 0.9 * parts[:, 1] + 0.5
    whole[3] *= 4
    found = fit_correction(parts, whole)
    assert found.coefficients == pytest.approx((1.2, 0.9, 0.5), abs=0.05)


def test_a_sum_that_is_right_stays():
    parts = np.random.default_rng(0).uniform(1, 10, (8, 2))
    found = fit_correction(parts, parts.sum(axis=1))
    assert found.coefficients == pytest.approx((1, 1, 0), abs=1e-6)
    assert found.rank_correlation == pytest.approx(1)


@pytest.mark.usefixtures("counted")
def test_a_table_for_something_else_is_refused(tmp_path):
    table(tmp_path / "t.json").milliseconds(uniform(32, 4, 4, 8, 40, 3))
    with pytest.raises(ConfigError, match="tokens 16 .here 8."):
        table(tmp_path / "t.json", load=Load(1, 8, LOAD.device, LOAD.dtype))
    with pytest.raises(ConfigError, match="architecture"):
        table(tmp_path / "t.json", config=tiny_config("pythia-160m"))
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(ConfigError, match="can't be read"):
        table(tmp_path / "t.json")


def test_times_of_a_real_model_are_kept_and_positive(tmp_path):
    config = Config(
        n_layer=2, n_head=2, n_embd=32, padded_vocab_size=64, block_size=32, intermediate_size=64
    )
    load = Load(1, 16, LOAD.device, torch.bfloat16)  # which blocks of another format fail on
    latency = table(tmp_path / "t.json", config=config, load=load)
    small, large = uniform(16, 1, 1, 16, 16, 1, of=2), SubNetwork.from_config(config)
    for phase in Phase:
        assert latency.milliseconds(small, phase) > 0
        assert 0 < latency.whole(large, phase) < 1000
    assert set(json.loads((tmp_path / "t.json").read_text())["times"]) == {"prefill", "decode"}
