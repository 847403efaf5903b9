"""`nas init`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from whittle_nas.errors import ConfigError


def init(
    *,
    checkpoint_dir: str,
    recipe: Path = Path("recipe.yaml"),
    out_dir: str | None = None,
    train: str | None = None,
    valid: str | None = None,
    budget: str = "num_params <= 60%",
    device: str = "auto",
    memory_gib: float | None = None,
    overwrite: bool = False,
) -> None:
    """Write a commented recipe for `nas run`: a checkpoint, a device and a budget.

    It says what the training will need and whether that fits the device. Where it does not, the
    recipe sorts and searches without training. Nothing is downloaded or loaded.

    Args:
        checkpoint_dir: A litgpt or Hugging Face directory, or an id of the hub.
        recipe: The file to write.
        out_dir: Where the stages will write; by default `runs/<name of the checkpoint>`.
        train: Text file to train on and to calibrate with: JSON lines with a `text`, or plain text.
        valid: Text file to search with; by default a tenth of `train`.
        budget: What is exported: the best under this, such as "num_params <= 60%" or
            "num_params <= 6e9, latency_ms <= 40".
        device: Where it will run: `auto`, `cpu`, `cuda`.
        memory_gib: Memory of that device; by default what this machine's has.
        overwrite: Replace the file.
    """
    from whittle_nas.cli.common import resolve_device
    from whittle_nas.cli.defaults import fitted, model_config, stage_defaults
    from whittle_nas.search.objectives import QUALITY, check_metric, is_cost
    from whittle_nas.space.front import parse_constraints
    from whittle_nas.train.memory import device_bytes
    from whittle_nas.weights.files import atomic_write_text

    if recipe.exists() and not overwrite:
        raise ConfigError(f"--recipe {recipe} is there; give another name, or --overwrite true")
    for name, path in (("train", train), ("valid", valid)):
        if path is not None and not Path(path).is_file():
            raise ConfigError(f"--{name} {path} is not a file")
    if valid is not None and train is None:
        raise ConfigError(f"--valid {valid} needs --train, too")
    limits = parse_constraints(budget, option="--budget")
    named = dict.fromkeys(check_metric(limit.metric, "--budget") for limit in limits)
    config = model_config(checkpoint_dir)
    options = stage_defaults(config)
    if {*named} - {*QUALITY, "num_params"}:  # only what a search has measured can be a budget
        cost = () if any(map(is_cost, named)) else ("num_params",)
        options["search"]["objectives"] = ",".join(dict.fromkeys(("val_loss", *named, *cost)))
    if memory_gib is None:
        memory = device_bytes(resolve_device(device))
    else:
        memory = int(memory_gib * 2**30)
    if memory <= 0:
        raise ConfigError(f"--memory_gib {memory_gib} must be above 0")
    options["finetune"], needed = fitted(config, options["finetune"], memory)
    fits = needed <= memory
    text = _text(checkpoint_dir, out_dir, train, valid, budget, device, options, (needed, memory))
    recipe.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(recipe, text)
    _report(recipe, config, needed, memory, fits)


def _report(recipe: Path, config: Any, needed: int, memory: int, fits: bool) -> None:
    from whittle_nas.cli.common import command_line
    from whittle_nas.weights.axes import num_params

    print(
        f"{config.name}: {num_params(config):,} parameters; training its super-network needs about "
        f"{needed / 2**30:.1f} GiB, the device has {memory / 2**30:.1f}"
    )
    if not fits:
        print("it does not fit: the recipe sorts and searches without training")
    print(f"wrote {recipe}; run it with: {command_line('nas', 'run', recipe)}")


def _text(
    checkpoint_dir: str,
    out_dir: str | None,
    train: str | None,
    valid: str | None,
    budget: str,
    device: str,
    options: dict[str, dict[str, Any]],
    memory: tuple[int, int],
) -> str:
    needed, there = memory
    fits = needed <= there
    name = Path(checkpoint_dir).name
    # Without a training, closed-form repair wins part of the quality back.
    chosen: dict[str, Any] = {"pick": budget} | ({} if fits else {"repair": True})
    stages = [
        ("sorted", "importance", "logits stay, the important weights come first", {}),
        ("supernet", "finetune", "all sub-networks at once", {}),
        ("search", "search", "the front of quality against cost", {}),
        ("evaluated", "evaluate", "the front on held-out text; add `tasks: arc_easy,piqa`", {}),
        ("exported", "export", "the best under the budget", chosen),
        ("exported_hf", "export", "the same for transformers", chosen | {"format": "hf"}),
    ]
    lines = [
        f"# {name} made smaller; run it with: nas run <this file>",
        "# Every stage has the options of its command (nas <command> --help); its directory is",
        "# out_dir/<stage>. What is not said here follows from the order: each stage reads the",
        "# checkpoint of the one before it, and the last ones choose from the search's front.",
        f"checkpoint_dir: {_yaml(checkpoint_dir)}",
        f"out_dir: {_yaml(out_dir or f'runs/{name}')}",
        "text: # one text per line of JSON, or plain text",
        f"  train: {_yaml(train or 'train.jsonl')}",
        f"  valid: {_yaml(valid)}" if valid else "  # valid: valid.jsonl # else a tenth of train",
        "stages:",
    ]
    for stage, command, what, more in stages:
        skipped = command == "finetune" and not fits
        mark = "  # " if skipped else "  "
        lines.append(f"{mark}{stage}: # {what}")
        if skipped:
            lines.append(f"  #   needs {needed / 2**30:.1f} GiB of {there / 2**30:.1f}: left out")
        lines.append(f"{mark}  command: {command}")
        own = options.get(command, {}) | more
        if command in ("importance", "search", "evaluate") and device != "auto":
            own["device"] = device
        if command == "finetune" and device != "auto":
            own["trainer.accelerator"] = device
        lines += [f"{mark}  {key}: {_yaml(value)}{_note(key)}" for key, value in own.items()]
    return "\n".join(lines) + "\n"


_NOTES = {
    "trainer.accumulate_grad_batches": "the memory holds fewer rows at once",
    "checkpoint_blocks": "recomputes activations to save memory",
    "data.block_size": "tokens per row",
    "data.num_blocks": "rows of text",
    "num_trials": "sub-networks to try",
}


def _note(key: str) -> str:
    return f" # {_NOTES[key]}" if key in _NOTES else ""


def _yaml(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, default_flow_style=True, width=1000).split("\n...")[0].strip()
