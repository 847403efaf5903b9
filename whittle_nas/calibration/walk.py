"""Change a model block by block, each on statistics of what reaches it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from whittle_nas.calibration.blocks import fetch_block
from whittle_nas.calibration.memory import give_back
from whittle_nas.calibration.statistics import Sums
from whittle_nas.calibration.stream import Stream, Watch, overflow
from whittle_nas.errors import ConfigError
from whittle_nas.progress import Progress, no_progress

# (layer, a copy of its block, statistics of its modules' inputs) -> what takes the block's place:
# the same one with other weights, or anything that is called in the same way
Change = Callable[[int, Any, Watch], nn.Module]


def walk(
    model: Any,
    stream: Stream,
    change: Change,
    *,
    watch: Callable[[Any], Watch],
    tensors: Mapping[str, Tensor] | None = None,
    sequential: bool = True,
    finished: Callable[[int, Any], nn.Module | None] = lambda _layer, _block: None,
    progress: Progress = no_progress,
    label: str = "compressing blocks",
) -> None:
    """Give every block to `change`, in order; the statistics of one block exist at a time.

    Args:
        model: `litgpt.GPT`, which stays as it is: `change` keeps or writes what it makes.
        stream: the text at the first block; at the end it is what leaves the last one.
        change: makes the new block from a copy of the old one, which it may write into.
        watch: statistics to fill for a block.
        tensors: the model's weights, where its blocks hold none (`weights.hollow`).
        sequential: let a block see what the changed blocks before it give; else what the
            unchanged ones do.
        finished: the changed block of a layer that an earlier run got done, made of a copy of the
            old one; None if it did not.
        progress: shows the blocks.
        label: what it says.

    Raises:
        ConfigError: if a statistic is not finite, naming the module.
    """
    count = model.config.n_layer
    for layer in progress(range(count), label, count):
        block = fetch_block(model, layer, stream.device, stream.dtype, tensors=tensors)
        known = finished(layer, block)
        if known is not None:  # made of `block`, which need not be the old one any more
            if not sequential:
                known = fetch_block(model, layer, stream.device, stream.dtype, tensors=tensors)
            stream.run(known, layer)
            continue
        give_back()  # of the block before
        statistics = watch(block)
        stream.run(block, layer, watch=statistics, advance=not sequential)
        changed = change(layer, block, statistics)
        if sequential:
            stream.run(changed, layer)
    give_back()


def first_overflow(
    model: Any, tokens: Tensor, *, otherwise: str, batch_size: int = 4
) -> ConfigError:
    """Why a loss is not finite: the error of the first layer whose activations aren't.

    Args:
        model: `litgpt.GPT` whose blocks have weights.
        tokens: (N, T) token ids.
        otherwise: begins the sentence if all of them are; see `overflow`.
        batch_size: sequences per forward pass.
    """
    try:
        stream = Stream(model, tokens, batch_size=batch_size, device=model.cos.device)
        for layer, block in enumerate(model.transformer.h):
            linears = [n for n, part in block.named_modules() if isinstance(part, nn.Linear)]
            stream.run(block, layer, watch={name: Sums() for name in linears})
    except ConfigError as error:
        return error
    return overflow(otherwise)
