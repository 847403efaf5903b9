"""One training step: which networks run, their gradients, and the sum over processes.

B rows, T tokens, N positions with a label, D channels, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from whittle_nas.space.samplers import Sampler
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.train import losses
from whittle_nas.train.batches import IGNORE, Sample, attention_mask, positions
from whittle_nas.train.options import Distillation, LossOptions, SandwichOptions, Strategy
from whittle_nas.weights.supernet import SuperNetwork, positions_per_chunk


class Role(str, Enum):
    """Why a network takes part in a step; names its losses in the logs."""

    full = "full"
    sampled = "sampled"
    smallest = "smallest"


@dataclass(frozen=True)
class Network:
    """One network of a step and the weight of its loss."""

    sub: SubNetwork
    role: Role
    weight: float = 1.0


def networks_of_step(
    step: int,
    *,
    full: SubNetwork,
    smallest: SubNetwork,
    sampler: Sampler,
    options: SandwichOptions,
    total_steps: int,
    seed: int,
) -> list[Network]:
    """The networks of an optimiser step, the full one first if it takes part.

    A function of the seed and the step alone: all processes and all resumed runs agree without
    telling each other.
    """
    rng = random.Random(f"{seed}/{step}")
    whole = Network(full, Role.full)
    if options.strategy is Strategy.standard:
        return [whole]
    if options.strategy is Strategy.random_linear and rng.random() >= step / total_steps:
        return [whole]
    if options.strategy is not Strategy.sandwich:
        return [Network(sampler.sample(rng, 1)[0], Role.sampled)]
    count = 1 + options.num_random + options.train_smallest
    weight = 1 / count if options.mean else 1.0
    sampled = sampler.sample(rng, options.num_random)
    networks = [Network(full, Role.full, weight * options.full_weight)]
    networks += [Network(sub, Role.sampled, weight) for sub in sampled]
    if options.train_smallest:
        networks.append(Network(smallest, Role.smallest, weight))
    return networks


def labelled_hidden(
    supernet: SuperNetwork, sub: SubNetwork, batch: Sample, *, checkpoint_blocks: bool = False
) -> Tensor:
    """Final hidden states at the positions that have a label, (N, D)."""
    model: Any = supernet.subnet(sub, hidden=True, checkpoint_blocks=checkpoint_blocks)
    hidden = model(batch.input_ids) if batch.segments is None else _packed(model, batch)
    hidden = hidden.flatten(0, 1)  # (B * T, D)
    keep = (batch.labels.flatten() != IGNORE).nonzero().squeeze(1)
    return hidden if len(keep) == len(hidden) else hidden.index_select(0, keep)


def labels_of(batch: Sample) -> Tensor:
    """The labels alone, (N,)."""
    labels = batch.labels.flatten()
    return labels[labels != IGNORE]


def _packed(model: Any, batch: Sample) -> Tensor:
    """litgpt's forward pass up to the last norm, with attention and positions kept per sample.

    litgpt's own `forward` takes a mask and positions only together with a KV cache, but its blocks
    take both.
    """
    assert batch.segments is not None
    at = positions(batch.segments)
    cos, sin = model.cos[at], model.sin[at]  # (B, T, rope_n_elem)
    x = model.transformer.wte(batch.input_ids)
    if model.config.scale_embeddings:
        x = x * torch.tensor(model.config.n_embd**0.5, dtype=x.dtype)
    mask = attention_mask(batch.segments, x.dtype)
    for number, block in enumerate(model.transformer.h):
        kinds = model.config.rope_indices
        part = (cos, sin) if kinds is None else (cos[..., kinds[number]], sin[..., kinds[number]])
        x = block(x, *part, mask, None, None)
    return model.transformer.ln_f(x)


def accumulate(
    supernet: SuperNetwork,
    batch: Sample,
    networks: list[Network],
    options: LossOptions,
    *,
    checkpoint_blocks: bool = False,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Tensor:
    """Add to `.grad` the gradients of the *sums* over tokens of all networks' losses.

    Each network runs forward and backward before the next one starts, so that the activations of
    one network exist at a time. The full network's logits are computed once, for its own loss,
    and kept for the others' distillation.

    Args:
        supernet: holds the parameters.
        batch: inputs and labels.
        networks: of this step; the full network first if it is among them.
        options: losses.
        checkpoint_blocks: recompute the blocks' activations in the backward pass.
        total: sum over processes, for balanced weighting.

    Returns:
        Sums over tokens of cross entropy and distillation loss per network, (networks, 2).
    """
    labels = labels_of(batch)
    vocabulary = supernet.config.padded_vocab_size
    teaches = options.distillation is not Distillation.none and any(
        network.sub != supernet.full for network in networks
    )
    teacher = None
    if teaches and networks[0].sub != supernet.full:
        teacher = full_logits(supernet, batch, options)
    summed = []
    for network in networks:
        whole = network.sub == supernet.full
        sums = losses.backward(
            labelled_hidden(supernet, network.sub, batch, checkpoint_blocks=checkpoint_blocks),
            supernet.head(network.sub),
            labels,
            options,
            teacher=None if whole else teacher,
            weight=network.weight,
            vocabulary=vocabulary,
            total=total,
            keep_logits=whole and teaches and teacher is None,
        )
        teacher = teacher if sums.logits is None else sums.logits
        summed.append(torch.stack([sums.ce, sums.kd]))
    return torch.stack(summed)


@torch.no_grad()
def full_logits(supernet: SuperNetwork, batch: Sample, options: LossOptions) -> Tensor:
    """Logits of the full network at the positions that have a label, (N, V)."""
    hidden = labelled_hidden(supernet, supernet.full, batch)
    size = positions_per_chunk(supernet.config.padded_vocab_size, options.chunk_elements)
    return losses.in_chunks(hidden, supernet.head(supernet.full), size)


@torch.no_grad()
def loss_sums(
    supernet: SuperNetwork,
    batch: Sample,
    subs: Iterable[SubNetwork],
    *,
    chunk_elements: int | None = None,
) -> Tensor:
    """Sums over tokens of the cross entropy in nats of several sub-networks, (subs,)."""
    labels = labels_of(batch)
    size = positions_per_chunk(supernet.config.padded_vocab_size, chunk_elements)
    return torch.stack(
        [
            losses.cross_entropy_sum(
                labelled_hidden(supernet, sub, batch), supernet.head(sub), labels, size=size
            )
            for sub in subs
        ]
    )


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total_over_processes(tensor: Tensor) -> Tensor:
    """Sum of a small tensor over all processes."""
    if world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def finish_gradients(parameters: list[torch.nn.Parameter], num_labels: float) -> Tensor:
    """Turn sums of token gradients of this process into the mean over all tokens of all processes.

    Called once per optimiser step, after the last backward pass. Parameters that no network of
    the step used get a gradient of zero, so that every process reduces the same tensors.

    Args:
        parameters: the trained ones.
        num_labels: labelled tokens of the step, over all processes.

    Returns:
        The total L2 norm of the gradients, a scalar.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if world_size() > 1:
        _all_reduce(gradients)
    for gradient in gradients:
        gradient.div_(max(num_labels, 1.0))
    return torch.nn.utils.get_total_norm(gradients)


def _all_reduce(gradients: list[Tensor], bucket_elements: int = 2**24) -> None:
    """Sum over processes in place; many small tensors travel together."""
    bucket: list[Tensor] = []
    for number, gradient in enumerate(gradients):
        bucket.append(gradient)
        full = sum(g.numel() for g in bucket) >= bucket_elements
        if full or number + 1 == len(gradients) or gradients[number + 1].dtype != gradient.dtype:
            flat = torch.cat([g.flatten() for g in bucket])
            dist.all_reduce(flat)
            for g, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                g.copy_(part.view_as(g))
            bucket = []
