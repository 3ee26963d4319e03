"""Errors as the user sees them."""

import errno

import pytest
import torch

from folio.errors import UserError, one_line_errors, report


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("data/x is missing: add it"), "data/x is missing: add it"),
        (
            OSError(errno.ENOSPC, "No space left on device", "data/x"),
            "No space left on device while writing data/x: free some space, then run the same"
            " command again",
        ),
        (
            OSError(errno.EACCES, "Permission denied"),
            "Permission denied: make it writable, then run the same command again",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            "out of GPU memory: docs/recipes.md (Out of GPU memory) lists ways to use less",
        ),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate"),
            "out of memory: docs/recipes.md (Out of GPU memory) lists ways to use less",
        ),
        (
            MemoryError(),
            "out of memory: docs/recipes.md (Out of GPU memory) lists ways to use less",
        ),
    ],
)
def test_one_line_errors_prints_one_line_and_exits_with_status_1(capsys, error, line):
    with pytest.raises(SystemExit) as exit_info, one_line_errors():
        raise error
    assert exit_info.value.code == 1
    assert capsys.readouterr().err == f"folio: {line}\n"


def test_one_line_errors_names_the_stage_that_dvc_runs(capsys, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "train")
    with pytest.raises(SystemExit), one_line_errors():
        raise UserError("no")
    assert capsys.readouterr().err == "folio train: no\n"


def test_hint_after_a_question_is_a_sentence_of_its_own(capsys):
    with pytest.raises(SystemExit), one_line_errors():
        raise UserError("there is no 'thiers'; did you mean theirs?; `git checkout x` restores it")
    line = capsys.readouterr().err
    assert "there is no 'thiers'; did you mean theirs? `git checkout x` restores it" in line


@pytest.mark.parametrize(
    ("rank", "name"), [("0", ""), ("3", " (process 3)"), ("", ""), ("x", ""), ("-1", "")]
)
def test_report_names_the_process_if_it_is_not_the_main_one(capsys, monkeypatch, rank, name):
    monkeypatch.setenv("RANK", rank)
    report("no")
    assert capsys.readouterr().err == f"folio{name}: no\n"


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), OSError(errno.ENOENT, "a bug"), RuntimeError("a bug")]
)
def test_one_line_errors_lets_bugs_through(error):
    with pytest.raises(type(error), match="a bug"), one_line_errors():
        raise error


SUPPORTED = ["a b", " ", "-a", "a#b", "100%", "a%zz", "a&b", "a+b", "a;b", "a[x]b", "a*b", "a'b"]
SUPPORTED += ['a"b', "a\\b", "Übung 中 🙂", "a$x$", "`ls`", "a:b", "a=b", "a,b", "~a", "<a|b>!(^)"]


@pytest.mark.parametrize("name", SUPPORTED)
def test_project_in_a_folder_with_a_supported_name_is_accepted(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(tmp_path / name)
    with one_line_errors():
        pass


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a?b", "'?'"),
        ("a{b}", "'{'"),
        ("b}", "'}'"),
        ("a$HOME", "'$'"),  # a variable that exists
        ("a%41b", "'%41'"),
        ("%2e%2e", "'%2e'"),
        ("a\nb", r"'\n'"),
        ("a\tb", r"'\t'"),
        ("a\x7fb", r"'\x7f'"),
        ("a\x85b", r"'\x85'"),
        ("a\udcffb", r"'\udcff'"),  # the byte 0xFF, which is not UTF-8
        ("a'b\"c", '"\'"'),
        ("a\"b'c", "'\"'"),
    ],
)
@pytest.mark.parametrize("variable", ["cwd", "DVC_ROOT"])
def test_project_in_a_folder_with_an_unsupported_name_is_rejected(
    tmp_path, monkeypatch, capsys, name, shown, variable
):
    (tmp_path / name).mkdir()
    monkeypatch.delenv("DVC_ROOT", raising=False)
    if variable == "cwd":
        monkeypatch.chdir(tmp_path / name)
    else:
        monkeypatch.setenv("DVC_ROOT", str(tmp_path / name))
    with pytest.raises(SystemExit) as exit_info, one_line_errors():
        raise AssertionError("the block must not run")
    assert exit_info.value.code == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line[:-1].isprintable()
    assert f" contains {shown}, which DVC or MLflow cannot handle: rename the folder" in line


def test_removed_current_folder_is_a_one_line_error(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit), one_line_errors():
        pass
    assert "the current folder no longer exists" in capsys.readouterr().err
