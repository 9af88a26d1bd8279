"""Keep freed memory in the process: the system would clear every page before it lends it again."""

import ctypes
import os
import sys

SWITCH = "ISIC_VQ_KEEP_MEMORY"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
TRIM_THRESHOLD = 2**31 - 1  # bytes free at the end of the heap, past which glibc shrinks it
# Bytes from which a block is the system's; glibc before 2.35 refuses more than 32 MiB.
MMAP_THRESHOLDS = (2**30, 2**25)


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep what is freed, for the rest of the process; returns whether it does.

    By default large tensors return to the system when they are freed: a model on a CPU spends a third of its time on pages
    that are cleared again and again. `ISIC_VQ_KEEP_MEMORY=0` in the environment leaves malloc as it is.
    """
    wanted = os.environ.get(SWITCH, "1")
    if wanted not in ("0", "1"):
        raise ValueError(f"{SWITCH} is {wanted!r}: expected 1, to keep freed memory in the process, or 0")
    if wanted == "0" or sys.platform != "linux":
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    above = any(library.mallopt(M_MMAP_THRESHOLD, size) for size in MMAP_THRESHOLDS)
    return above and bool(library.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD))
