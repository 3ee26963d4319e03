"""The folder in which a corpus is encoded, which outlives a killed run.

DVC removes the outs of a stage before it runs, so what is unfinished is not among them.
"""

import contextlib
import dataclasses
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock

from folio import files
from folio.corpus import encoding, tasks
from folio.corpus.corpus import Corpus
from folio.run import UNFINISHED

_SOURCES = [Path(__file__).parent, Path(__file__).parent.parent / "tokens"]


@contextlib.contextmanager
def opened(project: Path, corpus: Corpus, column: str) -> Iterator[Path]:
    """Yield the folder for a corpus, and remove it once the block has succeeded.

    It is .checkpoints/prepare-KEY in the project, where KEY is a hash of all that the segments
    depend on; a file counts as unchanged if its size and its modification time are. A small corpus
    gets a temporary folder. While another process is using the folder, prints a message and waits.
    """
    if corpus.size < tasks.TASK:
        with tempfile.TemporaryDirectory(prefix="folio-prepare-") as temporary:
            yield Path(temporary)
        return
    folder = project / UNFINISHED / f"prepare-{_key(corpus, column)}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.with_suffix(".lock"))
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        print("another process is preparing this corpus: waiting for it to finish", file=sys.stderr)
        lock.acquire(poll_interval=0.5)
    try:
        folder.mkdir(exist_ok=True)
        for leftover in folder.glob(".*"):  # from a process that was killed while writing
            leftover.unlink()
        yield folder
        files.remove_folder(folder)
    finally:
        lock.release()


def _key(corpus: Corpus, column: str) -> str:
    described = [{**dataclasses.asdict(file), "path": ""} for file in corpus.files]
    sources = [path.read_bytes() for folder in _SOURCES for path in sorted(folder.glob("*.py"))]
    code = hashlib.sha256(b"".join(sources)).hexdigest()
    content = json.dumps([corpus.name, described, column, tasks.TASK, encoding.SEGMENT, code])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
