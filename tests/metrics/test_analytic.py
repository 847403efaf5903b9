"""Costs from sizes against what torch and litgpt count."""

from functools import partial

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


def test_times_are_taken_in_turn_and_the_fastest_turn_counts():
    order: list[str] = []
    times = {"a": iter([3.0, 1.0, 2.0]), "b": iter([5.0, 7.0, 4.0])}

    def timing(name):
        order.append(name)
        return {"ms": next(times[name])}

    left: list[int] = []
    found = measured.in_turn([partial(timing, n) for n in "ab"], on_progress=left.append)
    assert order == ["a", "b"] * measured.TURNS
    assert found == [{"ms": 1.0}, {"ms": 4.0}]
    assert left == [5, 4, 3, 2, 1, 0]
