"""Bytes of a compressed model, as UNAST counts them (appendix D)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from whittle_nas.weights import axes
from whittle_nas.weights.tying import HEAD, TABLE, same_table


def model_bytes(tensors: Mapping[str, Tensor], *, bits: int = 16) -> int:
    """Bytes of a model: embedding and head with 16 bits, of the rest what is not zero.

    Scales, zero points and the places of what is not zero are not counted, as in the paper.

    Args:
        tensors: state dict; a head that is the embedding counts once.
        bits: of the matrices in the blocks; vectors have 16.
    """
    total = 0
    tied = same_table(tensors[HEAD], tensors[TABLE])
    for name, tensor in tensors.items():
        if axes.split_layer(name)[0] is None:
            total += 0 if tied and name == HEAD else 16 * tensor.numel()
        elif bits < 16:
            total += (bits if tensor.dim() > 1 else 16) * tensor.numel()
        else:
            total += 16 * int(tensor.count_nonzero())
    return total // 8
