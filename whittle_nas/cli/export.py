"""`nas export`."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from whittle_nas.cli.options import DType, Sizes
from whittle_nas.data.options import TextData
from whittle_nas.errors import ConfigError

_FITTED = (
    "Its attentions and MLPs are candidates of `nas candidates`: the first heads and neurons, with "
    "an output projection that was fitted to the whole part's output on calibration text."
)


class Format(Enum):
    """File layout of the exported model."""

    litgpt = "litgpt"
    hf = "hf"
    peft = "peft"


class Quantize(Enum):
    """How a quantised checkpoint's matrices are written: integers of so many bits."""

    w4a16 = "w4a16"
    w8a16 = "w8a16"


class Extreme(Enum):
    """A member of the search space that needs no search."""

    smallest = "smallest"
    largest = "largest"


def export(
    *,
    checkpoint_dir: Path,
    out_dir: Path,
    subnetwork: Sizes = Sizes(),
    front: Path | None = None,
    subnetworks: Path | None = None,
    name: str | None = None,
    index: int | None = None,
    pick: str | None = None,
    extreme: Extreme | None = None,
    search_space: str | None = None,
    format: Format = Format.litgpt,
    lora_r: int | None = None,
    quantize: Quantize | None = None,
    pad: bool = False,
    targets: str | None = None,
    repair: bool = False,
    data: TextData = TextData(num_blocks=128),
    device: str = "auto",
    dtype: DType = DType.stored,
    push_to_hub: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write one sub-network as an ordinary checkpoint.

    The result is a plain litgpt directory that `litgpt generate`, `chat`, `serve` and `evaluate`
    read, or with `--format hf` one that `AutoModelForCausalLM.from_pretrained` loads. Its
    `README.md` says what it is. Choose the sub-network by its sizes, from a front that `nas search`
    wrote, or as an end of a search space. What `nas prune` wrote needs no choice.

    Args:
        checkpoint_dir: The super-network: a litgpt checkpoint, sorted and trained or not.
        out_dir: Directory to write; it must be new or empty.
        subnetwork: Sizes; those that are not given are the whole model's.
        front: `front.json` of a search.
        subnetworks: `picks.yaml` of `nas search --budgets`, or another list of sizes.
        name: Which of its sub-networks, where there are several.
        index: Which entry of the front.
        pick: Best entry of the front under budgets, as in "num_params <= 60%, latency_ms <= 40".
        extreme: Export the smallest or the largest member of the search space.
        search_space: A preset or a YAML file; default: the space that was trained, else
            `fitted` where `nas importance` recorded it, else `aligned`.
        format: `litgpt`, or `hf` for transformers. A network whose layers differ in size becomes a
            directory that `nas generate`, `evaluate` and `profile` run, or with `hf` the
            `DeciLMForCausalLM` of vLLM and llama.cpp, and of transformers with a file that lies
            beside. `peft`: only the adapters, for PEFT, beside what `--format hf` makes of the same
            sub-network of the checkpoint that was trained.
        lora_r: Rank of the adapters of a super-network that `nas finetune` has trained with them,
            instead of the whole rank that is merged: best one of its `lora.ranks`.
        quantize: With `--format hf`, from a directory of `nas prune --method gptq` or `rtn`: write
            its integers, packed as vLLM loads them (compressed-tensors). `w4a16` after
            `--bits 4`, `w8a16` after `--bits 8`.
        pad: Fill layers of different sizes up with zeros, which changes nothing but the size: to an
            ordinary model as large as if all layers were like the largest, or with `hf` and a Llama
            only until all have equally many query heads, and to what `targets` need.
        targets: `vllm`, `llama.cpp` or both: refuse layers of different sizes that they can't run.
        repair: Fit the projections again by least squares on calibration text, without training,
            so that they make up for what was cut; never worse than the plain slices on text that is
            held back from the fit.
        data: Calibration text of `repair`.
        device: Where `repair` runs: `auto`, `cpu`, `cuda`, `cuda:1`; `cuda:0,cuda:1` shares the
            blocks of the model out between several, also `cuda:0,cpu`.
        dtype: Number format of the weights; `stored` is that of the checkpoint.
        push_to_hub: Upload the result to this repository of the hub, such as me/my-model, which is
            made if it is not there; with `--format hf`.
        overwrite: Replace what is in `out_dir`.
    """
    from dataclasses import replace

    from whittle_nas.cli.candidates import library_of
    from whittle_nas.cli.common import progress_bar, resolve_devices, resolve_dtype
    from whittle_nas.cli.repairing import check_plain, repair_text
    from whittle_nas.cli.selection import choose_subnetwork
    from whittle_nas.export.checkpoint import plan_export, write_export
    from whittle_nas.export.deci import parse_engines
    from whittle_nas.export.hub import check_push, push
    from whittle_nas.export.peft import plan_peft, write_peft
    from whittle_nas.train.adapters import open_adapted
    from whittle_nas.weights.checkpoint import open_checkpoint
    from whittle_nas.weights.files import PRUNE_REPORT, atomic_directory, check_free

    check_free(out_dir, overwrite=overwrite)
    if push_to_hub is not None:
        check_push(push_to_hub, is_hf=format is Format.hf)
    if quantize is not None and (format is not Format.hf or repair):
        other = "--repair true" if repair else "--format litgpt"
        raise ConfigError(
            f"--quantize {quantize.value} has no meaning with {other}; use --format hf"
        )
    if targets is not None and format is not Format.hf:
        raise ConfigError(
            f"--targets {targets} has no meaning with --format {format.value}; use --format hf"
        )
    checkpoint = open_checkpoint(checkpoint_dir, per_layer=True)
    adapted = None
    if lora_r is not None or format is Format.peft:
        adapted = checkpoint = open_adapted(checkpoint, lora_r)
    sub = choose_subnetwork(
        checkpoint,
        sizes=subnetwork,
        front=front,
        subnetworks=subnetworks,
        name=name,
        index=index,
        pick=pick,
        extreme=None if extreme is None else extreme.value,
        search_space=search_space,
        whole=quantize is not None or (checkpoint_dir / PRUNE_REPORT).is_file(),
    )
    if adapted is not None and format is Format.peft:
        if repair or pad:
            raise ConfigError("--format peft writes adapters alone: leave repair and pad out")
        peft = plan_peft(adapted.supernet.plan(sub))
        with atomic_directory(out_dir, overwrite=overwrite) as partial:
            write_peft(partial, peft, adapted.supernet)
        print(f"exported the adapters of {sub}, rank {peft.slices.config.lora_r}")
        print(f'load it with: PeftModel.from_pretrained(model, "{out_dir}")')
        return
    scheme = None if quantize is None else quantize.value
    planned = plan_export(
        checkpoint,
        sub,
        to_hf=format is Format.hf,
        quantize=scheme,
        pad=pad,
        targets=parse_engines(targets),
    )
    library = library_of(checkpoint, front=front, subnetworks=subnetworks, name=name)
    check_plain(repair, library, front=front, subnetworks=subnetworks)
    text = repair_text(repair, data, option="data", checkpoint=checkpoint)
    lines: Sequence[str] = ()
    if library is not None:
        planned = replace(planned, patch=library.patch(sub), after=_FITTED)
    if text is not None:
        patch, after, lines = _repaired(checkpoint, sub, text, resolve_devices(device))
        planned = replace(planned, patch=patch, after=after)
    with atomic_directory(out_dir, overwrite=overwrite) as partial:
        write_export(partial, planned, dtype=resolve_dtype(dtype), progress=progress_bar)
    _report(planned, lines, out_dir)
    if push_to_hub is not None:
        print(f"uploaded to {push(out_dir, push_to_hub)}")


def _repaired(checkpoint: Any, sub: Any, text: Any, device: Any) -> tuple[Any, str, Sequence[str]]:
    """The patch, and what is to be said about it: in the model card, and here."""
    from whittle_nas.cli.common import progress_bar
    from whittle_nas.cli.repairing import sentences
    from whittle_nas.repair.engine import repair
    from whittle_nas.weights.checkpoint import supernet_of

    # not from its path: at another rank its weights are no file's
    supernet = supernet_of(checkpoint, device=device)
    found = repair(supernet, sub, text, progress=progress_bar)
    return found.patch, *sentences(found)


def _report(planned: Any, lines: Sequence[str], out_dir: Path) -> None:
    from whittle_nas.export.model_card import Use
    from whittle_nas.space import SubNetwork
    from whittle_nas.weights.counting import parameter_counter

    slices = planned.slices
    full = SubNetwork.from_config(slices.full_config)
    count, whole = map(parameter_counter(slices.full_config), (slices.sub, full))
    print(f"exported {slices.sub}")
    print(
        f"{count:,} of {whole:,} parameters ({100 * count / whole:.1f} %), layers "
        f"{', '.join(map(str, slices.layers))}"
    )
    print("".join(f"{line}\n" for line in lines), end="")
    print("".join(f"note: {note}\n" for note in planned.notes), end="")
    print(
        {
            Use.litgpt: f'try it with: litgpt generate {out_dir} --prompt "..."',
            Use.nas: f'try it with: nas generate --checkpoint_dir {out_dir} --prompt "..."',
            Use.transformers: f'load it with: AutoModelForCausalLM.from_pretrained("{out_dir}")',
            Use.remote: f'load it with: AutoModelForCausalLM.from_pretrained("{out_dir}", '
            "trust_remote_code=True)",
        }[planned.use]
    )
