"""A sub-network is a value: its width, and one block per layer of the super-network."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby
from typing import Any, NamedTuple

from whittle_nas.errors import ConfigError

BLOCK_SIZES = ("n_head", "n_query_groups", "head_size", "intermediate_size")
SIZES = ("n_embd", *BLOCK_SIZES, "n_layer")
PARTS = ("attn", "mlp")  # of a block, by litgpt's names
LINEAR = "linear"  # one matrix (n_embd, n_embd) in place of a part
SPARSE, COARSE = "2:4", ("4bit", "8bit")
COMPRESSED = (SPARSE, *COARSE)  # all matrices of a part with zeros, or with fewer bits


class HeadChannels(str, Enum):
    """Which query and key channels a smaller head keeps.

    `rope` keeps every s-th rotary pair, so that their frequencies stay exactly what they were;
    `first` keeps the first channels, as the code published with the paper does, which moves the
    frequency of every pair.
    """

    rope = "rope"
    first = "first"


class _Sizes(NamedTuple):
    n_head: int
    n_query_groups: int
    head_size: int
    intermediate_size: int
    attn: str
    mlp: str


class Block(_Sizes):
    """Sizes of one layer, and what stands in the place of its parts.

    It takes the first entries of every dimension; inside each of the first `n_query_groups` query
    groups the first `n_head / n_query_groups` heads. Without heads there is no attention, and then
    neither groups nor a head size; without `intermediate_size` there is no MLP. `attn` and `mlp`
    are empty, or `LINEAR` where a matrix takes the place of that part, which then has no size, or
    one of `COMPRESSED` where its weights are others of the same shapes.
    """

    __slots__ = ()

    def __new__(
        cls,
        n_head: int,
        n_query_groups: int,
        head_size: int,
        intermediate_size: int,
        attn: str = "",
        mlp: str = "",
    ) -> Block:
        """One value for each shape: without heads the other sizes of attention are 0."""
        if n_head == 0 or attn == LINEAR:
            n_head = n_query_groups = head_size = 0
        if mlp == LINEAR:
            intermediate_size = 0
        attn = attn if n_head or attn == LINEAR else ""
        mlp = mlp if intermediate_size or mlp == LINEAR else ""
        return super().__new__(cls, n_head, n_query_groups, head_size, intermediate_size, attn, mlp)

    @classmethod
    def _make(cls, iterable: Iterable[Any]) -> Block:  # type: ignore[override]
        return cls(*iterable)  # so that `_replace` makes one value for each shape, too

    @property
    def sizes(self) -> tuple[int, ...]:
        """The four sizes."""
        return self[:4]

    @property
    def forms(self) -> tuple[str, str]:
        """What stands in the place of attention and MLP, empty where they are the model's own."""
        return self.attn, self.mlp

    @property
    def plain(self) -> Block:
        """The same modules, whatever their weights are."""
        attn, mlp = (form if form == LINEAR else "" for form in self.forms)
        return self if (attn, mlp) == self.forms else self._replace(attn=attn, mlp=mlp)

    def to_dict(self) -> dict[str, int]:
        """The sizes by name."""
        return dict(zip(BLOCK_SIZES, self.sizes, strict=True))

    def to_list(self) -> list[int | str]:
        """Plain form for files: the sizes, and the forms if there are any."""
        return [*self.sizes, *(self.forms if any(self.forms) else ())]

    def __str__(self) -> str:
        """Heads / groups / head size / neurons, and which parts have another form."""
        named = zip(PARTS, self.forms, strict=True)
        return "/".join(
            [*map(str, self.sizes), *(f"{form}-{part}" for part, form in named if form)]
        )


_EMPTY = Block(0, 0, 0, 0)


