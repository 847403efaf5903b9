"""`nas evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from whittle_nas.cli.options import DType, Sizes
from whittle_nas.data.options import TextData
from whittle_nas.errors import ConfigError

# No import for type checkers only: jsonargparse would run it to resolve the signature below.


def evaluate(
    *,
    checkpoint_dir: Path,
    out_dir: Path,
    tasks: list[str] | str | None = None,
    data: TextData = TextData(),
    subnetwork: Sizes = Sizes(),
    front: Path | None = None,
    index: list[int] | int | None = None,
    subnetworks: Path | None = None,
    include_full: bool = False,
    num_fewshot: int | None = None,
    limit: float | None = None,
    include_path: Path | None = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    fewshot_as_multiturn: bool = True,
    gen_kwargs: dict[str, Any] | None = None,
    bootstrap_iters: int = 1000,
    log_samples: bool = False,
    confirm_run_unsafe_code: bool = False,
    latency: bool = False,
    repair: bool = False,
    calibration: TextData | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    device: str = "auto",
    devices: int = 1,
    dtype: DType = DType.stored,
    seed: int = 1337,
    overwrite: bool = False,
) -> None:
    """Score the whole model, sub-networks, or a front: lm-eval tasks and perplexity.

    Sub-networks run in place, as slices of the checkpoint's weights. Every finished pair of
    sub-network and task is kept in `out_dir` and not computed again: run the same command again
    after an interruption, or with more tasks. Works on any litgpt checkpoint.

    Args:
        checkpoint_dir: A litgpt checkpoint, super-network or not.
        out_dir: Directory to write: `<sub-network>/results.json` in lm-eval's layout,
            `results.csv`, `report.html` (chart, table to sort, export lines), and a picture per
            task.
        tasks: Names of lm-eval tasks, groups or tags, separated by commas; `v1` and `v3` are the
            papers' task lists.
        data: Text whose perplexity is measured.
        subnetwork: Sizes of one sub-network; those that are not given are the whole model's.
        front: `front.json` of a search: all its sub-networks, or those that `index` names.
        index: Entries of the front.
        subnetworks: YAML or JSON file with a list of sizes, each with a `name` if wanted, or the
            `grid.yaml` of a training.
        include_full: Evaluate the whole model, too.
        num_fewshot: Examples before each question, in place of what tasks and presets say.
        limit: Questions per task: a count, or a share below 1.
        include_path: Folder with task files of your own.
        apply_chat_template: Wrap prompts in the checkpoint's chat template.
        system_instruction: What stands before every prompt.
        fewshot_as_multiturn: With a chat template, give examples as turns of the conversation.
        gen_kwargs: Changes to the generation options of tasks, for instance `max_gen_toks`.
        bootstrap_iters: Resamplings for standard errors that have no formula; 0: none.
        log_samples: Write the answer to every question to `<sub-network>/samples_<task>.jsonl`.
        confirm_run_unsafe_code: Let tasks run the code that the model writes.
        latency: Time the forward pass of 2 x 512 tokens (or contexts, where shorter), too, and draw
            accuracy against it.
        repair: Repair every sub-network first, as `nas export --repair true` does.
        calibration: Calibration text of `repair`; by default what `data.valid_fraction` leaves, at
            most 128 blocks.
        batch_size: Sequences of full length per batch; by default chosen for the device.
        max_length: Use no more of the model's context than this many tokens.
        device: `auto`, `cpu`, `cuda`, `cuda:1`; `cuda:0,cuda:1` shares the blocks of the model out
            between several, also `cuda:0,cpu`.
        devices: Share the work between this many processes, each on a device of its own.
        dtype: Number format of the weights; `stored` is that of the checkpoint.
        seed: Of few-shot examples and sampled answers.
        overwrite: Compute finished pairs again.
    """
    from whittle_nas.cli.candidates import choose_candidates, library_of
    from whittle_nas.cli.common import check_least, resolve_devices, resolve_dtype
    from whittle_nas.cli.evaluation import (
        check_directory,
        check_processes,
        compute,
        forget_pairs,
        read_text,
        report,
    )
    from whittle_nas.cli.repairing import check_plain, repair_text, rest_of
    from whittle_nas.evaluate.presets import choose_tasks
    from whittle_nas.evaluate.running import RunOptions
    from whittle_nas.evaluate.session import ModelOptions, Session
    from whittle_nas.evaluate.tasks import TaskOptions, load_tasks
    from whittle_nas.weights.checkpoint import open_checkpoint

    names = _names(tasks)
    text = None if data == TextData() else data
    if not names and text is None:
        raise ConfigError("give --tasks, such as v1 or arc_easy,piqa, or --data.files, or both")
    check_least(1, batch_size=batch_size, devices=devices)
    check_directory(out_dir)
    _hush()
    checkpoint = open_checkpoint(checkpoint_dir, shortcuts=True, per_layer=True)
    candidates = choose_candidates(
        checkpoint,
        sizes=subnetwork,
        front=front,
        index=[index] if isinstance(index, int) else index or [],
        subnetworks=subnetworks,
        include_full=include_full,
    )
    library = library_of(checkpoint, front=front, subnetworks=subnetworks)
    check_plain(repair, library, front=front, subnetworks=subnetworks)
    options = TaskOptions(
        limit=limit,
        seed=seed,
        apply_chat_template=apply_chat_template,
        system_instruction=system_instruction,
        fewshot_as_multiturn=fewshot_as_multiturn,
        gen_kwargs=gen_kwargs or {},
    )
    where = resolve_devices(device)
    check_processes(where, devices)
    session = Session(
        checkpoint,
        out_dir,
        load_tasks(choose_tasks(names, num_fewshot), options, include_path=include_path),
        read_text(text, checkpoint),
        options,
        RunOptions(bootstrap_iters, log_samples, confirm_run_unsafe_code),
        ModelOptions(resolve_dtype(dtype), max_length, batch_size, True),
        repair_text(
            repair, calibration or rest_of(data), option="calibration", checkpoint=checkpoint
        ),
        library,
    )
    if overwrite:
        forget_pairs(out_dir)
    if compute(session, candidates, where, devices):
        report(session, candidates, where if latency else None)


def _names(tasks: list[str] | str | None) -> list[str]:
    listed = tasks if isinstance(tasks, list) else [tasks or ""]
    return [name.strip() for part in listed for name in part.split(",") if name.strip()]


def _hush() -> None:
    """What the libraries say about every task file and data set is no news here."""
    import logging

    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
