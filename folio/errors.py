"""What the user reads when something is wrong: one line that names it and the way out."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator


class UserError(ValueError):
    """Bad input, not a bug. Its text is all that the user sees: what is wrong, then the way out."""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn bad input, a full disk and Ctrl-C into a line on stderr and an exit status.

    Exits with 1 for UserError and for a full disk, 130 for Ctrl-C. Any other exception is a bug
    and keeps its traceback.
    """
    try:
        yield
    except UserError as problem:
        _leave(str(problem), 1)
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" while writing {problem.filename}" if problem.filename else ""
        _leave(f"no space left on the disk{where}: make room, then run the same command again", 1)
    except KeyboardInterrupt:
        _leave("stopped by Ctrl-C; the same command goes on from the last checkpoint there is", 130)


def _leave(line: str, status: int) -> None:
    stage = os.environ.get("DVC_STAGE")
    print(f"folio{' ' + stage if stage else ''}: {line}", file=sys.stderr, flush=True)
    sys.exit(status)
