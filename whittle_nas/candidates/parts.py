"""The parts of a model, and the sizes that each may have instead of its own: pure Python."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from whittle_nas.errors import ConfigError
from whittle_nas.space.front import parse_amount
from whittle_nas.space.rules import check
from whittle_nas.space.subnetwork import COMPRESSED, LINEAR, PARTS, Block, HeadChannels, SubNetwork

KINDS = ATTENTION, MLP = PARTS
# (n_head, n_query_groups, head_size) or (intermediate_size,), and behind them the form if any.
Sizes = tuple[int | str, ...]
_ALIGNED = 64  # what matrix units like, where the model's own width allows it


class Part(NamedTuple):
    """An attention or an MLP of the whole model."""

    layer: int
    kind: str

    def __str__(self) -> str:
        """As in tables."""
        return f"{self.layer}.{self.kind}"


@dataclass(frozen=True)
class GridOptions:
    """The sizes that parts may have, besides their own: shares such as 50%, or numbers.

    Args:
        heads: Query groups that stay; heads of each group where the model has one group. 0 leaves
            the attention out.
        head_size: Channels of every head that stay, in attentions with all heads.
        neurons: Neurons of an MLP that stay, rounded to a multiple of up to 64. 0 leaves the MLP
            out.
        linear: A matrix in place of every attention and MLP, fitted from what it reads to what it
            gives. Such networks keep no keys and values there.
        compressed: Whole parts with other weights: `2:4` (two of four are zero, by SparseGPT),
            `8bit` and `4bit` (by GPTQ). They save `weight_bytes` and `memory_bytes` alone.
    """

    heads: list[str] | str = "75%,50%,25%,0"
    head_size: list[str] | str = ""
    neurons: list[str] | str = "75%,50%,25%,0"
    linear: bool = False
    compressed: list[str] | str = ""


def grid(
    config: Any, options: GridOptions, head_channels: HeadChannels = HeadChannels.rope
) -> dict[str, tuple[Sizes, ...]]:
    """All sizes of an attention and of an MLP, the model's own first, then falling.

    Args:
        config: litgpt config of the model.
        options: what is wanted.
        head_channels: how a smaller head chooses its channels.

    Raises:
        ConfigError: for what is not a size, or does not fit the model.
    """
    whole = Block(config.n_head, config.n_query_groups, config.head_size, config.intermediate_size)
    found = {
        ATTENTION: [*_heads(whole, options), *_head_sizes(whole, options)],
        MLP: _neurons(whole, options),
    }
    if options.linear:
        found[ATTENTION].append((0, 0, 0, LINEAR))
        found[MLP].append((0, LINEAR))
    for form in _split(options.compressed):
        if form not in COMPRESSED:
            known = ", ".join(COMPRESSED)
            raise ConfigError(f"--grid.compressed: {form!r} must be one of {known}")
        for kind, choices in found.items():
            choices.append((*sizes_of(whole, kind), form))
    for kind, choices in found.items():
        for sizes in choices:
            block = with_sizes(whole, kind, sizes)
            check(SubNetwork(config.n_embd, (block,) * config.n_layer), config, head_channels)
    own = {kind: sizes_of(whole, kind) for kind in KINDS}
    return {
        # A form stands behind its sizes: a linear map comes before nothing.
        kind: (own[kind], *sorted({*choices} - {own[kind]}, reverse=True))
        for kind, choices in found.items()
    }


def sizes_of(block: Block | None, kind: str) -> Sizes:
    """The sizes of one part of a block, zeros where it is not there."""
    block = block or Block(0, 0, 0, 0)
    sizes = block.sizes[:3] if kind == ATTENTION else block.sizes[3:]
    form = block.attn if kind == ATTENTION else block.mlp
    return (*sizes, form) if form else sizes


def with_sizes(block: Block | None, kind: str, sizes: Sizes) -> Block:
    """A block with another attention or another MLP."""
    chosen = {name: sizes_of(block, name) for name in KINDS} | {kind: sizes}
    numbers = [size for name in KINDS for size in chosen[name] if not isinstance(size, str)]
    return Block._make([*numbers, *(form_of(chosen[name]) for name in KINDS)])


def form_of(sizes: Sizes) -> str:
    """The form of a part, empty for the model's own."""
    return sizes[-1] if isinstance(sizes[-1], str) else ""


def is_nothing(sizes: Sizes) -> bool:
    """Whether a part of these sizes is left out."""
    return not any(sizes)


def _heads(whole: Block, options: GridOptions) -> list[Sizes]:
    per_group = whole.n_head // whole.n_query_groups
    several = whole.n_query_groups > 1
    most = whole.n_query_groups if several else whole.n_head
    found = []
    for count in _counts(options.heads, most, 1, "heads"):
        heads, groups = (count * per_group, count) if several else (count, 1)
        found.append((heads, groups, whole.head_size) if count else (0, 0, 0))
    return found


def _head_sizes(whole: Block, options: GridOptions) -> list[Sizes]:
    counts = _counts(options.head_size, whole.head_size, 2, "head_size")
    return [(whole.n_head, whole.n_query_groups, count) for count in counts if count]


def _neurons(whole: Block, options: GridOptions) -> list[Sizes]:
    most = whole.intermediate_size
    return [
        (count,) for count in _counts(options.neurons, most, math.gcd(most, _ALIGNED), "neurons")
    ]


def _counts(given: Sequence[str] | str, most: int, step: int, option: str) -> list[int]:
    """Numbers of entries; shares are rounded to multiples of `step`, but not to nothing."""
    found = []
    for part in _split(given):
        try:
            value, is_share = parse_amount(part)
        except ValueError:
            value, is_share = math.nan, False
        if is_share and value > 0:
            value = max(step, step * math.floor(value * most / step + 0.5))
        if not 0 <= value <= most or value != int(value):
            raise ConfigError(
                f"--grid.{option}: {part!r} must be a share such as 50%, or a whole number from 0 "
                f"to {most}"
            )
        found.append(int(value))
    return found


def _split(given: Sequence[str] | str) -> list[str]:
    """What stands between the commas."""
    parts = given.split(",") if isinstance(given, str) else given
    return list(filter(None, (str(part).strip() for part in parts)))


def describe(sizes: Mapping[str, Sequence[Sizes]]) -> str:
    """One line for people."""
    heads, mlps = (", ".join(map(label, sizes[kind])) for kind in KINDS)
    return f"attention {heads}; MLP {mlps}"


def label(sizes: Sizes) -> str:
    """The sizes of a part for people."""
    form = form_of(sizes)
    numbers = "/".join(str(size) for size in sizes if size != form)
    return " ".join(filter(None, (numbers if sizes[0] else "", form))) or "none"
