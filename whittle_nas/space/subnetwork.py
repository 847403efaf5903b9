"""A sub-network is a value: six sizes in litgpt's words."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import Any

from whittle_nas.errors import ConfigError


class HeadChannels(str, Enum):
    """Which query and key channels a smaller head keeps.

    `rope` keeps every s-th rotary pair, so that their frequencies stay exactly what they were;
    `first` keeps the first channels, as the code published with the paper does, which moves the
    frequency of every pair.
    """

    rope = "rope"
    first = "first"


@dataclass(frozen=True, order=True)
class SubNetwork:
    """Sizes of one sub-network.

    It takes the first entries of every dimension of the super-network and its `n_layer` most
    important layers in their original order. Inside each of the first `n_query_groups` query
    groups it keeps the first `n_head / n_query_groups` heads.
    """

    n_embd: int
    n_head: int
    n_query_groups: int
    head_size: int
    intermediate_size: int
    n_layer: int

    def to_dict(self) -> dict[str, int]:
        """The sizes as a plain dictionary, ready for JSON or YAML."""
        return asdict(self)

    @classmethod
    def from_dict(cls, sizes: Any) -> SubNetwork:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: if a size is missing, unknown or not a positive integer.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(sizes, dict) or set(sizes) != set(names):
            got = sorted(sizes) if isinstance(sizes, dict) else sizes
            raise ConfigError(
                f"a sub-network needs exactly the sizes {', '.join(names)}; got {got}"
            )
        for name, value in sizes.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"sub-network size {name}={value!r} must be a positive integer")
        return cls(**sizes)

    @classmethod
    def from_config(cls, config: Any) -> SubNetwork:
        """The sizes of the whole model that a `litgpt.Config` describes."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})

    def __str__(self) -> str:
        """One line for tables and messages."""
        return " ".join(f"{name}={value}" for name, value in self.to_dict().items())
