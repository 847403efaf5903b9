"""Many sub-networks, many tasks: what is to be done, doing it, and keeping it."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from whittle_nas.data import TokenBlocks, load_tokenizer
from whittle_nas.errors import ConfigError
from whittle_nas.evaluate import store
from whittle_nas.evaluate.encoding import TextEncoder
from whittle_nas.evaluate.harness import LitGPTHarness
from whittle_nas.evaluate.running import TEXT, RunOptions, run_task, run_text
from whittle_nas.evaluate.store import Pair, Result
from whittle_nas.evaluate.tasks import LoadedTask, TaskOptions
from whittle_nas.repair.engine import repair
from whittle_nas.space import SubNetwork
from whittle_nas.weights.checkpoint import Checkpoint, load_supernet
from whittle_nas.weights.identity import fingerprint, tokens_id
from whittle_nas.weights.patch import PatchSource
from whittle_nas.weights.placement import Device
from whittle_nas.weights.supernet import SuperNetwork


@dataclass(frozen=True)
class Text:
    """Plain text whose perplexity is asked for.

    Args:
        label: What it is, for tables.
        blocks: The text, packed.
    """

    label: str
    blocks: TokenBlocks

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens."""
        digest = sha256(self.blocks.tokens.numpy().tobytes())
        digest.update(self.blocks.num_bytes.numpy().tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class ModelOptions:
    """How the model runs.

    Args:
        dtype: Number format of the weights; None: as stored.
        max_length: Context in tokens; None: all that the model has.
        batch_size: Sequences of full length per batch; None: chosen for the device.
        show_progress: Draw progress bars on stderr.
    """

    dtype: torch.dtype | None = None
    max_length: int | None = None
    batch_size: int | None = None
    show_progress: bool = False


@dataclass
class Session:
    """One run of `nas evaluate`: its questions, and the folder with the answers.

    Args:
        checkpoint: The super-network.
        out_dir: Where finished pairs are kept.
        tasks: lm-eval tasks.
        text: Text for perplexity.
        options: What is asked.
        run: How it is counted.
        model: How the model runs.
        calibration: (N, T + 1) text on which sub-networks are repaired first; None: they are not.
        library: What else changes their weights, unless they are repaired; None: nothing.
    """

    checkpoint: Checkpoint
    out_dir: Path
    tasks: Sequence[LoadedTask]
    text: Text | None = None
    options: TaskOptions = field(default_factory=TaskOptions)
    run: RunOptions = field(default_factory=RunOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    calibration: torch.Tensor | None = None
    library: PatchSource | None = None

    def __post_init__(self) -> None:
        limit = self.checkpoint.config.block_size
        if self.model.max_length is not None and not 1 <= self.model.max_length <= limit:
            raise ConfigError(
                f"--max_length {self.model.max_length} must be between 1 and the model's {limit}"
            )
        tokenizer = load_tokenizer(self.checkpoint.path, self.checkpoint.config)
        self.encoder = TextEncoder(tokenizer, self.checkpoint.path)
        self._checkpoint_id = fingerprint(self.checkpoint.path)
        self._supernet: SuperNetwork | None = None

    def pairs(self, subnetworks: Sequence[SubNetwork]) -> list[Pair]:
        """Every task for every sub-network, each pair once."""
        asked = [(task.choice.name, task.fingerprint) for task in self.tasks]
        if self.text is not None:
            asked.insert(0, (TEXT, self.text.fingerprint))
        return [
            Pair(sub, name, self._key(sub, name, content))
            for sub in dict.fromkeys(subnetworks)
            for name, content in asked
        ]

    def find(self, pair: Pair) -> Result | None:
        """The kept result of a pair, if it has all that is asked for."""
        result = store.read(pair, self.out_dir)
        lacks_samples = self.run.log_samples and pair.task != TEXT
        return None if result and lacks_samples and result.samples is None else result

    def compute(
        self,
        pairs: Sequence[Pair],
        device: Device,
        *,
        on_pair: Callable[[Pair, Result], object] | None = None,
    ) -> None:
        """Compute and keep pairs, sub-network by sub-network.

        Args:
            pairs: What to do.
            device: Where to do it; several share the model, see `weights.placement`.
            on_pair: Told every result when it is on disk.
        """
        for sub in dict.fromkeys(pair.subnetwork for pair in pairs):
            harness = self._harness(sub, device, repaired=self.calibration is not None)
            for pair in pairs:
                if pair.subnetwork == sub:
                    result = self._compute(pair, harness)
                    store.write(pair, result, self.out_dir)
                    if on_pair is not None:
                        on_pair(pair, result)

    def about(self, sub: SubNetwork, num_params: int) -> dict[str, Any]:
        """The `config` part of lm-eval's results."""
        return {
            "model": "litgpt",
            "model_args": {
                "checkpoint_dir": str(self.checkpoint.path),
                "checkpoint": self._checkpoint_id,
                "subnetwork": sub.to_dict(),
                **self._repair(),
            },
            "model_num_parameters": num_params,
            "model_dtype": str(self.model.dtype or "as stored"),
            "batch_size": self.model.batch_size or "auto",
            "max_length": self.model.max_length or self.checkpoint.config.block_size,
            "limit": self.options.limit,
            "bootstrap_iters": self.run.bootstrap_iters,
            "gen_kwargs": self.options.gen_kwargs or None,
            "system_instruction": self.options.system_instruction,
            "apply_chat_template": self.options.apply_chat_template,
            "fewshot_as_multiturn": self.options.fewshot_as_multiturn,
            **dict.fromkeys(
                ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed"), self.options.seed
            ),
            "lm_eval_version": version("lm_eval"),
        }

    def _key(self, sub: SubNetwork, task: str, content: str) -> dict[str, Any]:
        """Everything that a result depends on; not the device and the batch size, which round."""
        return {
            "checkpoint": self._checkpoint_id,
            "subnetwork": sub.to_dict(),
            "task": task,
            "content": content,
            "dtype": str(self.model.dtype),
            "max_length": self.model.max_length,
            "bootstrap_iters": self.run.bootstrap_iters,
            **self._repair(),
            **asdict(self.options),
            "lm_eval": version("lm_eval"),
            "litgpt": version("litgpt"),
        }

    def _repair(self) -> dict[str, Any]:
        """What is said of repair where it was asked for, and of candidates where there are any."""
        if self.calibration is not None:
            return {"repair": tokens_id(self.calibration)}
        return {} if self.library is None else {"candidates": self.library.identity()}

    def _harness(self, sub: SubNetwork, device: Device, *, repaired: bool = False) -> LitGPTHarness:
        if self._supernet is None:
            self._supernet = load_supernet(
                self.checkpoint.path, device=device, dtype=self.model.dtype
            )
        patch = None if self.library is None else self.library.patch(sub)
        if repaired and self.calibration is not None:
            patch = repair(self._supernet, sub, self.calibration).patch
        return LitGPTHarness(
            self._supernet.standalone(sub, patch),
            self.encoder,
            batch_size=self.model.batch_size,
            max_length=self.model.max_length,
            seed=self.options.seed,
            show_progress=self.model.show_progress,
        )

    def _compute(self, pair: Pair, harness: LitGPTHarness) -> Result:
        if pair.task == TEXT:
            assert self.text is not None
            return run_text(
                harness.model,
                self.text.blocks,
                self.text.label,
                batch_size=self.model.batch_size,
            )
        task = next(task for task in self.tasks if task.choice.name == pair.task)
        return run_task(harness, task, self.options, self.run)

    def latency_ms(self, subnetworks: Sequence[SubNetwork], device: Device) -> list[float]:
        """Median time of the forward pass of two sequences of 512 tokens, in milliseconds."""
        from whittle_nas.metrics.measured import prefill_latency

        tokens = min(512, self.checkpoint.config.block_size)
        models = (self._harness(sub, device).model for sub in subnetworks)
        return [prefill_latency(model, batch=2, tokens=tokens).median_ms for model in models]


def spread(pairs: Sequence[Pair], costs: Sequence[float], world_size: int) -> list[list[Pair]]:
    """Share pairs between processes, dearest first, each to the one that has the least to do.

    Args:
        pairs: What to do.
        costs: Of each pair, in any unit.
        world_size: How many processes there are.

    Returns:
        The pairs of every process, in their old order.
    """
    loads = [0.0] * world_size
    owners = [0] * len(pairs)
    for number in sorted(range(len(pairs)), key=lambda i: (-costs[i], i)):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += costs[number]
    return [
        [pair for pair, owner in zip(pairs, owners, strict=True) if owner == rank]
        for rank in range(world_size)
    ]
