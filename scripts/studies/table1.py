"""Every method of `nas prune` and our own networks in one harness: rows, table and picture.

    python scripts/studies/table1.py rows                      the names of the rows, in order
    python scripts/studies/table1.py row <name> <out> ...      what is missing of one row
    python scripts/studies/table1.py table <out>               table and picture of what is there

`table1.sh` runs all of it. A row is a folder with a checkpoint and `row.json`; a pass that is in
there is not run again.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import whittle_nas as nas
from whittle_nas.reading import read_json, read_yaml

TASKS = {
    "hellaswag": "acc_norm",
    "piqa": "acc",
    "arc_easy": "acc_norm",
    "winogrande": "acc",
    "lambada_openai": "acc",
}
LESS = (20, 10, 30)  # per cent of the parameters that go, the most telling first
MASKS = ("magnitude", "wanda", "sparsegpt")
# Of the parameters of SmolLM2-135M, 79 % are in blocks. Depth and heads and neurons are shares of
# those, and LLM-Pruner takes them from 24 of the 30 layers. SliceGPT writes a second table of
# tokens, and with a basis per block its shortcut matrices: so much more of the channels must go.
CHANNELS = {
    "slicegpt_global": {10: 0.256, 20: 0.339, 30: 0.421},
    "slicegpt": {10: 0.314, 20: 0.388, 30: 0.46},
}
SCALE = {
    "minitron": 1.0,
    "shortgpt": 1.263,
    "shortened_llama": 1.263,
    "shortened_llama_taylor": 1.263,
    "laco": 1.263,
    "flap": 1.263,
    "llm_pruner": 1.579,
}
PASSES = ("model", "text", "tasks", "latency", "recovered", "recovered_text", "recovered_tasks")


@dataclass(frozen=True)
class Row:
    """How one model is made.

    Attributes:
        name: of the row, and of its folder.
        label: of its method in the table.
        prune: options of `nas prune`; none for what is not made by it.
        source: the row whose checkpoint it starts from; None for the whole model.
        pick: which of the search's budgets, for ours.
    """

    name: str
    label: str
    prune: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = None
    pick: int | None = None


def rows() -> list[Row]:
    """All rows, in the order in which they are worth the time."""
    found = [Row("dense", "the whole model")]
    for less in LESS:
        found.append(Row(f"ours-{less}", "ours: search, repair", pick=LESS.index(less)))
        for method in (*CHANNELS, *SCALE):
            scaled = round(SCALE.get(method, 0) * less / 100, 4)
            options: dict[str, Any] = {
                "method": method,
                "sparsity": CHANNELS[method][less] if method in CHANNELS else scaled,
            }
            if method == "laco":  # four layers in one, as in the paper, leave nothing of this model
                options["laco"] = {"threshold": 0.5, "merge_layers": 2}
            found.append(Row(f"{method}-{less}", method, options))
        if less == LESS[0]:
            for sparsity in ("0.5", "2:4"):
                found += [
                    Row(
                        f"{method}-{sparsity.replace(':', 'of')}",
                        f"{method} {sparsity}",
                        {"method": method, "sparsity": sparsity},
                    )
                    for method in MASKS
                ]
            for bits in (4, 3):
                found += [_rounded(method, bits) for method in ("rtn", "gptq")]
    found += [
        _rounded(method, 4, source=f"ours-{less}")
        for less in sorted(LESS)
        for method in ("rtn", "gptq")
    ]
    return found


def _rounded(method: str, bits: int, source: str | None = None) -> Row:
    """Quantised; the group fits every width that our search chooses."""
    options = {"method": method, "bits": bits, "group_size": 64 if source is None else 32}
    before = "" if source is None else f"{source}+"
    label = f"{'' if source is None else 'ours, then '}{method} {bits} bits"
    return Row(f"{before}{method}-{bits}", label, options, source)


@dataclass(frozen=True)
class Settings:
    """What is the same in every row."""

    out: Path
    checkpoint: Path
    sorted: Path
    picks: Path
    data: Path
    calibration: int
    blocks: int
    limit: int
    repeats: int
    steps: int
    lr: float
    dtype: str

    def calibrating(self) -> dict[str, Any]:
        """Calibration text."""
        return {
            "files": [str(self.data / "calib/c4_demo.jsonl")],
            "num_blocks": self.calibration,
            "block_size": 512,
        }


def run_row(row: Row, given: Settings, passes: Iterable[str]) -> dict[str, Any]:
    """Do what is missing of a row; each pass is noted as soon as it is done."""
    folder = given.out / row.name
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "row.json"
    known = read_json(file) if file.is_file() else {"name": row.name, "label": row.label}
    for name in passes:
        if name in known or (name != "model" and "model" not in known):
            continue
        if "skipped" in known and name.startswith("recovered"):
            continue
        start, load = time.perf_counter(), os.getloadavg()[0]
        try:
            found = _PASSES[name](row, folder, given)
        except Exception as error:
            if name not in ("model", "recovered"):
                raise
            found, known["skipped"] = None, f"{name}: {error}"
            print(f"{row.name} {known['skipped']}", file=sys.stderr)
        if found is not None:
            known[name] = {
                **found,
                "seconds": round(time.perf_counter() - start, 1),
                "load": round(load, 1),
            }
        file.write_text(json.dumps(known, indent=1) + "\n")
        print(f"{row.name}: {name} {json.dumps(known.get(name))[:300]}", flush=True)
    return known


def _make(row: Row, folder: Path, given: Settings) -> dict[str, Any]:
    """The compressed checkpoint."""
    model, text = folder / "model", given.calibrating()
    if row.pick is not None:
        names = [one["name"] for one in read_yaml(given.picks)]
        nas.export(
            given.sorted,
            model,
            subnetworks=str(given.picks),
            name=names[row.pick],
            repair=True,
            data=text,
            overwrite=True,
        )
    elif row.prune:
        source = given.checkpoint if row.source is None else given.out / row.source / "model"
        free = row.prune["method"] in ("magnitude", "rtn")
        nas.prune(source, None if free else text, out_dir=model, overwrite=True, **row.prune)
    report = model / "prune.json"
    if report.is_file():
        found = read_json(report)
        return {"num_params": found["num_params"], "bytes": found["bytes"]}
    count = nas.load(_model_of(row, folder, given)).num_params
    return {"num_params": count, "bytes": 2 * count}


def _model_of(row: Row, folder: Path, given: Settings) -> Path:
    return given.checkpoint if row.name == "dense" else folder / "model"


def _text(model: Path, out: Path, given: Settings) -> dict[str, Any]:
    """Perplexity of WikiText, and of web text of another file than the calibration's."""
    found = {}
    for name, file, column in (
        ("wikitext", "wikitext2/test_docs.jsonl", "text"),
        ("c4", "calib/c4_pf.jsonl", "prefix"),
    ):
        data = {
            "files": [str(given.data / file)],
            "column": column,
            "block_size": 512,
            "num_blocks": given.blocks,
        }
        table = nas.evaluate(model, data, out_dir=out / name, overwrite=True)
        line = table[table.metric == "nats_per_token"].iloc[0]
        found |= {f"{name}_nats": float(line["value"]), f"{name}_stderr": float(line["stderr"])}
    return found


