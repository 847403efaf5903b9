"""One training step: which networks run, their gradients, and the sum over processes.

B rows, T tokens, N positions with a label, D channels, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
import torch.distributed as dist
from torch import Tensor

from whittle_nas.space.samplers import Sampler
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.train.backward import backward
from whittle_nas.train.batches import Sample
from whittle_nas.train.blocks import block_loss
from whittle_nas.train.choices import SandwichOptions, Strategy
from whittle_nas.train.forward import hidden_and_blocks, labelled_hidden, labels_of
from whittle_nas.train.losses import cross_entropy_sum
from whittle_nas.train.options import Distillation, LossOptions, Weighting
from whittle_nas.train.targets import Targets
from whittle_nas.train.teacher import Lesson, Teacher, lesson_of
from whittle_nas.weights.sharding import is_shared_out, local
from whittle_nas.weights.supernet import SuperNetwork, positions_per_chunk


class Role(str, Enum):
    """Why a network takes part in a step; names its losses in the logs."""

    full = "full"
    sampled = "sampled"
    smallest = "smallest"


@dataclass(frozen=True)
class Network:
    """One network of a step, the weight of its loss, and the rank of its adapters (None: whole)."""

    sub: SubNetwork
    role: Role
    weight: float = 1.0
    rank: int | None = None


def networks_of_step(
    step: int,
    *,
    full: SubNetwork,
    smallest: SubNetwork,
    sampler: Sampler,
    options: SandwichOptions,
    total_steps: int,
    seed: int,
    ranks: Sequence[int] = (),
) -> list[Network]:
    """The networks of an optimiser step, the full one first if it takes part.

    A function of the seed and the step alone: all processes and all resumed runs agree without
    telling each other.

    Args:
        step: counted from 0.
        full: the whole model.
        smallest: of the search space.
        sampler: of the others.
        options: which take part.
        total_steps: of the training.
        seed: of the training.
        ranks: of elastic adapters, ascending. A sandwich takes its own ends of them, too: the full
            network has the largest and the smallest network the smallest.
    """
    rng = random.Random(f"{seed}/{step}")
    if options.strategy is Strategy.sandwich:
        networks = _sandwich(rng, full, smallest, sampler, options)
        ends = {Role.full: ranks[-1], Role.smallest: ranks[0]} if ranks else {}
    else:
        whole = options.strategy is Strategy.standard
        if options.strategy is Strategy.random_linear:
            whole = rng.random() >= step / total_steps
        sampled = [] if whole else sampler.sample(rng, 1)
        networks = [Network(sub, Role.sampled) for sub in sampled] or [Network(full, Role.full)]
        ends = {}
    if not ranks:
        return networks
    return [replace(one, rank=ends.get(one.role) or rng.choice(ranks)) for one in networks]


def _sandwich(
    rng: random.Random,
    full: SubNetwork,
    smallest: SubNetwork,
    sampler: Sampler,
    options: SandwichOptions,
) -> list[Network]:
    """The ends of the space and what is drawn between them, each as often as it is asked for."""
    count = 1 + options.num_random + options.train_smallest
    weight = 1 / count if options.mean else 1.0
    has_full = rng.random() < options.full_share if options.full_share < 1 else True
    has_smallest = options.train_smallest
    if options.smallest_share < 1:
        has_smallest = has_smallest and rng.random() < options.smallest_share
    sampled = sampler.sample(rng, count - has_full - has_smallest)
    networks = [Network(full, Role.full, weight * options.full_weight)] if has_full else []
    networks += [Network(sub, Role.sampled, weight) for sub in sampled]
    if has_smallest:
        networks.append(Network(smallest, Role.smallest, weight))
    return networks


def accumulate(
    supernet: SuperNetwork,
    batch: Sample,
    networks: list[Network],
    options: LossOptions,
    *,
    teacher: Teacher | None = None,
    checkpoint_blocks: bool = False,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Tensor:
    """Add to `.grad` the gradients of the *sums* over tokens of all networks' losses.

    Each network runs forward and backward before the next one starts, so that the activations of
    one network exist at a time. The teacher's logits are computed once; in place they are those
    of the full network's own loss.

    Args:
        supernet: holds the parameters.
        batch: inputs and labels.
        networks: of this step; the full network first if it is among them.
        options: losses.
        teacher: the frozen one, of the full and the sampled networks; without it the full network
            teaches the others.
        checkpoint_blocks: recompute the blocks' activations in the backward pass.
        total: sum over processes, for balanced weighting.

    Returns:
        Sums over tokens of cross entropy and distillation loss per network, (networks, 2).
    """
    labels = labels_of(batch)
    in_place = teacher is None and options.distillation is not Distillation.none
    lesson = Lesson()
    if teacher is not None:
        lesson = lesson_of(teacher, batch, options)
    elif in_place and networks[0].sub != supernet.full:
        lesson = lesson_of(Teacher(supernet), batch, options)
    summed = []
    for network in networks:
        model = supernet.at_rank(network.rank)
        whole = network.sub == supernet.full
        keep = Targets(len(labels), options) if whole and in_place and len(networks) > 1 else None
        hidden, of_blocks = _learn(model, network.sub, batch, options, lesson, checkpoint_blocks)
        sums = backward(
            hidden,
            model.head(network.sub),
            labels,
            _unscaled(options) if whole else options,
            targets=None if whole and in_place else lesson.targets,
            weight=network.weight,
            vocabulary=supernet.config.padded_vocab_size,
            total=total,
            keep=keep,
            block_loss=of_blocks,
        )
        lesson = lesson if keep is None else Lesson(keep)
        summed.append(torch.stack([sums.ce, sums.kd]))
    return torch.stack(summed)


def _unscaled(options: LossOptions) -> LossOptions:
    """For the full network: it starts as its frozen teacher, and `balanced` would scale nothing."""
    return replace(options, weighting=Weighting.fixed, ce_weight=options.weights[0])


def _learn(
    supernet: SuperNetwork,
    sub: SubNetwork,
    batch: Sample,
    options: LossOptions,
    lesson: Lesson,
    checkpoint_blocks: bool,
) -> tuple[Tensor, Tensor | None]:
    """Final hidden states of a network, and the loss of its blocks if there is one."""
    hidden, blocks = hidden_and_blocks(
        supernet, sub, batch, blocks=bool(lesson.blocks), checkpoint_blocks=checkpoint_blocks
    )
    if not lesson.blocks:
        return hidden, None
    loss = block_loss(blocks, lesson.blocks, supernet.plan(sub).layers, options.hidden)
    return hidden, options.hidden_weight * loss


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
    sums = [
        cross_entropy_sum(
            labelled_hidden(supernet, sub, batch), supernet.head(sub), labels, size=size
        )
        for sub in subs
    ]
    supernet.rest()
    return torch.stack(sums)


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
def finish_gradients(parameters: list[torch.nn.Parameter], num_labels: float | Tensor) -> Tensor:
    """Turn sums of token gradients of this process into the mean over all tokens of all processes.

    Called once per optimiser step, after the last backward pass. Parameters that no network of
    the step used get a gradient of zero, so that every process reduces the same tensors.

    Args:
        parameters: the trained ones.
        num_labels: labelled tokens of the step, over all processes.

    Returns:
        The total L2 norm of the gradients, a scalar.
    """
    sharded = any(is_shared_out(parameter) for parameter in parameters)
    gradients = gradients_of(parameters)
    if world_size() > 1 and not sharded:  # with sharding every backward pass has reduced its own
        _all_reduce(gradients)
    divisor = torch.as_tensor(num_labels).clamp(min=1.0)
    for gradient in gradients:
        gradient.div_(divisor)
    norm = torch.nn.utils.get_total_norm(gradients)
    return total_over_processes(norm.square()).sqrt() if sharded else norm


def gradients_of(parameters: list[torch.nn.Parameter]) -> list[Tensor]:
    """Gradients of what this process holds; zero where no network of the step used it."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [local(parameter.grad) for parameter in parameters if parameter.grad is not None]


@torch.no_grad()
def clip(parameters: list[torch.nn.Parameter], most: float, norm: Tensor) -> None:
    """Scale gradients whose total norm is above `most` down to it.

    torch's `clip_grads_with_norm_` refuses a plain tensor as the norm of sharded gradients.
    """
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients_of(parameters):
        gradient.mul_(factor)


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
