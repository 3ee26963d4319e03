"""Shared by the faults in benchmarks/faults.py: the uninterrupted run, and the comparison."""

import argparse
import shutil
import tempfile
from pathlib import Path

from benchmarks import project
from benchmarks.comparison import compare_mlflow, compare_outs
from benchmarks.project import repro

Row = tuple[str, int, int, str]  # fault, times tried, times survived, note


class Bench:
    """The uninterrupted training run, and copies of the prepared project for each fault."""

    def __init__(self, folder: Path, options: argparse.Namespace):
        self.folder, self.options = folder, options
        project.write_project(folder / "base", options.variant, project.tiny(options))
        repro(folder / "base", "prepare").finish()
        self.uninterrupted = self.new_project()
        repro(self.uninterrupted).finish()

    def new_project(self) -> Path:
        """A copy of the project in which only the prepare stage has run, in a new folder."""
        folder = Path(tempfile.mkdtemp(dir=self.folder)) / "project"
        shutil.copytree(self.folder / "base", folder)
        return folder

    def half_way(self, action: str = "slow down") -> str:
        """A fault in the middle of training. "slow down" lasts until Command.speed_up."""
        return f"train|stages/train.py|train|trainer.step(|{self.options.steps // 2}|{action}"

    def compare(self, folder: Path, problems: list[str], uri: str = "") -> str:
        """The problems of a training run, and how its results differ; "" if all is well."""
        try:
            store = uri or f"sqlite:///{folder / 'mlflow.db'}"
            found = [*compare_outs(self.uninterrupted, folder), *compare_mlflow(folder, store)]
        except Exception as error:  # whatever is missing or damaged
            found = [repr(error)]
        return "; ".join(problems + found)

    def verdict(
        self, name: str, folder: Path, note: str, problems: list[str], uri: str = ""
    ) -> list[Row]:
        """The row for a fault that was tried once, after training has been completed."""
        found = self.compare(folder, problems, uri)
        return [(name, 1, int(not found), f"{note}; {found}" if found else note)]
