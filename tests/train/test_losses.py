"""Losses against their formulas in float64, and the chunked backward pass against the plain one."""

import pytest
import torch
from torch import nn

from whittle_nas.train import losses
from whittle_nas.train.options import Distillation, LossOptions, Weighting

N, D, V = 13, 6, 29


def formula(kind, student, teacher, tau, share=0.3):
    """methods.md section 4, literally."""
    z_s, z_t = student.double(), teacher.double()
    p, q = (z_t / tau).softmax(-1), (z_s / tau).softmax(-1)
    forward, reverse = (p * (p / q).log()).sum(-1), (q * (q / p).log()).sum(-1)
    m = (p + q) / 2
    return {
        Distillation.forward_kl: tau**2 * forward,
        Distillation.reverse_kl: tau**2 * reverse,
        Distillation.symmetric_kl: tau**2 * (share * forward + (1 - share) * reverse),
        Distillation.jensen_shannon: tau**2
        / 2
        * ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)),
        Distillation.l1: (z_s - z_t).abs().mean(-1),
        Distillation.l2: (z_s - z_t).pow(2).mean(-1),
        Distillation.cosine: 1 - (p * q).sum(-1) / (p.norm(dim=-1) * q.norm(dim=-1)),
    }[kind]


KINDS = [kind for kind in Distillation if kind is not Distillation.none]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tau", [1.0, 0.9, 1.5])
def test_distillation_is_its_formula(kind, tau):
    student, teacher = 3 * torch.randn(2, N, V)
    options = LossOptions(distillation=kind, temperature=tau, forward_share=0.3)
    got = losses.distillation(student, teacher, options)
    assert got.shape == (N,)
    torch.testing.assert_close(
        got.double(), formula(kind, student, teacher, tau), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_equal_logits_leave_nothing_to_learn(kind):
    logits = torch.randn(N, V, requires_grad=True)
    loss = losses.distillation(logits, logits.detach(), LossOptions(distillation=kind)).sum()
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits.grad, torch.zeros(N, V), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", Distillation)
@pytest.mark.parametrize("weighting", Weighting)
@pytest.mark.parametrize("chunk_tokens", [1, 4, N])
def test_chunked_backward_is_the_plain_one(kind, weighting, chunk_tokens):
    options = LossOptions(
        distillation=kind,
        weighting=weighting,
        ce_weight=0.7,
        kd_weight=0.4,
        temperature=1.3,
        forward_share=0.3,
        chunk_elements=chunk_tokens * V,
    )
    body, head = nn.Linear(D, D), nn.Linear(D, V)
    inputs, teacher = torch.randn(N, D), torch.randn(N, V)
    labels = torch.randint(V, (N,))

    logits = head(body(inputs))
    ce = nn.functional.cross_entropy(logits, labels, reduction="sum")
    plain = ce
    if kind is not Distillation.none:
        kd = losses.distillation(logits, teacher, options).sum()
        scale = (ce / kd).detach() if weighting is Weighting.balanced else 1.0
        plain = 0.7 * ce + 0.4 * scale * kd
    (0.5 * plain).backward()
    parameters = [*body.parameters(), *head.parameters()]
    expected = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None

    sums = losses.backward(
        body(inputs), head, labels, options, teacher=teacher, weight=0.5, vocabulary=V,
        keep_logits=True,
    )  # fmt: skip
    torch.testing.assert_close(sums.ce, ce.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sums.logits, logits.detach())
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-5)


def test_frozen_head_and_body_without_gradient():
    """An adapted body under a frozen head, and a frozen body under an adapted head."""
    body, head = nn.Linear(D, D).requires_grad_(False), nn.Linear(D, V)
    labels = torch.randint(V, (N,))
    losses.backward(body(torch.randn(N, D)), head, labels, LossOptions(), vocabulary=V)
    assert head.weight.grad is not None
    body.requires_grad_(True)
    head.requires_grad_(False)
    losses.backward(body(torch.randn(N, D)), head, labels, LossOptions(), vocabulary=V)
    assert body.weight.grad is not None


def test_cross_entropy_sum_without_gradient():
    head, hidden, labels = nn.Linear(D, V), torch.randn(N, D), torch.randint(V, (N,))
    got = losses.cross_entropy_sum(hidden, head, labels, size=5)
    expected = nn.functional.cross_entropy(head(hidden), labels, reduction="sum")
    torch.testing.assert_close(got, expected.detach())
    torch.testing.assert_close(losses.in_chunks(hidden, head, 4), head(hidden).detach())


def test_half_precision_logits_are_compared_in_float32():
    student, teacher = 20 * torch.randn(2, N, V)
    got = losses.forward_kl(student.bfloat16(), teacher.bfloat16())
    assert got.dtype == torch.float32
    expected = losses.forward_kl(student.bfloat16().float(), teacher.bfloat16().float())
    torch.testing.assert_close(got, expected)
