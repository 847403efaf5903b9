"""Costs of sub-networks: computed from their sizes, or summed from the latency table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from whittle_nas.metrics.analytic import AnalyticCosts
from whittle_nas.metrics.latency_correction import Accuracy
from whittle_nas.metrics.latency_parts import Load, Phase, time_whole
from whittle_nas.metrics.latency_table import LatencyTable
from whittle_nas.metrics.measured import in_turn
from whittle_nas.search.objectives import ANALYTIC
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.weights.info import SupernetInfo
from whittle_nas.weights.slicing import plan_slices

Cost = Callable[[SubNetwork], float]
LATENCY = "latency_ms"
PHASES = {LATENCY: Phase.prefill, "decode_ms_per_token": Phase.decode}


class Costs:
    """Everything about a sub-network that no evaluation is needed for."""

    def __init__(
        self,
        config: Any,
        info: SupernetInfo,
        load: Load,
        *,
        measured: Sequence[str] = (),
        table: Path = Path("latency_table.json"),
        time_front: bool = False,
    ) -> None:
        """Prepare the functions.

        Args:
            config: litgpt config of the super-network.
            info: its head channels.
            load: what costs are for.
            measured: which times are wanted, names of `PHASES`.
            table: file of the latency table; not touched without `measured`.
            time_front: `whole` measures the latency even if no time is wanted.

        Raises:
            ConfigError: if the table was measured for something else.
        """
        self._tables = {
            name: (LatencyTable(table, config, info, load), PHASES[name]) for name in measured[:1]
        }
        for name in measured[1:]:  # one file, one table
            self._tables[name] = self._tables[measured[0]][0], PHASES[name]
        self._config, self._info, self._load = config, info, load
        self._times_whole = time_front or bool(measured)
        costs, dtype = AnalyticCosts(config), load.dtype
        cache = partial(costs.kv_cache_bytes, batch=load.batch, length=load.tokens, dtype=dtype)
        functions: dict[str, Cost] = {
            "num_params": costs.num_params,
            "num_params_non_embedding": costs.num_params_non_embedding,
            "flops": partial(costs.flops, tokens=load.tokens),
            "weight_bytes": partial(costs.weight_bytes, dtype=dtype),
            "memory_bytes": lambda sub: costs.weight_bytes(sub, dtype) + cache(sub),
        }
        assert set(functions) == set(ANALYTIC)
        # A searcher asks for the same sub-networks again and again.
        self._functions = {name: lru_cache(2**17)(f) for name, f in functions.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all costs, as columns."""
        return (*self._functions, *self._tables)

    @property
    def is_measured(self) -> bool:
        """Whether a cost is a time on this device."""
        return bool(self._tables)

    def is_known(self, name: str) -> bool:
        """Whether a cost needs no measuring, at most an estimate from other networks' times."""
        return name in self._functions or self._tables[name][0].has(PHASES[name])

    def value(self, sub: SubNetwork, name: str) -> float:
        """One cost; a time that is not known is measured."""
        if name in self._functions:
            return self._functions[name](sub)
        table, phase = self._tables[name]
        return table.milliseconds(sub, phase)

    def estimate(self, sub: SubNetwork, name: str) -> float:
        """One cost without measuring anything."""
        if name in self._functions:
            return self._functions[name](sub)
        table, phase = self._tables[name]
        return table.estimate(sub, phase)

    def of(self, sub: SubNetwork) -> dict[str, float]:
        """All costs by name; times that are not known are measured."""
        return {name: self.value(sub, name) for name in self.names}

    def estimators(self, names: Sequence[str]) -> dict[str, Cost]:
        """Cheap functions for the costs among some metrics."""
        return {name: partial(self.estimate, name=name) for name in names if name in self.names}

    def whole(
        self, subs: Sequence[SubNetwork], on_progress: Callable[[int], object] = lambda _: None
    ) -> list[dict[str, float]]:
        """The wanted times of each, measured in turn on the sub-networks as models.

        That is the latency where none is wanted and fronts are timed.

        Args:
            subs: sub-networks.
            on_progress: is told how many timings are left.
        """
        if not self._times_whole:
            return [{} for _ in subs]
        return in_turn([partial(self._once, sub) for sub in subs], on_progress=on_progress)

    def _once(self, sub: SubNetwork) -> dict[str, float]:
        if not self._tables:
            plan = plan_slices(sub, self._config, head_channels=self._info.head_channels)
            return {LATENCY: time_whole(plan, self._load, PHASES[LATENCY], rounds=1)}
        tables = self._tables.items()
        return {name: table.whole(sub, phase, rounds=1) for name, (table, phase) in tables}

    def calibrate(self, subs: Sequence[SubNetwork], on_progress: Callable[[], object]) -> None:
        """Fit the correction of a table that has none; half of the networks are often enough."""
        enough = max(4, len(subs) // 2)
        for table, phase in self._tables.values():
            if table.accuracy(phase) is None:
                table.calibrate(subs, phase, enough=enough, on_progress=on_progress)

    def accuracies(self) -> dict[str, Accuracy]:
        """How far the table is from whole networks, for each of the wanted times."""
        found = {name: table.accuracy(phase) for name, (table, phase) in self._tables.items()}
        return {name: accuracy for name, accuracy in found.items() if accuracy is not None}
