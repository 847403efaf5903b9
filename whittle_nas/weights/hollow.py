"""A checkpoint of which little more than one block is in memory, for passes block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from whittle_nas.weights import axes
from whittle_nas.weights.checkpoint import Checkpoint
from whittle_nas.weights.shortcuts import model_class
from whittle_nas.weights.tying import tie_head


class Remapped(Mapping[str, Tensor]):
    """Weights whose file is mapped anew for every layer.

    Pages of a mapping that were touched stay resident until it is closed, and in the end that
    would be the whole file. So tensors of a layer are to be used before those of the next.
    """

    def __init__(self, load: Callable[[], Mapping[str, Tensor]]) -> None:
        """Wrap a state dict.

        Args:
            load: maps the file, such as `Checkpoint.state_dict`.
        """
        self._load = load
        self._layer: int | None = None
        self._tensors = load()
        self._names = list(self._tensors)

    def __getitem__(self, name: str) -> Tensor:
        layer, _ = axes.split_layer(name)
        if layer != self._layer:
            self._layer, self._tensors = layer, self._load()
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load_hollow(checkpoint: Checkpoint) -> Any:
    """A litgpt model whose blocks are on the meta device: embedding, last norm and head are real.

    Args:
        checkpoint: `calibration.fetch_block` takes the blocks from its weights one by one.
    """
    with torch.device("meta"):
        model = model_class(checkpoint.config)(checkpoint.config)
    tensors = checkpoint.state_dict()
    outside = {name: t for name, t in tensors.items() if axes.split_layer(name)[0] is None}
    model.load_state_dict(outside, strict=False, assign=True)
    tie_head(model)
    model.cos, model.sin = model.rope_cache()
    return model.requires_grad_(False).eval()
