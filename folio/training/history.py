"""The history of a training run: one row per log point. MLflow's metrics are copies of it."""

from pathlib import Path
from typing import Any

from folio.run import HISTORY, now_ms, read_history, write_history

Row = dict[str, Any]  # step, time (ms since 1970) and metrics


class History:
    def __init__(self) -> None:
        self.rows: list[Row] = []
        # By step: rows of steps that will be repeated, for example because the newest checkpoint
        # was damaged. They may already be in MLflow, so they replace the rows of these steps.
        self._replayed_rows: dict[int, Row] = {}

    @property
    def last_step(self) -> int:
        return self.rows[-1]["step"] if self.rows else 0

    def is_replayed(self, step: int) -> bool:
        """Whether the row for a repeated step may already be in MLflow."""
        return step in self._replayed_rows

    def add(self, step: int, metrics: dict[str, float]) -> Row:
        """Append the row for a step, and return it."""
        row = {"step": step, "time": now_ms()} | metrics
        self.rows.append(self._replayed_rows.pop(step, row))
        return self.rows[-1]

    def save(self, folder: Path) -> None:
        """Write the rows to the unfinished run's folder. Only saved rows are sent to MLflow."""
        write_history([*self.rows, *self._replayed_rows.values()], folder / HISTORY)

    def restore(self, rows: list[Row], step: int, folder: Path) -> None:
        """Continue from the rows saved in the checkpoint of `step`; without one, from step 0."""
        self.rows = rows
        last = rows[-1]["step"] if rows else -1
        if (folder / HISTORY).exists():
            saved = read_history(folder / HISTORY)
            repeated = [row for row in saved if row["step"] >= step and row["step"] > last]
            self._replayed_rows = {row["step"]: row for row in repeated}
