"""Parts of `scripts/compare_whittle.py` that run whole commands of both sides.

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

ROOT = Path(__file__).parents[1]
STEPS = 150
# Ours with its default method; the peer's default is random search, NSGA-II the usual alternative.
RUNS = ("ours surrogate", "peer random_search", "peer nsga2")
SEEDS = (1, 2)
Point = tuple[float, float, float, float]  # seconds, CPU seconds, loss, parameters


class CommandError(Exception):
    """A command failed that the comparison needs."""


def environment(threads: int) -> dict[str, str]:
    """Both sides find the scripts and the package, and use as many threads."""
    path = os.pathsep.join([str(ROOT / "scripts"), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}


class Fronts:
    """Prepares the files and runs the commands."""

    def __init__(
        self,
        out: Path,
        python: Path,
        call_peer: Callable[..., dict[str, Any]],
        threads: int,
        seconds: int,
    ) -> None:
        self.out, self.python, self.call_peer = out, python, call_peer
        self.env, self.seconds = environment(threads), seconds
        self.valid = out / "valid.pt"

    def compare(self) -> dict[str, Any]:
        """Search with both sides in turn; hypervolume in percent of the joint front's."""
        self._prepare()
        curves: dict[str, list[list[Point]]] = {name: [] for name in RUNS}
        started: dict[str, list[float]] = {name: [] for name in RUNS}
        for seed in SEEDS:
            for name in RUNS:
                print(f"   {name}, seed {seed}", file=sys.stderr, flush=True)
                start_up, curve = self._search(*name.split(), seed)
                curves[name].append(curve)
                started[name].append(start_up)
        (self.out / "search_curves.json").write_text(json.dumps(curves))
        result = summary(curves, self.seconds)
        for name, seconds in started.items():
            result[name]["start_up_s"] = statistics.median(seconds)
        return {"seconds_of_a_search": self.seconds, "load": os.getloadavg()[0], **result}

    def _prepare(self) -> None:
        source = bundled_checkpoint()
        sizes = {"block_size": 256, "vocab_size": 1024, "padded_vocab_size": 1024}
        config = Config.from_name("pythia-14m", **sizes)
        blocks = TextData(files=[source / "valid.jsonl"], block_size=256, num_blocks=32)
        torch.save(load_blocks(blocks, source, config=config).tokens, self.valid)
        start, trained = self.out / "start", self.out / "supernet"
        if not (start / "lit_model.pth").is_file():
            torch.manual_seed(0)
            model = GPT(config)
            model.apply(model._init_weights)
            start.mkdir(exist_ok=True)
            write_checkpoint(start, model.state_dict(), config=config, source=source)
        if not (trained / "lit_model.pth").is_file():
            options = [
                *("--checkpoint_dir", start, "--out_dir", trained, "--overwrite", "true"),
                *("--data.files", f"[{source / 'train.jsonl'}]", "--data.block_size", 256),
                *("--data.valid_fraction", 0.02, "--search_space", "v1-pythia"),
                *("--lora", "null", "--optimizer.lr", 2e-3, "--batch_size", 4),
                *("--trainer.max_steps", STEPS, "--validation.every_n_steps", 10 * STEPS),
            ]
            done = self._run([sys.executable, "-m", "whittle_nas", "finetune", *options], 600)
            if done["code"]:
                raise CommandError(f"{done['command']}: {done['message']}")
        self.call_peer("adopt", str(trained), str(self.out / "supernet_peer"))
        self.call_peer("adopt", str(source), str(self.out / "grouped_peer"))

    def _search(self, side: str, method: str, seed: int) -> tuple[float, list[Point]]:
        """Run one search until its time is over; seconds until the first trial, and all trials."""
        where = self.out / "searches" / f"{side}_{method}_{seed}_{int(time.time())}"
        if side == "ours":
            command, file = self._our_search(where, method, seed), "trials.csv"
        else:
            command, file = self._peer_search("supernet_peer", where, method, seed), "metrics.csv"
        where.parent.mkdir(exist_ok=True)
        log = where.with_suffix(".log").open("w")
        begun = time.monotonic()
        process = subprocess.Popen(command, env=self.env, stdout=log, stderr=log, cwd=ROOT)
        try:
            points = watch(process, where, file, self.seconds)
        finally:
            process.kill()
            process.wait()
        if not points:
            raise CommandError(f"{shlex.join(command)} made no trial; see {log.name}")
        first, first_cpu = points[0][:2]
        curve = [(at - first, cpu - first_cpu, *rest) for at, cpu, *rest in points]
        return first - begun, curve  # type: ignore[return-value]

    def _our_search(self, where: Path, method: str, seed: int) -> list[str]:
        options = [
            *("--checkpoint_dir", self.out / "supernet", "--out_dir", where, "--method", method),
            *("--data.files", f"[{bundled_checkpoint() / 'valid.jsonl'}]"),
            *("--data.block_size", 256, "--data.num_blocks", 32, "--seed", seed),
            *("--num_trials", 100_000),
        ]
        return [sys.executable, "-m", "whittle_nas", "search", *map(str, options)]

    def _peer_search(self, name: str, where: Path, method: str, seed: int) -> list[str]:
        options = [
            *("--out_dir", where, "--precision", "32-true", "--logger_name", "csv"),
            *("--data", "compare_whittle_peer.Blocks", "--data.valid", self.valid),
            *("--search.search_strategy", method, "--search.iterations", 100_000),
            *("--train.max_seq_length", 256, "--seed", seed, "--num_workers", 0),
            *("--save_checkpoints", "false"),
        ]
        command = [self.python, "-m", "whittle", "search", self.out / name, *options]
        return list(map(str, command))

    def refusals(self) -> dict[str, Any]:
        """Commands of the peer that do not run as one would expect, with their own messages."""
        self._prepare()
        cwd = self.out / "refusals"
        shared = cwd / "checkpoints" / "pydoc"
        shared.mkdir(parents=True, exist_ok=True)
        self.call_peer("adopt", str(self.out / "supernet_peer"), str(shared))
        (shared / "config.json").write_text('{"tie_word_embeddings": false}\n')
        grouped, python = self.out / "grouped_peer", str(self.python)
        data = ["--data", "compare_whittle_peer.Blocks", "--data.valid", self.valid]
        tried = {
            "search, grouped queries": self._peer_search("grouped_peer", cwd / "s", RUNS[1][5:], 1),
            "super-network training, grouped queries": [
                *(python, "-m", "whittle", "pretrain", "pydoc-1m", "--model_config"),
                *(grouped / "model_config.yaml", "--initial_checkpoint_dir", grouped),
                *("--tokenizer_dir", grouped, "--out_dir", cwd / "p", "--precision", "32-true"),
                *("--devices", 1, "--logger_name", "csv", "--train.max_tokens", 20_000),
                *("--train.global_batch_size", 4, "--train.max_norm", 1, *data),
            ],
            "importance": [python, "-m", "whittle.compute_importance", "--model_id", "pydoc"],
            "fine-tuning": [python, "-m", "whittle", "finetune", "--checkpoint_dir", shared],
            "LoRA super-network": [python, "-c", "import whittle.lora"],
        }
        return {name: self._run(list(map(str, c)), 120, cwd) for name, c in tried.items()}

    def _run(self, command: list[Any], timeout: int, cwd: Path = ROOT) -> dict[str, Any]:
        """Run a command to its end; exit code and the last line of what it said."""
        words = list(map(str, command))
        print(f"   {shlex.join(words)[:120]}", file=sys.stderr, flush=True)
        try:
            done = subprocess.run(
                words, env=self.env, cwd=cwd, capture_output=True, text=True, timeout=timeout
            )
            code, said = done.returncode, done.stderr.strip() or done.stdout.strip()
        except subprocess.TimeoutExpired:
            code, said = None, f"still running after {timeout} s"
        lines = said.splitlines() or [""]
        shown = shlex.join(words).replace(str(self.python), "python").replace(str(self.out), "OUT")
        return {"command": shown, "code": code, "message": lines[-1], "tail": lines[-12:]}


def watch(
    process: subprocess.Popen[bytes], where: Path, name: str, seconds: float
) -> list[tuple[float, ...]]:
    """Read the file of trials as it grows, until the time after the first one is over."""
    points: list[tuple[float, ...]] = []
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
            "full_network_loss": max(runs[0], key=lambda p: p[3])[2],
        }
    return found
