"""Memory that was freed, back to the system."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Let the C library return what it holds free.

    glibc keeps freed tensors below a threshold that rises to 32 MB on its heap, where they lie
    between others: after forty blocks that had been as much as the checkpoint. Other libraries have
    no such call, and need none.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
