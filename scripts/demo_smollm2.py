"""What demo_smollm2.sh needs beside the commands: timing, generating, one table."""

from __future__ import annotations

import argparse
import csv
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from whittle_nas.reading import read_json, read_yaml

# What imports torch stands in the functions that need it: every stage starts this script.

TIMES = ("stage", "seconds", "peak_gib", "load_before")
PROMPTS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write a sentence about a cat.",
)
DENSE = "untouched"  # the row of the checkpoint as it came
TIMED = ("prefill ms", "decode ms/token")
WEIGHTS = "lit_model.pth"
MARKS = (("o", "#0072B2"), ("s", "#D55E00"), ("^", "#009E73"))  # told apart by the colour-blind


def timed(times: Path, stage: str, command: Sequence[str]) -> int:
    """Run a command and add a line to `times.csv`; peak memory is that of its largest process."""
    load, start = os.getloadavg()[0], time.perf_counter()
    code = subprocess.run(command).returncode
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    name = stage if code == 0 else f"{stage} (exit {code})"
    new = not times.exists()
    with times.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([TIMES] if new else [])
        writer.writerow((name, f"{seconds:.1f}", f"{peak:.2f}", f"{load:.2f}"))
    return code


def collect(out: Path, routes: Sequence[str]) -> None:
    """Write `picks.yaml`: the choices of all searches, each named `route+pick`."""
    from whittle_nas.weights.files import atomic_write_text

    picks = []
    for route in routes:
        for pick in read_yaml(out / f"searched-{route}" / "picks.yaml"):
            sizes = {key: value for key, value in pick.items() if key != "candidates"}
            picks.append({**sizes, "name": f"{route}+{pick['name']}"})
    atomic_write_text(out / "picks.yaml", yaml.safe_dump(picks, sort_keys=False))


def names(out: Path) -> list[str]:
    """Of the networks that were chosen."""
    return list(dict.fromkeys(pick["name"] for pick in read_yaml(out / "picks.yaml")))


def generate(out: Path, checkpoint: Path) -> None:
    """Write `generation.md`: answers of the untouched model and of both exports of each network."""
    parts = []
    for name in ("", *names(out)):
        folder = out / f"litgpt-{name}" if name else checkpoint
        answers = {"litgpt": [_litgpt(folder, prompt) for prompt in PROMPTS]}
        if name:
            answers["transformers"] = _transformers(out / f"hf-{name}")
        for tool, texts in answers.items():
            parts.append(f"### {name or DENSE}, {tool}\n")
            parts += [f"- {p} **{t}**" for p, t in zip(PROMPTS, texts, strict=True)] + [""]
    text = "\n".join(parts)
    (out / "generation.md").write_text(text, encoding="utf-8")
    print(text)


def _litgpt(folder: Path, prompt: str) -> str:
    """Greedy answer of `litgpt generate`, in the checkpoint's own prompt style."""
    program = Path(sys.executable).with_name("litgpt")
    options = ["--prompt", prompt, "--max_new_tokens", "40", "--temperature", "0", "--top_k", "1"]
    run = subprocess.run(
        [str(program), "generate", str(folder), *options], capture_output=True, text=True
    )
    if run.returncode:
        raise SystemExit(f"litgpt generate {folder} failed:\n{run.stderr}")
    answer = run.stdout.rpartition(prompt)[2]  # behind what litgpt prints of its options
    return _one_line(answer.rpartition("assistant\n")[2])


