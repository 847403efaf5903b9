"""`nas search`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whittle_nas.cli.options import DType
from whittle_nas.data import TextData
from whittle_nas.errors import ConfigError
from whittle_nas.search.options import (
    CostOptions,
    HalvingOptions,
    IlpOptions,
    Method,
    ProgramOptions,
    RecoveryOptions,
    TaskOptions,
)

# No import for type checkers only: jsonargparse would run it to resolve the signature below.


def search(
    *,
    checkpoint_dir: Path,
    out_dir: Path,
    data: TextData = TextData(),
    objectives: list[str] | str = "val_loss,num_params",
    constraints: list[str] | str | None = None,
    budgets: dict[str, str] | list[str] | str | None = None,
    nested: bool = False,
    method: Method = Method.surrogate,
    candidates: Path | None = None,
    start_from: Path | None = None,
    num_solutions: int = 10,
    overlap: float = 0.7,
    ilp_rounds: int = 1,
    ilp: IlpOptions = IlpOptions(),
    targets: str | None = None,
    num_trials: int = 100,
    search_space: str | None = None,
    search_blocks: int = 32,
    batch_size: int | None = None,
    start_from_grid: bool = True,
    costs: CostOptions = CostOptions(),
    time_front: bool = True,
    halving: HalvingOptions = HalvingOptions(),
    tasks: TaskOptions = TaskOptions(),
    recovery: RecoveryOptions = RecoveryOptions(),
    repair: bool = False,
    calibration: TextData | None = None,
    devices: int = 1,
    ray_address: str | None = None,
    device: str = "auto",
    dtype: DType = DType.stored,
    seed: int = 1337,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Find the sub-networks that no other one beats in both quality and cost.

    Every trial evaluates one sub-network by slicing the super-network's weights. The front goes to
    `front.json`, from which `nas evaluate` and `nas export` choose, with pictures beside it.

    Args:
        checkpoint_dir: The super-network: a litgpt checkpoint, sorted and trained or not.
        out_dir: Directory to write; it must be new or empty, but for `resume` and `overwrite`.
        data: Validation text.
        objectives: What is minimised, two or more of val_loss, perplexity, num_params,
            num_params_non_embedding, flops, weight_bytes, memory_bytes, latency_ms,
            decode_ms_per_token and "1 - <lm-eval task>.<metric>". The first one measures quality.
        constraints: Limits on any of these, for instance "num_params <= 6e9, latency_ms <= 40", or
            as shares of the whole model's: "num_params <= 60%, latency_ms <= 0.7x".
        budgets: The best of the front under each of these goes to `picks.yaml`, for `nas evaluate`,
            `nas export`, `nas finetune` and `nas profile`: shares of the parameters such as
            "90%, 75%, 50%", or limits as in `constraints`. With names, each may be several limits:
            `{small: "latency_ms <= 0.7x, num_params <= 60%"}`.
        nested: Choose picks that are parts of each other where that costs at most a tenth of the
            loss, so that `nas finetune --subnetworks` can train each from a larger one.
        method: Who proposes the next sub-network: `surrogate` models the loss and takes what should
            add most to the front; `stratified` is random, evenly over the cost; `local_search`
            changes members of the front; `nsga2` and `evolution` breed; `scalarization` weights the
            objectives at random; `ilp` solves integer programs over `candidates`.
        candidates: Library of `nas candidates`, one of which every layer's attention and MLP takes.
        start_from: A front.json whose sub-networks are tried first, such as that of `ilp`; not for
            `ilp` itself.
        num_solutions: Of `ilp`: networks of the first program of each budget, best first. Budgets
            are the constraints, or each of `budgets` together with them.
        overlap: Of `ilp`: largest share of the parts in which two of these networks agree.
        ilp_rounds: Of `ilp`: how often the neighbouring candidates are measured around the best
            network so far, and a program solved that stays near it; rounds end when one brings
            nothing.
        ilp: What programs add up, and how near they stay.
        targets: Of `ilp`: engines that must run every network as `nas export --format hf` writes
            it, of `vllm` and `llama.cpp`, with commas: candidates that they lack are left out.
        num_trials: Sub-networks to evaluate, but for `ilp`.
        search_space: A preset or a YAML file; by default the space that was trained, else
            `fitted` where `nas importance` recorded it, else `aligned`.
        search_blocks: Blocks of validation text per trial; the front is evaluated on all blocks.
        batch_size: Blocks per forward pass; by default chosen for the device.
        start_from_grid: Try the grid on which the super-network was trained first.
        costs: The load for which costs are computed and measured.
        time_front: Time the networks of the front as whole models at the end, also where no time is
            searched: `latency_ms` stands beside the other metrics. Not where several devices hold
            the model.
        halving: Stop bad trials early.
        tasks: How lm-eval tasks among the objectives are asked.
        recovery: Rank the best of a budget again after a short training.
        repair: Repair every sub-network before it is evaluated, as `nas export --repair true` does.
        calibration: Calibration text of `repair`; by default what `data.valid_fraction` leaves, at
            most 128 blocks.
        devices: Share the trials between this many processes, each on GPUs of its own, or all on
            the CPU; more than one needs Ray.
        ray_address: Address of a running Ray cluster, over any number of machines, to take the
            devices from; `auto` for the one that this machine belongs to.
        device: `auto`, `cpu`, `cuda`, `cuda:1`; `cuda:0,cuda:1` shares the blocks of the model out
            between several, also `cuda:0,cpu`.
        dtype: Number format of the weights; `stored` is that of the checkpoint.
        seed: Seed of the proposals.
        resume: Go on with an interrupted search in `out_dir`, or extend a finished one.
        overwrite: Replace an earlier search in `out_dir`, which is removed before the first trial.
    """
    from whittle_nas.cli.common import (
        check_least,
        resolve_devices,
        resolve_dtype,
        seed_everything,
        warn,
    )
    from whittle_nas.cli.repairing import repair_text, rest_of
    from whittle_nas.cli.search_report import listening, report, write_picks
    from whittle_nas.search.budgets import check_budgets, parse_budgets
    from whittle_nas.search.objectives import MEASURED
    from whittle_nas.search.request import Request
    from whittle_nas.search.session import Session

    wanted = parse_budgets(budgets)
    if nested and not wanted:
        raise ConfigError("--nested true is about the picks of --budgets: give these")
    if repair and candidates is not None:
        raise ConfigError(
            "--repair true fits plain slices and --candidates brings parts that are fitted "
            "already: leave one of the two out"
        )
    if start_from is not None and method is Method.ilp:
        raise ConfigError(
            f"--start_from {start_from} is tried first by methods that propose networks, and "
            "--method ilp solves programs: leave it out, or give its front to another --method"
        )
    counts = {"num_trials": num_trials, "search_blocks": search_blocks, "devices": devices}
    check_least(1, **counts, batch_size=batch_size)
    _check_directory(out_dir, resume=resume, overwrite=overwrite)
    programs = programs_of(
        method, candidates, wanted, num_solutions, overlap, ilp_rounds, ilp, targets=targets
    )
    checkpoint, space, library = _open(checkpoint_dir, search_space, method, candidates)
    names, limits = read_metrics(objectives, constraints)
    if method is not Method.ilp:  # a program measures what its budgets name
        asked = (*names, *(limit.metric for limit in limits))
        at_the_end = time_front and "," not in device and not {*asked} & {*MEASURED}
        check_budgets(wanted, (*asked, *(("latency_ms",) if at_the_end else ())))
    seed_everything(seed)
    text = _load_text(data, checkpoint, (*names, *(limit.metric for limit in limits)))
    request = Request(
        checkpoint=checkpoint,
        out_dir=out_dir,
        space=space,
        objectives=names,
        constraints=limits,
        tokens=text.tokens,
        text=text.about,
        method=method,
        num_trials=programs.most_trials() if method is Method.ilp else num_trials,
        seed=seed,
        search_blocks=search_blocks,
        batch_size=batch_size,
        start_from_grid=start_from_grid,
        costs=costs,
        time_front=time_front,
        halving=halving,
        tasks=tasks,
        recovery=recovery,
        library=library,
        start=() if start_from is None else _front_of(checkpoint, start_from),
        programs=programs,
        training=_load_training(recovery, checkpoint),
        calibration=repair_text(
            repair, calibration or rest_of(data), option="calibration", checkpoint=checkpoint
        ),
        workers=devices,
        cluster=ray_address,
        placed_on=resolve_devices(device),
        dtype=resolve_dtype(dtype),
    ).resolved()
    with listening(request, warn) as listener:
        session = Session(request, listener)
        outcome = session.run(resume=resume)
    request = session.request  # with limits by corrected times
    report(request, outcome)
    if wanted:
        write_picks(request, outcome, wanted, warn, nested=nested)
    else:
        print(
            'to train some of them, run this search again with --resume true --budgets "80%, 60%": '
            "it names the best under each for nas finetune --subnetworks"
        )
    if text.num_blocks:
        print(f"losses are those on {text}")