@functools.total_ordering
@dataclass(frozen=True)
class SubNetwork:
    """The shape of one sub-network.

    Attributes:
        n_embd: channels of the residual stream; it keeps the first ones.
        blocks: one value per layer of the super-network, None where the layer is gone. A block
            without attention and without MLP is a layer that is gone.
    """

    n_embd: int
    blocks: tuple[Block | None, ...]

    def __post_init__(self) -> None:
        if _EMPTY in self.blocks:
            gone = tuple(None if block == _EMPTY else block for block in self.blocks)
            object.__setattr__(self, "blocks", gone)

    @property
    def n_layer(self) -> int:
        """Number of layers that are kept."""
        return len(self.blocks) - self.blocks.count(None)

    @property
    def layers(self) -> tuple[int, ...]:
        """Ids of the layers that are kept, ascending."""
        return tuple(at for at, block in enumerate(self.blocks) if block is not None)

    @functools.cached_property
    def shapes(self) -> Mapping[Block, int]:
        """How often each different block stands in the sub-network, in the order of the layers."""
        return Counter(block for block in self.blocks if block is not None)

    def sizes(self) -> dict[str, int] | None:
        """The six sizes of a sub-network with equal blocks, None for any other.

        Together with `layers` they say everything. Only formats that know no other networks need
        this.
        """
        if len(self.shapes) != 1:
            return None
        block = next(iter(self.shapes))
        if any(block.forms):
            return None
        sizes = {"n_embd": self.n_embd, **block.to_dict(), "n_layer": self.n_layer}
        return sizes if all(sizes.values()) else None

    def shares(self, whole: SubNetwork) -> list[tuple[float, float]]:
        """For each layer of the whole model, which share of head channels and neurons is kept."""
        pairs = zip(self.blocks, whole.blocks, strict=True)
        return [(0.0, 0.0) if b is None or of is None else _shares(b, of) for b, of in pairs]

    def summary(self) -> dict[str, float]:
        """The six sizes as numbers for tables and pages: means where the blocks differ."""
        found: dict[str, float] = {"n_embd": self.n_embd}
        total = max(1, self.n_layer)
        for at, name in enumerate(BLOCK_SIZES):
            mean = sum(block.sizes[at] * times for block, times in self.shapes.items()) / total
            found[name] = int(mean) if mean == int(mean) else round(mean, 2)
        return {**found, "n_layer": self.n_layer}

    def to_dict(self) -> dict[str, Any]:
        """Plain form for JSON or YAML.

        Six sizes, and `layers` unless all are kept; `n_embd` and `blocks` if the blocks differ.
        """
        sizes = self.sizes()
        if sizes is None:
            return {"n_embd": self.n_embd, "blocks": [b and b.to_list() for b in self.blocks]}
        return sizes if None not in self.blocks else {**sizes, "layers": list(self.layers)}

    @classmethod
    def uniform(
        cls,
        layer_order: Sequence[int],
        *,
        n_embd: int,
        n_head: int,
        n_query_groups: int,
        head_size: int,
        intermediate_size: int,
        n_layer: int,
    ) -> SubNetwork:
        """Equal blocks in the `n_layer` most important layers.

        Args:
            layer_order: every layer id of the super-network, most important first.
            n_embd: channels of the residual stream.
            n_head: attention heads.
            n_query_groups: query groups.
            head_size: channels per head.
            intermediate_size: MLP neurons.
            n_layer: layers that are kept.

        Raises:
            ConfigError: if the super-network has not that many layers.
        """
        if not 0 <= n_layer <= len(layer_order):
            raise ConfigError(
                f"n_layer={n_layer} must be between 1 and the model's {len(layer_order)}"
            )
        block = Block(n_head, n_query_groups, head_size, intermediate_size)
        return cls._repeated(n_embd, block, layer_order[:n_layer], len(layer_order))

    @classmethod
    def _repeated(cls, n_embd: int, block: Block, layers: Iterable[int], depth: int) -> SubNetwork:
        kept = set(layers)
        return cls(n_embd, tuple(block if layer in kept else None for layer in range(depth)))

    @classmethod
    def from_dict(cls, spec: Any, layer_order: Sequence[int]) -> SubNetwork:
        """Inverse of `to_dict`; also reads six sizes without `layers`.

        Args:
            spec: the plain form.
            layer_order: every layer id of the super-network, most important first: decides which
                layers are kept where `spec` does not say it.

        Raises:
            ConfigError: if a size is missing, unknown or not a positive integer, or if there are
                not as many blocks as layers.
        """
        if isinstance(spec, dict) and set(spec) == {"n_embd", "blocks"}:
            return _from_blocks(spec, len(layer_order))
        layers = spec.get("layers") if isinstance(spec, dict) else None
        sizes = {k: v for k, v in spec.items() if k != "layers"} if isinstance(spec, dict) else spec
        if not isinstance(sizes, dict) or set(sizes) != set(SIZES):
            got = sorted(map(str, spec)) if isinstance(spec, dict) else spec
            raise ConfigError(
                f"a sub-network needs exactly the sizes {', '.join(SIZES)}, or n_embd and blocks; "
                f"got {got}"
            )
        for name, value in sizes.items():
            if type(value) is not int or value < 1:
                raise ConfigError(f"sub-network size {name}={value!r} must be a positive integer")
        if layers is None:
            return cls.uniform(layer_order, **sizes)
        _check_layers(layers, sizes["n_layer"], len(layer_order))
        block = Block(*(sizes[name] for name in BLOCK_SIZES))
        return cls._repeated(sizes["n_embd"], block, layers, len(layer_order))

    @classmethod
    def from_config(cls, config: Any) -> SubNetwork:
        """The whole model that a `litgpt.Config` describes."""
        if (own := getattr(config, "blocks", None)) is not None:
            return cls(config.n_embd, tuple(own))
        block = Block(*(getattr(config, name) for name in BLOCK_SIZES))
        return cls(config.n_embd, (block,) * config.n_layer)

    @property
    def forms(self) -> frozenset[str]:
        """What stands in the place of some attentions and MLPs."""
        return frozenset(form for block in self.blocks if block for form in block.forms if form)

    def within(self, larger: SubNetwork) -> SubNetwork | None:
        """This sub-network as one of the checkpoint of a larger one, None if it is no part of it.

        Both are of the same super-network; the layers that `larger` lacks are left out.
        """
        pairs = list(zip(self.blocks, larger.blocks, strict=True))
        if self.n_embd > larger.n_embd or not all(_is_part(block, of) for block, of in pairs):
            return None
        return SubNetwork(self.n_embd, tuple(block for block, of in pairs if of is not None))

    def reordered(self, before: Sequence[int], after: Sequence[int]) -> SubNetwork:
        """The block of the layer of every rank in one order, in the layer of that rank in another.

        Args:
            before: layer ids, most important first.
            after: the same in another order.
        """
        moved = {layer: self.blocks[old] for old, layer in zip(before, after, strict=True)}
        return SubNetwork(self.n_embd, tuple(moved[layer] for layer in range(len(self.blocks))))

    def __lt__(self, other: SubNetwork) -> bool:
        """By width, then layer by layer; a layer that is gone comes first."""
        return self._key() < other._key()

    def _key(self) -> tuple[Any, ...]:
        return self.n_embd, tuple(block or () for block in self.blocks)

    def __str__(self) -> str:
        """One line for tables and messages."""
        if sizes := self.sizes():
            return " ".join(f"{name}={value}" for name, value in sizes.items())
        runs = ((block, len(list(run))) for block, run in groupby(self.blocks))
        parts = (f"{n}x{b or 'none'}" if n > 1 else str(b or "none") for b, n in runs)
        return f"n_embd={self.n_embd} blocks={','.join(parts)}"


