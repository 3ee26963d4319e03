"""How `doctor` reports findings and failures of its checks."""

import os
from collections.abc import Iterator

import pytest
import torch

from folio import device
from folio.cli import doctor
from folio.cli.doctor import Finding
from folio.errors import UserError


def test_report_marks_findings_with_a_hint_as_failures(capsys):
    def check() -> Iterator[Finding]:
        yield Finding("disk")
        yield Finding("no git commit", "make one")

    assert len(doctor._report(check)) == 2
    assert capsys.readouterr().out == "ok   disk\nFAIL no git commit: make one\n"


def test_report_continues_after_a_check_that_raises(capsys):
    def refused() -> Iterator[Finding]:
        raise UserError("params.yaml is missing")
        yield

    def broken() -> Iterator[Finding]:
        yield Finding(str(1 / 0))

    assert all(each.hint for check in (refused, broken) for each in doctor._report(check))
    assert capsys.readouterr().out == (
        "FAIL params.yaml is missing\nFAIL broken: ZeroDivisionError('division by zero')\n"
    )


def test_more_threads_than_cores_are_a_problem(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2), raising=False)
    assert list(doctor._thread_problems(2)) == []
    [finding] = doctor._thread_problems(3)
    assert finding.text == "3 threads on 2 cores" and finding.hint.endswith("set it to 2")


@pytest.mark.parametrize(
    ("build", "hint"), [(None, "make run CPU="), ("13.0", "install the build of PyTorch for this")]
)
def test_gpu_that_pytorch_does_not_see_is_a_problem(monkeypatch, build, hint):
    monkeypatch.setattr(doctor, "_output", lambda *_: "GPU 0: NVIDIA H100")
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(device, "resolve_device", lambda _: torch.device("cpu"))
    assert hint in next(doctor.accelerator()).hint
