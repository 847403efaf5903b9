"""Running `nas evaluate`: the folder, the processes, the order of things."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from whittle_nas.cli.candidates import Candidate
from whittle_nas.cli.common import is_first_process
from whittle_nas.cli.evaluation_report import Evaluated, headline_of, write_report
from whittle_nas.data import Part, TextData, load_blocks
from whittle_nas.errors import ConfigError
from whittle_nas.evaluate.session import Session, Text, spread
from whittle_nas.evaluate.store import PAIRS, Pair, Result
from whittle_nas.weights.counting import parameter_counter
from whittle_nas.weights.files import check_free, remove_run


def check_directory(out_dir: Path) -> None:
    """Finished pairs in `out_dir` are welcome, other files are not.

    Raises:
        ConfigError: if `out_dir` holds something else.
    """
    check_free(out_dir, overwrite=(out_dir / PAIRS).is_dir())


def forget_pairs(out_dir: Path) -> None:
    """Remove finished pairs; the first new one makes the directory again."""
    if is_first_process():
        remove_run(out_dir, [PAIRS])


def read_text(data: TextData | None, checkpoint: Any) -> Text | None:
    """The text behind the data options, packed."""
    if data is None:
        return None
    blocks = load_blocks(data, checkpoint.path, config=checkpoint.config, part=Part.VALID)
    return Text(", ".join(source.label for source in data.parts()), blocks)


def check_processes(placed_on: Sequence[Any], devices: int) -> None:
    """Refuse several processes that run on several devices each.

    Raises:
        ConfigError: naming the options.
    """
    if devices > 1 and len(placed_on) > 1:
        raise ConfigError(
            f"--devices {devices} gives each process one device, and --device names "
            f"{len(placed_on)}: leave one of the two options out"
        )


def compute(
    session: Session, candidates: Sequence[Candidate], placed_on: Sequence[Any], devices: int
) -> bool:
    """Compute what is not there yet; True in the process that has to report.

    Args:
        session: what is asked.
        candidates: whom.
        placed_on: devices of the model in a single process.
        devices: processes that share the work.
    """
    pairs = session.pairs([candidate.subnetwork for candidate in candidates])
    todo = [pair for pair in pairs if session.find(pair) is None]
    if len(todo) < len(pairs):
        _say(f"{len(pairs) - len(todo)} of {len(pairs)} pairs are finished already")
    labels = {candidate.subnetwork: candidate.label for candidate in reversed(candidates)}

    def tell(pair: Pair, result: Result) -> None:
        _say(f"{labels[pair.subnetwork]} {pair.task}: {_headlines(session, pair, result)}")

    if devices == 1:
        session.compute(todo, placed_on, on_pair=tell)
        return True
    # the list was made before the processes part: none of them has finished anything by then
    fabric = _launch(placed_on[0], devices)
    costs = [float(_num_params(session, pair.subnetwork)) for pair in todo]
    mine = spread(todo, costs, fabric.world_size)[fabric.global_rank]
    session.compute(mine, fabric.device, on_pair=tell)
    fabric.barrier()
    return fabric.is_global_zero


def _launch(device: Any, devices: int) -> Any:
    """Start the other processes; each runs this command up to this line."""
    import torch
    from lightning import Fabric
    from lightning.fabric.strategies.ddp import DDPStrategy

    if device.type == "cuda" and devices > torch.cuda.device_count():
        raise ConfigError(f"--devices {devices}: there are {torch.cuda.device_count()} GPUs")
    # the first process may wait for hours at the end; gloo, since only that is communicated
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(days=30))
    fabric = Fabric(accelerator=device.type, devices=devices, strategy=strategy)
    fabric.launch()
    return fabric


def _num_params(session: Session, sub: Any) -> int:
    return parameter_counter(session.checkpoint.config)(sub)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _headlines(session: Session, pair: Pair, result: Result) -> str:
    score = headline_of(session, pair.task, result)
    return f"{'no number' if score is None else score} ({result.seconds:.1f} s)"


def report(session: Session, candidates: Sequence[Candidate], timed_on: Any) -> None:
    """Write and print the results.

    Args:
        session: what was asked.
        candidates: whom.
        timed_on: devices to time the sub-networks on; None: what a search measured, if it did.
    """
    latencies = [candidate.metrics.get("latency_ms") for candidate in candidates]
    if timed_on is not None:
        latencies = session.latency_ms([c.subnetwork for c in candidates], timed_on)
    write_report(
        session,
        [
            Evaluated(
                label=candidate.label,
                num_params=_num_params(session, candidate.subnetwork),
                latency_ms=latency,
                pairs=session.pairs([candidate.subnetwork]),
                measured=candidate.metrics,
            )
            for candidate, latency in zip(candidates, latencies, strict=True)
        ],
    )
