"""Choices of a search. Light: the command line reads this before torch is needed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from whittle_nas.data.options import TextData
from whittle_nas.errors import ConfigError, at_least
from whittle_nas.space.front import Constraint, parse_constraints
from whittle_nas.train.options import Distillation


class Method(str, Enum):
    """Who proposes the next sub-network."""

    surrogate = "surrogate"
    random = "random"
    stratified = "stratified"
    nsga2 = "nsga2"
    local_search = "local_search"
    evolution = "evolution"
    scalarization = "scalarization"
    ilp = "ilp"


class Score(str, Enum):
    """What an integer program adds up over the parts of a network.

    `loss` is the rise of the model's loss with one candidate, `error` the squared error of the
    candidate's output as a share of the output's square.
    """

    loss = "loss"
    error = "error"


@dataclass(frozen=True)
class IlpOptions:
    """Integer programs over a library of candidates.

    Args:
        score: What is added up in the first program of a budget: what each candidate does to the
            loss, or to the output of its own part.
        changes: Programs of a round: the most parts in which each may differ from the network
            around which the candidates were measured.
    """

    score: Score = Score.loss
    changes: list[int] = field(default_factory=lambda: [4, 8, 12, 20])


@dataclass(frozen=True)
class ProgramOptions:
    """All that `--method ilp` is asked for.

    Attributes:
        num_solutions: networks of the first program of a budget.
        overlap: largest share of the parts in which two of them agree.
        rounds: how often candidates are measured again around the best network.
        score: what the first program adds up.
        changes: of the programs of a round, see `IlpOptions`.
        budgets: more limits, by the name of each program; none: one program.
        targets: engines that must run every network, with commas.
    """

    num_solutions: int = 10
    overlap: float = 0.7
    rounds: int = 1
    score: Score = Score.loss
    changes: tuple[int, ...] = (4, 8, 12, 20)
    budgets: tuple[tuple[str, str], ...] = ()
    targets: str | None = None

    def most_trials(self) -> int:
        """How many networks are evaluated at most."""
        each = self.num_solutions + self.rounds * len(self.changes)
        return each * max(1, len(self.budgets))

    def limits(self) -> list[tuple[str, tuple[Constraint, ...]]]:
        """The limits of each program beside the constraints, by its name."""
        return [(name, parse_constraints(text, option="--budgets")) for name, text in self.budgets]

    def to_dict(self) -> dict[str, Any]:
        """What an interrupted search must have in common with the one that goes on."""
        values = {**asdict(self), "score": self.score.value}
        if self.targets is None:
            del values["targets"]
        return {n: list(map(list, v)) if n == "budgets" else v for n, v in values.items()} | {
            "changes": list(self.changes)
        }

    def check(self) -> None:
        """Refuse numbers out of range.

        Raises:
            ConfigError: naming the option.
        """
        for name, value, least in (
            ("num_solutions", self.num_solutions, 1),
            ("ilp_rounds", self.rounds, 0),
            ("ilp.changes", min(self.changes, default=0), 1),
        ):
            if value < least:
                raise ConfigError(f"--{name} {value} must be at least {least}")
        if not 0 <= self.overlap <= 1:
            raise ConfigError(f"--overlap {self.overlap} must be between 0 and 1")


@dataclass(frozen=True)
class CostOptions:
    """The load for which costs are computed and measured.

    Args:
        batch: Sequences that are processed together.
        tokens: Prompt tokens per sequence, and tokens in the key-value cache; by default the
            model's context, at most 512.
        latency_table: File with block times, made by `nas profile --table` or by an earlier search;
            by default in `out_dir`. New times are added to it as they are measured.
        calibrate: Whole networks to time for the correction of a new latency table, half of them if
            it is right already; 0: none.
    """

    batch: int = 2
    tokens: int | None = None
    latency_table: Path | None = None
    calibrate: int = 12

    def check(self, context: int, option: str = "--costs") -> int:
        """Check the numbers, and return the tokens per sequence for a model with this context.

        Args:
            context: of the model.
            option: begins the names of the flags.

        Raises:
            ConfigError: for a number out of range.
        """
        if self.batch < 1:
            raise ConfigError(f"{option}.batch {self.batch} must be at least 1")
        if self.calibrate and self.calibrate < 4:
            raise ConfigError(f"{option}.calibrate {self.calibrate} must be 0, or at least 4")
        tokens = min(context, 512) if self.tokens is None else self.tokens
        if not 1 <= tokens <= context:
            raise ConfigError(
                f"{option}.tokens {tokens} must be between 1 and the model's context of {context}"
            )
        return tokens


@dataclass(frozen=True)
class ShrinkOptions:
    """How the network of a budget is searched for inside a larger one.

    Args:
        candidates: Networks that are tried for each budget: one for every dimension that alone can
            be made small enough, and others that make use of the budget.
        repaired: How many of them, the best as they are, are repaired and scored again where
            networks are repaired.
        samples: Training samples on which they are scored, and repaired (on 64 at most).
        batch: Sequences that are processed together, for budgets on memory and time.
        tokens: Their length, for budgets on FLOPs, memory and time; by default the model's context,
            at most 512.
        latency_table: File with times of this device, for budgets on time: made by `nas profile
            --table` or a search. It is only read.
    """

    candidates: int = 8
    repaired: int = 3
    samples: int = 16
    batch: int = 2
    tokens: int | None = None
    latency_table: Path | None = None

    def __post_init__(self) -> None:
        for name, least in (("candidates", 1), ("repaired", 1), ("samples", 2), ("batch", 1)):
            at_least(f"shrink.{name}", getattr(self, name), least)
        at_least("shrink.tokens", self.tokens or 1, 1)


@dataclass(frozen=True)
class HalvingOptions:
    """Successive halving: sub-networks that look bad on a few blocks see no more of them.

    Args:
        first_blocks: Blocks that every sub-network is evaluated on; 0: no halving, all see
            `search_blocks`.
        keep: Share of sub-networks, those nearest to the front, that see all blocks; what would be
            on the front after the first blocks always does.
    """

    first_blocks: int = 0
    keep: float = 0.3

    def check(self, search_blocks: int, objectives: tuple[str, ...]) -> None:
        """Check against the rest of the search.

        Raises:
            ConfigError: for a number out of range, or an objective that has no blocks.
        """
        if not 0 <= self.keep <= 1:
            raise ConfigError(f"--halving.keep {self.keep} must be between 0 and 1")
        if self.first_blocks and not 0 < self.first_blocks < search_blocks:
            raise ConfigError(
                f"--halving.first_blocks {self.first_blocks} must be below the {search_blocks} "
                "blocks of a trial, see --search_blocks"
            )
        tasks = [name for name in objectives if name.startswith("1 - ")]
        if self.first_blocks and tasks:
            raise ConfigError(
                f"--halving.first_blocks {self.first_blocks} needs val_loss or perplexity as the "
                f"only measure of quality; leave out {tasks[0]!r}, or halving"
            )


@dataclass(frozen=True)
class TaskOptions:
    """How lm-eval tasks among the objectives are asked.

    Args:
        limit: Questions per task in a trial: a count, or a share below 1; the front answers all.
        num_fewshot: Examples before each question, in place of what the tasks say.
        include_path: Folder with task files of your own.
    """

    limit: float | None = None
    num_fewshot: int | None = None
    include_path: Path | None = None


@dataclass(frozen=True)
class RecoveryOptions:
    """Train the best sub-networks of a budget briefly after the search, and rank them again.

    Args:
        budget: Limits such as "num_params <= 6e9"; without, no recovery.
        candidates: How many sub-networks are trained, those of lowest loss under the budget.
        data: Training text, with the options of `data`.
        steps: Training steps of each, with adapters and taught by the whole model.
        batch_size: Blocks per step.
        r: Rank of the adapters.
        lr: Highest learning rate; by default that of `nas finetune`.
        distillation: What is learnt from the whole model's logits.
    """

    budget: str | None = None
    candidates: int = 5
    data: TextData | None = None
    steps: int = 50
    batch_size: int = 8
    r: int = 32
    lr: float | None = None
    distillation: Distillation = Distillation.forward_kl

    def check(self, metrics: tuple[str, ...]) -> None:
        """Check against the rest of the search.

        Raises:
            ConfigError: for a number out of range, or if there is nothing to train on.
        """
        if self.budget is None:
            return
        for name, least in (("candidates", 2), ("steps", 1), ("batch_size", 1), ("r", 1)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"--recovery.{name} {getattr(self, name)} must be at least {least}"
                )
        parse_constraints(self.budget, option="--recovery.budget")
        if self.data is None:
            raise ConfigError("--recovery.budget needs training text: give --recovery.data.files")
        if "val_loss" not in metrics:
            raise ConfigError(
                "--recovery.budget ranks by val_loss: add val_loss or perplexity to --objectives"
            )
