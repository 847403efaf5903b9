"""Layers made by several processes, each with the model and the text on devices of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from whittle_nas.candidates.build import Builder, BuildOptions
from whittle_nas.candidates.library import layer_file
from whittle_nas.cluster import Lost, Workers, as_seen_by_a_worker, bound, threads_each
from whittle_nas.errors import ConfigError
from whittle_nas.progress import Progress, no_progress
from whittle_nas.weights.checkpoint import load_supernet, open_checkpoint


@dataclass(frozen=True)
class Work:
    """Everything that a process needs to make layers.

    Attributes:
        checkpoint_dir: the super-network.
        out_dir: directory of the library; all processes see it under this path.
        tokens: (N, T + 1) calibration text in blocks.
        options: how candidates are made.
        placed_on: devices of the model, see `weights.placement`.
        dtype: number format of the weights; None: as stored.
        overwrite: make all layers, whatever is there.
        threads: CPU threads of torch; None: as they are.
    """

    checkpoint_dir: Path
    out_dir: Path
    tokens: torch.Tensor
    options: BuildOptions
    placed_on: tuple[torch.device, ...]
    dtype: torch.dtype | None = None
    overwrite: bool = False
    threads: int | None = None


class LayerMaker:
    """A `Builder` in a worker."""

    def __init__(self, work: Work) -> None:
        """Load the weights, and refuse a directory with layers of another kind.

        Raises:
            ConfigError: as `Builder` does.
        """
        if work.threads is not None:
            torch.set_num_threads(work.threads)
        net = load_supernet(work.checkpoint_dir, device=work.placed_on, dtype=work.dtype)
        checkpoint = open_checkpoint(work.checkpoint_dir)
        self._out_dir = work.out_dir
        self._builder = Builder(net, checkpoint, work.tokens, work.options)
        if not work.overwrite:
            self._builder.finished(work.out_dir)

    def ready(self) -> bool:
        """Answers when the constructor has ended: workers are waited for with it."""
        return True

    def make(self, layer: int) -> None:
        """Write a layer.

        Raises:
            ConfigError: as `Builder` does.
        """
        self._builder.make(self._out_dir, layer)


def make_layers(
    work: Work,
    depth: int,
    *,
    workers: int,
    address: str | None = None,
    prepare: Callable[[], None] = lambda: None,
    progress: Progress = no_progress,
    on_resume: Callable[[int], None] = lambda _: None,
    warn: Callable[[str], None] = lambda _: None,
) -> None:
    """Make the layers that are not there; each worker takes the next one when it is idle.

    Args:
        work: what they do.
        depth: layers of the model.
        workers: how many; no more than there are layers to make.
        address: a running Ray cluster, see `Workers`.
        prepare: makes the directory ready, when the workers have started and nothing was refused.
        progress: shows the layers.
        on_resume: told how many layers were there.
        warn: takes sentences for the user.

    Raises:
        ConfigError: as `Workers` and `Builder` do, and if a layer is not seen from here.
    """
    files = {layer: layer_file(work.out_dir, layer) for layer in range(depth)}
    missing = [layer for layer in files if work.overwrite or not files[layer].is_file()]
    if not missing:
        prepare()
        return
    workers = min(workers, len(missing))
    placed_on, gpus = as_seen_by_a_worker(work.placed_on)
    own = replace(work, placed_on=placed_on, threads=threads_each(workers, placed_on))
    pool = Workers(
        bound(LayerMaker, own), "make", count=workers, gpus=gpus, address=address, warn=warn
    )
    try:
        prepare()
        if len(missing) < depth:
            on_resume(depth - len(missing))
        for layer in missing:
            pool.submit(layer)
        for _ in progress(missing, "making candidates", len(missing)):
            layer, result = pool.next()
            if isinstance(result, Lost):
                raise ConfigError(f"--devices: layer {layer} was not made: {result.reason}")
    finally:
        pool.close()
    if unseen := [str(file) for file in files.values() if not file.is_file()]:
        raise ConfigError(
            f"--devices: {unseen[0]} was made and is not here: all machines must see --out_dir "
            "under the same path"
        )
