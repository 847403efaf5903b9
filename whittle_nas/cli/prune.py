"""`nas prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from whittle_nas.cli.options import DType, Sizes
from whittle_nas.data.options import TextData
from whittle_nas.errors import ConfigError
from whittle_nas.prune.options import (
    QUANTISERS,
    WITHOUT_DATA,
    Grid,
    LaCoOptions,
    Method,
    Sparsity,
    check_grid,
    check_sequential,
    parse_sparsity,
)

# No import for type checkers only: jsonargparse would run it to resolve the signature below.


def prune(
    *,
    checkpoint_dir: Path,
    out_dir: Path,
    method: Method,
    data: TextData = TextData(num_blocks=64),
    sparsity: str | float | None = None,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    laco: LaCoOptions = LaCoOptions(),
    protect_first: int = 4,
    protect_last: int = 2,
    subnetwork: Sizes = Sizes(),
    sequential: bool | None = None,
    batch_size: int = 4,
    device: str = "auto",
    dtype: DType = DType.stored,
    seed: int = 1337,
    overwrite: bool = False,
) -> None:
    """Make a checkpoint smaller with a published method, to compare with.

    The result is a litgpt checkpoint that all other commands read, and `prune.json`, which says
    what was done and how many bytes it takes. Masks and quantisation go block by block, on
    calibration text that has passed the compressed blocks before; finished blocks are kept, and
    after an interruption the same command goes on.

    Args:
        checkpoint_dir: A litgpt checkpoint, for instance an exported sub-network.
        out_dir: Directory to write; it must be new or empty.
        method: Zeros in matrices, fewer bits, or fewer channels, layers, heads and neurons.
        data: Calibration text; `magnitude` and `rtn` need none.
        sparsity: How much goes, from 0 to 1: of the weights of every matrix, of the channels, of
            the layers, or of heads and neurons. For masks also `2:4` or `4:8`: so many of every so
            many neighbours stay.
        bits: Of `gptq` and `rtn`: 3, 4 or 8 per weight.
        group_size: Of `gptq` and `rtn`: weights of a row that share a scale.
        symmetric: Of `gptq` and `rtn`: the grid has zero in its middle, and no zero points.
        laco: Constants of `laco` and `laco_notebook`.
        protect_first: Layers at the beginning that `shortened_llama_taylor` and `llm_pruner` leave
            as they are.
        protect_last: The same at the end.
        subnetwork: Sizes that `minitron` cuts, in place of `sparsity`.
        sequential: Of `wanda`, `sparsegpt` and `gptq`: calibrate every block on what the compressed
            blocks before it give, as is the default; false: on what the whole model gives.
        batch_size: Sequences per forward pass.
        device: `auto`, `cpu`, `cuda`, `cuda:1`.
        dtype: Number format of the forward passes, `stored` that of the checkpoint; the written
            weights keep theirs.
        seed: Seed of everything random.
        overwrite: Replace what is in `out_dir`.
    """
    from whittle_nas.cli.common import (
        check_least,
        progress_bar,
        resolve_device,
        resolve_dtype,
        seed_everything,
    )
    from whittle_nas.prune.pipeline import compress, store_key, write_outcome
    from whittle_nas.prune.request import Place, Request
    from whittle_nas.prune.store import BlockStore
    from whittle_nas.weights.checkpoint import open_checkpoint
    from whittle_nas.weights.files import atomic_directory, check_free

    check_least(1, batch_size=batch_size)
    check_least(0, protect_first=protect_first, protect_last=protect_last)
    check_free(out_dir, overwrite=overwrite)
    quantises = method in QUANTISERS
    if subnetwork.given() and method is not Method.minitron:
        raise ConfigError(f"--subnetwork is the shape of minitron; {method.value} has none")
    checkpoint = open_checkpoint(checkpoint_dir)
    sizes = subnetwork.resolve(checkpoint).sizes() if subnetwork.given() else None
    if subnetwork.given() and sizes is None:
        raise ConfigError("--subnetwork.blocks: minitron gives all blocks the same sizes")
    request = Request(
        method=method,
        sparsity=None if sizes else _sparsity(method, sparsity),
        grid=check_grid(Grid(bits, group_size, symmetric)) if quantises else None,
        laco=laco,
        protect_first=protect_first,
        protect_last=protect_last,
        sizes=sizes,
        sequential=check_sequential(sequential, method),
        batch_size=batch_size,
        dtype=dtype.value,
    )
    seed_everything(seed)
    tokens, described = _text(data, checkpoint, method)
    store = BlockStore(out_dir, store_key(checkpoint, tokens, request))
    outcome = compress(
        checkpoint,
        tokens,
        request,
        store,
        place=Place(resolve_device(device), resolve_dtype(dtype)),
        progress=progress_bar,
    )
    with atomic_directory(out_dir, overwrite=overwrite) as partial:
        report = write_outcome(
            partial, outcome, checkpoint, request, data=described, progress=progress_bar
        )
    store.remove()
    _summary(report, out_dir)


def _sparsity(method: Method, given: str | float | None) -> Sparsity | None:
    if method in QUANTISERS:
        if given is not None:
            raise ConfigError(f"--sparsity {given} has no meaning for {method.value}; give --bits")
        return None
    if given is None:
        raise ConfigError(f"--method {method.value} needs --sparsity, such as 0.5")
    return parse_sparsity(given, method)


def _text(data: TextData, checkpoint: Any, method: Method) -> tuple[Any, dict[str, Any]]:
    """Tokens (N, T + 1) and how they are described in `prune.json`."""
    if method in WITHOUT_DATA:
        import torch

        return torch.empty(0, 2, dtype=torch.long), {}
    if not (data.is_given() or data.sources):
        raise ConfigError(f"--method {method.value} needs calibration text: give --data.files")
    from whittle_nas.data import Part, load_blocks

    blocks = load_blocks(data, checkpoint.path, config=checkpoint.config, part=Part.TRAIN)
    return blocks.tokens, dict(blocks.about)


def _summary(report: dict[str, Any], out_dir: Path) -> None:
    from whittle_nas.cli.common import command_line

    before, after = report["num_params_before"], report["num_params"]
    print(f"{after:,} of {before:,} parameters ({100 * after / before:.1f} %)")
    print(
        f"{report['bytes'] / 1e6:,.1f} of {report['bytes_before'] / 1e6:,.1f} MB "
        "(16 bits but for what was compressed)"
    )
    print("".join(f"note: {note}\n" for note in report["notes"]), end="")
    front = ("--front", out_dir / "front.json") if (out_dir / "front.json").is_file() else ()
    words = ("nas", "evaluate", "--checkpoint_dir", out_dir, *front, "--out_dir", "<dir>")
    print(f"evaluate it with: {command_line(*words, '--data.files', '<text>')}")
