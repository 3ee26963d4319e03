"""What files take on disk, and what their removal frees."""

import os
from pathlib import Path

import pytest

from folio.tracking import sizes

MB = 1_048_576


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with two files of 1 MB, one of them with a second hard link."""
    (tmp_path / "folder/inner").mkdir(parents=True)
    for name in ("folder/a", "folder/inner/b"):
        (tmp_path / name).write_bytes(os.urandom(MB))
    (tmp_path / "folder/c").hardlink_to(tmp_path / "folder/a")
    return tmp_path / "folder"


def test_size_counts_hard_links_once(folder):
    assert 2 * MB <= sizes.of(folder) < 2.1 * MB
    assert MB <= sizes.of(folder / "a") < 1.1 * MB
    assert sizes.of(folder / "missing") == 0


def test_removal_frees_what_has_no_other_link(folder, tmp_path):
    (tmp_path / "elsewhere").hardlink_to(folder / "inner/b")
    assert sizes.remove(folder / "a") == 0  # c remains
    assert MB <= sizes.remove(folder) < 1.1 * MB
    assert not folder.exists() and (tmp_path / "elsewhere").stat().st_size == MB
    assert sizes.remove(folder) == 0


def test_link_is_removed_without_its_target(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert sizes.of(tmp_path / "link") == sizes.of(folder)
    sizes.remove(tmp_path / "link")
    assert (folder / "a").exists() and not (tmp_path / "link").is_symlink()


def test_size_is_shown_with_a_unit():
    shown = [sizes.shown(size) for size in (0, 4096, 27_300_000, 1_234_000_000)]
    assert shown == ["0.0 MB", "0.0 MB", "27.3 MB", "1.23 GB"]
