"""Losses of logits.

N tokens that have a label, V vocabulary, D channels of the hidden state. Every loss is a function
of logits (N, V) that returns one value per token (N,), in nats for the probabilistic ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from whittle_nas.train.options import Distillation, LossOptions


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of the labels in nats, (N, V) and (N,) -> (N,)."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q) of teacher p and student q, times temperature^2; (N, V) twice -> (N,)."""
    log_p, log_q = _log_probs(student, teacher, temperature)
    return temperature**2 * kl(log_p, log_q)


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q || p) of teacher p and student q, times temperature^2; (N, V) twice -> (N,)."""
    log_p, log_q = _log_probs(student, teacher, temperature)
    return temperature**2 * kl(log_q, log_p)


def symmetric_kl(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, *, forward_share: float = 0.5
) -> Tensor:
    """`forward_share` * KL(p || q) + the rest * KL(q || p), times temperature^2; -> (N,)."""
    log_p, log_q = _log_probs(student, teacher, temperature)
    mixed = forward_share * kl(log_p, log_q) + (1 - forward_share) * kl(log_q, log_p)
    return temperature**2 * mixed


def jensen_shannon(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean of KL(p || m) and KL(q || m), m = (p + q) / 2, times temperature^2; -> (N,)."""
    log_p, log_q = _log_probs(student, teacher, temperature)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return temperature**2 * 0.5 * (kl(log_p, log_m) + kl(log_q, log_m))


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


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) per row; F.kl_div because its fused form keeps no a * (log a - log b)."""
    return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)
