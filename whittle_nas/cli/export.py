"""`nas export`."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from whittle_nas.cli.options import DType, Sizes


class Format(Enum):
    """File layout of the exported model."""

    litgpt = "litgpt"
    hf = "hf"


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
    index: int | None = None,
    pick: str | None = None,
    extreme: Extreme | None = None,
    search_space: str | None = None,
    format: Format = Format.litgpt,
    dtype: DType = DType.stored,
    push_to_hub: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write one sub-network as an ordinary checkpoint.

    The result is a plain litgpt directory that `litgpt generate`, `chat`, `serve` and `evaluate`
    read, or with `--format hf` one that `AutoModelForCausalLM.from_pretrained` loads. Its
    `README.md` says what it is. Choose the sub-network by its sizes, from a front that `nas search`
    wrote, or as an end of a search space.

    Args:
        checkpoint_dir: The super-network: a litgpt checkpoint, sorted and trained or not.
        out_dir: Directory to write; it must be new or empty.
        subnetwork: Sizes; those that are not given are the whole model's.
        front: `front.json` of a search.
        index: Which entry of the front.
        pick: Best entry of the front under budgets, as in "num_params <= 6e9, latency_ms <= 40".
        extreme: Export the smallest or the largest member of the search space.
        search_space: A preset or a YAML file; default: the space that was trained, else
            `fitted` where `nas importance` recorded it, else `aligned`.
        format: `litgpt`, or `hf` for transformers.
        dtype: Number format of the weights; `stored` is that of the checkpoint.
        push_to_hub: Upload the result to this repository of the hub, such as me/my-model, which is
            made if it is not there; with `--format hf`.
        overwrite: Replace what is in `out_dir`.
    """
    from whittle_nas.cli.common import progress_bar, resolve_dtype
    from whittle_nas.cli.selection import choose_subnetwork
    from whittle_nas.export.checkpoint import plan_export, write_export
    from whittle_nas.export.hub import check_push, push
    from whittle_nas.weights.checkpoint import open_checkpoint
    from whittle_nas.weights.files import atomic_directory, check_free

    check_free(out_dir, overwrite=overwrite)
    if push_to_hub is not None:
        check_push(push_to_hub, is_hf=format is Format.hf)
    checkpoint = open_checkpoint(checkpoint_dir)
    sub = choose_subnetwork(
        checkpoint,
        sizes=subnetwork,
        front=front,
        index=index,
        pick=pick,
        extreme=None if extreme is None else extreme.value,
        search_space=search_space,
    )
    planned = plan_export(checkpoint, sub, to_hf=format is Format.hf)
    with atomic_directory(out_dir, overwrite=overwrite) as partial:
        write_export(partial, planned, dtype=resolve_dtype(dtype), progress=progress_bar)
    _report(planned.slices, planned.notes, out_dir, format)
    if push_to_hub is not None:
        print(f"uploaded to {push(out_dir, push_to_hub)}")


def _report(slices: Any, notes: Sequence[str], out_dir: Path, format: Format) -> None:
    from whittle_nas.space import SubNetwork
    from whittle_nas.weights.counting import parameter_counter

    full = SubNetwork.from_config(slices.full_config)
    count, whole = map(parameter_counter(slices.full_config), (slices.sub, full))
    print(f"exported {slices.sub}")
    print(
        f"{count:,} of {whole:,} parameters ({100 * count / whole:.1f} %), layers "
        f"{', '.join(map(str, slices.layers))}"
    )
    print("".join(f"note: {note}\n" for note in notes), end="")
    if format is Format.hf:
        print(f'load it with: AutoModelForCausalLM.from_pretrained("{out_dir}")')
    else:
        print(f'try it with: litgpt generate {out_dir} --prompt "..."')
