"""litgpt's configuration, and what a checkpoint says for which litgpt has no word."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import litgpt

from whittle_nas.errors import ConfigError
from whittle_nas.space.rules import check
from whittle_nas.space.subnetwork import Block, HeadChannels, SubNetwork

SHORTCUTS, BLOCKS = "shortcuts", "blocks"  # in model_config.yaml; litgpt refuses a file with them


@dataclass
class Config(litgpt.Config):
    """litgpt's configuration of a model that is more than one of litgpt's.

    Attributes:
        tie_word_embeddings: its head is its token table. The weights say it, no file does.
        shortcuts: its residual connections are matrices (`nas prune --method slicegpt`).
        blocks: sizes of every layer where they differ; the sizes beside it are then no layer's.
    """

    tie_word_embeddings: bool = False
    shortcuts: bool = False
    blocks: tuple[Block, ...] | None = None


def extended(config: Any, **changes: Any) -> Config:
    """The config of the same model, with a word more."""
    known = {f.name: getattr(config, f.name) for f in fields(Config) if hasattr(config, f.name)}
    return Config(**{**known, **changes})


def stored(config: Any) -> dict[str, Any]:
    """What `model_config.yaml` says: litgpt's own words, and others only where they are needed."""
    found = {field.name: getattr(config, field.name) for field in fields(litgpt.Config)}
    if getattr(config, SHORTCUTS, False):
        found[SHORTCUTS] = True
    if (blocks := getattr(config, BLOCKS, None)) is not None:
        found[BLOCKS] = [block.to_list() for block in blocks]
    return found


def config_of(spec: Mapping[str, Any]) -> Any:
    """The inverse of `stored`: litgpt's config unless more is said.

    Raises:
        ConfigError: if there are not as many blocks as layers, or one is larger than the sizes
            beside it.
    """
    rest = {**spec}
    shortcuts, listed = rest.pop(SHORTCUTS, False), rest.pop(BLOCKS, None)
    config = litgpt.Config(**rest)
    if shortcuts is True:
        config = extended(config, shortcuts=True)
    if listed is None:
        return config
    read = SubNetwork.from_dict({"n_embd": config.n_embd, BLOCKS: listed}, range(config.n_layer))
    if None in read.blocks:
        raise ConfigError(f"block {read.blocks.index(None)} has neither attention nor an MLP")
    # A head of any size can rotate by its own frequencies.
    check(read, config, HeadChannels.first)
    return extended(config, blocks=read.blocks)
