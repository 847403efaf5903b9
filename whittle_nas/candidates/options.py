"""Choices of the layer-wise training. Light: the command line reads this without torch."""

from dataclasses import dataclass
from enum import Enum


class PartLoss(str, Enum):
    """What a part is trained with: mean errors, or SquareHead, |b - a|^2 / |a|^2 of a batch."""

    l1 = "l1"
    l2 = "l2"
    square_head = "square_head"


@dataclass(frozen=True)
class PartTraining:
    """How every smaller part is trained, after its output projection was fitted.

    Args:
        steps: Steps of each, a batch of calibration text long; 0: none.
        loss: Against what the whole part gives: mean absolute or squared error, or SquareHead.
        lr: Highest learning rate of Adam; it falls to 0 as a cosine.
        rank: Of the adapters on each matrix; `null` trains whole matrices (UNAST's way), and the
            library has several times the size of the checkpoint.
    """

    steps: int = 0
    loss: PartLoss = PartLoss.square_head
    lr: float = 1e-3
    rank: int | None = 16
