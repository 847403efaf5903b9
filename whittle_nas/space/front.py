"""A Pareto front as a file: written by `nas search`, read by `nas export` and `nas evaluate`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whittle_nas.errors import ConfigError
from whittle_nas.reading import read_json
from whittle_nas.space.subnetwork import SubNetwork

FORMAT = 1
_CONSTRAINT = re.compile(r"^\s*(?P<metric>\S.*?)\s*(?P<relation><=|>=|<|>)\s*(?P<limit>\S+)\s*$")


@dataclass(frozen=True)
class Constraint:
    """A limit on one metric, such as `num_params <= 6e9`.

    Attributes:
        metric: name of an objective or cost.
        relation: one of `<=`, `<`, `>=`, `>`.
        limit: the value on the right.
        of_whole: the value is a share of the whole model's, as in `num_params <= 60%` and
            `latency_ms <= 0.7x`; nothing can be compared before `resolved`.
        text: how it was written, where that was a share.
    """

    metric: str
    relation: str
    limit: float
    of_whole: bool = False
    text: str = field(default="", compare=False)

    def resolved(self, whole: Mapping[str, float], option: str) -> Constraint:
        """The same limit as a number.

        Args:
            whole: metrics of the whole model.
            option: names the flag in messages.

        Raises:
            ConfigError: if the whole model's value is not known.
        """
        if not self.of_whole:
            return self
        if self.metric not in whole:
            known = f"it has {', '.join(whole)}" if whole else "search again"
            raise ConfigError(
                f"{option}: {self} is a share of the whole model's {self.metric}, which is not "
                f"known here ({known}); give a number"
            )
        return Constraint(
            self.metric, self.relation, self.limit * whole[self.metric], text=str(self)
        )

    @property
    def in_numbers(self) -> str:
        """Its text with the number that a share stands for."""
        return f"{self.metric} {self.relation} {self.limit:.12g}"

    def excess(self, value: float) -> float:
        """How far a value is on the wrong side; 0 if it satisfies the limit."""
        if self.relation[0] == "<":
            held = value <= self.limit if self.relation == "<=" else value < self.limit
        else:
            held = value >= self.limit if self.relation == ">=" else value > self.limit
        if held:
            return 0.0
        # The smallest number above zero: `<` is violated by equality as well.
        return abs(value - self.limit) or math.ulp(0.0) if math.isfinite(value) else math.inf

    def holds(self, metrics: Mapping[str, float]) -> bool:
        """Whether a sub-network with these metrics satisfies the limit."""
        assert not self.of_whole
        return self.excess(metrics[self.metric]) == 0.0

    def __str__(self) -> str:
        """The form that `parse_constraints` reads."""
        share = f"{self.metric} {self.relation} {100 * self.limit:.12g}%"
        return self.text or (share if self.of_whole else self.in_numbers)


def parse_constraints(
    text: str | Sequence[str] | None, *, option: str = "--constraints"
) -> tuple[Constraint, ...]:
    """Read `"num_params <= 6e9, latency_ms <= 40"`, or a list of such parts.

    Args:
        text: constraints, separated by commas; None or empty: none.
        option: names the flag in messages.

    Raises:
        ConfigError: for a part that is not `<metric> <= <number>`, or a share as `60%` or `0.6x`.
    """
    parts = text.split(",") if isinstance(text, str) else list(text or ())
    return tuple(_constraint(part, option) for part in parts if part.strip())


def _constraint(part: str, option: str) -> Constraint:
    match = _CONSTRAINT.match(part)
    try:
        assert match
        limit, of_whole = parse_amount(match["limit"])
    except (AssertionError, ValueError):
        raise ConfigError(
            f"{option}: {part.strip()!r} must be a metric, one of <= < >= > and a number, for "
            "instance num_params <= 6e9, or a share of the whole model's, num_params <= 60%"
        ) from None
    return Constraint(match["metric"], match["relation"], limit, of_whole)


def parse_amount(text: str) -> tuple[float, bool]:
    """Read a number, or a share of the whole model's: `60%` and `0.6x`.

    Returns:
        The value, and whether it is a share.

    Raises:
        ValueError: for anything else.
    """
    scale = {"%": 0.01, "x": 1.0}.get(text[-1:])
    value = float(text if scale is None else text[:-1]) * (1.0 if scale is None else scale)
    if not math.isfinite(value):
        raise ValueError(text)
    return value, scale is not None


@dataclass(frozen=True)
class FrontEntry:
    """One sub-network of a front.

    Attributes:
        index: its number, by which commands name it.
        subnetwork: its shape.
        metrics: every objective and cost by name.
    """

    index: int
    subnetwork: SubNetwork
    metrics: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain form for `front.json`."""
        shape = self.subnetwork.to_dict()
        shape.pop("layers", None)
        return {
            "index": self.index,
            "subnetwork": shape,
            "layers": list(self.subnetwork.layers),
            "metrics": dict(self.metrics),
        }


@dataclass(frozen=True)
class Front:
    """Content of `front.json`.

    Attributes:
        objectives: what was minimised, the first one measures quality.
        entries: sub-networks of which none is beaten by another in every objective.
        checkpoint_dir: the super-network that was searched.
        how_measured: data, fidelity, device and so on, for people.
        candidates: directory of the candidates that the sub-networks are made of, of
            `nas candidates`; "" for plain slices.
        whole: `metrics` of the whole model, with which shares are meant; of older files nothing.
        path: file it was read from.
    """

    objectives: tuple[str, ...]
    entries: tuple[FrontEntry, ...]
    checkpoint_dir: str = ""
    how_measured: Mapping[str, Any] = field(default_factory=dict)
    path: Path = Path("front.json")
    whole: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    candidates: str = ""

    def dump(self) -> str:
        """The JSON text."""
        spec = {
            "format": FORMAT,
            "objectives": list(self.objectives),
            "checkpoint_dir": self.checkpoint_dir,
            "how_measured": dict(self.how_measured),
            "whole": {name: dict(values) for name, values in self.whole.items()},
            "front": [entry.to_dict() for entry in self.entries],
        }
        if self.candidates:
            spec["candidates"] = self.candidates
        return json.dumps(spec, indent=2) + "\n"


