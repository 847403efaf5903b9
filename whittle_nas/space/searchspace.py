"""The set of sub-networks that are trained and searched."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from whittle_nas.errors import ConfigError
from whittle_nas.space.domain import Domain, parse_domain
from whittle_nas.space.presets import read_space_file
from whittle_nas.space.rules import check_supported, violations
from whittle_nas.space.subnetwork import Block, HeadChannels, SubNetwork

DIMENSIONS = (
    "n_embd", "n_head", "n_query_groups", "head_size", "intermediate_size", "mlp_ratio", "n_layer",
)  # fmt: skip
PER_LAYER = DIMENSIONS[1:-1]
_LISTED = 10**9  # members that may be listed one by one

_Attention = tuple[int, int, int]  # n_head, n_query_groups, head_size


@dataclass(frozen=True)
class SearchSpace:
    """Choices for every size of a sub-network of the model `full`.

    Exactly one of `intermediate_size` and `mlp_ratio` is given; with a ratio,
    `intermediate_size = int(mlp_ratio * n_embd)` of the sub-network. Without `n_query_groups` a
    sub-network keeps all groups of `full` while it has that many heads, else one head per group.
    Without `n_head` it keeps whole query groups.

    Attributes:
        full: the whole model.
        layer_order: every layer id, most important first; a member keeps the first `n_layer`.
        per_layer: dimensions that every layer chooses for itself, of `PER_LAYER`. There 0 heads or
            groups mean a layer without attention, and 0 neurons one without MLP.
    """

    full: SubNetwork
    layer_order: tuple[int, ...]
    n_embd: Domain
    head_size: Domain
    n_layer: Domain
    n_head: Domain | None = None
    n_query_groups: Domain | None = None
    intermediate_size: Domain | None = None
    mlp_ratio: Domain | None = None
    per_layer: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        assert (self.intermediate_size is None) != (self.mlp_ratio is None)
        if not any(self._heads):
            whole, heads = self._whole, self.n_head.values[:8] if self.n_head else []
            raise ConfigError(
                f"search space: no n_head of {list(heads)} forms whole query groups of a model "
                f"with n_head={whole.n_head} and n_query_groups={whole.n_query_groups}"
            )

    @cached_property
    def _whole(self) -> Block:
        """A block of the whole model."""
        return next(iter(self.full.shapes))

    @cached_property
    def _heads(self) -> dict[int, list[int]]:
        """Valid numbers of query groups for each `n_head`."""
        most, per_group = (
            self._whole.n_query_groups,
            self._whole.n_head // self._whole.n_query_groups,
        )
        if self.n_head is None:
            assert self.n_query_groups is not None
            return {int(g) * per_group: [int(g)] for g in self.n_query_groups.values}
        valid = {}
        for n_head in map(int, self.n_head.values):
            groups = self.n_query_groups or Domain((min(most, n_head),))
            fit = [int(g) for g in groups.values if _fits(n_head, int(g), per_group)]
            if fit:
                valid[n_head] = fit
        return valid

    @cached_property
    def _attention(self) -> list[list[_Attention]]:
        """What the layers of a member choose from, for each choice that they have in common."""
        found: dict[tuple[Any, ...], dict[_Attention, None]] = {}
        for n_head, groups in self._heads.items():
            for group, head_size in itertools.product(groups, map(int, self.head_size.values)):
                sizes = {"n_head": n_head, "n_query_groups": group, "head_size": head_size}
                common = tuple(
                    value for name, value in sizes.items() if not self.is_per_layer(name)
                )
                choice = (n_head, group, head_size if n_head else 0)
                found.setdefault(common, {})[choice] = None
        return [sorted(choices, key=_rows) for choices in found.values()]

    def attention_choices(self) -> list[_Attention]:
        """Every (n_head, n_query_groups, head_size) that a layer may have."""
        return sorted(set(itertools.chain(*self._attention)))

    def is_per_layer(self, name: str) -> bool:
        """Whether every layer chooses this dimension for itself."""
        if name == "n_head" and self.n_head is None:
            name = "n_query_groups"
        if name == "n_query_groups" and self.n_query_groups is None:
            name = "n_head"
        return name in self.per_layer

    @cached_property
    def _dimensions(self) -> dict[str, Sequence[float]]:
        found: dict[str, Sequence[float]] = {}
        for name in DIMENSIONS:
            domain = getattr(self, name)
            if domain is not None and name in self.per_layer:
                found |= {f"{name}.{layer}": domain.values for layer in sorted(self.layer_order)}
            elif domain is not None:
                found[name] = domain.values
        return found

    def dimensions(self) -> dict[str, Sequence[float]]:
        """Ordered choices per dimension, for a searcher; fixed dimensions have one choice.

        A dimension that every layer chooses stands there once per layer, as `intermediate_size.3`;
        what is chosen for a layer that is not kept does not matter.
        """
        return dict(self._dimensions)

    def domain(self, dimension: str) -> Domain:
        """The domain of one of `dimensions()`."""
        return getattr(self, dimension.partition(".")[0])

    def build(self, **genes: float) -> SubNetwork | None:
        """The sub-network of one choice per dimension, or None if the choices do not go together.

        Args:
            **genes: values as in `dimensions()`.
        """
        n_embd, kept = int(genes["n_embd"]), self.layer_order[: int(genes["n_layer"])]
        if not self.per_layer:
            block = self._block(n_embd, genes, "")
            return block and self._member(n_embd, dict.fromkeys(kept, block))
        blocks: dict[int, Block] = {}
        for layer in kept:
            block = self._block(n_embd, genes, f".{layer}")
            if block is None:
                return None
            blocks[layer] = block
        return self._member(n_embd, blocks)

    def _block(self, n_embd: int, genes: dict[str, float], suffix: str) -> Block | None:
        def gene(name: str) -> float:
            return genes[name + suffix if name in self.per_layer else name]

        if self.n_head is None:
            group = int(gene("n_query_groups"))
            n_head = next(h for h, groups in self._heads.items() if group in groups)
        else:
            n_head = int(gene("n_head"))
            groups = self._heads.get(n_head, [])
            group = int(gene("n_query_groups")) if self.n_query_groups else (groups or [-1])[0]
            if n_head == 0 and groups:
                group = 0
            if group not in groups:
                return None
        mlp = self._width(n_embd, gene("mlp_ratio" if self.mlp_ratio else "intermediate_size"))
        if not self._least_width <= mlp <= self._whole.intermediate_size or n_head == mlp == 0:
            return None
        return Block(n_head, group, int(gene("head_size")), mlp)

    def _member(self, n_embd: int, blocks: dict[int, Block]) -> SubNetwork:
        return SubNetwork(n_embd, tuple(map(blocks.get, range(len(self.layer_order)))))

    def genes(self, sub: SubNetwork) -> dict[str, float]:
        """Inverse of `build`: one choice per dimension for a member of the space.

        A layer that is not kept gets the largest sizes, as does a head size without attention.
        """
        genes: dict[str, float] = {"n_embd": sub.n_embd}
        kept = [block for block in sub.blocks if block is not None]
        with_heads = next((block for block in kept if block.n_head), kept[0])
        for name in self._dimensions:
            size, _, layer = name.partition(".")
            if size in PER_LAYER:
                block = sub.blocks[int(layer)] if layer else with_heads
                genes[name] = self._gene(size, block, sub.n_embd)
        return {**genes, "n_layer": sub.n_layer}

    def _gene(self, name: str, block: Block | None, n_embd: int) -> float:
        if name == "mlp_ratio" and block is not None:
            assert self.mlp_ratio
            width = block.intermediate_size
            fits = [r for r in self.mlp_ratio.values if self._width(n_embd, r) == width]
            return fits[0] if fits else -1
        if block is None or (name == "head_size" and not block.n_head):
            if name in ("n_head", "n_query_groups"):
                n_head = max(self._heads)
                return n_head if name == "n_head" else max(self._heads[n_head])
            return self.domain(name).values[-1]
        if name == "n_query_groups" and not block.n_head and 0 not in self.domain(name).values:
            return self.domain(name).values[-1]
        return getattr(block, name)

    def contains(self, sub: SubNetwork) -> bool:
        """Whether `sub` is one of the members."""
        if len(sub.blocks) != len(self.layer_order) or not sub.n_layer:
            return False
        genes = self.genes(sub)
        known = all(genes[name] in values for name, values in self._dimensions.items())
        return known and self.build(**genes) == sub

    @property
    def smallest(self) -> SubNetwork:
        """The smallest size in every dimension; of query groups, the fewest of that `n_head`."""
        return self._extreme(min)

    @property
    def largest(self) -> SubNetwork:
        """The largest size in every dimension; of query groups, the most of that `n_head`."""
        return self._extreme(max)

    def num_members(self) -> int:
        """Number of different sub-networks, counted without listing them."""
        depths = list(map(int, self.n_layer.values))
        attention = Counter((len(choices), (0, 0, 0) in choices) for choices in self._attention)
        total = 0
        for n_embd in map(int, self.n_embd.values):
            mlp = Counter((len(widths), 0 in widths) for widths in self._mlp(n_embd))
            for (heads, no_heads), (widths, no_width) in itertools.product(attention, mlp):
                blocks = heads * widths - (no_heads and no_width)
                times = attention[heads, no_heads] * mlp[widths, no_width]
                total += times * sum(blocks**depth for depth in depths)
        return total

    def members(self) -> Iterator[SubNetwork]:
        """All members in a fixed order.

        Raises:
            ConfigError: if there are far too many to list.
        """
        if self.per_layer and (count := self.num_members()) > _LISTED:
            raise ConfigError(
                f"search space: {float(count):.0e} sub-networks can't be listed one by one; draw "
                f"some, or leave per_layer out"
            )
        for n_embd in map(int, self.n_embd.values):
            for heads, widths, n_layer in itertools.product(
                self._attention, self._mlp(n_embd), self.n_layer.values
            ):
                pairs = itertools.product(heads, widths)
                blocks = [Block(*h, width) for h, width in pairs if h[0] or width]
                kept = self.layer_order[: int(n_layer)]
                repeat = len(kept) if self.per_layer else 1
                for chosen in itertools.product(blocks, repeat=repeat):
                    each = chosen if self.per_layer else chosen * len(kept)
                    yield self._member(n_embd, dict(zip(kept, each, strict=True)))

    def sample(self, rng: random.Random) -> SubNetwork:
        """One member, every choice uniform (log-uniform where the domain says so).

        Layers that choose for themselves draw from a range that is drawn first: by the law of
        large numbers, independent draws would make networks of about the same cost only.
        """
        n_head = rng.choice(list(self._heads))
        n_embd = int(self.n_embd.sample(rng))
        group = rng.choice(self._heads[n_head])
        head_size = int(self.head_size.sample(rng))
        width = rng.choice(self.widths(n_embd))
        kept = self.layer_order[: int(self.n_layer.sample(rng))]
        if not self.per_layer:
            block = Block(n_head, group, head_size, width)
            return self._member(n_embd, dict.fromkeys(kept, block))
        attention = next(
            c for c in self._attention if (n_head, group, head_size if n_head else 0) in c
        )
        widths = self.widths(n_embd) if self._mlp_per_layer else [width]
        heads, widths = _part(attention, rng), _part(widths, rng)
        blocks = {}
        for layer in kept:
            n_head, group, head_size = rng.choice(heads)
            blocks[layer] = Block(n_head, group, head_size, rng.choice(widths))
        if all(map(any, blocks.values())):
            return self._member(n_embd, blocks)
        return self.sample(rng)  # a layer with neither attention nor MLP is none

    def neighbours(self, sub: SubNetwork) -> list[SubNetwork]:
        """Members one step away from `sub` in one dimension."""
        found: dict[SubNetwork, None] = {}
        genes = self.genes(sub)
        for name, values in self._dimensions.items():
            at = values.index(genes[name])
            for step in (at - 1, at + 1):
                if 0 <= step < len(values):
                    near = self.build(**{**genes, name: values[step]})
                    if near is not None and near != sub:
                        found[near] = None
        return list(found)

    def to_dict(self) -> dict[str, Any]:
        """The explicit form of the space: what `load_space` reads back."""
        domains = {name: getattr(self, name) for name in DIMENSIONS}
        found = {name: domain.to_dict() for name, domain in domains.items() if domain is not None}
        return {**found, "per_layer": sorted(self.per_layer)} if self.per_layer else found

    @classmethod
    def from_dict(
        cls, spec: Any, full: SubNetwork, *, layer_order: Sequence[int] | None = None
    ) -> SearchSpace:
        """A space for the model `full` from its YAML form; sizes that are not named are fixed.

        Args:
            spec: the YAML form.
            full: the whole model.
            layer_order: layer ids, most important first; default: the order of the layers.

        Raises:
            ConfigError: for an unknown dimension, a malformed domain or a size beyond `full`.
        """
        known = (*DIMENSIONS, "per_layer")
        named = set(map(str, spec)) if isinstance(spec, dict) else {repr(spec)}
        if unknown := sorted(named - set(known)):
            raise ConfigError(
                f"search space: unknown dimension {', '.join(unknown)}; known are "
                f"{', '.join(known)}"
            )
        spec = {name: value for name, value in spec.items() if value is not None}
        if "mlp_ratio" in spec and "intermediate_size" in spec:
            raise ConfigError("search space: give intermediate_size or mlp_ratio, not both")
        limits: dict[str, float] = dict(full.sizes() or {})
        limits["mlp_ratio"] = limits["intermediate_size"] / full.n_embd
        defaults = ["n_embd", "head_size", "n_layer"]
        if "n_query_groups" not in spec:
            defaults.append("n_head")
        if "mlp_ratio" not in spec:
            defaults.append("intermediate_size")
        per_layer = _per_layer(spec.get("per_layer", []))
        domains = {
            name: parse_domain(
                name, spec.get(name, "full"), limits[name],
                least=int(name not in per_layer or name == "head_size"),
            )
            for name in DIMENSIONS
            if name in spec or name in defaults
        }  # fmt: skip
        if missing := sorted(per_layer - set(domains)):
            raise ConfigError(f"search space: per_layer names {missing[0]}, which is not given")
        order = tuple(range(limits["n_layer"]) if layer_order is None else layer_order)  # type: ignore[call-overload]
        return cls(full=full, layer_order=order, per_layer=per_layer, **domains)

    @property
    def _least_width(self) -> int:
        return 0 if self._mlp_per_layer else 1

    @property
    def _mlp_per_layer(self) -> bool:
        return bool(self.per_layer & {"mlp_ratio", "intermediate_size"})

    def _width(self, n_embd: int, gene: float) -> int:
        """The published `int(mlp_ratio * n_embd)`; 1e-6 keeps 8192 / 3072 * 3072 at 8192.

        A ratio that was rounded up, to 2.6667, stays within the model.
        """
        if self.mlp_ratio is None or gene == 0:
            return int(gene)
        return min(max(1, int(gene * n_embd + 1e-6)), self._whole.intermediate_size)

    def widths(self, n_embd: int) -> Sequence[int]:
        """`intermediate_size` choices of a sub-network with `n_embd` channels, ascending."""
        if self.mlp_ratio is None:
            assert self.intermediate_size is not None
            return self.intermediate_size.values  # type: ignore[return-value]
        return sorted({self._width(n_embd, ratio) for ratio in self.mlp_ratio.values})

    def _mlp(self, n_embd: int) -> list[Sequence[int]]:
        """As `_attention`: what layers choose from, for each choice that they have in common."""
        widths = self.widths(n_embd)
        return [widths] if self._mlp_per_layer else [[width] for width in widths]

    def _extreme(self, pick: Any) -> SubNetwork:
        n_embd, n_head = int(pick(self.n_embd.values)), pick(self._heads)
        width = pick(self.widths(n_embd))
        if n_head == width == 0:
            width = self.widths(n_embd)[1]
        block = Block(
            n_head=n_head,
            n_query_groups=int(pick(self._heads[n_head])),
            head_size=int(pick(self.head_size.values)),
            intermediate_size=int(width),
        )
        kept = self.layer_order[: int(pick(self.n_layer.values))]
        return self._member(n_embd, dict.fromkeys(kept, block))


def _fits(n_head: int, group: int, per_group: int) -> bool:
    """Whether so many heads form so many groups of a model with `per_group` heads in each."""
    if n_head == 0 or group == 0:
        return n_head == 0
    return n_head % group == 0 and n_head // group <= per_group


def _rows(choice: _Attention) -> tuple[int, ...]:
    """By query rows, then key rows."""
    n_head, group, head_size = choice
    return n_head * head_size, group * head_size, n_head


def _part(choices: Sequence[Any], rng: random.Random) -> Sequence[Any]:
    """Neighbouring choices, from one that is drawn to another one."""
    low, high = sorted(rng.randrange(len(choices)) for _ in range(2))
    return choices[low : high + 1]


def _per_layer(names: Any) -> frozenset[str]:
    listed = names if isinstance(names, (list, tuple)) else [names]
    if unknown := [name for name in listed if name not in PER_LAYER]:
        raise ConfigError(
            f"search space: per_layer names {unknown[0]!r}; known are {', '.join(PER_LAYER)}"
        )
    return frozenset(listed)


def load_space(
    source: Any,
    config: Any,
    *,
    layer_order: Sequence[int] | None = None,
    head_channels: HeadChannels = HeadChannels.rope,
) -> SearchSpace:
    """The search space that a user named, checked against the model.

    Args:
        source: name of a preset, path of a YAML file, or the dictionary form itself.
        config: `litgpt.Config` of the super-network.
        layer_order: layer ids, most important first; default: the order of the layers.
        head_channels: how a smaller head chooses its query and key channels.

    Raises:
        ConfigError: if the space is malformed or holds sizes that do not fit the model.
    """
    check_supported(config)
    full = SubNetwork.from_config(config)
    spec = source if isinstance(source, dict) else read_space_file(str(source))
    space = SearchSpace.from_dict(spec, full, layer_order=layer_order)
    for head_size in space.head_size.values:
        block = next(iter(full.shapes))._replace(head_size=int(head_size))
        probe = SubNetwork(full.n_embd, (block,) * len(full.blocks))
        if broken := violations(probe, config, head_channels):
            raise ConfigError(f"search space does not fit {config.name!r}: " + "; ".join(broken))
    return space
