"""Kill every command at random moments with SIGKILL and see that running it again repairs all.

    python scripts/studies/kill_test.py [--kills 20] [--out_dir runs/kill_test] [--seed 0]

Each command first runs undisturbed. Then the same command line is started in another directory and
killed after a random share of that time, once or twice, and run to its end. Its results must be
those of the undisturbed run, and nothing temporary may be left in or beside them. The last lines
count runs, kills and differences by command; exit status 1 if anything differs. On the bundled
checkpoint, about five minutes on two cores.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "whittle_nas" / "assets" / "pydoc-1m"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def commands(base: Path) -> dict[str, list[str]]:
    """Command lines by name; each reads what the ones before it wrote undisturbed."""
    sorted_dir, supernet, front = base / "importance", base / "finetune", base / "search/front.json"
    text = f"--data.files={MODEL}/valid.jsonl"
    return {
        "importance": [
            "importance", f"--checkpoint_dir={MODEL}", f"--data.files={MODEL}/calibration.jsonl",
            "--data.num_blocks=16", "--report.num_subnetworks=4", "--report.num_blocks=2",
            f"--report.data.files={MODEL}/valid.jsonl",
        ],
        "finetune": [
            "finetune", f"--checkpoint_dir={sorted_dir}", f"--data.files={MODEL}/train.jsonl",
            f"--valid.files={MODEL}/valid.jsonl", "--validation.num_samples=8", "--batch_size=4",
            "--validation.num_networks=2", "--data.block_size=64", "--trainer.max_steps=40",
            "--resume=true", "--trainer.checkpoint_every_n_steps=5",
        ],
        "search": [
            "search", f"--checkpoint_dir={supernet}", text, "--data.block_size=64",
            "--data.num_blocks=8", "--num_trials=20", "--resume=true",
        ],
        "evaluate": [
            "evaluate", f"--checkpoint_dir={supernet}", f"--front={front}", text,
            "--data.num_blocks=8", "--tasks=pydoc", "--include_path=pydoc-1m/tasks",
            "--limit=3",
        ],
        "export": ["export", f"--checkpoint_dir={supernet}", f"--front={front}", "--index=0"],
        "export_hf": [
            "export", f"--checkpoint_dir={supernet}", f"--front={front}", "--index=0",
            "--format=hf",
        ],
    }  # fmt: skip


def tensors_of(path: Path) -> dict[str, list]:
    """Tensors as lists of bytes, whatever file holds them."""
    if path.suffix == ".safetensors":
        tensors = load_file(path)
    else:
        tensors = torch.load(path, weights_only=True)
    return {name: tensor.float().flatten().tolist() for name, tensor in tensors.items()}


def trials_of(path: Path) -> list[list[str]]:
    """Rows without the time that they took."""
    rows = [line.split(",") for line in path.read_text().splitlines()]
    kept = [at for at, name in enumerate(rows[0]) if "seconds" not in name]
    return [[row[at] for at in kept] for row in rows]


def front_of(path: Path) -> list[dict]:
    """Members of a front and what was found for them."""
    return json.loads(path.read_text())["front"]


READERS: dict[str, Callable] = {
    "lit_model.pth": tensors_of,
    "model.safetensors": tensors_of,
    "importance.safetensors": tensors_of,
    "supernet.yaml": lambda path: path.read_bytes(),
    "rpd.json": lambda path: json.loads(path.read_text()),
    "grid.yaml": lambda path: yaml.safe_load(path.read_text()),
    "losses.yaml": lambda path: yaml.safe_load(path.read_text()),
    "trials.csv": trials_of,
    "front.json": front_of,
    "results.csv": trials_of,
    "config.json": lambda path: path.read_bytes(),
}


def start(command: list[str], out_dir: Path) -> subprocess.Popen:
    """`nas` in a process group of its own, so that workers die with it."""
    arguments = [sys.executable, "-m", "whittle_nas", *command, f"--out_dir={out_dir}"]
    log = (out_dir.parent / f"{out_dir.name}.log").open("a")
    return subprocess.Popen(
        arguments, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True
    )


def kill_after(command: list[str], out_dir: Path, seconds: float) -> bool:
    """Whether the process was still running when it was killed."""
    process = start(command, out_dir)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    return False


def differences(found: Path, wanted: Path) -> list[str]:
    """What is wrong with a repaired directory."""
    wrong = [
        name
        for name, read in READERS.items()
        if (wanted / name).exists()
        and (not (found / name).exists() or read(found / name) != read(wanted / name))
    ]
    left = [p.name for p in found.parent.iterdir() if p.name.startswith(f".{found.name}")]
    names = [{p.relative_to(d).as_posix() for p in d.rglob("*")} for d in (found, wanted)]
    extra = [name for name in names[0] ^ names[1] if not name.startswith(("checkpoints", "logs"))]
    unfinished = [name for name in names[0] if name.endswith((".partial", ".lock"))]
    return sorted({*wrong, *left, *extra, *unfinished})


def main() -> None:
    """Kill, run again, compare, count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--out_dir", type=Path, default=Path("runs/kill_test"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    base, rng = options.out_dir.resolve(), random.Random(options.seed)
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    lines, seconds = commands(base), {}
    for name, command in lines.items():
        began = time.perf_counter()
        assert start(command, base / name).wait() == 0, f"see {base / name}.log"
        seconds[name] = time.perf_counter() - began
        print(f"{name}: undisturbed {seconds[name]:.1f} s", flush=True)
    counts = {name: [0, 0, 0] for name in lines}  # runs, kills, differences
    turn = 0
    while sum(kills for _, kills, _ in counts.values()) < options.kills:
        name = list(lines)[turn % len(lines)]
        out_dir = base / f"{name}_{turn}"
        turn += 1
        moments = []
        for _ in range(rng.choice((1, 1, 2))):
            moment = rng.uniform(0.25, 1.0) * seconds[name]
            if kill_after(lines[name], out_dir, moment):
                moments.append(f"{moment:.1f}")
        # What was finished before the signal came may be refused as a place for a new run, which
        # has to leave it as it is and to clear up beside it all the same.
        finished = (out_dir / "run.yaml").exists()
        status = start(lines[name], out_dir).wait()
        status = 0 if finished and status == 2 else status
        wrong = [f"exit {status}"] if status else differences(out_dir, base / name)
        found = (1, len(moments), bool(wrong))
        counts[name] = [old + new for old, new in zip(counts[name], found, strict=True)]
        print(
            f"{name}: killed at {', '.join(moments) or '(never)'} s: {wrong or 'equal'}", flush=True
        )
    for name, (runs, kills, differing) in counts.items():
        print(f"{name:<12} {runs} runs, {kills} kills, {differing} differ")
    runs, kills, differing = (sum(column) for column in zip(*counts.values(), strict=True))
    print(f"{'in all':<12} {runs} runs, {kills} kills, {differing} differ")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
