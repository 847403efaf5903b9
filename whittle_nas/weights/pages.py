"""Memory of tensors that are mapped from a file: their pages count as long as they are mapped."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import torch

_MAPS = Path("/proc/self/maps")


def release(tensor: torch.Tensor) -> None:
    """Give back the memory of a tensor's pages if they are a file's; it is read again where needed.

    The system keeps the file's content as long as it has room. For tensors that nobody has written
    to: what was written into a private mapping would be lost. Does nothing but on Linux.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu" or tensor.requires_grad:
        return
    storage = tensor.untyped_storage()
    page = mmap.PAGESIZE
    begin = -(-storage.data_ptr() // page) * page
    end = (storage.data_ptr() + storage.nbytes()) // page * page
    if begin < end and _is_of_a_file(begin, end):
        _advise(begin, end - begin)


def _is_of_a_file(begin: int, end: int) -> bool:
    """Whether one mapping of a file holds a range of addresses."""
    for line in _MAPS.read_text().splitlines():
        where, _, _, _, inode, *_ = line.split()
        first, _, last = where.partition("-")
        if int(first, 16) <= begin < int(last, 16):
            return inode != "0" and end <= int(last, 16)
    return False


def _advise(begin: int, size: int) -> None:
    madvise = ctypes.CDLL(None).madvise
    madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), mmap.MADV_DONTNEED)
