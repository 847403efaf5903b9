"""What an evaluation costs: against lm-eval's own Hugging Face model, and in place against alone.

    python scripts/bench/bench_evaluate.py [--checkpoint_dir ...] [--tasks a,b] [--limit 300]
        [--batch_size 16] [--rounds 5] [--out evaluate.json]

Both sides answer the same questions in turn within one process; ratios are medians of the ratios
of neighbouring runs, which other load on the machine hardly moves. By default the tasks are those
of ../shared/data, and the checkpoint is its stories260K.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from measuring import in_turn

from whittle_nas.data import load_tokenizer
from whittle_nas.evaluate.encoding import TextEncoder
from whittle_nas.evaluate.harness import LitGPTHarness
from whittle_nas.evaluate.presets import choose_tasks
from whittle_nas.evaluate.tasks import LoadedTask, TaskOptions, load_tasks
from whittle_nas.export.checkpoint import plan_export, write_export
from whittle_nas.space import SubNetwork
from whittle_nas.weights.checkpoint import load_supernet, open_checkpoint

SHARED = Path("../shared/data")


def questions(task: LoadedTask, limit: int) -> tuple[str, list[Any]]:
    """The kind of a task's requests, and the requests."""
    (leaf,) = task.leaves.values()
    leaf.build_all_requests(limit=limit)
    return leaf.instances[0].request_type, leaf.instances


def against_hf(directory: Path, task: LoadedTask, args: argparse.Namespace) -> dict[str, Any]:
    """Our adapter and lm-eval's model on the exported directory: speed and largest difference."""
    from lm_eval.models.huggingface import HFLM

    supernet = load_supernet(directory)
    tokenizer = load_tokenizer(directory, supernet.config)
    kind, requests = questions(task, args.limit)
    with tempfile.TemporaryDirectory() as folder:
        sub = SubNetwork.from_config(supernet.config)
        write_export(Path(folder), plan_export(open_checkpoint(directory), sub, to_hf=True))
        # without its own BOS where the prefix token is added, as in a rolling perplexity
        options = {"add_bos_token": False} if kind == "loglikelihood_rolling" else {}
        reference = HFLM(
            pretrained=folder,
            device="cpu",
            dtype="float32",
            batch_size=args.batch_size,
            **options,
        )
    model = supernet.standalone(sub)

    def ours() -> list[Any]:
        # a new encoder, so that no tokens are left from the run before
        encoder = TextEncoder(tokenizer, directory)
        harness = LitGPTHarness(model, encoder, batch_size=args.batch_size)
        return getattr(harness, kind)(requests, disable_tqdm=True)

    def theirs() -> list[Any]:
        return getattr(reference, kind)(requests, disable_tqdm=True)

    pairs = [
        (a, b) if isinstance(a, tuple) else ((a,), (b,))
        for a, b in zip(ours(), theirs(), strict=True)
    ]
    return {
        "requests": len(requests),
        **in_turn(ours, theirs, args.rounds),
        "largest_difference": max(abs(a[0] - b[0]) for a, b in pairs),
        "greedy_flags_equal": all(a[1:] == b[1:] for a, b in pairs),
    }


def in_place(directory: Path, task: LoadedTask, args: argparse.Namespace) -> dict[str, Any]:
    """Ten sub-networks as views of the super-network against ten exported models."""
    supernet = load_supernet(directory)
    encoder = TextEncoder(load_tokenizer(directory, supernet.config), directory)
    kind, requests = questions(task, args.limit)
    full = supernet.full
    sizes = next(iter(full.shapes)).to_dict()
    subs = [
        SubNetwork.uniform(
            supernet.info.layer_order,
            **sizes,
            n_embd=full.n_embd - full.n_embd * i // (2 * args.subnetworks),
            n_layer=full.n_layer - i % (full.n_layer // 2 + 1),
        )
        for i in range(args.subnetworks)
    ]

    def ask(model: Any) -> None:
        harness = LitGPTHarness(model, encoder, batch_size=args.batch_size)
        getattr(harness, kind)(requests, disable_tqdm=True)

    with tempfile.TemporaryDirectory() as folder:
        alone = []
        for number, sub in enumerate(subs):
            out_dir = Path(folder) / str(number)
            out_dir.mkdir()
            write_export(out_dir, plan_export(open_checkpoint(directory), sub))
            alone.append(load_supernet(out_dir).model)
        # the time of ours includes slicing; that of the others not even loading
        found = in_turn(
            lambda: [ask(supernet.standalone(sub)) for sub in subs],
            lambda: [ask(model) for model in alone],
            args.rounds,
        )
    return {"subnetworks": len(subs), **found}


def main() -> None:
    """Run everything and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint_dir", type=Path, default=SHARED / "checkpoints/stories260K")
    parser.add_argument("--include_path", type=Path, default=SHARED / "lm_eval_tasks")
    parser.add_argument("--tasks", default="local_story_next,local_arc_easy,local_tinystories")
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--subnetworks", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    for name in ("lm_eval", "transformers", "whittle_nas"):
        logging.getLogger(name).setLevel(logging.ERROR)
    options = TaskOptions(limit=args.limit)
    tasks = load_tasks(choose_tasks(args.tasks.split(",")), options, include_path=args.include_path)
    report: dict[str, Any] = {"limit": args.limit, "batch_size": args.batch_size}
    for task in tasks:
        report[task.choice.name] = against_hf(args.checkpoint_dir, task, args)
        print(task.choice.name, json.dumps(report[task.choice.name]), file=sys.stderr, flush=True)
    report["in_place"] = in_place(args.checkpoint_dir, tasks[0], args)
    text = json.dumps(report, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
