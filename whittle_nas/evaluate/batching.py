"""How much goes into one batch, and what happens when it is too much."""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from whittle_nas.errors import ConfigError

logger = logging.getLogger(__name__)

# what torch says about a CPU's memory, and CUDA's libraries about a GPU's
NO_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")

Result = TypeVar("Result")


class OutOfMemory(ConfigError):
    """Even a single sequence does not fit into the device's memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, which a smaller batch or model can mend."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, OutOfMemory)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_MEMORY)


def column_budget(model: Any, longest: int, batch_size: int | None) -> int:
    """Columns per batch: of `batch_size` longest sequences, or as many as suit the device."""
    if batch_size is not None:
        return batch_size * longest
    on_cpu = model.transformer.wte.weight.device.type == "cpu"
    # a CPU is busy with a few thousand tokens; a GPU starts high and is halved to what it holds
    return max(longest, 4096) if on_cpu else max(64 * longest, 32_768)


def attempt(work: Callable[[], Result]) -> Result | None:
    """Do the work; None if the memory did not suffice."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # outside of the except clause, where the traceback would keep the batch alive
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def halved(budget: int, columns: int, *, single: bool) -> int:
    """Half of what did not fit.

    Raises:
        OutOfMemory: It was a single sequence already.
    """
    if single:
        raise OutOfMemory(
            f"device: one sequence of {columns} tokens does not fit into its memory; use a smaller "
            "sub-network, a lower precision, or another device"
        )
    smaller = max(1, min(budget, columns) // 2)
    logger.warning(
        "out of memory with %d tokens in a batch: going on with at most %d", columns, smaller
    )
    return smaller
