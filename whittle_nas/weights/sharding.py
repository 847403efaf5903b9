"""A litgpt model whose parameters are shared out between processes: PyTorch's `fully_shard`.

A unit is a block, or all that is in no block: table, last norm and head, which may be one tensor.
FSDP makes the parameters of a unit whole when the unit is called, and shares them out again
afterwards. Slices are views of whole parameters, so they are taken inside of that call: a unit is
called with the function to run. The litgpt modules themselves stay as they are, names included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from whittle_nas.errors import ConfigError
from whittle_nas.weights.axes import split_layer

Prepare = Callable[[nn.Module, str], None]


def nothing(*_: Any) -> None:
    """Where there is nothing to prepare."""


class _Unit(nn.Module):
    """Modules that are whole at the same time: while a function runs, which may use them."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.modules_of_unit = nn.ModuleList(modules)

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


class Sharding:
    """The units of one model.

    Attributes:
        blocks: one for each layer.
        root: all that is in no block. Networks run inside of a call of it, after which its
            parameters stay whole until the backward pass ends, or `rest` is called: the head runs
            outside of that call, a few tokens at a time.
    """

    def __init__(self, model: Any, mesh: Any, *, prepare: Prepare = nothing) -> None:
        """Share out the parameters of a model.

        Args:
            model: a litgpt model, with or without adapters.
            mesh: of one dimension, over all processes.
            prepare: called with a module and the prefix of its names before it is shared out: to
                load it, so that no process holds more than one whole block.
        """
        self.blocks: list[Any] = []
        for layer, block in enumerate(model.transformer.h):
            prepare(block, f"transformer.h.{layer}.")
            self.blocks.append(_shard(_Unit([block]), mesh, reshard_after_forward=True))
        outside = {
            "transformer.wte.": model.transformer.wte,
            "transformer.ln_f.": model.transformer.ln_f,
            "lm_head.": model.lm_head,
        }
        for prefix, module in outside.items():
            prepare(module, prefix)
        self.root: Any = _shard(_Unit([*self.blocks, *outside.values()]), mesh)
        # A process whose rows have no label never runs the head, and sums zeros with the others.
        self.root.set_reduce_scatter_unused_params(True, recurse=False)
        self._whole: Any = None

    def gather(self, name: str) -> None:
        """Make the unit of a parameter whole until another one is wanted; all processes call it."""
        layer, _ = split_layer(name)
        unit = self.root if layer is None else self.blocks[layer]
        if unit is not self._whole:
            self.rest()
            unit.unshard()
            self._whole = unit

    def rest(self) -> None:
        """Share out what was left whole after passes without gradients, or by `gather`."""
        for unit in {self.root, self._whole or self.root}:
            unit.reshard()
        self._whole = None


# What `Sharding` asks of FSDP; the last of them came with the version below.
_NEEDED = (
    "set_gradient_divide_factor",
    "set_force_sum_reduction_for_comms",
    "set_reduce_scatter_unused_params",
)
_SINCE = "2.13"


def check_available() -> None:
    """Refuse a PyTorch whose `fully_shard` can't do what is needed here.

    Raises:
        ConfigError: naming the version that can.
    """
    from torch.distributed.fsdp import FSDPModule

    if missing := [name for name in _NEEDED if not hasattr(FSDPModule, name)]:
        raise ConfigError(
            f"trainer.strategy=fsdp needs torch {_SINCE} or newer ({torch.__version__} has no "
            f"FSDPModule.{missing[0]}): install that, or take trainer.strategy=ddp"
        )


def _shard(unit: _Unit, mesh: Any, **options: Any) -> Any:
    from torch.distributed.fsdp import fully_shard  # half a second that only trainings need

    shared: Any = fully_shard(unit, mesh=mesh, **options)
    # Gradients are summed: they are divided by the number of labels of all processes at the end.
    shared.set_gradient_divide_factor(1.0)
    shared.set_force_sum_reduction_for_comms(True)  # a factor would be a product, which gloo lacks
    return shared


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The share of this process; a tensor that is not shared out is its own."""
    return tensor.to_local() if is_shared_out(tensor) else tensor  # type: ignore[attr-defined]


def is_shared_out(tensor: torch.Tensor) -> bool:
    """Whether other processes hold the rest of a tensor."""
    return hasattr(tensor, "to_local")


def rows_of(rank: int, world_size: int, rows: int) -> tuple[int, int]:
    """Which rows of a tensor a process has, [begin, end): the chunks of `torch.chunk`."""
    size = -(-rows // world_size)
    return min(rank * size, rows), min((rank + 1) * size, rows)
