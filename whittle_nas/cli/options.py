"""Option groups that several commands share. Light: no torch here."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from whittle_nas.errors import ConfigError
from whittle_nas.space import SubNetwork
from whittle_nas.space.rules import check, check_sizes
from whittle_nas.space.subnetwork import SIZES


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
        layers: Ids of the layers that are kept, instead of the most important ones.
        blocks: One entry per layer of the whole model, instead of sizes for all layers: null where
            it is gone, or [n_head, n_query_groups, head_size, intermediate_size]; 0 heads mean no
            attention, 0 neurons no MLP. Behind them may stand '' or linear for attention and for
            MLP: a matrix in its place, which the checkpoint has.
    """

    n_embd: int | None = None
    n_head: int | None = None
    n_query_groups: int | None = None
    head_size: int | None = None
    intermediate_size: int | None = None
    n_layer: int | None = None
    layers: list[int] | None = None
    blocks: list[list[int | str] | None] | None = None

    def given(self) -> bool:
        """Whether any size was named."""
        return any(getattr(self, field.name) is not None for field in fields(self))

    def resolve(self, checkpoint: Any) -> SubNetwork:
        """The sub-network of a checkpoint.

        Raises:
            ConfigError: naming every size that does not fit.
        """
        config, info = checkpoint.config, checkpoint.info
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        given = {name: value for name, value in given.items() if value is not None}
        if set(given) == {"n_embd"} and getattr(config, "blocks", None) is not None:
            given["blocks"] = [block.to_list() for block in config.blocks]
        if "blocks" in given:
            if beside := sorted(set(given) - {"n_embd", "blocks"}):
                raise ConfigError(f"blocks say what {beside[0]} says; give only one of them")
            spec = {"n_embd": config.n_embd, **given}
            return check(SubNetwork.from_dict(spec, info.layer_order), config, info.head_channels)
        layers = given.pop("layers", None)
        for name, value in given.items():
            if type(value) is not int:
                raise ConfigError(f"{name}={value!r} must be a whole number")
        sizes = {name: getattr(config, name) for name in SIZES}
        if "n_head" in given:
            given.setdefault("n_query_groups", max(1, min(config.n_query_groups, self.n_head or 1)))
        sizes |= {} if layers is None else {"n_layer": len(layers)}
        sizes |= given
        check_sizes(sizes, config, info.head_channels)
        spec = sizes if layers is None else {**sizes, "layers": layers}
        return SubNetwork.from_dict(spec, info.layer_order)
