"""A relative tracking_uri must not lead out of the project."""

import pytest
import yaml
from conftest import ROOT

from folio.runtime import RuntimeParams


def runtime(tracking_uri: str | None) -> RuntimeParams:
    settings = yaml.safe_load((ROOT / "params.yaml").read_text())["runtime"]
    return RuntimeParams(**settings | {"tracking_uri": tracking_uri})


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:///../x.db",
        "sqlite:///data/../../x.db",
        "sqlite:///%2e%2e/x.db",
        "sqlite:///file:../x.db?uri=true",
        "SQLite+pysqlite:///../x.db",
        "sqlite://../x.db",
        "../mlruns",
        "..",
        "mlruns/../../x",
        "..\\x",
        "://../x",
        "1://../x",
        "file:../x",
        "file://../x",
    ],
)
def test_relative_uri_that_leaves_the_project_is_rejected(uri):
    with pytest.raises(ValueError, match=r"^tracking_uri: .*use an absolute path") as error:
        runtime(uri)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "uri",
    [
        None,
        "sqlite:///mine.db",
        "sqlite:///stores/mine..db",
        "sqlite:////tmp/mine.db",
        "sqlite:////tmp/../mine.db",
        "mlruns",
        "/tmp/mlruns",
        "file:///tmp/../mlruns",
        "http://127.0.0.1:5000",
        "https://example.org/a/../b",
        "postgresql://user@host/db",
        "databricks",
    ],
)
def test_uri_in_the_project_or_with_an_absolute_path_is_accepted(uri):
    assert runtime(uri).tracking_uri == uri
