"""Which networks of a super-network are trained and validated, and in which steps.

No heavy import: the command line reads this. How they learn is in `options`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from whittle_nas.errors import ConfigError, at_least


class Strategy(str, Enum):
    """Which networks one training step runs."""

    sandwich = "sandwich"
    random = "random"
    random_linear = "random_linear"
    standard = "standard"


@dataclass(frozen=True)
class SandwichOptions:
    """Which networks take part in a step, and how much each counts.

    Args:
        strategy: `sandwich` runs the full network, `num_random` sampled sub-networks and the
            smallest; `random` one sampled sub-network; `standard` the full network only;
            `random_linear` the full network or, with a probability that rises from 0 to 1 during
            the training, one sampled sub-network.
        num_random: Sampled sub-networks per sandwich step.
        train_smallest: Whether the smallest sub-network takes part in sandwich steps.
        full_share: Share of the sandwich steps in which the full network is; in the others one more
            is sampled; papers: 1.
        smallest_share: The same of the smallest.
        full_weight: Weight of the full network's loss in a sandwich step. It starts at its best and
            can only lose, and each sub-network with nats to win pulls its own way; papers: 1.
        mean: Divide the sum of the losses by the number of networks (the published code).
    """

    strategy: Strategy = Strategy.sandwich
    num_random: int = 2
    train_smallest: bool = True
    full_share: float = 0.75
    smallest_share: float = 0.5
    full_weight: float = 16.0
    mean: bool = False

    def __post_init__(self) -> None:
        at_least("sandwich.num_random", self.num_random, 0)
        at_least("sandwich.full_weight", self.full_weight, 0)
        for name in ("full_share", "smallest_share"):
            if not 0 <= getattr(self, name) <= 1:
                value = getattr(self, name)
                raise ConfigError(f"sandwich.{name}={value} must be between 0 and 1")


class Share(str, Enum):
    """What the networks that are chosen one by one have from each other.

    `cascade`: largest first, each starts from the smallest trained one that it is a part of;
    `none`: each starts from the checkpoint; `all`: one set of weights, trained at once.
    """

    cascade = "cascade"
    none = "none"
    all = "all"


class SamplerKind(str, Enum):
    """Where the sampled sub-networks come from."""

    random = "random"
    grid_params = "grid_params"
    calibrate_mag = "calibrate_mag"
    calibrate_ppl = "calibrate_ppl"
    pareto = "pareto"
    fixed = "fixed"


@dataclass(frozen=True)
class SamplerOptions:
    """Which sub-networks are trained.

    Args:
        kind: `random`: every choice of the space uniform; `grid_params`: one random member in each
            of `num_bins` equal bins of the number of parameters; `calibrate_mag` and
            `calibrate_ppl`: the candidate of each bin with the largest sum of |w|, or the lowest
            perplexity on calibration text; `pareto`: now and then members are scored on validation
            text, and steps draw from the front over parameters that this makes, from its
            neighbours and, a tenth, from anywhere; `fixed`: those in `file`.
        num_params: Range of parameters of the sub-networks that are trained and validated, such as
            `40%..90%` of the whole model's, `1e6..5e6`, or `..0.9x`; the whole space by default.
        num_bins: Bins of the grid, or of the front.
        trials_per_bin: Random members that a bin sees before it is given up as empty.
        candidates_per_bin: How many compete for a bin in the `calibrate` kinds.
        calibration_samples: Training samples on which `calibrate_ppl` scores, and validation
            samples on which `pareto` does.
        every_n_steps: Optimiser steps between two scorings of `pareto`; by default so many that
            they take about a twentieth of the training.
        file: A `grid.yaml` of an earlier run, a `front.json`, or a YAML list of sizes.
    """

    kind: SamplerKind = SamplerKind.grid_params
    num_params: str | None = None
    num_bins: int = 22
    trials_per_bin: int = 10_000
    candidates_per_bin: int = 50
    calibration_samples: int = 16
    every_n_steps: int | None = None
    file: Path | None = None

    def __post_init__(self) -> None:
        for name in ("num_bins", "trials_per_bin", "candidates_per_bin", "calibration_samples"):
            at_least(f"sampler.{name}", getattr(self, name), 1)
        at_least("sampler.every_n_steps", self.every_n_steps or 1, 1)
        if (self.kind is SamplerKind.fixed) != (self.file is not None):
            raise ConfigError(
                f"sampler.kind={self.kind.value} with sampler.file={self.file}: "
                "kind fixed reads a file, and no other kind does"
            )
        if self.num_params is not None and self.file is not None:
            raise ConfigError(
                f"sampler.num_params={self.num_params} is about what is drawn from the search "
                "space; kind fixed draws nothing"
            )

    def settings(self) -> dict[str, object]:
        """What of it decides which sub-networks are drawn, plain values by their names.

        How often `pareto` scores may change, and the members of a file are compared themselves.
        """
        names = {
            SamplerKind.random: (),
            SamplerKind.grid_params: ("num_bins", "trials_per_bin"),
            SamplerKind.calibrate_mag: ("num_bins", "trials_per_bin", "candidates_per_bin"),
            SamplerKind.calibrate_ppl: (
                "num_bins", "trials_per_bin", "candidates_per_bin", "calibration_samples",
            ),
            SamplerKind.pareto: ("num_bins", "calibration_samples"),
            SamplerKind.fixed: (),
        }[self.kind]  # fmt: skip
        found = {name: getattr(self, name) for name in ("num_params", *names)}
        return {"kind": self.kind.value, **found}


@dataclass(frozen=True)
class ValidationOptions:
    """The fixed set of networks whose loss is logged.

    Args:
        num_networks: Bins of a grid over the number of parameters; one member of each is validated,
            beside the full and the smallest network.
        every_n_steps: Optimiser steps between two validations; by default a tenth of the training,
            and more where validating would take more than a tenth of its time. The start and the
            end are always validated.
        num_samples: Validation samples that are used, the first ones; null takes all.
        max_full_loss: Stop when the whole model's validation loss, in nats per token, is above
            this; null never stops.
    """

    num_networks: int = 5
    every_n_steps: int | None = None
    num_samples: int | None = 256
    max_full_loss: float | None = None

    def __post_init__(self) -> None:
        at_least("validation.num_networks", self.num_networks, 1)
        at_least("validation.every_n_steps", self.every_n_steps or 1, 1)
        at_least("validation.num_samples", self.num_samples or 1, 1)
