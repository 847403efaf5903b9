"""What a teacher says about the tokens of a step, made once and read by every network.

N tokens that have a label, V vocabulary, k entries of `loss.teacher_top_k`.
"""

from __future__ import annotations

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
            log_p = F.log_softmax(logits.float() / tau, dim=-1)
            kept = self._rows("_table", logits)[at].copy_(log_p.exp())
            entropy = torch.linalg.vecdot(kept.float(), log_p)
            self._rows("_entropy", entropy)[at] = entropy
        else:
            self._rows("_table", logits)[at] = logits

    def _rows(self, name: str, like: Tensor) -> Tensor:
        """The memory of all tokens for rows such as `like`."""
        if getattr(self, name) is None:
            setattr(self, name, like.new_empty((self._count, *like.shape[1:])))
        return getattr(self, name)

    @property
    def has_closed_form(self) -> bool:
        """Whether `gradient` can be asked for: the forward KL over the whole vocabulary."""
        options = self._options
        forward = options.distillation is Distillation.forward_kl and options.teacher_top_k is None
        return forward and options.temperature == 1

    @torch.no_grad()
    def gradient(
        self,
        at: slice,
        logits: Tensor,
        labels: Tensor,
        *,
        ce_weight: float,
        kd_weight: float | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of cross entropy and KL(p || q), and the gradient of their weighted sum, (n, V).

        d CE / d z = q - onehot and d KL / d z = q - p: a few passes over the logits where autograd
        makes three times as many, which is the difference between a teacher that costs a forward
        pass and one that costs a third of the step.

        Args:
            at: which tokens.
            logits: the student's, (n, V).
            labels: the next tokens, (n,).
            ce_weight: of the cross entropy.
            kd_weight: of the KL; a scalar on the device is never asked for its value.
        """
        assert self._table is not None
        assert self._entropy is not None
        p = self._table[at]
        log_q = F.log_softmax(logits.float(), dim=-1)
        ce = -log_q.gather(-1, labels.unsqueeze(-1)).sum()
        kd = (self._entropy[at] - torch.linalg.vecdot(p.float(), log_q)).sum()
        gradient = log_q.exp_()
        if isinstance(kd_weight, Tensor):
            gradient.mul_(ce_weight + kd_weight).addcmul_(p, kd_weight, value=-1)
        else:
            if ce_weight + kd_weight != 1:
                gradient.mul_(ce_weight + kd_weight)
            gradient.add_(p, alpha=-kd_weight)
        if ce_weight:
            minus = torch.full_like(labels, -ce_weight, dtype=gradient.dtype)
            gradient.scatter_add_(-1, labels.unsqueeze(-1), minus.unsqueeze(-1))
        return ce, kd, gradient.to(logits.dtype)

    def losses(self, at: slice, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy and distillation loss of a student's logits (n, V), both (n,), in nats."""
        options, tau = self._options, self._options.temperature
        assert self._table is not None
        table = self._table[at]
        if self._top is not None:
            log_q = F.log_softmax(logits.float() / tau, dim=-1)
            kd = tau**2 * losses.kl(table, with_rest(log_q, self._top[at]))
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
