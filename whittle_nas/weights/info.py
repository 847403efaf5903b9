"""`supernet.yaml`: what a checkpoint directory says beyond a litgpt checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from whittle_nas.errors import ConfigError
from whittle_nas.reading import read_yaml
from whittle_nas.space.subnetwork import HeadChannels
from whittle_nas.weights.norms import NormTable

FILE_NAME = "supernet.yaml"


@dataclass(frozen=True)
class SupernetInfo:
    """How sub-networks are cut from a checkpoint.

    Attributes:
        layer_order: layer ids, most important first; a sub-network keeps the first `n_layer`.
        head_channels: how a smaller head chooses its query and key channels.
        importance: how the weights were sorted, None if they were not.
        search_space: the space that was trained, in its explicit form, None if none was.
        training: how the super-network was trained, None if it was not.
        sweep: what each dimension alone costs, and the space that follows; None if not measured.
        norms: factors of the norms of narrower networks, None if there are none.
    """

    layer_order: tuple[int, ...]
    head_channels: HeadChannels = HeadChannels.rope
    importance: dict[str, Any] | None = None
    search_space: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    sweep: dict[str, Any] | None = None
    norms: NormTable | None = field(default=None, compare=False)

    @property
    def fitted(self) -> dict[str, Any] | None:
        """The search space `fitted`: the sizes that live, in its explicit form."""
        return None if self.sweep is None else self.sweep.get("space")

    @classmethod
    def default(cls, config: Any) -> SupernetInfo:
        """For a checkpoint without `supernet.yaml`: the first layers are kept."""
        return cls(layer_order=tuple(range(config.n_layer)))

    @classmethod
    def read(cls, checkpoint_dir: Path, config: Any) -> SupernetInfo:
        """Read `supernet.yaml` if the directory has one.

        Raises:
            ConfigError: if the file is not YAML or does not fit the model.
        """
        path = checkpoint_dir / FILE_NAME
        if not path.is_file():
            return cls.default(config)
        spec = read_yaml(path)
        try:
            info = cls(
                layer_order=tuple(spec.pop("layer_order")),
                head_channels=HeadChannels(spec.pop("head_channels")),
                **spec,
            )
        except (AttributeError, KeyError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{path} is not a valid {FILE_NAME}: {reason}") from None
        except TypeError as error:
            raise ConfigError(f"{path} has an unknown or malformed key: {error}") from None
        for name in ("importance", "search_space", "training", "sweep"):
            if not isinstance(getattr(info, name), (dict, type(None))):
                raise ConfigError(f"{path}: {name} must be a mapping or null")
        whole = all(type(layer) is int for layer in info.layer_order)
        if not whole or sorted(info.layer_order) != list(range(config.n_layer)):
            raise ConfigError(
                f"{path}: layer_order={list(info.layer_order)} must hold each layer id from 0 to "
                f"{config.n_layer - 1} once"
            )
        if (info.importance or {}).get("norms_scaled"):
            return replace(info, norms=NormTable.read(checkpoint_dir, config))
        return info

    def dump(self) -> str:
        """The YAML text."""
        return yaml.safe_dump(
            {
                "layer_order": list(self.layer_order),
                "head_channels": self.head_channels.value,
                "importance": self.importance,
                "search_space": self.search_space,
                "training": self.training,
                "sweep": self.sweep,
            },
            sort_keys=False,
        )