def _transformers(folder: Path) -> list[str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Layers of different sizes bring a file of code, which the export has just written.
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = model.config.tie_word_embeddings
    assert tied == (embedding.weight.data_ptr() == head.weight.data_ptr())
    found = []
    for prompt in PROMPTS:
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        else:
            text = prompt
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        out = model.generate(**ids, max_new_tokens=40, do_sample=False)
        answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        found.append(_one_line(answer))
    return found


def _one_line(text: str) -> str:
    return " ".join(text.split())


def table(out: Path, checkpoint: Path) -> str:
    """The demo's table, and that of its times, in Markdown."""
    from whittle_nas.weights.axes import num_params
    from whittle_nas.weights.checkpoint import open_checkpoint

    profiled = read_json(out / "profiled" / "profile.json", label="profile")["subnetworks"]
    costs = {row["name"]: row for row in profiled}
    untouched = num_params(open_checkpoint(checkpoint).config)  # a rotation unties the head
    rows = [(DENSE, checkpoint, {**profiled[0], "num_params": untouched}, [""] * 2, "evaluated")]
    for name in names(out):
        folder = out / f"trained-{name.replace('+', '/')}"
        history = read_yaml(folder / "losses.yaml")["nats_per_token"]
        ends = [f"{history[step]['full']:.3f}" for step in (min(history), max(history))]
        rows.append((name, folder, costs[name], ends, f"evaluated-{name}"))
    tasks = list(_scores(out / "evaluated")["full"])
    lines = [["network", "parameters", "MB", "loss before training", "after it", *tasks, *TIMED]]
    for name, folder, cost, losses, scored in rows:
        scores = _scores(out / scored)["full"]
        size = [f"{cost['num_params']:,}", f"{(folder / WEIGHTS).stat().st_size / 1e6:.0f}"]
        times = [f"{cost[key]:.1f}" for key in ("latency_ms", "decode_ms_per_token")]
        lines.append([name, *size, *losses, *(scores.get(task, "") for task in tasks), *times])
    with (out / "times.csv").open(newline="", encoding="utf-8") as file:
        stages = [list(row) for row in csv.reader(file)]
    return f"{_markdown(lines)}\n\n{_markdown(stages)}\n"


def picture(out: Path) -> None:
    """Write `front.png`: loss on the test text against measured latency, one curve per route."""
    from matplotlib.figure import Figure

    profiled = read_json(out / "profiled" / "profile.json", label="profile")["subnetworks"]
    latency = {row["name"]: row["latency_ms"] for row in profiled}
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    ax = figure.subplots()
    curves: dict[str, list[tuple[float, float]]] = {}
    for name in names(out):
        loss = _test_loss(out / f"evaluated-{name}")
        curves.setdefault(name.partition("+")[0], []).append((latency[name], loss))
    for (route, points), (marker, color) in zip(curves.items(), MARKS, strict=False):
        x, y = zip(*sorted(points), strict=True)
        ax.plot(x, y, marker=marker, color=color, label=route, drawstyle="steps-post")
    star = {"marker": "*", "markersize": 14, "color": "black", "linestyle": "none"}
    whole = _test_loss(out / "evaluated")
    original = profiled[0]["latency_ms"]
    ax.plot([original], [whole], label="the original", **star)
    ways = (lambda ms: 100 * ms / original, lambda percent: percent * original / 100)
    ax.secondary_xaxis("top", functions=ways).set_xlabel("% of the original's time")
    ax.set(xlabel="prefill of 256 tokens, ms", ylabel="loss on WikiText-2, nats per token")
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(out / "front.png", dpi=110)


def _test_loss(folder: Path) -> float:
    """Nats per token on the test text."""
    scores = _scores(folder)["full"]
    return float(scores["text"].partition(" ")[0])


def _scores(folder: Path) -> dict[str, dict[str, str]]:
    """`value ± standard error` by network and task: its accuracy, or else the first metric."""
    found: dict[str, dict[str, str]] = {}
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            scores = found.setdefault(row["subnetwork"], {})
            label = row["task"].removeprefix("local_")
            if label not in scores or row["metric"] == "acc":
                error = f" ± {float(row['stderr']):.3f}" if _is_number(row["stderr"]) else ""
                scores[label] = f"{float(row['value']):.3f}{error}"
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, f"|{'---|' * len(rows[0])}", *rest])


def main() -> int:
    """One of the helpers, by its name."""
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_subparsers(dest="what", required=True)
    one = what.add_parser("timed")
    one.add_argument("times", type=Path)
    one.add_argument("stage")
    one.add_argument("command", nargs=argparse.REMAINDER)
    for name in ("names", "collect", "generate", "table"):
        one = what.add_parser(name)
        one.add_argument("out", type=Path)
        if name == "collect":
            one.add_argument("routes", nargs="+")
        elif name != "names":
            one.add_argument("checkpoint", type=Path)
    given = parser.parse_args()
    if given.what == "timed":
        return timed(given.times, given.stage, given.command)
    if given.what == "names":
        print(*names(given.out))
    elif given.what == "collect":
        collect(given.out, given.routes)
    elif given.what == "generate":
        generate(given.out, given.checkpoint)
    else:
        text = table(given.out, given.checkpoint)
        (given.out / "table.md").write_text(text, encoding="utf-8")
        picture(given.out)
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
