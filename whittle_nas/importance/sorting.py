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
from whittle_nas.weights.orders import LayerOrder, Orders, permute

FILE_NAME = "importance.safetensors"
_PER_LAYER = ("neurons", "groups", "heads", "qk_channels", "value_channels")


@dataclass(frozen=True)
class SortedFrom:
    """Content of `importance.safetensors`; ids are those of the model before it was ever sorted.

    Attributes:
        scores: by original id.
        orders: original ids, most important first.
        layer_order: layer ids, most important first.
        layer_losses: (L,) nats per token, of the chosen layer criterion; NaN where there is none.
        settings: how it was measured.
    """

    scores: Scores
    orders: Orders
    layer_order: tuple[int, ...]
    layer_losses: tuple[float, ...]
    settings: dict[str, Any]


class PermutedTensors(Mapping[str, Tensor]):
    """Weights in their new order, each read and made when it is asked for.

    The file is mapped anew for every tensor: pages of a mapping that were touched stay resident
    until it is closed, and in the end that would be the whole checkpoint.
    """

    def __init__(
        self, load: Callable[[], Mapping[str, Tensor]], orders: Orders, config: Any
    ) -> None:
        self._load, self._orders, self._config = load, orders, config
        first: dict[Any, str] = {}
        # A table that two names share (a tied head) is made once, so that it is stored once.
        self._owner = {name: first.setdefault(_place(t), name) for name, t in load().items()}
        shared = {owner for name, owner in self._owner.items() if name != owner}
        self._shared: dict[str, Tensor | None] = dict.fromkeys(shared)

    def __getitem__(self, name: str) -> Tensor:
        owner = self._owner[name]
        found = self._shared.get(owner)
        if found is None:
            found = permute(owner, self._load()[owner], self._orders, self._config)
            if owner in self._shared:
                self._shared[owner] = found
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner)

    def __len__(self) -> int:
        return len(self._owner)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def compose(first: Orders, then: Orders) -> Orders:
    """The one order that sorts as `first`, then `then` do; ids are those before `first`."""
    return Orders(
        embd=_pick(first.embd, then.embd),
        layers=[_compose_layer(a, b) for a, b in zip(first.layers, then.layers, strict=True)],
    )


def _compose_layer(first: LayerOrder, then: LayerOrder) -> LayerOrder:
    # Row g of `then` belongs to the group at position g of `first`, which was its group groups[g].
    at = {group: position for position, group in enumerate(first.groups)}
    composed = {
        name: [
            _pick(getattr(first, name)[group], getattr(then, name)[at[group]])
            for group in range(len(first.groups))
        ]
        for name in ("heads", "qk_channels", "value_channels")
    }
    return LayerOrder(
        neurons=_pick(first.neurons, then.neurons),
        groups=_pick(first.groups, then.groups),
        **composed,
    )


def _pick(items: Any, order: Any) -> list[int]:
    return [items[i] for i in order]


def original_scores(scores: Scores, orders: Orders, config: Any) -> Scores:
    """Scores by the ids that the model had before it was sorted by `orders`."""
    moved = {name: tensor.clone() for name, tensor in scores.to_dict().items()}
    moved["embd"][torch.tensor(orders.embd)] = scores.embd
    for layer, order in enumerate(orders.layers):
        moved["neurons"][layer, torch.tensor(order.neurons)] = scores.neurons[layer]
        moved["groups"][layer, torch.tensor(order.groups)] = scores.groups[layer]
        for position, group in enumerate(order.groups):
            free = torch.tensor(order.qk_channels[group])[config.rope_n_elem :]
            for name, ids in (
                ("heads", torch.tensor(order.heads[group])),
                ("value_channels", torch.tensor(order.value_channels[group])),
                ("qk_channels", free - config.rope_n_elem),
            ):
                moved[name][layer, group, ids] = getattr(scores, name)[layer, position]
    return Scores(**moved)


def write_importance(path: Path, found: SortedFrom) -> None:
    """Write `importance.safetensors`; equal content gives equal bytes."""
    from safetensors.torch import save_file

    tensors = {f"scores.{name}": t.contiguous() for name, t in found.scores.to_dict().items()}
    for name, ids in _order_lists(found.orders).items():
        tensors[f"orders.{name}"] = torch.tensor(ids, dtype=torch.int32)
    tensors["layer_order"] = torch.tensor(found.layer_order, dtype=torch.int32)
    tensors["layer_losses"] = torch.tensor(found.layer_losses, dtype=torch.float32)
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
        orders = _orders({n: tensors[f"orders.{n}"].tolist() for n in ("embd", *_PER_LAYER)})
        layer_order = tuple(tensors["layer_order"].tolist())
        layer_losses = tuple(tensors["layer_losses"].tolist())
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is not a valid {FILE_NAME}: {error}") from None
    return SortedFrom(scores, orders, layer_order, layer_losses, settings)


def _order_lists(orders: Orders) -> dict[str, Any]:
    def plain(ids: Any) -> Any:
        return ids if isinstance(ids, int) else [plain(item) for item in ids]

    layers = {name: plain([getattr(o, name) for o in orders.layers]) for name in _PER_LAYER}
    return {"embd": plain(orders.embd), **layers}


def _orders(lists: dict[str, Any]) -> Orders:
    layers = zip(*(lists[name] for name in _PER_LAYER), strict=True)
    return Orders(
        embd=lists["embd"],
        layers=[LayerOrder(**dict(zip(_PER_LAYER, values, strict=True))) for values in layers],
    )
