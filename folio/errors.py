"""Errors as the user sees them: one line with the problem and a hint on how to fix it."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

from folio import signals

# The errors of a full or protected disk, each with its hint.
_DISK_HINTS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the file size limit",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.EROFS: "make it writable",
}


class UserError(ValueError):
    """Bad input rather than a bug. The user sees only its text: the problem, then a hint."""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn bad input, disk errors and stop requests into one line on stderr and an exit status.

    The exit status is 1 for UserError and for a full or read-only disk, 130 for Ctrl-C and 143 for
    SIGTERM. Any other exception is a bug and keeps its traceback.
    """
    try:
        with signals.handled(report):
            yield
    except UserError as error:
        _exit(str(error))
    except OSError as error:
        if error.errno not in _DISK_HINTS:
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        hint = f"{_DISK_HINTS[error.errno]}, then run the same command again"
        _exit(f"{error.strerror}{where}: {hint}")
    except signals.Stopped as stopped:
        report(str(stopped))
        sys.stdout.flush()
        os._exit(stopped.status)  # a regular exit takes seconds: PyTorch and MLflow clean up


def report(line: str) -> None:
    """Print a line on stderr, preceded by "folio" and the stage that DVC is running, if any."""
    stage = os.environ.get("DVC_STAGE")
    print(f"folio{' ' + stage if stage else ''}: {line}", file=sys.stderr, flush=True)


def _exit(line: str) -> NoReturn:
    report(line)
    sys.exit(1)
