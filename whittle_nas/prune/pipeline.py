"""From a checkpoint to a smaller one by any method, and the files that say what was done."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from whittle_nas.progress import Progress, no_progress
from whittle_nas.prune.blockwise import check_blocks, compress_blocks
from whittle_nas.prune.depth import DEPTH, drop_layers
from whittle_nas.prune.options import MASKS, QUANTISERS
from whittle_nas.prune.request import Outcome, Place, Request
from whittle_nas.prune.sizes import model_bytes
from whittle_nas.prune.store import BlockStore
from whittle_nas.prune.width import cut_width
from whittle_nas.space import SubNetwork
from whittle_nas.space.front import Front, FrontEntry
from whittle_nas.weights import axes
from whittle_nas.weights.checkpoint import Checkpoint, write_checkpoint
from whittle_nas.weights.counting import parameter_counter
from whittle_nas.weights.files import GRIDS, PRUNE_REPORT
from whittle_nas.weights.hollow import Remapped, load_hollow
from whittle_nas.weights.identity import fingerprint

FRONT = "front.json"


def compress(
    checkpoint: Checkpoint,
    tokens: Tensor,
    request: Request,
    store: BlockStore,
    *,
    place: Place,
    progress: Progress = no_progress,
) -> Outcome:
    """Run one method.

    Args:
        checkpoint: what is made smaller.
        tokens: (N, T + 1) calibration text; (0, 1) for methods without any.
        request: which method, and its options.
        store: folder of finished blocks.
        place: device and number format of the passes.
        progress: shows them.

    Raises:
        ConfigError: for options that do not fit the model, and text that shows too little.
    """
    if request.method in (*MASKS, *QUANTISERS):
        return _blockwise(checkpoint, tokens, request, store, place, progress)
    if request.method in DEPTH:
        return drop_layers(checkpoint, tokens, request, store, place, progress)
    return cut_width(checkpoint, tokens, request, store, place, progress)


def _blockwise(
    checkpoint: Checkpoint,
    tokens: Tensor,
    request: Request,
    store: BlockStore,
    place: Place,
    progress: Progress,
) -> Outcome:
    config, sparsity, grid = checkpoint.config, request.sparsity, request.grid
    tensors = Remapped(checkpoint.state_dict)
    check_blocks(tensors, config, sparsity=sparsity, grid=grid)
    found = compress_blocks(
        load_hollow(checkpoint),
        tokens[:, :-1],
        store,
        tensors=tensors,
        method=request.method,
        sparsity=sparsity,
        grid=grid,
        sequential=request.sequential is not False,
        batch_size=request.batch_size,
        device=place.device,
        dtype=place.dtype,
        progress=progress,
    )
    notes = ()
    if request.method in MASKS:
        notes = ("weights are stored dense, zeros included: today's engines do not speed them up",)
    return Outcome(config, found.tensors, found.errors, found.grids, notes=notes)


def store_key(checkpoint: Checkpoint, tokens: Tensor, request: Request) -> dict[str, Any]:
    """Everything that finished blocks depend on."""
    import hashlib

    text = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]
    return {"checkpoint": fingerprint(checkpoint.path), "tokens": text, **request.to_dict()}


def write_outcome(
    out_dir: Path,
    outcome: Outcome,
    checkpoint: Checkpoint,
    request: Request,
    *,
    data: Mapping[str, Any],
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Fill an empty directory: a litgpt checkpoint, `prune.json`, scales of quantised weights.

    Where layers differ, `front.json` has the network without the zeros that fill them up.

    Returns:
        The content of `prune.json`.
    """
    write_checkpoint(
        out_dir, outcome.tensors, config=outcome.config, source=checkpoint.path, progress=progress
    )
    if outcome.grids:
        from safetensors.torch import save_file

        grids = {f"{name}.scales": scales for name, (scales, _) in outcome.grids.items()}
        grids |= {f"{name}.zeros": zeros for name, (_, zeros) in outcome.grids.items()}
        save_file({name: t.contiguous() for name, t in grids.items()}, out_dir / GRIDS)
    shape = outcome.shape or SubNetwork.from_config(outcome.config)
    num_params = parameter_counter(outcome.config)(shape)
    if outcome.shape is not None:
        entry = FrontEntry(0, shape, {"num_params": num_params})
        front = Front(("num_params",), (entry,), how_measured=request.to_dict())
        (out_dir / FRONT).write_text(front.dump(), encoding="utf-8")
    bits = 16 if request.grid is None else request.grid.bits
    before = Remapped(checkpoint.state_dict)
    after = Remapped(Checkpoint(out_dir, outcome.config, checkpoint.info).state_dict)
    report = {
        "format": 1,
        **request.to_dict(),
        "data": dict(data),
        "num_params": num_params,
        "num_params_before": axes.num_params(checkpoint.config),
        "bytes": model_bytes(after, bits=bits),
        "bytes_before": model_bytes(before),
        **outcome.details,
        "errors": {
            name: {"output_error": found, "plain_output_error": plain}
            for name, (found, plain) in outcome.errors.items()
        },
        "notes": list(outcome.notes),
    }
    (out_dir / PRUNE_REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report
