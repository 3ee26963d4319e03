"""The file of a SQLite URI: paths may contain characters that URIs and patterns interpret."""

import sqlite3

import pytest

from folio.tracking import local_store
from folio.tracking.store import Store


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("sqlite:///mine.db", "mine.db"),
        ("sqlite:///my%20store.db", "my store.db"),
        ("sqlite:///my store.db", "my store.db"),
        ("sqlite:///a%3Fb.db", "a?b.db"),
        ("sqlite:///a%2541.db", "a%41.db"),
        ("sqlite:///100%.db", "100%.db"),
        ("sqlite:///a#b&c+d[x]*.db", "a#b&c+d[x]*.db"),
        ("sqlite:///stores/mine.db?timeout=5", "stores/mine.db"),
    ],
)
def test_path_of_is_the_file_that_sqlalchemy_opens(project, uri, name):
    from sqlalchemy import create_engine

    (project / name).parent.mkdir(exist_ok=True)
    assert local_store.path_of(uri) == project / name
    with create_engine(local_store.absolute_uri(uri)).connect():
        assert (project / name).exists()


@pytest.mark.parametrize("uri", ["sqlite:///:memory:", "sqlite://", "sqlite:///file:a.db?uri=true"])
@pytest.mark.parametrize("prefix", ["", "http://localhost:5000#"])
def test_path_of_another_store_is_none(project, uri, prefix):
    assert local_store.path_of(prefix + uri) is None


def test_absolute_path_is_not_below_the_project(project):
    assert str(local_store.path_of("sqlite:////tmp/mine.db")) == "/tmp/mine.db"
    assert local_store.absolute_uri("sqlite:////tmp/mine.db") == "sqlite:////tmp/mine.db"


@pytest.mark.parametrize("name", ["a[b].db", "a%3Fb%2541.db"])
def test_store_is_created_under_its_name_and_nothing_else(project, name):
    store = Store(f"sqlite:///{name}")
    path = local_store.path_of(f"sqlite:///{name}")
    assert path is not None and path.parent == project
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT count(*) FROM experiments").fetchone() == (2,)
    store.client.create_run(store.experiment_id)
    assert {each.name for each in project.iterdir()} <= {path.name, f"{path.name}.lock"}
