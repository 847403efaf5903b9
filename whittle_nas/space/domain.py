"""The choices for one dimension of a search space and their YAML forms."""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from whittle_nas.errors import ConfigError

_FORMS = "a list, 'full', or {min, max, step | factor, log_uniform} with numbers, 'half' or 'full'"


@dataclass(frozen=True)
class Domain:
    """Ascending choices for one dimension.

    `log_uniform` draws a value v with probability proportional to log((v + 1) / v), which does
    not favour large sizes (v1, the n_embd of every space).
    """

    values: Sequence[float]
    log_uniform: bool = False

    def sample(self, rng: random.Random) -> float:
        """One of the values."""
        if not self.log_uniform:
            return self.values[rng.randrange(len(self.values))]
        low, high = math.log(self.values[0]), math.log(self.values[-1] + 1)
        drawn = math.exp(rng.uniform(low, high))
        return self.values[max(0, bisect_right(self.values, drawn) - 1)]

    def to_dict(self) -> Any:
        """The YAML form: a list, or bounds where the choices are a long regular range."""
        if isinstance(self.values, range) or self.log_uniform:
            step = self.values.step if isinstance(self.values, range) else 1
            bounds = {"min": self.values[0], "max": self.values[-1], "step": step}
            return {**bounds, "log_uniform": True} if self.log_uniform else bounds
        return list(self.values)


def parse_domain(name: str, spec: Any, limit: float, *, least: int = 1) -> Domain:
    """Read one dimension of a search space.

    Args:
        name: the dimension, for messages.
        spec: its YAML form.
        limit: the full model's size: the meaning of `full`, and the largest value allowed.
        least: the smallest value allowed; 0 where a layer may do without.

    Raises:
        ConfigError: if the form is unknown or a value lies outside least..limit.
    """
    if isinstance(spec, dict):
        domain = _bounds(name, spec, limit)
    else:
        listed = spec if isinstance(spec, (list, tuple)) else [spec]
        domain = Domain(tuple(sorted({_number(name, value, limit) for value in listed})))
    if not domain.values:
        raise ConfigError(f"search space: {name}={spec} has no value; give {_FORMS}")
    ratio = name == "mlp_ratio"
    low, high = domain.values[0], domain.values[-1]
    # A ratio printed with four digits (2.6667 for 8192 / 3072) may exceed the exact one.
    too_low = low < 0 or (low == 0 and least > 0) if ratio else low < least
    if too_low or high > (limit + 1e-3 if ratio else limit):
        raise ConfigError(
            f"search space: {name} runs from {low} to {high}, allowed is {least} to the model's "
            f"{limit:g}"
        )
    return domain


def _bounds(name: str, spec: dict[str, Any], limit: float) -> Domain:
    if unknown := sorted(set(spec) - {"min", "max", "step", "factor", "log_uniform"}):
        raise ConfigError(f"search space: {name} has unknown keys {unknown}; give {_FORMS}")
    low = int(_number(name, spec.get("min", 1), limit))
    high = int(_number(name, spec.get("max", "full"), limit))
    log_uniform = spec.get("log_uniform", False)
    if not isinstance(log_uniform, bool):
        raise ConfigError(f"search space: {name}.log_uniform={log_uniform!r} must be true or false")
    if "factor" in spec:
        values, factor = [low], int(_number(name, spec["factor"], limit))
        if factor < 2 or low < 1:
            raise ConfigError(f"search space: {name} needs factor >= 2 and min >= 1, got {spec}")
        while values[-1] * factor <= high:
            values.append(values[-1] * factor)
        return Domain(tuple(v for v in values if v <= high), log_uniform)
    step = _aligned_step(limit) if spec.get("step") == "auto" else spec.get("step", 1)
    step = int(_number(name, step, limit))
    if step < 1:
        raise ConfigError(f"search space: {name}.step={step} must be at least 1")
    if spec.get("step") == "auto":  # multiples of the step, and always the full size itself
        first = -(-low // step) * step
        return Domain(tuple(sorted({*range(first, high + 1, step), high})), log_uniform)
    return Domain(range(low, high + 1, step), log_uniform)


def _aligned_step(limit: float) -> int:
    """64 channels fill a tensor-core tile; models under 1024 wide get sixteen steps instead."""
    return min(64, 2 ** max(0, int(math.log2(limit / 16)))) if limit >= 16 else 1


def _number(name: str, value: Any, limit: float) -> float:
    if value == "full":
        return limit
    if value == "half":
        return math.ceil(limit / 2)
    whole = name != "mlp_ratio"
    is_number = isinstance(value, int if whole else (int, float)) and abs(value) < 2**63
    if isinstance(value, bool) or not is_number:
        kind = "a whole number" if whole else "a number"
        raise ConfigError(f"search space: {name}={value!r} must be {kind}; give {_FORMS}")
    return value
