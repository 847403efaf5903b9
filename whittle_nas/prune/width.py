"""Methods that take channels, heads and neurons out, from a checkpoint to a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from whittle_nas.calibration import Stream
from whittle_nas.errors import ConfigError
from whittle_nas.importance.layers import falling_order
from whittle_nas.importance.sorting import SortedTensors
from whittle_nas.progress import Progress
from whittle_nas.prune.flap import flap
from whittle_nas.prune.llm_pruner import llm_pruner
from whittle_nas.prune.minitron import minitron, narrower
from whittle_nas.prune.options import Method
from whittle_nas.prune.request import Outcome, Place, Request
from whittle_nas.prune.slicegpt import (
    check_slices,
    global_basis,
    narrow_sizes,
    sliced_tensors,
    slicegpt,
)
from whittle_nas.prune.store import BlockStore
from whittle_nas.prune.structure import NarrowedTensors, Structure, narrowed_config, shape_of
from whittle_nas.space import SubNetwork
from whittle_nas.weights import axes
from whittle_nas.weights.checkpoint import Checkpoint, load_supernet
from whittle_nas.weights.slicing import plan_slices, slice_state_dict
from whittle_nas.weights.tying import untied


def cut_width(
    checkpoint: Checkpoint,
    tokens: Tensor,
    request: Request,
    store: BlockStore,
    place: Place,
    progress: Progress,
) -> Outcome:
    """Run a method that takes channels, heads or neurons out.

    Raises:
        ConfigError: if the share does not fit the model.
    """
    method, size = request.method, request.batch_size
    model = load_supernet(checkpoint.path, device=place.device, dtype=place.dtype).model
    if method is Method.minitron:
        return _minitron(checkpoint, model, tokens, request, progress)
    assert request.sparsity is not None
    share = request.sparsity.share
    if method is Method.slicegpt_global:
        return _slice(checkpoint, model, tokens, request, progress)
    if method is Method.llm_pruner:
        structure = llm_pruner(
            model,
            tokens,
            share=share,
            first=request.protect_first,
            last=request.protect_last,
            progress=progress,
        )
        return _narrow(checkpoint.state_dict(), checkpoint.config, structure)
    width = check_slices(model.config, share) if method is Method.slicegpt else 0
    stream = Stream(model, tokens[:, :-1], batch_size=size, device=place.device, dtype=place.dtype)
    if method is Method.slicegpt:
        config, tensors = slicegpt(model, stream, store, n_embd=width, progress=progress)
        note = "nas evaluate and nas profile run it; no engine has its shortcut matrices"
        return Outcome(config, _stored(tensors, checkpoint), notes=(note,))
    found = flap(model, stream, share=share, progress=progress)
    config = replace(checkpoint.config, bias=True)
    tensors = _with_biases(checkpoint, found.biases, config)
    return _narrow(tensors, config, found.structure)


def _slice(
    checkpoint: Checkpoint, model: Any, tokens: Tensor, request: Request, progress: Progress
) -> Outcome:
    """One basis for the whole stream: an ordinary model with fewer channels."""
    assert request.sparsity is not None
    width = check_slices(model.config, request.sparsity.share)
    bases = global_basis(model, tokens[:, :-1], batch_size=request.batch_size, progress=progress)
    config = untied(checkpoint.config)
    turned = SortedTensors(checkpoint.state_dict, bases, config)
    narrow = replace(config, **narrow_sizes(config, width))
    return Outcome(narrow, sliced_tensors(turned, config, width))


def _stored(tensors: Mapping[str, Tensor], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """In the number format of the checkpoint."""
    dtype = checkpoint.state_dict()["lm_head.weight"].dtype
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def _narrow(tensors: Mapping[str, Tensor], config: Any, structure: Structure) -> Outcome:
    details = {
        "n_query_groups_by_layer": [len(groups) for groups in structure.groups],
        "intermediate_size_by_layer": [len(neurons) for neurons in structure.neurons],
    }
    narrow = narrowed_config(structure, config)
    return Outcome(
        narrow,
        NarrowedTensors(structure, tensors, config),
        details=details,
        shape=shape_of(structure, config),
    )


def _with_biases(
    checkpoint: Checkpoint, biases: tuple[dict[str, Tensor], ...], config: Any
) -> dict[str, Tensor]:
    """The state dict of a model with biases everywhere: what was there, plus what makes up."""
    stored = checkpoint.state_dict()
    found = {}
    for name in axes.parameter_names(config):
        layer, rest = axes.split_layer(name)
        owner, _, kind = rest.rpartition(".")
        if name in stored:
            tensor = stored[name]
        else:
            tensor = torch.zeros(axes.shape(name, config), dtype=stored["lm_head.weight"].dtype)
        if kind == "bias" and layer is not None and owner in biases[layer]:
            tensor = tensor + biases[layer][owner].to("cpu", tensor.dtype)
        found[name] = tensor
    return found


def _minitron(
    checkpoint: Checkpoint, model: Any, tokens: Tensor, request: Request, progress: Progress
) -> Outcome:
    config = checkpoint.config
    if request.sizes is not None:
        sizes = dict(request.sizes)
    elif request.sparsity is not None:
        sizes = narrower(config, request.sparsity.share)
    else:
        raise ConfigError("--method minitron needs --sparsity, or --subnetwork sizes")
    measured = minitron(model, tokens, batch_size=request.batch_size, progress=progress)
    permuted = SortedTensors(checkpoint.state_dict, measured.bases, config)
    order = falling_order(measured.scores.block_importance.tolist())
    plan = plan_slices(SubNetwork.from_dict(sizes, order), config)
    details = {"layers": list(plan.layers), "sizes": sizes}
    return Outcome(plan.config, slice_state_dict(plan, permuted), details=details)
