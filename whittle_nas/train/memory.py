"""How much memory a training will need, from the sizes alone.

B batch, T tokens, N labelled tokens (at most B * T), D n_embd, V vocabulary.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from litgpt import GPT
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from whittle_nas.train import lora
from whittle_nas.train.options import ORIGINAL, Distillation, LoraOptions, LossOptions, Weights
from whittle_nas.weights.assembly import built_in
from whittle_nas.weights.axes import num_params
from whittle_nas.weights.checkpoint import WEIGHTS, load_torch
from whittle_nas.weights.slicing import per_layer
from whittle_nas.weights.supernet import positions_per_chunk
from whittle_nas.weights.tying import tie_head

_BLOCK = "transformer.h.0."
ALL_WEIGHTS = 50_000_000  # parameters up to which all are trained by default


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each device at the fullest moment of a step.

    Attributes:
        weights: frozen and trained weights of the model.
        adapters: LoRA matrices.
        gradients: of what is trained.
        optimizer: AdamW's two moments.
        activations: what the full network keeps for its backward pass.
        logits: one chunk of the head with its gradient, and what the teacher says of all tokens.
        teacher: weights of a frozen teacher that are not the model's own.
        masks: which of the trained weights are zero and stay so; adapters make theirs anew in every
            pass, and it is among the activations.
        gathered: with FSDP, what is whole for a while: both tables, and the block that runs, the
            one that is fetched meanwhile, and the gradients of what is trained in them.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    teacher: int = 0
    masks: int = 0
    gathered: int = 0

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(getattr(self, field.name) for field in fields(self))


def estimate_memory(
    config: Any,
    options: LoraOptions | None,
    *,
    batch: int,
    tokens: int,
    precision: str,
    loss: LossOptions,
    checkpoint_blocks: bool = False,
    stored: torch.dtype = torch.bfloat16,
    shards: int = 1,
    apart: bool = False,
    keep_zeros: bool = False,
) -> MemoryEstimate:
    """Bytes that the training of a super-network needs per device.

    Nothing is loaded: the model is built of fake tensors. Activations are those that autograd
    saves in a fake forward pass of one and of two layers; a layer more costs the difference.

    Args:
        config: `litgpt.Config` of the model.
        options: adapters; None trains all weights.
        batch: rows per micro-batch, B.
        tokens: tokens per row, T.
        precision: as for the trainer.
        loss: chunk size and whether there is a teacher.
        checkpoint_blocks: whether activations are recomputed.
        stored: number format of the checkpoint's weights.
        shards: devices that share the parameters, with FSDP.
        apart: a sub-network is trained alone, at most as large as the model, which teaches it: then
            the teacher is not the trained model with its adapters off.
        keep_zeros: weights of zero stay zero; any matrix of the model may hold some.
    """
    compute = torch.float32 if precision == "32-true" else torch.bfloat16
    trained_bytes = 2 if precision == "bf16-true" else 4
    sizes = _parameter_counts(config, options)
    trained = sizes["adapters"] if options else sizes["weights"]
    mixed = precision == "bf16-mixed"  # leaves frozen weights as they are
    frozen_bytes = stored.itemsize if mixed else compute.itemsize
    weight_bytes = frozen_bytes if options else trained_bytes
    same = options is not None and loss.teacher == ORIGINAL and not apart
    copied = loss.has_frozen_teacher and not same
    passed = (batch, tokens, compute, keep_zeros)
    one = _saved_bytes(config, options, 1, *passed)
    block = _saved_bytes(config, options, 2, *passed) - one
    kept = block * config.n_layer
    if checkpoint_blocks:
        kept = block + batch * tokens * config.n_embd * compute.itemsize * config.n_layer
    return MemoryEstimate(
        weights=sizes["weights"] * weight_bytes // shards,
        adapters=sizes["adapters"] * trained_bytes // shards,
        gradients=trained * trained_bytes // shards,
        optimizer=2 * trained * trained_bytes // shards,
        activations=one - block + kept,
        logits=_logit_bytes(config, loss, batch * tokens, compute),
        teacher=(sizes["weights"] * compute.itemsize if copied else 0) // shards,
        masks=(sizes["weights"] if keep_zeros and not options else 0) // shards,
        gathered=_gathered_bytes(config, options, weight_bytes, trained_bytes) if shards > 1 else 0,
    )


def choose_adapters(
    options: LoraOptions | None,
    weights: Weights,
    needed: Callable[[], int],
    there: int,
    config: Any,
) -> LoraOptions | None:
    """The adapters to train; None where all weights are.

    Small models have little that an adapter could reuse, and room for all of their weights: up to
    50 million parameters all are trained, if that takes no more than half of the memory. Adapters
    that differ from the default were asked for.

    Args:
        options: the adapters that the user gave, None for all weights.
        weights: what the user wants to be trained.
        needed: bytes that training all weights takes.
        there: bytes of the device.
        config: of the model.
    """
    if options is None or weights is Weights.all:
        return None
    if weights is Weights.adapters or options != LoraOptions():
        return options
    return None if num_params(config) <= ALL_WEIGHTS and needed() <= there / 2 else options


def stored_format(checkpoint_dir: Path) -> torch.dtype:
    """Number format of most of a checkpoint's weights; bfloat16 where it has none yet."""
    path = checkpoint_dir / WEIGHTS
    if not path.is_file():
        return torch.bfloat16
    bytes_of: dict[torch.dtype, int] = defaultdict(int)
    loaded = load_torch(path)
    for tensor in loaded.get("model", loaded).values():
        bytes_of[tensor.dtype] += tensor.nbytes
    return max(bytes_of, key=lambda dtype: bytes_of[dtype])


