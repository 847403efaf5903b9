"""A litgpt model whose blocks lie on several devices, one after the other.

All that is in no block (token table, rotary tables, last norm, head) lies on the first device:
token ids go in there, and hidden states and logits come out, as with a model on one device; a head
that is the token table is where both are needed. Hidden states travel from block to block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from whittle_nas.weights.mixing import mix_in
from whittle_nas.weights.pages import release

Device = torch.device | str | int | Sequence[torch.device]


def devices_of(device: Device) -> tuple[torch.device, ...]:
    """One device, the number of a GPU, several devices, or names with commas between them."""
    if isinstance(device, str):
        return tuple(torch.device(name.strip()) for name in device.split(","))
    if isinstance(device, int):
        return (torch.device("cuda", device),)
    return (device,) if isinstance(device, torch.device) else tuple(device)


def spelled(devices: Sequence[torch.device]) -> str:
    """Their names with commas between them."""
    return ",".join(map(str, devices))


def share_out(outside: int, blocks: Sequence[int], count: int) -> list[int]:
    """The device of every block, so that all hold about as much and neighbours stay together.

    A device is full when half of the next block would be beyond an even share of what is left.

    Args:
        outside: bytes of what is in no block, on the first device.
        blocks: bytes of every block, in their order.
        count: how many devices there are.

    Returns:
        For every block the number of its device, from 0, ascending.
    """
    places, at = [], 0
    held, left = outside, outside + sum(blocks)  # of this device; of it and all behind it
    for size in blocks:
        if held and at < count - 1 and held + size / 2 > left / (count - at):
            at, held, left = at + 1, 0, left - held
        places.append(at)
        held += size
    return places


def place(model: Any, device: Device | None, dtype: torch.dtype | None = None) -> Any:
    """Move a litgpt model, block by block: the host never holds a second copy of more than one.

    Args:
        model: its weights may be mapped from a file, which must not have been written to.
        device: one, or several; see `share_out`. One that is named twice gets two shares. None:
            where the model is.
        dtype: of the parameters; None: as they are.

    Returns:
        The same model.
    """
    devices = devices_of(model.lm_head.weight.device if device is None else device)
    blocks = model.transformer.h
    several = len(devices) > 1
    model.transformer.h = nn.ModuleList()  # `model` is what is in no block from here on
    places = share_out(_bytes(model), list(map(_bytes, blocks)), len(devices))
    for block, at in zip(blocks, places, strict=True):
        _move(block, devices[at], dtype)
        if several:
            run_on(block, devices[at])
    _move(model, devices[0], dtype)
    if several:
        run_on(model.transformer.ln_f, devices[0])
    model.transformer.h = blocks
    return model


def run_on(module: Any, device: torch.device) -> None:
    """Let a module take its inputs to a device; a block also makes its KV cache there.

    A buffer remembers the device, so that a copy of the module that moves takes them along.

    Args:
        module: litgpt's block or norm; its weights are on the device, or will be.
        device: where it runs.
    """
    module.register_buffer("home", torch.empty(0, device=device), persistent=False)
    module.register_forward_pre_hook(_bring_inputs, prepend=True)
    if hasattr(module, "attn"):
        module.attn.register_buffer("home", torch.empty(0, device=device), persistent=False)
        mix_in(module.attn, _CachesAtHome)


def home_of(module: Any) -> torch.device | None:
    """The device of a part of a model that lies on several; None where all lies on one."""
    home = getattr(module, "home", None)
    return None if home is None else home.device


def _bring_inputs(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    device = module.home.device
    return tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in inputs)


class _CachesAtHome:
    """litgpt's attention, whose cache is on the device of its block instead of the model's."""

    home: torch.Tensor

    def build_kv_cache(
        self,
        batch: int,
        length: int,
        n_elem: int | None = None,
        _of_model: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        own: Any = super()
        return own.build_kv_cache(batch, length, n_elem, self.home.device, dtype)


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _move(module: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
    before = [parameter.data for parameter in module.parameters()]
    module.to(device=device, dtype=dtype)
    for old, new in zip(before, module.parameters(), strict=True):
        if (old.device, old.dtype) != (new.device, new.dtype):
            release(old)
