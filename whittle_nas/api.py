"""The commands as functions: the same code and options, objects back, nothing printed unless asked.

    import whittle_nas as nas

    ck = nas.load("checkpoints/EleutherAI/pythia-160m")  # or a Hugging Face directory, or a hub id
    ck = nas.importance(ck, "calibration.jsonl")
    ck = nas.finetune(ck, "train.jsonl", valid="valid.jsonl", out_dir="supernet")
    front = nas.search(ck, "valid.jsonl", num_trials=60)
    small = nas.export(front.best("num_params <= 60%"), "small")

Options are those of the commands: `nas.search(ck, text, num_trials=60, costs={"tokens": 256})` is
`nas search --num_trials 60 --costs.tokens 256`. What is written without an `out_dir` lies in a
temporary directory, which goes when Python ends.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whittle_nas.cli.commands import function_of
from whittle_nas.cli.fronts import open_front
from whittle_nas.cli.options import Sizes
from whittle_nas.cli.parser import run
from whittle_nas.cli.recipe import flat, option_words
from whittle_nas.cli.shipped import read_path
from whittle_nas.export.hf_in import litgpt_directory
from whittle_nas.space.front import Front as StoredFront
from whittle_nas.space.front import FrontEntry, pick_entry
from whittle_nas.space.subnetwork import SubNetwork

__all__ = [
    "Checkpoint", "Choice", "Front", "SubNetwork", "candidates", "evaluate", "export", "finetune",
    "importance", "load", "prune", "search",
]  # fmt: skip

_kept: list[tempfile.TemporaryDirectory[str]] = []  # removed when the interpreter ends


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory.

    Attributes:
        path: the directory.
    """

    path: Path

    @property
    def config(self) -> Any:
        """Its litgpt config."""
        return self._opened().config

    @property
    def num_params(self) -> int:
        """Its parameters; a table that is also the head counts once."""
        from whittle_nas.weights.axes import num_params

        return num_params(self.config)

    def subnetwork(self, **sizes: Any) -> SubNetwork:
        """A sub-network; sizes that are not given are the model's.

        Raises:
            ConfigError: naming every size that does not fit.
        """
        return Sizes(**sizes).resolve(self._opened())

    def supernet(self, *, device: Any = "cpu", dtype: Any = None) -> Any:
        """The weights as a `SuperNetwork`, whose `subnet` and `standalone` give litgpt models.

        Args:
            device: where they are put; `cuda:0,cuda:1` shares the blocks out between several.
            dtype: of the parameters; None: as stored.
        """
        from whittle_nas.weights.checkpoint import load_supernet

        return load_supernet(self.path, device=device, dtype=dtype)

    def _opened(self) -> Any:
        from whittle_nas.weights.checkpoint import open_checkpoint

        return open_checkpoint(self.path, per_layer=True)

    def __repr__(self) -> str:
        """What it is, in one line."""
        config = self.config
        return f"Checkpoint({str(self.path)!r}: {config.name}, {SubNetwork.from_config(config)})"


@dataclass(frozen=True)
class Choice:
    """One sub-network of a front, ready for `export` and `evaluate`."""

    front: Front
    entry: FrontEntry

    @property
    def subnetwork(self) -> SubNetwork:
        """Its sizes."""
        return self.entry.subnetwork

    @property
    def metrics(self) -> Mapping[str, float]:
        """Every objective and cost by name."""
        return self.entry.metrics

    def __repr__(self) -> str:
        """Its place, numbers and sizes."""
        numbers = ", ".join(f"{name}={value:.6g}" for name, value in self.metrics.items())
        return f"Choice({self.entry.index}: {numbers}; {self.subnetwork})"


