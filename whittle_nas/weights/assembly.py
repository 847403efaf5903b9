"""litgpt models whose blocks differ: every block is litgpt's own, built with its own config.

B batch, T tokens, n rotary channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from litgpt import GPT
from torch import nn
from torch.overrides import TorchFunctionMode

from whittle_nas.space.subnetwork import LINEAR, PARTS, HeadChannels, SubNetwork
from whittle_nas.weights import axes
from whittle_nas.weights.mixing import mix_in
from whittle_nas.weights.slicing import BlockPlan, SlicePlan, per_layer, plan_slices

Tables = tuple[torch.Tensor, torch.Tensor]  # cos and sin, (positions, n) each


def make_shell(plan: SlicePlan, build: Callable[[Any], Any]) -> Any:
    """The model of a sub-network, with one block that is to be replaced.

    Args:
        plan: the sub-network.
        build: makes the litgpt model of a config, on the current default device.
    """
    model = build(repeated(plan.config, 1))
    model.config = plan.config
    return model


class _NoValues(TorchFunctionMode):
    """Leaves `torch.nn.init` out."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@contextmanager
def without_values() -> Iterator[None]:
    """Modules are made on the meta device; half of that time would go into drawing no values."""
    with torch.device("meta"), _NoValues():
        yield


def make_block(block: BlockPlan, shell: Any) -> Any:
    """litgpt's block of one layer for the model of `make_shell`; parts that it lacks add nothing.

    Of the class that litgpt's model has made itself: a whole model per block would cost ten times
    as much.
    """
    return without_parts(type(shell.transformer.h[0])(block.config, 0), block)


def repeated(config: Any, height: int) -> Any:
    """The config of `height` layers like the first one of a network."""
    changed: dict[str, Any] = {"n_layer": height}
    for name, values in per_layer(config).items():
        if values is not None:
            changed[name] = values[:1] * height
    return replace(config, **changed)


def without_parts(module: Any, block: BlockPlan) -> Any:
    """Take away the parts of a litgpt block that its shape does not have, or replace them."""
    for name, _ in list(module.named_children()):
        if getattr(block.shape, name, "") == LINEAR:
            module.add_module(name, LinearMap(module.get_submodule(f"{name}.proj")))
        elif not axes.is_in(block.shape, name, block.config):
            module.add_module(name, Nothing() if name in PARTS else nn.Identity())
    return module


def build(config: Any, make: Callable[[Any], Any] = GPT) -> Any:
    """The model of a config on the default device, also where its layers differ.

    Args:
        config: litgpt config.
        make: makes the litgpt model of a config whose layers are equal.
    """
    if getattr(config, "blocks", None) is None:
        return make(config)
    whole = SubNetwork.from_config(config)
    # Heads of any size: they rotate as they do in the model, none is cut smaller here.
    model = assemble(plan_slices(whole, config, head_channels=HeadChannels.first), make)
    model.config = config
    return model


def assemble(plan: SlicePlan, build: Callable[[Any], Any] = GPT) -> Any:
    """The whole model of a sub-network with weights of its own, on the default device."""
    model = make_shell(plan, build)
    model.transformer.h.to("meta")  # only its class is needed, not one more block's weights
    blocks = [make_block(block, model) for block in plan.blocks]
    for module, block in zip(blocks, plan.blocks, strict=True):
        if needs_tables(block, plan):
            give_tables(module, block, rotary_tables(block.config, model.cos.device))
    model.transformer.h = nn.ModuleList(blocks)
    return model


@contextmanager
def built_in(dtype: torch.dtype) -> Iterator[None]:
    """Make weights in a number format: a model that is converted later is there twice."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def needs_tables(block: BlockPlan, plan: SlicePlan) -> bool:
    """Whether the model's rotary tables are not those of a block."""
    return block.shape.n_head > 0 and block.config.rope_n_elem != plan.config.rope_n_elem


def renew_tables(model: Any) -> None:
    """Compute the rotary tables of a model that was built on the meta device."""
    model.cos, model.sin = model.rope_cache()
    for module in model.transformer.h:
        if hasattr(module, "cos"):
            module.cos, module.sin = own_tables(module.config, rotary_tables(module.config, None))


def rotary_tables(config: Any, device: torch.device | None, length: int | None = None) -> Tables:
    """litgpt's cos and sin of a config, for all positions or for `length`."""
    asked = SimpleNamespace(config=config, max_seq_length=length or config.block_size)
    return GPT.rope_cache(asked, device=device)  # type: ignore[arg-type]


class Nothing(nn.Module):
    """In place of attention or MLP: adds zero to the residual stream and keeps no cache."""

    kv_cache = None
    apply_sliding_window_attention = False

    def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        """A zero that spreads over every shape."""
        return x.new_zeros(())

    def build_kv_cache(self, *_: Any) -> None:
        """Called by litgpt's `set_kv_cache` for every block."""


class LinearMap(Nothing):
    """In place of attention or MLP: a matrix from what it read to what it gave, without a cache."""

    def __init__(self, writer: Any) -> None:
        """Make it like the part's last layer: its outputs, a bias if that has one."""
        super().__init__()
        writer = getattr(writer, "linear", writer)  # inside of litgpt's adapter
        weight, bias = writer.weight, writer.bias is not None
        like = {"device": weight.device, "dtype": weight.dtype}
        self.map = nn.Linear(len(weight), len(weight), bias=bias, **like)

    def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.map(x)


def own_tables(config: Any, tables: Tables) -> Tables:
    """Of tables for two bases of frequencies, the base of a block's config."""
    at = ... if config.rope_indices is None else (..., config.rope_indices[0])
    return tables[0][at], tables[1][at]


def give_tables(module: Any, block: BlockPlan, tables: Tables) -> None:
    """Let a block rotate by its own tables: its heads are of another size than the model's.

    Args:
        module: litgpt's block.
        block: which one it is.
        tables: cos and sin of its head size for every position of the model; with two bases of
            frequencies, both.
    """
    for name, table in zip(("cos", "sin"), own_tables(block.config, tables), strict=True):
        module.register_buffer(name, table, persistent=False)
    module.register_forward_pre_hook(_with_own_tables)
    module.attn.rotary_channels = module.cos.shape[1]
    mix_in(module.attn, _CachesOwnChannels)


def _with_own_tables(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What litgpt's model gives a block, with the rows of its own tables."""
    x, cos, _, *rest = inputs
    positions = rest[1] if len(rest) > 1 else None
    rows = slice(cos.shape[1]) if positions is None else positions
    own = (module.cos[rows], module.sin[rows])  # (T, n), or (B, T, n) for batched positions
    cos, sin = (table if table.dim() == 3 else table.unsqueeze(0) for table in own)
    return x, cos, sin, *rest


class _CachesOwnChannels:
    """litgpt's attention, whose cache has its block's rotary channels instead of the model's."""

    rotary_channels: int

    def build_kv_cache(
        self, batch: int, length: int, _of_model: int | None = None, *rest: Any
    ) -> Any:
        own: Any = super()
        return own.build_kv_cache(batch, length, self.rotary_channels, *rest)
