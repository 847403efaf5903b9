"""Lightning's strategy for models that are shared out between processes, and its checkpoints.

A checkpoint is a directory: `rest.pt`, what Lightning keeps, and a file with the share of every
process, of what is trained and of the optimiser's state. Any number of processes can go on from it,
since a share is some rows of every tensor. PyTorch's own distributed checkpoints can do the same,
but they hold a pickle that runs when it is read.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from whittle_nas.errors import ConfigError
from whittle_nas.weights.checkpoint import load_torch
from whittle_nas.weights.files import PARTIAL
from whittle_nas.weights.sharding import local, rows_of

REST = "rest.pt"
_MOMENTS = ("exp_avg", "exp_avg_sq")


class ShardedStrategy(ModelParallelStrategy):
    """All devices share the parameters; `SupernetTraining.configure_model` does it."""

    strategy_name = "fsdp"

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1)

    def setup_environment(self) -> None:
        """Every process is one of the data-parallel group."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What this process holds of what is trained."""
        assert self.lightning_module is not None
        named = self.lightning_module.named_parameters()
        return {name: local(p.detach()) for name, p in named if p.requires_grad}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """What this process holds of AdamW's state, by name of the parameter."""
        state = getattr(optimizer, "_optimizer", optimizer).state
        return {
            name: {"step": state[p]["step"], **{key: local(state[p][key]) for key in _MOMENTS}}
            for name, p in self._trained()
            if p in state
        }

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        filepath: Any,
        storage_options: Any = None,  # noqa: ARG002
    ) -> None:
        """Write a directory under another name, and rename it when all processes have written."""
        path = Path(self.broadcast(str(filepath)))
        partial_path = path.with_name(f".{path.name}{PARTIAL}")
        if self.is_global_zero:
            shutil.rmtree(partial_path, ignore_errors=True)
            partial_path.mkdir(parents=True)
        self.barrier()
        share = {
            "weights": checkpoint.pop("state_dict"),
            "moments": (checkpoint.pop("optimizer_states", None) or [{}])[0],
        }
        torch.save(share, partial_path / _name(self.global_rank, self.world_size))
        self.barrier()
        if self.is_global_zero:
            torch.save(checkpoint, partial_path / REST)
            shutil.rmtree(path, ignore_errors=True)
            partial_path.rename(path)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: Any = None) -> Any:  # noqa: ARG002
        """Take this process's rows of all tensors, and return what Lightning keeps."""
        path = Path(self.broadcast(str(checkpoint_path)))
        shares = read_shares(path)
        optimizer: Any = self.optimizers[0] if self.optimizers else None
        with torch.no_grad():
            for name, parameter in self._trained():
                take = partial(self._fill, path, shares, name)
                take(parameter, lambda share, name=name: share["weights"][name])
                if optimizer is not None and name in shares[0]["moments"]:
                    state = {"step": shares[0]["moments"][name]["step"].clone()}
                    for key in _MOMENTS:
                        state[key] = torch.zeros_like(parameter)
                        take(state[key], lambda share, n=name, k=key: share["moments"][n][k])
                    optimizer.state[parameter] = state
        return {**load_torch(path / REST), "state_dict": {}, "optimizer_states": []}

    def _trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        assert self.lightning_module is not None
        return ((n, p) for n, p in self.lightning_module.named_parameters() if p.requires_grad)

    def _fill(
        self,
        path: Path,
        shares: list[Any],
        name: str,
        tensor: Tensor,
        part: Callable[[Any], Tensor],
    ) -> None:
        """Copy the rows of this process from the shares that have them."""
        rows = rows_of(self.global_rank, self.world_size, tensor.shape[0])
        try:
            found = [
                part(share)[max(rows[0] - begin, 0) : max(rows[1] - begin, 0)]
                for share, (begin, end) in _spans(shares, tensor.shape[0])
                if begin < rows[1] and end > rows[0]
            ]
            if found:
                local(tensor).copy_(torch.cat(found))
        except (KeyError, RuntimeError) as error:
            raise ConfigError(
                f"{path} is not a checkpoint of this training: {name} is not there or has another "
                "size"
            ) from error


def read_shares(path: Path) -> list[Any]:
    """The shares of a checkpoint, mapped from their files, in the order of the processes.

    Raises:
        ConfigError: if it is a file, as other strategies write it, or not whole.
    """
    names = sorted(path.glob("share-*.pt")) if path.is_dir() else []
    count = int(names[0].stem.rpartition("-of-")[2]) if names else 0
    if not names or len(names) != count or not (path / REST).is_file():
        raise ConfigError(
            f"{path} is not a checkpoint of trainer.strategy=fsdp, whose checkpoints are "
            "directories: go on with the strategy that wrote it"
        )
    return [load_torch(name) for name in names]


def _spans(shares: list[Any], rows: int) -> Iterator[tuple[Any, tuple[int, int]]]:
    for rank, share in enumerate(shares):
        yield share, rows_of(rank, len(shares), rows)


def _name(rank: int, world_size: int) -> str:
    return f"share-{rank:05d}-of-{world_size:05d}.pt"
