"""Options that fit a model's size and a device: what `nas init` writes and `nas run` fills in."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from whittle_nas.cli.shipped import read_path
from whittle_nas.errors import ConfigError

_SMALL, _LARGE = 50_000_000, 1_000_000_000  # parameters
_ROWS = 8  # of a step; micro-batches are smaller where memory is


def model_config(checkpoint_dir: str) -> Any:
    """The litgpt config of a checkpoint, without loading, converting or downloading it.

    Raises:
        ConfigError: if nothing of that name is here and litgpt's list lacks it, too.
    """
    from litgpt import Config

    from whittle_nas.export.hf_read import litgpt_config, says_tied
    from whittle_nas.weights.checkpoint import WEIGHTS, open_checkpoint, read_model_config
    from whittle_nas.weights.tying import tied

    path = Path(read_path("checkpoint_dir", checkpoint_dir))
    for directory in (path, Path("checkpoints") / path):
        if (directory / WEIGHTS).is_file():  # the weights say whether the head is the table
            return open_checkpoint(directory).config
        if (directory / "model_config.yaml").is_file():
            return read_model_config(directory / "model_config.yaml")
        if (directory / "config.json").is_file():
            config = litgpt_config(directory)[0]
            return tied(config) if says_tied(directory) else config
    for name in (checkpoint_dir, *path.parts[::-1]):  # an id of the hub, or litgpt's own name
        with contextlib.suppress(ValueError):
            return Config.from_name(name)
    raise ConfigError(
        f"--checkpoint_dir {checkpoint_dir} is no checkpoint here and not in litgpt's list "
        "(`litgpt download list`); download it first"
    )


def stage_defaults(config: Any) -> dict[str, dict[str, Any]]:
    """Options of each command for a model of this size, by their flat names."""
    from whittle_nas.weights.axes import num_params

    size = num_params(config)
    tokens = min(config.block_size, 128 if size < _SMALL else 512)
    number = {"dtype": "bfloat16"} if size >= _LARGE else {}
    # What is trained, how long and how fast the command chooses itself.
    finetune: dict[str, Any] = {"data.block_size": tokens, "batch_size": _ROWS}
    if size >= _LARGE:
        finetune["trainer.precision"] = "bf16-mixed"
    return {
        "importance": {"data.num_blocks": 64 if size < _SMALL else 128, **number},
        "finetune": finetune,
        "finetune-supernet": finetune,
        "search": {
            "data.block_size": tokens,
            "data.num_blocks": 32 if size < _SMALL else 64,
            "num_trials": 60 if size < _SMALL else 100,
            **number,
        },
        "evaluate": {"data.num_blocks": 64, **number},
        "export": {},
    }


def fitted(
    config: Any, options: dict[str, Any], memory: int, *, apart: bool = False
) -> tuple[dict[str, Any], int]:
    """Training options that fit a device, and the bytes that they need there.

    Rows per forward pass are halved, then activations recomputed; a step keeps its rows. What
    needs more than the device has even so is returned with what it needs.

    Args:
        config: litgpt config.
        options: of `nas finetune`, as of `stage_defaults`.
        memory: bytes of the device, of which a tenth stays free.
        apart: as of `estimate_memory`.
    """
    needed = 0
    for recompute in (False, True):
        rows = options["batch_size"]
        while rows:
            needed = _training_bytes(
                config, options, memory, rows=rows, recompute=recompute, apart=apart
            )
            if needed <= 0.9 * memory:
                changed = {"batch_size": rows}
                if rows < options["batch_size"]:
                    changed["trainer.accumulate_grad_batches"] = options["batch_size"] // rows
                if recompute:
                    changed["checkpoint_blocks"] = True
                return options | changed, needed
            rows //= 2
    return options | {"batch_size": 1, "checkpoint_blocks": True}, needed


def _training_bytes(
    config: Any, options: dict[str, Any], memory: int, *, rows: int, recompute: bool, apart: bool
) -> int:
    from whittle_nas.train.memory import choose_adapters, estimate_memory
    from whittle_nas.train.options import LoraOptions, LossOptions, Weights

    def needed(adapters: LoraOptions | None) -> int:
        return estimate_memory(
            config,
            adapters,
            batch=rows,
            tokens=options["data.block_size"],
            precision=options.get("trainer.precision", "32-true"),
            loss=LossOptions(),
            checkpoint_blocks=recompute,
            apart=apart,
        ).total

    chosen = choose_adapters(LoraOptions(), Weights.auto, lambda: needed(None), memory, config)
    return needed(chosen)