def _is_part(block: Block | None, larger: Block | None) -> bool:
    """Whether every entry that a block keeps is one that a larger block keeps."""
    if block is None or larger is None:
        return block is None
    if any(size > of for size, of in zip(block.sizes, larger.sizes, strict=True)):
        return False
    if any(form not in ("", of) for form, of in zip(block.forms, larger.forms, strict=True)):
        return False
    # Of each group the first heads are kept, and of each head every s-th rotary pair.
    return not block.n_head or (
        block.n_head // block.n_query_groups <= larger.n_head // larger.n_query_groups
        and larger.head_size % block.head_size == 0
    )


def _shares(block: Block, whole: Block) -> tuple[float, float]:
    heads = block.n_head * block.head_size / max(1, whole.n_head * whole.head_size)
    return heads, block.intermediate_size / max(1, whole.intermediate_size)


def _check_layers(layers: Any, n_layer: int, depth: int) -> None:
    whole = isinstance(layers, list) and all(type(i) is int and 0 <= i < depth for i in layers)
    if not whole or len(set(layers)) != len(layers) or len(layers) != n_layer:
        raise ConfigError(
            f"sub-network layers={layers!r} must be n_layer={n_layer} different layer ids from 0 "
            f"to {depth - 1}"
        )


def _from_blocks(spec: Mapping[str, Any], depth: int) -> SubNetwork:
    """Blocks are lists of four sizes and maybe two forms, mappings of the sizes, or None."""
    n_embd, listed = spec["n_embd"], spec["blocks"]
    if type(n_embd) is not int or n_embd < 1:
        raise ConfigError(f"sub-network size n_embd={n_embd!r} must be a positive integer")
    if not isinstance(listed, list) or len(listed) != depth:
        got = len(listed) if isinstance(listed, list) else listed
        raise ConfigError(
            f"a sub-network's blocks must be one per layer of the model, {depth}; got {got}"
        )
    return SubNetwork(n_embd, tuple(entry and _block(entry, at) for at, entry in enumerate(listed)))


def _block(entry: Any, layer: int) -> Block:
    named = isinstance(entry, dict) and set(entry) == set(BLOCK_SIZES)
    values = [entry[name] for name in BLOCK_SIZES] if named else entry
    listed = values if isinstance(values, list) else []
    sizes, forms = listed[: len(BLOCK_SIZES)], listed[len(BLOCK_SIZES) :]
    whole = len(sizes) == len(BLOCK_SIZES) and all(type(v) is int and v >= 0 for v in sizes)
    known = not forms or (len(forms) == 2 and set(forms) <= {"", LINEAR, *COMPRESSED})
    found = Block(*sizes, *forms) if whole and known else None
    given = (sizes[0], sizes[3], tuple(forms or ("", ""))) if found else None
    if found is None or (found.n_head, found.intermediate_size, found.forms) != given:
        raise ConfigError(
            f"sub-network block {layer} must be null or the {len(BLOCK_SIZES)} numbers "
            f"{', '.join(BLOCK_SIZES)}, and behind them for attention and for MLP '', {LINEAR!r} "
            f"without sizes, {', '.join(map(repr, COMPRESSED[:-1]))} or {COMPRESSED[-1]!r}; got "
            f"{entry!r}"
        )
    return found