def _tasks(model: Path, out: Path, given: Settings) -> dict[str, Any]:
    """Accuracy of the local tasks."""
    table = nas.evaluate(
        model,
        tasks=[f"local_{name}" for name in TASKS],
        limit=given.limit,
        dtype=given.dtype,
        include_path=str(given.data / "lm_eval_tasks"),
        out_dir=out,
    )
    found: dict[str, Any] = {}
    for name, metric in TASKS.items():
        line = table[(table.task == f"local_{name}") & (table.metric == metric)].iloc[0]
        found[name] = [float(line["value"]), float(line["stderr"]), int(line["n_samples"])]
    return found


def _latency(row: Row, folder: Path, given: Settings) -> dict[str, Any]:
    """Prefill of 512 tokens, and decoding; networks with zeros run without them."""
    from whittle_nas.cli.parser import run
    from whittle_nas.cli.profile import profile

    model, front = _model_of(row, folder, given), folder / "model" / "front.json"
    words = [
        "--checkpoint_dir",
        str(model),
        "--batch",
        "1",
        "--tokens",
        "512",
        "--repeats",
        str(given.repeats),
        "--out_dir",
        str(folder / "profile"),
        "--overwrite",
        "true",
    ]
    run("profile", profile, words + (["--front", str(front)] if front.is_file() else []))
    found = read_json(folder / "profile" / "profile.json")["subnetworks"]
    own = next((one for one in found if one["name"].startswith("front")), found[0])
    return {key: own[key] for key in ("latency_ms", "decode_ms_per_token")}