def _front_of(checkpoint: Any, path: Path) -> tuple[Any, ...]:
    from whittle_nas.cli.fronts import open_front

    return tuple(entry.subnetwork for entry in open_front(checkpoint, path).entries)


def programs_of(
    method: Method,
    candidates: Path | None,
    budgets: Mapping[str, str],
    num_solutions: int,
    overlap: float,
    rounds: int,
    ilp: IlpOptions,
    *,
    targets: str | None = None,
) -> ProgramOptions:
    """What `--method ilp` is asked for.

    Raises:
        ConfigError: without a library, and for engines without a program that chooses for them.
    """
    if method is not Method.ilp:
        if targets is not None:
            raise ConfigError(f"--targets {targets} is for --method ilp; give it to nas export")
        return ProgramOptions()
    if candidates is None:
        raise ConfigError(
            "--method ilp chooses from a library: give --candidates, made by `nas candidates`"
        )
    changes, named = tuple(ilp.changes), tuple(budgets.items())
    return ProgramOptions(num_solutions, overlap, rounds, ilp.score, changes, named, targets)


def _open(
    checkpoint_dir: Path, search_space: str | None, method: Method, candidates: Path | None
) -> tuple[Any, Any, Any]:
    """The checkpoint, the space and the library.

    A space beyond the trained one is allowed, with a warning; a library is a space of its own.
    """
    from whittle_nas.cli.common import warn
    from whittle_nas.cli.selection import space_for, space_of
    from whittle_nas.search.constraints import untrained_dimensions
    from whittle_nas.weights.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(checkpoint_dir)
    if candidates is not None:
        from whittle_nas.candidates.library import open_library

        if search_space is not None:
            raise ConfigError(
                f"--search_space {search_space}: the sizes are those of --candidates {candidates}"
            )
        library = open_library(candidates, checkpoint)
        if method is not Method.ilp and not library.is_product:
            raise ConfigError(
                f"--method {method.value} takes any heads, head sizes and neurons together, of "
                f"which --candidates {candidates} has not all, or more; use --method ilp"
            )
        return checkpoint, space_for(checkpoint, library.space()), library
    space = space_of(checkpoint, search_space)
    if search_space is not None and checkpoint.info.search_space is not None:
        trained = space_for(checkpoint, checkpoint.info.search_space)
        if beyond := untrained_dimensions(space, trained):
            warn(
                f"--search_space {search_space} holds sizes that {checkpoint.path} was not trained "
                f"for: {', '.join(beyond)}"
            )
    return checkpoint, space, None


