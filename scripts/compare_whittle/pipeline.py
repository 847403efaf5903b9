"""Part of `compare.py`: train and search with either tool, from the same model.

Both start from the same pretrained Pythia-shaped model and train all its weights on the same blocks
with sandwich steps of four networks, each tool with its own way of choosing networks and its own
losses. Ours sorts by importance before and distils, and gets as many fewer steps as that costs, so
that both train for about the same time. Then both search for the same time.
Hypervolumes are of validation loss and parameters, in percent of the joint front's.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from litgpt import Config
from search import CommandError, Commands, Fronts, Point, peer_data, summary

from whittle_nas.assets import bundled_checkpoint
from whittle_nas.data import TextData, load_blocks

PRETRAIN_STEPS, BATCH, LENGTH, LR = 400, 4, 256, 1e-3
STEPS = {"ours": 90, "peer": 150}
SEEDS = (1, 2)


class Pipeline:
    """Runs the commands one after the other and keeps their times."""

    def __init__(
        self, commands: Commands, call_peer: Callable[..., dict[str, Any]], fronts: Fronts
    ) -> None:
        self.commands, self.call_peer, self.fronts = commands, call_peer, fronts
        self.out = commands.out / "pipeline"
        self.source = bundled_checkpoint()

    def compare(self) -> dict[str, Any]:
        """Times of training, and the hypervolume of what was found."""
        self._prepare()
        curves: dict[str, list[list[Point]]] = {"ours": [], "peer": []}
        trained: dict[str, list[float]] = {"ours": [], "peer": []}
        for seed in SEEDS:
            for side, train in (("ours", self._ours), ("peer", self._peer)):
                begun = time.monotonic()
                checkpoint = train(seed)
                trained[side].append(time.monotonic() - begun)
                method = "surrogate" if side == "ours" else "nsga2"
                curves[side].append(self.fronts.search(side, method, seed, checkpoint)[1])
        (self.out / "curves.json").write_text(json.dumps(curves))
        result = summary(curves, self.fronts.seconds)
        for side, seconds in trained.items():
            result[side]["training_s"] = seconds
            result[side]["loss_below"] = {
                share: [_best(curve, share) for curve in curves[side]] for share in (0.4, 0.6, 0.8)
            }
        return {"steps": STEPS, "seconds_of_a_search": self.fronts.seconds, **result}

    def _prepare(self) -> None:
        """Train the full network on the bundled text; write the blocks that the peer trains on."""
        start = self.commands.out / "start"
        config = Config.from_file(start / "model_config.yaml")
        text = TextData(files=[self.source / "train.jsonl"], block_size=LENGTH)
        self.out.mkdir(exist_ok=True)
        torch.save(load_blocks(text, self.source, config=config).tokens, self.out / "train.pt")
        optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": LR}}
        (self.out / "optimizer.yaml").write_text(json.dumps({"optimizer": optimizer}))
        options = ["--sandwich.strategy", "standard", "--optimizer.lr", 3e-3]
        self._finetune(start, self.out / "pretrained", PRETRAIN_STEPS, 0, options)
        self.call_peer("adopt", str(self.out / "pretrained"), str(self.out / "pretrained_peer"))

    def _ours(self, seed: int) -> Path:
        ordered, trained = self.out / f"sorted_{seed}", self.out / f"supernet_{seed}"
        text = ["--data.files", f"[{self.source / 'calibration.jsonl'}]", "--data.num_blocks", 64]
        self._run(
            *(sys.executable, "-m", "whittle_nas", "importance", "--overwrite", "true", *text),
            *("--checkpoint_dir", self.out / "pretrained", "--out_dir", ordered),
        )
        options = ["--optimizer.lr", LR, "--loss.teacher", "in_place"]
        options += ["--sandwich.full_weight", 1]  # as the peer does
        self._finetune(ordered, trained, STEPS["ours"], seed, options)
        return trained

    def _finetune(self, start: Path, out: Path, steps: int, seed: int, options: list[Any]) -> None:
        self._run(
            *(sys.executable, "-m", "whittle_nas", "finetune", "--checkpoint_dir", start),
            *("--out_dir", out, "--overwrite", "true", "--search_space", "v1-pythia"),
            *("--data.files", f"[{self.source / 'train.jsonl'}]", "--data.block_size", LENGTH),
            *("--valid.files", f"[{self.source / 'valid.jsonl'}]", "--lora", "null"),
            *("--batch_size", BATCH, "--trainer.max_steps", steps, "--trainer.max_epochs", 99),
            *("--trainer.gradient_clip_val", 1, "--optimizer.warmup_steps", 20, "--seed", seed),
            *("--validation.every_n_steps", 10 * steps, "--validation.num_networks", 2),
            *("--validation.num_samples", 8, *options),
        )

    def _peer(self, seed: int) -> Path:
        start, out = self.out / "pretrained_peer", self.out / f"supernet_peer_{seed}"
        self._run(
            *(self.commands.python, "-m", "whittle", "pretrain", "pythia-14m"),
            *("--model_config", self._shape(), "--initial_checkpoint_dir", start),
            *("--tokenizer_dir", start, "--out_dir", out, "--precision", "32-true"),
            *("--devices", 1, "--logger_name", "csv", "--seed", seed),
            *(
                "--train.max_tokens",
                STEPS["peer"] * BATCH * LENGTH,
                "--train.global_batch_size",
                BATCH,
            ),
            *("--train.micro_batch_size", BATCH, "--train.max_norm", 1),
            *("--train.lr_warmup_steps", 20, "--train.save_interval", 100_000),
            *("--config", self.out / "optimizer.yaml"),
            *("--eval.interval", 100_000, "--eval.max_iters", 1),
            *(*peer_data(self.commands.valid), "--data.train", self.out / "train.pt"),
        )
        self.call_peer("adopt", str(out / "final"), str(self.out / f"searched_peer_{seed}"))
        return self.out / f"searched_peer_{seed}"

    def _shape(self) -> str:
        """The model's sizes in the form of the peer's option."""
        stored = yaml.safe_load((self.out / "pretrained_peer" / "model_config.yaml").read_text())
        return json.dumps(stored)

    def _run(self, *command: Any) -> None:
        done = self.commands.run(list(command), 1800)
        if done["code"]:
            raise CommandError(f"{done['command']}: {done['message']}")


def _best(curve: list[Point], share: float) -> float:
    """Lowest loss of the trials with at most this share of the largest one's parameters."""
    largest = max(point[3] for point in curve)
    return min(point[2] for point in curve if point[3] <= share * largest)
