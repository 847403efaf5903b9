"""Reading a front for a checkpoint: one check of whose it is, for every command."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import isfile  # False, not an error, for what no path can be
from pathlib import Path
from typing import Any

from whittle_nas.errors import ConfigError
from whittle_nas.space.front import Front, read_front
from whittle_nas.space.rules import violations


def open_front(checkpoint: Any, path: Path, *, option: str = "--front") -> Front:
    """Read a front that was searched on a checkpoint, or on one that became it by training.

    Args:
        checkpoint: `weights.checkpoint.Checkpoint` of the super-network.
        path: `front.json`.
        option: that named it, for messages.

    Raises:
        ConfigError: if it can't be read, or is that of another checkpoint: other sizes, weights in
            another order, or other weights that no training made of the same ones.
    """
    front = read_front(path, checkpoint.info.layer_order, option=option)
    config, info = checkpoint.config, checkpoint.info
    fits = not any(violations(e.subnetwork, config, info.head_channels) for e in front.entries)
    if not (fits and _is_origin(checkpoint, front)):
        raise ConfigError(
            f"{option} {path} belongs to another checkpoint "
            f"({front.checkpoint_dir or 'unknown'}) than --checkpoint_dir {checkpoint.path}"
        )
    return front


def is_front(content: Any) -> bool:
    """Whether the content of a file is a front, and not a list of sizes or a grid."""
    return isinstance(content, dict) and "front" in content


def _is_origin(checkpoint: Any, front: Front) -> bool:
    """Whether the weights are those that were searched, or came from them by training."""
    from whittle_nas.weights.checkpoint import MODEL_CONFIG, WEIGHTS, open_checkpoint
    from whittle_nas.weights.identity import fingerprint

    origin = Path(front.checkpoint_dir)
    there = bool(front.checkpoint_dir)
    there = there and all(isfile(origin / name) for name in (WEIGHTS, MODEL_CONFIG))
    if there and fingerprint(origin) == fingerprint(checkpoint.path):
        return True
    order = list(checkpoint.info.layer_order)
    if not front.candidates and not _takes_first(front, order):
        return False
    if not there:
        return True  # it was moved; sizes and layers fit
    searched = open_checkpoint(origin)
    same_order = searched.info.importance == checkpoint.info.importance
    same_order = same_order and list(searched.info.layer_order) == order
    return same_order and checkpoint.info.training is not None


def _takes_first(front: Front, order: Sequence[int]) -> bool:
    """Whether equal blocks are the most important layers, as those of a search space are.

    A program that chooses from candidates drops any layer.
    """
    subs = (entry.subnetwork for entry in front.entries)
    return all(sub.sizes() is None or set(sub.layers) == set(order[: sub.n_layer]) for sub in subs)
