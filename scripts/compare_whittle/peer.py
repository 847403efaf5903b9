"""The peer's side of `scripts/compare_whittle/run.sh`, which starts it in the peer's environment.

    python scripts/compare_whittle/peer.py      answers requests on stdin, see `common.serve`

`Blocks` is the data module that the peer's own commands are given, so that both sides see the same
token blocks.
"""

import os
import shutil
from dataclasses import fields
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "9")

import common
import lightning as L
import torch
import yaml
from litgpt import Config
from litgpt.args import EvalArgs
from litgpt.data import DataModule
from litgpt.utils import chunked_cross_entropy
from torch.utils.data import DataLoader
from whittle.models.gpt import GPT
from whittle.sampling.random_sampler import BaseSampler
from whittle.search_sub_networks import _objective
from whittle.training_strategies import SandwichStrategy


class Blocks(DataModule):
    """Token blocks (N, T + 1) from files that `torch.save` wrote."""

    def __init__(self, valid: str = "", train: str = "") -> None:
        super().__init__()
        self.files = {"valid": valid, "train": train or valid}
        self.batch_size = 4

    def connect(self, tokenizer=None, batch_size: int = 4, max_seq_length: int = -1) -> None:  # noqa: ARG002
        """Told by the commands before the data is asked for."""
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        """Shuffled training blocks."""
        blocks = torch.load(self.files["train"])
        return DataLoader(blocks, batch_size=self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """Validation blocks in order."""
        return DataLoader(torch.load(self.files["valid"]), batch_size=self.batch_size)


class Fixed(BaseSampler):
    """Gives the same sub-networks in turn, and the smallest of them."""

    def __init__(self, members: list[dict]) -> None:
        super().__init__()
        self.members, self.smallest, self.turn = members[:-1], members[-1], 0

    def sample(self) -> dict:
        """The next one."""
        self.turn += 1
        return self.members[(self.turn - 1) % len(self.members)]

    def get_smallest_sub_network(self) -> dict:
        """The smallest."""
        return self.smallest


def in_peer_words(sizes: common.Sizes) -> dict:
    """Arguments of the peer's `set_sub_network`."""
    return {
        "sub_network_n_embd": sizes["n_embd"],
        "sub_network_intermediate_size": sizes["intermediate_size"],
        "sub_network_num_heads": sizes["n_head"],
        "sub_network_n_layers": sizes["n_layer"],
        "sub_network_query_groups": sizes["n_query_groups"],
        "sub_network_head_size": sizes["head_size"],
    }


def in_search_words(sizes: common.Sizes) -> dict:
    """The form of the peer's search, `select_sub_network`."""
    return {
        "embed_dim": sizes["n_embd"],
        "mlp_ratio": sizes["intermediate_size"] / sizes["n_embd"],
        "num_heads": sizes["n_head"],
        "depth": sizes["n_layer"],
        "head_size": sizes["head_size"],
        "n_query_groups": sizes["n_query_groups"],
    }


class Peer(common.Side):
    """Holds one super-network at a time."""

    def adopt(self, source: str, target: str) -> list[str]:
        """Copy a checkpoint directory, without settings that the peer's older litgpt rejects."""
        shutil.copytree(source, target, dirs_exist_ok=True)
        path = Path(target) / "model_config.yaml"
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
        known = {field.name for field in fields(Config)}
        path.write_text(yaml.safe_dump({k: v for k, v in stored.items() if k in known}))
        return sorted(set(stored) - known)

    def load(self, name: str) -> None:
        """The super-network, set up as the peer's training command does."""
        self.name = name
        config = common.config_of(name)
        model = GPT(config)
        model.load_state_dict(common.weights(config))
        self.fabric = L.Fabric(accelerator="cpu", devices=1, precision="32-true")
        self.model = self.fabric.setup(model)
        self.subs = [in_peer_words(sizes) for sizes in common.four(name)]
        self.strategy = SandwichStrategy(
            random_samples=2,
            sampler=Fixed(self.subs[1:]),
            loss_function=chunked_cross_entropy,
            device="cpu",
            fabric=self.fabric,
        )
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.optimizer = self.fabric.setup_optimizers(optimizer)

    def step(self, seed: int) -> float:
        """Its sandwich strategy and an optimiser step, with labels of the next position."""
        self.model.train()
        ids, labels = common.batch(self.name, seed)
        total = self.strategy(self.model, ids, labels, scale_loss=1)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    @torch.no_grad()
    def forward(self, at: int, rows: int, columns: int, repeat: int) -> float:
        """A sub-network inside the super-network; returns a checksum of its last logits."""
        ids = common.tokens(self.name, rows, columns, 0)
        self.model.set_sub_network(**self.subs[at])
        for _ in range(repeat):
            logits = self.model(ids)
        return float(logits[:, -1].square().mean())

    def evaluate(self, at: int, blocks: int) -> list[float]:
        """Validation loss and parameters of one of the twenty, by the objective of its search."""
        data = common.tokens(self.name, blocks, 257, 1)
        self.model.max_seq_length = 256
        loss, count = _objective(
            in_search_words(common.twenty(self.name)[at]),
            self.fabric,
            self.model,
            DataLoader(data, batch_size=4),
            EvalArgs(max_iters=len(data)),
            verbose=False,
        )
        return [loss, float(count)]

    def load_8b(self, short: bool) -> None:
        """Llama-3.1-8B: 32 layers without memory, or two layers with real weights."""
        config = common.config_of("8b-short" if short else "8b")
        if short:
            self.model = common.filled(lambda: GPT(config))
        else:
            with torch.device("meta"):
                self.model = GPT(config)
        self.model._max_seq_length = 2048
        cos, sin = self.model.rope_cache(2048, config.rope_n_elem, torch.device("cpu"))
        self.model.cos, self.model.sin = (t.bfloat16() for t in (cos, sin))
        self.shapes = [in_peer_words(s) for s in common.shapes_8b(config.n_layer)]

    def switch(self, at: int, repeat: int) -> None:
        """Make sub-networks ready to run, one after the other."""
        for turn in range(repeat):
            self.model.set_sub_network(**self.shapes[(at + turn) % 8])

    @torch.no_grad()
    def switch_forward(self, at: int, repeat: int) -> None:
        """Switch and run one token."""
        ids = torch.ones(1, 1, dtype=torch.long)
        for turn in range(repeat):
            self.model.set_sub_network(**self.shapes[(at + turn) % 8])
            self.model(ids)


if __name__ == "__main__":
    common.serve(Peer())
