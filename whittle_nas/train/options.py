"""How a network learns: from what, which of its weights, how fast and where.

No heavy import: the command line reads this. Which networks learn is in `choices`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

from whittle_nas.errors import ConfigError, at_least


class Distillation(str, Enum):
    """What a network learns from the teacher's logits."""

    none = "none"
    forward_kl = "forward_kl"
    reverse_kl = "reverse_kl"
    symmetric_kl = "symmetric_kl"
    jensen_shannon = "jensen_shannon"
    l1 = "l1"
    l2 = "l2"
    cosine = "cosine"


class Weighting(str, Enum):
    """How cross entropy and distillation are added."""

    fixed = "fixed"
    balanced = "balanced"


class HiddenLoss(str, Enum):
    """What a network learns from the outputs of the teacher's blocks."""

    none = "none"
    square_head = "square_head"
    cosine = "cosine"


ORIGINAL, IN_PLACE = "original", "in_place"  # the teachers that are no directory

# Weight of the cross entropy: the best of five in scripts/studies/mix.sh for the parts of a
# super-network, and within .01 nats of the best for networks that are trained alone.
_BESIDE_A_TEACHER = 0.3


@dataclass(frozen=True)
class LossOptions:
    """Loss of a network: `ce_weight * CE + kd_weight * KD`.

    Args:
        teacher: `original`: the checkpoint as it came in, frozen, which teaches the sub-networks
            and the full network; with adapters it costs no memory. `in_place`: the full network as
            it is at the step teaches the sub-networks, and learns from the labels itself (the
            papers, where it is in every step: `sandwich.full_share 1`).
            Else the directory of another checkpoint with the same tokenizer, which the whole model
            trained alone (`sandwich.strategy standard`) needs: without it, the labels alone teach.
        distillation: What is learnt from the teacher's logits; `none` learns from the labels alone.
        teacher_top_k: Compare the teacher's k most likely tokens and all others together, which is
            a KL of its own and needs k / vocabulary of the memory; null compares all tokens.
        hidden: What is learnt from the outputs of the blocks of a frozen teacher, each compared
            with the block it was cut from; another checkpoint has to be in the same basis.
        hidden_weight: Weight of that loss.
        weighting: `balanced` first scales KD to the size of CE.
        ce_weight: Weight of the cross entropy (alpha); by default 0.3 with a frozen teacher, and 1
            with `in_place` and `balanced`.
        kd_weight: Weight of the distillation loss (beta).
        temperature: Softens both distributions; the KL family and cosine use it, L1 and L2 do not.
        forward_share: Share of the forward KL in `symmetric_kl` (lambda), 0 to 1.
        chunk_elements: Largest number of logits that exist at a time; by default those of the 128
            positions that litgpt takes, or 2^22 if that is more. Smaller saves memory; where all
            weights are trained, each chunk costs one pass over the head's gradient.
    """

    distillation: Distillation = Distillation.forward_kl
    weighting: Weighting = Weighting.fixed
    teacher: str = ORIGINAL
    teacher_top_k: int | None = None
    hidden: HiddenLoss = HiddenLoss.none
    hidden_weight: float = 1.0
    ce_weight: float | None = None
    kd_weight: float = 1.0
    temperature: float = 1.0
    forward_share: float = 0.5
    chunk_elements: int | None = None

    def __post_init__(self) -> None:
        at_least("loss.ce_weight", self.ce_weight or 0, 0)
        at_least("loss.kd_weight", self.kd_weight, 0)
        at_least("loss.hidden_weight", self.hidden_weight, 0)
        if self.names_a_directory and not Path(self.teacher).is_dir():
            raise ConfigError(
                f"loss.teacher={self.teacher} must be {ORIGINAL}, {IN_PLACE} or the directory of a "
                "checkpoint"
            )
        if self.teacher_top_k is not None:
            at_least("loss.teacher_top_k", self.teacher_top_k, 1)
            if self.distillation is not Distillation.forward_kl:
                raise ConfigError(
                    f"loss.teacher_top_k={self.teacher_top_k} goes with distillation forward_kl, "
                    f"not {self.distillation.value}"
                )
        taught = self.distillation is not Distillation.none
        if self.hidden is not HiddenLoss.none and (self.teacher == IN_PLACE or not taught):
            raise ConfigError(
                f"loss.hidden={self.hidden.value} needs a frozen teacher: set loss.teacher to "
                "original or to a directory, and a loss.distillation"
            )
        if self.chunk_elements is not None:
            at_least("loss.chunk_elements", self.chunk_elements, 1)
        if self.temperature <= 0:
            raise ConfigError(f"loss.temperature={self.temperature} must be above 0")
        if not 0 <= self.forward_share <= 1:
            raise ConfigError(f"loss.forward_share={self.forward_share} must be between 0 and 1")

    @property
    def names_a_directory(self) -> bool:
        """Whether the teacher is another checkpoint."""
        return self.teacher not in (ORIGINAL, IN_PLACE)

    @property
    def has_frozen_teacher(self) -> bool:
        """Whether a model that does not learn teaches."""
        return self.distillation is not Distillation.none and self.teacher != IN_PLACE

    @property
    def weights(self) -> tuple[float, float]:
        """Weights of cross entropy and distillation where there is a teacher."""
        balanced = self.weighting is Weighting.balanced
        by_default = 1.0 if self.teacher == IN_PLACE or balanced else _BESIDE_A_TEACHER
        return by_default if self.ce_weight is None else self.ce_weight, self.kd_weight


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters; the other weights stay frozen.

    Args:
        r: Rank of the adapters.
        ranks: Elastic adapters (LoNAS): the networks of a step take one of these ranks each, the
            first rows of A and columns of B; the full network `r`, the smallest the smallest. The
            result has rank `r` merged in, and `nas export --lora_r` another one.
        alpha: The update is scaled by alpha / r.
        dropout: Dropout on the input of an adapter (not of the embedding's, which reads token ids).
        query: Adapt the query rows of the attention input projection.
        key: Adapt its key rows.
        value: Adapt its value rows.
        projection: Adapt the attention output projection.
        mlp: Adapt the linear layers of the MLP.
        head: Adapt the output head.
        embedding: Adapt the token embedding.
    """

    r: int = 32
    ranks: list[int] | None = None
    alpha: int = 16
    dropout: float = 0.05
    query: bool = True
    key: bool = True
    value: bool = True
    projection: bool = True
    mlp: bool = True
    head: bool = True
    embedding: bool = True

    def check(self) -> None:
        """Refuse numbers out of range; not on construction, where jsonargparse hides the reason.

        Raises:
            ConfigError: naming the number.
        """
        at_least("lora.r", self.r, 1)
        if wrong := [rank for rank in self.ranks or () if not 1 <= rank <= self.r]:
            raise ConfigError(f"lora.ranks: {wrong[0]} must be at least 1 and at most r={self.r}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout={self.dropout} must be at least 0 and below 1")
        if not any(getattr(self, f.name) for f in fields(self) if f.type in (bool, "bool")):
            raise ConfigError("lora adapts nothing: set one of query, key, ..., or lora: null")

    @property
    def choices(self) -> tuple[int, ...]:
        """The ranks of elastic adapters, ascending and `r` with them; none where all have `r`."""
        return tuple(sorted({*self.ranks, self.r})) if self.ranks else ()


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW with a linear warm-up and a cosine that ends at `min_lr`.

    Args:
        lr: Highest learning rate; by default 2e-4 with adapters, and for all weights 3e-5 at three
            million parameters, falling with the square root of their number, between the papers'
            2e-5 and 1e-3.
        min_lr: Learning rate of the last step.
        warmup_steps: Optimiser steps until `lr` is reached.
        weight_decay: Decoupled weight decay.
        beta1: Decay of AdamW's mean of the gradients.
        beta2: Decay of AdamW's mean of their squares.
    """

    lr: float | None = None
    min_lr: float = 0.0
    warmup_steps: int = 10
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95

    def __post_init__(self) -> None:
        if self.lr is not None and self.lr <= 0:
            raise ConfigError(f"optimizer.lr={self.lr} must be above 0")
        at_least("optimizer.min_lr", self.min_lr, 0)
        at_least("optimizer.warmup_steps", self.warmup_steps, 0)
        at_least("optimizer.weight_decay", self.weight_decay, 0)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                value = getattr(self, name)
                raise ConfigError(f"optimizer.{name}={value} must be at least 0 and below 1")

    def resolved(self, *, full: bool, num_params: int) -> OptimizerOptions:
        """With the default learning rate for adapters, or for all `num_params` weights (`full`)."""
        if self.lr is not None:
            return self
        by_size = min(1e-3, max(2e-5, 3e-5 * (3e6 / num_params) ** 0.5))
        return replace(self, lr=by_size if full else 2e-4)


class Weights(str, Enum):
    """What of a model is trained."""

    auto = "auto"
    adapters = "adapters"
    all = "all"


@dataclass(frozen=True)
class TrainerOptions:
    """Passed to `lightning.Trainer`, with lengths in optimiser steps.

    Args:
        max_epochs: Passes over the training data, unless `max_steps` is given; by default one, but
            at least 100 steps, in up to four passes, and at most 2000 steps.
        max_steps: Optimiser steps.
        accelerator: `auto`, `cpu`, `cuda`, ...
        devices: Number of devices per machine, a list such as `0,1`, or `auto`.
        num_nodes: Machines.
        strategy: `auto` or `ddp`: every process holds the whole model, and gradients are summed
            once per step. `fsdp`: each holds its share of all weights, gradients and moments, and a
            block is whole only while it runs.
        precision: `32-true`; `bf16-mixed`: trained weights in float32, frozen ones as stored,
            arithmetic in bfloat16; or `bf16-true`.
        accumulate_grad_batches: Micro-batches per optimiser step.
        gradient_clip_val: Largest norm of the gradient of the mean over tokens; null does not clip.
        log_every_n_steps: Optimiser steps between two rows of the logs.
        checkpoint_every_n_steps: Optimiser steps between two checkpoints to resume from; by
            default a tenth of the training.
        fast_dev_run: Print the memory that the run needs, do one step and one validation batch,
            and write nothing.
        enable_progress_bar: Show a progress bar.
        logger: Loggers as `{class_path, init_args}`; by default CSV and TensorBoard, an empty list
            logs nothing. E.g. `[{class_path: lightning.pytorch.loggers.WandbLogger}]`.
        callbacks: Lightning callbacks as `{class_path, init_args}`.
    """

    max_epochs: int | None = None
    max_steps: int | None = None
    accelerator: str = "auto"
    devices: int | str = "auto"
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = 1.0
    log_every_n_steps: int = 10
    checkpoint_every_n_steps: int | None = None
    fast_dev_run: bool = False
    enable_progress_bar: bool = True
    logger: list[dict[str, Any]] | None = None
    callbacks: list[dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        counts = (
            "max_epochs", "max_steps", "num_nodes", "accumulate_grad_batches",
            "log_every_n_steps", "checkpoint_every_n_steps",
        )  # fmt: skip
        for name in counts:
            value = getattr(self, name)
            at_least(f"trainer.{name}", 1 if value is None else value, 1)
        if self.gradient_clip_val is not None and self.gradient_clip_val <= 0:
            raise ConfigError(
                f"trainer.gradient_clip_val={self.gradient_clip_val} must be above 0, or null"
            )
        if self.precision.startswith("bnb"):
            # One scale per 64 neighbours of the flattened matrix, two weights per byte: a slice of
            # the columns cuts through blocks, and its own blocks would have other scales.
            raise ConfigError(
                f"trainer.precision={self.precision!r}: 4-bit weights can't be sliced to "
                "sub-networks; use bf16-mixed, which keeps frozen weights in bfloat16"
            )
        if self.precision not in PRECISIONS:
            # float16 would need loss scaling across several backward passes
            raise ConfigError(
                f"trainer.precision={self.precision!r} must be one of {', '.join(PRECISIONS)}"
            )
        if self.strategy not in ("auto", "ddp", SHARDED):
            raise ConfigError(
                f"trainer.strategy={self.strategy!r} must be auto, ddp (every process holds the "
                "whole model) or fsdp (each holds its share)"
            )
        if self.is_sharded:
            from whittle_nas.weights.sharding import check_available  # imports torch

            check_available()

    @property
    def is_sharded(self) -> bool:
        """Whether every process holds a share of the parameters."""
        return self.strategy == SHARDED


SHARDED = "fsdp"
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
