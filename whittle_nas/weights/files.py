"""Writing that is never half done: a temporary name, then a rename."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from whittle_nas.errors import ConfigError, disk_errors

WEIGHTS = "lit_model.pth"  # a directory with it is a litgpt checkpoint
PRUNE_REPORT = "prune.json"  # what `nas prune` did
GRIDS = "quantization.safetensors"  # scales and zero points of its integers
RUN_FILE = "run.yaml"  # how to repeat a run; a directory that holds it is finished
_LOCK = ".lock"
PARTIAL, _OLD = ".partial", ".old"  # ends of the names of what is not finished, or replaced
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # a file system without any


@contextmanager
def atomic_directory(out_dir: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling of `out_dir` that takes its place when the block ends well.

    A mounted volume can't be replaced: there it is a directory inside, whose files move up.

    Args:
        out_dir: directory to make.
        overwrite: replace what is there.

    Yields:
        The temporary directory. It is removed if the block fails.

    Raises:
        ConfigError: if `out_dir` holds something.
        OSError: if the disk does not take it; see `errors.disk_errors`.
    """
    check_free(out_dir, overwrite=overwrite)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    folder = out_dir if os.path.ismount(out_dir) else out_dir.parent
    partial = Path(tempfile.mkdtemp(PARTIAL, f".{out_dir.name}.", folder))
    try:
        yield partial
        for path in partial.rglob("*"):
            _sync(path)
        note = _note_beside(Path(os.path.realpath(out_dir)))
        if note.is_file():  # so that no directory is there without it
            _move(note, partial / RUN_FILE)
        partial.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        if folder == out_dir:
            _fill_directory(partial, out_dir)
        else:
            _replace_directory(partial, out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def hold_directory(out_dir: Path, *, note: str = "") -> Iterator[None]:
    """Keep every other process out of `out_dir`, which need not exist yet, during the block.

    The lock is a file beside the directory, which goes at the end; where nothing can be made there
    (a mounted volume) it is in the directory. The kernel frees it when the process dies, however it
    dies: a file that is left behind holds nothing. It is a record lock, which forked workers do not
    inherit and so can't keep when their parent was killed.

    Args:
        out_dir: the directory.
        note: text of the `run.yaml` that appears in `out_dir`, if it exists, when the block ends
            well. It is written before the block: a disk that is full then is full at once, and no
            finished directory lacks it.

    Raises:
        ConfigError: if another process holds the directory, or if nothing can be written there.
    """
    target = Path(os.path.realpath(out_dir))
    _check_no_file(target, out_dir)
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        with disk_errors(out_dir):
            path, descriptor = _lock(target)
    except (OSError, ConfigError) as error:
        _remove_empty(made)
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"--out_dir {out_dir} can't be written: {error.strerror}") from None
    if descriptor is None:
        raise ConfigError(
            f"--out_dir {out_dir} is in use by another run; wait for it or give another one"
        )
    try:
        _repair(target)
        with _noted(target, path.parent, note) if note else nullcontext():
            yield
    finally:
        path.unlink(missing_ok=True)  # while it is held, so that no other run holds it
        os.close(descriptor)
        _remove_empty(made)


@contextmanager
def _noted(target: Path, folder: Path, note: str) -> Iterator[None]:
    """Write a note into the folder of the lock, beside or in the target, and move it at the end."""
    path = _note_inside(target) if folder == target else _note_beside(target)
    try:
        path.write_text(note, encoding="utf-8")
        yield
        if path.is_file() and target.is_dir():
            _move(path, target / RUN_FILE)
    finally:
        path.unlink(missing_ok=True)


def _note_beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{RUN_FILE}{PARTIAL}")


def _note_inside(target: Path) -> Path:
    return target / f".{RUN_FILE}{PARTIAL}"


def _move(path: Path, target: Path) -> None:
    try:
        path.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:  # a mounted volume has its parent on another device
            raise
        atomic_write_text(target, path.read_text(encoding="utf-8"))


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
        elif path.name.endswith(PARTIAL):
            _remove(path)
    for folder in ("", "*/", "*/*/") if target.is_dir() else ():
        for path in target.glob(f"{folder}.*{PARTIAL}"):
            _remove(path)


def _lock(target: Path) -> tuple[Path, int | None]:
    """The lock file of a directory, and its descriptor if it is ours."""
    beside = target.with_name(f".{target.name}.lock")
    try:
        return beside, _open_lock(beside)
    except OSError:
        if not target.is_dir():
            raise
    return target / _LOCK, _open_lock(target / _LOCK)


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
    """Names of what a directory holds beside this run's own; empty if there is none."""
    own = {_LOCK, _note_inside(out_dir).name}
    return sorted({path.name for path in out_dir.iterdir()} - own) if out_dir.is_dir() else []


def _check_no_file(target: Path, out_dir: Path) -> None:
    for path in (target, *target.parents):
        try:
            mode = path.stat().st_mode  # once: another run may remove it meanwhile
        except OSError:
            continue
        if not stat.S_ISDIR(mode):
            what = "is a file" if path == target else f"lies inside the file {path}"
            raise ConfigError(f"--out_dir {out_dir} {what}; give a directory")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place when the block ends well.

    A reader sees the old or the new file, never a part; errors of the disk name `path`.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
    except OSError as error:
        if error.filename in (None, str(partial)):
            error.filename = str(path)
        raise
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new one, never a part."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def remove_run(out_dir: Path, names: Iterable[str]) -> None:
    """Remove what an earlier run left in a directory, first the note that it was finished."""
    for name in (RUN_FILE, *names):
        _remove(out_dir / name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file is on its disk: some say only then that they are full."""
    if path.is_file():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace_directory(partial: Path, out_dir: Path) -> None:
    if not out_dir.exists():
        partial.rename(out_dir)
        return
    old = Path(tempfile.mkdtemp(_OLD, f".{out_dir.name}.", out_dir.parent))
    out_dir.rename(old / "replaced")
    partial.rename(out_dir)
    shutil.rmtree(old, ignore_errors=True)


def _fill_directory(partial: Path, out_dir: Path) -> None:
    remove_run(out_dir, set(contents(out_dir)) - {partial.name})
    for path in sorted(partial.iterdir(), key=lambda path: path.name == RUN_FILE):  # it comes last
        path.replace(out_dir / path.name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
