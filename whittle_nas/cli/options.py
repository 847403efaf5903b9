"""Option groups that several commands share. Light: no torch here."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from whittle_nas.errors import ConfigError
from whittle_nas.space import HeadChannels, SubNetwork
from whittle_nas.space.rules import check


class DType(Enum):
    """Number format of the weights; `stored` keeps that of the checkpoint."""

    stored = "stored"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass(frozen=True)
class Sizes:
    """Sizes of one sub-network; a size that is not given is that of the whole model.

    Args:
        n_embd: Channels of the residual stream.
        n_head: Attention heads.
        n_query_groups: Query groups; by default all of them while there are that many heads.
        head_size: Channels per head.
        intermediate_size: MLP neurons.
        n_layer: Layers; the most important ones are kept.
    """

    n_embd: int | None = None
    n_head: int | None = None
    n_query_groups: int | None = None
    head_size: int | None = None
    intermediate_size: int | None = None
    n_layer: int | None = None

    def given(self) -> bool:
        """Whether any size was named."""
        return any(getattr(self, field.name) is not None for field in fields(self))

    def resolve(self, config: Any, head_channels: HeadChannels = HeadChannels.rope) -> SubNetwork:
        """The sub-network of the model of a litgpt config.

        Raises:
            ConfigError: naming every size that does not fit.
        """
        sizes = SubNetwork.from_config(config).to_dict()
        if self.n_head is not None and self.n_query_groups is None:
            sizes["n_query_groups"] = max(1, min(config.n_query_groups, self.n_head))
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                if type(value) is not int:
                    raise ConfigError(f"{field.name}={value!r} must be a whole number")
                sizes[field.name] = value
        return check(SubNetwork(**sizes), config, head_channels)
