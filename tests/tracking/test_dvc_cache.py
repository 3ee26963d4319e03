"""A dvc.lock that is not one: `lock_problem` describes it, and its outputs are unknown."""

from pathlib import Path

import pytest

from folio import commands
from folio.tracking import dvc_cache

OUT = "{path: models/gpt2, md5: '0123456789abcdef0123456789abcdef.dir'}"


@pytest.fixture
def lock(tmp_path, monkeypatch) -> Path:
    def fail(*_: str, **__: object) -> str:
        raise commands.NoCommitError("there is no git repository")

    monkeypatch.setattr(commands, "git", fail)
    return tmp_path / "dvc.lock"


def test_valid_lock_has_no_problem(lock):
    lock.write_text(f"stages: {{train: {{cmd: x, outs: [{OUT}]}}}}\n")
    assert dvc_cache.lock_problem(lock) is None
    assert list(dvc_cache.outs_in_workspace(lock.parent)) == ["models/gpt2"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "5",
        "[]",
        "stages:",
        "stages: [train]",
        "stages: {train: cmd}",
        "stages: {train: {cmd: x, outs: 5}}",
        "stages: {train: {cmd: x, outs: [cmd]}}",
        "stages: {train: {cmd: x, outs: [{path: [1], md5: 0123456789abcdef0123456789abcdef}]}}",
        "stages: {train: {cmd: x, outs: [{path: a, md5: [1]}]}}",
        "time: 2026-13-45",  # a date that Python does not have
        "[" * 900,
    ],
)
def test_lock_of_another_shape_is_damaged_and_has_no_outputs(lock, content):
    lock.write_text(content + "\n")
    problem = dvc_cache.lock_problem(lock) or ""
    assert problem.startswith("dvc.lock is damaged (") and "\n" not in problem
    assert problem.endswith("): `rm -r dvc.lock`, then `dvc repro`")
    assert dvc_cache.outs_in_workspace(lock.parent) == {}
