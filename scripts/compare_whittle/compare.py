"""Side by side with the peer `whittle`; `run.sh` beside this makes its environment and runs

    python scripts/compare_whittle/compare.py [--out runs/compare_whittle]
        [--peer .../venv/bin/python] [--parts step forward switch evaluate search pipeline refusals]

Each side is a process in its own environment that answers requests in turn, so that load on the
machine meets both alike. Times are medians over rounds; ratios are medians of the ratios within a
round. A part that fails is recorded with its message; one that is in `results.json` is not run
again. The table goes to `table.md`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import search
from pipeline import Pipeline
from refusals import Refusals
from table import table

ROOT = Path(__file__).parents[2]
MODELS = ("pythia-14m", "llama-like")


class CallError(Exception):
    """A side answered with an error."""


class Worker:
    """One side, in a process of its own."""

    def __init__(self, name: str, python: Path, log: Path, threads: int) -> None:
        script = Path(__file__).with_name(f"{name}.py")
        self.name = name
        self.process = subprocess.Popen(
            [str(python), str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("a"),
            env=search.environment(threads),
            text=True,
        )

    def call(self, do: str, *args: Any) -> dict[str, Any]:
        """Ask for a method; the answer has `value`, `wall_ms` and `cpu_ms`.

        Raises:
            CallError: with the message of the other side.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, "args": args}) + "\n")
        self.process.stdin.flush()
        # Libraries may print while they are imported, before the worker guards its output.
        line = next((line for line in self.process.stdout if line.startswith("{")), "")
        answer = json.loads(line) if line else {"error": "the process ended"}
        if "error" in answer:
            raise CallError(f"{self.name}: {do}{tuple(args)}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


Calls = dict[str, Callable[[int], dict[str, Any]]]


def in_turn(calls: Calls, rounds: int, divide: int = 1) -> dict[str, Any]:
    """Run all calls in every round, in alternating order, after one round of warming up.

    Args:
        calls: by name; each takes the number of the round. The ratios are to `peer`.
        rounds: how many count.
        divide: what a call repeats inside.

    Returns:
        Per name the median milliseconds of wall-clock and process CPU time, and for all names but
        `peer` the median of its ratios to the peer.
    """
    kept: dict[str, list[dict[str, Any]]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name in sorted(calls, reverse=turn % 2 == 1):
            kept[name].append(calls[name](turn))
    result: dict[str, Any] = {"rounds": rounds, "load": os.getloadavg()[0]}
    for name, answers in kept.items():
        result[name] = found = {"first": answers[0]["value"]}
        for clock in ("wall_ms", "cpu_ms"):
            found[clock] = statistics.median(a[clock] / divide for a in answers[1:])
            pairs = zip(answers[1:], kept["peer"][1:], strict=True)
            found[f"{clock[:-3]}_to_peer"] = statistics.median(
                a[clock] / b[clock] for a, b in pairs
            )
    return result


class Comparison:
    """The parts that the two workers run."""

    def __init__(self, ours: Worker, peer: Worker) -> None:
        self.ours, self.peer = ours, peer

    def _load(self, *args: Any) -> None:
        for side in (self.ours, self.peer):
            side.call(*args)

    def step(self, name: str) -> dict[str, Any]:
        """A sandwich step of four networks on 4 x 256 tokens, all weights trained."""
        self._load("load", name)
        calls: Calls = {
            "ours": lambda turn: self.ours.call("step", turn),
            "alone": lambda turn: self.ours.call("step_alone", turn),
            "peer": lambda turn: self.peer.call("step", turn),
        }
        result = in_turn(calls, 5)
        result["ours"]["peak_mb"] = self.ours.call("peak_mb", "step", 0)["value"]
        result["alone"]["peak_mb"] = self.ours.call("peak_mb", "step_alone", 0)["value"]
        result["peer"]["peak_mb"] = self.peer.call("peak_mb", "step", 0)["value"]
        return result

    def forward(self, name: str, rows: int, columns: int) -> dict[str, Any]:
        """A sub-network's forward pass in place."""
        self._load("load", name)
        repeat = max(1, 512 // (rows * columns))
        args = (2, rows, columns, repeat)
        calls: Calls = {
            "ours": lambda _: self.ours.call("forward", *args),
            "alone": lambda _: self.ours.call("forward_alone", *args),
            "peer": lambda _: self.peer.call("forward", *args),
        }
        return in_turn(calls, 11, repeat)

    def switch(self, do: str, *, short: bool, repeat: int) -> dict[str, Any]:
        """Switching between eight sub-networks at Llama-3.1-8B shapes; first unseen, then again."""
        self._load("load_8b", short)
        unseen: Calls = {
            "ours": lambda turn: self.ours.call(do, turn, 1),
            "peer": lambda turn: self.peer.call(do, turn, 1),
        }
        again: Calls = {
            "ours": lambda _: self.ours.call(do, 0, repeat),
            "peer": lambda _: self.peer.call(do, 0, repeat),
        }
        return {"unseen": in_turn(unseen, 7), "again": in_turn(again, 7, repeat)}

    def evaluate(self, name: str, blocks: int = 8) -> dict[str, Any]:
        """Validation loss of twenty sub-networks on the same blocks of 256 tokens."""
        self._load("load", name)
        values: dict[str, list[list[float]]] = {"ours": [], "peer": []}

        def call(side: Worker, turn: int) -> dict[str, Any]:
            answer = side.call("evaluate", max(0, turn - 1), blocks)
            if turn:
                values[side.name].append(answer["value"])
            return answer

        calls: Calls = {
            "ours": lambda turn: call(self.ours, turn),
            "peer": lambda turn: call(self.peer, turn),
        }
        result = in_turn(calls, 20)
        pairs = list(zip(values["ours"], values["peer"], strict=True))
        result["largest_loss_difference"] = max(abs(a[0] - b[0]) for a, b in pairs)
        result["parameters"] = [[int(a[1]), int(b[1])] for a, b in pairs]
        return result


def run_parts(parts: dict[str, Callable[[], Any]], out: Path) -> dict[str, Any]:
    """Run what is not in `results.json` yet, writing it after every part."""
    path = out / "results.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for name, run in parts.items():
        if name in found and "error" not in found[name]:
            continue
        print(f"-- {name}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            found[name] = run()
        except (CallError, search.CommandError) as error:
            found[name] = {"error": str(error)}
        found[name]["seconds"] = round(time.perf_counter() - start, 1)
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def main() -> None:
    """Read the options, run the parts, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    known = ["step", "forward", "switch", "evaluate", "search", "pipeline", "refusals"]
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "compare_whittle")
    parser.add_argument("--peer", type=Path, default=None, help="the peer's python")
    parser.add_argument("--parts", nargs="+", choices=known, default=known)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--seconds", type=int, default=25, help="of one search")
    options = parser.parse_args()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    python = (options.peer or out / "venv" / "bin" / "python").absolute()
    log = out / "workers.log"
    ours = Worker("ours", Path(sys.executable), log, options.threads)
    peer = Worker("peer", python, log, options.threads)
    both = Comparison(ours, peer)
    commands = search.Commands(out, python, options.threads)
    fronts = search.Fronts(commands, peer.call, options.seconds)
    parts: dict[str, Callable[[], Any]] = {
        "machine": lambda: {"processor": platform.processor(), "threads": options.threads}
    }
    for name in MODELS:
        parts[f"step {name}"] = lambda name=name: both.step(name)
        for rows, columns in ((4, 256), (1, 32)):
            key = f"forward {name} {rows}x{columns}"
            parts[key] = lambda a=(name, rows, columns): both.forward(*a)
        parts[f"evaluate {name}"] = lambda name=name: both.evaluate(name)
    parts["switch 32 layers"] = lambda: both.switch("switch", short=False, repeat=8)
    parts["switch and forward 2 layers"] = lambda: both.switch(
        "switch_forward", short=True, repeat=8
    )
    parts["supernet"] = fronts.prepare
    parts["search"] = fronts.compare
    parts["pipeline"] = Pipeline(commands, peer.call, fronts).compare
    parts["refusals"] = Refusals(commands, peer.call).run
    always = (
        ("machine", "supernet")
        if {"search", "pipeline", "refusals"} & {*options.parts}
        else ("machine",)
    )
    chosen = {k: v for k, v in parts.items() if k.split()[0] in (*always, *options.parts)}
    found = run_parts(chosen, out)
    for side in (ours, peer):
        side.close()
    text = table(found)
    (out / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