def device_bytes(device: torch.device) -> int:
    """Memory of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _build(config: Any, options: LoraOptions | None, *, keep_zeros: bool = False) -> nn.Module:
    model = GPT(config) if options is None else lora.GPT(lora.lora_config(config, options))
    if keep_zeros:
        lora.keep_zeros(model, frozenset(name for name, _ in model.named_modules()))
    tie_head(model)
    if options is not None:
        lora.freeze_base(model)
    return model


def _parameter_counts(config: Any, options: LoraOptions | None, part: str = "") -> dict[str, int]:
    """Parameters of the model, or of a part of it."""
    with torch.device("meta"):
        model = _build(config, options)
    counts = {"weights": 0, "adapters": 0}
    for name, parameter in model.named_parameters():
        if name.startswith(part):
            counts["adapters" if lora.is_adapter(name) else "weights"] += parameter.numel()
    return counts


def _gathered_bytes(
    config: Any, options: LoraOptions | None, weight_bytes: int, trained_bytes: int
) -> int:
    """What FSDP holds whole at a time: two blocks, and all that is in no block."""
    one, block = (_parameter_counts(_shallow(config, 1), options, p) for p in ("", _BLOCK))
    # twice the block, and once what is left of a model of one layer without it
    counts = {name: one[name] + block[name] for name in one}
    gradients = counts["adapters"] if options else counts["weights"]
    held = counts["weights"] * weight_bytes + counts["adapters"] * trained_bytes
    return held + gradients * trained_bytes


def _saved_bytes(
    config: Any,
    options: LoraOptions | None,
    n_layer: int,
    batch: int,
    tokens: int,
    dtype: torch.dtype,
    keep_zeros: bool,
) -> int:
    """Bytes that autograd saves in the forward pass up to the last norm, without parameters."""
    shallow = replace(_shallow(config, n_layer), final_logit_softcapping=None)
    with FakeTensorMode(), built_in(dtype):
        model: Any = _build(shallow, options, keep_zeros=keep_zeros)
        model.lm_head = nn.Identity()
        parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        saved: dict[int, int] = {}
        kept: list[torch.Tensor] = []  # so that no storage is freed and its number used again

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in parameters:
                saved[storage._cdata] = storage.nbytes()
                kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(torch.zeros(batch, tokens, dtype=torch.long))
    return sum(saved.values())


def _shallow(config: Any, n_layer: int) -> Any:
    """The config of the first layers."""
    kinds = {
        name: values[:n_layer] for name, values in per_layer(config).items() if values is not None
    }
    return replace(config, n_layer=n_layer, **kinds)


def _logit_bytes(config: Any, loss: LossOptions, tokens: int, dtype: torch.dtype) -> int:
    """Logits, their log-probabilities and gradient for one chunk; a teacher's for all tokens."""
    vocabulary = config.padded_vocab_size
    chunk = min(tokens, positions_per_chunk(vocabulary, loss.chunk_elements)) * vocabulary
    if loss.distillation is Distillation.none:
        return chunk * 4 * 3
    top = loss.teacher_top_k
    lesson = vocabulary * dtype.itemsize if top is None else top * (4 + 8) + 4
    return chunk * 4 * 6 + tokens * lesson
