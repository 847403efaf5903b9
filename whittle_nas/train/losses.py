"""Losses of a step, and their backward pass without a whole table of logits in memory.

N tokens that have a label, V vocabulary, D channels of the hidden state. Every loss is a function
of logits (N, V) that returns one value per token (N,), in nats for the probabilistic ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from whittle_nas.train.options import Distillation, LossOptions, Weighting
from whittle_nas.weights.supernet import positions_per_chunk


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of the labels in nats, (N, V) and (N,) -> (N,)."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q) of teacher p and student q, times temperature^2; (N, V) twice -> (N,)."""
    log_p, log_q = _log_probs(student, teacher, temperature)
    return temperature**2 * _kl(log_p, log_q)


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q || p) of teacher p and student q, times temperature^2; (N, V) twice -> (N,)."""
    log_p, log_q = _log_probs(student, teacher, temperature)
    return temperature**2 * _kl(log_q, log_p)


def symmetric_kl(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, *, forward_share: float = 0.5
) -> Tensor:
    """`forward_share` * KL(p || q) + the rest * KL(q || p), times temperature^2; -> (N,)."""
    log_p, log_q = _log_probs(student, teacher, temperature)
    mixed = forward_share * _kl(log_p, log_q) + (1 - forward_share) * _kl(log_q, log_p)
    return temperature**2 * mixed


def jensen_shannon(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean of KL(p || m) and KL(q || m), m = (p + q) / 2, times temperature^2; -> (N,)."""
    log_p, log_q = _log_probs(student, teacher, temperature)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return temperature**2 * 0.5 * (_kl(log_p, log_m) + _kl(log_q, log_m))


def l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference of the logits over the vocabulary; (N, V) twice -> (N,)."""
    return (student.float() - teacher.float()).abs().mean(-1)


def l2(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the logits over the vocabulary; (N, V) twice -> (N,)."""
    return (student.float() - teacher.float()).square().mean(-1)


def cosine(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """1 - cos(p, q) of the two distributions over the vocabulary; (N, V) twice -> (N,)."""
    p = F.softmax(teacher.float() / temperature, dim=-1)
    q = F.softmax(student.float() / temperature, dim=-1)
    return 1 - F.cosine_similarity(p, q, dim=-1)


def distillation(student: Tensor, teacher: Tensor, options: LossOptions) -> Tensor:
    """The chosen distillation loss per token; (N, V) twice -> (N,)."""
    kind, tau = options.distillation, options.temperature
    if kind is Distillation.symmetric_kl:
        return symmetric_kl(student, teacher, tau, forward_share=options.forward_share)
    if kind in (Distillation.l1, Distillation.l2):
        return {Distillation.l1: l1, Distillation.l2: l2}[kind](student, teacher)
    with_temperature = {
        Distillation.forward_kl: forward_kl,
        Distillation.reverse_kl: reverse_kl,
        Distillation.jensen_shannon: jensen_shannon,
        Distillation.cosine: cosine,
    }
    return with_temperature[kind](student, teacher, tau)


@dataclass(frozen=True)
class LossSums:
    """Sums over tokens of one network's losses, detached float32 scalars on its device.

    `logits` (N, V), detached, are those that the losses were computed from, where asked for.
    """

    ce: Tensor
    kd: Tensor
    logits: Tensor | None = None


def backward(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor,
    options: LossOptions,
    *,
    teacher: Tensor | None = None,
    weight: float = 1.0,
    vocabulary: int,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
    keep_logits: bool = False,
) -> LossSums:
    """Add the gradient of `weight` * the *sum* of the token losses to every parameter.

    The head runs on a few tokens at a time, forward and backward, so that logits
    and their gradient never exist for all tokens; the body's backward pass then runs once.

    Args:
        hidden: final hidden states of the tokens that have a label, (N, D), with their graph.
        head: hidden states (n, D) -> logits (n, V).
        labels: the next tokens, (N,).
        options: which losses, and their weights.
        teacher: logits of the full network, (N, V); None trains on the labels alone.
        weight: of this network among those of the step.
        vocabulary: V.
        total: sums (2,) of this process -> sums over all processes, for `balanced`.
        keep_logits: return the logits too: the teacher's, for the sub-networks of the step.

    Returns:
        The sums of cross entropy and (unscaled) distillation loss, and the logits if kept.
    """
    size = positions_per_chunk(vocabulary, options.chunk_elements)
    leaf = hidden.detach().requires_grad_(hidden.requires_grad)
    chunks = [slice(start, start + size) for start in range(0, len(labels), size)]
    ce_weight, kd_weight = options.ce_weight, options.kd_weight
    if teacher is None or options.distillation is Distillation.none:
        teacher, ce_weight = None, 1.0
    elif options.weighting is Weighting.balanced:
        sums = total(_sums(leaf, head, labels, options, teacher, chunks))
        kd_weight *= float(sums[0] / sums[1].clamp_min(torch.finfo(torch.float32).tiny))
    summed = torch.zeros(2, device=hidden.device)
    kept = []
    for chunk in chunks:
        logits = head(leaf[chunk])  # (n, V)
        if keep_logits:
            kept.append(logits.detach())
        ce = cross_entropy(logits, labels[chunk]).sum()
        kd = distillation(logits, teacher[chunk], options).sum() if teacher is not None else None
        loss = ce_weight * ce if kd is None else ce_weight * ce + kd_weight * kd
        if loss.requires_grad:
            (weight * loss).backward()
        summed[0] += ce.detach()
        summed[1] += 0.0 if kd is None else kd.detach()
    if leaf.grad is not None:
        hidden.backward(leaf.grad)
    return LossSums(summed[0], summed[1], torch.cat(kept) if kept else None)


@torch.no_grad()
def _sums(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor,
    options: LossOptions,
    teacher: Tensor,
    chunks: list[slice],
) -> Tensor:
    """Sums of both losses, (2,): `balanced` needs their ratio before it can weight a gradient."""
    sums = torch.zeros(2, device=hidden.device)
    for chunk in chunks:
        logits = head(hidden[chunk])
        sums[0] += cross_entropy(logits, labels[chunk]).sum()
        sums[1] += distillation(logits, teacher[chunk], options).sum()
    return sums


@torch.no_grad()
def in_chunks(hidden: Tensor, head: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """Logits (N, V) of hidden states (N, D), `size` tokens at a time."""
    return torch.cat([head(part) for part in hidden.split(size)])


@torch.no_grad()
def cross_entropy_sum(
    hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor, *, size: int
) -> Tensor:
    """Sum of the cross entropy in nats, a scalar, `size` tokens at a time and without gradient."""
    parts = zip(hidden.split(size), labels.split(size), strict=True)
    return torch.stack([cross_entropy(head(h), y).sum() for h, y in parts]).sum()


def _log_probs(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = F.log_softmax(teacher.float() / temperature, dim=-1)
    return log_p, F.log_softmax(student.float() / temperature, dim=-1)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) per row; F.kl_div because its fused form keeps no a * (log a - log b)."""
    return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)
