"""Costs of sub-networks: computed from their sizes, or summed from the latency table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from whittle_nas.metrics import analytic
from whittle_nas.metrics.latency_correction import Accuracy
from whittle_nas.metrics.latency_parts import Load, Phase
from whittle_nas.metrics.latency_table import LatencyTable
from whittle_nas.search.objectives import ANALYTIC
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.weights.counting import matmul_counter, parameter_counter
from whittle_nas.weights.info import SupernetInfo
from whittle_nas.weights.slicing import plan_slices

Cost = Callable[[SubNetwork], float]
PHASES = {"latency_ms": Phase.prefill, "decode_ms_per_token": Phase.decode}


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
    ) -> None:
        """Prepare the functions.

        Args:
            config: litgpt config of the super-network.
            info: its layer order and head channels.
            load: what costs are for.
            measured: which times are wanted, names of `PHASES`.
            table: file of the latency table; not touched without `measured`.

        Raises:
            ConfigError: if the table was measured for something else.
        """
        self._config, self._info, self._load = config, info, load
        self._tables = {
            name: (LatencyTable(table, config, info, load), PHASES[name]) for name in measured[:1]
        }
        for name in measured[1:]:  # one file, one table
            self._tables[name] = self._tables[measured[0]][0], PHASES[name]
        count = parameter_counter(config)
        self._matmul = matmul_counter(config)
        self._attended = lru_cache(None)(self._count_attended)
        per_item = load.dtype.itemsize
        functions: dict[str, Cost] = {
            "num_params": count,
            "num_params_non_embedding": lambda sub: count(sub) - self._table_params(sub.n_embd),
            "flops": self._flops,
            "weight_bytes": lambda sub: count(sub) * per_item,
            "memory_bytes": lambda sub: count(sub) * per_item + self._cache_bytes(sub),
        }
        assert set(functions) == set(ANALYTIC)
        # A searcher asks for the same sub-networks again and again.
        self._functions = {name: lru_cache(2**17)(f) for name, f in functions.items()}
        self._table_params = lru_cache(None)(self._count_tables)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all costs, as columns."""
        return (*self._functions, *self._tables)

    @property
    def is_measured(self) -> bool:
        """Whether a cost is a time on this device."""
        return bool(self._tables)

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

    def whole(self, sub: SubNetwork) -> dict[str, float]:
        """The wanted times, measured on the sub-network as one model."""
        return {name: table.whole(sub, phase) for name, (table, phase) in self._tables.items()}

    def calibrate(self, subs: Sequence[SubNetwork], on_progress: Callable[[], object]) -> None:
        """Fit the correction of a table that has none."""
        for table, phase in self._tables.values():
            if table.accuracy(phase) is None:
                table.calibrate(subs, phase, on_progress=on_progress)

    def accuracies(self) -> dict[str, Accuracy]:
        """How far the table is from whole networks, for each of the wanted times."""
        found = {name: table.accuracy(phase) for name, (table, phase) in self._tables.items()}
        return {name: accuracy for name, accuracy in found.items() if accuracy is not None}

    def layers(self, sub: SubNetwork) -> tuple[int, ...]:
        """Ids of the layers that a sub-network keeps."""
        return tuple(sorted(self._info.layer_order[: sub.n_layer]))

    def config_of(self, sub: SubNetwork) -> Any:
        """litgpt config of a sub-network."""
        order, channels = self._info.layer_order, self._info.head_channels
        return plan_slices(sub, self._config, layer_order=order, head_channels=channels).config

    def _count_tables(self, n_embd: int) -> int:
        """Parameters of the token table and the head, which depend on the width alone."""
        whole = SubNetwork.from_config(self._config)
        config = self.config_of(SubNetwork(**{**whole.to_dict(), "n_embd": n_embd}))
        return analytic.num_params(config) - analytic.num_params_non_embedding(config)

    def _flops(self, sub: SubNetwork) -> int:
        """`analytic.flops`, hundreds of times faster: searchers ask for thousands at a time."""
        tokens, heads = self._load.tokens, sub.n_head * sub.head_size
        return 2 * self._matmul(sub) * tokens + 4 * heads * self._attended(sub.n_layer)

    def _count_attended(self, n_layer: int) -> int:
        """Pairs of tokens that attend to each other, in all layers: windows alone decide that."""
        sub = replace(SubNetwork.from_config(self._config), n_layer=n_layer)
        tokens = self._load.tokens
        rest = analytic.flops(self.config_of(sub), tokens) - 2 * self._matmul(sub) * tokens
        return rest // (4 * sub.n_head * sub.head_size)

    def _cache_bytes(self, sub: SubNetwork) -> int:
        load = self._load
        return analytic.kv_cache_bytes(
            self.config_of(sub), batch=load.batch, length=load.tokens, dtype=load.dtype
        )
