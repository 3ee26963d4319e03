"""Several files mapped into memory one after another, as one array."""

import ctypes
import mmap
import os
import weakref
from pathlib import Path

import numpy as np

_FIXED = 0x10  # MAP_FIXED, which the module mmap has not


def map_files(paths: list[Path], dtype: np.dtype) -> np.ndarray:
    """Return the content of the files, one after another, as a read-only array that uses no memory.

    The size of each file except the last must be a multiple of the page size. Raises OSError. If a
    file is truncated later, reading the missing part ends the process with SIGBUS.
    """
    if len(paths) == 1:
        return np.memmap(paths[0], dtype=dtype, mode="r")
    sizes = [path.stat().st_size for path in paths]
    assert not any(size % mmap.PAGESIZE for size in sizes[:-1])
    total = sum(sizes)
    # Reserve the addresses, then replace them by the files.
    base = _mmap(None, total, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    memory = (ctypes.c_ubyte * total).from_address(base)
    weakref.finalize(memory, _libc().munmap, base, total)  # once no array refers to it
    address = base
    for path, size in zip(paths, sizes, strict=True):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            _mmap(address, size, mmap.PROT_READ, mmap.MAP_SHARED | _FIXED, descriptor)
        finally:
            os.close(descriptor)
        address += size
    array = np.frombuffer(memoryview(memory), dtype)
    array.flags.writeable = False
    return array


def advise_random_reads(array: np.ndarray) -> None:
    """Tell the system that a mapped array will be read at random places.

    Otherwise it reads 128 KB from the disk for a window of 2 KB. This is only advice, so errors are
    ignored.
    """
    start = array.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    end = array.ctypes.data + array.nbytes
    _libc().madvise(start, end - start, mmap.MADV_RANDOM)


def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    integer = ctypes.c_int
    library.mmap.argtypes = [
        *(ctypes.c_void_p, ctypes.c_size_t, integer, integer, integer, ctypes.c_long)
    ]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, integer]
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return library


def _mmap(address: int | None, size: int, protection: int, flags: int, descriptor: int) -> int:
    found = _libc().mmap(address, size, protection, flags, descriptor, 0)
    if found in (None, ctypes.c_void_p(-1).value):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return found
