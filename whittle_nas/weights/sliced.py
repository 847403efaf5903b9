"""One part of a skeleton: a litgpt module that takes its weights from a larger one when it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from whittle_nas.weights.slicing import Cut, copied, take, view_of


class Sliced(nn.Module):
    """One part of a skeleton (a block, the embedding, ...), run with slices of the full part.

    A call puts the slices into the skeleton and takes them out again. This is what
    `torch.func.functional_call` does; but that looks every parameter up by its dotted name twice
    per call, 38 us for a block with LoRA where this needs 3, a tenth of a short step.

    All of it sits inside the checkpointed function: recomputation in the backward pass must slice
    again, because by then the skeleton's own parameters are back on the meta device.
    """

    def __init__(
        self,
        skeleton: nn.Module,
        source: nn.Module,
        prefix: str,
        cuts: Callable[[str], Cut],
        *,
        recompute: bool = False,
        unit: Callable[[], Any] = lambda: None,
    ) -> None:
        """Pair a part of a skeleton with the full part.

        Args:
            skeleton: litgpt's module in the sub-network's sizes, on the meta device.
            source: the same module of the whole model; a block may have parts that this one lacks.
            prefix: name of the full part in the model.
            cuts: of a parameter, by its name in the model.
            recompute: slice and run again in the backward pass.
            unit: gives what makes the full part's parameters whole around a call, or None.
        """
        super().__init__()
        self.skeleton = skeleton
        self.recompute = recompute
        self._unit = unit
        # In a tuple, so that the full part is not registered as a child of the skeleton.
        self._source = (source,)
        # A block may lack parts that the full one has.
        full = dict(source.named_modules())
        self._slots = [
            _Slot(full[path]._parameters, module._parameters, key, cuts(_join(prefix, path, key)))
            for path, module in skeleton.named_modules()
            for key, parameter in module._parameters.items()
            if parameter is not None
        ]

    def __getattr__(self, name: str) -> Any:
        """What litgpt's own part has: its parameters are slices, everything else the skeleton's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            skeleton: Any = super().__getattr__("skeleton")
            for slot in self.__dict__["_slots"]:
                if slot.key == name and slot.home is skeleton._parameters:
                    return take(slot.full[name], slot.cut)
            return getattr(skeleton, name)

    def forward(self, *args: Any) -> torch.Tensor:
        """What the full part's module computes, with slices of its parameters."""
        unit = self._unit()
        return self._run(*args) if unit is None else unit(self._run, *args)

    def _run(self, *args: Any) -> torch.Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._call, *args, use_reentrant=False)
        return self._call(*args)

    def _call(self, *args: Any) -> torch.Tensor:
        source = self._source[0]
        if self.skeleton.training != source.training:
            self.skeleton.train(source.training)
        tracked = torch.is_grad_enabled()
        try:
            for slot in self._slots:
                slot.fill(tracked)
            return self.skeleton(*args)
        finally:
            for slot in self._slots:
                slot.empty()


class _Slot:
    """Where one parameter of a skeleton's part comes from and goes to.

    A view that no gradient flows through stays right until its tensor moves, so it is kept: most
    parameters are frozen or run without gradients, and making a view costs more than checking.
    What a gather copies is never kept.
    """

    __slots__ = ("copies", "cut", "full", "hole", "home", "key", "place", "seen", "view")

    def __init__(self, full: dict[str, Any], home: dict[str, Any], key: str, cut: Cut) -> None:
        self.full, self.home, self.key, self.cut = full, home, key, cut
        self.copies = cut.copies
        self.hole = home[key]
        self.seen: torch.Tensor | None = None
        self.place = 0
        self.view: Any = None

    def fill(self, tracked: bool) -> None:
        tensor = self.full[self.key]
        if tracked and tensor.requires_grad:
            self.home[self.key] = take(tensor, self.cut)
            return
        if self.seen is not tensor or self.place != tensor.data_ptr():
            self.seen, self.place = tensor, tensor.data_ptr()
            self.view = view_of(tensor.detach(), self.cut)
        self.home[self.key] = copied(self.view, self.cut) if self.copies else self.view

    def empty(self) -> None:
        self.home[self.key] = self.hole


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
