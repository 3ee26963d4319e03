"""The artifacts of a run or a logged model in MLflow: which files exist, and their sizes.

MLflow's status of a run or model only shows that its files were once uploaded, not that they are
still there. Finding out takes one listing per folder.
"""

import os
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import mlflow
from mlflow.exceptions import MlflowException

from folio import files
from folio.tracking.store import STORE_ERRORS, explain


class Artifacts:
    """The artifacts at a URI. All methods may raise STORE_ERRORS."""

    def __init__(self, uri: str, tracking_uri: str):
        """uri: the artifact URI of a run or a logged model. tracking_uri: the URI of its store."""
        self._uri, self._tracking_uri = uri, tracking_uri
        parts = urlsplit(uri)
        # The folder of the artifacts if it is on this machine.
        self.folder = Path(url2pathname(parts.path)) if parts.scheme == "file" else None
        self._sizes: dict[str, dict[str, int]] = {}

    def sizes(self, folder: str) -> dict[str, int]:
        """The sizes in bytes of the files in a folder, by name; "" is the top folder.

        Leaves out subfolders and hidden files. The folder is listed only once.
        """
        if folder not in self._sizes:
            found = self._list_local(folder) if self.folder else self._list(folder)
            visible = {name: size for name, size in found.items() if not name.startswith(".")}
            self._sizes[folder] = visible
        return self._sizes[folder]

    def has(self, path: str, size: int | None = None, md5: str | None = None) -> bool:
        """Whether the artifact exists, with the given size and, if it is on this machine, MD5.

        size, md5: None if they are unknown.
        """
        folder, _, name = path.rpartition("/")
        found = self.sizes(folder).get(name)
        if found is None or size not in (None, found):
            return False
        return not (self.folder and md5) or files.md5(self.folder / path) == md5

    def _list(self, folder: str) -> dict[str, int]:
        uri = f"{self._uri}/{folder}" if folder else self._uri
        try:
            listed = mlflow.artifacts.list_artifacts(
                artifact_uri=uri, tracking_uri=self._tracking_uri
            )
        except STORE_ERRORS:
            raise
        except Exception as problem:  # from a client that MLflow uses, such as boto3
            raise MlflowException(f"cannot list {uri}: {explain(problem)}") from None
        return {Path(f.path).name: f.file_size or 0 for f in listed if not f.is_dir}

    def _list_local(self, folder: str) -> dict[str, int]:
        assert self.folder
        try:
            with os.scandir(self.folder / folder) as entries:
                return {e.name: e.stat().st_size for e in entries if e.is_file()}
        except (FileNotFoundError, NotADirectoryError):
            return {}
