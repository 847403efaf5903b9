"""Choices for measuring importance. No heavy import: the command line reads this."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from whittle_nas.errors import ConfigError


class Criterion(str, Enum):
    """What heads, neurons and channels are ranked by; layers are ranked by `LayerCriterion`.

    `activation` is what they do on calibration text; `magnitude` the sum of |w| over the weights
    that touch them, a baseline.
    """

    activation = "activation"
    magnitude = "magnitude"


class Aggregation(str, Enum):
    """How activations become one score: `X_Y` reduces the batch by X, the sequence by Y."""

    mean_mean = "mean_mean"
    mean_norm = "mean_norm"
    mean_variance = "mean_variance"
    norm_mean = "norm_mean"
    norm_norm = "norm_norm"
    norm_variance = "norm_variance"
    variance_mean = "variance_mean"
    variance_norm = "variance_norm"
    variance_variance = "variance_variance"

    @property
    def batch(self) -> str:
        """Reduction over the sequences of a batch: mean, norm or variance."""
        return self.value.split("_")[0]

    @property
    def sequence(self) -> str:
        """Reduction over the tokens of a sequence: mean, norm or variance."""
        return self.value.split("_")[1]


class NeuronActivation(str, Enum):
    """Where a neuron is measured.

    `down_input` is what it finally contributes, the input of the MLP's output projection; `fc` is
    the output of the first linear layer, as in the published code (the gate for Llama models).
    """

    down_input = "down_input"
    fc = "fc"


class HeadActivation(str, Enum):
    """What a head is worth at a token.

    `contribution` is the norm of its output times the Frobenius norm of its columns of the output
    projection, a measure of what it adds to the residual stream; `proj_input`, of the papers and
    the published code, is the first factor alone.
    """

    contribution = "contribution"
    proj_input = "proj_input"


# By its functional form, because `global` is a keyword and can't be written as a member.
Scope = Enum("Scope", {"layer": "layer", "global": "global"}, module=__name__)
Scope.__doc__ = "Whether every layer is ordered for itself, or one order serves all layers."


class LayerCriterion(str, Enum):
    """How layers are ordered.

    `greedy` drops the layer whose loss hurts least, again and again; `block_drop` ranks by the loss
    without one layer; `block_importance` by how much a layer turns the residual stream.
    """

    greedy = "greedy"
    block_drop = "block_drop"
    block_importance = "block_importance"


class Basis(str, Enum):
    """What becomes of the residual stream.

    `permutation` orders its channels; `rotation` takes its principal directions, which folds the
    scales of all norms and unties a tied head; `auto` rotates where that is exact and pays.
    """

    auto = "auto"
    rotation = "rotation"
    permutation = "permutation"


class NormFactors(str, Enum):
    """Whether norms of narrow networks are scaled for the channels that they lack.

    `auto` measures both on calibration text.
    """

    auto = "auto"
    on = "on"
    off = "off"


SWEPT = ("n_embd", "n_head", "intermediate_size", "n_layer")  # dimensions of the sweep


@dataclass(frozen=True)
class SweepOptions:
    """How far each dimension alone can shrink: the search space `fitted`.

    Args:
        num_tokens: Tokens of the calibration text on which the smaller networks are measured; 0
            skips the sweep.
        bound: Largest rise of the loss in one dimension, as a share of the way from the whole
            model's loss to a uniform guess's.
        bounds: Bounds of single dimensions instead, as `{n_layer: 0.5, n_embd: 0.1}`.
    """

    num_tokens: int = 2048
    bound: float = 0.25
    bounds: dict[str, float] | None = None

    def check(self) -> None:
        """Refuse numbers out of range.

        Raises:
            ConfigError: naming the option.
        """
        if self.num_tokens < 0:
            raise ConfigError(f"--sweep.num_tokens {self.num_tokens} must be at least 0")
        named = {f"bounds.{name}": bound for name, bound in (self.bounds or {}).items()}
        for name, bound in {"bound": self.bound, **named}.items():
            if not 0 < bound <= 1:
                raise ConfigError(f"--sweep.{name} {bound} must be above 0 and at most 1")
        if unknown := sorted(set(self.bounds or ()) - set(SWEPT)):
            raise ConfigError(
                f"--sweep.bounds: {unknown[0]!r} is not swept; choose from {', '.join(SWEPT)}"
            )
