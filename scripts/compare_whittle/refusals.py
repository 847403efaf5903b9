"""Part of `compare.py`: commands of the peer that do not do what one would expect.

Nothing here is judged from its source: every command is run and its own last words are recorded.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from litgpt import GPT, Config
from search import Commands, peer_data, peer_search

from whittle_nas.assets import bundled_checkpoint
from whittle_nas.weights.checkpoint import write_checkpoint

# Grouped queries, with an MLP wide enough for all of the peer's ratios.
GROUPED = {
    "name": "grouped", "n_layer": 4, "n_embd": 64, "n_head": 8, "n_query_groups": 4,
    "head_size": 8, "intermediate_size": 256, "vocab_size": 1024, "padded_vocab_size": 1024,
    "block_size": 256, "mlp_class_name": "LLaMAMLP", "norm_class_name": "RMSNorm", "bias": False,
    "parallel_residual": False, "rotary_percentage": 1.0,
}  # fmt: skip


class Refusals:
    """Runs them in a directory of their own."""

    def __init__(self, commands: Commands, call_peer: Callable[..., dict[str, Any]]) -> None:
        self.commands, self.call_peer = commands, call_peer
        self.cwd = commands.out / "refusals"

    def _prepare(self) -> None:
        """Checkpoints in the form that the peer's litgpt reads; a JSON file to fine-tune on."""
        out, source, made = self.commands.out, bundled_checkpoint(), self.cwd / "made"
        made.mkdir(parents=True, exist_ok=True)
        config = Config(**GROUPED)
        torch.manual_seed(0)
        write_checkpoint(made, GPT(config).state_dict(), config=config, source=source)
        self.call_peer("adopt", str(made), str(self.cwd / "grouped"))
        self.call_peer("adopt", str(source), str(self.cwd / "narrow"))
        trained = self.cwd / "checkpoints" / "pythia-shaped"
        self.call_peer("adopt", str(out / "supernet"), str(trained))
        (trained / "config.json").write_text('{"tie_word_embeddings": false}\n')
        lines = (source / "train.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"][:600] for line in lines[:128]]
        rows = [{"instruction": t[:20], "input": "", "output": t[20:]} for t in texts if t[20:]]
        (self.cwd / "rows.json").write_text(json.dumps(rows))
        optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}
        (self.cwd / "tune.yaml").write_text(json.dumps({"optimizer": optimizer}))  # JSON is YAML

    def run(self) -> dict[str, Any]:
        """Run all; of the fine-tuning the validation losses are kept."""
        self._prepare()
        found = {n: self.commands.run(c, 240, self.cwd) for n, c in self._tried().items()}
        tuned = found["full fine-tuning (labels)"]
        losses = re.findall(r"iter (\d+): val loss ([0-9.]+)", "\n".join(tuned["said"]))
        tuned["validation_loss"] = {int(step): float(loss) for step, loss in losses}
        if losses:
            (first, before), (last, after) = losses[0], losses[-1]  # the first step's rate is 0
            tuned["message"] = f"validation loss {before} at step {first}, {after} at step {last}"
        for record in found.values():
            record["said"] = record["said"][-12:]
        return found

    def _tried(self) -> dict[str, list[Any]]:
        python, valid = self.commands.python, self.commands.valid
        grouped = self.cwd / "grouped"
        trained = Path("checkpoints") / "pythia-shaped"
        search = ("random_search", 1)
        return {
            "search, grouped queries": peer_search(
                self.commands, grouped, self.cwd / "search_grouped", *search
            ),
            "search, MLP narrower than 4 x n_embd": peer_search(
                self.commands, self.cwd / "narrow", self.cwd / "search_narrow", *search
            ),
            "super-network training, grouped queries": [
                *(python, "-m", "whittle", "pretrain", "grouped"),
                *("--model_config", json.dumps(GROUPED), "--initial_checkpoint_dir", grouped),
                *("--tokenizer_dir", grouped, "--out_dir", self.cwd / "pretrain"),
                *("--precision", "32-true", "--devices", 1, "--logger_name", "csv"),
                *("--train.max_tokens", 20_000, "--train.global_batch_size", 4),
                *("--train.max_norm", 1, *peer_data(valid)),
            ],
            "full fine-tuning (labels)": [
                *(python, "-m", "whittle.full_finetune", trained, "--precision", "32-true"),
                *("--config", self.cwd / "tune.yaml"),
                *("--out_dir", self.cwd / "finetune", "--data", "JSON", "--data.num_workers", 0),
                *("--data.json_path", self.cwd / "rows.json", "--data.val_split_fraction", 0.2),
                *("--train.max_steps", 12, "--train.lr_warmup_steps", 1, "--train.epochs", 50),
                *("--train.global_batch_size", 4, "--train.micro_batch_size", 4),
                *("--train.max_seq_length", 128, "--train.save_interval", 1000),
                *("--eval.interval", 1, "--eval.max_new_tokens", 10, "--eval.max_iters", 5),
            ],
            "importance": [
                python, "-m", "whittle.compute_importance", "--model_id", "pythia-shaped",
            ],
            "fine-tuning command": [python, "-m", "whittle", "finetune", trained],
            "LoRA super-network": [python, "-c", "import whittle.lora"],
        }  # fmt: skip
