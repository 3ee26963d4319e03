"""Standard output and error that survive a closed terminal, and report a closed pipe."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator

from folio import signals


class _Output(io.TextIOWrapper):
    """Discards the text if the terminal has been closed, so training that ignores SIGHUP continues.

    If the reader of a pipe has exited, raises BrokenPipeError; but inside a `signals.deferred`
    block it requests a stop instead, so that the block is not interrupted halfway.
    """

    def __init__(self, stream: io.TextIOWrapper, report: Callable[[str], None]):
        super().__init__(
            stream.buffer,
            encoding=stream.encoding,
            errors="backslashreplace",  # for characters that are not in the encoding
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        self._report = report

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._discard(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._discard(error)

    def _discard(self, error: OSError) -> None:
        """Discard this and all further output. Raises any error other than a closed terminal."""
        closed_pipe = error.errno == errno.EPIPE
        if not closed_pipe and error.errno not in (errno.EIO, errno.EBADF):
            raise error
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)
        if closed_pipe and not signals.is_deferred():
            raise error
        if closed_pipe:
            signals.request("a closed pipe", signals.SIGPIPE, self._report)


@contextlib.contextmanager
def guarded(report: Callable[[str], None]) -> Iterator[None]:
    """Replace sys.stdout and sys.stderr in this block, unless something else, such as a test, has
    already replaced them. report: as for `signals.handled`."""
    _open_closed_streams()
    previous = sys.stdout, sys.stderr
    if type(sys.stdout) is io.TextIOWrapper:
        sys.stdout.flush()
        sys.stdout = _Output(sys.stdout, report)
    if type(sys.stderr) is io.TextIOWrapper:
        sys.stderr = _Output(sys.stderr, report)
    # Closing a stream would close the file beneath it, and loggers may use the stream until exit.
    _kept.extend(stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, _Output))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, _Output):
                stream.flush()
        sys.stdout, sys.stderr = previous


def _open_closed_streams() -> None:
    """Discard what is written to a stream that was closed when the process started (`>&-`).

    Python sets it to None, and the next file that is opened gets its descriptor.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))


_kept: list[_Output] = []
