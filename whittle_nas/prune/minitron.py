"""Minitron: sort by norms of activations, take one uniform shape (Muralidharan et al. 2024)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from whittle_nas.errors import ConfigError
from whittle_nas.importance.options import Aggregation, Basis, HeadActivation
from whittle_nas.importance.pipeline import Measured, MeasureOptions, measure
from whittle_nas.progress import Progress, no_progress
from whittle_nas.space import SubNetwork
from whittle_nas.weights import axes

_STEP = 8  # sizes are multiples of it, as kernels like them


def minitron(
    model: Any, tokens: Tensor, *, batch_size: int = 4, progress: Progress = no_progress
) -> Measured:
    """How the model is sorted: mean over the tokens and L2 norm over the sequences of a batch.

    Args:
        model: `litgpt.GPT`, in evaluation mode.
        tokens: (N, T + 1) token ids.
        batch_size: sequences of a batch, over which the norm goes.
        progress: shows the passes.
    """
    options = MeasureOptions(
        basis=Basis.permutation,
        aggregation=Aggregation.norm_mean,
        head_activation=HeadActivation.proj_input,
        batch_size=batch_size,
    )
    return measure(model, tokens, options, progress=progress)


def narrower(config: Any, share: float) -> dict[str, int]:
    """Sizes with a share of fewer parameters: channels and neurons shrink alike, heads stay.

    Raises:
        ConfigError: if that leaves nothing of them.
    """
    target = (1 - share) * axes.num_params(config)
    found = {}
    for eighths in range(1, max(config.n_embd, config.intermediate_size) // _STEP + 1):
        ratio = eighths * _STEP / max(config.n_embd, config.intermediate_size)
        sizes = {
            "n_embd": _multiple(ratio * config.n_embd),
            "intermediate_size": _multiple(ratio * config.intermediate_size),
        }
        if axes.num_params(replace(config, **sizes)) > target:
            break
        found = sizes
    if not found:
        raise ConfigError(f"--sparsity {share:g} leaves no channels and neurons of {config.name!r}")
    return {**SubNetwork.from_config(config).to_dict(), **found}


def _multiple(size: float) -> int:
    return max(_STEP, int(size) // _STEP * _STEP)
