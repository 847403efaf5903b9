"""The backward pass of one network's losses, without a whole table of logits in memory.

N tokens that have a label, V vocabulary, D channels of the hidden state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from whittle_nas.train.losses import cross_entropy
from whittle_nas.train.options import LossOptions, Weighting
from whittle_nas.train.targets import Targets
from whittle_nas.weights.supernet import positions_per_chunk


@dataclass(frozen=True)
class LossSums:
    """Sums over tokens of one network's losses, detached float32 scalars on its device."""

    ce: Tensor
    kd: Tensor


def backward(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor,
    options: LossOptions,
    *,
    targets: Targets | None = None,
    weight: float = 1.0,
    vocabulary: int,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
    keep: Targets | None = None,
    block_loss: Tensor | None = None,
) -> LossSums:
    """Add the gradient of `weight` * the *sum* of the token losses to every parameter.

    The head runs on a few tokens at a time, forward and backward, so that logits
    and their gradient never exist for all tokens; the body's backward pass then runs once.

    Args:
        hidden: final hidden states of the tokens that have a label, (N, D), with their graph.
        head: hidden states (n, D) -> logits (n, V).
        labels: the next tokens, (N,).
        options: which losses, and their weights.
        targets: the teacher's; None trains on the labels alone.
        weight: of this network among those of the step.
        vocabulary: V.
        total: sums (2,) of this process -> sums over all processes, for `balanced`.
        keep: gets the logits: what this network teaches the others of the step.
        block_loss: what the blocks' outputs add to the loss, a scalar with its graph.

    Returns:
        The sums of cross entropy and (unscaled) distillation loss.
    """
    size = positions_per_chunk(vocabulary, options.chunk_elements)
    leaf = hidden.detach().requires_grad_(hidden.requires_grad)
    chunks = [slice(start, start + size) for start in range(0, len(labels), size)]
    ce_weight, kd_weight = (1.0, 0.0) if targets is None else options.weights
    scale: float | Tensor = 1.0
    if targets is not None and options.weighting is Weighting.balanced:
        sums = total(_sums(leaf, head, labels, targets, chunks))
        # At most a thousandfold: a network that is its teacher has nothing but rounding to scale.
        # It stays on the device: for a number of Python's the program would wait for the sums.
        scale = sums[0] / torch.maximum(sums[1], 1e-3 * sums[0]).clamp_min(1e-30)
    summed = torch.zeros(2, device=hidden.device)
    for chunk in chunks:
        logits = head(leaf[chunk])  # (n, V)
        if keep is not None:
            keep.put(chunk, logits.detach())
        if targets is not None and targets.has_closed_form:
            ce, kd, gradient = targets.gradient(
                chunk,
                logits,
                labels[chunk],
                ce_weight=weight * ce_weight,
                kd_weight=weight * kd_weight * scale,
            )
            if logits.requires_grad:
                logits.backward(gradient)
        elif targets is not None:
            ce, kd = (each.sum() for each in targets.losses(chunk, logits, labels[chunk]))
            _descend(weight * (ce_weight * ce + kd_weight * scale * kd))
        else:
            ce, kd = cross_entropy(logits, labels[chunk]).sum(), summed.new_zeros(())
            _descend(weight * ce)
        summed += torch.stack([ce.detach(), kd.detach()])
    # Also where no token has a label: with sharding the backward pass is a common one.
    gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    roots, gradients = ([hidden], [gradient]) if hidden.requires_grad else ([], [])
    if block_loss is not None and block_loss.requires_grad:
        roots.append(block_loss)
        gradients.append(torch.full_like(block_loss, weight))
    if roots:
        torch.autograd.backward(roots, gradients)
    return LossSums(summed[0], summed[1])


def _descend(loss: Tensor) -> None:
    if loss.requires_grad:
        loss.backward()


@torch.no_grad()
def _sums(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor,
    targets: Targets,
    chunks: list[slice],
) -> Tensor:
    """Sums of both losses, (2,): `balanced` needs their ratio before it can weight a gradient."""
    sums = torch.zeros(2, device=hidden.device)
    for chunk in chunks:
        found = targets.losses(chunk, head(hidden[chunk]), labels[chunk])
        sums += torch.stack([each.sum() for each in found])
    return sums
