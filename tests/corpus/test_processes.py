"""Several processes encode a corpus as one does, and leave nothing behind when they are stopped."""

import hashlib
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from folio.corpus import encoding, processes, segments, tasks, work
from folio.corpus.params import PrepareParams
from folio.errors import UserError, one_line_errors
from stages import prepare


@pytest.fixture
def plan(corpus_folder, monkeypatch):
    """A plan of some tasks of two seconds altogether."""
    monkeypatch.setattr(tasks, "TASK", 150_000)
    corpus_folder.write(
        "a.txt", "".join(f"Verse {n}: the sea of night.\n\n" for n in range(20_000))
    )
    corpus_folder.write("b.jsonl.gz", [f"Letter {n}, to the moon." * 20 for n in range(2_000)])
    corpus_folder.write("c.parquet", [f"Star {n} of the sea. " * 100 for n in range(500)])
    found = corpus_folder.find()
    return segments.Plan(found, "text", tasks.divide(found, "text"))


def use_cores(monkeypatch, count):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(count), raising=False)


def contents(folder):
    """The names of the segment files, and what is in them."""
    found = segments.find(folder)
    return [(each.path.name, each.facts(), hash(each.ids().tobytes())) for each in found]


def children():
    return [each for each in psutil.Process().children() if "folio.corpus.worker" in each.cmdline()]


@pytest.fixture
def alone(plan, tmp_path, monkeypatch):
    """The segments that one process makes."""
    use_cores(monkeypatch, 1)
    (tmp_path / "alone").mkdir()
    processes.encode(plan, tmp_path / "alone", True)
    assert len(plan.tasks) > 8
    return contents(tmp_path / "alone")


def test_segments_do_not_depend_on_the_number_of_processes(plan, alone, tmp_path, monkeypatch):
    for count in (2, 3):
        use_cores(monkeypatch, count)
        folder = tmp_path / f"of {count}"
        folder.mkdir()
        processes.encode(plan, folder, True)
        assert contents(folder) == alone
        assert not children()


def test_killed_process_is_one_line_and_what_is_encoded_is_kept(plan, alone, tmp_path, monkeypatch):
    use_cores(monkeypatch, 2)
    folder = tmp_path / "killed"
    folder.mkdir()
    read = processes._Worker.read

    def read_and_kill(worker):
        if len(segments.find(folder)) > 2:
            worker._process.send_signal(signal.SIGKILL)
            worker._process.wait()
            while os.read(worker.output.fileno(), 1 << 16):
                pass
        return read(worker)

    monkeypatch.setattr(processes._Worker, "read", read_and_kill)
    with pytest.raises(UserError, match=r"was killed by signal 9: free some memory") as error:
        processes.encode(plan, folder, True)
    assert "\n" not in str(error.value) and not children()
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("[!.]*.npz")}
    assert 2 < len(kept) < len(alone)
    monkeypatch.setattr(processes._Worker, "read", read)
    processes.encode(plan, folder, True)
    assert contents(folder) == alone
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept


def test_problem_with_the_text_reaches_the_user_from_any_process(
    plan, corpus_folder, tmp_path, monkeypatch
):
    use_cores(monkeypatch, 2)
    corpus_folder.write("d.jsonl", b'{"text": 7}\n')
    found = corpus_folder.find()
    plan = segments.Plan(found, "text", tasks.divide(found, "text"))
    with pytest.raises(UserError, match=r"d\.jsonl line 1 has no text in 'text'"):
        processes.encode(plan, tmp_path, True)
    assert not children()


def test_disk_error_reaches_the_user_from_any_process(plan, tmp_path, monkeypatch):
    use_cores(monkeypatch, 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # bytes per file, like a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            processes.encode(plan, tmp_path, True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    # The other process may have been killed while it wrote a file, under a hidden name.
    assert not children() and not list(tmp_path.glob("[!.]*.npz"))


SETTINGS = {"corpus": "data/raw/set", "text_column": "text", "validation_fraction": 0.1}
SETTINGS |= {"training_fraction": 1.0, "segmentations": 0, "bpe_dropout": 0.1}
SETTINGS |= {"report_batch_size": 8, "report_block_size": 128}


def outs(root: Path) -> dict[Path, str]:
    paths = [path for path in (root / "data").rglob("*") if path.is_file()]
    return {
        path.relative_to(root): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
        if "raw" not in path.parts
    }


def saved_segments(root: Path) -> int:
    return len([*root.glob(".checkpoints/prepare-*/[!.]*.npz")])


def stop(root: Path, number: int) -> str:
    """Run prepare in `root`, and send it a signal after its first segment; return stderr."""
    lines, before = root / "stderr", saved_segments(root)

    def run() -> None:
        os.chdir(root)
        with lines.open("w") as sys.stderr, one_line_errors():
            prepare.run(PrepareParams(**SETTINGS), Path(), Path())

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    while saved_segments(root) == before:
        assert process.is_alive(), lines.read_text()
        time.sleep(0.002)
    workers = psutil.Process(process.pid).children()
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode in (-signal.SIGKILL, 128 + number)
    assert workers and not psutil.wait_procs(workers, timeout=10)[1]
    return lines.read_text()


def test_stopped_prepare_continues_and_writes_the_same_bytes(
    plan, corpus_folder, tmp_path, monkeypatch
):
    root, whole = corpus_folder.root, tmp_path / "whole"
    shutil.copytree(root / "data", whole / "data")
    use_cores(monkeypatch, 1)
    monkeypatch.setattr(encoding, "SEGMENT", 300_000)
    saved, save = [], encoding._Builder.save
    monkeypatch.setattr(encoding._Builder, "save", lambda *args: saved.append(save(*args)))
    prepare.run(PrepareParams(**SETTINGS), whole, whole)
    total = len(saved)
    use_cores(monkeypatch, 2)
    stop(root, signal.SIGKILL)
    line = stop(root, signal.SIGTERM)
    assert line.count("\n") == 1
    assert "% of the text is encoded; run the same command again to continue" in line
    kept = saved_segments(root)
    use_cores(monkeypatch, 1)
    saved.clear()
    prepare.run(PrepareParams(**SETTINGS), root, root)
    assert 2 <= kept == total - len(saved)
    assert outs(root) == outs(whole)
    assert [path.suffix for path in (root / ".checkpoints").iterdir()] == [".lock"]


def test_changed_file_or_column_is_encoded_from_the_start(plan, corpus_folder):
    found = corpus_folder.find()
    key = work._key(found, "text")
    assert work._key(corpus_folder.find(), "text") == key
    assert work._key(found, "body") != key
    os.utime(corpus_folder.path / "a.txt", (1, 1))
    assert work._key(corpus_folder.find(), "text") != key
