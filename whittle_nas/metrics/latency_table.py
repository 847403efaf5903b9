"""Latency of any sub-network from times of its parts, each measured once and kept in a file.

A network's time is the sum of its blocks' and its ends' (embedding, last norm, head). What the sum
gets wrong, such as calls that overlap, is corrected by a fit to whole networks.
"""

from __future__ import annotations

import hashlib
import json
import platform
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from whittle_nas.errors import ConfigError
from whittle_nas.metrics.latency_correction import (
    Accuracy,
    fit_correction,
    least_squares_at_least_zero,
    sums_are_right,
)
from whittle_nas.metrics.latency_parts import (
    ROUNDS,
    Load,
    Phase,
    time_ends,
    time_pace,
    time_stack,
    time_whole,
)
from whittle_nas.space.searchspace import SearchSpace
from whittle_nas.space.subnetwork import LINEAR, PARTS, SIZES, Block, SubNetwork
from whittle_nas.weights.config import BLOCKS, SHORTCUTS
from whittle_nas.weights.files import atomic_write_text
from whittle_nas.weights.info import SupernetInfo
from whittle_nas.weights.slicing import SlicePlan, plan_slices

FORMAT = 3  # times at one speed of the device
_PACE = "pace"  # key of the device's speed to which all times are set
_Kind = tuple[int, int]  # whether a layer has a sliding window, and which RoPE


