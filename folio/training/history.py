"""The history of a training: a row per log point, the source of everything that MLflow shows."""

from pathlib import Path
from typing import Any

from folio.run import HISTORY, now_ms, read_history, write_history

Row = dict[str, Any]  # step, time (ms since 1970) and metrics


class History:
    def __init__(self) -> None:
        self.rows: list[Row] = []
        # By step: rows of steps that will be repeated, because the newest checkpoint was damaged.
        # MLflow may have them already, so they replace the rows of the repeated steps.
        self._replayed_rows: dict[int, Row] = {}

    @property
    def last_step(self) -> int:
        return self.rows[-1]["step"] if self.rows else 0

    def add(self, step: int, metrics: dict[str, float]) -> Row:
        """Append the row of a step, and return it."""
        row = {"step": step, "time": now_ms()} | metrics
        self.rows.append(self._replayed_rows.pop(step, row))
        return self.rows[-1]

    def save(self, folder: Path) -> None:
        """Write the rows to an unfinished training's folder: those that MLflow may be sent."""
        write_history([*self.rows, *self._replayed_rows.values()], folder / HISTORY)

    def restore(self, rows: list[Row], step: int, folder: Path) -> None:
        """Continue from the rows of a checkpoint at `step`."""
        self.rows = rows
        if (folder / HISTORY).exists():
            saved = read_history(folder / HISTORY)
            self._replayed_rows = {row["step"]: row for row in saved if row["step"] > step}
