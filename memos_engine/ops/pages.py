"""Memory in huge pages, for what every step reads from end to end: with small ones, the processor would look
up a page, and its prefetcher stop, every 4 KiB."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

HUGE = 2 << 20  # bytes of a page


def huge_zeros(nbytes: int) -> Tensor:
    """`[nbytes] uint8` zeros on the CPU, provided at first touch; what does not fill a huge page lies in
    small ones."""
    if nbytes < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(nbytes, dtype=torch.uint8)
    # Private: of shared memory, most systems give no huge pages.
    memory = mmap.mmap(-1, nbytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    everything = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -everything.data_ptr() % HUGE
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE, begin, nbytes)
    return everything[begin : begin + nbytes]
