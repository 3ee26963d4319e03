"""Errors as the user sees them: one line with the problem and a hint on how to fix it."""

import contextlib
import errno
import gc
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from folio import output, signals

# The errors of a full or protected disk, each with its hint.
_DISK_HINTS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the file size limit",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.EROFS: "make it writable",
}

# Characters that the path of a project must not contain. MLflow takes ? for the end of a path and
# %41 for A, and fails if there are both kinds of quotes. DVC fails with braces, and its queue with
# control characters. Paths that are not valid UTF-8 contain surrogates.
_UNSUPPORTED = re.compile(
    r"""[?{}\0-\x1f\x7f-\x9f\ud800-\udfff]|%[0-9a-fA-F]{2}|'(?=.*")|"(?=.*')""", re.DOTALL
)

LAUNCHER = "FOLIO_LAUNCHER"  # set in processes that folio/launch.py has started
LOST_CONNECTION = 75  # an exit status: EX_TEMPFAIL of sysexits.h
_silent = False


class UserError(ValueError):
    """Bad input rather than a bug. The user sees only its text: the problem, then a hint."""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn bad input, disk errors and stop requests into one line on stderr and an exit status.

    The exit status is 1 for UserError, for a disk error (see disk_hint) and for a lack of memory,
    and 128 plus the number of the signal for a stop request: 130 for Ctrl-C, 143 for SIGTERM. It is
    141, as for SIGPIPE, if the reader of the output has exited, and LOST_CONNECTION if another
    process of the same training has. Any other exception is a bug and keeps its traceback.
    """
    if not gc.isenabled():  # see folio/__init__.py
        gc.freeze()  # what has been imported is not examined later either
        gc.enable()
    with output.guarded(report):
        try:
            _check_folder()
            with signals.handled(report):
                yield
        except UserError as error:
            _exit(f"{error}{_restore_hint()}")
        except BrokenPipeError:
            report("stopped by a closed pipe; run the same command again to continue")
            sys.exit(128 + signals.SIGPIPE)
        except OSError as error:
            if hint := disk_hint(error):
                _exit(f"{hint}, then run the same command again")
            raise
        except (RuntimeError, MemoryError) as error:
            if hint := _memory_hint(error):
                _exit(f"{hint}{_restore_hint()}")
            if _is_lost_connection(error):
                if LAUNCHER not in os.environ:  # it reports which process has ended
                    report("another process of this training has ended; run the same command again")
                os._exit(LOST_CONNECTION)
            raise
        except signals.Stopped as stopped:
            report(str(stopped))
            sys.stdout.flush()
            os._exit(stopped.status)  # a regular exit takes seconds: PyTorch and MLflow clean up


def running_stage() -> str:
    """The stage that this process runs as `python -m stages.NAME`; "" in any other process."""
    names = [word.removeprefix("stages.") for word in sys.orig_argv if word.startswith("stages.")]
    return names[0] if names else ""


def _restore_hint() -> str:
    """How to restore the outs that DVC removed before it started this stage, if it did."""
    stage, lock = running_stage(), Path("dvc.lock")
    checks = ("", "check", "check_pretrained")
    if "DVC_ROOT" not in os.environ or stage in checks or not lock.is_file():
        return ""
    has_run = f"\n  {stage}:\n" in lock.read_text(encoding="utf-8", errors="replace")
    return "; `dvc checkout` restores its previous results" if has_run else ""


def _check_folder() -> None:
    """Raise UserError if DVC or MLflow cannot work in the project's folder because of its name."""
    try:
        path = os.environ.get("DVC_ROOT") or str(Path.cwd())
    except FileNotFoundError:
        raise UserError("the current folder no longer exists: change to another one") from None
    found = _UNSUPPORTED.search(path)
    problem = found[0] if found else "$"
    if found or os.path.expandvars(path) != path:  # MLflow would replace $HOME
        raise UserError(
            f"the path {path!r} contains {problem!r}, which DVC or MLflow cannot handle: rename the"
            " folder"
        )


def disk_hint(error: OSError) -> str | None:
    """A disk error in one line, with a hint on how to fix it; None for any other error.

    Disk errors include a full or read-only disk, and a file where a folder should be.
    """
    name = error.filename if error.filename2 is None else error.filename2  # of a copy: where to
    path = Path(os.fsdecode(name)) if isinstance(name, str | bytes) else None
    if path and error.errno in (errno.ENOTDIR, errno.EEXIST):
        for place in reversed([path, *path.parents]):
            if place.exists() and not place.is_dir():
                return f"{place} is a file where Folio needs a folder: move it elsewhere"
    if error.errno not in _DISK_HINTS:
        return None
    where = f" while writing {path}" if path else ""
    return f"{error.strerror}{where}: {_DISK_HINTS[error.errno]}"


def _memory_hint(error: Exception) -> str | None:
    """A lack of memory in one line, with a hint on how to fix it; None for any other error."""
    on_gpu = type(error).__name__ == "OutOfMemoryError"  # PyTorch's, for any kind of GPU
    on_gpu |= "CUDA error: out of memory" in str(error)
    if on_gpu or isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        memory = "GPU memory" if on_gpu else "memory"
        return f"out of {memory}: docs/recipes.md (Out of GPU memory) lists ways to use less"
    return None


def silence() -> None:
    """Report nothing from now on, because another process reports it."""
    global _silent
    _silent = True


def _is_lost_connection(error: Exception) -> bool:
    """Whether the error is PyTorch's after another process of the same group has ended."""
    kinds = ("DistBackendError", "DistNetworkError", "DistStoreError")
    return type(error).__name__ in kinds or "gloo/transport" in str(error)


def report(line: str) -> None:
    """Print a line on stderr, prefixed with "folio", with the stage that DVC is running, if any,
    and with the number of this process, if it is not the main one of several."""
    words = ["folio", os.environ.get("DVC_STAGE", "")]
    if (rank := os.environ.get("RANK", "")).isdecimal() and int(rank):
        words.append(f"(process {rank})")
    if not _silent:
        print(f"{' '.join(filter(None, words))}: {line}", file=sys.stderr, flush=True)


def _exit(line: str) -> NoReturn:
    report(line.replace("?; ", "? "))  # after "did you mean ...?", where to go back to
    if os.environ.get("WORLD_SIZE", "1") != "1":
        if _silent:
            time.sleep(1)  # launchers stop the others when one ends: first the one that reports
        sys.stdout.flush()
        os._exit(1)  # a regular exit may be aborted, because the other processes have ended
    sys.exit(1)
