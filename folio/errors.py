"""What the user reads when something is wrong: one line that names it and the way out."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator

from folio import signals

# What the disk may refuse, and the way out.
_WAYS_OUT = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "raise the limit on a file's size",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.EROFS: "make it writable",
}


class UserError(ValueError):
    """Bad input, not a bug. Its text is all that the user sees: what is wrong, then the way out."""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn bad input, a full disk and a notice to stop into a line on stderr and an exit status.

    Exits with 1 for UserError and for a disk that refuses, 130 for Ctrl-C, 143 for SIGTERM. Any
    other exception is a bug and keeps its traceback.
    """
    try:
        with signals.handled(say):
            yield
    except UserError as problem:
        _leave(str(problem), 1)
    except OSError as problem:
        if problem.errno not in _WAYS_OUT:
            raise
        where = f" while writing {problem.filename}" if problem.filename else ""
        way_out = f"{_WAYS_OUT[problem.errno]}, then run the same command again"
        _leave(f"{problem.strerror}{where}: {way_out}", 1)
    except signals.Stopped as notice:
        say(str(notice))
        sys.stdout.flush()
        os._exit(notice.status)  # PyTorch and MLflow take seconds to take leave


def say(line: str) -> None:
    """Print a line on stderr, in the name of the stage that DVC runs."""
    stage = os.environ.get("DVC_STAGE")
    print(f"folio{' ' + stage if stage else ''}: {line}", file=sys.stderr, flush=True)


def _leave(line: str, status: int) -> None:
    say(line)
    sys.exit(status)
