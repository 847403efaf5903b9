"""Methods that take whole layers out, from a checkpoint to a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from whittle_nas.errors import ConfigError
from whittle_nas.progress import Progress
from whittle_nas.prune.laco import check_range, laco
from whittle_nas.prune.options import Method
from whittle_nas.prune.request import Outcome, Place, Request
from whittle_nas.prune.shortened_llama import shortened_llama, shortened_llama_taylor
from whittle_nas.prune.shortgpt import shortgpt
from whittle_nas.prune.store import BlockStore
from whittle_nas.space import SubNetwork
from whittle_nas.weights.checkpoint import Checkpoint, load_supernet
from whittle_nas.weights.slicing import plan_slices, slice_state_dict

DEPTH = (
    Method.shortgpt,
    Method.shortened_llama,
    Method.shortened_llama_taylor,
    Method.laco,
    Method.laco_notebook,
)


def drop_layers(
    checkpoint: Checkpoint,
    tokens: Tensor,
    request: Request,
    store: BlockStore,
    place: Place,
    progress: Progress,
) -> Outcome:
    """Run a method that takes layers out.

    Raises:
        ConfigError: if that would be no layer, all of them, or more than the method allows.
    """
    if request.method in (Method.laco, Method.laco_notebook):
        check_range(request.laco, checkpoint.config.n_layer)
    model = load_supernet(checkpoint.path, device=place.device, dtype=place.dtype).model
    drop = _number(request, model.config.n_layer)
    size = request.batch_size
    if request.method in (Method.laco, Method.laco_notebook):
        return _collapse(checkpoint, model, tokens, request, drop, progress)
    scores: list[float] = []
    if request.method is Method.shortgpt:
        kept = shortgpt(model, tokens, drop=drop, batch_size=size, progress=progress)
    elif request.method is Method.shortened_llama:
        kept, scores = shortened_llama(
            model, tokens, drop=drop, store=store, batch_size=size, progress=progress
        )
    else:
        kept, scores = shortened_llama_taylor(
            model,
            tokens,
            drop=drop,
            first=request.protect_first,
            last=request.protect_last,
            progress=progress,
        )
    return _without(checkpoint, kept, {}, {"layer_scores": scores} if scores else {})


def _number(request: Request, count: int) -> int:
    """How many of the layers go."""
    assert request.sparsity is not None
    drop = round(request.sparsity.share * count)
    if not 0 < drop < count:
        raise ConfigError(
            f"--sparsity {request.sparsity} of {count} layers is {drop} layers; it must be at "
            f"least one, and not all"
        )
    return drop


def _collapse(
    checkpoint: Checkpoint,
    model: Any,
    tokens: Tensor,
    request: Request,
    drop: int,
    progress: Progress,
) -> Outcome:
    like_notebook = request.method is Method.laco_notebook
    found = laco(
        model,
        tokens[:, :-1],
        request.laco,
        drop=drop,
        like_notebook=like_notebook,
        progress=progress,
    )
    gone = model.config.n_layer - len(found.layers)
    if gone < drop:
        raise ConfigError(
            f"--laco.threshold {request.laco.threshold:g} lets only {gone} of the {drop} layers "
            f"of --sparsity {request.sparsity} go; lower the threshold, or the sparsity"
        )
    stored = checkpoint.state_dict()["lm_head.weight"].dtype
    changed = {
        f"transformer.h.{layer}.{name}": weight.to("cpu", stored)
        for layer, block in zip(found.layers, found.blocks, strict=True)
        if block is not model.transformer.h[layer]
        for name, weight in block.state_dict().items()
    }
    merges = [
        {"layer": layer, "merged": run, "cosine": cosine, "accepted": stays}
        for layer, run, cosine, stays in found.tried
    ]
    return _without(checkpoint, found.layers, changed, {"merges": merges})


def _without(
    checkpoint: Checkpoint,
    kept: Sequence[int],
    changed: Mapping[str, Tensor],
    details: Mapping[str, Any],
) -> Outcome:
    config = checkpoint.config
    whole = SubNetwork.from_config(config)
    blocks = [block if layer in kept else None for layer, block in enumerate(whole.blocks)]
    plan = plan_slices(SubNetwork(config.n_embd, tuple(blocks)), config)
    tensors = slice_state_dict(plan, {**checkpoint.state_dict(), **changed})
    return Outcome(plan.config, tensors, details={"layers": list(kept), **details})
