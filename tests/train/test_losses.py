"""Losses against their formulas in float64, and the chunked backward pass against the plain one."""

import pytest
import torch
from torch import nn

from whittle_nas.errors import ConfigError
from whittle_nas.metrics.measured import peak_memory_bytes
from whittle_nas.train import blocks, losses
from whittle_nas.train.backward import backward
from whittle_nas.train.options import Distillation, LossOptions, Weighting
from whittle_nas.train.targets import Targets

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


def targets_of(teacher, options, size=5):
    targets = Targets(len(teacher), options)
    for start in range(0, len(teacher), size):
        at = slice(start, start + size)
        targets.put(at, teacher[at])
    return targets


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighting", Weighting)
@pytest.mark.parametrize("weights", [(0.7, 0.4), (0.0, 1.0), (1.0, 0.0)], ids=str)
@pytest.mark.parametrize("tau", [1.0, 1.3])
def test_chunked_backward_is_the_plain_one(kind, weighting, weights, tau):
    """The forward KL's closed-form gradients among them."""
    ce_weight, kd_weight = weights
    options = LossOptions(
        distillation=kind,
        weighting=weighting,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        temperature=tau,
        forward_share=0.3,
        chunk_elements=4 * V,
    )
    body, head = nn.Linear(D, D), nn.Linear(D, V)
    inputs, teacher = torch.randn(N, D), torch.randn(N, V)
    labels = torch.randint(V, (N,))

    logits = head(body(inputs))
    ce = nn.functional.cross_entropy(logits, labels, reduction="sum")
    kd = formula(kind, logits, teacher, tau).sum().float()
    scale = (ce / kd).detach() if weighting is Weighting.balanced else 1.0
    (0.5 * (ce_weight * ce + kd_weight * scale * kd)).backward()
    parameters = [*body.parameters(), *head.parameters()]
    expected = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None

    sums = backward(
        body(inputs), head, labels, options, targets=targets_of(teacher, options), weight=0.5,
        vocabulary=V,
    )  # fmt: skip
    torch.testing.assert_close(sums.ce, ce.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sums.kd, kd.detach(), atol=1e-5, rtol=1e-5)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-5)


def test_balanced_loss_of_a_network_that_is_its_teacher_is_finite():
    options = LossOptions(weighting=Weighting.balanced)
    head, hidden, labels = nn.Linear(D, V), torch.randn(N, D), torch.randint(V, (N,))
    with torch.no_grad():
        targets = targets_of(head(hidden), options)
    sums = backward(hidden, head, labels, options, targets=targets, vocabulary=V)
    assert float(sums.kd) == pytest.approx(0, abs=1e-5)
    assert head.weight.grad is not None
    assert head.weight.grad.isfinite().all()


@pytest.mark.parametrize("chunk_tokens", [1, 4, N])
def test_what_a_network_teaches_in_its_own_turn_is_what_it_computed(chunk_tokens):
    options = LossOptions(distillation=Distillation.l2, chunk_elements=chunk_tokens * V)
    head, hidden, labels = nn.Linear(D, V), torch.randn(N, D), torch.randint(V, (N,))
    kept = Targets(N, options)
    backward(hidden, head, labels, options, vocabulary=V, keep=kept)
    other = torch.randn(N, V)
    _, kd = kept.losses(slice(0, N), other, labels)
    torch.testing.assert_close(kd, losses.l2(other, head(hidden)).detach())


@pytest.mark.parametrize("kind", [Distillation.forward_kl, Distillation.cosine])
def test_what_a_teacher_says_is_in_memory_once(kind):
    """Parts that are collected and then joined are there twice."""
    logits, options = torch.randn(4, 4096), LossOptions(distillation=kind)
    held = []
    peak = peak_memory_bytes(
        lambda: held.append(targets_of(logits.expand(16, 4, -1).flatten(0, 1), options, size=4)),
        torch.device("cpu"),
    )
    table = 16 * logits.nbytes
    given = table  # the expanded logits of this test
    assert table <= peak - given < 1.4 * table


@pytest.mark.parametrize("k", [1, 5, V - 1])
def test_top_k_is_the_kl_of_k_tokens_and_the_rest(k):
    student, teacher = 3 * torch.randn(2, N, V)
    student.requires_grad_(True)
    options = LossOptions(teacher_top_k=k, temperature=1.3)
    labels = torch.randint(V, (N,))
    _, kd = targets_of(teacher, options).losses(slice(0, N), student, labels)
    (gradient,) = torch.autograd.grad(kd.sum(), student)

    p, q = (teacher.double() / 1.3).softmax(-1), (student.double() / 1.3).softmax(-1)
    top = p.argsort(-1, descending=True)[:, :k]
    p_k, q_k = p.gather(-1, top), q.gather(-1, top)
    p_rest, q_rest = 1 - p_k.sum(-1), 1 - q_k.sum(-1)
    expected = 1.3**2 * ((p_k * (p_k / q_k).log()).sum(-1) + p_rest * (p_rest / q_rest).log())
    (reference,) = torch.autograd.grad(expected.sum(), student)
    torch.testing.assert_close(kd.double(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradient, reference.float(), atol=1e-5, rtol=1e-4)
    if k == V - 1:  # then the rest is one token, and the KL that of all tokens
        whole = losses.forward_kl(student, teacher, 1.3)
        torch.testing.assert_close(kd, whole, atol=1e-5, rtol=1e-4)


def test_top_k_of_another_loss_is_refused():
    with pytest.raises(ConfigError, match="teacher_top_k=8 .* cosine"):
        LossOptions(Distillation.cosine, teacher_top_k=8)


def test_hidden_losses_are_their_formulas():
    student, teacher = torch.randn(2, N, D)
    error = ((teacher - student) ** 2).mean(-1) / (teacher**2).mean(-1)
    torch.testing.assert_close(blocks.square_head(student, teacher), error)
    assert float(blocks.square_head(teacher, teacher).sum()) == 0
    angle = (student * teacher).sum(-1) / (student.norm(dim=-1) * teacher.norm(dim=-1))
    torch.testing.assert_close(blocks.cosine(student, teacher), 1 - angle)


def test_frozen_head_and_body_without_gradient():
    """An adapted body under a frozen head, and a frozen body under an adapted head."""
    body, head = nn.Linear(D, D).requires_grad_(False), nn.Linear(D, V)
    labels = torch.randint(V, (N,))
    backward(body(torch.randn(N, D)), head, labels, LossOptions(), vocabulary=V)
    assert head.weight.grad is not None
    body.requires_grad_(True)
    head.requires_grad_(False)
    backward(body(torch.randn(N, D)), head, labels, LossOptions(), vocabulary=V)
    assert body.weight.grad is not None


def test_cross_entropy_sum_without_gradient():
    head, hidden, labels = nn.Linear(D, V), torch.randn(N, D), torch.randint(V, (N,))
    got = losses.cross_entropy_sum(hidden, head, labels, size=5)
    expected = nn.functional.cross_entropy(head(hidden), labels, reduction="sum")
    torch.testing.assert_close(got, expected.detach())


def test_half_precision_logits_are_compared_in_float32():
    student, teacher = 20 * torch.randn(2, N, V)
    got = losses.forward_kl(student.bfloat16(), teacher.bfloat16())
    assert got.dtype == torch.float32
    expected = losses.forward_kl(student.bfloat16().float(), teacher.bfloat16().float())
    torch.testing.assert_close(got, expected)