class LatencyTable:
    """Block and end times of one model on one device under one load."""

    def __init__(self, path: Path, config: Any, info: SupernetInfo, load: Load) -> None:
        """Open the file, or start it.

        Args:
            path: JSON file; every new time is written to it at once.
            config: litgpt config of the super-network.
            info: its head channels.
            load: what is timed, and where.

        Raises:
            ConfigError: if the file holds times of something else.
        """
        self.path, self.load = path, load
        self._config, self._info = config, info
        self._header = _header(config, load)
        self._times: dict[str, dict[str, float]] = {}
        self._corrections: dict[str, Any] = {}
        self._estimators: dict[Phase, tuple[int, np.ndarray]] = {}
        self._layer_kinds = _layer_kinds(config)
        if path.exists():
            self._read()

    def milliseconds(self, sub: SubNetwork, phase: Phase = Phase.prefill) -> float:
        """Time of a sub-network; parts that were never seen are measured now."""
        return self._corrected(self.parts(sub, phase), phase)

    def has(self, phase: Phase) -> bool:
        """Whether there are times of a phase."""
        return bool(self._of(phase))

    def estimate(self, sub: SubNetwork, phase: Phase = Phase.prefill) -> float:
        """Time of a sub-network without measuring: unknown parts come from a regression."""
        if not self._of(phase):
            self._measure_some(phase)
        known = self._of(phase)
        blocks = 0.0
        for (block, kind), layers in self._kinds(sub).items():
            time = known.get(_block_key(sub.n_embd, block, kind))
            if time is None:
                time = float(_features(sub.n_embd, block) @ self._regression(phase))
            blocks += layers * time
        ends = known.get(_ends_key(sub)) or self._nearest_ends(sub, known)
        return self._corrected((blocks, ends), phase)

    def parts(self, sub: SubNetwork, phase: Phase = Phase.prefill) -> tuple[float, float]:
        """Milliseconds of all blocks and of the ends, uncorrected."""
        known, blocks = self._of(phase), 0.0
        for (block, kind), layers in self._kinds(sub).items():
            if (key := _block_key(sub.n_embd, block, kind)) not in known:
                timing = partial(self._time_block, sub, block, kind, phase)
                known[key] = self._paced(timing, phase)
                self._write()
            blocks += layers * known[key]
        if (key := _ends_key(sub)) not in known:
            config = self._plan(sub).config
            timing = partial(time_ends, config, self.load, phase, whole=self._config)
            known[key] = self._paced(timing, phase)
            self._write()
        return blocks, known[key]

    def whole(
        self, sub: SubNetwork, phase: Phase = Phase.prefill, *, rounds: int = ROUNDS
    ) -> float:
        """Milliseconds of the sub-network as one model, with random weights."""
        return time_whole(self._plan(sub), self.load, phase, rounds=rounds)

    def accuracy(self, phase: Phase = Phase.prefill) -> Accuracy | None:
        """What `calibrate` found, None before."""
        found = self._corrections.get(phase.value)
        return found and Accuracy(**{**found, "coefficients": tuple(found["coefficients"])})

    def calibrate(
        self,
        subs: Sequence[SubNetwork],
        phase: Phase = Phase.prefill,
        *,
        enough: int | None = None,
        on_progress: Callable[[], object] = lambda: None,
    ) -> Accuracy:
        """Time whole networks, fit the correction and write down what error is left.

        The error is that of networks which the fit has not seen: each is predicted by a fit to the
        others.

        Args:
            subs: at least four sub-networks, spread over the sizes.
            phase: what is timed.
            enough: after this many no more are timed if sums need no correction; None: all are.
            on_progress: called after each network.
        """
        parts, whole = [], []
        for sub in subs:
            parts.append(self.parts(sub, phase))
            whole.append(self._paced(partial(self.whole, sub, phase), phase))
            on_progress()
            if len(parts) == enough and sums_are_right(np.array(parts), np.array(whole)):
                break
        found = fit_correction(np.array(parts), np.array(whole))
        self._corrections[phase.value] = asdict(found)
        self._write()
        return found

    def _paced(self, timing: Callable[[], float], phase: Phase) -> float:
        """A time as it would have been at the device's speed when the first one was taken.

        Parts are timed when they are first seen, minutes apart, and shared machines change their
        speed by a quarter.
        """
        known, pace = self._of(phase), partial(time_pace, self._config, self.load, phase)
        before = pace()
        time, after = timing(), pace()
        return time * known.setdefault(_PACE, before) / ((before + after) / 2)

    def _corrected(self, parts: tuple[float, float], phase: Phase) -> float:
        found = self._corrections.get(phase.value)
        blocks, ends, constant = found["coefficients"] if found else (1.0, 1.0, 0.0)
        return blocks * parts[0] + ends * parts[1] + constant

    def _of(self, phase: Phase) -> dict[str, float]:
        """Known times by key."""
        return self._times.setdefault(phase.value, {})

    def _measure_some(self, phase: Phase) -> None:
        """Enough for a first regression."""
        full = SubNetwork.from_config(self._config)
        sizes, order = full.sizes() or {}, range(self._config.n_layer)
        for name in ("n_layer", "n_embd", "intermediate_size"):
            half = {**sizes, name: max(1, sizes[name] // 2)}
            self.parts(SubNetwork.uniform(order, **half), phase)

    def _regression(self, phase: Phase) -> np.ndarray:
        """Coefficients of `_features` for block times."""
        blocks = {key: time for key, time in self._of(phase).items() if key.startswith("block")}
        if self._estimators.get(phase, (0,))[0] != len(blocks):
            x = np.array([_features(*_of_key(key)) for key in blocks])
            y = np.array(list(blocks.values()))
            self._estimators[phase] = (
                len(blocks),
                least_squares_at_least_zero(x / y[:, None], np.ones(len(y))),
            )
        return self._estimators[phase][1]

    def _nearest_ends(self, sub: SubNetwork, known: dict[str, float]) -> float:
        widths = {int(k.split()[1]): time for k, time in known.items() if k.startswith("ends")}
        width = min(widths, key=lambda width: abs(width - sub.n_embd))
        return widths[width] * sub.n_embd / width

    def _kinds(self, sub: SubNetwork) -> Counter[tuple[Block, _Kind]]:
        """Different layers of a sub-network."""
        pairs = zip(sub.blocks, self._layer_kinds, strict=True)
        return Counter((block, kind) for block, kind in pairs if block is not None)

    def _time_block(self, sub: SubNetwork, block: Block, kind: _Kind, phase: Phase) -> float:
        at = next(
            i
            for i, pair in enumerate(zip(sub.blocks, self._layer_kinds, strict=True))
            if pair == (block, kind)
        )
        plan = self._plan(sub).blocks[sub.layers.index(at)]
        return time_stack(plan, self.load, phase, highest=self._config.n_layer)

    def _plan(self, sub: SubNetwork) -> SlicePlan:
        return plan_slices(sub, self._config, head_channels=self._info.head_channels)

    def _read(self) -> None:
        try:
            spec = json.loads(self.path.read_text(encoding="utf-8"))
            header, times, corrections = spec["header"], spec["times"], spec["corrections"]
            self._times = {p: {k: float(v) for k, v in t.items()} for p, t in times.items()}
            self._corrections = dict(corrections)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"latency table {self.path} can't be read: {error!r}") from None
        differing = [
            f"{name} {header.get(name)!r} (here {value!r})"
            for name, value in self._header.items()
            if header.get(name) != value
        ]
        if differing:
            raise ConfigError(
                f"latency table {self.path} was measured for {', '.join(differing)}; give another "
                "file"
            )

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        spec = {"header": self._header, "times": self._times, "corrections": self._corrections}
        atomic_write_text(self.path, json.dumps(spec, indent=1) + "\n")


def calibration_networks(space: SearchSpace, count: int, seed: int) -> list[SubNetwork]:
    """The largest and the smallest member, and random ones."""
    rng = random.Random(seed)
    return [space.largest, space.smallest, *(space.sample(rng) for _ in range(count - 2))]


def device_name(device: torch.device) -> str:
    """What times depend on: the GPU, or the processor and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    processor = platform.processor() or platform.machine()
    return f"{processor}, {torch.get_num_threads()} threads"


def _header(config: Any, load: Load) -> dict[str, Any]:
    sizes = {*SIZES, "name", "hf_config"}
    per_layer = {"sliding_window_indices", "rope_indices"}
    rest: dict[str, Any] = {f.name: getattr(config, f.name) for f in fields(config)}
    kind = {name: value for name, value in rest.items() if name not in sizes | per_layer}
    for name in (SHORTCUTS, BLOCKS):  # words of ours that most models do not need
        if not kind.get(name):
            kind.pop(name, None)
    digest = hashlib.sha256(repr(sorted(kind.items())).encode()).hexdigest()[:12]
    return {
        "format": FORMAT,
        "architecture": digest,
        "device": device_name(load.device),
        "dtype": str(load.dtype).removeprefix("torch."),
        "batch": load.batch,
        "tokens": load.tokens,
    }


def _layer_kinds(config: Any) -> list[_Kind]:
    """Sliding window and RoPE of every layer."""
    window = config.sliding_window_indices or [0] * config.n_layer
    rope = config.rope_indices or [0] * config.n_layer
    return [(int(w), int(r)) for w, r in zip(window, rope, strict=True)]


def _block_key(n_embd: int, block: Block, kind: _Kind) -> str:
    """Everything that a block's time depends on."""
    named = zip(PARTS, block.plain.forms, strict=True)  # nothing here runs others any faster
    forms = (f"{part}={form}" for part, form in named if form)
    return " ".join(map(str, ("block", n_embd, *block.sizes, *kind, *forms)))


def _of_key(key: str) -> tuple[int, Block]:
    """Width and block of a key."""
    n_embd, *sizes = map(int, key.split()[1:6])
    forms = dict(word.split("=") for word in key.split()[8:])
    return n_embd, Block._make(sizes)._replace(**forms)


def _ends_key(sub: SubNetwork) -> str:
    return f"ends {sub.n_embd}"


def _features(n_embd: int, block: Block) -> np.ndarray:
    """What a block's time is made of: calls, element-wise work, both kinds of matrices, heads.

    A matrix in place of a part is as one of heads.
    """
    heads = (2 * block.n_head + 2 * block.n_query_groups) * block.head_size
    rows = heads + n_embd * block.forms.count(LINEAR)
    attended = block.n_head * block.head_size
    return np.array([1.0, n_embd, n_embd * rows, n_embd * block.intermediate_size, attended])
