"""The speed of training, and how often it can afford a checkpoint."""

import contextlib
import time
from collections.abc import Iterator

# Checkpoints after evaluations may use at most this share of the training time, except those that
# take less than _NEGLIGIBLE seconds.
_SHARE, _NEGLIGIBLE = 0.1, 0.2


class Throughput:
    """Tokens per second during training steps, excluding evaluations and checkpoints."""

    def __init__(self, tokens_per_step: int, step: int):
        self._tokens_per_step = tokens_per_step
        self.restart(step)

    def restart(self, step: int) -> None:
        self._step, self._started = step, time.perf_counter()

    def read(self, step: int) -> dict[str, float]:
        """The metric tokens_per_second since `restart`; {} if there has been no step since."""
        if step == self._step:
            return {}
        elapsed = time.perf_counter() - self._started
        return {"tokens_per_second": self._tokens_per_step * (step - self._step) / elapsed}


class CheckpointPacing:
    """Decides when a checkpoint is due: every `interval` seconds, and after each evaluation, as
    long as checkpoints take at most a tenth of the time."""

    def __init__(self, interval: float):
        self._interval = interval
        self._last = time.monotonic()  # the end of the last checkpoint
        self._wait_after_evaluation = 0.0  # seconds

    def is_due(self, evaluated: bool) -> bool:
        wait = self._wait_after_evaluation if evaluated else self._interval
        return time.monotonic() - self._last >= wait

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Measure the time of the block, which writes a checkpoint."""
        started = time.monotonic()
        yield
        self._last = time.monotonic()
        cost = max(0.0, self._last - started - _NEGLIGIBLE)
        self._wait_after_evaluation = cost / _SHARE
