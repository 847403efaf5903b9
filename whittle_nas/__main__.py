"""`nas <command> --config file.yaml [--option value ...]`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from whittle_nas import __version__
from whittle_nas.cli.commands import COMMANDS, function_of
from whittle_nas.errors import ConfigError, Terminated, disk_errors


def usage() -> str:
    """The text of `nas --help`."""
    width = max(map(len, COMMANDS)) + 2
    rows = "\n".join(f"  {name:<{width}}{summary}" for name, (_, _, summary) in COMMANDS.items())
    return (
        "usage: nas <command> --config file.yaml [--option value ...]\n\n"
        "Find smaller, faster language models inside a pretrained litgpt checkpoint.\n\n"
        f"commands, in the order in which they are usually chained:\n{rows}\n\n"
        "nas <command> --help           explains every option\n"
        "nas <command> --print_config   prints a starting file for --config\n"
        "nas --version                  prints the version"
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        0, or after one sentence on stderr 2 for everything the user can mend, 130 for Ctrl-C and
        143 for SIGTERM.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())  # noqa: T201
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"nas {__version__}")  # noqa: T201
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        from whittle_nas.cli.spelling import did_you_mean

        choice = did_you_mean(name, COMMANDS) or f"; choose from {', '.join(COMMANDS)}"
        return _fail(f"unknown command {name!r}{choice}")
    # Both libraries chatter otherwise: the one at every fork, the other at every memory profile.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    # Where the home directory can't be written, as in containers, it advises on its font cache.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    try:
        with _terminable(), disk_errors(None):
            _run(name, arguments[1:])
            sys.stdout.flush()  # the last moment at which a full disk behind `>` can be told
    except ConfigError as error:
        return _fail(str(error))
    except Terminated as error:
        return _fail(str(error) or "stopped by SIGTERM", status=143)
    except KeyboardInterrupt as error:
        return _fail(str(error) or "interrupted", status=130)
    except BrokenPipeError:  # `nas profile | head`
        _drop_output()
    return 0


def _run(name: str, arguments: list[str]) -> None:
    from whittle_nas.cli.parser import run

    run(name, function_of(name), arguments)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the block like Ctrl-C: temporary files go, and the user gets a sentence."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    own = os.getpid()

    def end(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != own:  # a worker that was forked, and is ended by its parent
            os.kill(os.getpid(), number)
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _drop_output() -> None:
    """What is left to print goes nowhere; the interpreter would complain about it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(sentence: str, status: int = 2) -> int:
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
    print(f"nas: {' '.join(sentence.split())}", file=sys.stderr)  # noqa: T201
    return status


if __name__ == "__main__":
    sys.exit(main())
