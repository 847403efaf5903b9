"""The matrices of a block, one by one: what masks and quantisation share.

Fused query, key and value rows are three matrices, as in the models that the papers compress.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from whittle_nas.calibration import Gram, SquareSums, Statistic, UnitGram
from whittle_nas.prune.gptq import gptq
from whittle_nas.prune.magnitude import magnitude
from whittle_nas.prune.options import Grid, Method, Sparsity
from whittle_nas.prune.rounding import Quantised
from whittle_nas.prune.rtn import rtn
from whittle_nas.prune.solver import factorise
from whittle_nas.prune.sparsegpt import sparsegpt
from whittle_nas.prune.wanda import wanda
from whittle_nas.weights.axes import is_gated

_SOURCE = {"mlp.fc_2": "mlp.fc_1"}  # both see the same input


@dataclass(frozen=True)
class Matrix:
    """Rows of a linear layer that count as one matrix.

    Attributes:
        name: `attn.q`, `mlp.fc_1`, ...
        module: the layer in the block.
        rows: of its weight.
        source: the module whose input it has: where statistics are collected.
    """

    name: str
    module: str
    rows: slice
    source: str


def matrices(config: Any) -> list[Matrix]:
    """The matrices of every block of the model of a litgpt config."""
    query, key = config.n_head * config.head_size, config.n_query_groups * config.head_size
    ends = {"attn.q": (0, query), "attn.k": (query, query + key), "attn.v": (query + key, None)}
    found = [Matrix(name, "attn.qkv", slice(*rows), "attn.qkv") for name, rows in ends.items()]
    readers = ("mlp.fc_1", "mlp.fc_2") if is_gated(config) else ("mlp.fc",)
    for name in ("attn.proj", *readers, "mlp.proj"):
        found.append(Matrix(name, name, slice(None), _SOURCE.get(name, name)))
    return found


def watched(config: Any, method: Method) -> dict[str, Statistic]:
    """Empty statistics of one block, as the method needs them."""
    kinds: dict[Method, type[Statistic]] = {
        Method.wanda: SquareSums,
        Method.sparsegpt: Gram,
        Method.gptq: UnitGram,
    }
    if method not in kinds:
        return {}
    return {source: kinds[method]() for source in dict.fromkeys(m.source for m in matrices(config))}


@dataclass(frozen=True)
class Compressed:
    """What became of the matrices of one block.

    Attributes:
        weights: new weights of its linear layers, by name in the block.
        scales: of quantised layers, (R, N).
        zeros: their zero points.
        errors: by matrix, where products of the inputs are known: squared error of the outputs
            relative to the outputs, and that of the same matrix by the plain method (magnitude,
            rounding); of GPTQ on inputs of unit length, as it is calibrated.
    """

    weights: dict[str, Tensor]
    scales: dict[str, Tensor]
    zeros: dict[str, Tensor]
    errors: dict[str, tuple[float, float]]


def compress_block(
    block: Any,
    statistics: Mapping[str, Any],
    *,
    layer: int,
    config: Any,
    method: Method,
    sparsity: Sparsity | None = None,
    grid: Grid | None = None,
    stored: Mapping[str, Tensor] | None = None,
) -> Compressed:
    """Compress every matrix of a block, written into it in place.

    A block may run in fewer bits than its weights are stored in; these are the ones to compress.

    Args:
        block: litgpt's.
        statistics: by module, as `watched` asks for them.
        layer: for messages.
        config: litgpt config.
        method: a mask or a quantiser.
        sparsity: of a mask.
        grid: of a quantiser.
        stored: weights of its linear layers by name in the block; by default the block's own.

    Raises:
        ConfigError: if a Hessian stays singular, naming its layer.
    """
    found = Compressed({}, {}, {}, {})
    solvers: dict[str, Callable[[Tensor], Any]] = {}
    for matrix in matrices(config):
        running = block.get_submodule(matrix.module).weight.data
        if (name := f"{matrix.module}.weight") not in found.weights:
            whole = running if stored is None else stored[name]
            found.weights[name] = whole.to(running.device, copy=True)
        weight = found.weights[name]
        if matrix.source not in solvers:
            label = f"transformer.h.{layer}.{matrix.source}"
            statistic = statistics.get(matrix.source)
            solvers[matrix.source] = _solver(method, statistic, sparsity, grid, label)
        old = weight[matrix.rows].clone()
        new = solvers[matrix.source](old)
        if isinstance(new, Quantised):
            for kept, part in ((found.scales, new.scales), (found.zeros, new.zeros)):
                before = [kept[matrix.module]] if matrix.module in kept else []
                kept[matrix.module] = torch.cat([*before, part.float()])
            new = new.weight
        weight[matrix.rows] = new
        running[matrix.rows] = new.to(running.dtype)
        gram = statistics.get(matrix.source)
        if isinstance(gram, Gram):
            plain = rtn(old, grid).weight if grid else magnitude(old, sparsity)  # type: ignore[arg-type]
            found.errors[matrix.name] = (
                output_error(old, new, gram),
                output_error(old, plain, gram),
            )
    return found


def _solver(
    method: Method,
    statistic: Any,
    sparsity: Sparsity | None,
    grid: Grid | None,
    name: str,
) -> Callable[[Tensor], Any]:
    """A method with everything but the weight; Hessians are factorised here, once per input."""
    if grid is not None:
        if method is Method.rtn:
            return partial(rtn, grid=grid)
        return partial(gptq, factor=factorise(statistic, name), grid=grid)
    assert sparsity is not None
    if method is Method.magnitude:
        return partial(magnitude, sparsity=sparsity)
    if method is Method.wanda:
        return partial(wanda, inputs=statistic, sparsity=sparsity)
    return partial(sparsegpt, factor=factorise(statistic, name), sparsity=sparsity)


def output_error(old: Tensor, new: Tensor, gram: Gram) -> float:
    """sum |(W - W') x|^2 / sum |W x|^2 over the inputs of a Gram matrix; 0 if all W x are."""
    total, old = gram.value(), old.double()
    change = old - new.double()
    power = float(((old @ total) * old).sum())
    return float(((change @ total) * change).sum()) / power if power else 0.0
