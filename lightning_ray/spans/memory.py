"""What a shard's process does so that it holds little memory.

Arrow's own allocator and glibc's both keep what was freed, for the next time. A shard allocates
much at once now and then (a segment is sealed, the index is merged), and little in between.
"""

import ctypes
import sys

import pyarrow as pa

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_mallopt = getattr(_LIBC, "mallopt", None)
_malloc_trim = getattr(_LIBC, "malloc_trim", None)

# Of glibc's malloc.h.
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
_LARGE = 256 * 1024
"""From this size on, in bytes, an allocation is handed back when it is freed."""


def hold_little() -> None:
    """Has Arrow allocate with malloc, and malloc keep less; for a process of the store's own."""
    pa.set_memory_pool(pa.system_memory_pool())
    if _mallopt is not None:
        # Each thread that allocates would get a heap of its own, with its own leftovers.
        _mallopt(_M_ARENA_MAX, 2)
        _mallopt(_M_MMAP_THRESHOLD, _LARGE)


def give_back() -> None:
    """Hands memory that is free back to the system; does nothing where libc has no such call."""
    if _malloc_trim is not None:
        _malloc_trim(0)