def read_metrics(
    objectives: list[str] | str, constraints: list[str] | str | None
) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """Names of the objectives, and the limits.

    Raises:
        ConfigError: for one that is not known.
    """
    from whittle_nas.search.constraints import read_constraints
    from whittle_nas.search.objectives import parse_objectives

    return parse_objectives(objectives), read_constraints(constraints)


def _load_text(data: TextData, checkpoint: Any, metrics: tuple[str, ...]) -> Any:
    """Validation text in blocks; none where only tasks are asked."""
    import torch

    from whittle_nas.data import Part, TokenBlocks, load_blocks
    from whittle_nas.search.request import needs_text

    if not needs_text(metrics):
        return TokenBlocks(torch.empty(0, 2, dtype=torch.long), torch.empty(0, dtype=torch.long))
    return load_blocks(data, checkpoint.path, config=checkpoint.config, part=Part.VALID)


def _load_training(recovery: RecoveryOptions, checkpoint: Any) -> Any:
    from whittle_nas.data import load_blocks

    if recovery.budget is None or recovery.data is None:
        return None
    return load_blocks(recovery.data, checkpoint.path, config=checkpoint.config).tokens


def _check_directory(out_dir: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a directory that holds something, unless an old search goes on or is replaced.

    Times are of the model alone: what a search measured before its limits were refused is used.
    """
    from whittle_nas.search.request import TABLE
    from whittle_nas.weights.files import check_free, contents

    check_free(out_dir, overwrite=True)
    found = [name for name in contents(out_dir) if name != TABLE]
    if not (resume or overwrite) and found:
        raise ConfigError(
            f"--out_dir {out_dir} is not empty ({found[0]}); give a new one, --resume true to go "
            "on with its search, or --overwrite true"
        )
