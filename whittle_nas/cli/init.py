"""`nas init`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

from whittle_nas.errors import ConfigError

_NAME = "chosen"  # of the network that the default recipe trains


class Route(str, Enum):
    """What a recipe trains."""

    chosen = "chosen"
    supernet = "supernet"
    nothing = "nothing"


def init(
    *,
    checkpoint_dir: str,
    recipe: Path = Path("recipe.yaml"),
    out_dir: str | None = None,
    train: str | None = None,
    valid: str | None = None,
    budget: str = "num_params <= 60%",
    route: Route = Route.chosen,
    device: str = "auto",
    memory_gib: float | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> None:
    """Write a commented recipe for `nas run`: a checkpoint, a device and a budget.

    It says what the training will need and whether that fits the device. Where it does not, the
    recipe trains nothing: it sorts, searches and repairs. Nothing is downloaded or loaded.

    Args:
        checkpoint_dir: A litgpt or Hugging Face directory, or an id of the hub.
        recipe: The file to write.
        out_dir: Where the stages will write; by default `runs/<name of the checkpoint>`.
        train: Text file to train on and to calibrate with: JSON lines with a `text`, or plain text.
        valid: Text file to search with; by default a tenth of `train`.
        budget: What is exported: the best under this, such as "num_params <= 60%" or
            "num_params <= 6e9, latency_ms <= 40".
        route: What is trained: the network that the search has `chosen`, repaired first; the
            `supernet`, all sizes at once before the search, where many are wanted or the size is
            not known; or `nothing`.
        device: Where it will run: `auto`, `cpu`, `cuda`.
        memory_gib: Memory of that device; by default what this machine's has.
        overwrite: Replace the file.
        dry_run: Say what would be written, and write nothing.
    """
    from whittle_nas.cli.common import command_line
    from whittle_nas.cli.defaults import fitted, model_config, stage_defaults
    from whittle_nas.search.objectives import QUALITY, check_metric, is_cost
    from whittle_nas.space.front import parse_constraints
    from whittle_nas.weights.files import atomic_write_text

    if recipe.exists() and not overwrite:
        raise ConfigError(f"--recipe {recipe} is there; give another name, or --overwrite true")
    for name, path in (("train", train), ("valid", valid)):
        if path is not None and not Path(path).is_file():
            raise ConfigError(f"--{name} {path} is not a file")
    if valid is not None and train is None:
        raise ConfigError(f"--valid {valid} needs --train, too")
    limits = parse_constraints(budget, option="--budget")
    if not limits:
        raise ConfigError('--budget is empty; give limits such as "num_params <= 60%"')
    named = dict.fromkeys(check_metric(limit.metric, "--budget") for limit in limits)
    config = model_config(checkpoint_dir)
    options = stage_defaults(config)
    cost = () if any(map(is_cost, named)) else ("num_params",)
    asked = (name for name in named if name not in QUALITY)  # perplexity is the loss again
    searched = dict.fromkeys(("val_loss", "latency_ms", *asked, *cost))
    options["search"]["objectives"] = ",".join(searched)
    memory = _memory(device, memory_gib)
    apart = route is Route.chosen  # what is trained is not the whole model, which teaches it
    options["finetune"], needed = fitted(config, options["finetune"], memory, apart=apart)
    fits = needed <= memory
    left_out = ""
    if not fits and route is not Route.nothing:
        left_out = f"training needs {needed / 2**30:.1f} GiB of {memory / 2**30:.1f}: left out"
        route = Route.nothing
    stages = _stages(route, budget, options)
    text = _text(checkpoint_dir, out_dir, train, valid, device, stages, left_out)
    _report(config, needed, memory, fits)
    names = ", ".join(name for name, *_ in stages)
    if dry_run:
        print(f"would write {recipe}, {len(text.encode())} bytes, with the stages {names}")
        print("dry run: nothing was written")
        return
    recipe.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(recipe, text)
    print(f"wrote {recipe}; run it with: {command_line('nas', 'run', recipe)}")


def _memory(device: str, memory_gib: float | None) -> int:
    """Bytes of the device that a recipe is for."""
    from whittle_nas.cli.common import resolve_device
    from whittle_nas.train.memory import device_bytes

    if "," in device:
        raise ConfigError(f"--device {device}: a recipe trains on one device, name one of them")
    if memory_gib is None:
        return device_bytes(resolve_device(device))
    if memory_gib <= 0:
        raise ConfigError(f"--memory_gib {memory_gib} must be above 0")
    return int(memory_gib * 2**30)


def _sorted_config(config: Any) -> Any:
    """The config after sorting, where a rotation gives a tied head a table of its own."""
    from whittle_nas.importance.bases import TOKENS_PER_DIRECTION, choose_rotation
    from whittle_nas.importance.options import Basis
    from whittle_nas.weights.axes import is_tied
    from whittle_nas.weights.tying import untied

    enough = TOKENS_PER_DIRECTION * config.n_embd
    rotated = choose_rotation(Basis.auto, config, tied=is_tied(config), num_tokens=enough)[0]
    return untied(config) if rotated else config


def _report(config: Any, needed: int, memory: int, fits: bool) -> None:
    from whittle_nas.weights.axes import num_params

    after = num_params(_sorted_config(config))

    print(
        f"{config.name}: {num_params(config):,} parameters; training needs about "
        f"{needed / 2**30:.1f} GiB, the device has {memory / 2**30:.1f}"
    )
    if after != num_params(config):
        print(
            f"sorting rotates it, which gives its tied head a table of its own: {after:,} "
            "parameters, and shares of a budget are of these"
        )
    if not fits:
        print("it does not fit: the recipe trains nothing")


def _stages(
    route: Route, budget: str, options: dict[str, dict[str, Any]]
) -> list[tuple[str, str, str, dict[str, Any]]]:
    """Name, command, comment and options of each stage."""
    best: dict[str, Any] = {"pick": budget}
    search: dict[str, Any] = {}
    stages = [("sorted", "importance", "logits stay, the important weights come first", {})]
    front = "the front on held-out text; add `tasks: arc_easy,piqa`"
    after = [("evaluated", "evaluate", front, {})]
    if route is Route.supernet:
        stages.append(("supernet", "finetune", "all sub-networks at once", {}))
    elif route is Route.nothing:
        best["repair"] = True  # closed-form repair wins part of the quality back
    else:
        search = {"budgets": {_NAME: budget}}
        chosen = {"subnetworks": "search", "repair": True}
        trained = {"checkpoint_dir": f"trained/{_NAME}"}
        best = trained | {"extreme": "largest"}
        scores = "the trained network on held-out text; add `tasks: arc_easy,piqa`"
        after = [
            ("trained", "finetune", "the best under the budget: repaired, then taught", chosen),
            ("evaluated", "evaluate", scores, trained),
        ]
    stages += [("search", "search", "the front of quality against cost", search), *after]
    stages += [
        ("exported", "export", "the best under the budget", best),
        ("exported_hf", "export", "the same for transformers", best | {"format": "hf"}),
    ]
    return [
        (name, command, what, options.get(command, {}) | own) for name, command, what, own in stages
    ]


def _text(
    checkpoint_dir: str,
    out_dir: str | None,
    train: str | None,
    valid: str | None,
    device: str,
    stages: list[tuple[str, str, str, dict[str, Any]]],
    left_out: str,
) -> str:
    name = Path(checkpoint_dir).name
    lines = [
        f"# {name} made smaller; run it with: nas run <this file>",
        "# Every stage has the options of its command (nas <command> --help); its directory is",
        "# out_dir/<stage>. What is not said here follows from the order: a stage reads the last",
        "# checkpoint before it, and chooses from the front of the last search. It may also name",
        "# what it reads: search, sorted, trained/<one of the networks that were trained>.",
        f"checkpoint_dir: {_yaml(checkpoint_dir)}",
        f"out_dir: {_yaml(out_dir or f'runs/{name}')}",
        "text: # one text per line of JSON, or plain text",
        f"  train: {_yaml(train or 'train.jsonl')}",
        f"  valid: {_yaml(valid)}" if valid else "  # valid: valid.jsonl # else a tenth of train",
        "stages:",
        *([f"  # {left_out}"] if left_out else []),
    ]
    for stage, command, what, options in stages:
        lines += [f"  {stage}: # {what}", f"    command: {command}"]
        if device != "auto" and command in ("importance", "search", "evaluate"):
            options = options | {"device": device}
        if device != "auto" and command == "finetune":
            kind, _, number = device.partition(":")
            options = options | {"trainer.accelerator": kind}
            options |= {"trainer.devices": f"{number},"} if number else {}
        lines += [f"    {key}: {_yaml(value)}{_note(key)}" for key, value in options.items()]
    return "\n".join(lines) + "\n"


_NOTES = {
    "trainer.accumulate_grad_batches": "the memory holds fewer rows at once",
    "checkpoint_blocks": "recomputes activations to save memory",
    "data.block_size": "tokens per row",
    "data.num_blocks": "rows of text",
    "num_trials": "sub-networks to try",
    "objectives": "all made small; fewer layers pay in latency",
}


def _note(key: str) -> str:
    return f" # {_NOTES[key]}" if key in _NOTES else ""


def _yaml(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, default_flow_style=True, width=1000).split("\n...")[0].strip()
