"""Losses on what the blocks put out, beside the one on the logits.

N tokens that have a label, L blocks, D n_embd of the teacher and d <= D of the student.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from whittle_nas.train.options import HiddenLoss


def square_head(student: Tensor, teacher: Tensor) -> Tensor:
    """|a - b|^2 / |a|^2 of the teacher's stream a and the student's b, (N, d) twice -> (N,).

    SquareHead (Kurtic et al., 2023) divides two means over the batch; here the tokens are compared
    one by one, so that the first token's huge stream does not stand for all, and so that processes
    that share a batch get what one would.
    """
    difference = (student.float() - teacher.float()).square().sum(-1)
    return difference / teacher.float().square().sum(-1).clamp_min(1e-12)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos(a, b) of the two streams, (N, d) twice -> (N,)."""
    return 1 - torch.nn.functional.cosine_similarity(student.float(), teacher.float(), dim=-1)


KINDS: dict[HiddenLoss, Callable[[Tensor, Tensor], Tensor]] = {
    HiddenLoss.square_head: square_head,
    HiddenLoss.cosine: cosine,
}


def block_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], layers: Sequence[int], kind: HiddenLoss
) -> Tensor:
    """Sum over tokens of the mean over blocks, a scalar.

    Args:
        student: outputs of its blocks, (N, d) each.
        teacher: outputs of the teacher's L blocks, (N, D) each; the first d channels are compared,
            which are the ones that a narrower student has.
        layers: which of the teacher's blocks each of the student's came from.
        kind: of the loss.
    """
    pairs = zip(student, layers, strict=True)
    found = [KINDS[kind](b, teacher[layer][:, : b.shape[-1]]).sum() for b, layer in pairs]
    return torch.stack(found).mean()


_TOKENS = 4096  # of the vocabulary, whose embeddings are compared


def same_basis(student: Tensor, teacher: Tensor) -> bool:
    """Whether channel i of two models' streams means the same, by their token tables (V, D).

    A table is the stream's first value. Training moves its channels a little; sorting, a rotation
    or another initialisation leaves channels at the same place without any relation. Records of
    what was done with a checkpoint would not outlive a conversion, nor tell two bases apart that
    were made by the same options.
    """
    rows = torch.linspace(0, min(len(student), len(teacher)) - 1, _TOKENS).long().unique()
    own, its = (table[rows].double() for table in (student, teacher))
    own, its = (table - table.mean(0) for table in (own, its))
    lengths = own.norm(dim=0) * its.norm(dim=0)
    alive = lengths > 0
    related = (own * its).sum(0)[alive] > 0.5 * lengths[alive]
    return bool(related.double().mean() > 0.99)


@contextmanager
def outputs_of(model: Any, keep: Tensor) -> Iterator[list[Tensor]]:
    """Collect what the blocks put out at the flat positions `keep` (N,), (N, d) each."""
    found: list[Tensor] = []

    def note(_module: Any, _inputs: Any, output: Tensor) -> None:
        found.append(output.flatten(0, 1).index_select(0, keep))

    handles = [block.register_forward_hook(note) for block in model.transformer.h]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
