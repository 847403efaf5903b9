"""`nas candidates`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from whittle_nas.candidates.options import PartTraining
from whittle_nas.candidates.parts import GridOptions
from whittle_nas.cli.options import DType
from whittle_nas.data.options import TextData
from whittle_nas.errors import ConfigError
from whittle_nas.search.options import CostOptions

# No import for type checkers only: jsonargparse would run it to resolve the signature below.


def candidates(
    *,
    checkpoint_dir: Path,
    out_dir: Path,
    data: TextData = TextData(num_blocks=128),
    grid: GridOptions = GridOptions(),
    rank: int | None = 32,
    train: PartTraining = PartTraining(),
    score_blocks: int = 8,
    costs: CostOptions = CostOptions(),
    batch_size: int = 4,
    devices: int = 1,
    ray_address: str | None = None,
    device: str = "auto",
    dtype: DType = DType.stored,
    overwrite: bool = False,
) -> None:
    """Make cheaper versions of every attention and every MLP, and say what each one costs.

    Each layer may then have the version that suits it: `nas search --method ilp` chooses among them
    under budgets. A smaller part keeps the first heads or neurons, and its output projection is
    fitted to what the whole part gave, by least squares on calibration text. Finished layers are
    kept: after an interruption the same command goes on.

    Args:
        checkpoint_dir: A litgpt checkpoint, best sorted by `nas importance` before.
        out_dir: Directory to write; it must be new or empty, or hold an unfinished library.
        data: Calibration text; an eighth of it is held back and scores.
        grid: Which versions there are.
        rank: Rank of what is added to output projections, which makes the library small; `null`
            keeps whole projections.
        train: Training of every smaller part after its fit, none by default: adapters on all its
            matrices, or the matrices, learn what the whole part gives for the same inputs. Adapters
            make the library larger by their rank.
        score_blocks: Blocks of held-back text on which the loss is measured with one part replaced.
        costs: The load for which memory and FLOPs are written down.
        batch_size: Sequences per forward pass.
        devices: Share the layers between this many processes, each on GPUs of its own, or all on
            the CPU; more than one needs Ray.
        ray_address: Address of a running Ray cluster, over any number of machines that all see both
            directories, to take the devices from; `auto` for the one that this machine belongs to.
        device: `auto`, `cpu`, `cuda`, `cuda:1`; `cuda:0,cuda:1` shares the blocks of the model out
            between several, also `cuda:0,cpu`.
        dtype: Number format of the weights; `stored` is that of the checkpoint.
        overwrite: Replace what is in `out_dir`.
    """
    from whittle_nas.candidates.build import Builder, BuildOptions, checked_grid
    from whittle_nas.candidates.costs import analytic
    from whittle_nas.candidates.library import write_library
    from whittle_nas.candidates.parts import describe
    from whittle_nas.candidates.spread import Work, make_layers
    from whittle_nas.cli.common import (
        check_least,
        progress_bar,
        resolve_devices,
        resolve_dtype,
        warn,
    )
    from whittle_nas.data import load_blocks
    from whittle_nas.repair.options import RepairOptions
    from whittle_nas.weights.checkpoint import load_supernet, open_checkpoint

    check_least(0, **{"train.steps": train.steps})
    check_least(
        1,
        **{"train.rank": train.rank},
        rank=rank,
        score_blocks=score_blocks,
        batch_size=batch_size,
        devices=devices,
    )
    _check_directory(out_dir, overwrite=overwrite)
    checkpoint = open_checkpoint(checkpoint_dir)
    tokens = costs.check(checkpoint.config.block_size)
    if not (data.is_given() or data.sources):
        raise ConfigError("nas candidates needs calibration text: give --data.files")
    text = load_blocks(data, checkpoint.path, config=checkpoint.config)
    placed_on, number_format = resolve_devices(device), resolve_dtype(dtype)
    repair = RepairOptions(batch_size=batch_size)
    options = BuildOptions(grid, rank, score_blocks, repair, train)
    print(describe(checked_grid(checkpoint, options, len(text.tokens))))
    prepare = partial(_prepare, out_dir, overwrite=overwrite)
    on_resume = _say_resumed
    if devices > 1 or ray_address is not None:
        where, depth = (checkpoint.path.absolute(), out_dir.absolute()), checkpoint.config.n_layer
        work = Work(*where, text.tokens, options, placed_on, number_format, overwrite)
        pool = {"workers": devices, "address": ray_address, "warn": warn}
        shown = {"progress": progress_bar, "on_resume": on_resume}
        make_layers(work, depth, prepare=prepare, **pool, **shown)
        on_resume, prepare = (lambda _: None), (lambda: None)
    net = load_supernet(checkpoint.path, device=placed_on, dtype=number_format)
    builder = Builder(net, checkpoint, text.tokens, options)
    prepare()
    library = builder.run(out_dir, about=text.about, progress=progress_bar, on_resume=on_resume)
    number = net.model.lm_head.weight.dtype
    load = {"batch": costs.batch, "tokens": tokens, "dtype": number}
    changed = analytic(library, checkpoint.config, **load)
    write_library(library, changed)
    _report(library, changed, checkpoint)


def _check_directory(out_dir: Path, *, overwrite: bool) -> None:
    """Refuse a finished library and what is none."""
    from whittle_nas.candidates.library import FILE_NAME, LAYER_FILES, PARTS_OF_FILES
    from whittle_nas.weights.files import check_free, contents

    check_free(out_dir, overwrite=True)
    found = [name for name in contents(out_dir) if not PARTS_OF_FILES.fullmatch(name)]
    if overwrite or not found:
        return
    if FILE_NAME in found:
        raise ConfigError(
            f"--out_dir {out_dir} holds a finished library; give a new directory, or --overwrite "
            "true"
        )
    if others := [name for name in found if not LAYER_FILES.fullmatch(name)]:
        raise ConfigError(f"--out_dir {out_dir} is not empty ({others[0]}); give a new one")


def _prepare(out_dir: Path, *, overwrite: bool) -> None:
    from whittle_nas.candidates.library import FILE_NAME, LAYER_FILES, PARTS_OF_FILES
    from whittle_nas.weights.files import contents, remove_run

    out_dir.mkdir(parents=True, exist_ok=True)
    for name in contents(out_dir):
        if PARTS_OF_FILES.fullmatch(name):
            (out_dir / name).unlink(missing_ok=True)
    if overwrite:
        layers = [name for name in contents(out_dir) if LAYER_FILES.fullmatch(name)]
        remove_run(out_dir, (FILE_NAME, *layers))


def _say_resumed(layers: int) -> None:
    print(f"{layers} layers are there already")


def _report(library: Any, costs: Mapping[str, Sequence[Sequence[float]]], checkpoint: Any) -> None:
    """One row per size: what it saves, and what it costs in the best, middle and worst layer."""
    import statistics

    from whittle_nas.candidates.parts import label
    from whittle_nas.cli.common import command_line, print_table

    rows: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for at, (part, choices) in enumerate(zip(library.parts, library.candidates, strict=True)):
        for j, one in enumerate(choices):
            saved = -costs["num_params"][at][j]
            rows.setdefault((part.kind, label(one.sizes)), []).append((saved, one.loss, one.error))
    table = []
    for (kind, size), values in rows.items():
        saved, losses, errors = zip(*values, strict=True)
        spread = min(losses), statistics.median(losses), max(losses)
        if any(saved):
            table.append([kind, size, int(saved[0]), *spread, statistics.median(errors)])
    columns = ["part", "size", "params saved", "loss, best layer", "middle", "worst", "error"]
    base = library.about["made"]["loss"]
    print_table(columns, table, f"rise of the loss ({base:.4g}) with one part replaced")
    size = sum(path.stat().st_size for path in library.path.iterdir() if path.is_file())
    print(f"library of {size / 1e6:,.1f} MB: {library.path}")
    words = (
        "--checkpoint_dir",
        checkpoint.path,
        "--candidates",
        library.path,
        "--out_dir",
        "<dir>",
    )
    command = command_line("nas", "search", "--method", "ilp", *words)
    print(f'search in it with: {command} --data.files <text> --constraints "num_params <= 80%"')
