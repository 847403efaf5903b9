"""Costs of sub-networks: computed from their sizes, or summed from the latency table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

from whittle_nas.metrics import analytic
from whittle_nas.search.objectives import ANALYTIC, MEASURED
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.weights.counting import parameter_counter
from whittle_nas.weights.info import SupernetInfo
from whittle_nas.weights.slicing import plan_slices

Cost = Callable[[SubNetwork], float]


class Costs:
    """Everything about a sub-network that no evaluation is needed for."""

    def __init__(
        self,
        config: Any,
        info: SupernetInfo,
        *,
        batch_size: int,
        tokens: int,
        dtype: torch.dtype,
        measured: dict[str, Cost] | None = None,
    ) -> None:
        """Prepare the functions.

        Args:
            config: litgpt config of the super-network.
            info: its layer order and head channels.
            batch_size: sequences in the key-value cache.
            tokens: length of each sequence.
            dtype: number format of weights and cache.
            measured: functions for the metrics of `objectives.MEASURED` that are wanted.
        """
        self._config, self._info = config, info
        self._batch_size, self._tokens, self._dtype = batch_size, tokens, dtype
        self._measured = measured or {}
        count = parameter_counter(config)
        self._functions: dict[str, Cost] = {
            "num_params": count,
            "num_params_non_embedding": lambda sub: count(sub) - self._table_params(sub.n_embd),
            "flops": lambda sub: analytic.flops(self.config_of(sub), tokens),
            "weight_bytes": lambda sub: count(sub) * dtype.itemsize,
            "memory_bytes": lambda sub: count(sub) * dtype.itemsize + self._cache_bytes(sub),
            **self._measured,
        }
        assert set(self._functions) <= {*ANALYTIC, *MEASURED}
        # A searcher asks for the same sub-networks again and again.
        self._cached = {name: lru_cache(2**17)(f) for name, f in self._functions.items()}
        self._table_params = lru_cache(None)(self._count_tables)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all costs, as columns."""
        return tuple(self._functions)

    @property
    def is_measured(self) -> bool:
        """Whether a cost is a time on this device."""
        return bool(self._measured)

    def functions(self, names: Sequence[str]) -> dict[str, Cost]:
        """The costs among some metrics that follow exactly from the sizes."""
        return {n: self._cached[n] for n in names if n in self._cached and n not in self._measured}

    def of(self, sub: SubNetwork, names: Sequence[str] | None = None) -> dict[str, float]:
        """Values of costs by name; default: of all."""
        return {name: self._cached[name](sub) for name in (names or self.names)}

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

    def _cache_bytes(self, sub: SubNetwork) -> int:
        return analytic.kv_cache_bytes(
            self.config_of(sub), batch=self._batch_size, length=self._tokens, dtype=self._dtype
        )
