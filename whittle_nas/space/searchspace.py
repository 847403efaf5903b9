"""The set of sub-networks that are trained and searched."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from whittle_nas.errors import ConfigError
from whittle_nas.space.domain import Domain, parse_domain
from whittle_nas.space.presets import read_space_file
from whittle_nas.space.rules import check_supported, violations
from whittle_nas.space.subnetwork import HeadChannels, SubNetwork

DIMENSIONS = (
    "n_embd", "n_head", "n_query_groups", "head_size", "intermediate_size", "mlp_ratio", "n_layer",
)  # fmt: skip


@dataclass(frozen=True)
class SearchSpace:
    """Choices for every size of a sub-network of the model `full`.

    Exactly one of `intermediate_size` and `mlp_ratio` is given; with a ratio,
    `intermediate_size = int(mlp_ratio * n_embd)` of the sub-network. Without `n_query_groups` a
    sub-network keeps all groups of `full` while it has that many heads, else one head per group.
    """

    full: SubNetwork
    n_embd: Domain
    n_head: Domain
    head_size: Domain
    n_layer: Domain
    n_query_groups: Domain | None = None
    intermediate_size: Domain | None = None
    mlp_ratio: Domain | None = None

    def __post_init__(self) -> None:
        assert (self.intermediate_size is None) != (self.mlp_ratio is None)
        if not self._heads:
            raise ConfigError(
                f"search space: no n_head of {list(self.n_head.values)[:8]} forms whole query "
                f"groups of a model with n_head={self.full.n_head} and "
                f"n_query_groups={self.full.n_query_groups}"
            )

    @cached_property
    def _heads(self) -> dict[int, list[int]]:
        """Valid numbers of query groups for each `n_head`."""
        per_group = self.full.n_head // self.full.n_query_groups
        valid = {}
        for n_head in self.n_head.values:
            groups = self.n_query_groups or Domain((min(self.full.n_query_groups, int(n_head)),))
            fit = [g for g in groups.values if n_head % g == 0 and n_head // g <= per_group]
            if fit:
                valid[int(n_head)] = fit
        return valid

    def dimensions(self) -> dict[str, Sequence[float]]:
        """Ordered choices per dimension, for a searcher; fixed dimensions have one choice."""
        names = [name for name in DIMENSIONS if getattr(self, name) is not None]
        return {name: getattr(self, name).values for name in names}

    def build(self, **genes: float) -> SubNetwork | None:
        """The sub-network of one choice per dimension, or None if the choices do not go together.

        Args:
            **genes: values as in `dimensions()`.
        """
        n_embd, n_head = int(genes["n_embd"]), int(genes["n_head"])
        groups = self._heads.get(n_head, [])
        group = int(genes["n_query_groups"]) if self.n_query_groups else (groups or [0])[0]
        mlp = self._width(n_embd, genes["mlp_ratio" if self.mlp_ratio else "intermediate_size"])
        if group not in groups or not 1 <= mlp <= self.full.intermediate_size:
            return None
        layers = int(genes["n_layer"])
        return SubNetwork(n_embd, n_head, group, int(genes["head_size"]), mlp, layers)

    def genes(self, sub: SubNetwork) -> dict[str, float]:
        """Inverse of `build`: one choice per dimension for a member of the space."""
        genes: dict[str, float] = {
            name: getattr(sub, name) for name in self.dimensions() if name != "mlp_ratio"
        }
        if self.mlp_ratio:
            width = sub.intermediate_size
            fits = [r for r in self.mlp_ratio.values if self._width(sub.n_embd, r) == width]
            genes["mlp_ratio"] = fits[0]
        return genes

    def contains(self, sub: SubNetwork) -> bool:
        """Whether `sub` is one of the members."""
        return (
            sub.n_embd in self.n_embd.values
            and sub.head_size in self.head_size.values
            and sub.n_layer in self.n_layer.values
            and sub.n_query_groups in self._heads.get(sub.n_head, [])
            and sub.intermediate_size in self._widths(sub.n_embd)
        )

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
        heads = sum(len(groups) for groups in self._heads.values())
        widths = sum(len(self._widths(int(n_embd))) for n_embd in self.n_embd.values)
        return heads * widths * len(self.head_size.values) * len(self.n_layer.values)

    def members(self) -> Iterator[SubNetwork]:
        """All members in a fixed order."""
        heads = [(h, g) for h, groups in self._heads.items() for g in groups]
        for n_embd in self.n_embd.values:
            product = itertools.product(
                heads, self.head_size.values, self._widths(int(n_embd)), self.n_layer.values
            )
            for (n_head, group), head_size, mlp, n_layer in product:
                yield SubNetwork(int(n_embd), n_head, group, int(head_size), mlp, int(n_layer))

    def sample(self, rng: random.Random) -> SubNetwork:
        """One member, every choice uniform (log-uniform where the domain says so)."""
        n_head = rng.choice(list(self._heads))
        n_embd = int(self.n_embd.sample(rng))
        return SubNetwork(
            n_embd=n_embd,
            n_head=n_head,
            n_query_groups=rng.choice(self._heads[n_head]),
            head_size=int(self.head_size.sample(rng)),
            intermediate_size=rng.choice(self._widths(n_embd)),
            n_layer=int(self.n_layer.sample(rng)),
        )

    def neighbours(self, sub: SubNetwork) -> list[SubNetwork]:
        """Members one step away from `sub` in one dimension."""
        found = []
        genes = self.genes(sub)
        for name, values in self.dimensions().items():
            at = values.index(genes[name])
            for step in (at - 1, at + 1):
                if 0 <= step < len(values):
                    near = self.build(**{**genes, name: values[step]})
                    if near is not None and near != sub and near not in found:
                        found.append(near)
        return found

    def to_dict(self) -> dict[str, Any]:
        """The explicit form of the space: what `load_space` reads back."""
        domains = {name: getattr(self, name) for name in DIMENSIONS}
        return {name: domain.to_dict() for name, domain in domains.items() if domain is not None}

    @classmethod
    def from_dict(cls, spec: Any, full: SubNetwork) -> SearchSpace:
        """A space for the model `full` from its YAML form; sizes that are not named are fixed.

        Raises:
            ConfigError: for an unknown dimension, a malformed domain or a size beyond `full`.
        """
        named = set(map(str, spec)) if isinstance(spec, dict) else {repr(spec)}
        if unknown := sorted(named - set(DIMENSIONS)):
            raise ConfigError(
                f"search space: unknown dimension {', '.join(unknown)}; known are "
                f"{', '.join(DIMENSIONS)}"
            )
        spec = {name: value for name, value in spec.items() if value is not None}
        if "mlp_ratio" in spec and "intermediate_size" in spec:
            raise ConfigError("search space: give intermediate_size or mlp_ratio, not both")
        limits: dict[str, float] = dict(full.to_dict())
        limits["mlp_ratio"] = full.intermediate_size / full.n_embd
        defaults = ["n_embd", "n_head", "head_size", "n_layer"]
        if "mlp_ratio" not in spec:
            defaults.append("intermediate_size")
        domains = {
            name: parse_domain(name, spec.get(name, "full"), limits[name])
            for name in DIMENSIONS
            if name in spec or name in defaults
        }
        return cls(full=full, **domains)

    def _width(self, n_embd: int, gene: float) -> int:
        """The published `int(mlp_ratio * n_embd)`; 1e-6 keeps 8192 / 3072 * 3072 at 8192.

        A ratio that was rounded up, to 2.6667, stays within the model.
        """
        if self.mlp_ratio is None:
            return int(gene)
        return min(max(1, int(gene * n_embd + 1e-6)), self.full.intermediate_size)

    def _widths(self, n_embd: int) -> Sequence[int]:
        """`intermediate_size` choices of a sub-network with `n_embd` channels, ascending."""
        if self.mlp_ratio is None:
            assert self.intermediate_size is not None
            return self.intermediate_size.values  # type: ignore[return-value]
        return sorted({self._width(n_embd, ratio) for ratio in self.mlp_ratio.values})

    def _extreme(self, pick: Any) -> SubNetwork:
        n_embd, n_head = int(pick(self.n_embd.values)), pick(self._heads)
        return SubNetwork(
            n_embd=n_embd,
            n_head=n_head,
            n_query_groups=int(pick(self._heads[n_head])),
            head_size=int(pick(self.head_size.values)),
            intermediate_size=int(pick(self._widths(n_embd))),
            n_layer=int(pick(self.n_layer.values)),
        )


def load_space(
    source: Any, config: Any, *, head_channels: HeadChannels = HeadChannels.rope
) -> SearchSpace:
    """The search space that a user named, checked against the model.

    Args:
        source: name of a preset, path of a YAML file, or the dictionary form itself.
        config: `litgpt.Config` of the super-network.
        head_channels: how a smaller head chooses its query and key channels.

    Raises:
        ConfigError: if the space is malformed or holds sizes that do not fit the model.
    """
    check_supported(config)
    full = SubNetwork.from_config(config)
    spec = source if isinstance(source, dict) else read_space_file(str(source))
    space = SearchSpace.from_dict(spec, full)
    for head_size in space.head_size.values:
        probe = SubNetwork(**{**full.to_dict(), "head_size": int(head_size)})
        if broken := violations(probe, config, head_channels):
            raise ConfigError(f"search space does not fit {config.name!r}: " + "; ".join(broken))
    return space
