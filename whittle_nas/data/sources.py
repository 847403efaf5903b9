"""Documents of one source: rows on disk or on the hub, or sequences of a litgpt data module."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from whittle_nas.data.options import Part, TextSource
from whittle_nas.errors import ConfigError

if TYPE_CHECKING:
    from litgpt.tokenizer import Tokenizer
    from torch import Tensor

Row = dict[str, Any]


class Document(NamedTuple):
    """Tokens of a document: `lead` without text (BOS), `content` with text, then perhaps EOS."""

    ids: "Tensor"  # int32: a corpus of Python integers would take nine times the memory
    lead: int
    content: int
    num_bytes: int


Reader = Callable[[], Document]


def encode(text: str, tokenizer: "Tokenizer") -> Document:
    """Tokenise one document by the tokenizer's convention: BOS if used, text, EOS if there is one.

    Where one token serves as both, and so starts every document, it is not repeated at the end.
    """
    import torch

    if not text:
        return Document(torch.empty(0, dtype=torch.int32), 0, 0, 0)
    ids = tokenizer.encode(text)
    lead = int(tokenizer.use_bos and len(ids) > 0 and ids[0] == tokenizer.bos_id)
    content = len(ids) - lead
    if tokenizer.eos_id is not None and not (lead and tokenizer.eos_id == tokenizer.bos_id):
        ids = torch.cat((ids, ids.new_tensor([tokenizer.eos_id])))
    return Document(ids, lead, content, len(text.encode("utf-8", errors="replace")))


def documents(
    source: TextSource,
    tokenizer: "Tokenizer",
    *,
    part: Part,
    valid_fraction: float,
    seed: int | None,
    block_size: int,
    max_tokens: int | None,
) -> list[Reader]:
    """The documents of a source, in a random order (`seed`) or as they stand (None).

    Each comes as a function that tokenises it, so that a small sample of a large set costs little.

    Raises:
        ConfigError: A file or data set that is missing, empty or not of the stated form.
    """
    if source.module:
        found = _module_documents(
            source, tokenizer, part=part, block_size=block_size, max_tokens=max_tokens
        )
        return [partial(found.__getitem__, i) for i in range(len(found))]
    rows = _hub_rows(source, seed) if source.hub else _file_rows(source)
    rows, order = split_rows(
        rows, part, valid_fraction=valid_fraction, seed=seed, limit=source.num_documents
    )
    return [partial(_encode_row, rows, i, source.columns, tokenizer) for i in order]


def _encode_row(
    rows: Sequence[Row], index: int, columns: list[str], tokenizer: "Tokenizer"
) -> Document:
    row = rows[index]
    return encode("\n".join(str(row[c]) for c in columns if row[c] is not None), tokenizer)


def split_rows(
    rows: Sequence[Row], part: Part, *, valid_fraction: float, seed: int | None, limit: int | None
) -> tuple[Sequence[Row], list[int]]:
    """Order, limit and split rows; the last `valid_fraction` of them (at least one) is held out.

    A single text is split at a line break, so that one file is enough for both parts.
    """
    order = list(range(len(rows)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    order = order[:limit]
    if valid_fraction == 0:
        return rows, order
    if len(order) == 1:
        return [_cut_row(rows[order[0]], part, valid_fraction)], [0]
    num_valid = min(max(1, round(valid_fraction * len(order))), len(order) - 1)
    return rows, order[-num_valid:] if part is Part.VALID else order[:-num_valid]


def _cut_row(row: Row, part: Part, valid_fraction: float) -> Row:
    def cut(text: Any) -> Any:
        if not isinstance(text, str):
            return text
        target = int(len(text) * (1 - valid_fraction))
        at = text.rfind("\n", 0, target) + 1 or target
        return text[at:] if part is Part.VALID else text[:at]

    return {name: cut(value) for name, value in row.items()}


def _file_rows(source: TextSource) -> list[Row]:
    return [row for path in source.paths for row in _read_file(path, source)]


def _read_file(path: Path, source: TextSource) -> Iterator[Row]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"data.files: {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.files: {path} can't be read as UTF-8 text ({error})") from None
    if path.suffix in (".jsonl", ".json", ".ndjson"):
        yield from _json_rows(text, path, source.columns)
    elif source.columns != ["text"]:
        raise ConfigError(
            f"data.column={source.column!r} needs JSON lines, and {path} is plain text by its name"
        )
    else:
        pieces = text.split(source.separator) if source.separator else [text]
        yield from ({"text": piece} for piece in pieces if piece.strip())


def _json_rows(text: str, path: Path, columns: list[str]) -> Iterator[Row]:
    """Rows of JSON lines, or of one JSON array."""
    if text.lstrip().startswith("["):
        numbered = list(enumerate(_parse(text, f"{path}"), start=1))
    else:
        # not splitlines(): it also cuts at U+2028, which may stand inside a JSON string
        lines = enumerate(text.split("\n"), start=1)
        numbered = [(n, _parse(line, f"{path}, line {n}")) for n, line in lines if line.strip()]
    for number, row in numbered:
        missing = [c for c in columns if not isinstance(row, dict) or c not in row]
        if missing:
            found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise ConfigError(
                f"data.column: {path}, row {number} has no column {missing[0]!r} (it has: {found})"
            )
        yield {c: row[c] for c in columns}


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"data.files: {where} is not JSON ({error.msg} at column {error.colno})"
        ) from None
    except (RecursionError, ValueError) as error:  # nested too deep, or a number of 5000 digits
        raise ConfigError(f"data.files: {where} can't be read ({error})") from None


def _hub_rows(source: TextSource, seed: int | None) -> Sequence[Row]:
    """Rows through `datasets`: a sample is streamed, a whole set is downloaded once."""
    import datasets

    assert source.hub is not None
    try:
        found: Any = datasets.load_dataset(
            source.hub,
            source.hub_config,
            split=source.hub_split,
            revision=source.hub_revision,
            streaming=source.num_documents is not None,
        )
        rows = found if source.num_documents is None else _sample(found, source.num_documents, seed)
    except Exception as error:  # datasets has no common base class for what can go wrong
        where = f"data.hub={source.hub!r}, config {source.hub_config}, split {source.hub_split}"
        raise ConfigError(f"{where} can't be loaded: {_first_line(error)}") from error
    names = list(rows[0]) if len(rows) else source.columns
    for column in source.columns:
        if column not in names:
            known = ", ".join(names)
            raise ConfigError(
                f"data.column: {source.hub} has no column {column!r} (it has: {known})"
            )
    return rows


def _sample(stream: Any, num_documents: int, seed: int | None) -> list[Row]:
    if seed is not None:
        # the buffer bounds both the memory and how far into the set the sample reaches
        stream = stream.shuffle(seed=seed, buffer_size=max(10_000, num_documents))
    return list(stream.take(num_documents))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _module_documents(
    source: TextSource,
    tokenizer: "Tokenizer",
    *,
    part: Part,
    block_size: int,
    max_tokens: int | None,
) -> list[Document]:
    """The token sequences of a litgpt data module, one at a time so that nothing is padded."""
    found: list[Document] = []
    num_tokens = 0
    with module_loader(source, tokenizer, part=part, block_size=block_size) as (_, loader):
        for batch in loader:
            ids = (batch["input_ids"] if isinstance(batch, dict) else batch)[0].int()
            lead = int(tokenizer.bos_id is not None and ids[:1].tolist() == [tokenizer.bos_id])
            num_bytes = len(tokenizer.decode(ids).encode())
            found.append(Document(ids, lead, len(ids) - lead, num_bytes))
            num_tokens += len(ids)
            if len(found) == source.num_documents or (
                max_tokens is not None and num_tokens >= max_tokens
            ):
                break
    return found


@contextmanager
def module_loader(
    source: TextSource, tokenizer: "Tokenizer", *, part: Part, block_size: int
) -> Iterator[tuple[Any, Any]]:
    """A litgpt data module, and its loader of the split that `part` stands for.

    Raises:
        ConfigError: What is wrong with the module or, within the block, with its data.
    """
    module = build_module(source)
    module.connect(tokenizer, batch_size=1, max_seq_length=block_size)
    try:
        module.prepare_data()
        module.setup()
        loader = module.val_dataloader() if part is Part.VALID else module.train_dataloader()
        yield module, loader[0] if isinstance(loader, list) else loader
    except (OSError, ImportError, ValueError, AssertionError, KeyError, TypeError) as error:
        raise ConfigError(
            f"data.module={source.module}: {type(error).__name__}: {error}"
        ) from error


def build_module(source: TextSource) -> Any:
    """The `litgpt.data` module that a source names.

    Raises:
        ConfigError: if there is none of that name, or its arguments are wrong.
    """
    import litgpt.data
    from jsonargparse import ArgumentError, ArgumentParser

    base = litgpt.data.DataModule
    modules = {c.__name__: c for c in base.__subclasses__() if c.__module__.startswith("litgpt.")}
    if source.module not in modules:
        known = ", ".join(sorted(modules))
        raise ConfigError(f"data.module={source.module!r} is not in litgpt.data, which has {known}")
    cls = modules[source.module]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "module")
    # worker processes would cost more than they bring: every sequence is read once
    workers = {"num_workers": 0} if hasattr(cls, "num_workers") else {}
    try:
        parsed = parser.parse_object({"module": {**workers, **source.module_args}})
        return parser.instantiate_classes(parsed).module
    except (ArgumentError, ValueError, OSError, KeyError) as error:
        raise ConfigError(f"data.module_args of {source.module}: {_first_line(error)}") from error
