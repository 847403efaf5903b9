"""What replacing one part costs: the loss of a network with one block changed.

Up to that block nothing differs, so the states there are kept and only the layers behind are run.
B sequences, T tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from whittle_nas.calibration import Stream, run_block
from whittle_nas.calibration.steps import nats
from whittle_nas.candidates.parts import KINDS, Part, Sizes, with_sizes
from whittle_nas.space.subnetwork import Block, SubNetwork
from whittle_nas.weights.assembly import give_tables, needs_tables
from whittle_nas.weights.patch import Patch
from whittle_nas.weights.placement import home_of

PatchOf = Callable[[int, Block], Patch]  # of one block, by names in the block
_MODEL = "transformer.h.0."


def block_of(supernet: Any, layer: int, block: Block | None, patch: Patch) -> Any:
    """litgpt's block of one layer of a network; None for a layer that is gone.

    Args:
        supernet: the `SuperNetwork`.
        layer: which layer.
        block: its sizes.
        patch: what is special to it, by names in the block.
    """
    if not (block and any(block)):
        return None
    sub = alone(supernet, layer, block)
    model, plan = supernet.standalone(sub, patch.under(_MODEL)), supernet.plan(sub)
    found = model.transformer.h[0]
    if needs_tables(plan.blocks[0], supernet.plan(supernet.full)):  # it will run among others
        home = home_of(found) or model.cos.device
        give_tables(found, plan.blocks[0], (model.cos.to(home), model.sin.to(home)))
    return found


def blank_maps(supernet: Any, layer: int, block: Block) -> Patch:
    """Zeros for the matrices in place of parts of a block, by names in the block."""
    sub = alone(supernet, layer, block)
    maps, slices = supernet.plan(sub).maps(), supernet.slices(sub)
    return Patch({name.removeprefix(_MODEL): slices[name] for name in maps})


def alone(supernet: Any, layer: int, block: Block) -> SubNetwork:
    """The network of one block, as wide as the whole model."""
    depth = len(supernet.full.blocks)
    return SubNetwork(
        supernet.full.n_embd, tuple(block if at == layer else None for at in range(depth))
    )


def loss_behind(
    supernet: Any,
    blocks: Sequence[Any],
    layer: int,
    states: Sequence[Tensor],
    targets: Sequence[Tensor],
) -> float:
    """Nats per token of a network, from what enters one of its layers.

    Args:
        supernet: the `SuperNetwork`, whose last norm and head are used.
        blocks: of the network, one per layer of the super-network, None where it has none.
        layer: the first one that is run.
        states: (B, T, D) per batch, what enters it.
        targets: (B, T) per batch.
    """
    model, total = supernet.model, 0.0
    device = model.lm_head.weight.device
    with torch.no_grad():
        for state, labels in zip(states, targets, strict=True):
            x = state.to(device)
            for at in range(layer, len(blocks)):
                if blocks[at] is not None:
                    x = run_block(model, x, at, blocks[at])
            total += nats(model, model.transformer.ln_f(x), labels.to(device))
    return total / sum(labels.numel() for labels in targets)


def losses_around(
    supernet: Any,
    sub: SubNetwork,
    alternatives: Mapping[Part, Sequence[Sizes]],
    tokens: Tensor,
    *,
    patch_of: PatchOf,
    batch_size: int = 4,
    on_layer: Callable[[int], object] = lambda _left: None,
) -> tuple[float, dict[tuple[Part, Sizes], float]]:
    """The loss of a network, and of those that differ from it in one part.

    Args:
        supernet: the `SuperNetwork`.
        sub: the network, as wide as the whole model.
        alternatives: for every part that changes, its other sizes.
        tokens: (N, T + 1) text in blocks.
        patch_of: what is special to a block of given sizes.
        batch_size: sequences per forward pass.
        on_layer: called before each layer with how many are left.

    Returns:
        Nats per token of `sub`, and of every other network by the part and its sizes there.
    """

    def block(layer: int, sizes: Block | None) -> Any:
        if sizes is None:
            return None
        return block_of(supernet, layer, sizes, patch_of(layer, sizes))

    blocks = [block(layer, sizes) for layer, sizes in enumerate(sub.blocks)]
    device = supernet.model.lm_head.weight.device
    where = {"batch_size": batch_size, "device": device, "home": device}
    stream = Stream(supernet.model, tokens[:, :-1], **where)
    targets = [batch[:, 1:] for batch in tokens.split(batch_size)]
    base = loss_behind(supernet, blocks, 0, stream.states, targets)
    found = {}
    for layer in range(len(blocks)):
        on_layer(len(blocks) - layer)
        for part in (Part(layer, kind) for kind in KINDS):
            for sizes in alternatives.get(part, ()):
                changed = with_sizes(sub.blocks[layer], part.kind, sizes)
                others = [*blocks]
                others[layer] = block(layer, changed)
                loss = loss_behind(supernet, others, layer, stream.states, targets)
                found[part, sizes] = loss
        if blocks[layer] is not None:
            stream.run(blocks[layer], layer)
    return base, found
