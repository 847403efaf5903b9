"""Who teaches: the checkpoint as it came in, frozen, or another one.

A teacher is an ordinary `SuperNetwork` whose parameters need no gradient. In-place distillation
needs none: there the full network teaches, as it is in that step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from litgpt.config import Config
from tokenizers import Tokenizer
from torch import Tensor, nn

from whittle_nas.errors import ConfigError
from whittle_nas.train import lora
from whittle_nas.train.batches import Sample
from whittle_nas.train.blocks import same_basis
from whittle_nas.train.forward import hidden_and_blocks
from whittle_nas.train.options import ORIGINAL, HiddenLoss, LossOptions
from whittle_nas.train.targets import Targets
from whittle_nas.weights.assembly import build, renew_tables
from whittle_nas.weights.checkpoint import Checkpoint, open_checkpoint
from whittle_nas.weights.sharding import Sharding
from whittle_nas.weights.supernet import SuperNetwork, positions_per_chunk
from whittle_nas.weights.tying import tie_head

TOKENS = "transformer.wte.weight"


@dataclass(frozen=True)
class Teacher:
    """A frozen model, and which of its blocks each block of the student came from."""

    model: SuperNetwork
    layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Lesson:
    """What a teacher says about a batch: its distributions, and what its blocks put out."""

    targets: Targets | None = None  # the labels alone teach
    blocks: tuple[Tensor, ...] = ()


@torch.no_grad()
def lesson_of(teacher: Teacher, batch: Sample, options: LossOptions) -> Lesson:
    """One forward pass of a teacher, its head a few tokens at a time."""
    model, full = teacher.model, teacher.model.full
    wanted = options.hidden is not HiddenLoss.none
    hidden, blocks = hidden_and_blocks(model, full, batch, blocks=wanted)
    targets, head = Targets(len(hidden), options), model.head(full)
    size = positions_per_chunk(model.config.padded_vocab_size, options.chunk_elements)
    for start in range(0, len(hidden), size):
        at = slice(start, start + size)
        targets.put(at, head(hidden[at]))
    model.rest()
    return Lesson(targets, tuple(blocks[layer] for layer in teacher.layers if wanted))


def make_teacher(
    loss: LossOptions,
    student: SuperNetwork,
    original: Checkpoint,
    *,
    precision: str = "32-true",
    sharded: bool = False,
) -> Teacher | None:
    """The frozen teacher that the options ask for; None if there is none.

    Args:
        loss: who teaches.
        student: what is trained; with adapters it holds the original's weights, too.
        original: the checkpoint that came in.
        precision: of the training.
        sharded: leave the weights of a copy as they are stored; see `shard_teacher`.

    Raises:
        ConfigError: if the teacher's vocabulary or context does not fit.
    """
    if not loss.has_frozen_teacher:
        return None
    other = loss.teacher != ORIGINAL
    checkpoint = open_teacher(loss, original)
    if other or not has_adapters(student.model):
        model = frozen(checkpoint, like=student.config, precision=None if sharded else precision)
    else:
        model = without_adapters(student, checkpoint.config)
    return Teacher(model, tuple(range(student.config.n_layer)))


def open_teacher(loss: LossOptions, original: Checkpoint) -> Checkpoint:
    """The checkpoint that teaches: the original, or one from a directory.

    Raises:
        ConfigError: if it splits text into other tokens, or its blocks or their channels have no
            pairs where hidden states are compared.
    """
    if loss.teacher == ORIGINAL:
        return original
    checkpoint = open_checkpoint(Path(loss.teacher))
    if not _same_tokens(original.path, checkpoint.path):
        raise ConfigError(
            f"loss.teacher={loss.teacher}: its tokenizer gives other numbers to the tokens of "
            f"{original.path}; a teacher has the same tokens"
        )
    if loss.hidden is not HiddenLoss.none:
        _check_pairs(loss, original, checkpoint)
    return checkpoint


def _check_pairs(loss: LossOptions, original: Checkpoint, teacher: Checkpoint) -> None:
    """Refuse to compare hidden states that are no pairs."""
    for size in ("n_layer", "n_embd"):
        own, its = getattr(original.config, size), getattr(teacher.config, size)
        if own != its:
            raise ConfigError(
                f"loss.hidden={loss.hidden.value}: the teacher has {size} {its} and the student "
                f"{own}, so their hidden states are no pairs; set loss.hidden none"
            )
    if not same_basis(*(each.state_dict()[TOKENS] for each in (original, teacher))):
        raise ConfigError(
            f"loss.hidden={loss.hidden.value}: the channels of {teacher.path} are not in the order "
            f"and basis of those of {original.path}, so their hidden states are no pairs: give "
            "loss.teacher the sorted checkpoint that the student comes from, or set loss.hidden "
            "none"
        )


def _same_tokens(one: Path, other: Path) -> bool:
    """Whether two tokenizers number what they share alike, and share most; True if not known.

    Chat models add tokens to those of their base, so the files need not be the same.
    """
    files = [path / "tokenizer.json" for path in (one, other)]
    if not all(file.is_file() for file in files):
        return True
    try:
        own, its = (Tokenizer.from_file(str(file)).get_vocab() for file in files)
    except Exception:  # the library has no class of its own for a file that it can't read
        return True
    shared = own.keys() & its.keys()
    return len(shared) > len(own) / 2 and all(own[token] == its[token] for token in shared)


def has_adapters(model: nn.Module) -> bool:
    """Whether a model has LoRA matrices."""
    return any(lora.is_adapter(name) for name, _ in model.named_parameters())


def without_adapters(student: SuperNetwork, config: Config) -> SuperNetwork:
    """The adapted model with its adapters off: a second face of the same parameters.

    Nothing is copied, and where the student is moved or converted the teacher is too.
    """
    with torch.device("meta"):
        model: Any = build(config)
    for path, module in model.named_modules():
        if module._parameters:
            adapted = student.model.get_submodule(path)
            source = getattr(adapted, "linear", adapted)  # LoRALinear keeps its weight there
            module._parameters = source._parameters  # also where they are exchanged, by sharding
    model.cos, model.sin = student.model.cos, student.model.sin
    model._max_seq_length = student.model.max_seq_length
    return SuperNetwork(model.eval(), student.info)


def shard_teacher(teacher: SuperNetwork, student: SuperNetwork, mesh: Any, precision: str) -> None:
    """Share a teacher out between processes, unless its weights are the student's."""
    shared = (
        teacher.model.lm_head._parameters
        is getattr(student.model.lm_head, "linear", student.model.lm_head)._parameters
    )
    if shared:
        teacher.sharding = student.sharding
        return
    dtype = compute_format(precision)

    def convert(part: nn.Module, _prefix: str) -> None:
        for parameter in part.parameters():
            parameter.data = parameter.data.to(dtype)

    teacher.sharding = Sharding(teacher.model, mesh, prepare=convert)


def compute_format(precision: str) -> torch.dtype:
    """Number format of a training's arithmetic, and of a frozen copy's weights."""
    return torch.float32 if precision == "32-true" else torch.bfloat16


def frozen(
    original: Checkpoint, *, like: Config, precision: str | None = "32-true"
) -> SuperNetwork:
    """A frozen copy; weights that need no conversion stay mapped from the checkpoint's file.

    With precision None all do.

    Raises:
        ConfigError: if it could not teach a model such as `like`.
    """
    config = original.config
    for name, fits in (
        ("padded_vocab_size", config.padded_vocab_size == like.padded_vocab_size),
        ("block_size", config.block_size >= like.block_size),
    ):
        if not fits:
            raise ConfigError(
                f"loss.teacher={original.path}: {name} is {getattr(config, name)} and the "
                f"student's is {getattr(like, name)}; a teacher has the same tokens and at least "
                "the same context"
            )
    with torch.device("meta"):
        model: Any = build(config)
    tensors = original.state_dict()
    if precision is not None:
        dtype = compute_format(precision)
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    tie_head(model)
    renew_tables(model)
    return SuperNetwork(model.requires_grad_(False).eval(), original.info)
