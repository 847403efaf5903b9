"""Latency and memory, measured on the device that the model is on."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.optimize import linprog

TURNS = 5


@dataclass(frozen=True)
class Timing:
    """Milliseconds of repeated runs.

    Attributes:
        median_ms: the figure to report.
        repeats: number of timed runs.
    """

    median_ms: float
    repeats: int


def time_runs(run: Callable[[], Any], device: torch.device, *, warmup: int, repeats: int) -> Timing:
    """Time a function, waiting for the device before and after each run.

    Args:
        run: what to time.
        device: device it works on.
        warmup: runs that are not timed: caches fill, kernels are chosen.
        repeats: timed runs.
    """
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return Timing(statistics.median(times), repeats)


def in_turn(
    timings: Sequence[Callable[[], Mapping[str, float]]],
    *,
    on_progress: Callable[[int], object] = lambda _: None,
) -> list[dict[str, float]]:
    """Times that are compared with one another: all are taken in turn, and set to one speed.

    Shared machines get slower and faster by a quarter, and stay so for seconds or minutes.

    Args:
        timings: of one network each: times by name.
        on_progress: is told how many are left.

    Returns:
        For each its times by name, see `at_one_speed`.
    """
    order: list[int] = []
    rng = random.Random(0)
    for _ in range(TURNS):  # each in another order: everything has many neighbours
        order += rng.sample(range(len(timings)), len(timings))
    taken = []
    for left, number in enumerate(order, 1 - len(order)):
        taken.append(timings[number]())
        on_progress(-left)
    found: list[dict[str, float]] = [{} for _ in timings]
    for name in taken[0] if taken else ():
        for times, time_ in zip(
            found, at_one_speed(order, [one[name] for one in taken]), strict=True
        ):
            times[name] = time_
    return found


def at_one_speed(order: Sequence[int], times: Sequence[float]) -> list[float]:
    """The times of things that were timed one after the other while the machine's speed changed.

    Most neighbours were timed at the same speed, so the ratio of their times should be that of what
    is found for their things: the absolute errors of the logarithms are least.

    Args:
        order: which thing was timed, one after the other; all of 0 to the largest are in it.
        times: what was measured.

    Returns:
        The time of each thing, at the median speed.
    """
    which, logs = np.array(order), np.log(np.maximum(times, 1e-9))
    steps, count = len(which) - 1, which.max() + 1
    ratios = np.zeros((steps, count))
    ratios[np.arange(steps), which[1:]] += 1
    ratios[np.arange(steps), which[:-1]] -= 1
    # Unknown are the things and the absolute errors, whose sum is least; the first thing is 0.
    errors, target = np.eye(steps), np.diff(logs)
    found = linprog(
        np.repeat([0.0, 1.0], [count, steps]),
        A_ub=np.block([[ratios, -errors], [-ratios, -errors]]),
        b_ub=np.concatenate([target, -target]),
        bounds=[(0, 0), *[(None, None)] * (count - 1), *[(0, None)] * steps],
    ).x[:count]
    return np.exp(found + np.median(logs - found[which])).tolist()


@torch.inference_mode()
def prefill_latency(
    model: Any, *, batch: int, tokens: int, warmup: int = 2, repeats: int = 10
) -> Timing:
    """Time of a forward pass over `(batch, tokens)` ids, without a cache.

    Args:
        model: a litgpt model, see `SuperNetwork.standalone`.
        batch: sequences.
        tokens: tokens per sequence.
        warmup: runs that are not timed.
        repeats: timed runs.
    """
    ids = _random_ids(model, batch, tokens)
    return time_runs(lambda: model(ids), ids.device, warmup=warmup, repeats=repeats)


@torch.inference_mode()
def decode_latency(
    model: Any, *, batch: int, context: int, warmup: int = 2, repeats: int = 16
) -> Timing:
    """Time of generating one token per sequence with a key-value cache.

    Args:
        model: a litgpt model, see `SuperNetwork.standalone`; its cache is cleared afterwards.
        batch: sequences that are decoded together.
        context: tokens in the cache before the first timed one.
        warmup: tokens that are not timed.
        repeats: timed tokens.
    """
    ids = _random_ids(model, batch, context)
    dtype = model.lm_head.weight.dtype
    longest = context + warmup + repeats
    model.set_kv_cache(batch, max_seq_length=longest, device=ids.device, dtype=dtype)
    try:
        model(ids, torch.arange(context, device=ids.device), input_pos_maxp1=context)
        position = context

        def step() -> None:
            nonlocal position
            at = torch.tensor([position], device=ids.device)
            model(ids[:, -1:], at, input_pos_maxp1=position + 1)
            position += 1

        return time_runs(step, ids.device, warmup=warmup, repeats=repeats)
    finally:
        model.clear_kv_cache()


def peak_memory_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Most bytes of tensors that `run` held at once, beyond what was there before.

    On CUDA the caching allocator's own count; elsewhere summed from the profiler's record of every
    allocation and release.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    results: Any = profile.profiler.kineto_results  # type: ignore[union-attr]
    changes = [
        (event.start_ns(), event.nbytes())
        for event in results.events()
        if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak


_FEW_ROWS = 8  # of a product that is tried first
# How long a rate is measured at most: a GPU lowers its clock while it gets warm.
_RATE_S = {"cuda": 10.0}
_RATE_S_ELSEWHERE = 0.3
_ROUNDS, _STEADY = 4, 0.02  # as many rounds in a row that differ by less end it earlier


def matmul_rate(
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    inputs: int,
    outputs: int,
    *,
    seconds: float | None = None,
) -> float:
    """Floating-point operations per second of matrix products (rows, inputs) x (inputs, outputs).

    What a device reaches on them is the most that passes through a model of these widths reach. It
    is the rate that lasts: rounds of a twentieth of the time go on until they are alike.

    Args:
        device: which one.
        dtype: number format.
        rows: tokens of a product; on a CPU at most 512 of them, and 2048 of the others, and so few
            that a product takes a tenth of a second: bfloat16 may be a thousand times slower there.
        inputs: columns of the one, rows of the other matrix.
        outputs: columns of the other matrix.
        seconds: how long to measure at most, after one product that is not timed; None: ten on a
            GPU, .3 elsewhere.
    """
    most = (2**14, 2**14, 2**15) if device.type == "cuda" else (512, 2048, 2048)
    sizes = [min(pair) for pair in zip((rows, inputs, outputs), most, strict=True)]
    like: Any = {"device": device, "dtype": dtype}
    left, right = torch.rand(sizes[0], sizes[1], **like), torch.rand(sizes[1], sizes[2], **like)
    with torch.inference_mode():
        few = left[:_FEW_ROWS]
        first = time_runs(lambda: few @ right, device, warmup=1, repeats=1).median_ms
        sizes[0] = min(sizes[0], max(len(few), int(len(few) * 100 / first)))
        left = left[: sizes[0]]
        if seconds is None:
            seconds = _RATE_S.get(device.type, _RATE_S_ELSEWHERE)
        run, until = partial(torch.matmul, left, right), time.perf_counter() + seconds
        rounds = [_best_of_round(run, device, seconds / 20)]
        while time.perf_counter() < until and not is_steady(rounds):
            rounds.append(_best_of_round(run, device, seconds / 20))
    return 2.0 * sizes[0] * sizes[1] * sizes[2] / (min(rounds[-_ROUNDS:]) / 1e3)


def is_steady(rounds: Sequence[float]) -> bool:
    """Whether the last few times are alike."""
    last = rounds[-_ROUNDS:]
    return len(last) == _ROUNDS and max(last) <= (1 + _STEADY) * min(last)


def _best_of_round(run: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Milliseconds of a function: the lowest of the medians that are measured in a while."""
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until or best == float("inf"):
        best = min(best, time_runs(run, device, warmup=1, repeats=3).median_ms)
    return best


def _random_ids(model: Any, batch: int, tokens: int) -> torch.Tensor:
    device = model.lm_head.weight.device
    return torch.randint(0, model.config.vocab_size, (batch, tokens), device=device)


def _synchronize(device: torch.device) -> None:
    if device.type in ("cuda", "mps"):
        # a GPU that is not the current one has to be named, and Apple has one only
        torch.cuda.synchronize(device) if device.type == "cuda" else torch.mps.synchronize()
