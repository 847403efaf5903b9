"""What a user can mend, as one exception, and the place where a failing disk becomes one."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ConfigError(Exception):
    """Wrong input. The message is one sentence: which option or file, its value, what is right.

    The command line prints it on stderr and exits with status 2.
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM: the wish to end came from a scheduler or `kill`, and not from the keyboard."""


AGAIN = "run the same command again"
_FREE, _ALLOW = "free some space and {again}", "allow it, or give another place, and {again}"
# What the system says of a disk: in words, and what to do about it.
_DISK = {
    errno.ENOSPC: ("the disk is full (no space left on device)", _FREE),
    errno.EDQUOT: ("the disk quota is used up", _FREE),
    errno.EFBIG: ("a file may not grow that large here", "give another place"),
    errno.EROFS: ("the file system is read-only", _ALLOW),
    errno.EACCES: ("permission denied", _ALLOW),
    errno.EPERM: ("the system does not permit it", _ALLOW),
    errno.EIO: ("the disk reports an input/output error", "check it and {again}"),
    errno.ESTALE: ("the network file system has lost it", "mount it again and {again}"),
    errno.ENOENT: ("its directory was removed meanwhile", "{again}"),
}
# Libraries that write without Python do not say which error it was: torch's writer, which only
# finds less in the file than it wrote, and safetensors, in words.
_FULL = re.compile(r"file write failed|iostream error|unexpected pos|No space left on device")
_REMOVED = re.compile(r"Parent directory .* does not exist")
_RUST = re.compile(r"\(os error (\d+)\)")


@contextmanager
def disk_errors(target: Path | None, *, again: str = AGAIN) -> Iterator[None]:
    """Turn a disk that is full, read-only or gone into one sentence.

    Args:
        target: what the block writes; None where the error itself has to name it.
        again: how the user repeats what was done.

    Raises:
        ConfigError: in place of the error, however deep a library has wrapped it.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        number, path = _disk_error(error, target)
        if number is None:
            raise
        reason, remedy = _DISK[number]
        verb = "read" if os.path.isfile(path) and not os.access(path, os.R_OK) else "write"
        sentence = f"can't {verb} {path}: {reason}; {remedy.format(again=again)}"
        raise ConfigError(sentence) from error


def _disk_error(error: Exception, target: Path | None) -> tuple[int | None, str]:
    """Number of the first error of a disk in a chain of errors, and the path that it is about."""
    link: BaseException | None = error
    while link is not None:
        number = _number(link)
        # of a copy or a rename the second name is the one that was to be written
        named = getattr(link, "filename2", None) or getattr(link, "filename", None)
        path = Path(os.fsdecode(named)) if isinstance(named, (str, bytes)) else None
        if number == errno.ENOENT and not _was_removed(path, target):
            number = None
        if number in _DISK:
            return number, str(_shown(path, target))
        link = link.__cause__ or link.__context__
    return None, ""


def _number(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    text = str(error)
    if found := _RUST.search(text):
        return int(found[1])
    if _FULL.search(text):
        return errno.ENOSPC
    return errno.ENOENT if _REMOVED.search(text) else None


def _was_removed(path: Path | None, target: Path | None) -> bool:
    """Whether a missing file is not a file that should be there, but one that has lost its place.

    A file that is read and missing is a mistake of the program, and has to look like one.
    """
    if target is None:
        return False
    return not target.parent.is_dir() or (path is not None and not path.parent.exists())


def _shown(path: Path | None, target: Path | None) -> Path | str:
    """The path without the temporary names of which the user knows nothing."""
    if target is None:
        return path or "the output"
    if path is None or path.name.startswith(".") or path.parent.name.startswith("."):
        return target
    return path


def at_least(name: str, value: float, least: float) -> None:
    """Refuse the value of an option that is too small.

    Raises:
        ConfigError: naming it.
    """
    if value < least:
        raise ConfigError(f"{name}={value} must be at least {least}")
