"""Sorting a checkpoint, tensor by tensor, and the file that says how."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whittle_nas.errors import ConfigError
from whittle_nas.importance.scores import Scores
from whittle_nas.weights.bases import Bases, LayerBasis, transform
from whittle_nas.weights.norms import IMPORTANCE, NORM_SHARES

FILE_NAME = IMPORTANCE
_PER_LAYER = ("neurons", "groups", "heads", "qk_channels", "value_channels")


@dataclass(frozen=True)
class SortedFrom:
    """Content of `importance.safetensors`; ids are those of the model before it was ever sorted.

    Attributes:
        scores: by original id; of channels that a matrix made, by the new channels.
        bases: from original entries, most important first.
        layer_order: layer ids, most important first.
        layer_losses: (L,) nats per token, of the chosen layer criterion; NaN where there is none.
        settings: how it was measured.
        norm_shares: (2 L + 1, D) for every norm and k = 1..D, the mean of |x_(1..k)| / |x| over
            calibration tokens, x the norm's input in the new basis; None if it was not measured.
    """

    scores: Scores
    bases: Bases
    layer_order: tuple[int, ...]
    layer_losses: tuple[float, ...]
    settings: dict[str, Any]
    norm_shares: Tensor | None = None


class SortedTensors(Mapping[str, Tensor]):
    """Weights in their new basis, each read and made when it is asked for.

    The file is mapped anew for every tensor: pages of a mapping that were touched stay resident
    until it is closed, and in the end that would be the whole checkpoint.
    """

    def __init__(self, load: Callable[[], Mapping[str, Tensor]], bases: Bases, config: Any) -> None:
        self._load, self._bases, self._config = load, bases, config
        self._names = list(load())

    def __getitem__(self, name: str) -> Tensor:
        return transform(name, self._load(), self._bases, self._config)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def original_scores(scores: Scores, first: Bases, then: Bases, config: Any) -> Scores:
    """Scores by the ids that the model had before it was sorted by `first`.

    Args:
        scores: by the ids after `first`; of channels that `then` turns with a matrix, by the new
            channels.
        first: how the model was sorted.
        then: how it is sorted now.
        config: `litgpt.Config` of the model.
    """
    moved = {name: tensor.clone() for name, tensor in scores.to_dict().items()}
    moved["embd"] = _moved_back(scores.embd, first.embd, then.embd)
    for layer, (old, new) in enumerate(zip(first.layers, then.layers, strict=True)):
        moved["neurons"][layer] = _moved_back(scores.neurons[layer], old.neurons, new.neurons)
        moved["groups"][layer] = _moved_back(scores.groups[layer], old.groups, new.groups)
        for position, group in enumerate(old.groups):
            free = [channel - config.rope_n_elem for channel in old.qk_channels[group]]
            for name, before in (
                ("heads", old.heads[group]),
                ("value_channels", old.value_channels[group]),
                ("qk_channels", free[config.rope_n_elem :]),
            ):
                found = getattr(scores, name)[layer, position]
                after = getattr(new, name)[position]
                moved[name][layer, group] = _moved_back(found, before, after)
    return Scores(**moved)


def _moved_back(scores: Tensor, first: Any, then: Any) -> Tensor:
    """Scores of one axis; new channels have no original ids."""
    if isinstance(then, Tensor):
        return scores
    if isinstance(first, Tensor):
        return scores[list(then)]
    found = torch.empty_like(scores)
    found[list(first)] = scores
    return found


def write_importance(path: Path, found: SortedFrom) -> None:
    """Write `importance.safetensors`; equal content gives equal bytes."""
    from safetensors.torch import save_file

    tensors = {f"scores.{name}": t.contiguous() for name, t in found.scores.to_dict().items()}
    for name, value in _by_name(found.bases).items():
        if isinstance(value, Tensor):
            tensors[f"matrices.{name}"] = value.cpu().float().contiguous()
        else:
            tensors[f"orders.{name}"] = torch.tensor(value, dtype=torch.int32)
    tensors["layer_order"] = torch.tensor(found.layer_order, dtype=torch.int32)
    tensors["layer_losses"] = torch.tensor(found.layer_losses, dtype=torch.float32)
    if found.norm_shares is not None:
        tensors[NORM_SHARES] = found.norm_shares.cpu().float().contiguous()
    # One key: safetensors writes several in an order that differs from run to run.
    save_file(tensors, path, metadata={"importance": json.dumps(found.settings, sort_keys=True)})


def read_importance(path: Path) -> SortedFrom:
    """Read `importance.safetensors`.

    Raises:
        ConfigError: if the file is not one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            settings = json.loads(file.metadata()["importance"])
        scores = Scores(**{f: tensors[f"scores.{f}"] for f in Scores.__dataclass_fields__})
        bases = _bases({name: _read_axis(tensors, name) for name in ("embd", *_PER_LAYER)})
        layer_order = tuple(tensors["layer_order"].tolist())
        layer_losses = tuple(tensors["layer_losses"].tolist())
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is not a valid {FILE_NAME}: {error}") from None
    shares = tensors.get(NORM_SHARES)
    return SortedFrom(scores, bases, layer_order, layer_losses, settings, shares)


def _read_axis(tensors: Mapping[str, Tensor], name: str) -> Any:
    matrix = tensors.get(f"matrices.{name}")
    return tensors[f"orders.{name}"].tolist() if matrix is None else matrix


def _by_name(bases: Bases) -> dict[str, Any]:
    """One value per kind of entry: matrices as one tensor, orders as nested lists."""
    found: dict[str, Any] = {"embd": bases.embd}
    for name in _PER_LAYER:
        values = [getattr(basis, name) for basis in bases.layers]
        found[name] = torch.stack(values) if isinstance(values[0], Tensor) else values
    return {n: v if isinstance(v, Tensor) else _plain(v) for n, v in found.items()}


def _plain(ids: Any) -> Any:
    return ids if isinstance(ids, int) else [_plain(item) for item in ids]


def _bases(values: dict[str, Any]) -> Bases:
    layers = zip(*(values[name] for name in _PER_LAYER), strict=True)
    return Bases(
        embd=values["embd"],
        layers=[LayerBasis(**dict(zip(_PER_LAYER, layer, strict=True))) for layer in layers],
    )
