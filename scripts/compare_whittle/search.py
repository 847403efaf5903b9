"""Parts of `scripts/compare_whittle/compare.py` that run whole commands of both sides.

Both search the same super-network, a Pythia-shaped model that `nas finetune` trained on the bundled
text over the peer's search space, on the same validation blocks, for the same time. The clock
starts when the first trial has ended; what comes before is the start-up time.
"""

import csv
import io
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from litgpt import GPT, Config

from whittle_nas.assets import bundled_checkpoint
from whittle_nas.data import TextData, load_blocks
from whittle_nas.search.pareto import hypervolume, is_on_front
from whittle_nas.weights.checkpoint import write_checkpoint

ROOT = Path(__file__).parents[2]
STEPS = 150
# Ours with its default method; the peer's default is random search, NSGA-II the usual alternative.
RUNS = ("ours surrogate", "peer random_search", "peer nsga2")
SEEDS = (1, 2)
Point = tuple[float, ...]  # seconds, CPU seconds, loss, parameters


class CommandError(Exception):
    """A command failed that the comparison needs."""


def environment(threads: int) -> dict[str, str]:
    """Both sides find the scripts and the package, and use as many threads."""
    path = os.pathsep.join([str(ROOT / "scripts"), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}


@dataclass(frozen=True)
class Commands:
    """Where commands of both sides run.

    Attributes:
        out: directory of all results.
        python: the peer's interpreter.
        threads: of each process.
    """

    out: Path
    python: Path
    threads: int

    @property
    def valid(self) -> Path:
        """Validation blocks (32, 257) for the peer."""
        return self.out / "valid.pt"

    def run(self, command: list[Any], timeout: int, cwd: Path = ROOT) -> dict[str, Any]:
        """Run a command to its end; exit code, what it said and the last line of that."""
        words = list(map(str, command))
        print(f"   {shlex.join(words)[:120]}", file=sys.stderr, flush=True)
        try:
            done = subprocess.run(
                words,
                env=environment(self.threads),
                cwd=cwd,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout,
            )
            code, said = done.returncode, done.stdout.strip()
        except subprocess.TimeoutExpired:
            code, said = None, f"still running after {timeout} s"
        lines = said.splitlines() or [""]
        shown = shlex.join(words).replace(str(self.python), "python").replace(str(self.out), "OUT")
        return {"command": shown, "code": code, "message": lines[-1].strip(), "said": lines}


def peer_data(valid: Path) -> list[Any]:
    """The peer's options for our token blocks."""
    return ["--data", "peer.Blocks", "--data.valid", valid]


def peer_search(
    commands: Commands, checkpoint: Path, where: Path, method: str, seed: int
) -> list[Any]:
    """The peer's search command, which would go on for 100,000 trials."""
    return [
        *(commands.python, "-m", "whittle", "search", checkpoint, "--out_dir", where),
        *("--precision", "32-true", "--logger_name", "csv", *peer_data(commands.valid)),
        *("--search.search_strategy", method, "--search.iterations", 100_000),
        *("--train.max_seq_length", 256, "--seed", seed, "--num_workers", 0),
        *("--save_checkpoints", "false"),
    ]


def our_search(checkpoint: Path, where: Path, method: str, seed: int) -> list[Any]:
    """Our search command for as long."""
    return [
        *(sys.executable, "-m", "whittle_nas", "search", "--checkpoint_dir", checkpoint),
        *("--out_dir", where, "--method", method, "--num_trials", 100_000, "--seed", seed),
        *("--data.files", f"[{bundled_checkpoint() / 'valid.jsonl'}]"),
        *("--data.block_size", 256, "--data.num_blocks", 32),
    ]


class Fronts:
    """Prepares the super-network and runs the searches."""

    def __init__(
        self, commands: Commands, call_peer: Callable[..., dict[str, Any]], seconds: int
    ) -> None:
        self.commands, self.call_peer, self.seconds = commands, call_peer, seconds
        self.out = commands.out

    def compare(self) -> dict[str, Any]:
        """Search with both sides in turn; hypervolume in percent of the joint front's."""
        curves: dict[str, list[list[Point]]] = {name: [] for name in RUNS}
        started: dict[str, list[float]] = {name: [] for name in RUNS}
        for seed in SEEDS:
            for name in RUNS:
                print(f"   {name}, seed {seed}", file=sys.stderr, flush=True)
                side, method = name.split()
                checkpoint = self.out / ("supernet_peer" if side == "peer" else "supernet")
                start_up, curve = self.search(side, method, seed, checkpoint)
                curves[name].append(curve)
                started[name].append(start_up)
        (self.out / "search_curves.json").write_text(json.dumps(curves))
        result = summary(curves, self.seconds)
        for name, seconds in started.items():
            result[name]["start_up_s"] = statistics.median(seconds)
        return {"seconds_of_a_search": self.seconds, "load": os.getloadavg()[0], **result}

    def prepare(self) -> dict[str, Any]:
        """Train the super-network on the bundled text and write the blocks."""
        source = bundled_checkpoint()
        sizes = {"block_size": 256, "vocab_size": 1024, "padded_vocab_size": 1024}
        config = Config.from_name("pythia-14m", **sizes)
        blocks = TextData(files=[source / "valid.jsonl"], block_size=256, num_blocks=32)
        torch.save(load_blocks(blocks, source, config=config).tokens, self.commands.valid)
        start, trained = self.out / "start", self.out / "supernet"
        start.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model = GPT(config)
        model.apply(model._init_weights)
        write_checkpoint(start, model.state_dict(), config=config, source=source)
        command = [
            *(sys.executable, "-m", "whittle_nas", "finetune", "--checkpoint_dir", start),
            *("--out_dir", trained, "--overwrite", "true", "--data.valid_fraction", 0.02),
            *("--data.files", f"[{source / 'train.jsonl'}]", "--data.block_size", 256),
            *("--search_space", "v1-pythia", "--lora", "null", "--optimizer.lr", 2e-3),
            *("--batch_size", 4, "--trainer.max_steps", STEPS),
            *("--validation.every_n_steps", 10 * STEPS),
        ]
        done = self.commands.run(command, 600)
        if done["code"]:
            raise CommandError(f"{done['command']}: {done['message']}")
        left_out = self.call_peer("adopt", str(trained), str(self.out / "supernet_peer"))
        return {"steps": STEPS, "settings_unknown_to_the_peer": left_out["value"]}

    def search(
        self, side: str, method: str, seed: int, checkpoint: Path
    ) -> tuple[float, list[Point]]:
        """Run one search until its time is over; seconds until the first trial, and all trials."""
        where = self.out / "searches" / f"{side}_{method}_{seed}_{int(time.time())}"
        command, file = our_search(checkpoint, where, method, seed), "trials.csv"
        if side == "peer":
            command = peer_search(self.commands, checkpoint, where, method, seed)
            file = "metrics.csv"
        where.parent.mkdir(exist_ok=True)
        words, begun = list(map(str, command)), time.monotonic()
        with where.with_suffix(".log").open("w") as log:
            env = environment(self.commands.threads)
            process = subprocess.Popen(words, env=env, stdout=log, stderr=log, cwd=ROOT)
            try:
                points = watch(process, where, file, self.seconds)
            finally:
                process.kill()
                process.wait()
        if not points:
            raise CommandError(f"{shlex.join(words)} made no trial; see {log.name}")
        first, first_cpu = points[0][:2]
        return first - begun, [(at - first, cpu - first_cpu, *rest) for at, cpu, *rest in points]


def watch(process: subprocess.Popen[bytes], where: Path, name: str, seconds: float) -> list[Point]:
    """Read the file of trials as it grows, until the time after the first one is over."""
    points: list[Point] = []
    clock = psutil.Process(process.pid)
    while process.poll() is None and (not points or time.monotonic() - points[0][0] < seconds):
        time.sleep(0.02)
        path = next(where.rglob(name), None) if where.is_dir() else None
        if path is None:
            continue
        text = path.read_text(encoding="utf-8")
        rows = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))
        try:
            used = clock.cpu_times()
        except psutil.NoSuchProcess:
            break
        for row in rows[len(points) :]:
            size = row.get("num_params") or row["parameters"]
            values = (float(row["val_loss"]), float(size))
            points.append((time.monotonic(), used.user + used.system, *values))
    return points


