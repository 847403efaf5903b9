"""Asking one sub-network one task."""

import contextlib
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lm_eval import evaluator

from whittle_nas.data import TokenBlocks
from whittle_nas.errors import ConfigError
from whittle_nas.evaluate.harness import LitGPTHarness
from whittle_nas.evaluate.perplexity import text_quality
from whittle_nas.evaluate.store import Result
from whittle_nas.evaluate.tasks import LoadedTask, TaskOptions

TEXT = "text"  # the name under which the perplexity of plain text stands among the tasks


@dataclass(frozen=True)
class RunOptions:
    """What changes how answers are counted, not what is asked.

    Args:
        bootstrap_iters: Resamplings for standard errors that have no formula; 0: none.
        log_samples: Keep the answer to every question.
        confirm_run_unsafe_code: Let tasks run the code that the model wrote.
    """

    bootstrap_iters: int = 1000
    log_samples: bool = False
    confirm_run_unsafe_code: bool = False

    def __post_init__(self) -> None:
        if self.bootstrap_iters < 0:
            raise ConfigError(f"--bootstrap_iters {self.bootstrap_iters} must be 0 or more")


def run_task(
    harness: LitGPTHarness, task: LoadedTask, options: TaskOptions, run: RunOptions
) -> Result:
    """Ask all questions of a task.

    Raises:
        ConfigError: A task that runs code, unless that is allowed.
    """
    unsafe = [name for name, leaf in task.leaves.items() if getattr(leaf, "UNSAFE_CODE", False)]
    if unsafe and not run.confirm_run_unsafe_code:
        raise ConfigError(
            f"task {unsafe[0]!r} runs code that the model writes; allow it with "
            "--confirm_run_unsafe_code true"
        )
    start = time.perf_counter()
    _seed(options.seed)
    with _quiet():
        results: Any = evaluator.evaluate(
            harness,
            task.parts,
            limit=options.limit,  # pyright: ignore[reportArgumentType] - a share is fine, too
            bootstrap_iters=run.bootstrap_iters,
            log_samples=run.log_samples,
            system_instruction=options.system_instruction,
            apply_chat_template=options.apply_chat_template,
            fewshot_as_multiturn=options.apply_chat_template and options.fewshot_as_multiturn,
            confirm_run_unsafe_code=run.confirm_run_unsafe_code,
        )
    samples = results.pop("samples", None)
    return Result(dict(results), time.perf_counter() - start, samples)


def run_text(
    model: Any, blocks: TokenBlocks, label: str, *, batch_size: int | None = None
) -> Result:
    """Perplexity of packed text, in the form of an lm-eval result.

    Args:
        model: A plain `litgpt.GPT`.
        blocks: The text.
        label: What it is, for tables.
        batch_size: Blocks per batch; None: chosen for the device.
    """
    start = time.perf_counter()
    found = text_quality(model, blocks, batch_size=batch_size)
    ratio = found.nats_per_token_stderr / found.nats_per_token if found.nats_per_token else 0.0
    values = {
        "nats_per_token": (found.nats_per_token, found.nats_per_token_stderr),
        # first order: d exp(x) = exp(x) dx
        "perplexity": (found.perplexity, found.perplexity * found.nats_per_token_stderr),
        "bits_per_byte": (found.bits_per_byte, found.bits_per_byte * ratio),
    }
    metrics: dict[str, Any] = {"name": TEXT, "alias": label, "sample_len": found.num_blocks}
    for name, (value, stderr) in values.items():
        metrics[f"{name},none"] = value
        metrics[f"{name}_stderr,none"] = "N/A" if math.isnan(stderr) else stderr
    results = {
        "results": {TEXT: metrics},
        "group_subtasks": {},
        "configs": {
            TEXT: {"task": TEXT, "text": label, "block_size": blocks.block_size, **blocks.about}
        },
        "versions": {TEXT: 1},
        "n-shot": {TEXT: 0},
        "higher_is_better": {TEXT: dict.fromkeys(values, False)},
        "n-samples": {TEXT: {"original": found.num_blocks, "effective": found.num_blocks}},
    }
    return Result(results, time.perf_counter() - start)


def _seed(seed: int) -> None:
    """Tasks may draw from any of the global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep stdout for the table, and bootstrap in this process.

    lm-eval prints there, and forks one worker per core for a second's work.
    """
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