_PRECISION = {"stored": {}, "bfloat16": {"precision": "bf16-mixed"}}


def _recover(row: Row, folder: Path, given: Settings) -> dict[str, Any] | None:
    """The same steps, text and adapters for all; zeros stay zeros."""
    if row.name == "dense" or row.prune.get("bits") or row.prune.get("method") == "slicegpt":
        return None  # nothing to recover, integers, or no engine that trains it
    zeros = row.prune.get("method") in (*MASKS, "flap", "llm_pruner")
    nas.finetune(
        folder / "model",
        {
            "files": [str(given.data / "calib/c4_demo.jsonl")],
            "block_size": 256,
            "valid_fraction": 0.05,
        },
        out_dir=folder / "recovered",
        sandwich={"strategy": "standard"},
        loss={"teacher": str(given.checkpoint)},
        lora={"r": 16, "alpha": 16},
        keep_zeros=zeros,
        optimizer={"lr": given.lr, "warmup_steps": given.steps // 10},
        trainer={"max_steps": given.steps, **_PRECISION[given.dtype]},
        batch_size=4,
        overwrite=True,
    )
    return {"steps": given.steps, "trained": "LoRA", "dtype": given.dtype}


_PASSES = {
    "model": _make,
    "text": lambda row, folder, given: _text(_model_of(row, folder, given), folder / "text", given),
    "tasks": lambda row, folder, given: _tasks(
        _model_of(row, folder, given), folder / "tasks", given
    ),
    "latency": _latency,
    "recovered": _recover,
    "recovered_text": lambda _row, folder, given: _recovered(_text, folder, given),
    "recovered_tasks": lambda _row, folder, given: _recovered(_tasks, folder, given),
}


def _recovered(score: Any, folder: Path, given: Settings) -> dict[str, Any] | None:
    if not (folder / "recovered" / "lit_model.pth").is_file():
        return None
    return score(folder / "recovered", folder / f"recovered{score.__name__}", given)


def main() -> None:
    """Run one of the three parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("rows")
    parts.add_parser("table").add_argument("out", type=Path)
    one = parts.add_parser("row")
    one.add_argument("name", choices=[row.name for row in rows()], metavar="name")
    one.add_argument("out", type=Path)
    for option in ("checkpoint", "sorted", "picks", "data"):
        one.add_argument(f"--{option}", type=Path, required=True)
    for option, default in (
        ("calibration", 64),
        ("blocks", 16),
        ("limit", 500),
        ("repeats", 10),
        ("steps", 100),
    ):
        one.add_argument(f"--{option}", type=int, default=default)
    one.add_argument("--lr", type=float, default=2e-4)
    one.add_argument("--dtype", choices=list(_PRECISION), default="stored")
    one.add_argument("--passes", nargs="+", default=PASSES, choices=PASSES)
    given = vars(parser.parse_args())
    part = given.pop("part")
    if part == "rows":
        print("\n".join(row.name for row in rows()))
    elif part == "table":
        from table1_report import write

        write(given["out"], [row.name for row in rows()], TASKS)
    else:
        name, passes = given.pop("name"), given.pop("passes")
        run_row(next(row for row in rows() if row.name == name), Settings(**given), passes)


if __name__ == "__main__":
    main()
