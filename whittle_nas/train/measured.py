"""What a training measures: sums over tokens, which processes add up, and the means they become."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import fmean as mean

import torch
from torch import Tensor

from whittle_nas.errors import ConfigError
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.train.batches import Sample, labelled
from whittle_nas.train.step import Network, Role, loss_sums
from whittle_nas.weights.supernet import SuperNetwork

Means = Sequence[tuple[float, float]]  # cross entropy and distillation loss per network


def sums_of(
    supernet: SuperNetwork,
    subs: Iterable[SubNetwork],
    batch: Sample,
    *,
    chunk_elements: int | None = None,
) -> Tensor:
    """Sum of the losses of every network in nats, and the number of labels, (networks + 1,)."""
    sums = loss_sums(supernet, batch, subs, chunk_elements=chunk_elements)
    return torch.cat([sums, count(batch, sums)])


def means_of(totals: Sequence[float]) -> list[float]:
    """Nats per label from `sums_of`, added up over batches and processes."""
    return [total / max(totals[-1], 1.0) for total in totals[:-1]]


def count(batch: Sample, like: Tensor) -> Tensor:
    """Number of labels of a batch, (1,): filled on its device, where a copy would be waited for."""
    return like.new_full((1,), len(labelled(batch)))


def by_role(
    networks: Sequence[Network], means: Means, *, taught: Collection[Role]
) -> dict[str, float]:
    """`train/ce_<role>`, and `train/kd` of those that somebody taught.

    Args:
        networks: of a step.
        means: of each.
        taught: the roles that have a teacher.
    """
    pairs = list(zip(networks, means, strict=True))
    of_role = {role: [ce for one, (ce, _) in pairs if one.role is role] for role in Role}
    found = {f"train/ce_{role.value}": mean(losses) for role, losses in of_role.items() if losses}
    if distilled := [kd for one, (_, kd) in pairs if one.role in taught]:
        found["train/kd"] = mean(distilled)
    return found


class Validations:
    """Losses of a fixed set of networks, and whether the whole one has lost too much.

    Attributes:
        networks: by name.
        history: mean loss of every network in nats per token, by optimiser step.
        stopped: why the training ended before its last step, None if it did not.
    """

    def __init__(self, networks: Mapping[str, SubNetwork], most: float | None) -> None:
        """Of some networks, until the loss of the one that is called `full` is above `most`."""
        self.networks, self._most = dict(networks), most
        self.history: dict[int, dict[str, float]] = {}
        self.stopped: str | None = None

    def record(self, step: int, totals: Sequence[float]) -> dict[str, float]:
        """Take the sums of a validation; returns `val/<network>` and `val/mean`.

        Raises:
            ConfigError: if the untouched model is above the limit already.
        """
        means = means_of(totals)
        found = dict(zip(self.networks, means, strict=True))
        found["mean"] = sum(means) / len(means)
        self.history[step] = found
        self._compare(step, found.get("full", 0.0))
        return {f"val/{name}": value for name, value in found.items()}

    def _compare(self, step: int, full: float) -> None:
        if self._most is None or full <= self._most:
            return
        if step == 0:
            raise ConfigError(
                f"validation.max_full_loss={self._most} is below the untouched model's loss of "
                f"{full:.4f}: nothing would be trained"
            )
        self.stopped = self.stopped or (
            f"step {step}: the whole model's validation loss is {full:.4f} and "
            f"validation.max_full_loss={self._most}"
        )
