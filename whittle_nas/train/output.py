"""What a training leaves behind: an ordinary checkpoint, adapters, grid, losses and curves."""

from __future__ import annotations

import csv
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from whittle_nas.plots import plot_training
from whittle_nas.space import SearchSpace, SubNetwork
from whittle_nas.train.fit import LOGS
from whittle_nas.train.prepare import ADAPTERS, TrainedTensors, follow, save_adapters
from whittle_nas.train.run import Trained
from whittle_nas.train.teacher import has_adapters
from whittle_nas.weights.checkpoint import WEIGHTS, write_checkpoint
from whittle_nas.weights.counting import parameter_counter
from whittle_nas.weights.files import PARTIAL, atomic_write_text

GRID, CURVES, LOSSES = "grid.yaml", "curves.png", "losses.yaml"
Curves = dict[str, list[tuple[int, float]]]


def write_outputs(
    out_dir: Path,
    trained: Trained,
    *,
    space: SearchSpace | None,
    training: dict[str, Any],
    by_rank: Mapping[int, Mapping[str, float]],
    describe: Callable[[Path], object] = lambda _: None,
) -> None:
    """Write the merged checkpoint; `lit_model.pth` comes last and so marks it as complete.

    All processes call it: the first one writes, and with sharding the others give their shares.

    Args:
        out_dir: the run's directory.
        trained: the trained super-network.
        space: search space that was trained; None where the whole model alone was.
        training: summary for `supernet.yaml`, to which the last losses are added.
        by_rank: losses with elastic adapters of every rank, none without them.
        describe: adds to the checkpoint's folder before it becomes `out_dir`.
    """
    source, history, networks = trained.checkpoint, trained.history, trained.networks
    if not trained.trainer.is_global_zero:
        if trained.supernet.sharding is not None:
            follow(trained.supernet, source.state_dict())
        return
    write_losses(
        out_dir, source.config, history=history, networks=networks.validated, by_rank=by_rank
    )
    summary = {**training, "valid_nats_per_token": history[max(history)]}
    info = replace(source.info, training=summary)
    if space is not None:
        info = replace(info, search_space=space.to_dict())
    with completing(out_dir) as folder:
        tensors = TrainedTensors(trained.supernet, source.state_dict())
        write_checkpoint(folder, tensors, config=source.config, source=source.path, info=info)
        if has_adapters(trained.supernet.model):
            save_adapters(trained.supernet, folder / ADAPTERS)
        trained.supernet.rest()
        if networks.grid is not None:
            text = yaml.safe_dump(networks.grid.to_dict(), sort_keys=False)
            atomic_write_text(folder / GRID, text)
        describe(folder)


@contextmanager
def completing(out_dir: Path) -> Iterator[Path]:
    """A folder whose files move to the run's directory at the end of the block, weights last."""
    partial = Path(tempfile.mkdtemp(PARTIAL, ".final.", out_dir))
    try:
        yield partial
        names = sorted((path.name for path in partial.iterdir()), key=lambda name: name == WEIGHTS)
        for name in names:
            (partial / name).replace(out_dir / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_losses(
    out_dir: Path,
    config: Any,
    *,
    history: dict[int, dict[str, float]],
    networks: Mapping[str, SubNetwork],
    by_rank: Mapping[int, Mapping[str, float]] | None = None,
) -> None:
    """Write `losses.yaml` and `curves.png`, in which the whole model untouched is a line."""
    count = parameter_counter(config)
    plot_training(
        out_dir / CURVES,
        read_curves(out_dir),
        untouched=history[min(history)]["full"],
        num_params={name: count(sub) for name, sub in networks.items()},
    )
    sizes = {name: {"num_params": count(sub), **sub.to_dict()} for name, sub in networks.items()}
    losses: dict[str, Any] = {"networks": sizes, "nats_per_token": history}
    if by_rank:
        losses["by_rank"] = by_rank
    atomic_write_text(out_dir / LOSSES, yaml.safe_dump(losses, sort_keys=False))


def read_curves(out_dir: Path) -> Curves:
    """Everything that the CSV logs hold, as (step, value) per column.

    A resumed run has a log of its own; from its first step on it replaces what the interrupted
    one had written behind its last checkpoint.
    """
    curves: Curves = defaultdict(list)
    logs = (out_dir / LOGS / "csv").glob("version_*/metrics.csv")
    for path in sorted(logs, key=lambda path: int(path.parent.name.split("_")[1])):
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if None not in row.values()]  # not cut off
        points = [
            (name, int(row["step"]), float(value))
            for row in rows
            for name, value in row.items()
            if name not in ("step", "epoch") and value
        ]
        for kind in ("train/", "val/"):
            steps = [step for name, step, _ in points if name.startswith(kind)]
            for name in (name for name in curves if steps and name.startswith(kind)):
                curves[name] = [point for point in curves[name] if point[0] < min(steps)]
        for name, step, value in points:
            curves[name].append((step, value))
    return dict(curves)
