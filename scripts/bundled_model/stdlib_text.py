"""English prose that ships with every Python, in documents, split without leaks.

Help topics, docstrings and comment blocks of the standard library, read from source: nothing is
imported but the topics themselves, which are data. Used by make_tiny_checkpoint.py.
"""

import ast
import hashlib
import io
import json
import re
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

STDLIB = Path(sysconfig.get_paths()["stdlib"])
LICENCE_PAGE = "See https://docs.python.org/3/license.html\n"
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# Tests and tools whose prose is not meant for readers; pydoc_data is read as data instead.
SKIPPED = {"test", "tests", "idle_test", "turtledemo", "lib2to3", "pydoc_data", "site-packages"}
# Files under a licence of their own, beside Python's: not to be shipped on.
OWN_LICENCE = re.compile(
    r"Permission to use, copy|Permission is (hereby )?granted|Redistribution and use|SPDX-License"
)
WORD = re.compile(r"[\"'(`*]*[A-Za-z][A-Za-z'-]*[\"')`*.,;:!?]*")


def as_prose(paragraph: str) -> str | None:
    """The paragraph on one line, or None where it is code, a table or a heading."""
    text = " ".join(paragraph.replace("\u2019", "'").split())
    words = text.split()
    plain = sum(bool(WORD.fullmatch(word)) for word in words)
    is_prose = (
        len(words) >= 8
        and plain >= 0.8 * len(words)
        and text.isascii()
        and re.match(r"[\"'(`*]*[A-Z]", text)
        and text[-1] in ".:!?)"
    )
    return text if is_prose else None


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every docstring in a Python source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            yield node.body[0].lineno, text


def comments(source: str) -> Iterator[tuple[int, str]]:
    """(first line, text) of every block of comment lines in a Python source."""
    first, last, lines = 0, 0, []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or not token.line.lstrip().startswith("#"):
            continue
        if token.start[0] != last + 1:
            yield first, "\n".join(lines)
            first, lines = token.start[0], []
        last = token.start[0]
        lines.append(token.string.lstrip("#").strip())
    yield first, "\n".join(lines)


def read_sources() -> dict[str, list[str]]:
    """Paragraphs of prose by source: a help topic, or a file of the standard library."""
    texts = {f"topics/{name}": [topics[name]] for name in sorted(topics)}
    for path in sorted(STDLIB.rglob("*.py")):
        relative = path.relative_to(STDLIB)
        if SKIPPED & set(relative.parts):
            continue
        source = path.read_text(encoding="utf-8")
        if not OWN_LICENCE.search(source):
            found = sorted([*docstrings(source), *comments(source)])
            texts[relative.as_posix()] = [text for _, text in found]
    sources = {}
    for name, blocks in texts.items():
        paragraphs = [p for block in blocks for p in re.split(r"\n[ \t]*\n", block)]
        sources[name] = [prose for p in paragraphs if (prose := as_prose(p))]
    return sources


def shingles(text: str, length: int = 8) -> set[tuple[str, ...]]:
    """All runs of `length` words, without case and punctuation: two texts sharing one overlap."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def drop_known(paragraphs: Iterable[str], known: set[tuple[str, ...]]) -> list[str]:
    """The paragraphs that share no run of eight words with `known`, which grows by what is kept."""
    kept = []
    for paragraph in paragraphs:
        own = shingles(paragraph)
        if not own & known:
            kept.append(paragraph)
            known |= own
    return kept


def into_documents(paragraphs: list[str], max_chars: int = 3000) -> list[str]:
    """Join the paragraphs of one source, one a line, to documents of about `max_chars`."""
    documents, size = [], max_chars
    for paragraph in paragraphs:
        if size + len(paragraph) > max_chars:
            documents.append([])
            size = 0
        documents[-1].append(paragraph)
        size += len(paragraph)
    texts = ["\n".join(lines) for lines in documents]
    return [text for text in texts if len(text) >= 200]


def split_of(name: str, num_chars: int) -> str:
    """Where a whole source goes: by the hash of its name, and no giant is held out."""
    bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20
    held_out = {0: "valid", 1: "test"} if num_chars <= 20_000 else {}
    return held_out.get(bucket, "pretrain")


def make_splits(sources: dict[str, list[str]]) -> dict[str, list[str]]:
    """Documents by split; no eight words in a row are in two of pretrain, valid and test.

    Help topics quote each other and modules share docstrings, so that a split by source alone would
    leak. Held-out text goes first: what it says is dropped from the training text, not the reverse.
    """
    split = {name: split_of(name, sum(map(len, text))) for name, text in sources.items()}
    known: set[tuple[str, ...]] = set()
    splits = {}
    for key in ("valid", "test", "pretrain"):
        names = [name for name in sources if split[name] == key]
        kept = [into_documents(drop_known(sources[name], known)) for name in names]
        splits[key] = [document for documents in kept for document in documents]
    # Parts of the training text, small enough to ship and disjoint from each other.
    splits["train"] = splits["pretrain"][::5]
    splits["calibration"] = splits["pretrain"][2::20]
    return splits


def write_text(out_dir: Path, splits: dict[str, list[str]]) -> None:
    """The splits that are small enough to ship as JSON lines, and the licence they are under."""
    for key in ("train", "calibration", "valid", "test"):
        lines = [json.dumps({"text": text}) + "\n" for text in splits[key]]
        (out_dir / f"{key}.jsonl").write_text("".join(lines), encoding="utf-8")
    licence = STDLIB / "LICENSE.txt"  # some distributions leave it out
    text = licence.read_text(encoding="utf-8") if licence.is_file() else LICENCE_PAGE
    (out_dir / "LICENSE-PYTHON.txt").write_text(text, encoding="utf-8")