def read_front(path: Path | str, layer_order: Sequence[int], *, option: str = "--front") -> Front:
    """Read `front.json`.

    Args:
        path: the file.
        layer_order: of the super-network, most important first; for entries without `layers`.
        option: that named the file, for messages.

    Raises:
        ConfigError: if there is no such file, or if it is not a front.
    """
    path = Path(path)
    label = f"{option} {path}"
    spec = read_json(path, label=label)
    version = spec.get("format") if isinstance(spec, dict) else None
    if version != FORMAT:
        raise ConfigError(
            f"{label} is not a front.json of format {FORMAT}: it has format {version!r}"
        )
    try:
        objectives = tuple(map(_text, spec["objectives"]))
        entries = [_read_entry(entry, objectives, layer_order) for entry in spec["front"]]
        library = _text(spec.get("candidates", ""))
        checkpoint_dir, how = _text(spec.get("checkpoint_dir", "")), spec.get("how_measured", {})
        if not isinstance(how, dict):
            raise TypeError(f"how_measured is {how!r}")
        whole = {
            name: {_text(metric): _number(value) for metric, value in values.items()}
            for name, values in spec.get("whole", {}).items()
        }
    except (ConfigError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{label} is not a front.json of nas search ({type(error).__name__}: {error})"
        ) from None
    if not entries or not objectives:
        raise ConfigError(f"{label} holds no sub-network; run nas search again")
    if len({entry.index for entry in entries}) < len(entries):
        raise ConfigError(f"{label} holds an index twice; run nas search again")
    return Front(objectives, tuple(entries), checkpoint_dir, how, path, whole, library)


def _read_entry(spec: Any, objectives: Sequence[str], layer_order: Sequence[int]) -> FrontEntry:
    """One entry; ValueError for a number that is none, KeyError for a missing one."""
    metrics = {_text(name): _number(value) for name, value in spec["metrics"].items()}
    if unknown := [name for name in objectives if math.isnan(metrics[name])]:
        raise ValueError(f"{unknown[0]} is not a number")
    shape, layers = spec["subnetwork"], [_whole(layer) for layer in spec.get("layers", ())]
    if layers and isinstance(shape, dict) and "blocks" not in shape:
        shape = {**shape, "layers": layers}
    return FrontEntry(_whole(spec["index"]), SubNetwork.from_dict(shape, layer_order), metrics)


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a whole number from 0")
    return value


def _number(value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not a number")
    try:
        float(value)
    except OverflowError:
        raise ValueError("a number is too large") from None
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a name")
    return value


def best_under(front: Front, constraints: str, *, option: str = "--pick") -> FrontEntry:
    """The best entry under limits, see `pick_entry`; `option` names the flag in messages."""
    return entries_under(front, constraints, option=option)[0]


def entries_under(front: Front, constraints: str, *, option: str = "--pick") -> list[FrontEntry]:
    """As `best_under`, all entries, best first."""
    limits = parse_constraints(constraints, option=option)
    if not limits:
        raise ConfigError(f'{option} is empty; give limits such as "num_params <= 6e9"')
    for limit in limits:
        known = list(front.entries[0].metrics)
        if any(limit.metric not in entry.metrics for entry in front.entries):
            raise ConfigError(
                f"{option}: unknown metric {limit.metric!r} in {front.path}; "
                f"it has {', '.join(known)}"
            )
    whole = front.whole.get("metrics", {})
    limits = tuple(limit.resolved(whole, option) for limit in limits)
    fitting = [e for e in front.entries if all(limit.holds(e.metrics) for limit in limits)]
    if not fitting:
        raise ConfigError(f"{option}: {_nearest(front, limits)}")
    named = {limit.metric for limit in limits}
    best = next((name for name in front.objectives if name not in named), front.objectives[0])
    return sorted(fitting, key=lambda entry: (entry.metrics[best], entry.index))


def _nearest(front: Front, limits: Sequence[Constraint]) -> str:
    """Which limit no entry satisfies and what comes nearest to it."""
    for limit in limits:
        values = [entry.metrics[limit.metric] for entry in front.entries]
        if all(limit.excess(value) for value in values):
            nearest = min(values, key=limit.excess)
            return (
                f"no sub-network of {front.path} satisfies {limit}; the nearest has "
                f"{limit.metric} = {nearest:.6g}"
            )
    together = " and ".join(map(str, limits))
    return f"no sub-network of {front.path} satisfies {together} at once; relax one of them"


def pick_entry(front: Front, *, index: int | None = None, pick: str | None = None) -> FrontEntry:
    """An entry by its index, or the best one under limits.

    Args:
        front: of `read_front`.
        index: number of the entry.
        pick: limits; used if there is no `index`. Best under them is the lowest value of the first
            objective that no limit names: under `num_params <= 6e9` the one with the lowest loss.

    Raises:
        ConfigError: if there is no such entry, if a limit names an unknown metric, or if nothing
            satisfies the limits; the message then names the nearest value.
    """
    if index is None:
        return best_under(front, pick or "")
    for entry in front.entries:
        if entry.index == index:
            return entry
    indices = [entry.index for entry in front.entries]
    raise ConfigError(
        f"--index {index} is not in {front.path}; it has {min(indices)} to {max(indices)}"
    )
