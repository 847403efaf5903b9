"""Masks and quantisation of a whole checkpoint: block by block, finished blocks kept on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from whittle_nas.calibration import Stream, walk
from whittle_nas.errors import ConfigError
from whittle_nas.progress import Progress, no_progress
from whittle_nas.prune.linears import compress_block, matrices, watched
from whittle_nas.prune.options import Grid, Method, Sparsity, check_columns
from whittle_nas.prune.store import BlockStore, Replaced
from whittle_nas.weights import axes
from whittle_nas.weights.checkpoint import check_finite

# Zeros that a dense matrix may have: a few come from rounding to 16 bits.
_DENSE = 0.05


@dataclass(frozen=True)
class BlockwiseResult:
    """A compressed model.

    Attributes:
        tensors: its state dict, read from the store block by block.
        errors: by matrix (`transformer.h.0.attn.q`), see `linears.Compressed`.
        grids: scales and zero points of quantised layers by the name of their weight.
    """

    tensors: Mapping[str, Tensor]
    errors: dict[str, tuple[float, float]]
    grids: dict[str, tuple[Tensor, Tensor]]


def check_blocks(
    tensors: Mapping[str, Tensor], config: Any, *, sparsity: Sparsity | None, grid: Grid | None
) -> None:
    """Refuse what can't be compressed, before any work.

    Raises:
        ConfigError: if a pattern or group does not fit a matrix, a matrix is sparse already, or a
            value is not finite.
    """
    for name in axes.parameter_names(config):
        layer, rest = axes.split_layer(name)
        tensor = tensors[name]
        check_finite(name, tensor)
        if layer is None or tensor.dim() != 2:
            continue
        check_columns(tensor.shape[1], grid=grid, sparsity=sparsity, name=f"{rest} in every block")
        share = _zeros(tensor)
        if share > _DENSE:
            raise ConfigError(
                f"--checkpoint_dir: {100 * share:.0f} % of {name} is zero already; compress the "
                "dense checkpoint instead"
            )


def _zeros(matrix: Tensor) -> float:
    """Share of zeros in the rows and columns that are not zero as a whole; 0 if none are left.

    A layer without an attention or an MLP that was filled up has nothing but zeros there.
    """
    there = matrix != 0
    rows, columns = int(there.any(1).sum()), int(there.any(0).sum())
    return 1 - int(there.sum()) / (rows * columns) if rows else 0.0


def compress_blocks(
    model: Any,
    tokens: Tensor,
    store: BlockStore,
    *,
    tensors: Mapping[str, Tensor],
    method: Method,
    sparsity: Sparsity | None = None,
    grid: Grid | None = None,
    sequential: bool = True,
    batch_size: int = 4,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress = no_progress,
) -> BlockwiseResult:
    """Compress all blocks of a model, which stays as it is.

    Args:
        model: `litgpt.GPT`; its blocks need no weights.
        tokens: (N, T) calibration text; (0, T) for methods without any.
        store: where finished blocks are kept; those that it has are not made again.
        tensors: the model's stored weights, read layer by layer.
        method: a mask or a quantiser.
        sparsity: of a mask.
        grid: of a quantiser.
        sequential: calibrate a block on what the compressed blocks before it give.
        batch_size: sequences per forward pass.
        device: where blocks run and are compressed.
        dtype: number format of the forward passes; weights are stored in their own.
        progress: shows the blocks.

    Raises:
        ConfigError: if statistics are not finite, or a Hessian is singular.
    """
    config = model.config

    def change(layer: int, block: Any, statistics: Mapping[str, Any]) -> nn.Module:
        prefix, names = f"transformer.h.{layer}.", {f"{m.module}.weight" for m in matrices(config)}
        found = compress_block(
            block,
            statistics,
            layer=layer,
            config=config,
            method=method,
            sparsity=sparsity,
            grid=grid,
            stored={name: tensors[prefix + name] for name in names},
        )
        weights = {name: tensor.cpu() for name, tensor in found.weights.items()}
        scales = {name: tensor.cpu() for name, tensor in found.scales.items()}
        zeros = {name: tensor.cpu() for name, tensor in found.zeros.items()}
        store.put(
            layer, {"weights": weights, "scales": scales, "zeros": zeros, "errors": found.errors}
        )
        return block

    def finished(layer: int, block: Any) -> nn.Module | None:
        kept = store.get(layer)
        if kept is not None:
            block.load_state_dict(kept["weights"], strict=False)
        return None if kept is None else block

    walk(
        model,
        Stream(model, tokens, batch_size=batch_size, device=device, dtype=dtype),
        change,
        watch=lambda _block: watched(config, method),
        tensors=tensors,
        sequential=sequential,
        finished=finished,
        progress=progress,
    )
    return _collect(tensors, store, config)


def _collect(stored: Mapping[str, Tensor], store: BlockStore, config: Any) -> BlockwiseResult:
    errors: dict[str, tuple[float, float]] = {}
    grids: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in range(config.n_layer):
        kept, prefix = store.get(layer), f"transformer.h.{layer}."
        assert kept is not None
        errors |= {prefix + m.name: kept["errors"][m.name] for m in matrices(config)
                   if m.name in kept["errors"]}  # fmt: skip
        for module, scales in kept["scales"].items():
            grids[f"{prefix}{module}.weight"] = (scales, kept["zeros"][module])

    def weights(layer: int) -> dict[str, Tensor]:
        kept = store.get(layer)
        assert kept is not None
        return kept["weights"]

    return BlockwiseResult(Replaced(stored, weights), errors, grids)
