"""Writing that is never half done: a temporary name, then a rename."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from whittle_nas.errors import ConfigError

_LOCK = ".lock"
_PARTIAL, _OLD = ".partial", ".old"  # ends of the names of what is not finished, or replaced
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # a file system without any
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
        partial = Path(tempfile.mkdtemp(_PARTIAL, f".{out_dir.name}.", out_dir.parent))
    try:
        with _device_errors(out_dir):
            yield partial
            partial.chmod(0o777 & ~_umask())  # mkdtemp makes it private
            _replace_directory(partial, out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def hold_directory(out_dir: Path) -> Iterator[None]:
    """Keep every other process out of `out_dir`, which need not exist yet, during the block.

    The lock is a file beside the directory, which goes at the end; where nothing can be made there
    (a mounted volume) it is in the directory. The kernel frees it when the process dies, however it
    dies: a file that is left behind holds nothing. It is a record lock, which forked workers do not
    inherit and so can't keep when their parent was killed.

    Raises:
        ConfigError: if another process holds the directory, or if nothing can be written there.
    """
    target = Path(os.path.realpath(out_dir))
    _check_no_file(target, out_dir)
    made = [parent for parent in target.parents if not parent.exists()]
    beside = target.with_name(f".{target.name}.lock")
    try:
        try:
            path, descriptor = beside, _open_lock(beside)
        except OSError:
            if not target.is_dir():
                raise
            path = target / _LOCK
            descriptor = _open_lock(path)
    except OSError as error:
        _remove_empty(made)
        raise ConfigError(f"--out_dir {out_dir} can't be written: {error.strerror}") from None
    if descriptor is None:
        raise ConfigError(
            f"--out_dir {out_dir} is in use by another run; wait for it or give another one"
        )
    try:
        _repair(target)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held, so that no other run holds it
        os.close(descriptor)
        _remove_empty(made)


def _repair(target: Path) -> None:
    """Clear away what a killed run left, and put back what it had moved aside.

    Only the holder of the lock may do so: to anyone else these may be files of a running one.
    """
    beside = target.parent.iterdir() if target.parent.is_dir() else ()
    for path in [path for path in beside if path.name.startswith(f".{target.name}.")]:
        if path.name.endswith(_OLD):
            if (path / "replaced").is_dir() and not target.exists():
                (path / "replaced").rename(target)
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.endswith(_PARTIAL):
            shutil.rmtree(path, ignore_errors=True)
    for path in target.glob(f".*{_PARTIAL}") if target.is_dir() else ():
        path.unlink(missing_ok=True)


def _open_lock(path: Path) -> int | None:
    """Descriptor of a lock file that is ours, None if it is another process's."""
    for _ in range(100):  # another run may remove the file, and its folder, at any moment
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except (FileNotFoundError, FileExistsError):
            continue
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def check_free(out_dir: Path, *, overwrite: bool = False) -> None:
    """Refuse to write over a user's files.

    Raises:
        ConfigError: if `out_dir` is a file, or a directory that is not empty.
    """
    _check_no_file(Path(os.path.realpath(out_dir)), out_dir)
    if out_dir.is_symlink() and not out_dir.exists():
        raise ConfigError(f"--out_dir {out_dir} is a link that leads nowhere; give a directory")
    if not overwrite and contents(out_dir):
        raise ConfigError(f"--out_dir {out_dir} is not empty; give a new one, or --overwrite true")


def contents(out_dir: Path) -> list[str]:
    """Names of what a directory holds beside the lock of this run; empty if there is none."""
    return sorted({path.name for path in out_dir.iterdir()} - {_LOCK}) if out_dir.is_dir() else []


def _check_no_file(target: Path, out_dir: Path) -> None:
    for path in (target, *target.parents):
        if os.path.exists(path) and not os.path.isdir(path):
            what = "is a file" if path == target else f"lies inside the file {path}"
            raise ConfigError(f"--out_dir {out_dir} {what}; give a directory")


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new one, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}{_PARTIAL}")
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
    old = Path(tempfile.mkdtemp(_OLD, f".{out_dir.name}.", out_dir.parent))
    out_dir.rename(old / "replaced")
    partial.rename(out_dir)
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
