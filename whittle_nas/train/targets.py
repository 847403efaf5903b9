"""What a teacher says about the tokens of a step, made once and read by every network.

N tokens that have a label, V vocabulary, k entries of `loss.teacher_top_k`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from whittle_nas.train import losses
from whittle_nas.train.options import Distillation, LossOptions


class Targets:
    """A teacher's distributions over N tokens, filled a few tokens at a time.

    The memory is taken once, when the first logits show their number format: logits that are
    collected and then joined exist twice. For the forward KL it holds probabilities, because every
    network of a step would compute them again from logits, and because 16 bits hold a probability
    to 0.4 % but the logits of a large vocabulary to 3 %. With `teacher_top_k` it holds k + 1
    log-probabilities, the last of all other entries together.
    """

    def __init__(self, count: int, options: LossOptions) -> None:
        self._count, self._options = count, options
        self._table: Tensor | None = None  # (N, V), or (N, k + 1)
        self._entropy: Tensor | None = None  # (N,), negative entropy of the probabilities
        self._top: Tensor | None = None  # (N, k)

    @torch.no_grad()
    def put(self, at: slice, logits: Tensor) -> None:
        """Take the logits (n, V) of the tokens `at`."""
        options = self._options
        tau = options.temperature
        if options.teacher_top_k is not None:
            top = logits.topk(min(options.teacher_top_k, logits.shape[-1] - 1), sorted=False)
            log_p = with_rest(F.log_softmax(logits.float() / tau, dim=-1), top.indices)
            self._rows("_table", log_p)[at] = log_p
            self._rows("_top", top.indices)[at] = top.indices
        elif options.distillation is Distillation.forward_kl:
            p = F.softmax(logits.float() / tau, dim=-1)
            kept = self._rows("_table", p.to(logits.dtype))[at]
            kept.copy_(p)
            entropy = torch.special.entr(kept.float()).sum(-1).neg()
            self._rows("_entropy", entropy)[at] = entropy
        else:
            self._rows("_table", logits)[at] = logits

    def _rows(self, name: str, like: Tensor) -> Tensor:
        """The memory of all tokens for rows such as `like`."""
        if getattr(self, name) is None:
            setattr(self, name, like.new_empty((self._count, *like.shape[1:])))
        return getattr(self, name)

    def losses(self, at: slice, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy and distillation loss of a student's logits (n, V), both (n,), in nats."""
        options, tau = self._options, self._options.temperature
        assert self._table is not None
        table = self._table[at]
        if self._top is not None:
            log_q = F.log_softmax(logits.float() / tau, dim=-1)
            kd = tau**2 * losses.kl(table, with_rest(log_q, self._top[at]))
        elif self._entropy is not None and tau == 1:
            return _ForwardKL.apply(logits, labels, table, self._entropy[at])  # type: ignore[return-value]
        elif self._entropy is not None:
            log_q = F.log_softmax(logits.float() / tau, dim=-1)
            kd = tau**2 * (self._entropy[at] - (table.float() * log_q).sum(-1))
        else:
            kd = losses.distillation(logits, table, options)
        return losses.cross_entropy(logits, labels), kd


def with_rest(log_p: Tensor, top: Tensor) -> Tensor:
    """Log-probabilities of the entries `top` (n, k), and of all others together; -> (n, k + 1)."""
    rest = log_p.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(-1, top), rest], dim=-1)


class _ForwardKL(torch.autograd.Function):
    """Cross entropy and KL(p || q) of one softmax, with their gradients in closed form.

    d CE / d z = q - onehot and d KL / d z = q - p: two passes over the logits where autograd makes
    six, which is the difference between a teacher that costs its forward pass and one that costs
    the step's half.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, p: Tensor, entropy: Tensor) -> Any:
        log_q = F.log_softmax(logits.float(), dim=-1)
        ce = -log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        kd = entropy - torch.linalg.vecdot(p.float(), log_q)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(log_q, labels, p)
        ctx.dtype = logits.dtype
        return ce, kd

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        ce_grad, kd_grad = gradients
        log_q, labels, p = ctx.saved_tensors
        gradient = log_q.exp()
        if kd_grad is not None:
            total = kd_grad if ce_grad is None else kd_grad + ce_grad
            gradient.mul_(total.unsqueeze(-1)).addcmul_(p.float(), kd_grad.unsqueeze(-1), value=-1)
        elif ce_grad is not None:
            gradient.mul_(ce_grad.unsqueeze(-1))
        if ce_grad is not None:
            gradient.scatter_add_(-1, labels.unsqueeze(-1), -ce_grad.unsqueeze(-1))
        return gradient.to(ctx.dtype), None, None, None
