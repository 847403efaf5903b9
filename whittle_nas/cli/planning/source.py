"""What every plan reads: the sizes of a checkpoint, and how much text there is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from whittle_nas.data.options import TextData
from whittle_nas.metrics.analytic import AnalyticCosts
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.train.memory import stored_format
from whittle_nas.weights.checkpoint import Checkpoint
from whittle_nas.weights.info import SupernetInfo

BYTES_PER_TOKEN = 4  # of English text
_ASSUMED = 128  # blocks of text where nobody says how much there is


@dataclass(frozen=True)
class Source:
    """What is read: a checkpoint, of which the config is enough.

    Attributes:
        checkpoint: its directory, which may not be there yet.
        stored: number format of its weights; bfloat16 where there are none.
    """

    checkpoint: Checkpoint
    stored: torch.dtype

    @classmethod
    def of(cls, checkpoint_dir: Path) -> Source:
        """A directory with a `model_config.yaml`, or a path that names a model of litgpt's list.

        Raises:
            ConfigError: if neither.
        """
        from whittle_nas.cli.defaults import model_config

        config = model_config(str(checkpoint_dir))
        info = SupernetInfo.read(checkpoint_dir, config)
        return cls(Checkpoint(checkpoint_dir, config, info), stored_format(checkpoint_dir))

    @property
    def config(self) -> Any:
        """litgpt config of the model."""
        return self.checkpoint.config

    @property
    def full(self) -> SubNetwork:
        """The whole model."""
        return SubNetwork.from_config(self.config)

    def weight_bytes(self, sub: SubNetwork | None = None, dtype: Any = None) -> int:
        """Bytes of the weights of a sub-network, or of the whole."""
        return AnalyticCosts(self.config).weight_bytes(sub or self.full, dtype or self.stored)


def blocks_of(data: TextData | None, source: Source) -> tuple[int, int, list[str]]:
    """Blocks of text, tokens per block, and what is to be said where the number is a guess.

    Raises:
        ConfigError: for a block size that the model does not have.
    """
    data = data or TextData()
    length = data.check(source.config.block_size)
    paths = [path for part in (data, *data.sources) for path in part.paths]
    there = bool(paths) and all(path.is_file() for path in paths)
    found = sum(path.stat().st_size for path in paths) if there else 0
    of_files = max(1, found // (BYTES_PER_TOKEN * length)) if there else None
    known = [number for number in (data.num_blocks, of_files) if number is not None]
    if known:
        return min(known), length, []
    note = f"the amount of text is not known before it is read: {_ASSUMED} blocks are assumed"
    return _ASSUMED, length, [note]
