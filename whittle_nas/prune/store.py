"""Finished blocks on disk, so that a run that was killed goes on; and reading them back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whittle_nas.reading import read_json
from whittle_nas.weights import axes
from whittle_nas.weights.checkpoint import load_torch
from whittle_nas.weights.files import atomic_file, atomic_write_text

_KEY = "run.json"


class BlockStore:
    """A hidden folder beside `out_dir` with a file per finished block."""

    def __init__(self, out_dir: Path, key: Mapping[str, Any]) -> None:
        """Look for what an earlier run of the same kind got done.

        Args:
            out_dir: where the result will be.
            key: everything that the blocks depend on, as plain values.
        """
        target = Path(os.path.realpath(out_dir))
        folder = target if os.path.ismount(target) else target.parent
        self.path = folder / f".{target.name}.blocks"
        self._key, self._content = self.path / _KEY, json.loads(json.dumps(key))
        self._ours = self._key.is_file() and read_json(self._key) == self._content

    def get(self, layer: int) -> dict[str, Any] | None:
        """What was kept of a layer, tensors mapped from its file; None if it is not finished."""
        path = self.path / f"{layer}.pth"
        return load_torch(path) if self._ours and path.is_file() else None

    def put(self, layer: int, content: Mapping[str, Any]) -> None:
        """Keep tensors and plain values of a finished layer; what other runs left goes."""
        if not self._ours:
            self.remove()
            self.path.mkdir(parents=True)
            atomic_write_text(self._key, json.dumps(self._content))
            self._ours = True
        with atomic_file(self.path / f"{layer}.pth") as partial:
            torch.save(dict(content), partial)

    def remove(self) -> None:
        """Forget all blocks."""
        shutil.rmtree(self.path, ignore_errors=True)


class Replaced(Mapping[str, Tensor]):
    """A state dict with other blocks, each read when one of its tensors is asked for."""

    def __init__(
        self, tensors: Mapping[str, Tensor], block: Callable[[int], Mapping[str, Tensor]]
    ) -> None:
        """Lay blocks over a model.

        Args:
            tensors: parameters of the model by litgpt name; those outside of blocks stay.
            block: parameters of a layer by their names in the block, some or all.
        """
        self._tensors, self._block = tensors, block
        self._layer: int | None = None
        self._held: Mapping[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        layer, rest = axes.split_layer(name)
        if layer is None:
            return self._tensors[name]
        if layer != self._layer:
            self._layer, self._held = layer, self._block(layer)
        return self._held[rest] if rest in self._held else self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