@dataclass(frozen=True)
class Front(Sequence[Choice]):
    """The Pareto front of a search: a sequence of choices, by index.

    Attributes:
        stored: content of its `front.json`.
    """

    stored: StoredFront

    @classmethod
    def read(cls, path: Path | str, checkpoint: Checkpoint | Path | str) -> Front:
        """Read the `front.json` of a search of this checkpoint.

        Raises:
            ConfigError: if it is none, or that of another checkpoint.
        """
        found = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(Path(checkpoint))
        return cls(open_front(found._opened(), Path(path)))

    def best(self, budget: str) -> Choice:
        """The best under limits, as `--pick` of `nas export`.

        Raises:
            ConfigError: if nothing is under them; it names the nearest.
        """
        return Choice(self, pick_entry(self.stored, pick=budget))

    def to_pandas(self) -> Any:
        """A table: one row per sub-network, its metrics and sizes."""
        import pandas

        rows = [{**e.metrics, **e.subnetwork.summary()} for e in self.stored.entries]
        index = pandas.Index([entry.index for entry in self.stored.entries], name="index")
        return pandas.DataFrame(rows, index=index)

    def __getitem__(self, at: Any) -> Any:
        """The choice, or choices, at a place."""
        if isinstance(at, slice):
            return [Choice(self, entry) for entry in self.stored.entries[at]]
        return Choice(self, self.stored.entries[at])

    def __len__(self) -> int:
        """How many there are."""
        return len(self.stored.entries)

    def __repr__(self) -> str:
        """What it holds."""
        return f"Front({len(self)} sub-networks by {', '.join(self.stored.objectives)})"

    def _repr_html_(self) -> str:
        """The table, for notebooks."""
        return self.to_pandas()._repr_html_()


def load(path: Path | str, *, verbose: bool = False) -> Checkpoint:
    """A checkpoint: a litgpt or Hugging Face directory, an id of the hub, or `pydoc-1m`.

    Args:
        path: where it is.
        verbose: say what is downloaded or converted.

    Raises:
        ConfigError: if there is none; with what would be right.
    """
    found = Path(read_path("checkpoint_dir", str(path)))
    checkpoint = Checkpoint(litgpt_directory(found, print if verbose else lambda _: None))
    checkpoint._opened()
    return checkpoint


def importance(
    checkpoint: Checkpoint | Path | str,
    data: Any = None,
    *,
    out_dir: Path | str | None = None,
    verbose: bool = False,
    **options: Any,
) -> Checkpoint:
    """Sort a checkpoint, as `nas importance`.

    Args:
        checkpoint: what is sorted.
        data: calibration text: a file, several, or the options of `--data` as a dictionary.
        out_dir: where the sorted checkpoint goes.
        verbose: print what the command prints.
        options: of the command.

    Returns:
        The sorted checkpoint.
    """
    given = _reading(checkpoint, data) | options
    return Checkpoint(_command("importance", given, out_dir, verbose))


def finetune(
    checkpoint: Checkpoint | Path | str,
    data: Any = None,
    *,
    valid: Any = None,
    out_dir: Path | str | None = None,
    verbose: bool = False,
    **options: Any,
) -> Checkpoint:
    """Train all sub-networks at once, as `nas finetune`; arguments as `importance`.

    Args:
        checkpoint: best a sorted one.
        data: training text.
        valid: validation text, in the same forms.
        out_dir: where the trained checkpoint goes.
        verbose: print what the command prints.
        options: of the command.
    """
    given = _reading(checkpoint, data) | _text("valid", valid) | options
    return Checkpoint(_command("finetune", given, out_dir, verbose))


def prune(
    checkpoint: Checkpoint | Path | str,
    data: Any = None,
    *,
    out_dir: Path | str | None = None,
    verbose: bool = False,
    **options: Any,
) -> Checkpoint:
    """Prune or round the weights, as `nas prune`; arguments as `importance`."""
    given = _reading(checkpoint, data) | options
    return Checkpoint(_command("prune", given, out_dir, verbose))


