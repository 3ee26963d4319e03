"""Work that runs beside the main stream of a GPU, such as products that nothing is waiting for."""

from collections.abc import Callable
from typing import Any

import torch


class SideStream:
    """A second CUDA stream. Can be captured in a CUDA graph, if `join` is called before its end.

    The memory of a tensor is reused on the main stream as soon as nothing refers to it, so the
    tensors that the side stream reads are held until the main stream has waited for it. Without a
    GPU, all work runs at once.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._held: list[Any] = []  # arguments of the work since the last `advance`
        self._previous: tuple[torch.cuda.Event, list[Any]] | None = None  # and of that before

    def run(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Run work(*arguments) after all work of the main stream so far."""
        if self._stream is None:
            work(*arguments)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work(*arguments)
        self._held.append(arguments)

    def advance(self) -> None:
        """Let the main stream wait for the work before the previous call of `advance`.

        So the side stream falls behind by what runs between two calls, and memory stays bounded.
        """
        if self._stream is None:
            return
        if self._previous:
            self._previous[0].wait()
        self._previous = self._stream.record_event(), self._held
        self._held = []

    def join(self) -> None:
        """Let the main stream wait for all work."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        self._held, self._previous = [], None
