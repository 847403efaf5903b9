"""Costs from sizes against what torch and litgpt count."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from litgpt import GPT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import tiny_config
from whittle_nas.metrics import measured
from whittle_nas.metrics.analytic import AnalyticCosts
from whittle_nas.space import SubNetwork


def test_flops_match_torchs_counter(tiny_gpt):
    config, tokens = tiny_gpt.config, 16
    # The plain kernel, whose matrix products torch counts on every device.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tiny_gpt(torch.zeros(1, tokens, dtype=torch.long))
    # torch counts the whole square of attention, we count the causal part inside each window.
    square = 4 * config.n_head * config.head_size * tokens**2 * config.n_layer
    seen = 0
    for layer in range(config.n_layer):
        slides = config.sliding_window_size and config.sliding_window_indices[layer]
        window = config.sliding_window_size if slides else tokens
        seen += sum(min(position + 1, window) for position in range(tokens))
    causal = 4 * config.n_head * config.head_size * seen
    assert (
        AnalyticCosts(config).flops(SubNetwork.from_config(config), tokens)
        == counter.get_total_flops() - square + causal
    )


@pytest.mark.parametrize("length", [5, 40])
def test_kv_cache_bytes_are_litgpts(tiny_gpt, length):
    tiny_gpt.set_kv_cache(2, max_seq_length=length, dtype=torch.bfloat16)
    caches = [
        buffer for block in tiny_gpt.transformer.h for buffer in block.attn.kv_cache.buffers()
    ]
    held = sum(buffer.numel() * buffer.element_size() for buffer in caches)
    costs, whole = AnalyticCosts(tiny_gpt.config), SubNetwork.from_config(tiny_gpt.config)
    counted = costs.kv_cache_bytes(whole, batch=2, length=length, dtype=torch.bfloat16)
    assert counted == held


def test_weight_bytes_and_non_embedding(tiny_gpt):
    held = sum(p.numel() * 2 for p in tiny_gpt.parameters())
    costs, whole = AnalyticCosts(tiny_gpt.config), SubNetwork.from_config(tiny_gpt.config)
    assert costs.weight_bytes(whole, torch.float16) == held
    blocks = sum(p.numel() for p in tiny_gpt.transformer.h.parameters())
    last = sum(p.numel() for p in tiny_gpt.transformer.ln_f.parameters())
    assert costs.num_params_non_embedding(whole) == blocks + last


def test_the_rate_of_a_slow_format_is_measured_with_few_rows(monkeypatch):
    """A row takes 10 ms here, so ten of them are what a tenth of a second allows."""
    rows = []

    def timed(run, _device, **_):
        rows.append(len(run()))
        return measured.Timing(10.0 * rows[-1], 1)

    monkeypatch.setattr(measured, "time_runs", timed)
    rate = measured.matmul_rate(torch.device("cpu"), torch.float32, 512, 64, 32, seconds=0)
    assert rows == [8, 10]
    assert rate == pytest.approx(2 * 64 * 32 / 0.01)
    rows.clear()
    monkeypatch.setattr(measured, "time_runs", lambda *a, **k: replace(timed(*a, **k), median_ms=1))
    measured.matmul_rate(torch.device("cpu"), torch.float32, 512, 64, 32, seconds=0)
    assert rows == [8, 512]


@pytest.mark.parametrize(
    ("lasts_s", "warm_ms", "took_s"),
    [(0.0, 2.0, 2.0), (1.0, 2.0, 3.0), (99.0, 1.0, 10.0)],
    ids=["steady at once", "slower when warm", "never warm"],
)
def test_a_rate_is_measured_until_it_lasts(monkeypatch, lasts_s, warm_ms, took_s):
    """A device that is half as fast after a while, or slower and slower."""
    clock = SimpleNamespace(now=0.0)

    def timed(_run, _device, *, warmup, repeats):
        ms = warm_ms if clock.now >= lasts_s else 1.0 + (clock.now if lasts_s == 99.0 else 0.0)
        clock.now += (warmup + repeats) * ms / 1e3
        return measured.Timing(ms, repeats)

    monkeypatch.setattr(measured, "time_runs", timed)
    monkeypatch.setattr(measured, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    rate = measured.matmul_rate(torch.device("cpu"), torch.float32, 64, 64, 32, seconds=10)
    assert clock.now == pytest.approx(took_s, abs=0.6)
    if lasts_s < 99:
        assert rate == pytest.approx(2 * 64 * 64 * 32 / (warm_ms / 1e3))
    else:  # of the last rounds
        assert 2 * 64 * 64 * 32 / rate == pytest.approx((1 + 8.0) / 1e3, rel=0.15)


def test_measured_latency_and_memory_are_positive_and_leave_no_cache():
    from whittle_nas.metrics import measured

    model = GPT(tiny_config("Llama-3.1-8B")).eval()
    timing = measured.prefill_latency(model, batch=2, tokens=16, repeats=3)
    assert timing.median_ms > 0
    assert timing.repeats == 3
    assert measured.decode_latency(model, batch=2, context=16, repeats=4).median_ms > 0
    assert model.transformer.h[0].attn.kv_cache is None


def test_peak_memory_of_known_tensors():
    from whittle_nas.metrics.measured import peak_memory_bytes

    def run() -> None:
        first = torch.ones(1 << 20)  # 4 MiB
        del first
        second = torch.ones(2 << 20)  # 8 MiB, after the first is gone
        second.add_(1)

    assert peak_memory_bytes(run, torch.device("cpu")) == pytest.approx(8 << 20, rel=0.01)


def test_times_are_taken_in_turn_at_one_speed():
    """The machine is a third slower for half of the time, in two long stretches."""
    true, order, left = [1.0, 2.0, 4.0, 8.0], [], []

    def timing(number):
        order.append(number)
        slow = len(order) in range(5, 11) or len(order) in range(16, 21)
        return {"ms": true[number] * (1.33 if slow else 1.0), "twice": 2 * true[number]}

    runs = [partial(timing, number) for number in range(4)]
    found = measured.in_turn(runs, on_progress=left.append)
    turns = [sorted(order[at : at + 4]) for at in range(0, len(order), 4)]
    assert turns == [[0, 1, 2, 3]] * measured.TURNS
    assert left == list(range(4 * measured.TURNS - 1, -1, -1))
    whole = found[-1]["ms"]
    assert [times["ms"] / whole for times in found] == pytest.approx(
        [0.125, 0.25, 0.5, 1.0], rel=1e-2
    )
    assert 8.0 <= whole <= 8.0 * 1.33 * 1.001
    assert [times["twice"] for times in found] == pytest.approx([2.0, 4.0, 8.0, 16.0])
    assert measured.at_one_speed([0, 0, 0], [3.0, 1.0, 2.0]) == pytest.approx([2.0])
    assert measured.in_turn([]) == []
