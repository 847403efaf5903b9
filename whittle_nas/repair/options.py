"""What repair is asked for: plain values."""

from __future__ import annotations

from dataclasses import dataclass

from whittle_nas.errors import ConfigError
from whittle_nas.repair.least_squares import RIDGES


@dataclass(frozen=True)
class RepairOptions:
    """How a sub-network is repaired.

    Attributes:
        held_back: share of the calibration text that chooses and is not fitted.
        ridges: to choose from, in units of the mean diagonal of a Gram matrix.
        batch_size: sequences per forward pass.
    """

    held_back: float = 0.125
    ridges: tuple[float, ...] = RIDGES
    batch_size: int = 4

    def split(self, blocks: int) -> tuple[int, int]:
        """Sequences per batch, and the number of batches to fit; the rest is held back.

        Raises:
            ConfigError: if there are too few blocks of text for both.
        """
        if blocks < 2:
            raise ConfigError(
                f"--repair needs at least 2 blocks of calibration text, one to fit and one to "
                f"choose; there is {blocks}: give more text, or a smaller block size"
            )
        size = min(self.batch_size, max(1, round(blocks * self.held_back)), blocks // 2)
        batches = -(-blocks // size)
        return size, batches - max(1, round(batches * self.held_back))
