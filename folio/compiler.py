"""Whether kernels for a GPU can be compiled on this machine."""

import functools
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path


@functools.cache
def works() -> bool:
    """Triton is there (PyTorch's CUDA builds for Linux bring it), and what it calls: a C compiler
    and Python's headers."""
    headers = Path(sysconfig.get_path("include"), "Python.h")
    compilers = (os.environ.get("CC"), "gcc", "clang")
    found = any(shutil.which(compiler) for compiler in compilers if compiler)
    return importlib.util.find_spec("triton") is not None and found and headers.exists()
