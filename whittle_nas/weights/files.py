"""Writing that is never half done: a temporary name, then a rename."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from whittle_nas.errors import ConfigError

_WRITER_FAILED = ("file write failed", "iostream error", "unexpected pos", "No space left")


@contextmanager
def atomic_directory(out_dir: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling of `out_dir` that takes its place when the block ends well.

    Args:
        out_dir: directory to make.
        overwrite: replace what is there.

    Yields:
        The temporary directory. It is removed if the block fails.

    Raises:
        ConfigError: if `out_dir` holds something, or if the device is full.
    """
    check_free(out_dir, overwrite=overwrite)
    with _device_errors(out_dir):
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        with _device_errors(out_dir):
            yield partial
            partial.chmod(0o777 & ~_umask())  # mkdtemp makes it private
            _replace_directory(partial, out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_free(out_dir: Path, *, overwrite: bool = False) -> None:
    """Refuse to write over a user's files.

    Raises:
        ConfigError: if `out_dir` is a file, or a directory that is not empty.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise ConfigError(f"--out_dir {out_dir} is a file; give a directory")
    if not overwrite and out_dir.is_dir() and any(out_dir.iterdir()):
        raise ConfigError(f"--out_dir {out_dir} is not empty; give a new one, or --overwrite true")


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new one, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with _device_errors(path):
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _device_errors(target: Path) -> Iterator[None]:
    """Turn a full or read-only device into a sentence.

    torch's zip writer reports a failed write as a RuntimeError, so its message is read too.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        raise ConfigError(f"can't write {target}: {error.strerror}") from error
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _WRITER_FAILED):
            raise
        raise ConfigError(f"can't write {target}: no space left on the device") from error


def _replace_directory(partial: Path, out_dir: Path) -> None:
    if not out_dir.exists():
        partial.rename(out_dir)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.old.", dir=out_dir.parent))
    out_dir.rename(old / "replaced")
    partial.rename(out_dir)
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
