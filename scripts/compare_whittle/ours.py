"""Our side, and stand-alone litgpt models, of `scripts/compare_whittle/run.sh`, which starts it.

python scripts/compare_whittle/ours.py      answers requests on stdin, see `common.serve`
"""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "9")

import common
import torch
from litgpt import GPT
from litgpt.utils import chunked_cross_entropy

from whittle_nas.evaluate.perplexity import nats_per_token
from whittle_nas.space import SubNetwork
from whittle_nas.train.batches import Sample
from whittle_nas.train.options import Distillation, LossOptions
from whittle_nas.train.step import Network, Role, accumulate, finish_gradients
from whittle_nas.weights.counting import parameter_counter
from whittle_nas.weights.supernet import SuperNetwork

LABELS = LossOptions(Distillation.none)


class Ours(common.Side):
    """Holds one super-network at a time."""

    def load(self, name: str) -> None:
        """A super-network with random weights, optimisers, and the four networks built alone."""
        self.name = name
        model = GPT(common.config_of(name))
        model.load_state_dict(common.weights(model.config))
        self.supernet = SuperNetwork(model)
        order = self.supernet.info.layer_order
        self.subs = [SubNetwork.uniform(order, **sizes) for sizes in common.four(name)]
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        self.alone = [self._alone(sub) for sub in self.subs]
        self.optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-5) for m in self.alone]

    def _alone(self, sub: SubNetwork) -> GPT:
        model = GPT(self.supernet.plan(sub).config)
        model.load_state_dict({n: t.clone() for n, t in self.supernet.slices(sub).items()})
        return model

    def step(self, seed: int) -> float:
        """A sandwich step; returns the sum of the four mean losses."""
        ids, labels = common.batch(self.name, seed)
        roles = [Role.full, Role.sampled, Role.sampled, Role.smallest]
        networks = [Network(sub, role) for sub, role in zip(self.subs, roles, strict=True)]
        losses = accumulate(self.supernet, Sample(ids, labels), networks, LABELS)
        finish_gradients(list(self.supernet.model.parameters()), labels.numel())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(losses[:, 0].sum()) / labels.numel()

    def step_alone(self, seed: int) -> float:
        """litgpt's own step of each of the four models."""
        ids, labels = common.batch(self.name, seed)
        total = 0.0
        for model, optimizer in zip(self.alone, self.optimizers, strict=True):
            loss = chunked_cross_entropy(model(ids, lm_head_chunk_size=128), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
        return total

    @torch.no_grad()
    def forward(self, at: int, rows: int, columns: int, repeat: int) -> float:
        """A sub-network inside the super-network; returns a checksum of its last logits."""
        ids = common.tokens(self.name, rows, columns, 0)
        for _ in range(repeat):
            logits = self.supernet.subnet(self.subs[at])(ids)
        return float(logits[:, -1].square().mean())

    @torch.no_grad()
    def forward_alone(self, at: int, rows: int, columns: int, repeat: int) -> float:
        """The same sub-network as a model of its own."""
        ids = common.tokens(self.name, rows, columns, 0)
        for _ in range(repeat):
            logits = self.alone[at](ids)
        return float(logits[:, -1].square().mean())

    def evaluate(self, at: int, blocks: int) -> list[float]:
        """Validation loss and parameters of one of the twenty sub-networks."""
        sub = SubNetwork.uniform(self.supernet.info.layer_order, **common.twenty(self.name)[at])
        model = self.supernet.standalone(sub)
        loss = nats_per_token(model, common.tokens(self.name, blocks, 257, 1))
        return [loss, float(parameter_counter(self.supernet.config)(sub))]

    def load_8b(self, short: bool) -> None:
        """Llama-3.1-8B: 32 layers without memory, or two layers with real weights."""
        config = common.config_of("8b-short" if short else "8b")
        if short:
            model = common.filled(lambda: GPT(config))
        else:
            with torch.device("meta"):
                model = GPT(config)
        model._max_seq_length = 2048
        cos, sin = model.rope_cache(device=torch.device("cpu"))
        model.cos, model.sin = (t.bfloat16() for t in (cos, sin))
        self.alone, self.optimizers = [], []
        self.supernet = SuperNetwork(model)
        order = range(config.n_layer)
        self.shapes = [SubNetwork.uniform(order, **s) for s in common.shapes_8b(config.n_layer)]

    def switch(self, at: int, repeat: int) -> None:
        """Make sub-networks ready to run, one after the other."""
        for turn in range(repeat):
            self.supernet.subnet(self.shapes[(at + turn) % 8])

    @torch.no_grad()
    def switch_forward(self, at: int, repeat: int) -> None:
        """Switch and run one token."""
        ids = torch.ones(1, 1, dtype=torch.long)
        for turn in range(repeat):
            self.supernet.subnet(self.shapes[(at + turn) % 8])(ids)


if __name__ == "__main__":
    common.serve(Ours())
