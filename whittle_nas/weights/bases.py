"""Exact changes of basis of a whole model: orders of entries, and matrices where those are exact.

Letters as in litgpt: D `n_embd`, F, G, K, H; Q = H / G heads per group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from whittle_nas.weights import axes
from whittle_nas.weights.axes import Axis

Order = Sequence[int]


@dataclass(frozen=True)
class LayerBasis:
    """New entries of one layer, most important first.

    Attributes:
        neurons: (F,) neuron ids.
        groups: (G,) query group ids.
        heads: (G, Q) heads of every group, counted inside the group; row g is group g.
        qk_channels: (G, K) query and key channels of every group. Rotary channels must stay where
            they are; only channels that are not rotated may move.
        value_channels: (G, K) value channels of every group, or (G, K, K) an invertible matrix A
            for each: new channels = A times old ones, in attention that mixes tokens only.
    """

    neurons: Order
    groups: Order
    heads: Sequence[Order]
    qk_channels: Sequence[Order]
    value_channels: Sequence[Order] | Tensor


@dataclass(frozen=True)
class Bases:
    """How a whole model is sorted. Layers keep their places, so their order is not part of it.

    Attributes:
        embd: (D,) residual stream channels, the same for all layers, which share the stream; or
            (D, D) an orthogonal matrix whose rows are the new channels, for models that
            `rotates_exactly`: the scales of their norms are folded into what reads them.
        layers: one `LayerBasis` per layer.
    """

    embd: Order | Tensor
    layers: Sequence[LayerBasis]

    def selection(self, layer: int | None) -> axes.Selection:
        """All entries of one layer in their new order; channels with a matrix stay."""
        basis = self.layers[layer or 0]
        embd, values = self.embd, basis.value_channels
        if isinstance(embd, Tensor):
            embd = range(len(embd))
        if isinstance(values, Tensor):
            values = [range(values.shape[-1])] * len(values)
        return axes.Selection(
            embd=embd,
            neurons=basis.neurons,
            groups=basis.groups,
            heads=[basis.heads[group] for group in basis.groups],
            qk_channels=[basis.qk_channels[group] for group in basis.groups],
            value_channels=[values[group] for group in basis.groups],
        )


def rotates_exactly(config: Any) -> bool:
    """Whether any orthogonal matrix on the residual stream leaves a model's outputs as they are.

    Every norm must be an RMSNorm that stands before what reads it: LayerNorm subtracts a mean of
    channels, and the scale of a norm after a writer can't be folded into anything.
    """
    after = config.post_attention_norm or config.post_mlp_norm
    return config.norm_class_name == "RMSNorm" and config.norm_1 and config.norm_2 and not after


def transform(name: str, tensors: Mapping[str, Tensor], bases: Bases, config: Any) -> Tensor:
    """A parameter in the new basis; the model's outputs stay the same.

    Orders move values as they are. Matrices are applied in float32 or better, whatever the stored
    format, on the device where they are.

    Args:
        name: parameter name as in `litgpt.GPT.state_dict()`.
        tensors: parameters of the model: this one, and the norm that it reads.
        bases: how to sort.
        config: `litgpt.Config` of the model.
    """
    tensor = tensors[name]
    layer, _ = axes.split_layer(name)
    dims, selection = axes.dims(name, config), bases.selection(layer)
    for at, dim in enumerate(dims):
        entries = axes.kept_entries(dim, selection, config)
        if entries is not None and axes.prefix_length(entries) is None:
            tensor = tensor.index_select(at, torch.tensor(entries, device=tensor.device))
    if isinstance(bases.embd, Tensor):
        if name in axes.norms(config):
            return torch.full_like(tensor, 0.0 if axes.has_unit_offset(config) else 1.0)
        norm = axes.norm_before(name, config)
        if norm is not None:  # the columns of what reads a norm are residual stream channels
            scale = tensors[norm].to(tensor.device, _wide(tensor))
            tensor = _wider(tensor) * (scale + 1 if axes.has_unit_offset(config) else scale)
    for at, dim in enumerate(dims):
        tensor = _turned(tensor, at, dim, bases, layer, config)
    return tensor.to(tensors[name].device, tensors[name].dtype)


def _turned(
    tensor: Tensor, at: int, dim: axes.Dim, bases: Bases, layer: int | None, config: Any
) -> Tensor:
    """Apply the matrices of one tensor dimension, if it has any."""
    matrices = [_matrix(axis, bases, layer) for axis in dim]
    device = next((matrix.device for matrix in matrices if matrix is not None), None)
    if device is None:
        return tensor
    rows = tensor.to(device, _wide(tensor)).movedim(at, -1)
    parts = rows.split([axes.axis_size(axis, config) for axis in dim], -1)
    pairs = zip(parts, matrices, strict=True)
    return torch.cat([part if m is None else _apply(part, m) for part, m in pairs], -1).movedim(
        -1, at
    )


def _matrix(axis: Axis, bases: Bases, layer: int | None) -> Tensor | None:
    """What entries of an axis are multiplied with: (D, D), or (G, K, K) as groups stand now."""
    if axis is Axis.EMBD:
        return bases.embd if isinstance(bases.embd, Tensor) else None
    basis = bases.layers[layer or 0]
    if axis not in (Axis.VALUE, Axis.HEADS) or not isinstance(basis.value_channels, Tensor):
        return None
    channels = basis.value_channels[list(basis.groups)]
    # what reads new channels = A times old ones must undo A: its columns get the inverse
    return channels if axis is Axis.VALUE else torch.linalg.inv(channels.double()).mT


def _apply(rows: Tensor, matrix: Tensor) -> Tensor:
    """`matrix` times the entries of the last dimension: D, or groups x heads x channels."""
    matrix = matrix.to(rows.dtype)
    if matrix.dim() == 2:
        return rows @ matrix.mT
    heads = rows.unflatten(-1, (len(matrix), -1, matrix.shape[-1]))  # (..., G, Q or 1, K)
    return torch.einsum("...gqi,gji->...gqj", heads, matrix).flatten(-3)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _wider(tensor: Tensor) -> Tensor:
    return tensor.to(_wide(tensor))


def compose(first: Bases, then: Bases) -> Bases:
    """The one change of basis that does `first`, then `then`; ids are those before `first`."""
    return Bases(
        embd=_after(first.embd, then.embd),
        layers=[_compose_layer(a, b) for a, b in zip(first.layers, then.layers, strict=True)],
    )


def _compose_layer(first: LayerBasis, then: LayerBasis) -> LayerBasis:
    # Row g of `then` belongs to the group at position g of `first`, which was its group groups[g].
    at = {group: position for position, group in enumerate(first.groups)}
    composed: dict[str, Any] = {
        name: [
            _after(getattr(first, name)[group], getattr(then, name)[at[group]])
            for group in range(len(first.groups))
        ]
        for name in ("heads", "qk_channels", "value_channels")
    }
    values = composed["value_channels"]
    if isinstance(values[0], Tensor):
        composed["value_channels"] = torch.stack(values)
    return LayerBasis(
        neurons=_after(first.neurons, then.neurons),
        groups=_after(first.groups, then.groups),
        **composed,
    )


def _after(first: Any, then: Any) -> Any:
    """`then` after `first`, each an order or a matrix."""
    if isinstance(first, Tensor) and isinstance(then, Tensor):
        return (then.double() @ first.double()).to(first.dtype)
    if isinstance(then, Tensor):
        found = torch.empty_like(then)
        found[:, list(first)] = then
        return found
    return first[list(then)] if isinstance(first, Tensor) else [first[i] for i in then]