def summary(curves: dict[str, list[list[Point]]], seconds: float) -> dict[str, Any]:
    """Hypervolume of every search after the same seconds of wall-clock and of CPU time."""
    points = np.array([p[2:] for runs in curves.values() for curve in runs for p in curve])
    front = points[is_on_front(points)]
    reference = front.max(axis=0)
    best = hypervolume(front, reference)
    cpu = min(curve[-1][1] for runs in curves.values() for curve in runs)
    found: dict[str, Any] = {"cpu_seconds": cpu, "joint_front": front.tolist()}
    for name, runs in curves.items():
        shares: dict[str, list[float]] = {"wall": [], "cpu": []}
        for curve in runs:
            for clock, at, limit in (("wall", 0, seconds), ("cpu", 1, cpu)):
                seen = np.array([p[2:] for p in curve if p[at] <= limit])
                shares[clock].append(100 * hypervolume(seen, reference) / best)
        found[name] = {
            "hypervolume_percent": shares["wall"],
            "hypervolume_percent_equal_cpu": shares["cpu"],
            "trials": [len(curve) for curve in runs],
            "largest_loss": max(runs[0], key=lambda p: p[3])[2],
            "mean_parameters": [float(np.mean([p[3] for p in curve])) for curve in runs],
        }
    return found
