"""Whatever git keeps refers to objects in DVC's cache: branches, tags, stashes, worktrees, ..."""

import hashlib
import json
from pathlib import Path

import pytest
from conftest import succeed

from folio import commands
from folio.tracking import cache_usage


def md5(name: str) -> str:
    return hashlib.md5(name.encode()).hexdigest()


def write(folder: Path, *names: str, file: str = "dvc.lock") -> None:
    """A lock file whose stage has files with these names as outs."""
    outs = [{"path": f"models/{name}", "md5": md5(name)} for name in names]
    text = json.dumps({"schema": "2.0", "stages": {"a": {"cmd": "a", "outs": outs}}})
    (folder / file).write_text(text + "\n")


def commit(folder: Path, *names: str) -> None:
    write(folder, *names)
    succeed(folder, "git", "add", "-A")
    succeed(folder, "git", "commit", "-qm", " ".join(names))


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A repository with a branch, a tag, two stashes, a worktree, experiments and a .dvc file."""
    monkeypatch.setattr(commands, "dvc", lambda *_, **__: ".dvc/cache\n")
    root = tmp_path / "repository/inner"  # DVC's root may be in a folder of the repository
    (root / ".dvc/cache/files/md5/ab").mkdir(parents=True)
    for words in (
        ("init", "-qb", "main"),
        ("config", "user.email", "a@b"),
        ("config", "user.name", "a"),
    ):
        succeed(root.parent, "git", *words)
    (root / ".gitignore").write_text(".dvc\n")
    commit(root, "first")
    commit(root, "main")
    succeed(root, "git", "checkout", "-qb", "other")
    commit(root, "other")
    succeed(root, "git", "tag", "v1")
    succeed(root, "git", "checkout", "-q", "main")
    succeed(root, "git", "branch", "-qD", "other")  # the tag keeps its commit
    for name in ("stash 1", "stash 2"):
        write(root, name)
        succeed(root, "git", "stash")
    commit(root, "amended")
    write(root, "amending")
    succeed(root, "git", "commit", "-qa", "--amend", "--no-edit")
    base = succeed(root, "git", "rev-parse", "HEAD").strip()
    for name, ref in (
        ("exp", f"{base[:2]}/{base[2:]}/exp"),
        ("queued", "celery/stash"),
        ("before apply", "apply/stash"),  # what DVC keeps of its own accord is not in use
        ("applied and then removed", "exec/EXEC_APPLY"),
    ):
        commit(root, name)
        succeed(root, "git", "update-ref", f"refs/exps/{ref}", "HEAD")
        succeed(root, "git", "reset", "-q", "--hard", "HEAD~")
    succeed(root, "git", "worktree", "add", "-q", str(tmp_path / "worktree"), "--detach")
    write(tmp_path / "worktree/inner", "worktree")
    write(root, "staged")
    succeed(root, "git", "add", "dvc.lock")
    write(root, "added", file="data.dvc")
    write(root, "workspace")
    return root


def test_everything_that_git_keeps_is_in_use(root):
    usage = cache_usage.read(root)
    committed = ("first", "main", "other", "stash 1", "stash 2", "amending", "queued")
    assert usage.commits == {md5(name) for name in committed}
    in_worktrees = ("workspace", "staged", "worktree", "amending", "added")
    assert usage.workspace == {md5(name) for name in in_worktrees}
    [experiment] = usage.experiments
    assert (experiment.name, experiment.objects) == ("exp", {md5("exp")})
    assert usage.unlisted == set()
    assert cache_usage.commit_with(root, md5("first")) and not cache_usage.commit_with(
        root, md5("exp")
    )


def test_damaged_lock_file_in_a_commit_still_counts(root):
    (root / "dvc.lock").write_text(f"stages: [{md5('damaged')}\n<<<<<<< {md5('conflict')}.dir")
    succeed(root, "git", "commit", "-qam", "damaged")
    write(root, "workspace")
    found = cache_usage.read(root).commits
    assert {md5("damaged"), f"{md5('conflict')}.dir"} <= found


def test_files_of_a_folder_are_in_use_also_if_its_listing_is_damaged(root):
    folder = md5("folder") + ".dir"
    listing = root / ".dvc/cache/files/md5" / folder[:2] / folder[2:]
    listing.parent.mkdir(parents=True, exist_ok=True)
    listing.write_text(json.dumps([{"md5": md5("inside"), "relpath": "x"}])[:-1])
    write(root, "workspace")
    (root / "dvc.lock").write_text(
        (root / "dvc.lock").read_text().replace(md5("workspace"), folder)
    )
    assert md5("inside") in cache_usage.read(root).workspace


def test_project_without_git_or_cache_has_no_usage(tmp_path):
    usage = cache_usage.read(tmp_path)
    assert not (usage.files or usage.workspace or usage.commits or usage.run_cache)
