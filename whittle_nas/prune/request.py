"""What is to be done to a model, and what came of it: the values between the methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from whittle_nas.prune.options import Grid, LaCoOptions, Method, Sparsity
from whittle_nas.space import SubNetwork


@dataclass(frozen=True)
class Request:
    """What is to be done; every method reads its own part.

    Attributes:
        method: which one.
        sparsity: how much goes; None for quantisers.
        grid: of quantisers.
        laco: constants of `laco`.
        protect_first: layers at the beginning that Taylor+ and `llm_pruner` leave alone.
        protect_last: the same at the end.
        sizes: shape that `minitron` cuts, in place of a share.
        sequential: calibrate blocks on what the compressed blocks before them give; None for
            methods that leave no choice.
        batch_size: sequences per forward pass.
        dtype: number format of the passes, `stored` that of the checkpoint.
    """

    method: Method
    sparsity: Sparsity | None = None
    grid: Grid | None = None
    laco: LaCoOptions = LaCoOptions()
    protect_first: int = 4
    protect_last: int = 2
    sizes: Mapping[str, int] | None = None
    sequential: bool | None = None
    batch_size: int = 4
    dtype: str = "stored"

    def to_dict(self) -> dict[str, Any]:
        """What the result depends on, as plain values."""
        grid = self.grid
        return {
            "method": self.method.value,
            "sparsity": None if self.sparsity is None else str(self.sparsity),
            "bits": grid and grid.bits,
            "group_size": grid and grid.group_size,
            "symmetric": grid and grid.symmetric,
            **self._own(),
            "sequential": self.sequential,
            "dtype": self.dtype,
        }

    def _own(self) -> dict[str, Any]:
        """Options that only some methods have."""
        if self.method in (Method.laco, Method.laco_notebook):
            return {"laco": asdict(self.laco)}
        if self.method in (Method.llm_pruner, Method.shortened_llama_taylor):
            return {"protect_first": self.protect_first, "protect_last": self.protect_last}
        return {} if self.sizes is None else {"sizes": dict(self.sizes)}


@dataclass(frozen=True)
class Outcome:
    """A smaller model.

    Attributes:
        config: its litgpt config.
        tensors: its state dict; each may be made when it is asked for.
        errors: of matrices, see `linears.Compressed`.
        grids: scales and zero points, see `blockwise.BlockwiseResult`.
        details: more for `prune.json`.
        shape: where layers have different sizes, what is there of them without zeros.
        notes: what a user may want to know, one sentence each.
    """

    config: Any
    tensors: Mapping[str, Tensor]
    errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    grids: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    shape: SubNetwork | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """Where and how the model runs."""

    device: torch.device
    dtype: torch.dtype | None = None
