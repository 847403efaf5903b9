"""`nas <command> --config file.yaml [--option value ...]`."""

from __future__ import annotations

import importlib
import os
import sys

from whittle_nas import __version__
from whittle_nas.errors import ConfigError

# command: (module, function, what it does). Only the chosen module is imported.
COMMANDS = {
    "importance": ("importance", "importance", "sort the weights of a checkpoint by importance"),
    "finetune-supernet": ("finetune", "finetune", "train all sub-networks of a checkpoint at once"),
    "finetune": ("finetune", "finetune", "alias of finetune-supernet"),
    "search": ("search", "search", "find the Pareto front of quality against cost"),
    "evaluate": ("evaluate", "evaluate", "score sub-networks with the LM Evaluation Harness"),
    "export": ("export", "export", "write a sub-network as a litgpt or Hugging Face checkpoint"),
    "profile": ("profile", "profile", "parameters, FLOPs, memory and latency of sub-networks"),
}


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
        0, or 2 after one sentence on stderr for everything the user can mend.
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
        return _fail(f"unknown command {name!r}; choose from {', '.join(COMMANDS)}")
    module, function, _ = COMMANDS[name]
    # Both libraries chatter otherwise: the one at every fork, the other at every memory profile.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    from whittle_nas.cli.parser import run

    try:
        command = getattr(importlib.import_module(f"whittle_nas.cli.{module}"), function)
        run(name, command, arguments[1:])
    except ConfigError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted; run the same command again to go on", status=130)
    except BrokenPipeError:  # `nas profile | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _fail(sentence: str, status: int = 2) -> int:
    print(f"nas: {' '.join(sentence.split())}", file=sys.stderr)  # noqa: T201
    return status


if __name__ == "__main__":
    sys.exit(main())