def candidates(
    checkpoint: Checkpoint | Path | str,
    data: Any = None,
    *,
    out_dir: Path | str | None = None,
    verbose: bool = False,
    **options: Any,
) -> Path:
    """Make cheaper versions of every layer's parts, as `nas candidates`.

    Arguments as `importance`.

    Returns:
        The directory of the library, for `search(..., method="ilp", candidates=library)`.
    """
    return _command("candidates", _reading(checkpoint, data) | options, out_dir, verbose)


def search(
    checkpoint: Checkpoint | Path | str,
    data: Any = None,
    *,
    out_dir: Path | str | None = None,
    verbose: bool = False,
    **options: Any,
) -> Front:
    """Find the front of quality against cost, as `nas search`; arguments as `importance`."""
    given = _reading(checkpoint, data) | options
    made = _command("search", given, out_dir, verbose)
    return Front.read(made / "front.json", load(given["checkpoint_dir"]))


def evaluate(
    what: Checkpoint | Choice | Front | Path | str,
    data: Any = None,
    *,
    tasks: Sequence[str] | str | None = None,
    out_dir: Path | str | None = None,
    verbose: bool = False,
    **options: Any,
) -> Any:
    """Score a model, a choice or a whole front, as `nas evaluate`.

    Args:
        what: a checkpoint, one sub-network of a front, or all of them.
        data: text whose perplexity is measured; forms as in `importance`.
        tasks: lm-eval tasks.
        out_dir: where the results go.
        verbose: print what the command prints.
        options: of the command.

    Returns:
        `results.csv` as a pandas table.
    """
    import pandas

    given = _chosen(what) | _text("data", data) | options
    if tasks is not None:
        given["tasks"] = tasks if isinstance(tasks, str) else ",".join(tasks)
    return pandas.read_csv(_command("evaluate", given, out_dir, verbose) / "results.csv")


def export(
    what: Choice | Checkpoint | Path | str,
    out_dir: Path | str,
    *,
    verbose: bool = False,
    **options: Any,
) -> Path:
    """Write a sub-network as an ordinary checkpoint, as `nas export`.

    Args:
        what: a choice of a front; or a checkpoint, with `subnetwork={"n_layer": 20}` or
            `extreme="smallest"`.
        out_dir: the directory to write.
        verbose: print what the command prints.
        options: of the command, such as `format="hf"` and `push_to_hub="me/my-model"`.

    Returns:
        The directory.
    """
    return _command("export", _chosen(what) | options, out_dir, verbose)


def _chosen(what: Any) -> dict[str, Any]:
    if isinstance(what, (Choice, Front)):
        stored = what.front.stored if isinstance(what, Choice) else what.stored
        given: dict[str, Any] = {"checkpoint_dir": stored.checkpoint_dir, "front": stored.path}
        return given | ({"index": what.entry.index} if isinstance(what, Choice) else {})
    return _reading(what, None)


def _reading(checkpoint: Checkpoint | Path | str, data: Any) -> dict[str, Any]:
    path = checkpoint.path if isinstance(checkpoint, Checkpoint) else checkpoint
    return {"checkpoint_dir": path} | _text("data", data)


def _text(name: str, data: Any) -> dict[str, Any]:
    if data is None:
        return {}
    if isinstance(data, Mapping):
        return {name: dict(data)}
    files = list(data) if isinstance(data, (list, tuple)) else [data]
    return {f"{name}.files": [str(file) for file in files]}


def _command(
    name: str, options: Mapping[str, Any], out_dir: Path | str | None, verbose: bool
) -> Path:
    """Run a command and return its directory."""
    if out_dir is None:
        _kept.append(tempfile.TemporaryDirectory(prefix="nas-"))
        out_dir = Path(_kept[-1].name) / name
    words = [word for key, value in flat(options).items() for word in option_words(key, value)]
    with contextlib.nullcontext() if verbose else _quiet():
        run(name, function_of(name), [*words, "--out_dir", str(out_dir)])
    return Path(out_dir)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        yield
