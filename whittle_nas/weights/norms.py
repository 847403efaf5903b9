"""Width-aware norms: what an RMSNorm over the first k of D channels is multiplied with.

RMSNorm over k channels divides by their own root mean square. With c(k) = sqrt(D / k) *
E[|x_(1..k)| / |x|] in front (methods: norm factor), its output is on average what those channels
have in the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from whittle_nas.errors import ConfigError
from whittle_nas.weights import axes

IMPORTANCE = "importance.safetensors"
NORM_SHARES = "norm_shares"


@dataclass(frozen=True, eq=False)
class NormTable:
    """Factors of all norms of a model.

    Attributes:
        shares: (N, D) for every norm, in the order of `axes.norms`, and k = 1..D the mean of
            |x_(1..k)| / |x| over tokens, x the norm's input.
        rows: row of every norm, by the name of its weight.
    """

    shares: Tensor
    rows: dict[str, int]

    @classmethod
    def of(cls, shares: Tensor, config: Any) -> NormTable:
        """Factors of the model of a config."""
        return cls(shares, {name: row for row, name in enumerate(axes.norms(config))})

    @classmethod
    def read(cls, checkpoint_dir: Path, config: Any) -> NormTable:
        """Read the table that `nas importance` measured.

        Raises:
            ConfigError: if it is not there or does not fit the model.
        """
        from safetensors import SafetensorError, safe_open

        path = checkpoint_dir / IMPORTANCE
        try:
            with safe_open(path, framework="pt") as file:
                shares = file.get_tensor(NORM_SHARES)
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"{path} must hold the table {NORM_SHARES} of the norm factors that "
                f"{checkpoint_dir / 'supernet.yaml'} turns on: {error}"
            ) from None
        expected = (len(axes.norms(config)), config.n_embd)
        if tuple(shares.shape) != expected or not shares.isfinite().all():
            raise ConfigError(
                f"{path}: {NORM_SHARES} of shape {tuple(shares.shape)} must be finite and of shape "
                f"{expected}"
            )
        return cls.of(shares, config)

    def __call__(self, name: str, n_embd: int) -> float | None:
        """c(k) of the weight of a norm; None for 1, and for other parameters."""
        row, width = self.rows.get(name), self.shares.shape[1]
        if row is None or n_embd == width:
            return None
        return (width / n_embd) ** 0.5 * self.shares[row, n_embd - 1].item()

    def of_slice(self, names: Mapping[str, str], n_embd: int) -> NormTable:
        """Factors of the sub-networks of a slice, whose weights have its own factors already.

        Args:
            names: of the slice's norms, each with its name in the model.
            n_embd: width of the slice.
        """
        kept = {name: self.rows[source] for name, source in names.items() if source in self.rows}
        return NormTable(self.shares[:, :n_embd] / self.shares[:, n_embd - 1 : n_embd], kept)


def scales_norms(config: Any) -> bool:
    """Whether a model's norms divide by a root mean square, for which the factors are made."""
    return config.norm_class_name == "RMSNorm"
